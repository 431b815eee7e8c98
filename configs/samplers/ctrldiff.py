"""CtrlDiff: the policy of a run chooses how long each next block is.

  genmodels sample --workdir runs/ctrldiff --sampler samplers/ctrldiff sizes.path=runs/ctrldiff

For runs of configs/language/ctrldiff.py. Sizes are drawn from the policy, as in training; `likeliest` takes
the likeliest one. When a block is complete the network reads it once more, for the policy.
"""

from genmodels import sections

VARIANTS = ("likeliest",)


def get_config(variant: str = ""):
  cfg = sections.sampler(
    "samplers/ctrldiff",
    title="CtrlDiff: Boosting Large Diffusion Language Models with Dynamic Block Prediction and Controllable "
    "Generation",
    arxiv="2505.14455",
    row=147,
    tests=(
      "tests/sampling/test_sizes.py::test_a_constant_policy_is_the_sampler_of_that_size",
      "tests/sampling/test_sizes.py::test_generated_rows_have_the_blocks_of_training",
    ),
    sampler={"sizes": {"path": "", "draw": variant != "likeliest"}},
  )
  return cfg
