"""ReMDM: ancestral sampling that also masks committed tokens again and keeps every marginal.

  genmodels sample --workdir runs/mdlm --sampler samplers/remdm

σ = min(η, σ_max) with η = .02; `rescale` takes η·σ_max, `conf` spreads it by confidence.
"""

from genmodels import sections

VARIANTS = ("rescale", "conf")


def get_config(variant: str = ""):
  cfg = sections.sampler(
    "samplers/remdm",
    title="Remasking Discrete Diffusion Models with Inference-Time Scaling",
    arxiv="2503.00307",
    row=-1,
    tests=("tests/sampling/test_plugins.py::test_remdm_keeps_the_marginal",),
    sampler={
      "remask": {"kind": "remdm", "rule": "cap", "eta": 0.02},
      "quota": {"kind": "ancestral", "steps": 128, "reuse": False},
    },
  )
  if variant:
    cfg.sampler.remask.rule = variant
  return cfg
