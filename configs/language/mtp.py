"""Multi-token prediction: masks behind a prefix draft the next tokens, by adapters that act at masks alone.

  genmodels train --config configs/language/mtp.py:tiny --workdir runs/mtp

The model's own predictions keep their bits, so what it drafts it can also verify. Groups of 8 masks tile a
noisy copy of the text from a random origin, each behind its own prefix, blind to the others. Cross-entropy of
the head and of the sampler head (two layers on the hidden state and the token before) and the distance to the
model's own hidden states, summed with weight one (unverified); LoRA of rank 128 (unverified) on every matrix
of the layers. The default variant has the shape of Tulu-3-8B, 50k steps (unverified). `genmodels train --from
IMPORT` starts from a checkpoint; the tiny variant adapts a random model. Reported likelihoods are the base
model's and do not move.
"""

from genmodels import sections

VARIANTS = ("tiny",)


def get_config(variant: str = ""):
  llama3 = {
    "kind": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_len": 8192,
  }
  masks = {"stream": "n", "align": "shift"}
  cfg = sections.system(
    "language/mtp",
    title="Your LLM Knows the Future: Uncovering Its Multi-Token Prediction Potential",
    arxiv="2507.11851",
    row=164,
    tests=(
      "tests/objectives/test_drafts.py::test_own_predictions_keep_their_bits",
      "tests/objectives/test_drafts.py::test_groups_of_one_row_equal_separate_forwards",
      "tests/objectives/test_drafts.py::test_no_group_sees_another",
    ),
    model=sections.llama(
      4096,
      32,
      32,
      14336,
      kv_heads=8,
      rope={"base": 5e5, "scaling": llama3},
      remat={"preset": "full"},
      lora={"rank": 128, "alpha": 256.0, "targets": "stack/.*/(q|k|v|o|gate|up|down)", "gated": True},
    )
    | {
      "heads": {
        "text": {},
        "sampler": {"kind": "draft", "block": "mlp", "depth": 2, "given": 1, "shared": True},
        "latent": {"kind": "latent"},
      }
    },
    objective={
      "kind": "multi_token",
      "corruption": {"kind": "groups", "blocks": {"size": 8}},
      "layout": {"kind": "streams", "streams": ("n", "c")},
      "masks": {"full": "idlm"},
      "likelihood": "ar",
      "consistency": "latent",
      "terms": {
        "ar": {"stream": "c", "align": "shift", "scale": 0.0},
        "masks": {**masks, "head": "text"},
        "sampler": {**masks, "head": "sampler", "given": 1},
        "latent": {**masks, "head": "latent"},
      },
    },
    data=sections.packed_text(2048),
    optim=sections.adamw(2e-4, warmup=500, kind="cosine", freeze=("^(?!.*lora_|heads/sampler/)",)),
    train={"steps": 50_000},
  )
  cfg.batch_size = 64
  if variant == "tiny":
    sections.tiny_text(cfg)
    cfg.model.rope = {"base": 1e4}
    cfg.model.lora.update(rank=8, alpha=16.0)
    cfg.objective.corruption.blocks.size = 4
  return cfg
