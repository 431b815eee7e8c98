"""WeDLM: diffusion under plain causal attention, by placing a block's observed tokens before its masked ones.

  genmodels train --config configs/language/wedlm.py:tiny --workdir runs/wedlm

A noisy block is causal in that order while RoPE keeps logical positions, so every committed run of tokens is
an exact prefix of a KV cache. Exactly ⌈γ·n⌉ tokens of a block are masked, γ uniform per block; weights 1/γ,
normalised to sum one; plus the AR loss of the clean stream with weight one. The default variant is Qwen3-8B
shaped, blocks of 32, 100B tokens, 3e-6 falling to 3e-7. The authors round γ·n; ⌈γ·n⌉ never gives an empty
block.
"""

from genmodels import sections

VARIANTS = ("tiny",)


def get_config(variant: str = ""):
  cfg = sections.system(
    "language/wedlm",
    title="WeDLM: Reconciling Diffusion Language Models with Standard Causal Attention for Fast Inference",
    arxiv="2512.22737",
    row=32,
    tests=(
      "tests/objectives/test_conversion.py::test_observed_first_is_causal_in_physical_order",
      "tests/objectives/test_conversion.py::test_clean_stream_keeps_the_ar_loss",
      "tests/objectives/test_conversion.py::test_wedlm_weights_sum_to_one",
    ),
    model=sections.qwen3(4096, 36, 32, 8, 12288, remat={"preset": "full"}),
    objective={
      "kind": "tokens",
      "corruption": {
        "kind": "absorb",
        "unit": "block",
        "blocks": {"size": 32},
        "time": "uniform",
        "order": "observed_first",
      },
      "layout": {"kind": "streams", "streams": ("n", "c")},
      "masks": {"full": "wedlm"},
      "likelihood": "diffusion",
      "terms": {
        "diffusion": {
          "stream": "n",
          "on": "hit",
          "weight": "inverse_marginal",
          "normaliser": "weight_sum",
        },
        "ar": {"stream": "c", "align": "shift"},
      },
    },
    data=sections.packed_text(4096),
    optim=sections.adamw(3e-6, warmup=500, kind="cosine", weight_decay=0.1),
    train={"steps": 48_000},
    sampler={
      "active": {"kind": "window", "size": 6},
      "quota": {"kind": "threshold", "tau": -0.4},  # entropy + λd < .4
      "score": {"kind": "neg_entropy", "distance": 0.02},
      "temperature": 0.2,
    },
  )
  cfg.batch_size = 512
  if variant == "tiny":
    sections.tiny_text(cfg)
    cfg.objective.corruption.blocks.size = 8
  return cfg
