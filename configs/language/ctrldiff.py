"""CtrlDiff: block diffusion whose block sizes are chosen, one block after another.

  genmodels train --config configs/language/ctrldiff.py:tiny --workdir runs/ctrldiff

A small policy reads the hidden state of the last token before a block and takes one of the sizes; it is a
second player with an optimiser of its own, trained by REINFORCE: reward = −(cross-entropy of the block) −
cost of a block, baseline = running mean of the reward per token. The model's gradient does not know the
policy. `:sampled` draws the sizes from a fixed law instead; with one size it is BD3-LM, bit by bit.
Likelihoods and plain samplers use equal blocks of `objective.corruption.blocks.size`; `samplers/ctrldiff`
asks the policy.

Trunk, data and optimiser are those of BD3-LM, as in the paper. Unverified: sizes, cost, the policy's width
and rate. The paper's state pools several blocks and their entropy; its reward and its update are not
reproduced, and its classifier guidance is not here.
"""

from genmodels import sections

VARIANTS = ("tiny", "sampled")


def get_config(variant: str = ""):
  learned = variant != "sampled"
  terms = {"diffusion": {"stream": "n", "on": "hit", "weight": "nelbo"}}
  more = {}
  if learned:
    terms["policy"] = {"stream": "n", "on": "hit"}
    more = {
      "trees": {"policy": {"kind": "choice", "classes": 3, "width": 256}},
      "players": {
        "policy": {"terms": ("policy",), "optimizer": sections.adamw(3e-4, warmup=2500), "every": 4},
      },
    }
  cfg = sections.system(
    "language/ctrldiff",
    title="CtrlDiff: Boosting Large Diffusion Language Models with Dynamic Block Prediction and Controllable "
    "Generation",
    arxiv="2505.14455",
    row=147,
    tests=(
      "tests/objectives/test_policy.py::test_one_size_is_block_diffusion_bit_by_bit",
      "tests/objectives/test_policy.py::test_the_policy_finds_the_best_size",
      "tests/objectives/test_policy.py::test_the_model_does_not_know_the_policy",
    ),
    model=sections.llama(768, 12, 12, 2048),
    objective={
      "kind": "block_policy" if learned else "tokens",
      "corruption": {"kind": "sampled_absorb", "sizes": (4, 8, 16), "blocks": {"size": 4}},
      "layout": {"kind": "streams", "streams": ("n", "c")},
      "masks": {"full": "bd3"},
      "likelihood": "diffusion",
      "terms": terms,
    },
    data=sections.packed_text(1024),
    optim=sections.adamw(3e-4, warmup=2500, b2=0.999),
    train={"steps": 150_000, "ema": 0.9999},
    sampler={"quota": {"kind": "first_hitting"}, "top_p": 0.9},
    **more,
  )
  cfg.batch_size = 512
  if learned:
    cfg.objective.update(cost=1.0, entropy=0.01, decay=0.99)
  if variant == "tiny":
    sections.tiny_text(cfg)
    cfg.train.ema = 0.0
    cfg.trees.policy.width = 32
    cfg.players.policy.update(every=2, optimizer={"lr": 3e-3, "schedule": {"warmup": 5}})
  return cfg
