"""Tile lists: which tiles of the score matrix a mask touches, built on device from min and max.

A tile and an interval that meet make one *entry*; a tile that two intervals of a query tile meet has
two entries. Intervals are disjoint, and online softmax over disjoint key sets is exact, so a kernel
body only ever holds a mask of one interval.

Legend: B rows of the mask · g groups of rows that share entries · r rows of a group · T intervals
· I query tiles · J key tiles · i, j positions inside a tile.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from genmodels.contracts import pytree
from genmodels.kernels.target import current
from genmodels.masks import CODE_HIDDEN, MAX_TERMS, AttnMask

Array = jax.Array

_COLUMN_BITS = 24  # entry = full(1) | term(2) | column(24)
_BIG = jnp.iinfo(jnp.int32).max


class Tiles(NamedTuple):
  """Static tile sizes.

  Attributes:
    q, k: queries and keys of a tile.
    rows: rows of the batch that share one tile list, a divisor of the mask's rows: an entry exists if
      any of them needs it. 1 skips most, more rows make fewer and larger matrix products.
  """

  q: int
  k: int
  rows: int = 1


@pytree()
class TileList:
  """Entries by line: those of line n of group g are entry[g, start[g, n] : start[g, n + 1]].

  Fields:
    start: int32[g, lines + 1].
    entry: int32[g, capacity].
  """

  start: Array
  entry: Array


def column(entry: Array) -> Array:
  """Tile index along the line of the list."""
  return entry & (2**_COLUMN_BITS - 1)


def term(entry: Array) -> Array:
  """Interval of the entry."""
  return (entry >> _COLUMN_BITS) & (MAX_TERMS - 1)


def is_full(entry: Array) -> Array:
  """Whether every pair of the tile is inside the interval."""
  return (entry >> (_COLUMN_BITS + 2)) == 1


@pytree("tiles", "lengths", "implementation")
class Plan:
  """A mask, padded to tiles, with its tile lists. Build it once per batch; every layer shares it.

  The leading axis of every array is the mask's rows or groups of them: a plan built outside
  shard_map is sharded like the batch (P(batch axes) for all leaves; replicated if the mask is shared).

  Fields:
    code: int32[B, J·k], lo, hi: int32[B, T, I·q], padded with hidden keys and empty queries.
    by_query: TileList with lines I, columns J; by_key: lines J, columns I.
    tiles: Tiles; lengths: (Lq, Lk) before padding; implementation: whose lists these are. Static.
  """

  code: Array
  lo: Array
  hi: Array
  by_query: TileList
  by_key: TileList
  tiles: Tiles
  lengths: tuple[int, int]
  implementation: str = "xla"

  @property
  def mask(self) -> AttnMask:
    """The mask without its padding."""
    lq, lk = self.lengths
    return AttnMask(self.code[:, :lk], self.lo[:, :, :lq], self.hi[:, :, :lq])


def default_tiles(rows: int, lq: int, lk: int) -> Tiles:
  """Tiles for the XLA path: small on a CPU (measured, docs/masks.md), large elsewhere (unmeasured)."""
  length = max(lq, lk)
  if current().platform == "cpu":
    edge, work = (64 if length <= 1024 else 128 if length <= 2048 else 256), 64 * 64
  else:
    edge, work = 512, 512 * 512
  q, k = min(edge, _up(lq, 8)), min(edge, _up(lk, 8))
  return Tiles(q, k, next(r for r in range(rows, 0, -1) if rows % r == 0 and (r == 1 or r * q * k <= work)))


def check(mask: AttnMask):
  """Raises ValueError for a mask that no plan can be made of: shapes that do not fit, too many intervals."""
  B, T, _ = mask.lo.shape
  if mask.hi.shape != mask.lo.shape or mask.code.shape[0] != B:
    raise ValueError(
      f"plan: AttnMask wants code [B, Lk] and lo, hi [B, T, Lq] with one B, got code {mask.code.shape}, "
      f"lo {mask.lo.shape}, hi {mask.hi.shape}; broadcast the shared part first"
    )
  if T > MAX_TERMS:
    raise ValueError(f"plan: at most {MAX_TERMS} intervals a query fit a tile-list entry, got T={T}")


def plan(mask: AttnMask, tiles: Tiles | tuple[int, ...] | None = None) -> Plan:
  """Pads the mask to tiles and lists the tiles it touches. Pure, jit-able; O(L) + O(T·I·J).

  Raises:
    ValueError: shapes of the mask that do not fit each other, or tiles that do not divide its rows.
  """
  B, T, lq = mask.lo.shape
  lk = mask.code.shape[1]
  check(mask)
  tiles = default_tiles(B, lq, lk) if tiles is None else Tiles(*tiles)
  if B % tiles.rows:
    raise ValueError(f"plan: tiles.rows={tiles.rows} must divide the mask's {B} rows; use 1 or {B}")
  code = _pad(mask.code, 1, tiles.k, CODE_HIDDEN)
  lo, hi = _pad(mask.lo, 2, tiles.q, 0), _pad(mask.hi, 2, tiles.q, 0)
  active, full = classify(code, lo, hi, tiles)
  by_query = _compact(active, full)
  by_key = _compact(active.transpose(0, 3, 2, 1), full.transpose(0, 3, 2, 1))
  return Plan(code, lo, hi, by_query, by_key, tiles, (lq, lk))


def classify(code: Array, lo: Array, hi: Array, tiles: Tiles) -> tuple[Array, Array]:
  """active, full bool[g, I, T, J] of a padded mask.

  Never misses a visible pair; `full` only if every pair of the tile is inside the interval, for all
  rows of the group.
  """
  B, T, lq = lo.shape
  lo, hi = lo.reshape(B, T, -1, tiles.q), hi.reshape(B, T, -1, tiles.q)
  empty = lo >= hi
  any_lo = jnp.where(empty, _BIG, lo).min(-1)[..., None]  # [B, T, I, 1]
  any_hi = jnp.where(empty, -_BIG, hi).max(-1)[..., None]
  all_lo = jnp.where(empty, _BIG, lo).max(-1)[..., None]
  all_hi = jnp.where(empty, -_BIG, hi).min(-1)[..., None]
  code = code.reshape(B, 1, 1, -1, tiles.k)
  last = code.max(-1)  # [B, 1, 1, J]; hidden keys are below every interval
  first_seen = jnp.where(code == CODE_HIDDEN, _BIG, code).min(-1)
  first = code.min(-1)
  active = (last >= any_lo) & (first_seen < any_hi)
  full = active & (first >= all_lo) & (last < all_hi)

  def grouped(x, reduce):
    return reduce(x.transpose(0, 2, 1, 3).reshape(-1, tiles.rows, lq // tiles.q, T, x.shape[-1]), 1)

  return grouped(active, jnp.any), grouped(full, jnp.all)


def _compact(active: Array, full: Array) -> TileList:
  """Lists the set entries of active [g, lines, T, columns], line by line."""
  groups, _, terms, columns = active.shape
  term_bits = jnp.arange(terms, dtype=jnp.int32)[:, None] << _COLUMN_BITS
  packed = jnp.arange(columns, dtype=jnp.int32) | term_bits
  packed = (packed | (full.astype(jnp.int32) << (_COLUMN_BITS + 2))).reshape(groups, -1)
  flat = active.reshape(groups, -1)
  place = jnp.where(flat, jnp.cumsum(flat, axis=1, dtype=jnp.int32) - 1, flat.shape[1])
  entry = jax.vmap(lambda p, x: jnp.zeros_like(x).at[p].set(x, mode="drop"))(place, packed)
  start = jnp.cumsum(active.sum((2, 3), dtype=jnp.int32), axis=1, dtype=jnp.int32)
  return TileList(jnp.pad(start, ((0, 0), (1, 0))), entry)


def _up(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple


def _pad(x: Array, axis: int, multiple: int, value: int) -> Array:
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, _up(x.shape[axis], multiple) - x.shape[axis])
  return jnp.pad(x, widths, constant_values=value)
