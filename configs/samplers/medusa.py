"""Medusa's and Hydra's heads draft a tree: the likeliest candidates of each head, verified in one forward.

  genmodels sample --workdir runs/medusa --sampler samplers/medusa
  genmodels sample --workdir runs/medusa --sampler samplers/medusa:typical temperature=0.7

Four candidates of the first head, behind each of them three of the second, two of the third, one of the
fourth: 64 nodes, the Cartesian product of the paper's Figure 2 (its tuned sparse trees are `draft.paths` of
their own). Ids are the model's; `typical` accepts what is likely enough instead, and is not exact.
"""

import itertools

from genmodels import sections

VARIANTS = ("typical",)
WIDTHS = (4, 3, 2, 1)


def get_config(variant: str = ""):
  paths = [p for k in range(1, 5) for p in itertools.product(*map(range, WIDTHS[:k]))]
  verify = {"kind": "typical", "epsilon": 0.3, "delta": 0.09} if variant else {"kind": "match"}
  cfg = sections.sampler(
    "samplers/medusa",
    title="Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads",
    arxiv="2401.10774",
    row=66,
    tests=(
      "tests/sampling/test_trees.py::test_a_node_sees_the_text_and_its_ancestors",
      "tests/sampling/test_trees.py::test_one_chain_is_the_linear_walk",
      "tests/sampling/test_trees.py::test_no_tree_changes_an_id",
      "tests/sampling/test_trees.py::test_heads_draft_trees",
      "tests/sampling/test_trees.py::test_typical_acceptance_is_another_law",
    ),
    sampler={"draft": {"kind": "heads", "paths": tuple(paths)}, "verify": verify},
  )
  return cfg
