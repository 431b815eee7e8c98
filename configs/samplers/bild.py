"""BiLD: a small model writes while it is sure of the next token, a large one looks on; approximate.

  genmodels sample --workdir runs/big --sampler samplers/bild draft.path=runs/small

The small model hands over where none of its tokens reaches `draft.fallback`; the large one reads all that was
written in one forward, takes back from the first token on that it gives less than exp(−`verify.limit`), and
adds a token of its own. The text is the large model's only below a limit of ln 2. Both thresholds, and the
most tokens between two looks, are unverified.
"""

from genmodels import sections

VARIANTS = ()


def get_config(variant: str = ""):
  cfg = sections.sampler(
    "samplers/bild",
    title="Speculative Decoding with Big Little Decoder",
    arxiv="2302.07863",
    row=122,
    tests=(
      "tests/sampling/test_big_little.py::test_what_is_taken_back",
      "tests/sampling/test_big_little.py::test_a_tight_limit_is_the_large_model",
      "tests/sampling/test_big_little.py::test_an_unsure_model_hands_over_every_token",
      "tests/sampling/test_big_little.py::test_without_a_limit_nothing_is_taken_back",
    ),
    sampler={
      "draft": {"kind": "model", "size": 10, "fallback": 0.6},
      "verify": {"kind": "rollback", "limit": 2.0},
      "temperature": 0.0,
    },
  )
  return cfg
