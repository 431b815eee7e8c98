"""EDLM: masked diffusion with an energy over whole texts, learned by noise contrastive estimation.

  genmodels train --config configs/language/edlm.py:tiny --workdir runs/edlm

A masked denoiser predicts tokens apart from each other; the energy, a second trunk over what is shown and a
candidate for the whole text, weighs its drafts (`--sampler samplers/edlm:nce`). The denoiser stands still:
start it from one with `init.kind=workdir init.path=runs/mdlm init.tree=ema`. Its rows are MDLM's, as
in the paper. Unverified: steps and rate of the energy. The authors start it from the denoiser's weights; here
it is fresh with an output of 0, which is MDLM. The tiny variant has no trained denoiser and trains both at
once. Reported likelihoods are the denoiser's bound; the energy's own partition function is not estimated. The
form with an autoregressive model as it is needs no training (`--sampler samplers/edlm`).
"""

from genmodels import sections

VARIANTS = ("tiny",)


def get_config(variant: str = ""):
  objective = sections.mdlm()
  cfg = sections.system(
    "language/edlm",
    title="Energy-Based Diffusion Language Models for Text Generation",
    arxiv="2410.21357",
    row=45,
    tests=(
      "tests/objectives/test_energy.py::test_the_denoiser_is_mdlm_bit_by_bit",
      "tests/objectives/test_energy.py::test_a_fresh_energy_prefers_nothing",
      "tests/objectives/test_energy.py::test_the_minimum_is_the_log_ratio",
      "tests/sampling/test_energy.py::test_a_fresh_network_leaves_the_law",
    ),
    model=sections.llama(768, 12, 12, 2048, dropout=0.1),
    objective=objective
    | {
      "kind": "energy_nce",
      "likelihood": "diffusion",
      "terms": objective["terms"] | {"energy": {"stream": "n", "on": "hit"}},
    },
    trees={"energy": {"kind": "energy"}},
    players={
      "energy": {"terms": ("energy",), "optimizer": sections.adamw(3e-4, warmup=2500, b2=0.999)},
    },
    data=sections.packed_text(1024),
    optim=sections.adamw(3e-4, warmup=2500, b2=0.999, freeze=(".*",)),
    train={"steps": 400_000},
    sampler={"quota": {"kind": "ancestral", "steps": 128}},
  )
  cfg.batch_size = 512
  if variant == "tiny":
    sections.tiny_text(cfg)
    cfg.model.dropout = 0.0
    cfg.optim.freeze = ()
    cfg.players.energy.optimizer.update(lr=3e-3, schedule={"warmup": 5})
    cfg.sampler.quota.steps = 16
  return cfg
