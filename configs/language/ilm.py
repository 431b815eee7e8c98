"""ILM: text by insertion, one token at a time, anywhere; no mask, no order, no length in advance.

  genmodels train --config configs/language/ilm.py:tiny --workdir runs/ilm

m of a text's n tokens are dropped, m uniform in 0 … n; one softmax over (gap × vocabulary) is asked for what
was dropped and where, a second head whether anything was. Likelihoods report a bound over all n! orders. The
default variant is of the paper's size (12 layers of width 768, about 85M without embeddings), LM1B-like rows
of 128 tokens; batch 512, 1e-4 and 1M steps are unverified.
"""

from genmodels import sections

VARIANTS = ("tiny",)


def get_config(variant: str = ""):
  model = sections.llama(768, 12, 12, 2048) | {"heads": {"text": {}, "stop": {"size": 2, "bias": True}}}
  cfg = sections.system(
    "language/ilm",
    title="Insertion Language Models: Sequence Generation with Arbitrary-Position Insertions",
    arxiv="2505.05755",
    row=170,
    tests=(
      "tests/objectives/test_insertion.py::test_orders_of_insertion_sum_to_the_probability",
      "tests/objectives/test_insertion.py::test_loss_by_hand_and_packing",
      "tests/sampling/test_insertion.py::test_places_are_the_text_in_order",
    ),
    model=model,
    objective={"kind": "insertion"},
    data=sections.packed_text(128),
    optim=sections.adamw(1e-4, warmup=1000, kind="cosine", weight_decay=0.01),
    train={"steps": 1_000_000},
  )
  cfg.batch_size = 512
  return sections.tiny_text(cfg) if variant == "tiny" else cfg
