"""dInfer: hierarchical commits, masks that remember their prediction, a cache refreshed around the block.

  genmodels sample --workdir runs/llada --sampler samplers/dinfer

`credit`: the credit decoder instead of the hierarchical one: tokens that were a slot's likeliest one in
earlier steps get larger logits, and what exceeds the threshold then is committed. α = .7, γ = .2, β = .8 and
τ = .9 are the released values; a slot remembers 8 tokens in place of the vocabulary.
"""

from genmodels import sections

VARIANTS = ("credit",)


def get_config(variant: str = ""):
  cfg = sections.sampler(
    "samplers/dinfer",
    title="dInfer: An Efficient Inference Framework for Diffusion Language Models",
    arxiv="2510.08666",
    row=259,
    tests=(
      "tests/sampling/test_plugins.py::test_hierarchical_splits_long_runs",
      "tests/sampling/test_credit.py::test_credit_is_the_released_rule",
      "tests/sampling/test_credit.py::test_credit_in_the_loop",
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
  if variant == "credit":
    cfg.sampler.commit.kind = "anywhere"
    cfg.sampler.credit = {"alpha": 0.7, "gamma": 0.2, "decay": 0.8}
  return cfg
