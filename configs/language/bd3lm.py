"""BD3-LM: block diffusion, a noisy and a clean copy of every row in one forward pass.

  genmodels train --config configs/language/bd3lm.py:tiny --workdir runs/bd3lm

The default variant has the paper's OpenWebText setting at block size 4: 1,024 tokens (2,048 slots), batch
512, AdamW 3e-4, EMA 0.9999. The paper starts it from an MDLM of 850K steps: set `init`. Reports use the
unclipped bound.

Masked shares lie in a band that is searched for: every 5000 steps (unverified) the loss of held-out blocks is
drawn anew, and of all intervals of widths 0.5 to 0.9 on a grid of 0.05 the one of least variance is trained
with. It starts from the best known ones (unverified): [0.45, 0.95] at block size 4, [0.3, 0.8] at 16
(`:b16`). The tiny variant has no band and no search; `objective.corruption.search.every=20` turns it on.
"""

from genmodels import sections

VARIANTS = ("tiny", "b16")


def get_config(variant: str = ""):
  cfg = sections.system(
    "language/bd3lm",
    title="Block Diffusion: Interpolating Between Autoregressive and Diffusion Language Models",
    arxiv="2503.09573",
    row=-1,
    tests=(
      "tests/objectives/test_bound.py::test_loss_is_the_bound",
      "tests/objectives/test_text.py::test_two_streams_equal_blockwise_forwards",
      "tests/objectives/test_text.py::test_block_limits",
      "tests/corruption/test_band.py::test_counts_stay_inside_the_band",
      "tests/corruption/test_band.py::test_planted_variance_is_found",
      "tests/evals/test_survey.py::test_a_resumed_run_finds_what_the_whole_one_found",
    ),
    model=sections.llama(768, 12, 12, 2048, dropout=0.1),
    objective={
      "kind": "tokens",
      "corruption": {
        "kind": "band_absorb",
        "blocks": {"size": 4},
        "band": (0.45, 0.95),
        "search": {"every": 5000, "widths": (0.5, 0.6, 0.7, 0.8, 0.9), "delta": 0.05},
      },
      "layout": {"kind": "streams", "streams": ("n", "c")},
      "masks": {"full": "bd3"},
      "terms": {"diffusion": {"stream": "n", "on": "hit", "weight": "nelbo"}},
    },
    data=sections.packed_text(1024),
    optim=sections.adamw(3e-4, warmup=2500, b2=0.999),
    train={"steps": 150_000, "ema": 0.9999},
    sampler={"quota": {"kind": "first_hitting"}, "top_p": 0.9},
  )
  cfg.batch_size = 512
  if variant == "b16":
    cfg.objective.corruption.blocks.size = 16
    cfg.objective.corruption.band = (0.3, 0.8)
  if variant == "tiny":
    sections.tiny_text(cfg)
    cfg.model.dropout = 0.0
    cfg.train.ema = 0.0
    cfg.objective.corruption.band = (0.0, 1.0)
    cfg.objective.corruption.search = {"every": 0, "batches": 2, "draws": 4}
  return cfg
