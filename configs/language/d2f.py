"""D2F: discrete diffusion forcing, a block-causal student distilled from its own bidirectional self.

  genmodels train --config configs/language/d2f.py:tiny --workdir runs/d2f

The student is LLaDA with LoRA (rank 32 on q, k, v, o) and the block-causal mask; the teacher is the same
tree without the adapter under the full mask. Noise never decreases from block to block (0.2–0.7). Blocks
of 16 tokens, 512 tokens a row, AdamW 1e-5. `init` names the LLaDA checkpoint.
"""

from genmodels import sections

VARIANTS = ("tiny",)


def get_config(variant: str = ""):
  cfg = sections.system(
    "language/d2f",
    title="Diffusion LLMs Can Do Faster-Than-AR Inference via Discrete Diffusion Forcing",
    arxiv="2508.09192",
    row=223,
    tests=(
      "tests/objectives/test_distill.py::test_equal_masks_and_weights_give_no_gradient",
      "tests/objectives/test_distill.py::test_teacher_is_the_base_and_gets_no_gradient",
      "tests/objectives/test_bound.py::test_monotone_levels",
    ),
    model=sections.llama(
      4096,
      32,
      32,
      12288,
      remat={"preset": "full"},
      lora={"rank": 32, "alpha": 32.0, "targets": "stack/.*/(q|k|v|o)"},
    ),
    objective={
      "kind": "block_distill",
      "corruption": {"kind": "monotone_absorb", "blocks": {"size": 16, "anchor": "response"}},
      "layout": {"kind": "streams", "streams": ("n",)},
      "masks": {"full": "block_causal"},
      "teacher_masks": {"full": "full"},
      "terms": {
        "distill": {"stream": "n", "on": "hit", "weight": "inverse_marginal", "normaliser": "masked"}
      },
    },
    data=sections.packed_text(512),
    optim=sections.adamw(1e-5, warmup=100, freeze=("^(?!.*lora_)",)),
    train={"steps": 10_000},
    trees={"teacher": {"view": "no_lora"}},
    sampler={"quota": {"kind": "threshold", "tau": 0.9}, "score": "prob", "active": {"kind": "pipeline"}},
  )
  cfg.batch_size = 32
  if variant == "tiny":
    sections.tiny_text(cfg)
    cfg.model.lora.rank = 4
  return cfg
