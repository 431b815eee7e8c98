"""Hydra: draft heads that know the tokens drafted before theirs.

  genmodels train --config configs/language/hydra.py:tiny      --workdir runs/hydra
  genmodels train --config configs/language/hydra.py:plus_tiny --workdir runs/hydra_plus

As Medusa, but head k also reads the embeddings of the k tokens between its slot and the one that it predicts,
from the text in training and from the draft when decoding. The model is frozen; every head counts alike
(unverified). Head k starts as the model's own head: its residual carries the hidden state, the tokens enter
by a weight that starts at zero. The default variant has the shape of Vicuna-7B, four heads, lr 1e-3
(unverified). `plus` is Hydra++: a layer of attention over all the model's final states, whose output the
heads read; heads of four blocks; and the model's own distribution of each token to learn, not the text's.
`genmodels train --from IMPORT` starts from a checkpoint; the tiny variants adapt a random model. Reported
likelihoods are the model's own.
"""

from genmodels import sections

VARIANTS = ("plus", "tiny", "plus_tiny")
HEADS = 4


def get_config(variant: str = ""):
  plus = variant.startswith("plus")
  depth = 4 if plus else 1
  heads = {f"hydra{k}": {"kind": "draft", "depth": depth, "given": k} for k in range(1, HEADS + 1)}
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
      "tests/objectives/test_taught.py::test_heads_learn_the_models_own_distribution",
      "tests/objectives/test_taught.py::test_prefix_layers_change_nothing_of_the_model",
      "tests/objectives/test_taught.py::test_prefix_states_are_cached",
    ),
    model=sections.llama(4096, 32, 32, 11008) | {"heads": {"text": {}, **heads}},
    objective={
      "kind": "taught" if plus else "tokens",
      "likelihood": "ar",
      "terms": {
        "ar": {"align": "shift", "scale": 0.0},
        **{h: {**term, "head": h, "ahead": k, "given": k} for k, h in enumerate(heads, 1)},
      },
    },
    data=sections.packed_text(2048),
    optim=sections.adamw(1e-3, warmup=40, kind="cosine", freeze=("^(?!heads/hydra|prefix/)",)),
    train={"steps": 940},
  )
  cfg.batch_size = 64
  if plus:
    cfg.model.prefix = 1
  if variant.endswith("tiny"):
    sections.tiny_text(cfg)
  return cfg
