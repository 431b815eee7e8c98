"""Latent refinement: masks show mixtures of the likeliest tokens, until the prediction has converged.

  genmodels sample --workdir runs/llada --sampler samplers/lrd

The coefficients are unverified.
"""

from genmodels import sections

VARIANTS = ()


def get_config(variant: str = ""):
  cfg = sections.sampler(
    "samplers/lrd",
    title="Latent Refinement Decoding: Enhancing Diffusion-Based Language Models by Refining Belief States",
    arxiv="2510.11052",
    row=235,
    tests=(
      "tests/sampling/test_mix.py::test_weightless_mixtures_are_the_mask",
      "tests/sampling/test_stop.py::test_convergence_is_measured_against_the_step_before",
    ),
    sampler={"mix": {"kind": "refine"}, "stop": {"kind": "converged"}},
  )
  return cfg
