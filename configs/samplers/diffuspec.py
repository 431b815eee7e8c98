"""DiffuSpec: a diffusion model drafts, an AR model verifies.

  genmodels sample --workdir runs/big --sampler samplers/diffuspec draft.path=runs/mdlm

Beam and averaging constants are unverified.
"""

from genmodels import sections

VARIANTS = ()


def get_config(variant: str = ""):
  cfg = sections.sampler(
    "samplers/diffuspec",
    title="DiffuSpec: Unlocking Diffusion Language Models for Speculative Decoding",
    arxiv="2510.02358",
    row=158,
    tests=(
      "tests/sampling/test_joint.py::test_the_path_is_the_best_of_the_lattice",
      "tests/sampling/test_joint.py::test_diffusion_drafts_keep_the_targets_ids",
    ),
    sampler={"draft": {"kind": "diffuspec"}},
  )
  return cfg
