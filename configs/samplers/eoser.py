"""EOSER: an early EOS counts less; `ass`: steps that commit 1, 2, 4, … tokens.

  genmodels sample --workdir runs/llada --sampler samplers/eoser

The score of an EOS is multiplied by .4, rising to 1 over the answer; with ascending steps by .01.
"""

from genmodels import sections

VARIANTS = ("ass",)


def get_config(variant: str = ""):
  cfg = sections.sampler(
    "samplers/eoser",
    title="Taming Masked Diffusion Language Models via Consistency Trajectory Reinforcement Learning with "
    "Fewer Decoding Step",
    arxiv="2509.23924",
    row=258,
    tests=(
      "tests/sampling/test_plugins.py::test_scores_know_the_place",
      "tests/sampling/test_plugins.py::test_doubling_commits_everything_in_log_steps",
    ),
    sampler={"score": {"kind": "prob", "eos": 0.4}},
  )
  if variant == "ass":
    cfg.sampler = {"score": {"kind": "prob", "eos": 0.01}, "quota": {"kind": "doubling"}}
  return cfg
