"""CLLM: an autoregressive model learns to get from any state of its Jacobi iterations to their fixed point.

  genmodels train --config configs/language/ar.py:tiny --workdir runs/ar train.steps=600
  genmodels collect --workdir runs/ar --out data/jacobi
  genmodels train --config configs/language/cllm.py:tiny --workdir runs/cllm data.path=data/jacobi \\
    init.kind=workdir init.path=runs/ar

Greedy decoding in spans of 16 tokens (32 for code) is collected once, with every state on the way. One random
state of each span is then pulled to what the model itself predicts from the fixed point, and the fixed point
keeps ten times its next-token loss. The model stays a next-token model: `--sampler samplers/jacobi` decodes
its greedy text in fewer forwards. Default shape of Llama-2-7B; 2e-5 and the number of steps are unverified.
The authors' code also learns prompts and smooths the labels of the next-token loss by 0.1; here answers alone
are learnt, from plain labels. Reported likelihoods are the model's own, of held-out greedy text.
"""

from genmodels import sections

VARIANTS = ("tiny",)


def get_config(variant: str = ""):
  cfg = sections.system(
    "language/cllm",
    title="CLLMs: Consistency Large Language Models",
    arxiv="2403.00835",
    row=272,
    tests=(
      "tests/objectives/test_consistency.py::test_loss_of_two_streams_equals_separate_forwards",
      "tests/objectives/test_consistency.py::test_first_divergence_and_weights",
      "tests/objectives/test_consistency.py::test_fixed_points_teach_nothing",
      "tests/sampling/test_jacobi.py::test_fixed_points_are_greedy_decoding",
    ),
    model=sections.llama(4096, 32, 32, 11008, remat={"preset": "full"}) | {"heads": {"text": {"forbid": ()}}},
    objective=sections.consistency(16),
    data=sections.packed_text(1024),
    optim=sections.adamw(2e-5, warmup=100, kind="cosine"),
    train={"steps": 10_000},
    sampler={"temperature": 0.0, "draft": {"kind": "jacobi", "size": 15}},
  )
  cfg.batch_size = 32
  if variant == "tiny":
    sections.tiny_text(cfg)
    cfg.data = sections.packed_text(64)
    cfg.optim.update(lr=1e-3)
  return cfg
