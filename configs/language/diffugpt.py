"""DiffuGPT: GPT-2 adapted to masked diffusion under an attention mask that anneals from causal to full.

  genmodels train --config configs/language/diffugpt.py:tiny --workdir runs/diffugpt

The default variant is the 127M model: rows of 1024 tokens, 3e-4 with 2000 steps of warm-up and a cosine, one
level per document, p = t, shifted cross-entropy over t averaged over masked tokens (batch and steps
unverified). A query sees what is before it, and each later token with probability ρ = min(1, (step +
1)/10,000); one matrix a step for all rows, heads and layers. Such a mask is no union of intervals and takes
the dense path, for at most 1024 slots; `objective.corruption.kind=absorb` goes on without it once ρ is 1.
Likelihoods and samplers see everything. `:medium` is the 355M model.
"""

from genmodels import sections

VARIANTS = ("tiny", "medium")


def annealed(steps: int) -> dict:
  """ρ(step) = min(1, (step + 1)/steps)."""
  return {"kind": "linear", "start": 1 / steps, "end": 1.0, "over": (0, steps - 1)}


def get_config(variant: str = ""):
  width, layers, heads = (1024, 24, 16) if variant == "medium" else (768, 12, 12)
  objective = sections.adapted_ar(schedule="linear")
  objective["corruption"] |= {"kind": "anneal_absorb", "share": annealed(10_000)}
  cfg = sections.system(
    "language/diffugpt",
    title="Scaling Diffusion Language Models via Adaptation from Autoregressive Models",
    arxiv="2410.17891",
    row=-1,
    tests=(
      "tests/objectives/test_diffugpt.py::test_nothing_drawn_is_the_causal_model",
      "tests/objectives/test_diffugpt.py::test_everything_drawn_is_full_attention",
      "tests/objectives/test_diffugpt.py::test_every_shard_draws_the_same_matrix",
    ),
    model={
      "width": width,
      "layers": layers,
      "num_heads": heads,
      "mlp": 4 * width,
      "vocab_multiple": 128,
      "norm": "layer",
      "eps": 1e-5,
      "activation": "gelu_tanh",
      "gated": False,
      "bias": ("q", "k", "v", "o", "up", "down", "norm"),
      "rope": None,
      "learned_pos": 1024,
      "heads": {"text": {"tied": True}},
      "init_out_scale": True,
      "dtype": "bfloat16",
      "remat": {"preset": "full"},
    },
    objective=objective,
    data=sections.packed_text(1024),
    optim=sections.adamw(3e-4, warmup=2000, kind="cosine"),
    train={"steps": 23_000},
    sampler={"quota": {"kind": "linear", "steps": 64}, "score": "random", "top_p": 0.9},
  )
  cfg.batch_size = 1280
  if variant == "tiny":
    sections.tiny_text(cfg)
    cfg.objective.corruption.share = annealed(40)
    cfg.sampler.quota.steps = 8
  return cfg
