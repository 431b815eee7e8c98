"""Lumina-DiMOO's cache: tokens whose largest logit is high are read, not computed.

  genmodels sample --workdir runs/llada --sampler samplers/dimoo_cache

Nine tenths are read, all are computed every 5 steps and in the first 30 % of the steps.
"""

from genmodels import sections

VARIANTS = ()


def get_config(variant: str = ""):
  cfg = sections.sampler(
    "samplers/dimoo_cache",
    title="Lumina-DiMOO: An Omni Diffusion Large Language Model for Multi-Modal Generation and Understanding",
    arxiv="2510.06308",
    row=254,
    tests=(
      "tests/sampling/test_partial.py::test_computed_anew_at_every_step_it_is_exact",
      "tests/sampling/test_partial.py::test_drift_is_measured_and_bounded",
    ),
    sampler={"cache": {"kind": "logit_selective", "ratio": 0.9, "refresh": 5, "warm": 0.3}},
  )
  return cfg
