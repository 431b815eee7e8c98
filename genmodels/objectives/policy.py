"""Block diffusion whose block sizes a policy chooses, trained beside the model (CtrlDiff).

  π(size | hidden state of the last token before the block)
  reward of a block = −(its weighted cross-entropy) − cost
  ∇ E[reward per token] ∝ E Σ_b (reward_b − ρ · tokens_b) ∇ log π(size_b),     ρ = E reward / E tokens

Huang & Tang, 2505.14455, choose the size of the next block by reinforcement learning from hidden states of
the blocks before it (pooled, with their entropy). Their reward and update are not reproduced here: this is
REINFORCE on the gain ρ of a renewal process, whose running mean is the baseline (renewal-reward theorem; what
a choice does to later blocks is left out). Sizes must not follow from what they decide about: the policy
reads a causal pass over the clean row, which knows no blocks.

Legend: B rows · N clean tokens · C sizes · D width.
"""

from __future__ import annotations

import copy
import dataclasses

import jax
import jax.numpy as jnp

from genmodels import rows
from genmodels.config import ConfigError, Schedule
from genmodels.contracts import CLEAN, Array, Noise, Row
from genmodels.corruption.base import eligible
from genmodels.corruption.sampled import SampledAbsorb
from genmodels.objectives.base import Nets, Objective, work


@dataclasses.dataclass(frozen=True)
class BlockPolicy(Objective):
  """The composed objective with a policy as a second player.

  The term of the policy's name is its loss: it has a scale and nothing else that counts.

  Fields:
    policy: name of the network (section `trees`, kind "choice"), of its player and of its term.
    cost: of a block, in nats.
    entropy: weight of the policy's entropy, a number or a schedule.
    decay: of the running mean of the gain.
  """

  policy: str = "policy"
  cost: float = 1.0
  entropy: Schedule = 0.01
  decay: float = 0.99

  def __post_init__(self):
    super().__post_init__()
    object.__setattr__(self, "entropy", Schedule.of(self.entropy))
    if not isinstance(self.corruption, SampledAbsorb):
      raise ValueError("corruption is of another kind; a policy chooses among sizes of kind 'sampled_absorb'")
    if self.policy not in self.terms or self.policy == self.likelihood:
      raise ValueError(f"terms lack {self.policy!r}, the policy's own loss")
    for name, term in self.terms.items():
      if term.normaliser not in ("all_valid", "answer_len", "batch"):
        raise ConfigError(
          "how many tokens are masked is not known before the sizes are chosen",
          key=f"terms.{name}.normaliser", value=term.normaliser, fix="'all_valid'",
        )  # fmt: skip
    if not 0 <= self.decay < 1 or self.cost < 0:
      raise ValueError(f"decay is {self.decay}, cost {self.cost}; decay lies in [0, 1), cost is at least 0")
    reader = Objective(
      layout={"kind": "streams", "streams": (CLEAN,)},
      masks={pattern: "causal" for pattern in self.masks},
      terms={"text": {"align": "shift"}},
    )
    object.__setattr__(self, "reader", reader)

  # -- the gain: what no gradient moves -----------------------------------------------------------------

  def stats(self):
    return super().stats() | {"gain": jnp.float32(0), "gain_count": jnp.int32(0)}

  def bind(self, stats):
    bound = copy.copy(super().bind(stats))
    object.__setattr__(bound, "_kept", dict(stats))
    return bound

  def update(self, stats, sums):
    stats = super().update(stats, sums)
    if "reward" not in sums:
      return stats
    reward, tokens = sums["reward"], sums["reward_tokens"]
    some = tokens > 0
    rate = jnp.maximum(1 - self.decay, 1 / (stats["gain_count"] + 1))
    moved = stats["gain"] + rate * (reward / jnp.maximum(tokens, 1) - stats["gain"])
    return {
      **stats,
      "gain": jnp.where(some, moved, stats["gain"]),
      "gain_count": stats["gain_count"] + some.astype(jnp.int32),
    }

  # -- training -----------------------------------------------------------------------------------------

  def asked(self, row, noise, latent=None, bound=None):
    inputs, targets, denominators = super().asked(row, noise, latent, bound)
    targets.pop(self.policy, None)
    if bound is None:
      denominators[self.policy] = jnp.sum(eligible(row), dtype=jnp.float32)
    return inputs, targets, denominators

  def run(self, nets: Nets, row: Row, key: Array, step):
    logp, read = self.sizes(nets, row, key, step)
    choice = self.corruption.choose(row, key, step, jax.lax.stop_gradient(logp))
    noise = self.corruption.within(row, key, step, *self.corruption.cut(row, choice))
    inputs, targets, denominators = self.asked(row, noise, nets.latent)
    outputs = nets["model"](inputs, targets)
    sums, aux = self.loss(outputs, targets)
    aux["work"] = {"model": work(outputs, targets), "reader": work(read, {})}
    if nets.player == self.policy:
      sums[self.policy], more = self.reinforce(
        row, noise, aux["per_token"][self.likelihood], logp, choice, step
      )
      aux = {"per_token": {}, "ratios": more["ratios"], "work": aux["work"], "stats": more["stats"]}
    return sums, denominators, aux

  def sizes(self, nets: Nets, row: Row, key: Array, step):
    """(float32[B, N, C] log-probabilities of the size of a block that begins at each token, Outputs read)."""
    inputs, _ = self.reader.view(row, self.reader.corruption.draw(row, key, step))
    read = nets["model"](inputs, {})
    hidden = jax.lax.stop_gradient(read.layers["hidden"])[:, : row.doc.shape[1]]
    begins = rows.coordinates(row.doc) == rows.doc_bounds(row.doc)[0]
    before = jnp.where(begins[..., None], 0, jnp.roll(hidden, 1, axis=1))
    logp = nets[self.policy](before)
    if logp.shape[-1] != len(self.corruption.sizes):
      raise ConfigError(
        f"the policy chooses among {len(self.corruption.sizes)} sizes", key=f"trees.{self.policy}.classes",
        value=logp.shape[-1], fix=f"classes={len(self.corruption.sizes)}",
      )  # fmt: skip
    return logp, read

  def rewards(self, noise: Noise, loss: Array) -> Array:
    """float32[B, N]: the reward of each token's block, whose weighted cross-entropies sum to `loss`."""
    del noise
    return -loss - self.cost

  def reinforce(self, row: Row, noise: Noise, per_token: Array, logp: Array, choice: Array, step):
    """The policy's loss, a sum, and {"ratios", "stats"}."""
    ok, lo, hi = eligible(row), noise.blk_lo, noise.blk_hi
    tokens = rows.count_in(lo, hi, ok).astype(jnp.float32)
    first = ((rows.coordinates(lo) == lo) & (tokens > 0) & (row.doc >= 0)).astype(jnp.float32)
    reward = jax.lax.stop_gradient(self.rewards(noise, rows.sum_in(lo, hi, per_token)))
    total, count = jnp.sum(first * reward), jnp.sum(ok, dtype=jnp.float32)
    kept = getattr(self, "_kept", self.stats())
    gain = jnp.where(kept["gain_count"] > 0, kept["gain"], total / jnp.maximum(count, 1))
    advantage = reward - gain * tokens
    chosen = jnp.take_along_axis(logp, choice[..., None], 2)[..., 0]
    entropy = -(jnp.exp(logp) * logp).sum(-1)
    loss = -jnp.sum(first * (advantage * chosen + self.entropy(step) * entropy))
    blocks = jnp.sum(first)
    ratios = {
      "reward": (total, count),
      "block_size": (count, blocks),
      "entropy": (jnp.sum(first * entropy), blocks),
    }
    return loss, {"ratios": ratios, "stats": {"reward": total, "reward_tokens": count}}
