"""Which context shard holds which tokens: balanced work, whole blocks, one permutation for all streams.

Every row is cut into pieces of one static capacity; a shard takes the same number of pieces, in ascending
order, and holds, stream by stream, the slots of their tokens:

  zigzag    2n pieces for n shards, shard r takes r and 2n − 1 − r (balanced where work grows along the row)
  balanced  n · pieces of them, given in order of their work to the shard with the least that has room:
            packed documents, ragged blocks

Codes travel with the tokens, so a mask is a function of the placed slots as of any others.

Legend: B rows · N clean tokens · S slots · n shards · K pieces of a row · p pieces of a shard (K = n · p)
· C capacity of a piece · M = p · C slots of a stream on a shard.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from genmodels.contracts import Slots
from genmodels.masks import AttnMask

Array = jax.Array

KINDS = ("none", "zigzag", "balanced")


def capacity(tokens: int, shards: int, pieces: int, whole_blocks: int) -> tuple[int, int]:
  """(nominal length of a piece, its capacity C): whole blocks that begin in it may run over its end.

  Args:
    tokens: N. pieces: of a shard. whole_blocks: length of the longest block, 0 to cut anywhere.

  Raises:
    ValueError: a block can be longer than a piece.
  """
  length = math.ceil(tokens / (shards * pieces))
  if whole_blocks > length:
    raise ValueError(
      f"layout.whole_blocks is {whole_blocks}, longer than a piece of {length} tokens ({tokens} on {shards} "
      f"context shards × {pieces}); take fewer shards or pieces, or whole_blocks=0: blocks are cut then, and "
      "noisy keys travel too"
    )
  return length, length if whole_blocks < 2 else -(-(length + whole_blocks - 1) // 8) * 8


def place(slots: Slots, shards: int, pieces: int, whole_blocks: int = 0, work: Array | None = None) -> Slots:
  """The slots permuted over context shards, with empty ones between the pieces where they are not full.

  Args:
    slots: all slots of a row, every (stream, token) once.
    shards: n. pieces: of a shard, p.
    whole_blocks: no block is cut by a shard's border; the length of the longest one. 0 cuts anywhere.
    work: float32[B, S] of every slot, to balance; None: zig-zag (p = 2).

  Returns:
    Slots with S = n · streams · M: `where` follows, `shards` and `whole_blocks` say what was done.

  Raises:
    ValueError: see `capacity`.
  """
  B, streams, N = slots.where.shape
  K = shards * pieces
  length, C = capacity(N, shards, pieces, whole_blocks)
  cut = jnp.minimum(jnp.arange(K + 1, dtype=jnp.int32) * length, N)  # [K + 1]
  cut = jnp.broadcast_to(cut, (B, K + 1))
  first = jnp.maximum(slots.where, 0)  # every stream has a token's block; empty slots have none of their own
  if whole_blocks:
    at = jnp.minimum(cut[:, 1:-1], N - 1)
    used = jnp.take_along_axis(slots.where[:, 0], at, 1) >= 0
    of = lambda x: jnp.take_along_axis(x, jnp.take_along_axis(first[:, 0], at, 1), 1)
    moved = jnp.where(used & (of(slots.blk_lo) < at), of(slots.blk_hi), cut[:, 1:-1])
    cut = jnp.concatenate([cut[:, :1], moved, cut[:, -1:]], 1)
  if work is None:
    near = np.arange(shards)
    order = jnp.broadcast_to(np.stack([near, K - 1 - near], 1).astype(np.int32), (B, shards, 2))
  else:
    per_token = jnp.take_along_axis(work, first.reshape(B, -1), 1).reshape(first.shape)
    per_token = jnp.where(slots.where >= 0, per_token, 0).sum(1)
    total = jnp.pad(jnp.cumsum(per_token.astype(jnp.float32), 1), ((0, 0), (1, 0)))
    order = assign(jnp.diff(jnp.take_along_axis(total, cut, 1)), shards)

  # Slot → token: piece order[b, c, t] of shard c begins at its cut and is followed by empty slots.
  flat = order.reshape(B, K)
  begin, end = (jnp.take_along_axis(x, flat, 1)[..., None] for x in (cut[:, :-1], cut[:, 1:]))
  token = begin + jnp.arange(C, dtype=jnp.int32)  # [B, K, C]
  token = jnp.where(token < end, token, -1).reshape(B, shards, 1, pieces * C)
  token = jnp.broadcast_to(token, (B, shards, streams, pieces * C))
  stream = jnp.arange(streams, dtype=jnp.int32)[:, None]
  source = jnp.take_along_axis(
    slots.where.reshape(B, -1), (stream * N + jnp.maximum(token, 0)).reshape(B, -1), 1
  )
  source = jnp.where(token.reshape(B, -1) >= 0, source, -1)

  # Token → slot.
  n = jnp.broadcast_to(jnp.arange(N, dtype=jnp.int32), (B, N))
  piece = n // length
  piece = piece - (n < jnp.take_along_axis(cut, piece, 1))
  rank = jnp.take_along_axis(jnp.argsort(flat, axis=1).astype(jnp.int32), piece, 1)  # among all pieces
  inside = n - jnp.take_along_axis(cut, piece, 1) + rank % pieces * C
  M = pieces * C
  where = (rank // pieces * streams * M + inside)[:, None] + stream * M
  where = jnp.where(slots.where >= 0, where, -1)

  def of(x, empty):
    return jnp.where(source >= 0, jnp.take_along_axis(x, jnp.maximum(source, 0), 1), empty)

  fields = {
    f: of(getattr(slots, f), 0) for f in ("stream", "pos", "order", "doc_lo", "doc_hi", "blk_lo", "blk_hi")
  }
  fields |= {f: of(getattr(slots, f), -1) for f in ("src", "doc")}
  return Slots(**fields, where=where, shards=shards, whole_blocks=whole_blocks > 0)


def assign(work: Array, shards: int) -> Array:
  """Greedy: heaviest piece first, to the shard with the least work that still has room.

  Args:
    work: float32[B, K].

  Returns:
    int32[B, n, K/n], the pieces of each shard, ascending.
  """
  K = work.shape[1]
  room = K // shards

  def row(work):
    def give(carry, piece):
      load, count = carry
      shard = jnp.argmin(jnp.where(count < room, load, jnp.inf))
      return (load.at[shard].add(work[piece]), count.at[shard].add(1)), shard

    empty = jnp.zeros((shards,), jnp.float32), jnp.zeros((shards,), jnp.int32)
    heaviest = jnp.argsort(-work, stable=True)
    _, shard = jax.lax.scan(give, empty, heaviest)
    # Sorted by (shard, piece): every shard has `room` of them.
    return jax.lax.sort((shard.astype(jnp.int32), heaviest.astype(jnp.int32)), num_keys=2)[1]

  return jax.vmap(row)(work).reshape(-1, shards, room)


def load(mask: AttnMask, shards: int) -> np.ndarray:
  """Visible pairs of each context shard, int64[B, n] (NumPy, host); its max over its mean is the imbalance.

  Args:
    mask: of all slots, in the order in which they lie on the shards.
  """
  code, lo, hi = (np.asarray(x) for x in (mask.code, mask.lo, mask.hi))
  out = np.zeros((lo.shape[0], shards), np.int64)
  for b in range(lo.shape[0]):
    keys = np.sort(code[b % code.shape[0]])
    pairs = np.maximum(np.searchsorted(keys, hi[b]) - np.searchsorted(keys, lo[b]), 0).sum(0)
    out[b] = pairs.reshape(shards, -1).sum(1)
  return out


def imbalance(mask: AttnMask, shards: int) -> float:
  """Work of the busiest context shard over the mean, all rows together: 1.0 is perfect."""
  pairs = load(mask, shards).sum(0)
  return float(pairs.max() / pairs.mean())
