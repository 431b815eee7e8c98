"""Commit rules: where in the unit the tokens that a quota commits are taken from.

Legend: B rows · M tokens asked for.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from genmodels.contracts import Array
from genmodels.sampling.quota import Unit


@dataclasses.dataclass(frozen=True)
class Anywhere:
  """The surest tokens first, wherever they are (MaskGIT, LLaDA)."""

  def rank(self, unit: Unit) -> Unit:
    """The unit with the `rank` by which quotas order its tokens."""
    return unit

  def select(self, unit: Unit, chosen: Array) -> Array:
    """bool[B, M]: what is committed of what the quota chose."""
    return chosen


@dataclasses.dataclass(frozen=True)
class Leftmost(Anywhere):
  """Only the run of chosen tokens at the left end of what is masked, at least its first token: what is
  committed is a prefix at every step (the rule by which WeDLM's window and FreeCache enter the cache;
  2512.22737, 2505.21467). Quotas that count take the first tokens."""

  def rank(self, unit):
    return unit.replace(rank=-unit.at.astype(jnp.float32))

  def select(self, unit, chosen):
    skipped = jnp.cumsum(unit.can & ~chosen, 1)
    first = unit.can & (jnp.cumsum(unit.can, 1) <= unit.least[:, None])
    return (chosen & (skipped == 0)) | first


@dataclasses.dataclass(frozen=True)
class Hierarchical(Anywhere):
  """Besides what the quota chooses, one token of every long run of masked tokens, which splits it (dInfer's
  hierarchical decoder, 2510.08666: after O(log n) steps no long run is left).

  Fields:
    run: shortest run that is split, in tokens.
    which: "middle" of the run, or the "surest" token in it (the released decoder).
    floor: score that this token has to exceed (the released low threshold).
  """

  run: int = 8
  which: Literal["middle", "surest"] = "middle"
  floor: float = 0.0

  def __post_init__(self):
    if self.run < 2:
      raise ValueError(f"run is {self.run}; a run that is split has at least 2 tokens")

  def select(self, unit, chosen):
    index = jnp.arange(unit.can.shape[1])
    start = jax.lax.cummax(jnp.where(unit.can, -1, index), axis=1) + 1  # of the run that a token is in
    end = jax.lax.cummin(jnp.where(unit.can, index.size, index), axis=1, reverse=True)
    if self.which == "middle":
      pick = index == (start + end) // 2
    else:
      own = jnp.where(unit.can, unit.score, -jnp.inf)
      top = jax.vmap(lambda x, s: jax.ops.segment_max(x, s, index.size + 1)[s])(own, start)
      same = own == top  # ties: the earliest of the run
      before = jnp.cumsum(same, 1) - same
      pick = same & (before == jnp.take_along_axis(before, jnp.minimum(start, index.size - 1), 1))
    return chosen | (unit.can & pick & (end - start >= self.run) & (unit.score > self.floor))


REGISTRY = {"anywhere": Anywhere, "leftmost": Leftmost, "hierarchical": Hierarchical}
