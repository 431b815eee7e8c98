"""The mask encoding: one int32 code per key, T half-open code intervals per query.

visible(b, i, j) = any over t of lo[b, t, i] <= code[b, j] < hi[b, t, i].

Legend: B rows (1 = shared by all rows of the batch) · Lq queries · Lk keys · T intervals of a query
· S slots · N coordinates.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from genmodels.contracts import Slots, pytree

Array = jax.Array

STREAM = 2**20  # code of stream s = s · STREAM + coordinate: rows have fewer coordinates than this
CODE_HIDDEN = -(2**30)  # a key nobody sees: padding, an empty slot
MAX_TERMS = 4  # a tile-list entry has two bits for the interval


@pytree("shards", "local")
class AttnMask:
  """Which keys each query sees.

  The intervals of one query are pairwise disjoint (`normalise` makes them so): `pairs` counts and
  the kernels visit each interval on its own. An interval with lo >= hi is empty.

  Fields:
    code: int32[B, Lk].
    lo, hi: int32[B, T, Lq].
    shards, local: of keys that a layout placed for `shards` context shards: spans (start, stop) of each
      shard's slots whose keys no query of another shard sees. Static; without them all keys travel.
  """

  code: Array
  lo: Array
  hi: Array
  shards: int = 1
  local: tuple[tuple[int, int], ...] = ()

  def to_dense(self) -> Array:
    """bool[B, Lq, Lk]. Quadratic: for tests, tools and the reference kernel."""
    code = self.code[:, None, :]
    out = jnp.zeros((max(self.code.shape[0], self.lo.shape[0]), self.lo.shape[2], self.code.shape[1]), bool)
    for t in range(self.lo.shape[1]):
      out |= (self.lo[:, t, :, None] <= code) & (code < self.hi[:, t, :, None])
    return out

  def pairs(self) -> Array:
    """int32[B, Lq], visible keys of each query, exact. Sum on the host: a total can exceed int32."""

    def row(code, lo, hi):
      code = jnp.sort(code)
      count = jnp.searchsorted(code, hi.reshape(-1)) - jnp.searchsorted(code, lo.reshape(-1))
      return jnp.maximum(count.astype(jnp.int32), 0).reshape(lo.shape).sum(0)

    B = max(self.code.shape[0], self.lo.shape[0])
    code, lo, hi = (jnp.broadcast_to(x, (B, *x.shape[1:])) for x in (self.code, self.lo, self.hi))
    return jax.vmap(row)(code, lo, hi)


@pytree()
class DenseMask:
  """A mask that is no union of intervals: what `least` shows, and of what `most` shows the drawn pairs.

  Fields:
    least, most: AttnMask of the same queries and keys.
    drawn: bool[Lq, Lk], the same for all rows.
  """

  least: AttnMask
  most: AttnMask
  drawn: Array

  def to_dense(self) -> Array:
    """bool[B, Lq, Lk]."""
    return self.least.to_dense() | self.most.to_dense() & self.drawn

  def pairs(self) -> Array:
    """int32[B, Lq], visible keys of each query."""
    return self.to_dense().sum(-1, dtype=jnp.int32)


def normalise(lo: Array, hi: Array) -> tuple[Array, Array]:
  """Sorts the intervals of each query, merges those that overlap or touch; empty ones last, as [0, 0).

  Args:
    lo, hi: int32[B, T, Lq].
  """
  T = lo.shape[1]
  big = jnp.iinfo(jnp.int32).max

  def ordered(los, his):
    lo, hi = jnp.stack(los, 1), jnp.stack(his, 1)
    empty = lo >= hi
    lo, hi = jnp.where(empty, big, lo), jnp.where(empty, big, hi)
    order = jnp.argsort(lo, axis=1)
    return jnp.take_along_axis(lo, order, 1), jnp.take_along_axis(hi, order, 1)

  if T > 1:
    lo, hi = ordered([lo[:, t] for t in range(T)], [hi[:, t] for t in range(T)])
    los, his = [lo[:, 0]], [hi[:, 0]]
    for t in range(1, T):
      a, b = lo[:, t], hi[:, t]
      touch = (a <= his[-1]) & (a < big)
      a, b = jnp.where(touch, los[-1], a), jnp.where(touch, jnp.maximum(his[-1], b), b)
      his[-1] = jnp.where(touch, los[-1], his[-1])  # merged into the next one: now empty
      los, his = los + [a], his + [b]
    lo, hi = ordered(los, his)
  empty = lo >= hi
  return jnp.where(empty, 0, lo), jnp.where(empty, 0, hi)


def plain_slots(pos, doc_lo, doc_hi, *, blk_lo=None, blk_hi=None, order=None, stream=None, doc=None) -> Slots:
  """Slots from coordinates alone, each int32[B, S]; for builders, tests and tools (`where` is empty).

  Args:
    pos: coordinate of the slot's token.
    doc_lo, doc_hi: its document as a half-open interval of coordinates.
    blk_lo, blk_hi: its block; by default the token alone.
    order: document start + generation rank; by default `pos`.
    stream: index of the stream; by default 0.
    doc: −1 for empty slots; by default every slot is in use.
  """
  arrays = [doc_lo, doc_hi, blk_lo, blk_hi, order, stream, doc]
  shape = jnp.broadcast_shapes(jnp.shape(pos), *(jnp.shape(x) for x in arrays if x is not None))

  def full(x, default):
    return jnp.broadcast_to(jnp.asarray(default if x is None else x, jnp.int32), shape)

  pos = full(pos, 0)
  doc = full(doc, 0)
  return Slots(
    src=jnp.where(doc >= 0, pos, -1),
    stream=full(stream, 0),
    doc=doc,
    pos=pos,
    order=full(order, pos),
    doc_lo=full(doc_lo, 0),
    doc_hi=full(doc_hi, 0),
    blk_lo=full(blk_lo, pos),
    blk_hi=full(blk_hi, pos + 1),
    where=jnp.zeros((shape[0], 0, 0), jnp.int32),
  )
