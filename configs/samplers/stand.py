"""STAND: n-grams that remember what the model said draw a tree of drafts, verified exactly.

  genmodels sample --workdir runs/ar --sampler samplers/stand

Where the last tokens stood before, the eight likeliest tokens of that place are kept; the tree's candidates
are drawn from their mean by Gumbel-top-k. The paper shares its tables among all trajectories of a question
and fits the tree to data; here each row has its own, and the tree is a product of widths (4, 2, 1, 1). Sizes
are unverified.
"""

from genmodels import sections

VARIANTS = ()


def get_config(variant: str = ""):
  cfg = sections.sampler(
    "samplers/stand",
    title="Accelerated Test-Time Scaling with Model-Free Speculative Sampling",
    arxiv="2506.04708",
    row=115,
    tests=(
      "tests/sampling/test_verify.py::test_children_without_replacement_keep_the_law",
      "tests/sampling/test_stand.py::test_a_tree_is_drawn_from_them",
      "tests/sampling/test_stand.py::test_ids_and_law",
    ),
    sampler={"draft": {"kind": "stand"}},
  )
  return cfg
