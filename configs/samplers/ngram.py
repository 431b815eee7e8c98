"""N-gram drafts: what followed the longest match in the text so far, verified by the model.

  genmodels sample --workdir runs/ar --sampler samplers/ngram

Drafts are certain and one chain; samplers/stand keeps distributions and draws a tree.
"""

from genmodels import sections

VARIANTS = ()


def get_config(variant: str = ""):
  cfg = sections.sampler(
    "samplers/ngram",
    title="Prompt Lookup Decoding",
    arxiv="",
    row=-1,
    tests=(
      "tests/sampling/test_speculate.py::test_ngrams_continue_the_longest_match",
      "tests/sampling/test_speculate.py::test_any_drafts_give_the_targets_ids",
    ),
    sampler={"draft": {"kind": "ngram"}},
  )
  return cfg
