"""SDAR: an AR checkpoint trained on as a block-diffusion model, one noise level per document.

  genmodels train --config configs/language/sdar.py:tiny --workdir runs/sdar

The default variant is Qwen3-4B shaped, block size 4, 1/p weights over the label tokens, at least one masked
token per document; 50B tokens of continued pretraining. `init` names the AR checkpoint.

`:sft` learns the answers of conversations (`genmodels prepare --messages`; docs/sft.md):

  genmodels train --config configs/language/sdar.py:sft_tiny --workdir runs/sdar_sft

Blocks are counted from the document's start, as in the published code. That code copies the prompt into the
noisy stream too; here only blocks that hold a part of an answer are copied: the same loss on fewer slots
(half a row of 4096 for the copies; the packer fills both budgets). 4B tokens, and blocks of 8 to 64 are set
directly here.
"""

from genmodels import sections

VARIANTS = ("sft", "tiny", "sft_tiny")


def get_config(variant: str = ""):
  cfg = sections.system(
    "language/sdar",
    title="SDAR: A Synergistic Diffusion-AutoRegression Paradigm for Scalable Sequence Generation",
    arxiv="2510.06303",
    row=6,
    tests=(
      "tests/objectives/test_text.py::test_sdar_draws_one_level_per_document",
      "tests/objectives/test_sft.py::test_variants_learn_answers_only",
      "tests/layouts/test_streams.py::test_losses_are_those_of_a_full_copy",
    ),
    model=sections.qwen3(2560, 36, 32, 8, 9728, remat={"preset": "full"}),
    objective={
      "kind": "tokens",
      "corruption": {
        "kind": "absorb",
        "unit": "doc",
        "blocks": {"size": 4},
        "count": "bernoulli",
        "schedule": "floor",
        "eps": 1e-3,
        "time": "uniform",
        "retries": 10,
      },
      "layout": {"kind": "streams", "streams": ("n", "c")},
      "masks": {"full": "bd3"},
      "terms": {"diffusion": {"stream": "n", "on": "hit", "weight": "inverse_marginal"}},
      # Redrawing empty documents shifts the marginal a little above p; the paper's weight ignores it.
      "reproduction": True,
    },
    data=sections.packed_text(4096),
    optim=sections.adamw(1e-5, warmup=500, kind="cosine", weight_decay=0.1),
    train={"steps": 24_000},
    sampler={"quota": {"kind": "threshold", "tau": 0.9}, "score": "prob"},
  )
  cfg.batch_size = 512
  if variant.startswith("sft"):
    cfg.train.steps = 4_000
    cfg.batch_size = 256
    cfg.objective.layout.update(copy="blocks", longest_block=4, copy_slots=2048)
    if variant == "sft_tiny":
      cfg.objective.layout.copy_slots = 192
    return sections.sft(cfg, variant == "sft_tiny")
  return sections.tiny_text(cfg) if variant == "tiny" else cfg
