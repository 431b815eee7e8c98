"""SDAR: an AR checkpoint trained on as a block-diffusion model, one noise level per document.

  genmodels train --config configs/language/sdar.py:tiny --workdir runs/sdar

The default variant is Qwen3-4B shaped, block size 4, 1/p weights over the label tokens, at least one masked
token per document; 50B tokens of continued pretraining. `init` names the AR checkpoint.
"""

from genmodels import sections

VARIANTS = ("tiny",)


def get_config(variant: str = ""):
  cfg = sections.system(
    "language/sdar",
    title="SDAR: A Synergistic Diffusion-AutoRegression Paradigm for Scalable Sequence Generation",
    arxiv="2510.06303",
    row=6,
    tests=("tests/objectives/test_text.py::test_sdar_draws_one_level_per_document",),
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
  return sections.tiny_text(cfg) if variant == "tiny" else cfg
