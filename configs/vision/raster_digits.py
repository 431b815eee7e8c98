"""Next-token prediction of pixels: LlamaGen's recipe where the exact likelihood of an image is known.

  genmodels train --config vision/raster_digits:tiny --workdir runs/raster_digits

scikit-learn's 8 × 8 digits, 17 grey levels: 64 tokens after a class prefix, exact bits per pixel.
"""

from genmodels import sections

VARIANTS = ("tiny",)


def get_config(variant: str = ""):
  cfg = sections.system(
    "vision/raster_digits",
    title="Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation",
    arxiv="2406.06525",
    row=-1,
    tests=(
      "tests/vision/test_image.py::test_cached_decode_equals_one_pass",
      "tests/vision/test_image.py::test_leak_by_perturbation",
      "tests/vision/test_image.py::test_rope_is_relative_in_two_axes",
      "tests/vision/test_sampling.py::test_raster_takes_one_step_a_pixel",
    ),
    latent={"kind": "raster", "side": 8, "levels": 17},
    objective={"kind": "next_token_image", "classes": 10, "corruption": {"kind": "clean", "drop": 0.1}},
    model={
      "width": 256,
      "layers": 8,
      "num_heads": 8,
      "mlp": 768,
      "vocab": 17,
      "vocab_multiple": 4,  # 17 grey levels do not split over tensor shards
      "tables": (("class", 11),),
      "eps": 1e-5,
      "rope": {"pairing": "interleaved", "axes": (16, 16), "zero_prefix": True},
      "heads": {"text": {"zero_init": True}},
    },
    data={"kind": "digits", "tokens": "raster"},
    optim={"name": "adamw", "lr": 1e-3, "weight_decay": 0.05, "schedule": {"kind": "cosine", "warmup": 50}},
    sampler={"guidance": {"scale": 2.0}, "eos": -2},
    batch_size=64,
  )
  cfg.train.update(steps=2000, log_every=50, save_every=500, sample_every=500, samples=16)
  cfg.eval.update(every=500, documents=128)
  if variant == "tiny":
    cfg.model.update(width=64, layers=2, num_heads=4, mlp=192)
    cfg.model.rope.axes = (8, 8)
    cfg.optim.update(lr=3e-3, schedule={"kind": "cosine", "warmup": 5})
    cfg.train.update(steps=60, log_every=10, save_every=30, sample_every=60, samples=16)
    cfg.eval.update(every=30, documents=32)
    cfg.batch_size = 32
  return cfg
