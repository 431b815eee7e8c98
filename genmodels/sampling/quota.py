"""Quotas: how many, and which, of the masked tokens of a unit are committed in one step.

A *unit* is what is denoised together: a document, a block, or a sub-block of one (semi-autoregressive).

Legend: B rows · M tokens asked for.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from genmodels.contracts import pytree
from genmodels.corruption.absorb import level_of, masked_probability

Array = jax.Array


@pytree()
class Unit:
  """What a quota may look at.

  Fields:
    can: bool[B, M], masked tokens that this forward predicts.
    score: float32[B, M], how sure the model is of them.
    rank: float32[B, M], what orders them: the score, or what a commit rule puts in its place.
    least: int32[B], how many are committed at the least.
    k: int32[B], steps taken in this unit. size: int32[B], masked tokens at its start.
    level: float32[B], noise level t, 1 at the start of the unit.
    token_u: float32[B, M], row_u: float32[B], fresh uniforms.
  """

  can: Array
  score: Array
  rank: Array
  least: Array
  k: Array
  size: Array
  level: Array
  token_u: Array
  row_u: Array

  @property
  def left(self) -> Array:
    """int32[B], masked tokens left."""
    return self.can.sum(1, dtype=jnp.int32)


def best(unit: Unit, score: Array, count: Array) -> Array:
  """bool[B, M]: the `count` int32[B] candidates of highest score; ties go to the earlier token."""
  order = jnp.argsort(jnp.where(unit.can, -score, jnp.inf), axis=1, stable=True)
  rank = jnp.argsort(order, axis=1)
  return unit.can & (rank < count[:, None])


def share(unit: Unit, commit: Array) -> Array:
  """float32[B]: the part of the unit that is still masked after `commit`."""
  return (unit.left - commit.sum(1)) / jnp.maximum(unit.size, 1)


@dataclasses.dataclass(frozen=True)
class Quota:
  """Base. `select(unit)` gives (commit bool[B, M], the new level float32[B])."""

  reuse = False  # a step may leave a row as it is, so that its predictions stay valid
  timed = False  # `level` is a time of its own, which a network may be conditioned on; else the share masked

  def bound(self, size: int) -> int:
    """The most steps a unit of `size` tokens takes."""
    raise NotImplementedError

  def select(self, unit: Unit) -> tuple[Array, Array]:
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Linear(Quota):
  """Equal integer parts of the masked tokens in `steps` steps, the remainder in the first ones (LLaDA)."""

  steps: int = 32

  def __post_init__(self):
    if self.steps < 1:
      raise ValueError(f"steps is {self.steps}; a unit takes at least one step")

  def bound(self, size):
    return min(self.steps, size)

  def select(self, unit):
    count = unit.size // self.steps + (unit.k < unit.size % self.steps)
    commit = best(unit, unit.rank, count)
    return commit, share(unit, commit)


@dataclasses.dataclass(frozen=True)
class Cosine(Linear):
  """⌊size·cos(π(k+1)/2T)⌋ tokens stay masked after step k of T; at least one is committed (MaskGIT)."""

  def select(self, unit):
    r = (unit.k + 1) / self.steps
    stay = jnp.floor(unit.size * jnp.cos(jnp.pi / 2 * jnp.minimum(r, 1.0)) + 1e-4).astype(jnp.int32)
    count = jnp.clip(unit.left - jnp.where(r >= 1, 0, stay), 1, None)
    commit = best(unit, unit.rank, count)
    return commit, share(unit, commit)


@dataclasses.dataclass(frozen=True)
class Threshold(Quota):
  """Every token whose score exceeds `tau`, and always the best one (Fast-dLLM, SDAR dynamic)."""

  tau: float = 0.9

  def bound(self, size):
    return size

  def select(self, unit):
    commit = best(unit, unit.rank, unit.least) | (unit.can & (unit.score > self.tau))
    return commit, share(unit, commit)


@dataclasses.dataclass(frozen=True)
class All(Quota):
  """Everything at once: one step per unit (next-scale models, one-step drafts)."""

  def bound(self, size):
    return 1

  def select(self, unit):
    return unit.can, jnp.zeros_like(unit.level)


@dataclasses.dataclass(frozen=True)
class FirstHitting(Quota):
  """One uniformly chosen token a step, at the time when the first of n masked tokens is revealed:
  p(t) ← p(t)·u^{1/n} (BD3-LM, 2503.09573 §B; Zheng et al. 2409.02908). Ancestral sampling with T → ∞.

  Fields:
    schedule: the corruption's; "" takes it from the objective.
  """

  schedule: str = ""
  timed = True

  def bound(self, size):
    return size

  def select(self, unit):
    commit = best(unit, unit.token_u, jnp.ones_like(unit.k))
    n = jnp.maximum(unit.left, 1)
    p = masked_probability(self.schedule, unit.level, 0.0) * unit.row_u ** (1 / n)
    level = level_of(self.schedule, p)
    return commit, jnp.where(unit.left > 0, level, unit.level)


@dataclasses.dataclass(frozen=True)
class Ancestral(Quota):
  """Each masked token is revealed with probability (p(t) − p(s))/p(t) as t falls from 1 to 0 in `steps`
  equal parts (MDLM's ddpm_cache; 2406.07524 eq. 7). The last step reveals what is left.

  Fields:
    reuse: keep the predictions while no row changes: the networks do not read t. The tokens are the
      same either way, only the number of forwards differs.
    schedule: the corruption's; "" takes it from the objective.
  """

  steps: int = 128
  reuse: bool = True
  schedule: str = ""
  timed = True

  def __post_init__(self):
    if self.steps < 1:
      raise ValueError(f"steps is {self.steps}; a unit takes at least one step")

  def bound(self, size):
    return self.steps

  def select(self, unit):
    s = jnp.maximum(1 - (unit.k + 1) / self.steps, 0.0)
    p_t = masked_probability(self.schedule, 1 - unit.k / self.steps, 0.0)
    p_s = masked_probability(self.schedule, s, 0.0)
    reveal = jnp.where(unit.k + 1 >= self.steps, 1.0, (p_t - p_s) / jnp.maximum(p_t, 1e-12))
    return unit.can & (unit.token_u < reveal[:, None]), s


REGISTRY = {
  "linear": Linear,
  "cosine": Cosine,
  "threshold": Threshold,
  "all": All,
  "first_hitting": FirstHitting,
  "ancestral": Ancestral,
}
