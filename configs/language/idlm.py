"""I-DLM: all-masked blocks that are causal inside, Dream-shifted, beside an AR loss on the clean stream.

  genmodels train --config configs/language/idlm.py:tiny --workdir runs/idlm

The default variant is Qwen3-8B shaped, lr 1e-5; cross-entropy of the masked blocks + 0.2 · that of the clean
stream. Blocks grow from 1 (the AR model); the schedule of the sizes here is a choice. Reported likelihoods
are the AR model's.
"""

from genmodels import sections

VARIANTS = ("tiny",)


def get_config(variant: str = ""):
  cfg = sections.system(
    "language/idlm",
    title="Introspective Diffusion Language Models",
    arxiv="2604.11035",
    row=-1,
    tests=(
      "tests/objectives/test_conversion.py::test_all_mask_systems_mask_everything",
      "tests/objectives/test_conversion.py::test_clean_stream_keeps_the_ar_loss",
      "tests/objectives/test_text.py::test_two_streams_equal_blockwise_forwards",
    ),
    model=sections.qwen3(4096, 36, 32, 8, 12288, remat={"preset": "full"}),
    objective={
      "kind": "tokens",
      "corruption": {
        "kind": "absorb",
        "unit": "block",
        "blocks": {"size": {"kind": "steps", "values": (1, 2, 4, 8), "at": (0, 1000, 2000, 4000)}},
        "band": (1.0, 1.0),
      },
      "layout": {"kind": "streams", "streams": ("n", "c")},
      "masks": {"full": "idlm"},
      "likelihood": "ar",
      "terms": {
        "ar": {"stream": "c", "align": "shift", "scale": 0.2},
        "diffusion": {"stream": "n", "align": "shift", "on": "hit", "weight": "one", "normaliser": "masked"},
      },
    },
    data=sections.packed_text(4096),
    optim=sections.adamw(1e-5, warmup=500, kind="cosine"),
    train={"steps": 24_000},
    sampler={"quota": {"kind": "linear", "steps": 1}},
  )
  cfg.batch_size = 256
  if variant == "tiny":
    sections.tiny_text(cfg)
    cfg.objective.corruption.blocks.size = {"kind": "steps", "values": (1, 2, 4), "at": (0, 15, 30)}
  return cfg
