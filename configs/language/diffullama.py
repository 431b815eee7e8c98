"""DiffuLLaMA: Llama 2 adapted to full-attention masked diffusion, without annealing the mask.

  genmodels train --config configs/language/diffullama.py:tiny --workdir runs/diffullama

The default variant is the 7B model: one level per sequence, p = t, shifted cross-entropy over t averaged over
masked tokens, lr 1.5e-5, 2048 tokens, 20k steps (about 65B tokens). The 7B run switches causal attention off
at once, which is what stands here; the GPT-2 runs anneal a random mask (`configs/language/diffugpt.py`). At
this length block sizes that grow (`configs/language/nbdiff.py`) are the annealing that the kernels know.
"""

from genmodels import sections

VARIANTS = ("tiny",)


def get_config(variant: str = ""):
  cfg = sections.system(
    "language/diffullama",
    title="Scaling Diffusion Language Models via Adaptation from Autoregressive Models",
    arxiv="2410.17891",
    row=232,
    tests=("tests/objectives/test_conversion.py::test_adapted_ar_losses_by_hand",),
    model=sections.llama(4096, 32, 32, 11008, remat={"preset": "full"}),
    objective=sections.adapted_ar(schedule="linear"),
    data=sections.packed_text(2048),
    optim=sections.adamw(1.5e-5, warmup=2000, kind="cosine"),
    train={"steps": 20_000},
    sampler={"quota": {"kind": "ancestral", "steps": 64, "schedule": "linear"}, "top_p": 0.9},
  )
  cfg.batch_size = 1600
  if variant == "tiny":
    sections.tiny_text(cfg)
    cfg.sampler.quota.steps = 8
  return cfg
