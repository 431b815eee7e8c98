"""Dream 7B: a Qwen2.5 checkpoint into full-attention masked diffusion that keeps the shifted head.

  genmodels train --config configs/language/dream.py:tiny --workdir runs/dream

The default variant is Qwen2.5-7B shaped: one level per sequence, 1/t weights averaged over masked tokens,
logits of slot i−1 predict token i; 580B tokens (unverified). `:cart` weighs a masked token by the distance of
the tokens that are shown instead (p = 0.1, the trainer's default). Sampling by negative entropy.
"""

from genmodels import sections

VARIANTS = ("cart", "tiny")


def get_config(variant: str = ""):
  cfg = sections.system(
    "language/dream",
    title="Dream 7B: Diffusion Large Language Models",
    arxiv="2508.15487",
    row=240,
    tests=(
      "tests/objectives/test_conversion.py::test_cart_weights",
      "tests/objectives/test_conversion.py::test_adapted_ar_losses_by_hand",
    ),
    model=sections.qwen2(3584, 28, 28, 4, 18944, remat={"preset": "full"}),
    objective=sections.adapted_ar(schedule="loglinear", eps=1e-3),
    data=sections.packed_text(2048),
    optim=sections.adamw(1e-5, warmup=1000, kind="cosine", weight_decay=0.1),
    train={"steps": 140_000},
    sampler={
      "quota": {"kind": "share", "steps": 512},
      "score": "neg_entropy",
      "temperature": 0.2,
      "top_p": 0.95,
    },
  )
  cfg.batch_size = 2048
  if variant == "cart":
    cfg.objective.terms.diffusion.update(weight="cart", cart_p=0.1)
  if variant == "tiny":
    sections.tiny_text(cfg)
    cfg.sampler.quota.steps = 8
  return cfg
