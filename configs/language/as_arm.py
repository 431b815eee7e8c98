"""AS-ARM: any-subset autoregression; any part of a text is given, the rest has its exact likelihood.

  genmodels train --config configs/language/as_arm.py:tiny --workdir runs/as_arm

Two streams as in XLNet: content `c`, where a token sees the given ones and those generated before it and
itself, and queries `n`, which see the content before them and not their own token; the mask embedding with
the token's position is the query. The given part comes first, each part in text order. The default variant
has the size of XLNet-base (about 110M, OpenWebText). Decoding is speculative
(ASSD): the network drafts from its marginals and verifies with its joint.
"""

from genmodels import sections

VARIANTS = ("tiny",)


def get_config(variant: str = ""):
  cfg = sections.system(
    "language/as_arm",
    title="Reviving Any-Subset Autoregressive Models "
    "with Principled Parallel Sampling and Speculative Decoding",
    arxiv="2504.20456",
    row=142,
    tests=(
      "tests/objectives/test_conversion.py::test_one_pass_is_the_chain_rule",
      "tests/objectives/test_conversion.py::test_any_subset_likelihood_asks_for_every_token_once",
      "tests/sampling/test_joint.py::test_the_joint_is_the_sequential_law",
    ),
    model=sections.llama(768, 12, 12, 2048),
    objective={
      "kind": "tokens",
      "corruption": {"kind": "subset", "time": "uniform"},
      "layout": {"kind": "streams", "streams": ("n", "c")},
      "masks": {"full": "any_subset"},
      "terms": {"subset": {"stream": "n", "on": "hit", "weight": "one", "normaliser": "masked"}},
    },
    data=sections.packed_text(512),
    optim=sections.adamw(3e-4, warmup=2500, weight_decay=0.01),
    train={"steps": 100_000},
    sampler={"draft": {"kind": "marginals", "size": 5}},
  )
  cfg.batch_size = 512
  if variant == "tiny":
    sections.tiny_text(cfg)
  return cfg
