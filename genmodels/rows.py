"""Geometry of packed rows: documents, blocks and ranks as intervals and counts of row coordinates.

Legend: B rows · N clean tokens. Every function is elementwise or a scan or a sort along N: no pair of
tokens is ever formed, and nothing depends on the device layout.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def coordinates(x_BN: Array) -> Array:
  """int32[1, N]: the row coordinate of each token."""
  return jnp.arange(x_BN.shape[1], dtype=jnp.int32)[None]


def doc_bounds(doc_BN: Array) -> tuple[Array, Array]:
  """The document interval [lo, hi) of every token, int32[B, N] each.

  A document is a maximal run of equal `doc`; padding (−1) forms runs of its own, which nothing reads.
  """
  n = coordinates(doc_BN)
  N = doc_BN.shape[1]
  edge = doc_BN[:, 1:] != doc_BN[:, :-1]
  true = jnp.ones_like(doc_BN[:, :1], bool)
  lo = jax.lax.cummax(jnp.where(jnp.concatenate([true, edge], 1), n, 0), axis=1)
  hi = jax.lax.cummin(jnp.where(jnp.concatenate([edge, true], 1), n + 1, N), axis=1, reverse=True)
  return lo, hi


def runs(doc_BN: Array, flag: Array) -> tuple[Array, Array]:
  """The interval [lo, hi) of the stretch of equal `flag`, bool[B, N], inside of its document that each token
  stands in, int32[B, N] each: the turns of a conversation."""
  return doc_bounds(2 * doc_BN + flag.astype(jnp.int32))


def block_bounds(doc_lo: Array, doc_hi: Array, size, origin: Array | None = None) -> tuple[Array, Array]:
  """The block interval [lo, hi) of every token, for blocks of `size` counted from `origin`.

  Args:
    doc_lo, doc_hi: int32[B, N], from `doc_bounds`.
    size: int or traced int32 scalar, tokens of a block.
    origin: int32[B, N], coordinate where a block starts (default: the document's start). Blocks also
      extend backwards from it; the first and last of a document may be ragged.
  """
  n = coordinates(doc_lo)
  origin = doc_lo if origin is None else origin
  lo = origin + jnp.floor_divide(n - origin, size) * size
  return jnp.maximum(lo, doc_lo), jnp.minimum(lo + size, doc_hi)


def count_in(lo: Array, hi: Array, flag: Array) -> Array:
  """How many tokens of [lo, hi) carry `flag`: int32[B, N], for intervals int32[B, N], flag bool[B, N]."""
  total = jnp.cumsum(flag.astype(jnp.int32), axis=1)
  total = jnp.concatenate([jnp.zeros_like(total[:, :1]), total], 1)
  return jnp.take_along_axis(total, hi, 1) - jnp.take_along_axis(total, lo, 1)


def sum_in(lo: Array, hi: Array, value: Array) -> Array:
  """Sum of `value` float32[B, N] over [lo, hi), float32[B, N]."""
  total = jnp.cumsum(value.astype(jnp.float32), axis=1)
  total = jnp.concatenate([jnp.zeros_like(total[:, :1]), total], 1)
  return jnp.take_along_axis(total, hi, 1) - jnp.take_along_axis(total, lo, 1)


def first_in_doc(doc_lo: Array, doc_hi: Array, flag: Array) -> Array:
  """Coordinate of the first flagged token of each token's document (doc_hi if none), int32[B, N]."""
  N = flag.shape[1]
  nxt = jax.lax.cummin(jnp.where(flag, coordinates(flag), N), axis=1, reverse=True)
  return jnp.minimum(jnp.take_along_axis(nxt, doc_lo, 1), doc_hi)


def rank_in_unit(unit_lo: Array, score: Array, eligible: Array) -> Array:
  """Rank (0 first) of every token among the eligible tokens of its unit, by ascending score.

  Args:
    unit_lo: int32[B, N], start of the unit; units are contiguous, so the start identifies them.
    score: uint32 or float32[B, N]; ties go to the earlier token.
    eligible: bool[B, N]; ineligible tokens rank behind all eligible ones of the unit.

  Returns:
    int32[B, N].
  """
  n = jnp.broadcast_to(coordinates(unit_lo), unit_lo.shape)
  unit = jnp.broadcast_to(unit_lo, n.shape)
  late = jnp.logical_not(eligible).astype(jnp.int32)
  sorted_unit, _, _, token = jax.lax.sort((unit, late, score, n), dimension=1, num_keys=4)
  rank = n - sorted_unit
  rows = jnp.arange(n.shape[0])[:, None]
  return jnp.zeros_like(n).at[rows, token].set(rank, unique_indices=True)


def geometric_context(doc: Array, shown: Array, p: float) -> Array:
  """How near the shown tokens of its document are to each token: ½ Σ_j p (1−p)^(|i−j|−1), float32[B, N].

  The sum is over the shown tokens j ≠ i (Ye et al., "Dream 7B", 2508.15487: context-adaptive rescheduling of
  the loss at token level, in the released trainer a loss weight).

  Args:
    doc: int32[B, N]; shown: bool[B, N].
  """

  def before(doc, shown):
    """Σ over shown j < i, as the linear recurrence x_i = (1−p)·x_{i−1} + p·shown_{i−1} inside a document."""
    same = jnp.pad(doc[:, 1:] == doc[:, :-1], ((0, 0), (1, 0)))
    gain = jnp.where(same, p * jnp.pad(shown[:, :-1], ((0, 0), (1, 0))), 0).astype(jnp.float32)
    decay = jnp.where(same, 1 - p, 0).astype(jnp.float32)
    join = lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1])
    return jax.lax.associative_scan(join, (decay, gain), axis=1)[1]

  flip = lambda x: jnp.flip(x, 1)
  return 0.5 * (before(doc, shown) + flip(before(flip(doc), flip(shown))))


def repeats(doc: Array, tokens: Array) -> Array:
  """How often each token occurs in its document, itself included: int32[B, N], of int32[B, N] both."""
  n = jnp.broadcast_to(coordinates(doc), doc.shape)
  doc, tokens, n = jax.lax.sort((doc, tokens, n), num_keys=2)
  same = (doc[:, 1:] == doc[:, :-1]) & (tokens[:, 1:] == tokens[:, :-1])
  run = jnp.cumsum(jnp.pad(~same, ((0, 0), (1, 0))).astype(jnp.int32), axis=1)
  lo, hi = doc_bounds(run)
  _, count = jax.lax.sort((n, hi - lo), num_keys=1)
  return count


def per_doc(row_doc: Array, value: Array, capacity: int) -> Array:
  """Sums `value` [B, N] per document: [B, capacity]; padding is left out."""

  def one(doc, v):
    return jnp.zeros((capacity + 1,), v.dtype).at[jnp.where(doc < 0, capacity, doc)].add(v)[:capacity]

  return jax.vmap(one)(row_doc, value)


def of_doc(row_doc: Array, table: Array) -> Array:
  """Gathers a per-document table [B, D, …] to tokens: [B, N, …] (entry 0 for padding)."""
  index = jnp.maximum(row_doc, 0).reshape(row_doc.shape + (1,) * (table.ndim - 2))
  return jnp.take_along_axis(table, index, axis=1)
