"""What a masked slot shows: the mask's embedding, or a mixture of it with what the model expects there.

The mixture reads the likeliest tokens of the last step that asked for a token (`Picked.top`): Σ p̃(v)·e_v,
p̃ the probabilities inside the nucleus, renormalised. It enters as `Inputs.add_embed`; weights of 0 leave
every bit.

Legend: B rows · N tokens of a row · A slots of a call · R likeliest tokens · D width.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from genmodels.contracts import Array
from genmodels.sampling.draw import Picked
from genmodels.sampling.state import Ask, State, at_coordinate, put


@dataclasses.dataclass(frozen=True)
class Mask:
  """The mask, and nothing else."""

  active = False
  extras = ()
  top = 0
  refine = 0

  def add(self, sampler, params, a: Ask, s: State) -> Array | None:
    """[B, A, D] to add to the embeddings of the call's slots; None: nothing."""
    return None


@dataclasses.dataclass(frozen=True)
class Soft(Mask):
  """Base of mixtures: (1 − out)·e_mask + weight·Σ p̃(v)·e_v.

  Fields:
    top_p: mass of the nucleus. top: R, the most tokens in it.
  """

  top_p: float = 0.9
  top: int = 8

  active = True
  extras = ("top", "spread")

  def __post_init__(self):
    if self.top < 1 or not 0 < self.top_p <= 1:
      raise ValueError(f"top is {self.top}, top_p {self.top_p}; at least 1 token, and a mass in (0, 1]")

  def weights(self, spread: Array, k: Array) -> tuple[Array, Array]:
    """(weight, out) float32[B, A] of a slot whose last prediction had the entropy `spread` over ln V, after
    k int32[B, 1] steps of the unit."""
    raise NotImplementedError

  def add(self, sampler, params, a, s):
    at, noisy = a.only[..., 1], a.only[..., 0] == sampler.stream
    ids, prob, spread = (rows_at(s.memory["top"][name], at) for name in ("ids", "prob", "spread"))
    known = (at >= 0) & noisy & at_coordinate(~s.committed, at) & (prob[..., 0] > 0)
    before = jnp.cumsum(prob, -1) - prob
    prob = jnp.where(before < self.top_p, prob, 0.0)
    prob = prob / jnp.maximum(prob.sum(-1, keepdims=True), 1e-30)
    weight, out = (jnp.where(known, x, 0.0)[..., None] for x in self.weights(spread, s.k[:, None]))
    embed = lambda ids: sampler.model.embed(params, ids).astype(jnp.float32)

    def term(total, one):  # one of the R at a time: no [B, A, R, D]
      id_, p = one
      return total + p[..., None] * embed(id_), None

    mask = embed(jnp.full(at.shape, sampler.objective.mask_id, jnp.int32))
    soft, _ = jax.lax.scan(term, jnp.zeros_like(mask), (jnp.moveaxis(ids, -1, 0), jnp.moveaxis(prob, -1, 0)))
    return weight * soft - out * mask


@dataclasses.dataclass(frozen=True)
class Refine(Soft):
  """LRD (2510.11052 §3.2): α·e_mask + (1 − α)·Σ p̃(v)·e_v with 1 − α = strength·(1 − H/ln V), so that sure
  slots show what they expect. First up to `refine` steps commit nothing, until the mean KL between steps is
  below `tol`. Strength, tol and the form of α are unverified.

  Fields:
    strength: largest weight; 0 is the mask alone, bit by bit.
    refine: steps of the first phase in each unit. tol: nats, see stop kind "converged".
  """

  strength: float = 0.2
  refine: int = 0
  tol: float = 0.05

  @property
  def extras(self):
    return ("top", "spread", "kl") if self.refine else ("top", "spread")

  def weights(self, spread, k):
    weight = self.strength * (1 - spread)
    return weight, weight


@dataclasses.dataclass(frozen=True)
class Smooth(Soft):
  """IterationSmooth (dInfer, 2510.08666): the weight grows with the steps of the unit, min(cap, start +
  growth·k), whatever the model is sure of."""

  start: float = 0.15
  growth: float = 0.02
  cap: float = 0.3

  def weights(self, spread, k):
    weight = jnp.minimum(self.cap, self.start + self.growth * k) + jnp.zeros_like(spread)
    return weight, weight


@dataclasses.dataclass(frozen=True)
class SelfCondition(Soft):
  """The expected embedding is added to the mask's, which stays: self-conditioning without a projection, for
  models trained so (analog bits, 2208.04202 §3.2).

  Fields:
    scale: its weight.
  """

  scale: float = 1.0

  def weights(self, spread, k):
    return jnp.full_like(spread, self.scale), jnp.zeros_like(spread)


def rows_at(x: Array, at: Array) -> Array:
  """x [B, N, …] at coordinates int32[B, A]."""
  index = jnp.clip(at, 0, x.shape[1] - 1)
  return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), 1)


def remembered(shape: tuple[int, int], top: int) -> dict[str, Array]:
  """No predictions yet, of B rows of N tokens."""
  return {
    "ids": jnp.zeros((*shape, top), jnp.int32),
    "prob": jnp.zeros((*shape, top), jnp.float32),
    "spread": jnp.ones(shape, jnp.float32),
  }


def remember(memory: dict[str, Array], a: Ask, picked: Picked) -> dict[str, Array]:
  """What was predicted in this step, by coordinate."""
  ids, prob = picked.top
  out = memory | {"ids": put(memory["ids"], a.at, ids, a.can), "prob": put(memory["prob"], a.at, prob, a.can)}
  if picked.spread is not None:
    out["spread"] = put(memory["spread"], a.at, picked.spread, a.can)
  return out


REGISTRY = {"mask": Mask, "refine": Refine, "smooth": Smooth, "self_condition": SelfCondition}
