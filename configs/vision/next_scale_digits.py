"""Next-scale prediction (VAR) of a lossless integer residual pyramid with scales 1, 2, 4, 8.

  genmodels train --config vision/next_scale_digits:tiny --workdir runs/next_scale_digits

scikit-learn's 8 × 8 digits: 85 codes of 33 residuals, class by AdaLN, exact likelihood of the codes.
"""

from genmodels import sections

VARIANTS = ("tiny",)


def get_config(variant: str = ""):
  cfg = sections.system(
    "vision/next_scale_digits",
    title="Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction",
    arxiv="2404.02905",
    row=37,
    tests=(
      "tests/latents/test_pyramid.py::test_lossless",
      "tests/latents/test_pyramid.py::test_var_identities",
      "tests/vision/test_image.py::test_next_scale_cached_decode_equals_one_pass",
      "tests/vision/test_image.py::test_next_scale_leak_by_perturbation",
      "tests/vision/test_sampling.py::test_next_scale_takes_one_step_a_scale",
      "tests/vision/test_sampling.py::test_var_schedule",
    ),
    latent={"kind": "pyramid", "side": 8, "levels": 17, "sizes": (1, 2, 4, 8)},
    objective={
      "kind": "next_scale",
      "classes": 10,
      "corruption": {"kind": "clean", "drop": 0.1, "blocks": {"sizes": (1, 4, 16, 64)}},
    },
    model={
      "width": 256,
      "layers": 8,
      "num_heads": 4,
      "mlp": 1024,
      "vocab": 0,  # slots show no code: there is no token table
      "tables": (("class", 11), ("start", 1), ("level", 4), ("pos", 85)),
      "features": 1,
      "norm": "layer",
      "norm_affine": False,
      "qk_norm": "l2",
      "activation": "gelu_tanh",
      "gated": False,
      "bias": ("q", "v", "o", "up", "down"),
      "rope": None,
      "adaln": "zero",
      "cond": {"class": {"kind": "class", "size": 11}},
      "heads": {"text": {"size": 33, "bias": True}},
      "init_out_scale": True,
    },
    data={"kind": "digits", "tokens": "none", "length": 85},
    optim={"name": "adamw", "lr": 1e-3, "weight_decay": 0.05, "schedule": {"kind": "cosine", "warmup": 50}},
    # s = 1 + τ with τ = 1.5·k/(K − 1) on scale k: VAR's form.
    sampler={"guidance": {"scale": 2.5, "schedule": "linear", "over": "units"}, "eos": -2},
    batch_size=64,
  )
  cfg.train.update(steps=2000, log_every=50, save_every=500, sample_every=500, samples=16)
  cfg.eval.update(every=500, documents=128)
  if variant == "tiny":
    cfg.model.update(width=64, layers=2, num_heads=4, mlp=256)
    cfg.optim.update(lr=3e-3, schedule={"kind": "cosine", "warmup": 5})
    cfg.train.update(steps=60, log_every=10, save_every=30, sample_every=60, samples=16)
    cfg.eval.update(every=30, documents=32)
    cfg.batch_size = 32
  return cfg
