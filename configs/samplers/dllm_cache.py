"""dLLM-Cache: the prompt is computed rarely, the answer more often, in between the tokens whose values moved.

  genmodels sample --workdir runs/llada --sampler samplers/dllm_cache

Approximate. K_p = 100, K_r = 7, ρ = .25 are defaults of the released scripts, the paper sets them by task.
The authors choose anew in every layer; here one choice, by the mean over layers, serves all.
"""

from genmodels import sections

VARIANTS = ()


def get_config(variant: str = ""):
  cfg = sections.sampler(
    "samplers/dllm_cache",
    title="dLLM-Cache: Accelerating Diffusion Large Language Models with Adaptive Caching",
    arxiv="2506.06295",
    row=-1,
    tests=(
      "tests/sampling/test_partial.py::test_what_moved_most_is_computed",
      "tests/sampling/test_partial.py::test_what_is_computed",
    ),
    sampler={"cache": {"kind": "value_similarity", "refresh": 7, "prompt": 100, "ratio": 0.25}},
  )
  return cfg
