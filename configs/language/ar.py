"""Autoregressive language model, the reference of every conversion.

  genmodels train --config configs/language/ar.py:tiny --workdir runs/ar

`:tiny` trains 2 layers on bytes of the Python standard library in under a minute on a laptop CPU. The
default variant is a 110M Llama on 1,024-token rows at global batch 512.
"""

from genmodels import sections

VARIANTS = ("tiny",)


def get_config(variant: str = ""):
  cfg = sections.system(
    "language/ar",
    title="Llama 2: Open Foundation and Fine-Tuned Chat Models",
    arxiv="2307.09288",
    row=-1,
    tests=("tests/objectives/test_text.py::test_ar_is_next_token_cross_entropy",),
    model=sections.llama(768, 12, 12, 2048),
    objective={
      "kind": "tokens",
      "corruption": {"kind": "clean"},
      "layout": {"kind": "streams", "streams": ("c",)},
      "masks": {"full": "causal"},
      "terms": {"text": {"stream": "c", "align": "shift"}},
    },
    data=sections.packed_text(1024),
    optim=sections.adamw(6e-4, warmup=2000, kind="cosine", weight_decay=0.1),
    train={"steps": 100_000},
    sampler={"temperature": 1.0},
  )
  cfg.batch_size = 512
  return sections.tiny_text(cfg) if variant == "tiny" else cfg
