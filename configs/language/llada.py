"""LLaDA: large-scale masked diffusion, one level per sequence, weight 1/p over all tokens.

  genmodels train --config configs/language/llada.py:tiny --workdir runs/llada

The default variant is the 8B pretraining setting: 4,096 tokens, batch 1,280, AdamW 4e-4 with
warm-up–stable–decay, weight decay 0.1.
"""

from genmodels import sections

VARIANTS = ("tiny",)


def get_config(variant: str = ""):
  cfg = sections.system(
    "language/llada",
    title="Large Language Diffusion Models",
    arxiv="2502.09992",
    row=-1,
    tests=("tests/objectives/test_text.py::test_mdlm_and_llada_settings",),
    model=sections.llama(4096, 32, 32, 12288, remat={"preset": "full"}),
    objective={
      "kind": "tokens",
      "corruption": {
        "kind": "absorb",
        "unit": "doc",
        "count": "bernoulli",
        "schedule": "floor",
        "eps": 1e-3,
        "time": "uniform",
      },
      "layout": {"kind": "streams", "streams": ("n",)},
      "masks": {"full": "full"},
      "terms": {"diffusion": {"stream": "n", "on": "hit", "weight": "inverse_marginal"}},
    },
    data=sections.packed_text(4096),
    optim=sections.adamw(4e-4, warmup=2000, kind="wsd", weight_decay=0.1),
    train={"steps": 440_000},
    sampler={"quota": {"kind": "linear", "steps": 32}, "score": "prob", "sub_block": 32, "temperature": 0.0},
  )
  cfg.batch_size = 1280
  if variant == "tiny":
    sections.tiny_text(cfg)
    cfg.sampler.quota.steps = 8
    cfg.sampler.sub_block = 16
  return cfg
