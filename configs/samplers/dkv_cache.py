"""dKV-Cache: keys and values are kept one step after their token was committed, and refreshed every 8 steps.

  genmodels sample --workdir runs/llada --sampler samplers/dkv_cache

Approximate; the authors refresh Dream every 4 or 16 steps. The greedy and the prefill variants are not there.
"""

from genmodels import sections

VARIANTS = ()


def get_config(variant: str = ""):
  cfg = sections.sampler(
    "samplers/dkv_cache",
    title="dKV-Cache: The Cache for Diffusion Language Models",
    arxiv="2505.15781",
    row=1,
    tests=(
      "tests/sampling/test_partial.py::test_computed_anew_at_every_step_it_is_exact",
      "tests/sampling/test_partial.py::test_what_is_read_is_not_computed",
    ),
    sampler={"cache": {"kind": "delayed", "refresh": 8}},
  )
  return cfg
