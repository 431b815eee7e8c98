"""SpecTr: several chains of a smaller model, one of them accepted (k-SEQ); the law is the model's.

genmodels sample --workdir runs/big --sampler samplers/spectr draft.path=runs/small


"""

from genmodels import sections

VARIANTS = ()


def get_config(variant: str = ""):
  cfg = sections.sampler(
    "samplers/spectr",
    title="SpecTr: Fast Speculative Decoding via Optimal Transport",
    arxiv="2310.15141",
    row=166,
    tests=(
      "tests/sampling/test_verify.py::test_the_law_is_the_targets",
      "tests/sampling/test_speculate.py::test_a_smaller_model_drafts",
    ),
    sampler={"draft": {"kind": "model", "chains": 4}, "verify": {"kind": "rejection"}},
  )
  return cfg
