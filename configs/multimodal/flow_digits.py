"""Captions and images in one causal row: cross-entropy on bytes, flow matching on patches (NextStep-1).

  genmodels train --config multimodal/flow_digits:tiny --workdir runs/flow_digits

"a handwritten seven", then 16 patches of 2 × 2 pixels of scikit-learn's digits; two terms with own scales.
"""

from genmodels import sections

VARIANTS = ("tiny",)


def get_config(variant: str = ""):
  cfg = sections.system(
    "multimodal/flow_digits",
    title="NextStep-1: Toward Autoregressive Image Generation with Continuous Tokens at Scale",
    arxiv="2508.10711",
    row=203,
    tests=(
      "tests/vision/test_flow.py::test_one_step_equals_four_micro_batches",
      "tests/vision/test_flow.py::test_leak_by_perturbation",
      "tests/vision/test_flow.py::test_noise_lies_on_the_path",
      "tests/vision/test_flow.py::test_targets_are_the_next_patches",
    ),
    latent={"kind": "patches", "side": 8, "levels": 17, "patch": 2},
    objective={
      "kind": "text_image_flow",
      "terms": {
        "text": {"head": "text", "align": "shift", "scale": 0.1},
        "image": {"head": "image", "align": "shift", "scale": 1.0},
      },
      "draws": 4,
    },
    model={
      "width": 256,
      "layers": 8,
      "num_heads": 8,
      "mlp": 768,
      "vocab": 260,
      "features": 4,
      "heads": {"text": {}, "image": {"kind": "flow", "size": 4, "depth": 3}},
    },
    data={"kind": "digits", "tokens": "caption"},
    optim={"name": "adamw", "lr": 1e-3, "weight_decay": 0.05, "schedule": {"kind": "cosine", "warmup": 50}},
    batch_size=64,
  )
  cfg.train.update(steps=2000, log_every=50, save_every=500)
  cfg.eval.update(every=500, documents=128)
  if variant == "tiny":
    cfg.model.update(width=64, layers=2, num_heads=4, mlp=192)
    cfg.model.heads.image.depth = 2
    cfg.optim.update(lr=3e-3, schedule={"kind": "cosine", "warmup": 5})
    cfg.train.update(steps=60, log_every=10, save_every=30)
    cfg.eval.update(every=30, documents=32)
    cfg.batch_size = 32
  return cfg
