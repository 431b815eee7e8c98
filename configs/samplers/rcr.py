"""Running-confidence remasking: committed tokens that never were confident are masked again (MDPO's sampler).

genmodels sample --workdir runs/llada --sampler samplers/rcr


"""

from genmodels import sections

VARIANTS = ()


def get_config(variant: str = ""):
  cfg = sections.sampler(
    "samplers/rcr",
    title="MDPO: Overcoming the Training-Inference Divide of Masked Diffusion Language Models",
    arxiv="2508.13148",
    row=97,
    tests=("tests/sampling/test_stop.py::test_rcr_in_the_loop",),
    sampler={"remask": {"kind": "rcr"}, "quota": {"kind": "linear", "steps": 128}, "sub_block": 0},
  )
  return cfg
