"""MARIA: an autoregressive model and a masked one, both frozen, fill masks together through a linear decoder.

  genmodels train --config configs/language/maria.py:tiny --workdir runs/maria
  genmodels train --config configs/language/maria.py --workdir runs/maria data.path=data/corpus \\
      init.kind=workdir init.path=runs/ar "init.scratch=('heads/infill/kernel',)" \\
      init.beside.mlm.path=runs/mdlm

The masked model reads the text with its masks, once; the autoregressive one goes over it from left to right
with its cache; the decoder of token i reads the states [AR at i − 1; masked at i]. Only the decoder is
trained, from half of both output weights (a product of experts), by cross-entropy on the masked tokens.
Reported is that of masked tokens given all others (`objective.reported=text`: the likelihood of texts).
Unverified: the paper's networks (here both have the shape of MDLM's), rate, steps, batch, and the law of the
masking ratio, here uniform. The tiny variant joins two random models.
"""

from genmodels import sections

VARIANTS = ("tiny",)


def get_config(variant: str = ""):
  heads = {"text": {}, "infill": {"kind": "joint", "beside": "mlm"}}
  cfg = sections.system(
    "language/maria",
    title="Enabling Autoregressive Models to Fill In Masked Tokens",
    arxiv="2502.06901",
    row=-1,
    tests=(
      "tests/objectives/test_infill.py::test_half_a_decoder_is_one_of_the_models",
      "tests/objectives/test_infill.py::test_a_fresh_decoder_is_a_product_of_experts",
      "tests/objectives/test_infill.py::test_only_the_decoder_is_trained",
      "tests/objectives/test_infill.py::test_no_token_sees_itself_or_a_later_fill",
      "tests/sampling/test_infilling.py::test_the_cache_is_exact",
      "tests/sampling/test_infilling.py::test_greedy_fills_are_those_of_teacher_forcing",
    ),
    model=sections.llama(768, 12, 12, 2048) | {"heads": heads},
    trees={"mlm": {"kind": "backbone"}},
    objective={
      "kind": "infill",
      "corruption": {"kind": "absorb"},
      "terms": {"infill": {"head": "infill", "align": "shift", "on": "hit", "normaliser": "masked"}},
    },
    data=sections.packed_text(1024),
    optim=sections.adamw(1e-4, warmup=1000, kind="cosine", freeze=("^(?!heads/infill/)",)),
    train={"steps": 20_000},
    sampler={"active": {"kind": "runs", "size": 8}},
  )
  cfg.batch_size = 128
  if variant == "tiny":
    sections.tiny_text(cfg)
  return cfg
