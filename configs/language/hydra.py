"""Hydra: draft heads that know the tokens drafted before theirs.

  genmodels train --config configs/language/hydra.py:tiny --workdir runs/hydra

As Medusa, but head k also reads the embeddings of the k tokens between its slot and the one that it predicts,
from the text in training and from the draft when decoding. The model is frozen; every head counts alike
(unverified). Head k starts as the model's own head: its residual carries the hidden state, the tokens enter
by a weight that starts at zero. The default variant has the shape of Vicuna-7B, four heads, lr 1e-3
(unverified). Hydra++'s prefix layer and distillation are not part of it. `genmodels train --from IMPORT`
starts from a checkpoint; the tiny variant adapts a random model. Reported likelihoods are the model's own.
"""

from genmodels import sections

VARIANTS = ("tiny",)
HEADS = 4


def get_config(variant: str = ""):
  heads = {f"hydra{k}": {"kind": "draft", "depth": 1, "given": k} for k in range(1, HEADS + 1)}
  term = {"align": "shift", "normaliser": "masked"}
  cfg = sections.system(
    "language/hydra",
    title="Hydra: Sequentially-Dependent Draft Heads for Medusa Decoding",
    arxiv="2402.05109",
    row=145,
    tests=(
      "tests/objectives/test_drafts.py::test_fresh_heads_are_the_language_model",
      "tests/objectives/test_drafts.py::test_a_head_predicts_the_token_it_is_named_after",
      "tests/objectives/test_drafts.py::test_heads_are_fed_the_tokens_before_theirs",
    ),
    model=sections.llama(4096, 32, 32, 11008) | {"heads": {"text": {}, **heads}},
    objective={
      "kind": "tokens",
      "likelihood": "ar",
      "terms": {
        "ar": {"align": "shift", "scale": 0.0},
        **{h: {**term, "head": h, "ahead": k, "given": k} for k, h in enumerate(heads, 1)},
      },
    },
    data=sections.packed_text(2048),
    optim=sections.adamw(1e-3, warmup=40, kind="cosine", freeze=("^(?!heads/hydra)",)),
    train={"steps": 940},
  )
  cfg.batch_size = 64
  if variant == "tiny":
    sections.tiny_text(cfg)
  return cfg
