"""BD3-LM: block diffusion, a noisy and a clean copy of every row in one forward pass.

  genmodels train --config configs/language/bd3lm.py:tiny --workdir runs/bd3lm

The default variant has the paper's OpenWebText setting at block size 4: 1,024 tokens (2,048 slots), batch
512, AdamW 3e-4, EMA 0.9999, clipped levels [0.45, 0.95]. The paper starts it from an MDLM of 850K steps:
set `init`. Reports use the unclipped bound.
"""

from genmodels import sections

VARIANTS = ("tiny",)


def get_config(variant: str = ""):
  cfg = sections.system(
    "language/bd3lm",
    title="Block Diffusion: Interpolating Between Autoregressive and Diffusion Language Models",
    arxiv="2503.09573",
    row=-1,
    tests=(
      "tests/objectives/test_bound.py::test_loss_is_the_bound",
      "tests/objectives/test_text.py::test_two_streams_equal_blockwise_forwards",
      "tests/objectives/test_text.py::test_block_limits",
    ),
    model=sections.llama(768, 12, 12, 2048, dropout=0.1),
    objective={
      "kind": "tokens",
      "corruption": {"kind": "absorb", "unit": "block", "blocks": {"size": 4}, "band": (0.45, 0.95)},
      "layout": {"kind": "streams", "streams": ("n", "c")},
      "masks": {"full": "bd3"},
      "terms": {"diffusion": {"stream": "n", "on": "hit", "weight": "nelbo"}},
    },
    data=sections.packed_text(1024),
    optim=sections.adamw(3e-4, warmup=2500, b2=0.999),
    train={"steps": 150_000, "ema": 0.9999},
    sampler={"quota": {"kind": "first_hitting"}, "top_p": 0.9},
  )
  cfg.batch_size = 512
  if variant == "tiny":
    sections.tiny_text(cfg)
    cfg.model.dropout = 0.0
    cfg.train.ema = 0.0
    cfg.objective.corruption.band = (0.0, 1.0)
  return cfg
