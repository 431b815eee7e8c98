"""Fast-dLLM: parallel commits above a confidence, and a cache inside the sequence, refreshed at each block.

  genmodels sample --workdir runs/llada --sampler samplers/fast_dllm

For models that see the whole sequence (LLaDA, Dream). Blocks of 32, τ = .9, prefix cache; `dual` keeps the
masks behind the block too, `factor` replaces the threshold by the largest n with (n + 1)(1 − p₍ₙ₎) < f. Both
caches are approximate.
"""

from genmodels import sections

VARIANTS = ("dual", "factor")


def get_config(variant: str = ""):
  cfg = sections.sampler(
    "samplers/fast_dllm",
    title="Fast-dLLM: Training-free Acceleration of Diffusion LLM by Enabling KV Cache and Parallel Decoding",
    arxiv="2505.22618",
    row=-1,
    tests=(
      "tests/sampling/test_plugins.py::test_factor_is_the_largest_n",
      "tests/sampling/test_partial.py::test_computed_anew_at_every_step_it_is_exact",
      "tests/sampling/test_loop.py::test_threshold_one_commits_one_token_a_step",
    ),
    sampler={
      "quota": {"kind": "threshold", "tau": 0.9},
      "score": {"kind": "prob"},
      "sub_block": 32,
      "temperature": 0.0,
      "cache": "prefix",
    },
  )
  if variant == "dual":
    cfg.sampler.cache = "dual"
  elif variant == "factor":
    cfg.sampler.quota = {"kind": "factor", "f": 1.0}
  return cfg
