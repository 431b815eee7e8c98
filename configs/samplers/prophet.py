"""Prophet: the rest of an answer is committed as soon as the two likeliest tokens are far enough apart.

  genmodels sample --workdir runs/llada --sampler samplers/prophet

The mean gap of logits over what is left must reach 7.5, 5 and 2.5 in the first, second and last third.
"""

from genmodels import sections

VARIANTS = ()


def get_config(variant: str = ""):
  cfg = sections.sampler(
    "samplers/prophet",
    title="Diffusion Language Models Know the Answer Before Decoding",
    arxiv="2508.19982",
    row=103,
    tests=(
      "tests/sampling/test_stop.py::test_gap_commits_the_rest",
      "tests/sampling/test_loop.py::test_stopping_changes_no_committed_token",
    ),
    sampler={"stop": {"kind": "gap", "thresholds": (7.5, 5.0, 2.5), "at": (0.0, 0.33, 0.67)}},
  )
  return cfg
