"""LLaDA-MoE: masked diffusion with a mixture of experts, one level per sequence, weight 1/p over all tokens.

  genmodels train --config configs/language/llada_moe.py:tiny --workdir runs/llada_moe

The default variant has the shape of the published LLaDA-MoE-7B-A1B checkpoints: 16 layers of width 2,048,
each with 64 experts of 1,024 hidden units, of which a token takes 8, with weights that are not normalised.
The balance loss has λ = 0.01, the `router_aux_loss_coef` of its configuration class. Learning rate, batch and
schedule are LLaDA's: those of the paper, and its z-loss if it has one, are unverified here.
"""

from genmodels import sections

VARIANTS = ("tiny",)


def get_config(variant: str = ""):
  cfg = sections.system(
    "language/llada_moe",
    title="LLaDA-MoE: A Sparse MoE Diffusion Language Model",
    arxiv="2509.24389",
    row=-1,
    tests=(
      "tests/models/test_moe.py::test_is_a_loop_over_slots_and_experts",
      "tests/objectives/test_router.py::test_terms_are_taken_per_micro_batch_and_averaged",
      "tests/objectives/test_router.py::test_the_shipped_system",
    ),
    model={
      "preset": "llada-moe-7b-a1b",
      "vocab_multiple": 128,
      "dtype": "bfloat16",
      "remat": {"preset": "full"},
    },
    objective=sections.llada() | {"router": {"balance": 0.01}},
    data=sections.packed_text(4096),
    optim=sections.adamw(4e-4, warmup=2000, kind="wsd", weight_decay=0.1),
    train={"steps": 440_000},
    sampler={"quota": {"kind": "linear", "steps": 32}, "score": "prob", "sub_block": 32, "temperature": 0.0},
  )
  cfg.batch_size = 1280
  if variant == "tiny":
    del cfg.model["preset"]
    cfg.model.update(pattern=({"mlp": "moe"},), moe={"experts": 8, "top_k": 2, "mlp": 32}, qk_norm="rms")
    sections.tiny_text(cfg)
    cfg.sampler.quota.steps = 8
    cfg.sampler.sub_block = 16
  return cfg
