"""MaM: a scalar that is the log-marginal of any part of a text, beside any-order conditionals.

  genmodels train --config configs/language/mam.py:tiny --workdir runs/mam

The conditionals are those of masked diffusion and have its bound, which is reported; the marginals are fitted
by self-consistency along random orders, a squared error per document. One trunk with two heads learns both,
where the authors train two networks one after the other; energy-based training, their second use, is not
here. The default variant is of the size of their text model (12 layers of width 768 on text8's rows of 250
characters; depth and rates unverified).
"""

from genmodels import sections

VARIANTS = ("tiny",)


def get_config(variant: str = ""):
  model = sections.llama(768, 12, 12, 2048) | {"heads": {"text": {}, "marginal": {"size": 1, "bias": True}}}
  cfg = sections.system(
    "language/mam",
    title="Generative Marginalization Models",
    arxiv="2310.12920",
    row=116,
    tests=(
      "tests/objectives/test_marginal.py::test_true_marginals_have_no_error",
      "tests/objectives/test_marginal.py::test_fitted_marginals_sum_up",
    ),
    model=model,
    objective={"kind": "marginal"},
    data=sections.packed_text(256),
    optim=sections.adamw(1e-4, warmup=2500, kind="cosine", weight_decay=0.01),
    train={"steps": 1_000_000},
    sampler={"quota": {"kind": "linear", "steps": 256}, "score": "random"},
  )
  cfg.batch_size = 512
  if variant == "tiny":
    sections.tiny_text(cfg)
    cfg.sampler.quota.steps = 16
  return cfg
