"""MDLM: masked diffusion with the simplified bound (SUBS), log-linear noise, weight 1/t.

  genmodels train --config configs/language/mdlm.py:tiny --workdir runs/mdlm

The default variant has the paper's OpenWebText setting: 12 layers of width 768, 1,024 tokens, batch 512,
AdamW 3e-4 after 2,500 warm-up steps, EMA 0.9999, 1M steps.
"""

from genmodels import sections

VARIANTS = ("tiny",)


def get_config(variant: str = ""):
  cfg = sections.system(
    "language/mdlm",
    title="Simple and Effective Masked Diffusion Language Models",
    arxiv="2406.07524",
    row=271,
    tests=(
      "tests/objectives/test_bound.py::test_loss_is_the_bound",
      "tests/objectives/test_text.py::test_mdlm_and_llada_settings",
    ),
    model=sections.llama(768, 12, 12, 2048, dropout=0.1),
    objective=sections.mdlm(),
    data=sections.packed_text(1024),
    optim=sections.adamw(3e-4, warmup=2500, b2=0.999),
    train={"steps": 1_000_000, "ema": 0.9999},
    sampler={"quota": {"kind": "ancestral", "steps": 128}},
  )
  cfg.batch_size = 512
  if variant == "tiny":
    sections.tiny_text(cfg)
    cfg.model.dropout = 0.0
    cfg.train.ema = 0.0
    cfg.sampler.quota.steps = 16
  return cfg
