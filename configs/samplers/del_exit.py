"""DEL: a model drafts with its own first layers; the exit and the length are chosen as the text goes; exact.

  genmodels sample --workdir runs/ar --sampler samplers/del_exit

For models whose early layers can speak (trained with LayerSkip's early-exit loss); any model's ids are kept.
How fast the counts fade and what they begin with are unverified; the paper's dynamic confidence threshold,
which ends a draft early, is not part of it.
"""

from genmodels import sections

VARIANTS = ()


def get_config(variant: str = ""):
  cfg = sections.sampler(
    "samplers/del_exit",
    title="DEL: Context-Aware Dynamic Exit Layer for Efficient Self-Speculative Decoding",
    arxiv="2504.05598",
    row=135,
    tests=(
      "tests/sampling/test_early_exit.py::test_the_best_exit_and_length",
      "tests/sampling/test_early_exit.py::test_a_call_of_some_layers_is_the_model_cut_there",
      "tests/sampling/test_early_exit.py::test_no_exit_changes_an_id",
      "tests/sampling/test_early_exit.py::test_sampled_exits_keep_the_law",
    ),
    sampler={"draft": {"kind": "early_exit"}},
  )
  return cfg
