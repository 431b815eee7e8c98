"""MEAP: next-token prediction with 15 % of the input tokens masked.

  genmodels train --config configs/language/meap.py:tiny --workdir runs/meap

The default variant is TinyLlama-1.1B shaped, 4e-4 falling to 4e-5, 256 rows, 190k steps. Evaluation and
decoding read clean inputs: the trained model is an AR model.
"""

from genmodels import sections

VARIANTS = ("tiny",)


def get_config(variant: str = ""):
  cfg = sections.system(
    "language/meap",
    title="Mask-Enhanced Autoregressive Prediction: Pay Less Attention to Learn More",
    arxiv="2502.07490",
    row=2,
    tests=(
      "tests/objectives/test_conversion.py::test_meap_without_masks_is_next_token_prediction",
      "tests/objectives/test_conversion.py::test_meap_masks_inputs_and_no_targets",
    ),
    model=sections.llama(2048, 22, 32, 5632, kv_heads=4),
    objective={
      "kind": "tokens",
      "corruption": {"kind": "input_mask", "ratio": 0.15},
      "layout": {"kind": "streams", "streams": ("n",)},
      "masks": {"full": {"n>n": "POS_LE"}},
      "terms": {"text": {"stream": "n", "align": "shift"}},
    },
    data=sections.packed_text(4096),
    optim=sections.adamw(4e-4, warmup=2000, kind="cosine", weight_decay=0.05),
    train={"steps": 190_000},
  )
  cfg.batch_size = 256
  return sections.tiny_text(cfg) if variant == "tiny" else cfg
