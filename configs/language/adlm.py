"""ADLM: masked diffusion in two networks in series; the first predicts important tokens for the second.

  genmodels train --config configs/language/adlm.py:tiny --workdir runs/adlm

The anchor's mean embedding, through a matrix that starts at 0, is added to the denoiser's input; its
cross-entropy on tokens that occur at most 5 times in their document counts γ = 3e-3. Trunk, data and
optimiser are MDLM's. Unverified: γ, how tokens are chosen, that depth is shared half and half (6 + 6 layers),
where the soft output enters, and that both networks read one table of embeddings. Reported likelihoods are
the denoiser's bound. `--sampler samplers/remdm` is the paper's second sampler.
"""

from genmodels import sections

VARIANTS = ("tiny",)


def get_config(variant: str = ""):
  model = sections.llama(768, 6, 12, 2048, dropout=0.1)
  objective = sections.mdlm()
  term = objective["terms"]["diffusion"]
  cfg = sections.system(
    "language/adlm",
    title="Anchored Diffusion Language Model",
    arxiv="2505.18456",
    row=265,
    tests=(
      "tests/objectives/test_anchor.py::test_an_identity_anchor_is_mdlm_bit_by_bit",
      "tests/objectives/test_anchor.py::test_the_anchor_is_asked_for_rare_tokens",
      "tests/objectives/test_anchor.py::test_both_losses_train_the_anchor",
    ),
    model=model | {"anchor": 6, "heads": {"text": {}, "anchor": {}}},
    objective=objective
    | {
      "kind": "anchored",
      "likelihood": "diffusion",
      "terms": {
        "diffusion": term,
        "anchor": term | {"head": "anchor", "scale": 3e-3},
      },
      "rare": 5,
    },
    data=sections.packed_text(1024),
    optim=sections.adamw(3e-4, warmup=2500, b2=0.999),
    train={"steps": 1_000_000, "ema": 0.9999},
    sampler={"quota": {"kind": "ancestral", "steps": 128}},
  )
  cfg.batch_size = 512
  if variant == "tiny":
    sections.tiny_text(cfg)
    cfg.model.update(layers=1, anchor=1, dropout=0.0)
    cfg.train.ema = 0.0
    cfg.sampler.quota.steps = 16
  return cfg
