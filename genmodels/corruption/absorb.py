"""Absorbing-state (masking) corruption: MDLM, LLaDA, BD3-LM and their relatives.

For a unit of n exchangeable tokens (a document, or a block) the negative ELBO has the closed form

  Σ_{∅≠M} Beta(|M|, n−|M|+1) Σ_{i∈M} CE_i(x_{¬M})  =  (1/n) Σ_k E_{|M|=k} [(n/k) Σ_{i∈M} CE_i],

since ∫ t⁻¹ t^|M| (1−t)^(n−|M|) dt is that Beta function. Drawing k uniformly, masking exactly k tokens
and weighting by n/k is therefore unbiased, needs no floor on t, and varies less than independent masking
(Sahoo et al. 2406.07524 eq. 10; Ou et al. 2406.03736; Nie et al. 2502.09992 eq. 6 for the estimator).
A schedule α_t only changes the law of k: P(k) = τ(k/n) − τ((k−1)/n) with τ the inverse of p(t) = 1−α_t,
and the weight 1/(k·P(k)) restores the same bound.

Legend: B rows · C copies · N clean tokens.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from genmodels import rows
from genmodels.config import Schedule
from genmodels.contracts import Noise, Row
from genmodels.corruption import rng
from genmodels.corruption.base import Corruption, eligible

Array = jax.Array
_HALF_PI = 1.5707963267948966


def masked_probability(schedule: str, t: Array, eps: float) -> Array:
  """p(t) = 1 − α_t, the probability that a token is masked at level t.

  "linear" p = t · "loglinear" p = (1−ε)t (MDLM, weight exactly 1/t) · "floor" p = (1−ε)t + ε (LLaDA)
  · "cosine" p = cos(π(1−t)/2).
  """
  if schedule == "linear":
    return t
  if schedule == "loglinear":
    return (1 - eps) * t
  if schedule == "floor":
    return (1 - eps) * t + eps
  return jnp.cos(_HALF_PI * (1 - t))


def bound_weight(schedule: str, t: Array, eps: float) -> Array:
  """−α'_t / (1−α_t): the weight of a masked token in the continuous-time bound."""
  t = jnp.maximum(t, 1e-6)
  if schedule in ("linear", "loglinear"):
    return 1 / t
  if schedule == "floor":
    return (1 - eps) / ((1 - eps) * t + eps)
  return _HALF_PI * jnp.tan(_HALF_PI * (1 - t))


def level_of(schedule: str, p: Array) -> Array:
  """The inverse of `masked_probability` without its ε; used by exact counts."""
  return 1 - jnp.arccos(jnp.clip(p, 0, 1)) / _HALF_PI if schedule == "cosine" else p


@dataclasses.dataclass(frozen=True)
class Absorb(Corruption):
  """Masks a random subset of every unit.

  Fields:
    unit: what shares one level: "doc" or "block".
    time: "uniform", or "stratified": over the documents of the global batch by their `rank`, and over
      the blocks of a document equispaced with one random offset.
    band: (lo, hi) of the level, numbers or schedules. A band inside (0, 1) is a clipped schedule: its
      loss is no likelihood bound; `bound` draws ignore it.
    count: "exact" masks k = ⌈p(t)·n⌉ tokens, "bernoulli" each one independently; "round" masks
      round(t·n) with weight 1/t, a common but biased rule kept for reproduction.
    schedule, eps: see `masked_probability`.
    retries: Bernoulli draws are repeated up to so many times while a unit has no masked token.
    complement: a second copy masks exactly the eligible tokens that the first one keeps.
    order: generation ranks: "logical", or "observed_first": inside a block the tokens that are shown come
      before the masked ones, each in logical order (WeDLM, Liu et al. 2512.22737, topological reordering).
  """

  unit: str = "doc"
  time: str = "stratified"
  band: tuple[Schedule, Schedule] = (0.0, 1.0)
  count: str = "exact"
  schedule: str = "linear"
  eps: float = 1e-3
  retries: int = 0
  complement: bool = False
  order: str = "logical"

  def __post_init__(self):
    super().__post_init__()
    object.__setattr__(self, "band", tuple(map(Schedule.of, self.band)))
    for name, allowed in (
      ("unit", ("doc", "block")),
      ("time", ("uniform", "stratified")),
      ("count", ("exact", "bernoulli", "round")),
      ("schedule", ("linear", "loglinear", "floor", "cosine")),
      ("order", ("logical", "observed_first")),
    ):
      if getattr(self, name) not in allowed:
        raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
    if self.complement and self.order != "logical":
      raise ValueError("order='observed_first' is of one noisy copy; it excludes complement=True")

  @property
  def copies(self) -> int:
    return 2 if self.complement else 1

  def draw(self, row: Row, key: Array, step, latent=None, bound: tuple | None = None) -> Noise:
    return self.within(row, key, step, *self.blocks.bounds(row, step), bound)

  def within(self, row: Row, key: Array, step, lo: Array, hi: Array, bound: tuple | None = None) -> Noise:
    """`draw` for given blocks [lo, hi), int32[B, N] each."""
    at = jnp.uint32(rng.EVAL_STEP) if bound is not None else step
    t = self.levels(row, lo, hi, key, at, step, bound)
    ok = eligible(row)
    unit_lo, unit_hi = (lo, hi) if self.unit == "block" else rows.doc_bounds(row.doc)
    n = rows.count_in(unit_lo, unit_hi, ok)
    count = "exact" if bound is not None else self.count
    copy = bound[0] if bound is not None else 0  # an evaluation's draw index plays the copy
    if count == "bernoulli":
      p = masked_probability(self.schedule, t, self.eps)
      hit = self._bernoulli(row, key, at, p, ok, unit_lo, unit_hi)
      marginal, nelbo = p, bound_weight(self.schedule, t, self.eps)
    else:
      k = self.masked_count(t, n, step, bound)
      score = rng.token_bits(row, key, at, copy, rng.WHICH)
      hit, marginal = self.select(score, unit_lo, ok, k, n, bound)
      if count == "round":
        nelbo = 1 / jnp.maximum(t, 1e-6)
      else:
        share = level_of(self.schedule, k / jnp.maximum(n, 1))
        share = share - level_of(self.schedule, (k - 1) / jnp.maximum(n, 1))
        nelbo = 1 / (jnp.maximum(k, 1) * jnp.where(share > 0, share, 1.0))
    hit, t, marginal, nelbo = (a[:, None] for a in (hit, t, marginal.astype(jnp.float32), nelbo))
    if self.complement:
      hit = jnp.concatenate([hit, ok[:, None] & ~hit], 1)
      other = 1 - marginal
      marginal = jnp.concatenate([marginal, other], 1)
      nelbo = jnp.concatenate([nelbo, 1 / jnp.maximum(other, 1e-6)], 1)
      t = jnp.concatenate([t, 1 - t], 1)
    return self.noise(row, lo, hi, hit, t, marginal, nelbo, drop=self.dropped(row, key, at, bound))

  def select(self, score, unit_lo, ok, k, n, bound) -> tuple[Array, Array]:
    """k of the n eligible tokens of each unit, and the probability of each to be among them.

    Args:
      score: uint32[B, N], random bits of each token; unit_lo, k, n: int32[B, N]; ok: bool[B, N].
      bound: draws of a likelihood bound choose uniformly.

    Returns:
      hit bool[B, N], marginal float32[B, N].
    """
    del bound
    return ok & (rows.rank_in_unit(unit_lo, score, ok) < k), k / jnp.maximum(n, 1)

  def ranks(self, row, lo, hit) -> Array:
    if self.order == "logical":
      return super().ranks(row, lo, hit)
    doc_lo, _ = rows.doc_bounds(row.doc)
    # Ranked by coordinate, the tokens that are not hit before those that are.
    return lo - doc_lo + rows.rank_in_unit(lo, rows.coordinates(lo) + jnp.zeros_like(lo), ~hit[:, 0])

  def levels(self, row, lo, hi, key, at, step, bound) -> Array:
    """Level t in (0, 1] of each token's unit, float32[B, N]. `at` keys the draw, `step` the schedules."""
    u = rng.doc_uniform(row, key, at, 0, rng.LEVEL)  # [B, D]
    if bound is not None:
      r, R = bound
      u = (r + u) / R
    elif self.time == "stratified":
      index, count = row.docs.rank[..., 0], row.docs.rank[..., 1]
      u = (index + u) / jnp.maximum(count, 1)
    u = rows.of_doc(row.doc, u)
    if self.unit == "block":
      ordinal, total = block_ordinals(row, lo)
      if bound is not None or self.time == "uniform":
        # Evaluation rotates one stratified draw per document by an offset per block.
        v = rng.token_uniform(row, key, at, 0, rng.LEVEL, at=ordinal, lane=1)
        u = jnp.mod(u + v, 1.0) if bound is not None else v
      else:
        u = jnp.mod(u + ordinal / jnp.maximum(total, 1), 1.0)
    if bound is not None:
      return u
    a, b = (x(step) for x in self.band)
    return a + (b - a) * u

  def masked_count(self, t, n, step, bound) -> Array:
    """How many of the n eligible tokens of its unit are masked at level t, int32[B, N]."""
    del step
    if self.count == "round" and bound is None:
      return jnp.round(t * n).astype(jnp.int32)
    p = t if self.schedule in ("linear", "loglinear", "floor") else masked_probability(self.schedule, t, 0.0)
    return jnp.clip(jnp.ceil(p * n).astype(jnp.int32), jnp.minimum(n, 1), n)

  def _bernoulli(self, row, key, at, p, ok, unit_lo, unit_hi):
    hit = jnp.zeros_like(ok)
    for attempt in range(self.retries + 1):
      u = rng.token_uniform(row, key, at, 0, rng.WHICH, lane=attempt)
      empty = rows.count_in(unit_lo, unit_hi, hit) == 0
      hit = jnp.where(empty, ok & (u < p), hit)
    return hit


def block_ordinals(row: Row, blk_lo: Array) -> tuple[Array, Array]:
  """(index of each token's block inside its document, number of blocks of the document), int32[B, N]."""
  doc_lo, doc_hi = rows.doc_bounds(row.doc)
  first = rows.coordinates(blk_lo) == blk_lo
  ordinal = rows.count_in(doc_lo, rows.coordinates(blk_lo) + jnp.ones_like(blk_lo), first) - 1
  return ordinal, rows.count_in(doc_lo, doc_hi, first)


@dataclasses.dataclass(frozen=True)
class MonotoneAbsorb(Absorb):
  """Noise that never decreases from block to block (D2F, Wang et al. 2508.09192 §4).

  The first block's level is uniform in `first`; each next one adds a uniform increment in
  [0, increment], capped at `cap`.
  """

  unit: str = "block"
  count: str = "bernoulli"
  first: tuple[float, float] = (0.2, 0.7)
  increment: float = 0.1
  cap: float = 0.7

  def levels(self, row, lo, hi, key, at, step, bound) -> Array:
    if bound is not None:
      return super().levels(row, lo, hi, key, at, step, bound)
    doc_lo, _ = rows.doc_bounds(row.doc)
    ordinal, _ = block_ordinals(row, lo)
    a, b = self.first
    start = a + (b - a) * rows.of_doc(row.doc, rng.doc_uniform(row, key, at, 0, rng.LEVEL))
    gain = self.increment * rng.token_uniform(row, key, at, 0, rng.LEVEL, at=ordinal, lane=1)
    head = (rows.coordinates(lo) == lo) & (ordinal > 0)
    total = rows.sum_in(doc_lo, rows.coordinates(lo) + jnp.ones_like(lo), jnp.where(head, gain, 0.0))
    return jnp.minimum(start + total, self.cap)
