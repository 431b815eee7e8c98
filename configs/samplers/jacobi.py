"""Jacobi decoding: a guess of the next tokens is iterated to its fixed point, which is greedy decoding.

  genmodels sample --workdir runs/ar --sampler samplers/jacobi

Consistency LLMs are trained to get there in fewer steps: language/cllm, language/jacobi_forcing.
"""

from genmodels import sections

VARIANTS = ()


def get_config(variant: str = ""):
  cfg = sections.sampler(
    "samplers/jacobi",
    title="CLLMs: Consistency Large Language Models",
    arxiv="2403.00835",
    row=272,
    tests=("tests/sampling/test_speculate.py::test_drafters_keep_the_targets_ids",),
    sampler={"draft": {"kind": "jacobi"}, "temperature": 0.0},
  )
  return cfg
