"""Esoteric LM: diffusion for part of a text, next-token prediction for the rest, one exact KV cache for both.

  genmodels train --config configs/language/eso_lm.py:tiny --workdir runs/eso_lm

Variant (B): the shown tokens come first, in random order, and every token sees those before it, so what is
committed is an exact prefix of a cache during diffusion too. Half of a batch pays −α'/(1 − α_t) at the masked
tokens of z_t, the other half the next-token loss at the masked tokens of z₀. `:a` is variant (A), where shown
tokens see all shown tokens. α₀ = `objective.corruption.alpha`: 1 is MDLM's loss, 0 the AR loss. The default
has the paper's OpenWebText setting: 12 layers of width 768, 1,024 tokens, batch 512, 250k steps; AdamW 3e-4
after 2,500 warm-up steps and EMA 0.9999 as in MDLM (unverified), α₀ = 0.5 (the paper trains several).
"""

from genmodels import sections

VARIANTS = ("a", "tiny")


def get_config(variant: str = ""):
  cfg = sections.system(
    "language/eso_lm",
    title="Esoteric Language Models",
    arxiv="2506.01928",
    row=248,
    tests=(
      "tests/objectives/test_esoteric.py::test_masks_are_the_papers",
      "tests/objectives/test_esoteric.py::test_limits_are_masked_diffusion_and_autoregression",
      "tests/objectives/test_esoteric.py::test_bound_is_the_closed_form",
      "tests/objectives/test_esoteric.py::test_one_pass_is_step_by_step_decoding_with_a_cache",
    ),
    model=sections.llama(768, 12, 12, 2048, dropout=0.1),
    objective={
      "kind": "esoteric",
      "corruption": {"kind": "hybrid", "alpha": 0.5},
      "masks": {"full": "eso_a" if variant == "a" else "eso_b"},
    },
    data=sections.packed_text(1024),
    optim=sections.adamw(3e-4, warmup=2500, b2=0.999),
    train={"steps": 250_000, "ema": 0.9999},
    sampler={"quota": {"kind": "ancestral", "steps": 128}},
  )
  cfg.batch_size = 512
  if variant == "tiny":
    sections.tiny_text(cfg)
    cfg.model.dropout = 0.0
    cfg.train.ema = 0.0
    cfg.sampler.quota.steps = 16
  return cfg
