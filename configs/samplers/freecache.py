"""FreeCache: finished text is read from the cache, the window shrinks (details unverified).

  genmodels sample --workdir runs/llada --sampler samplers/freecache

The authors' guidance by a small AR model, which decides what is committed, is not there: tokens are committed
from the left.
"""

from genmodels import sections

VARIANTS = ()


def get_config(variant: str = ""):
  cfg = sections.sampler(
    "samplers/freecache",
    title="Accelerating Diffusion Language Model Inference via Efficient KV Caching and Guided Diffusion",
    arxiv="2505.21467",
    row=76,
    tests=(
      "tests/sampling/test_partial.py::test_computed_anew_at_every_step_it_is_exact",
      "tests/sampling/test_plugins.py::test_leftmost_commits_a_prefix",
    ),
    sampler={
      "cache": {"kind": "free"},
      "commit": {"kind": "leftmost"},
      "sub_block": 32,
      "quota": {"kind": "threshold", "tau": 0.9},
    },
  )
  return cfg
