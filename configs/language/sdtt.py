"""SDTT: a masked diffusion model learns to do in one step what its former self does in two, round by round.

  genmodels train --config configs/language/mdlm.py:tiny --workdir runs/mdlm train.steps=600
  genmodels train --config configs/language/sdtt.py:tiny --workdir runs/sdtt \\
    init.kind=workdir init.path=runs/mdlm
  genmodels sample --workdir runs/sdtt quota.steps=8

The teacher starts as the model and becomes its average every 10,000 steps, when the time of a step doubles:
seven rounds, from 1/1024 to 1/16. Sampling is MDLM's, in 16 to 32 steps. Rate and batch are unverified; so is
that a round goes on with the last one's average and optimiser. The divergence is the paper's forward KL.
"""

from genmodels import sections

VARIANTS = ("tiny",)

ROUND = 10_000


def get_config(variant: str = ""):
  rounds = range(7)
  cfg = sections.system(
    "language/sdtt",
    title="Beyond Autoregression: Fast LLMs via Self-Distillation Through Time",
    arxiv="2410.21035",
    row=239,
    tests=(
      "tests/objectives/test_through_time.py::test_one_step_of_oneself_gives_no_gradient",
      "tests/objectives/test_through_time.py::test_targets_are_of_the_step_that_decided",
      "tests/objectives/test_through_time.py::test_two_steps_become_one",
    ),
    model=sections.llama(768, 12, 12, 2048, dropout=0.1),
    objective=sections.masked_diffusion("one", schedule="loglinear", eps=1e-3)
    | {
      "kind": "through_time",
      "steps": 2,
      "dt": {
        "kind": "steps",
        "values": tuple(2**r / 1024 for r in rounds),
        "at": tuple(ROUND * r for r in rounds),
      },
    },
    data=sections.packed_text(1024),
    optim=sections.adamw(6e-5, warmup=500),
    train={"steps": 7 * ROUND, "ema": 0.9999},
    trees={"teacher": {"kind": "trunk", "refresh": ROUND}},
    sampler={"quota": {"kind": "ancestral", "steps": 32}},
  )
  cfg.objective.terms.diffusion.normaliser = "batch"
  cfg.batch_size = 128
  if variant == "tiny":
    sections.tiny_text(cfg)
    cfg.model.dropout = 0.0
    cfg.train.ema = 0.0
    cfg.optim.lr = 1e-3
    cfg.trees.teacher.refresh = 20
    cfg.objective.dt = {"kind": "steps", "values": (0.125, 0.25, 0.5), "at": (0, 20, 40)}
    cfg.sampler.quota.steps = 8
  return cfg
