"""LongLLaDA: a longer context by a larger RoPE base, without training.

  genmodels sample --workdir runs/llada --sampler samplers/longllada

The authors multiply LLaDA's base by 4, 14 and 31 for 8k, 16k and 24k; `:14` and `:31` take the others.
"""

from genmodels import sections

VARIANTS = ("14", "31")


def get_config(variant: str = ""):
  cfg = sections.sampler(
    "samplers/longllada",
    title="LongLLaDA: Unlocking Long Context Capabilities in Diffusion LLMs",
    arxiv="2506.14429",
    row=143,
    tests=(
      "tests/sampling/test_mix.py::test_an_extension_of_one_is_the_model",
      "tests/sampling/test_mix.py::test_critical_dimension_turns_once",
    ),
    model={"extend": {"factor": 4.0}},
  )
  if variant:
    cfg.model.extend.factor = float(variant)
  return cfg
