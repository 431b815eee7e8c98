"""EDLM: each step of masked diffusion draws k whole texts and takes one by an energy.

  genmodels sample --workdir runs/mdlm --sampler samplers/edlm     energy.path=runs/ar
  genmodels sample --workdir runs/edlm --sampler samplers/edlm:nce energy.path=runs/edlm

The default takes the residual of an autoregressive model with the same tokenizer, which needs no training;
`nce` a trained network (configs/language/edlm.py). 2 to 16 candidates while t falls from 1 to .4; the paper's
windows start at 1 or .6 and end at .4 or 0.
"""

from genmodels import sections

VARIANTS = ("nce",)


def get_config(variant: str = ""):
  cfg = sections.sampler(
    "samplers/edlm",
    title="Energy-Based Diffusion Language Models for Text Generation",
    arxiv="2410.21357",
    row=45,
    tests=(
      "tests/sampling/test_energy.py::test_more_candidates_are_nearer_to_the_joint",
      "tests/sampling/test_energy.py::test_one_candidate_is_the_denoiser",
    ),
    sampler={
      "quota": {"kind": "ancestral", "steps": 128},
      "energy": {"kind": variant or "ar", "size": 8, "start": 1.0, "stop": 0.4},
    },
  )
  return cfg
