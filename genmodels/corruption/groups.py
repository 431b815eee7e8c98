"""Groups of masks with an origin of their own: what a model drafts in one call, at every place of a text.

Legend: B rows · N clean tokens · k tokens of a group (`blocks.size`).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from genmodels import rows
from genmodels.contracts import Noise, Row
from genmodels.corruption import rng
from genmodels.corruption.base import Corruption

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Groups(Corruption):
  """A noisy copy is cut into groups of k tokens, from an origin that is uniform per document and step.

  So every place of a document starts a group equally often. A group is all masks (whatever the role of its
  tokens: nothing of it is there yet when it is drafted), and has a clean token before it; with `anchored`,
  its first token is shown and k − 1 are masked. Tokens before the origin are shown and belong to no group.

  Fields:
    anchored: DFlash's groups (a clean anchor, then masks); else the mask groups of multi-token prediction.
  """

  anchored: bool = False

  def __post_init__(self):
    super().__post_init__()
    least = 2 if self.anchored else 1
    if self.blocks.whole or self.blocks.sizes or min(self.blocks.size.table) < least:
      raise ValueError(f"groups need blocks.size, a number of at least {least}, and no ragged sizes")
    if self.blocks.anchor != "document":
      raise ValueError(f"blocks.anchor is {self.blocks.anchor!r}; groups have random origins, leave it out")

  def draw(self, row: Row, key: Array, step, latent=None, bound: tuple | None = None) -> Noise:
    lo, hi = rows.doc_bounds(row.doc)
    size = jnp.asarray(self.blocks.size(step)).astype(jnp.int32)
    at, copy = (jnp.uint32(rng.EVAL_STEP), bound[0]) if bound is not None else (step, 0)
    u = rows.of_doc(row.doc, rng.doc_uniform(row, key, at, copy, rng.LEVEL))
    first = jnp.minimum((u * size).astype(jnp.int32), size - 1)
    origin = lo + first + (0 if self.anchored else 1)
    n = rows.coordinates(lo)
    blk_lo, blk_hi = rows.block_bounds(lo, hi, size, origin)
    hit = (row.doc >= 0) & (n >= origin)
    if self.anchored:
      hit &= n > blk_lo
    level = hit[:, None].astype(jnp.float32)
    ones = jnp.ones_like(level)
    return self.noise(row, blk_lo, blk_hi, hit[:, None], level, ones, drop=self.dropped(row, key, at, bound))
