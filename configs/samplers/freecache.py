"""FreeCache: finished text is read from the cache, the window shrinks (details unverified).

  genmodels sample --workdir runs/llada --sampler samplers/freecache
  genmodels sample --workdir runs/llada --sampler samplers/freecache:guided guide.path=runs/ar

Alone it commits from the left what exceeds a threshold. `guided`: a small autoregressive run with the same
tokenizer reads each proposal once, and the run of tokens at the left end that are its own likeliest ones is
committed, at least one; `commit=anywhere` commits every token that agrees. No token is rewritten.
"""

from genmodels import sections

VARIANTS = ("guided",)


def get_config(variant: str = ""):
  cfg = sections.sampler(
    "samplers/freecache",
    title="Accelerating Diffusion Language Model Inference via Efficient KV Caching and Guided Diffusion",
    arxiv="2505.21467",
    row=76,
    tests=(
      "tests/sampling/test_partial.py::test_computed_anew_at_every_step_it_is_exact",
      "tests/sampling/test_plugins.py::test_leftmost_commits_a_prefix",
      "tests/sampling/test_guide.py::test_a_guide_of_the_same_opinion_commits_everything",
      "tests/sampling/test_guide.py::test_what_agrees_is_committed_and_nothing_is_rewritten",
    ),
    sampler={
      "cache": {"kind": "free"},
      "commit": {"kind": "leftmost"},
      "sub_block": 32,
      "quota": {"kind": "threshold", "tau": 0.9},
    },
  )
  if variant == "guided":
    cfg.sampler.quota.tau = 1.0
    cfg.sampler.temperature = 0.0
    cfg.sampler.guide = {"path": ""}
  return cfg
