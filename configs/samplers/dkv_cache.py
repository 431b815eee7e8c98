"""dKV-Cache: keys and values are kept one step after their token was committed, and refreshed every 8 steps.

  genmodels sample --workdir runs/llada --sampler samplers/dkv_cache
  genmodels sample --workdir runs/llada --sampler samplers/dkv_cache:greedy

Approximate; the authors refresh Dream every 4 or 16 steps. `greedy` computes the tokens that a step commits,
those of the last step and 4 open ones around, everything in every second step; the order is random, as in the
released code, because what is committed has to be known before it is predicted. The prefill variant is not
there.
"""

from genmodels import sections

VARIANTS = ("greedy",)


def get_config(variant: str = ""):
  cfg = sections.sampler(
    "samplers/dkv_cache",
    title="dKV-Cache: The Cache for Diffusion Language Models",
    arxiv="2505.15781",
    row=1,
    tests=(
      "tests/sampling/test_partial.py::test_computed_anew_at_every_step_it_is_exact",
      "tests/sampling/test_partial.py::test_what_is_read_is_not_computed",
      "tests/sampling/test_partial.py::test_what_will_be_committed_is_computed",
    ),
    sampler={"cache": {"kind": "delayed", "refresh": 8}},
  )
  if variant == "greedy":
    cfg.sampler.cache = {"kind": "delayed_greedy", "refresh": 2, "window": 4}
    cfg.sampler.score = "random"
  return cfg
