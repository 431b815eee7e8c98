"""EB-Sampler: as many tokens as a budget of joint entropy allows.

genmodels sample --workdir runs/llada --sampler samplers/eb_sampler


"""

from genmodels import sections

VARIANTS = ()


def get_config(variant: str = ""):
  cfg = sections.sampler(
    "samplers/eb_sampler",
    title="Accelerated Sampling from Masked Diffusion Models via Entropy Bounded Unmasking",
    arxiv="2505.24857",
    row=-1,
    tests=("tests/sampling/test_plugins.py::test_entropy_budget",),
    sampler={"quota": {"kind": "entropy_budget"}, "score": {"kind": "neg_entropy"}},
  )
  return cfg
