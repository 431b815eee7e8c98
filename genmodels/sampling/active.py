"""Active sets: which tokens one call computes, asks for, and keeps.

An active set turns a state into an Ask. It is the only part of the loop that knows where the front of a row
is, what lies before it, and when something may enter the cache: when, and only when, everything that its
slot sees is committed.

Legend: B rows · N tokens of a row · W tokens of a unit that are asked for · M asked (W, and the next token)
· A slots of a call · G groups of asked tokens.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from genmodels import rows
from genmodels.contracts import Array, Noise, Row
from genmodels.corruption.base import eligible
from genmodels.sampling.state import Ask, State, at_coordinate, first_where


def pairs(stream: Array, at: Array, keep: Array) -> Array:
  """int32[B, A, 2] from a stream (broadcast) and a coordinate per slot; empty where not kept."""
  pair = jnp.stack([jnp.broadcast_to(stream, at.shape).astype(jnp.int32), at], -1)
  return jnp.where(keep[..., None], pair, -1)


@dataclasses.dataclass(frozen=True)
class Units:
  """One unit of a row at a time: a document, a block, a scale or a token; or its sub-blocks left to right
  (`sampler.sub_block`, LLaDA's block length, Nie et al. 2502.09992 §B.4).

  While a unit has masked tokens, calls are over its noisy slots; then one call over its clean slots enters
  the cache and, with a shifted head, predicts the first token behind it.
  """

  groups = 1  # parts of the asked tokens with a quota of their own

  def check(self, sampler) -> None:
    """Raises ConfigError where the active set does not fit the sampler's objective."""

  # -- geometry -------------------------------------------------------------------------------------

  def units(self, sampler, row: Row, noise: Noise) -> tuple[Array, Array]:
    """The unit of every token as an interval, int32[B, N] each."""
    if sampler.whole:
      return rows.doc_bounds(row.doc)
    if not sampler.single:
      return noise.blk_lo, noise.blk_hi
    n = jnp.broadcast_to(rows.coordinates(row.doc), row.doc.shape)
    return n, n + 1

  def width(self, sampler, row: Row) -> int:
    """Slots of the front in a call (static)."""
    N = row.tokens.shape[1]
    return min(sampler.capacity, N) if sampler.capacity else N

  def window(self, sampler, row: Row) -> int:
    """Tokens of the front that a call asks for (static): a sub-block, or all; none if a unit is one token
    that predicts the next."""
    if sampler.single:
      return 0
    width = self.width(sampler, row)
    return min(sampler.cfg.sub_block, width) if sampler.cfg.sub_block else width

  def asked(self, sampler, row: Row) -> int:
    """M, tokens that a call asks for (static)."""
    return self.window(sampler, row) + sampler.lead

  def start(self, sampler, row: Row) -> Array:
    """int32[B]: how many given tokens precede the first front. All whole units, but one where its slots
    predict the first open token."""
    if sampler.store is None:
      return jnp.zeros(row.doc.shape[:1], jnp.int32)
    committed = jnp.logical_not(eligible(row))
    noise = sampler.objective.corruption.state(row, committed)
    lo, _ = self.units(sampler, row, noise)
    whole = at_coordinate(lo, first_where(~committed))
    if sampler.lead:
      whole = jnp.where(whole > 0, at_coordinate(lo, whole - 1), 0)
    return jnp.where(committed.all(1), 0, whole)

  # -- a call ---------------------------------------------------------------------------------------

  def ask(self, sampler, row: Row, s: State) -> Ask:
    """What the next step computes."""
    B, N = row.tokens.shape
    row = row.replace(tokens=s.tokens)
    open_ = ~s.committed
    noise = sampler.objective.corruption.state(row, s.committed)
    unit_lo, unit_hi = self.units(sampler, row, noise)
    lo, hi = at_coordinate(unit_lo, s.cursor), at_coordinate(unit_hi, s.cursor)
    first = first_where(open_)
    denoise = ((first < hi) | s.busy) & ~s.done & sampler.denoises
    wlo, whi = lo, hi
    if length := sampler.cfg.sub_block:
      origin = jnp.maximum(lo, first_where(eligible(row)))
      wlo = origin + jnp.maximum(first - origin, 0) // length * length
      wlo = jnp.where(s.busy, s.unit, jnp.where(denoise, wlo, lo))
      whi = jnp.minimum(wlo + length, hi)

    at = lo[:, None] + jnp.arange(self.width(sampler, row), dtype=jnp.int32)
    use = (at < hi[:, None]) & ~s.done[:, None]
    keep = jnp.zeros_like(use)
    if sampler.store is None:
      only = pairs(jnp.full((B, 1), sampler.stream), at, use)
    else:
      only = pairs(jnp.where(denoise, sampler.stream, sampler.store)[:, None], at, use)
      keep = use & ~denoise[:, None]
      only, keep = self.with_past(sampler, row, only, keep, lo, s.done)

    ask = wlo[:, None] + jnp.arange(self.window(sampler, row), dtype=jnp.int32)
    valid = ask < whi[:, None]
    if sampler.lead:
      ask = jnp.concatenate([ask, hi[:, None]], 1)
      valid = jnp.concatenate([valid, (hi < N)[:, None]], 1)
    valid &= ~s.done[:, None]
    fresh = denoise & (s.unit != wlo)
    if sampler.quota.timed:
      level = jnp.where(fresh, 1.0, s.level)[:, None, None]
      noise = noise.replace(level=jnp.where(noise.hit, level, noise.level))
    inputs, read = sampler.view(row, noise, only, 0)
    slot = at_coordinate(read[sampler.term], ask)
    can = valid & at_coordinate(open_, ask) & (slot >= 0)
    inside = valid & denoise[:, None] & (ask < hi[:, None])
    return Ask(
      only=only,
      keep=keep,
      at=ask,
      can=can,
      slot=jnp.where(can, slot, -1),
      under=can & inside,
      held=inside & ~at_coordinate(open_, ask) & at_coordinate(eligible(row), ask),
      least=jnp.ones((B,), jnp.int32),
      denoise=denoise,
      fresh=fresh,
      lo=lo,
      hi=hi,
      wlo=wlo,
      cursor=jnp.where(s.done | denoise | (sampler.store is None), s.cursor, hi),
      row=row,
      noise=noise,
      inputs=inputs,
    )

  def with_past(self, sampler, row: Row, only: Array, keep: Array, lo: Array, done: Array):
    """Without a cache everything behind the front, [0, lo), is computed once more, in slots put before."""
    if sampler.policy.stores:
      return only, keep
    B, N = row.tokens.shape
    past = jnp.broadcast_to(jnp.arange(N, dtype=jnp.int32), (B, N))
    behind = (past < lo[:, None]) & ~done[:, None]
    only = jnp.concatenate([pairs(jnp.full((B, 1), sampler.store), past, behind), only], 1)
    return only, jnp.concatenate([jnp.zeros_like(behind), keep], 1)


REGISTRY = {"units": Units}
