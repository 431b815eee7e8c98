"""DiffusionGemma style: canvases of 256 random tokens, denoised behind a causal encoding of what precedes.

  genmodels train --config configs/language/diffusion_gemma.py:tiny --workdir runs/diffusion_gemma

After the fine-tuning recipe published with google-deepmind/gemma: uniform-state corruption with a linear
schedule and no mask token, one level per canvas; each canvas sees itself and the causal context; flat
cross-entropy on all its tokens plus the AR loss of the context with weight 1; with probability ½ a first pass
without gradient conditions the second. Adafactor, 1.5e-4 falling to a tenth, 1,000 of 2,000 steps of
warm-up, 8 rows. Three differences: all canvases of a row are trained at once where the recipe draws one per
row; the mean embedding is added to the input without the recipe's own norm and feed-forward layers; the trunk
is a dense one of Gemma 3 4B's size, where the release is a 26B mixture of experts.

The likelihood reported is the uniform-state bound, canvas by canvas; `objective.likelihood=ar` reports the
encoder's exact AR likelihood instead.
"""

from genmodels import sections

VARIANTS = ("tiny",)


def get_config(variant: str = ""):
  cfg = sections.system(
    "language/diffusion_gemma",
    title="DiffusionGemma fine-tuning recipe (google-deepmind/gemma)",
    arxiv="",
    row=-1,
    tests=(
      "tests/objectives/test_uniform.py::test_bound_is_tight_for_independent_tokens",
      "tests/objectives/test_uniform.py::test_canvas_sees_causal_context_and_itself",
      "tests/objectives/test_uniform.py::test_self_conditioning_adds_the_mean_embedding",
    ),
    model=sections.llama(
      2560, 34, 8, 10240, kv_heads=4, head_dim=256, qk_norm="rms", activation="gelu_tanh",
      embed_scale=2560**0.5, remat={"preset": "full"},
    ) | {"heads": {"text": {"tied": True}}},
    objective={
      "kind": "canvas",
      "embed_scale": 2560**0.5,
      "corruption": {"kind": "uniform", "unit": "block", "blocks": {"size": 256}, "time": "uniform"},
      "layout": {"kind": "streams", "streams": ("n", "c")},
      "masks": {"full": "context_causal"},
      "likelihood": "diffusion",
      "terms": {
        "diffusion": {"stream": "n", "on": "all"},
        "ar": {"stream": "c", "align": "shift", "scale": 1.0},
      },
    },
    data=sections.packed_text(2048),
    optim=sections.adamw(1.5e-4, warmup=1000, weight_decay=1e-4, name="adafactor",
      schedule={"kind": "cosine", "warmup": 1000, "end": 0.1}),
    train={"steps": 2000},
    sampler={"quota": {"kind": "linear", "steps": 64}, "score": "neg_entropy"},
  )  # fmt: skip
  cfg.batch_size = 8
  if variant == "tiny":
    sections.tiny_text(cfg)
    cfg.model.embed_scale = cfg.objective.embed_scale = 8.0
    cfg.objective.corruption.blocks.size = 16
    cfg.sampler.quota.steps = 8
  return cfg
