"""Medusa: five heads on an AR model draft the tokens behind the next one, all at once.

  genmodels train --config configs/language/medusa.py:tiny --workdir runs/medusa

Head k reads the hidden state of slot t and predicts token t + 1 + k: a residual block that starts as the
identity and an output weight that starts as the model's own; the loss is Σ 0.8^k of their cross-entropies
(Medusa-1: the model is frozen, one epoch of 60k conversations; 1e-3 unverified). The default variant has the
shape of Vicuna-7B. The variant `joint` is Medusa-2: the model's own cross-entropy too, by adapters of rank 32
at 5e-4 and heads at four times that, the heads' share rising to 0.2 (unverified). `genmodels train --from
IMPORT` starts from a checkpoint; the tiny variant adapts a random model. Reported likelihoods are the model's
own.
"""

from genmodels import sections

VARIANTS = ("joint", "tiny")
HEADS = 5


def get_config(variant: str = ""):
  joint = variant == "joint"
  heads = {f"medusa{k}": {"kind": "draft", "depth": 1} for k in range(1, HEADS + 1)}
  term = {"align": "shift", "normaliser": "masked"}
  # Medusa-2 brings the heads in over the run; each head's own share is 0.8^k.
  scale = lambda k: (
    {"kind": "linear", "start": 0.0, "end": 0.2 * 0.8**k, "over": (0, 940)} if joint else 0.8**k
  )
  trained = "heads/medusa|.*lora_" if joint else "heads/medusa"
  cfg = sections.system(
    "language/medusa",
    title="Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads",
    arxiv="2401.10774",
    row=66,
    tests=(
      "tests/objectives/test_drafts.py::test_fresh_heads_are_the_language_model",
      "tests/objectives/test_drafts.py::test_a_head_predicts_the_token_it_is_named_after",
      "tests/objectives/test_drafts.py::test_steps_leave_the_frozen_model_alone",
    ),
    model=sections.llama(4096, 32, 32, 11008) | {"heads": {"text": {}, **heads}},
    objective={
      "kind": "tokens",
      "likelihood": "ar",
      "terms": {
        "ar": {"align": "shift", "scale": float(joint)},
        **{h: {**term, "head": h, "ahead": k, "scale": scale(k)} for k, h in enumerate(heads, 1)},
      },
    },
    data=sections.packed_text(2048),
    optim=sections.adamw(1e-3, warmup=40, kind="cosine", freeze=(f"^(?!{trained})",)),
    train={"steps": 940},
  )
  cfg.batch_size = 64
  if joint:
    cfg.model.lora = {"rank": 32, "alpha": 16.0, "targets": "stack/.*/(q|k|v|o|gate|up|down)"}
    cfg.optim.update(lr=2e-3, lr_mult=((".*lora_.*", 0.25),))
  if variant == "tiny":
    sections.tiny_text(cfg)
  return cfg
