"""DFlash: a few layers beside a frozen AR model draft a block of tokens at once, by diffusion in one step.

  genmodels train --config configs/language/dflash.py:tiny --workdir runs/dflash
  genmodels sample --workdir runs/dflash --prompt "def " sampler.draft=block

A block is a clean anchor, the newest token, and 15 masks. Its queries see the anchor and the masks in both
directions and, as keys of every layer, the hidden states that five layers of the model have of the text
before the anchor. Cross-entropy weighted by exp(−(k − 1)/7) at the k-th token behind the anchor. The default
variant has the shape of Qwen3-8B with five layers beside it, rows of 3072, 6e-4 falling (unverified). The
paper draws 512 anchors a row, whose blocks overlap; here blocks tile the row from a random origin (192), so
that every token is drafted once. `genmodels train --from IMPORT` starts from a checkpoint; the tiny variant
adapts a random model. Reported likelihoods are the model's own.
"""

from genmodels import sections

VARIANTS = ("tiny",)


def get_config(variant: str = ""):
  cfg = sections.system(
    "language/dflash",
    title="DFlash: Block Diffusion for Flash Speculative Decoding",
    arxiv="2602.06036",
    row=-1,
    tests=(
      "tests/objectives/test_block_draft.py::test_blocks_of_one_row_equal_separate_forwards",
      "tests/objectives/test_block_draft.py::test_a_block_sees_its_context_and_itself",
      "tests/objectives/test_block_draft.py::test_weights_fall_behind_the_anchor",
      "tests/sampling/test_block_draft.py::test_any_drafter_keeps_the_greedy_ids",
      "tests/sampling/test_block_draft.py::test_sampled_drafts_keep_the_law",
    ),
    model=sections.qwen3(4096, 36, 32, 8, 12288, remat={"preset": "full"})
    | {"heads": {"text": {}, "drafter": {"kind": "block", "depth": 5, "taps": (1, 9, 17, 25, 33)}}},
    objective={
      "kind": "block_draft",
      "corruption": {"kind": "groups", "blocks": {"size": 16}, "anchored": True},
      "layout": {"kind": "streams", "streams": ("n", "c")},
      "masks": {"full": "context_causal"},
      "likelihood": "ar",
      "terms": {
        "ar": {"stream": "c", "align": "shift", "scale": 0.0},
        "draft": {
          "head": "drafter",
          "stream": "n",
          "on": "hit",
          "weight": "decay",
          "decay": 7.0,
          "normaliser": "weight_sum",
        },
      },
    },
    data=sections.packed_text(3072),
    optim=sections.adamw(6e-4, warmup=1000, kind="cosine", freeze=("^(?!heads/drafter/)",)),
    train={"steps": 25_000},
  )
  cfg.batch_size = 64
  if variant == "tiny":
    sections.tiny_text(cfg)
    cfg.model.heads.drafter.update(depth=1, taps=(0, 1))
    cfg.objective.corruption.blocks.size = 8
    cfg.objective.terms.draft.decay = 4.0
  return cfg
