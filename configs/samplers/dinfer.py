"""dInfer: hierarchical commits, masks that remember their prediction, a cache refreshed around the block.

  genmodels sample --workdir runs/llada --sampler samplers/dinfer

The credit decoder, which keeps a history of every class's confidence, is not there.
"""

from genmodels import sections

VARIANTS = ()


def get_config(variant: str = ""):
  cfg = sections.sampler(
    "samplers/dinfer",
    title="dInfer: An Efficient Inference Framework for Diffusion Language Models",
    arxiv="2510.08666",
    row=259,
    tests=(
      "tests/sampling/test_plugins.py::test_hierarchical_splits_long_runs",
      "tests/sampling/test_mix.py::test_mixture_weights",
      "tests/sampling/test_partial.py::test_computed_anew_at_every_step_it_is_exact",
    ),
    sampler={
      "commit": {"kind": "hierarchical"},
      "mix": {"kind": "smooth"},
      "cache": {"kind": "vicinity", "around": 16},
      "sub_block": 32,
      "quota": {"kind": "threshold", "tau": 0.9},
      "temperature": 0.0,
    },
  )
  return cfg
