"""Clean and noisy copies of a row, one stream after another.

Legend: B rows · N clean tokens · M slots of a noisy stream · S physical slots · A slots asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from genmodels import rows
from genmodels.contracts import CLEAN, CONTEXT, Noise, Row, Slots
from genmodels.layouts import placement

Array = jax.Array
COPIES = ("all", "text", "blocks")


@dataclasses.dataclass(frozen=True)
class Streams:
  """Each stream is a copy of the row in logical order: the clean one of all N tokens, a noisy one of those
  that `copy` names; S = N + noisy streams · M, M = N unless `copy_slots` says less.

  A prompt is in the clean stream whatever the noise: copying it as well buys nothing and costs its length
  once more for every noisy stream.

  Fields:
    streams: names; "c" is the clean one, the k-th other one is noisy copy k.
    copy: what a noisy stream holds. "all" tokens. "text": those that are not CONTEXT, packed; a noisy block
      is then the copied part of a block, and all that comes before it is read from the clean stream. A block
      that straddles prompt and response would leak there, since its prompt tokens see its clean response,
      unless blocks are anchored at the response or the clean stream is causal. "blocks": every block with
      such a token, whole; straddling blocks are then copied with their prompt tokens.
    copy_slots: M, slots of each noisy stream; 0: N. The packer never puts more into a row than fits.
    longest_block: for "blocks", tokens of the longest block.
    placement: where slots lie on a mesh with a context axis: "none" as arranged, "zigzag", "balanced" by the
      pairs that each piece of a row sees; see layouts/placement.py. Does nothing without such an axis.
    pieces: pieces of a row on each context shard under "balanced".
    whole_blocks: length of the longest block, to keep every block on one shard (slots are padded for it):
      noisy keys that only their own block sees then stay there. 0 cuts blocks, all keys travel.
  """

  streams: tuple[str, ...] = (CLEAN,)
  placement: str = "none"
  pieces: int = 4
  whole_blocks: int = 0
  copy: str = "all"
  copy_slots: int = 0
  longest_block: int = 0

  def __post_init__(self):
    if not self.streams or len(set(self.streams)) != len(self.streams):
      raise ValueError(f"streams is {self.streams}; name each stream once, for example ('n', 'c')")
    if self.placement not in placement.KINDS:
      raise ValueError(f"placement is {self.placement!r}; it must be one of {', '.join(placement.KINDS)}")
    if self.pieces < 1 or self.whole_blocks < 0:
      raise ValueError(f"pieces is {self.pieces}, whole_blocks {self.whole_blocks}; at least 1 and 0")
    if self.whole_blocks and self.placement == "none":
      raise ValueError(f"whole_blocks is {self.whole_blocks}, placement 'none'; set 'zigzag' or 'balanced'")
    if self.copy not in COPIES:
      raise ValueError(f"copy is {self.copy!r}; it must be one of {', '.join(COPIES)}")
    if self.copy == "all" and self.copy_slots or self.copy_slots < 0:
      raise ValueError(f"copy_slots is {self.copy_slots}, copy {self.copy!r}; set copy='text' or 'blocks'")
    if (self.copy == "blocks") != (self.longest_block > 0):
      raise ValueError(
        f"copy is {self.copy!r}, longest_block {self.longest_block}; 'blocks' needs the length of the "
        "longest block, the others 0"
      )
    if self.copy != "all" and CLEAN not in self.streams:
      raise ValueError(f"copy is {self.copy!r}, streams {self.streams}: the rest would be nowhere; add 'c'")
    if self.copy != "all" and self.placement != "none":
      raise ValueError(f"placement is {self.placement!r}; streams of unequal length take 'none'")

  @property
  def noisy(self) -> tuple[str, ...]:
    return tuple(s for s in self.streams if s != CLEAN)

  def copy_of(self) -> np.ndarray:
    """int32[streams]: the noisy copy that a stream shows, −1 for the clean one."""
    return np.array([self.noisy.index(s) if s != CLEAN else -1 for s in self.streams], np.int32)

  def cost(self, lengths: dict, mode: int = 0) -> dict:
    """Slots that documents need, for the packer (NumPy, host).

    Args:
      lengths: {"context": int array, "text": int array}, tokens by role per document, and "runs", stretches
        of tokens that are not context (1 where absent).

    Returns:
      {budget name: int array}; a row offers N clean tokens to the budget "clean", and to "copy" what `rooms`
      says.
    """
    del mode
    text = np.asarray(lengths["text"])
    clean = text + np.asarray(lengths["context"])
    if self.copy == "all" or not self.noisy:
      return {"clean": clean}
    if self.copy == "blocks":  # a stretch may begin and end inside of a block
      runs = np.asarray(lengths.get("runs", 1))
      text = np.where(text > 0, np.minimum(text + 2 * (self.longest_block - 1) * runs, clean), 0)
    return {"clean": clean, "copy": text}

  def rooms(self) -> dict[str, int]:
    """{budget: capacity of a row} where it is less than a row of text would cost."""
    return {"copy": self.copy_slots} if self.copy_slots else {}

  def copied(self, row: Row, noise: Noise) -> Array:
    """bool[B, N]: the tokens that noisy streams hold."""
    mine = row.doc >= 0
    if self.copy == "all":
      return mine
    asked = mine & (row.role != CONTEXT)
    if self.copy == "blocks":
      return mine & (rows.count_in(noise.blk_lo, noise.blk_hi, asked) > 0)
    return asked

  def arrange(self, row: Row, noise: Noise, only: Array | None = None) -> Slots:
    """Places the tokens.

    Args:
      only: int32[B, A, 2] of (stream, token) to place, (−1, −1) for an empty slot; default: all.

    Returns:
      Slots with S = A, or as many as the streams have.
    """
    B, N = row.tokens.shape
    n_streams = len(self.streams)
    if only is None:
      stream, src, where = self._all(row, noise)
    else:
      stream, src = only[..., 0], only[..., 1]
      A = only.shape[1]
      flat = jnp.where(src >= 0, stream * N + src, n_streams * N)
      where = jnp.full((B, n_streams * N + 1), -1, jnp.int32)
      where = where.at[jnp.arange(B)[:, None], flat].set(jnp.arange(A, dtype=jnp.int32)[None])
      where = where[:, :-1].reshape(B, n_streams, N)
    empty = src < 0

    def of(x_BN):
      return jnp.take_along_axis(jnp.broadcast_to(x_BN, (B, N)), jnp.maximum(src, 0), 1)

    doc_lo, doc_hi = rows.doc_bounds(row.doc)
    blk_lo, blk_hi = of(noise.blk_lo), of(noise.blk_hi)
    if self.copy == "text":  # a noisy block ends where its copied tokens do
      run_lo, run_hi = rows.runs(row.doc, row.role == CONTEXT)
      noisy = jnp.asarray(self.copy_of() >= 0)[jnp.maximum(stream, 0)]
      blk_lo = jnp.where(noisy, jnp.maximum(blk_lo, of(run_lo)), blk_lo)
      blk_hi = jnp.where(noisy, jnp.minimum(blk_hi, of(run_hi)), blk_hi)
    return Slots(
      src=src,
      stream=jnp.where(empty, 0, stream),
      doc=jnp.where(empty, -1, of(row.doc)),
      pos=of(rows.coordinates(row.doc)),
      order=of(doc_lo + noise.order),
      doc_lo=of(doc_lo),
      doc_hi=of(doc_hi),
      blk_lo=blk_lo,
      blk_hi=blk_hi,
      where=where,
    )

  def _all(self, row: Row, noise: Noise) -> tuple[Array, Array, Array]:
    """stream, src int32[B, S], where int32[B, streams, N] of all slots of a row."""
    B, N = row.tokens.shape
    here = row.doc >= 0
    n = jnp.broadcast_to(rows.coordinates(row.doc), (B, N))
    plain = jnp.where(here, n, -1)
    M = self.copy_slots or N
    if self.copy == "all":
      packed, held = plain, plain
    else:
      copied = self.copied(row, noise)
      rank = jnp.cumsum(copied, 1, dtype=jnp.int32) - 1
      held = jnp.where(copied & (rank < M), rank, -1)
      packed = jnp.full((B, M + 1), -1, jnp.int32)
      packed = packed.at[jnp.arange(B)[:, None], jnp.where(held >= 0, held, M)].set(n)[:, :M]
    stream, src, where, start = [], [], [], 0
    for i, name in enumerate(self.streams):
      tokens, slot = (plain, plain) if name == CLEAN else (packed, held)
      stream.append(jnp.full((B, tokens.shape[1]), i, jnp.int32))
      src.append(tokens)
      where.append(jnp.where(slot >= 0, slot + start, -1))
      start += tokens.shape[1]
    return jnp.concatenate(stream, 1), jnp.concatenate(src, 1), jnp.stack(where, 1)

  def place(self, slots: Slots, shards: int, pairs: Callable[[], Array] | None = None) -> Slots:
    """All slots of a row, permuted (and padded) for `shards` context shards.

    Args:
      pairs: () → int32[B, S], visible keys of every slot; asked for under "balanced" only.
    """
    if self.placement == "none" or shards == 1:
      return slots
    if self.placement == "zigzag":
      return placement.place(slots, shards, 2, self.whole_blocks)
    return placement.place(slots, shards, self.pieces, self.whole_blocks, pairs())
