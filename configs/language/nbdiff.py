"""NBDiff: from next token to next block: context-causal mask, block size curriculum, auxiliary AR loss.

  genmodels train --config configs/language/nbdiff.py:tiny --workdir runs/nbdiff

The clean stream stays causal, so its logits are those of the AR model it started from, and the AR term
trains on them in the same pass. Block size 1 is the AR model: the curriculum starts there. Lambda and the
token budget of the paper are not public; λ = 1 here.
"""

from genmodels import sections

VARIANTS = ("tiny",)


def get_config(variant: str = ""):
  cfg = sections.system(
    "language/nbdiff",
    title="From Next-Token to Next-Block: A Principled Adaptation Path for Diffusion LLMs",
    arxiv="2512.06776",
    row=24,
    tests=(
      "tests/objectives/test_text.py::test_block_one_is_the_ar_loss",
      "tests/objectives/test_text.py::test_causal_clean_stream_is_the_ar_model",
    ),
    model=sections.llama(4096, 34, 32, 12800, kv_heads=8, remat={"preset": "full"}),
    objective={
      "kind": "tokens",
      "corruption": {
        "kind": "absorb",
        "unit": "block",
        "blocks": {
          "size": {"kind": "steps", "values": (1, 2, 4, 8, 16, 32), "at": (0, 2000, 4000, 8000, 12000, 16000)}
        },
      },
      "layout": {"kind": "streams", "streams": ("n", "c")},
      "masks": {"full": "context_causal"},
      "likelihood": "diffusion",
      "terms": {
        "diffusion": {
          "stream": "n",
          "align": "shift_clean_boundary",
          "on": "hit",
          "weight": "one",
          "normaliser": "masked",
        },
        "ar": {"stream": "c", "align": "shift", "scale": 1.0},
      },
    },
    data=sections.packed_text(8192),
    optim=sections.adamw(1e-5, warmup=500, kind="cosine", weight_decay=0.1),
    train={"steps": 40_000},
    sampler={"quota": {"kind": "threshold", "tau": 0.9}, "score": "prob"},
  )
  cfg.batch_size = 512
  if variant == "tiny":
    sections.tiny_text(cfg)
    cfg.objective.corruption.blocks.size = {"kind": "steps", "values": (1, 2, 4, 8), "at": (0, 15, 30, 45)}
  return cfg
