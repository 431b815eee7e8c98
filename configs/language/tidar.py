"""TiDAR: one forward pass drafts a block by diffusion and scores tokens autoregressively.

  genmodels train --config configs/language/tidar.py:tiny --workdir runs/tidar

The diffusion stream is all masks, in training as in decoding: one step per block, no noise schedule. The
clean stream stays causal and keeps its AR loss; the loss is (α·AR + diffusion)/(1 + α) with α = 1. The
default variant is Qwen3-8B shaped, blocks of 16, 150B tokens (unverified). Reported likelihoods are the AR
model's. Decoding verifies the last forward's drafts and drafts the next ones in one forward.
"""

from genmodels import sections

VARIANTS = ("tiny",)


def get_config(variant: str = ""):
  cfg = sections.system(
    "language/tidar",
    title="TiDAR: Think in Diffusion, Talk in Autoregression",
    arxiv="2511.08923",
    row=41,
    tests=(
      "tests/objectives/test_conversion.py::test_all_mask_systems_mask_everything",
      "tests/objectives/test_conversion.py::test_clean_stream_keeps_the_ar_loss",
      "tests/sampling/test_speculate.py::test_tidar_keeps_the_targets_ids",
      "tests/sampling/test_speculate.py::test_the_chosen_group_is_the_committed_prefix",
    ),
    model=sections.qwen3(4096, 36, 32, 8, 12288, remat={"preset": "full"}),
    objective={
      "kind": "tokens",
      "corruption": {"kind": "absorb", "unit": "block", "blocks": {"size": 16}, "band": (1.0, 1.0)},
      "layout": {"kind": "streams", "streams": ("n", "c")},
      "masks": {"full": "context_causal"},
      "likelihood": "ar",
      "terms": {
        "ar": {"stream": "c", "align": "shift", "scale": 0.5},
        "diffusion": {"stream": "n", "on": "hit", "weight": "one", "normaliser": "masked", "scale": 0.5},
      },
    },
    data=sections.packed_text(4096),
    optim=sections.adamw(1e-5, warmup=500, kind="cosine", weight_decay=0.1),
    train={"steps": 72_000},
    sampler={"draft": {"kind": "tidar"}},
  )
  cfg.batch_size = 512
  if variant == "tiny":
    sections.tiny_text(cfg)
    cfg.objective.corruption.blocks.size = 4
  return cfg
