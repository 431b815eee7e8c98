"""N-gram drafts: what followed the longest match in the text so far, verified by the model (STAND's idea).

  genmodels sample --workdir runs/ar --sampler samplers/ngram

STAND also keeps the logits of each n-gram and draws a tree; here drafts are certain and one chain.
"""

from genmodels import sections

VARIANTS = ()


def get_config(variant: str = ""):
  cfg = sections.sampler(
    "samplers/ngram",
    title="Accelerated Test-Time Scaling with Model-Free Speculative Sampling",
    arxiv="2506.04708",
    row=115,
    tests=(
      "tests/sampling/test_speculate.py::test_ngrams_continue_the_longest_match",
      "tests/sampling/test_speculate.py::test_any_drafts_give_the_targets_ids",
    ),
    sampler={"draft": {"kind": "ngram"}},
  )
  return cfg
