"""Deletion: tokens are left out, nothing stands in their place (insertion language models).

Legend: B rows · N clean tokens.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from genmodels import rows
from genmodels.corruption import rng
from genmodels.corruption.base import Corruption, eligible


@dataclasses.dataclass(frozen=True)
class Delete(Corruption):
  """Drops m of a document's n tokens, m uniform in 0 … n, each set of m alike.

  Patel et al., "Insertion Language Models", 2505.05755. The first token of a document stays: there is no
  gap before it. `Noise.order` is the place of a token among those that are left.

  Fields:
    time: "uniform", or "stratified" over the documents of the global batch.
  """

  time: str = "stratified"

  absorbing = False

  def __post_init__(self):
    super().__post_init__()
    if self.time not in ("uniform", "stratified"):
      raise ValueError(f"time is {self.time!r}; it must be one of uniform, stratified")
    if not self.blocks.whole:
      raise ValueError("blocks.size is set; tokens are dropped from whole documents: leave it at 0")

  def droppable(self, row):
    """bool[B, N]: tokens that may be dropped."""
    return eligible(row) & (rows.coordinates(row.doc) > rows.doc_bounds(row.doc)[0])

  def draw(self, row, key, step, latent=None, bound=None):
    at = jnp.uint32(rng.EVAL_STEP) if bound is not None else step
    copy = bound[0] if bound is not None else 0
    lo, hi = rows.doc_bounds(row.doc)
    ok = self.droppable(row)
    n = rows.count_in(lo, hi, ok)
    t = rng.doc_level(row, key, at, self.time, bound)
    m = jnp.minimum(jnp.floor(t * (n + 1)).astype(jnp.int32), n)
    hit = ok & (rows.rank_in_unit(lo, rng.token_bits(row, key, at, copy, rng.WHICH), ok) < m)
    one = lambda x: x[:, None].astype(jnp.float32)
    return self.noise(row, lo, hi, hit[:, None], one(t), one(m / jnp.maximum(n, 1)), one(n + 1))

  def ranks(self, row, lo, hit):
    doc_lo, _ = rows.doc_bounds(row.doc)
    here = jnp.broadcast_to(rows.coordinates(row.doc), row.doc.shape)
    return rows.count_in(doc_lo, here, ~hit[:, 0])
