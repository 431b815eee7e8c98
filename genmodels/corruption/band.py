"""Clipped noise levels, and the search for the band of least variance (BD3-LM).

Legend: B rows · N clean tokens · I intervals · R draws.
"""

from __future__ import annotations

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from genmodels import rows
from genmodels.contracts import Noise, Row
from genmodels.corruption.absorb import Absorb
from genmodels.corruption.base import eligible

Array = jax.Array

_EDGE = 1e-4  # counts whose share lies on a border of the band belong to it, whatever the rounding


@dataclasses.dataclass(frozen=True)
class Search:
  """When and over what the band is searched (Arriola et al., "Block Diffusion", 2503.09573, §5 and its code).

  All intervals [β, ω] of the given widths whose ends are multiples of `delta` compete; the one under whose
  levels the loss of a block varies least, over held-out blocks and draws of their noise, is trained with
  until the next search.

  Fields:
    every: training steps between searches; 0 never searches.
    widths: of the intervals.
    delta: grid of their ends.
    batches, draws: held-out batches, and draws of the noise of each.
  """

  every: int = 0
  widths: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9)
  delta: float = 0.05
  batches: int = 4
  draws: int = 8

  def __post_init__(self):
    if self.every < 0 or self.batches < 1 or self.draws < 1:
      raise ValueError(f"every is {self.every}, batches {self.batches}, draws {self.draws}; 0, 1, 1 or more")
    if not 0 < self.delta <= 1 or not self.widths or not all(0 < w <= 1 for w in self.widths):
      raise ValueError(f"widths are {self.widths}, delta is {self.delta}; all lie in (0, 1]")

  def intervals(self) -> np.ndarray:
    """float32[I, 2]: (β, ω), by width, then by β."""
    out = []
    for width in self.widths:
      starts = range(int(np.floor((1 - width) / self.delta + 1e-6)) + 1)
      out += [(i * self.delta, min(i * self.delta + width, 1.0)) for i in starts]
    return np.array(out, np.float32)


@dataclasses.dataclass(frozen=True)
class BandAbsorb(Absorb):
  """Exact counts whose masked share lies in a band: k uniform over β·n ≤ k ≤ ω·n (the nearest, if none does).

  The authors redraw independent masks until their share lies inside; here the count is drawn inside. Draws of
  a likelihood bound ignore the band, so reported likelihoods are bounds.

  Fields:
    band: (β, ω); with a search, until the first one.
    search: see `Search`.
  """

  unit: str = "block"
  band: tuple = (0.0, 1.0)
  search: Search = dataclasses.field(default_factory=Search)

  def __post_init__(self):
    super().__post_init__()
    if self.count != "exact" or self.schedule != "linear" or self.complement:
      raise ValueError(
        "a band of counts is of one copy with exact counts: count='exact', schedule='linear', "
        "complement=False"
      )
    if self.search.every and not all(b.is_constant for b in self.band):
      raise ValueError(
        "band is searched for and scheduled; it is one of them: search.every=0, or two numbers"
      )

  # -- what a state keeps ---------------------------------------------------------------------------------

  def stats(self) -> dict[str, Array]:
    """{"band": float32[2]} where one is searched for."""
    if not self.search.every:
      return {}
    return {"band": jnp.asarray([b.table[0] for b in self.band], jnp.float32)}

  def bind(self, stats: dict[str, Array]) -> BandAbsorb:
    if "band" not in stats:
      return self
    bound = copy.copy(self)
    object.__setattr__(bound, "_found", stats["band"])
    return bound

  def update(self, stats: dict[str, Array], sums: dict[str, Array]) -> dict[str, Array]:
    """The band of least variance, from the sums of `survey`; an interval without two blocks is out."""
    if "intervals" not in sums:
      return stats
    count, first, second = (sums["intervals"][:, i] for i in range(3))
    n = jnp.maximum(count, 1)
    variance = jnp.where(count > 1, second / n - jnp.square(first / n), jnp.inf)
    best = jnp.asarray(self.search.intervals())[jnp.argmin(variance)]
    return {**stats, "band": jnp.where(jnp.isfinite(variance).any(), best, stats["band"])}

  def survey(self, row: Row, noise: Noise, per_token: Array) -> dict[str, Array]:
    """What `update` wants of one bound draw.

    A bound draw has a uniform count. Those of its blocks whose share lies in an interval are draws under that
    interval: one set of losses serves all intervals.

    Args:
      noise: a bound draw. per_token: float32[B, N], its weighted losses; Σ over a block estimates its bound.

    Returns:
      {"intervals": float32[I, 3]}: blocks, Σ and Σ² of their losses per token.
    """
    ok = eligible(row)
    unit_lo, unit_hi = (noise.blk_lo, noise.blk_hi) if self.unit == "block" else rows.doc_bounds(row.doc)
    n = rows.count_in(unit_lo, unit_hi, ok)
    loss = rows.sum_in(unit_lo, unit_hi, per_token) / jnp.maximum(n, 1)
    first = (rows.coordinates(row.doc) == unit_lo) & (n > 0) & (row.doc >= 0)
    k = rows.count_in(unit_lo, unit_hi, noise.hit[:, 0] & ok)
    share = k / jnp.maximum(n, 1)

    # A loop: [I, B, N] would be what no part of the step needs.
    def one(interval):
      inside = first & (share >= interval[0] - _EDGE) & (share <= interval[1] + _EDGE)
      return jnp.stack([jnp.sum(jnp.where(inside, x, 0.0)) for x in (jnp.ones_like(loss), loss, loss**2)])

    return {"intervals": jax.lax.map(one, jnp.asarray(self.search.intervals()))}

  # -- draws ------------------------------------------------------------------------------------------------

  def edges(self, step) -> tuple[Array, Array]:
    """(β, ω) at a training step."""
    found = getattr(self, "_found", None)
    return tuple(b(step) for b in self.band) if found is None else (found[0], found[1])

  def levels(self, row, lo, hi, key, at, step, bound) -> Array:
    plain = dataclasses.replace(self, band=(0.0, 1.0)) if bound is None else self
    u = super(BandAbsorb, plain).levels(row, lo, hi, key, at, step, bound)
    if bound is not None:
      return u
    a, b = self.edges(step)
    return a + (b - a) * u

  def masked_count(self, t, n, step, bound) -> Array:
    if bound is not None:
      return super().masked_count(t, n, step, bound)
    a, b = self.edges(step)
    low = jnp.maximum(jnp.ceil((a - _EDGE) * n), 1).astype(jnp.int32)
    high = jnp.floor((b + _EDGE) * n).astype(jnp.int32)
    # A band between two counts holds none: the nearest to its middle then stands for it.
    near = jnp.clip(jnp.round((a + b) / 2 * n), 1).astype(jnp.int32)
    low, high = (jnp.where(low > high, near, x) for x in (low, high))
    u = (t - a) / jnp.maximum(b - a, 1e-6)
    k = low + jnp.floor(u * (high - low + 1)).astype(jnp.int32)
    return jnp.clip(k, jnp.minimum(low, n), jnp.minimum(high, n))
