"""Masking that prefers late tokens of a block, with the marginal that its weights need (Efficient-DLM).

Fu et al., "Efficient-DLM", 2512.14067: at low noise a left-to-right decoder has its later tokens missing, so
training masks them more often. k of a block's n tokens are drawn without replacement, one after another,
with weights w_i ∝ exp(β (1−t) i). The chance of token i to be among the k is not k/n; dividing by k/n, as
published code does, changes the objective. Here it is computed.

Give token i an exponential clock of rate w_i: the first k clocks to ring are such a sample (Efraimidis &
Spirakis 2006), so

  P(i among the first k) = ∫ w_i e^(−w_i s) P(at most k − 1 of the others rang before s) ds.

Legend: B rows · N clean tokens · n tokens of a unit · k masked ones · i place of a token in its unit.
"""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from genmodels import rows
from genmodels.corruption import rng
from genmodels.corruption.absorb import Absorb

_LARGEST = 128  # tokens of a block: the table of marginals has its cube


@functools.cache
def inclusion(n: int, k: int, slope: float) -> np.ndarray:
  """float64[n]: probability of each of n tokens to be among k drawn without replacement, w_i = e^(slope·i).

  The integral is taken over log s by the trapezoidal rule, which converges geometrically for this integrand.
  """
  if k in (0, n):
    return np.full(n, float(k == n))
  w = np.exp(slope * (np.arange(n) - (n - 1) / 2))
  log_s = np.linspace(np.log(1e-9 / w.max()), np.log(60.0 / w.min()), 192)
  s = np.exp(log_s)[:, None]
  rang = -np.expm1(-w * s)  # [points, n]
  # Law of how many rang, then of how many of the others: one factor (1 − r + r z) divided out, from the side
  # on which the division is stable.
  law = np.zeros((len(s), n + 1))
  law[:, 0] = 1
  for j in range(n):
    r = rang[:, j : j + 1]
    law[:, 1:] = law[:, 1:] * (1 - r) + law[:, :-1] * r
    law[:, :1] *= 1 - r
  low = rang < 0.5
  up, down = np.zeros_like(rang), np.zeros_like(rang)
  keep, gone = np.where(low, 1 - rang, 1.0), np.where(low, 1.0, rang)
  few, many = np.zeros_like(rang), np.zeros_like(rang)
  for m in range(n):
    up = (law[:, m : m + 1] - rang * up) / keep
    down = (law[:, n - m : n - m + 1] - (1 - rang) * down) / gone
    if m < k:
      few += np.where(low, up, 0)
    if m < n - k:
      many += np.where(low, 0, down)
  before = np.clip(np.where(low, few, 1 - many), 0, 1)
  chance = np.trapezoid(w * np.exp(-w * s) * s * before, log_s, axis=0)
  return chance * k / chance.sum()


@functools.cache
def marginals(largest: int, bias: float) -> np.ndarray:
  """`inclusion` of every [n, k, i] up to `largest` under log w_i = bias·(1−k/n)·i/n, float32."""
  table = np.zeros((largest + 1, largest + 1, largest), np.float32)
  for n in range(1, largest + 1):
    for k in range(n + 1):
      table[n, k, :n] = inclusion(n, k, bias * (1 - k / n) / n)
  return table


@dataclasses.dataclass(frozen=True)
class PositionAbsorb(Absorb):
  """Exact counts per block, later tokens preferred: log w_i = bias · (1 − k/n) · i / n.

  The last token of a block is e^(bias·(1−t)) times as likely as the first to be drawn first: uniform at full
  noise. Bound draws choose uniformly, as the bound wants.

  Fields:
    bias: ≥ 0; 0 is `Absorb`.
  """

  unit: str = "block"
  bias: float = 0.0

  def __post_init__(self):
    super().__post_init__()
    if self.unit != "block" or self.count != "exact":
      raise ValueError(
        "position-dependent masking is of blocks with exact counts: unit='block', count='exact'"
      )
    if self.bias < 0:
      raise ValueError(f"bias is {self.bias}; later tokens are preferred by bias >= 0")
    if self.bias and not 0 < self._largest() <= _LARGEST:
      raise ValueError(
        f"blocks of up to {self._largest() or 'a whole document of'} tokens; the marginals are tabulated for "
        f"blocks.size from 1 to {_LARGEST}"
      )

  def _largest(self) -> int:
    """Largest block size that the schedule takes, 0 for whole documents."""
    if self.blocks.sizes:
      return max(self.blocks.sizes)
    return int(max(self.blocks.size.table))

  def select(self, score, unit_lo, ok, k, n, bound):
    if bound is not None or self.bias == 0:
      return super().select(score, unit_lo, ok, k, n, bound)
    place = rows.rank_in_unit(unit_lo, rows.coordinates(unit_lo) + jnp.zeros_like(unit_lo), ok)
    share = k / jnp.maximum(n, 1)
    log_w = self.bias * (1 - share) * place / jnp.maximum(n, 1)
    # Smallest arrival times −log(u)/w, compared as logs.
    arrival = jnp.log(-jnp.log(rng.uniform(score))) - log_w
    hit = ok & (rows.rank_in_unit(unit_lo, arrival, ok) < k)
    table = jnp.asarray(marginals(self._largest(), self.bias))
    return hit, jnp.where(ok, table[n, k, jnp.minimum(place, table.shape[2] - 1)], share)
