"""DiffuCoder: Qwen2.5-Coder adapted to masked diffusion on 130B tokens of code, the DiffuLLaMA way.

  genmodels train --config configs/language/diffucoder.py:tiny --workdir runs/diffucoder

The adaptation stage; its reinforcement learning (coupled-GRPO) is not part of this config. The default
variant is Qwen2.5-Coder-7B shaped, rows of 2048 tokens; batch and learning rate are not public in detail
(unverified).
"""

from genmodels import sections

VARIANTS = ("tiny",)


def get_config(variant: str = ""):
  cfg = sections.system(
    "language/diffucoder",
    title="DiffuCoder: Understanding and Improving Masked Diffusion Models for Code Generation",
    arxiv="2506.20639",
    row=247,
    tests=("tests/objectives/test_conversion.py::test_adapted_ar_losses_by_hand",),
    model=sections.qwen2(3584, 28, 28, 4, 18944, remat={"preset": "full"}),
    objective=sections.adapted_ar(schedule="linear"),
    data=sections.packed_text(2048),
    optim=sections.adamw(1e-5, warmup=1000, kind="cosine", weight_decay=0.1),
    train={"steps": 62_000},
    sampler={"quota": {"kind": "linear", "steps": 256}, "score": "neg_entropy", "temperature": 1.0},
  )
  cfg.batch_size = 1024
  if variant == "tiny":
    sections.tiny_text(cfg)
    cfg.sampler.quota.steps = 8
  return cfg
