"""Efficient-DLM: an AR checkpoint into block diffusion; later tokens of a block are masked more often.

  genmodels train --config configs/language/efficient_dlm.py:tiny --workdir runs/efficient_dlm

The default variant is Qwen3-8B shaped with blocks of 64 (Qwen2.5-1.5B: 16). Every masked token weighs one
over its own probability of being masked. The strength of the position bias is not public; `bias` = 2 ln 2,
with which the last token of a block is four times as likely as the first one to be masked first, is a choice.
"""

from genmodels import sections

VARIANTS = ("tiny",)


def get_config(variant: str = ""):
  cfg = sections.system(
    "language/efficient_dlm",
    title="Efficient-DLM: From Autoregressive to Diffusion Language Models, and Beyond in Speed",
    arxiv="2512.14067",
    row=54,
    tests=(
      "tests/corruption/test_biased.py::test_marginal_is_the_frequency",
      "tests/corruption/test_biased.py::test_marginals_have_the_right_sum_and_limits",
      "tests/corruption/test_biased.py::test_weighting_by_the_marginal_is_unbiased",
    ),
    model=sections.qwen3(4096, 36, 32, 8, 12288, remat={"preset": "full"}),
    objective={
      "kind": "tokens",
      "corruption": {
        "kind": "position_absorb",
        "blocks": {"size": 64},
        "time": "uniform",
        "bias": 1.3863,
      },
      "layout": {"kind": "streams", "streams": ("n", "c")},
      "masks": {"full": "bd3"},
      "terms": {"diffusion": {"stream": "n", "on": "hit", "weight": "inverse_marginal"}},
    },
    data=sections.packed_text(4096),
    optim=sections.adamw(1e-5, warmup=500, kind="cosine", weight_decay=0.1),
    train={"steps": 24_000},
    sampler={"quota": {"kind": "threshold", "tau": 0.9}, "score": "prob"},
  )
  cfg.batch_size = 512
  if variant == "tiny":
    sections.tiny_text(cfg)
    cfg.objective.corruption.blocks.size = 8
  return cfg
