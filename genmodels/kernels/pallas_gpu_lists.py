"""Tile lists of the Hopper kernels: fixed-capacity lines, partial tiles first, longest lines first.

A thread block of a GPU kernel walks one line. Its entries lie in one row of a table, the partial tiles
before the full ones: one loop with the mask, then one without, and no branch inside either. A tile that two
intervals of a query tile meet has two entries, so a loop body only ever holds the mask of one interval;
that is exact, because intervals are disjoint. Thread blocks start in the order of their numbers, so the rows
of a table are sorted by length: long lines start first and the short ones fill the gaps at the end.

Legend: B rows of the mask · T intervals · I query tiles · J key tiles · N lines (I, or J in the transposed
lists) · C capacity of a line: T times the tiles of the other side, the worst case (with 128 × 128 tiles and
T = 2, 2 MB a row of 64k tokens, 134 MB of 512k) · Lq', Lk' lengths padded to every tile size.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from genmodels.contracts import pytree
from genmodels.kernels import tiles as tile_lists
from genmodels.kernels.tiles import column, term
from genmodels.masks import CODE_HIDDEN, AttnMask

Array = jax.Array

_TERM_SHIFT, _CLASS_SHIFT = 24, 26  # entry = column | term << 24, as `tiles.column` and `tiles.term` read it

__all__ = ["Lines", "Options", "Plan", "Tiles", "column", "pad_to", "plan", "term"]


class Options(NamedTuple):
  """Static arguments of one attention call.

  Attributes:
    scale: of the logits.
    soft_cap: c · tanh(logits / c) if not None.
    deterministic: whether the backward must repeat bit for bit.
  """

  scale: float
  soft_cap: float | None
  deterministic: bool


class Tiles(NamedTuple):
  """Static tile sizes. They size the lists; a kernel may walk a key tile in several steps.

  Attributes:
    q: queries of a thread block in the forward kernel, two warpgroups of 64.
    k: keys of an entry there.
    stages: key tiles in flight; 0 takes as many as shared memory holds, at most 3.
    dq: (q, k) of the dq kernel, whose lines are query tiles. Equal to (q, k), it shares the forward's list.
    dkv: (q, k) of the dk, dv kernel, whose lines are key tiles.
    safe: pass the probabilities through shared memory instead of registers (see `pallas_gpu`).
    blocks: thread blocks of the forward, which share the query tiles out among them (the processors of the
      chip: 132 of an H100 or H200 SXM); 0 starts one per query tile.
  """

  q: int = 128
  k: int = 128
  stages: int = 0
  dq: tuple[int, int] = (128, 128)
  dkv: tuple[int, int] = (64, 128)
  safe: bool = False
  blocks: int = 0


@pytree()
class Lines:
  """The lines of a mask row in a table, longest first: table row r speaks of line[r].

  Fields:
    line: int32[B, N], which line; a thread block takes a table row and works on this query or key tile.
    count: int32[B, N, 2], (partial, full) entries of the table row.
    entry: int32[B, N, C], column | interval << 24; the partial ones, then the full ones, then nothing. Each
      part is in the order of (interval, column).
  """

  line: Array
  count: Array
  entry: Array


@pytree("tiles", "lengths", "implementation")
class Plan:
  """A mask, padded to tiles, with its tile lists. Build it once per batch; every layer shares it.

  The leading axis of every array is the rows of the mask (1 if the batch shares it): a plan is sharded like
  the batch and leaves a shard_map with P(mesh axes) for all leaves.

  Fields:
    code: int32[B, Lk'], lo, hi: int32[B, T, Lq'], padded with hidden keys and empty queries.
    forward: Lines of query tiles, `tiles.q` × `tiles.k`.
    own_dq: Lines of query tiles, `tiles.dq`; None if these are the forward's. Read `dq`.
    dkv: Lines of key tiles, `tiles.dkv`; columns are query tiles.
    tiles: Tiles; lengths: (Lq, Lk) before padding; implementation: whose lists these are. Static.
  """

  code: Array
  lo: Array
  hi: Array
  forward: Lines
  own_dq: Lines | None
  dkv: Lines
  tiles: Tiles
  lengths: tuple[int, int]
  implementation: str = "pallas_gpu"

  @property
  def mask(self) -> AttnMask:
    """The mask without its padding."""
    lq, lk = self.lengths
    return AttnMask(self.code[:, :lk], self.lo[:, :, :lq], self.hi[:, :, :lq])

  @property
  def dq(self) -> Lines:
    """Lines of query tiles for the dq kernel."""
    return self.forward if self.own_dq is None else self.own_dq


def plan(mask: AttnMask, tiles: Tiles | tuple[int, ...] | None = None) -> Plan:
  """Pads the mask to tiles and lists the tiles it touches. Pure, jit-able; O(L) + O(T·I·J).

  Args:
    mask: AttnMask.
    tiles: Tiles; a plain (q, k) sets the forward's and leaves the rest to the defaults.

  Raises:
    ValueError: shapes of the mask that do not fit each other; tile sizes the kernels cannot take.
  """
  rows, terms, lq = mask.lo.shape
  lk = mask.code.shape[1]
  tile_lists.check(mask)
  tiles = _checked(Tiles() if tiles is None else Tiles(*tiles))
  code = pad_to(mask.code, 1, math.lcm(tiles.k, tiles.dq[1], tiles.dkv[1]), CODE_HIDDEN)
  lo, hi = (pad_to(x, 2, math.lcm(tiles.q, tiles.dq[0], tiles.dkv[0]), 0) for x in (mask.lo, mask.hi))

  def lines(edges, transposed=False):
    active, full = tile_lists.classify(code, lo, hi, tile_lists.Tiles(*edges))  # [B, I, T, J]
    if transposed:
      active, full = active.transpose(0, 3, 2, 1), full.transpose(0, 3, 2, 1)
    return _lines(active, full)

  forward = lines((tiles.q, tiles.k))
  own_dq = None if tiles.dq == (tiles.q, tiles.k) else lines(tiles.dq)
  return Plan(code, lo, hi, forward, own_dq, lines(tiles.dkv, transposed=True), tiles, (lq, lk))


def pad_to(x: Array, axis: int, multiple: int, value: float = 0) -> Array:
  """`x` with `axis` padded at its end to a multiple; `x` itself if it is one."""
  short = -x.shape[axis] % multiple
  if not short:
    return x
  return jnp.pad(x, [(0, short if i == axis else 0) for i in range(x.ndim)], constant_values=value)


def _checked(tiles: Tiles) -> Tiles:
  tiles = tiles._replace(dq=tuple(tiles.dq), dkv=tuple(tiles.dkv))
  edges = (tiles.q, tiles.k, *tiles.dq, *tiles.dkv)
  wrong = tiles.q != 128 or any(e <= 0 or e % 64 for e in edges)
  if wrong or tiles.stages not in (0, 2, 3, 4) or tiles.blocks < 0:
    raise ValueError(
      f"plan: the Hopper kernels take q = 128 (two warpgroups of 64), every other edge a multiple of 64, "
      f"stages 0 (as many as fit) or 2 to 4, blocks >= 0; got {tiles}; drop `tiles` for the defaults"
    )
  return tiles


def _lines(active: Array, full: Array) -> Lines:
  """The table of the set entries of active [B, N, T, columns]."""
  B, N, T, columns = active.shape
  packed = jnp.arange(columns, dtype=jnp.int32) | (jnp.arange(T, dtype=jnp.int32)[:, None] << _TERM_SHIFT)
  # One sort: the class (0 partial, 1 full, 2 nothing) stands above the bits of an entry.
  kind = jnp.where(active, full.astype(jnp.int32), 2)
  entry = jnp.sort((packed | kind << _CLASS_SHIFT).reshape(B, N, T * columns), axis=-1)
  entry = entry & (2**_CLASS_SHIFT - 1)
  count = jnp.stack([(active & ~full).sum((2, 3)), full.sum((2, 3))], -1).astype(jnp.int32)
  line = jnp.argsort(-count.sum(-1), axis=-1, stable=True).astype(jnp.int32)
  return Lines(line, *(jnp.take_along_axis(x, line[..., None], 1) for x in (count, entry)))
