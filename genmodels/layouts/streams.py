"""Clean and noisy copies of a row, one stream after another.

Legend: B rows · N clean tokens · S physical slots · A slots asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from genmodels import rows
from genmodels.contracts import CLEAN, Noise, Row, Slots
from genmodels.layouts import placement

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Streams:
  """Each stream is one copy of all N tokens in logical order; S = len(streams)·N.

  Fields:
    streams: names; "c" is the clean one, the k-th other one is noisy copy k.
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

  def __post_init__(self):
    if not self.streams or len(set(self.streams)) != len(self.streams):
      raise ValueError(f"streams is {self.streams}; name each stream once, for example ('n', 'c')")
    if self.placement not in placement.KINDS:
      raise ValueError(f"placement is {self.placement!r}; it must be one of {', '.join(placement.KINDS)}")
    if self.pieces < 1 or self.whole_blocks < 0:
      raise ValueError(f"pieces is {self.pieces}, whole_blocks {self.whole_blocks}; at least 1 and 0")
    if self.whole_blocks and self.placement == "none":
      raise ValueError(f"whole_blocks is {self.whole_blocks}, placement 'none'; set 'zigzag' or 'balanced'")

  @property
  def noisy(self) -> tuple[str, ...]:
    return tuple(s for s in self.streams if s != CLEAN)

  def copy_of(self) -> np.ndarray:
    """int32[streams]: the noisy copy that a stream shows, −1 for the clean one."""
    return np.array([self.noisy.index(s) if s != CLEAN else -1 for s in self.streams], np.int32)

  def cost(self, lengths: dict, mode: int = 0) -> dict:
    """Slots that documents need, for the packer (NumPy, host).

    Args:
      lengths: {"context": int array, "text": int array}, tokens by role per document.

    Returns:
      {budget name: int array}; a row offers N clean tokens to the budget "clean".
    """
    del mode
    return {"clean": sum(np.asarray(v) for v in lengths.values())}

  def arrange(self, row: Row, noise: Noise, only: Array | None = None) -> Slots:
    """Places the tokens.

    Args:
      only: int32[B, A, 2] of (stream, token) to place, (−1, −1) for an empty slot; default: all.

    Returns:
      Slots with S = A, or len(streams)·N.
    """
    B, N = row.tokens.shape
    n_streams = len(self.streams)
    if only is None:
      stream = np.repeat(np.arange(n_streams, dtype=np.int32), N)[None]
      src = np.tile(np.arange(N, dtype=np.int32), n_streams)[None]
      stream, src = (jnp.broadcast_to(a, (B, a.shape[1])) for a in (stream, src))
      src = jnp.where(jnp.take_along_axis(row.doc, src, 1) < 0, -1, src)
      where = jnp.arange(n_streams * N, dtype=jnp.int32).reshape(1, n_streams, N)
      where = jnp.where((row.doc >= 0)[:, None], where, -1)
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
    return Slots(
      src=src,
      stream=jnp.where(empty, 0, stream),
      doc=jnp.where(empty, -1, of(row.doc)),
      pos=of(rows.coordinates(row.doc)),
      order=of(doc_lo + noise.order),
      doc_lo=of(doc_lo),
      doc_hi=of(doc_hi),
      blk_lo=of(noise.blk_lo),
      blk_hi=of(noise.blk_hi),
      where=where,
    )

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
