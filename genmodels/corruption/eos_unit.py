"""The padding of a response as one unit: Dream-Coder (Xie et al., 2509.01142, and its released trainer).

A response that is padded with EOS teaches a masked model mostly EOS: it floods what it generates. Here the
run of EOS at the end of a document is masked as a whole or not at all, with the probability of one token, and
counts as one token in the loss; and its length is a draw, so that no length is learnt.

Legend: B rows · N clean tokens.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from genmodels import rows
from genmodels.contracts import CONTEXT, TEXT, Noise, Row
from genmodels.corruption import rng
from genmodels.corruption.absorb import Absorb

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class EosUnitAbsorb(Absorb):
  """Bernoulli masking in which the EOS tokens that end a document are one token.

  Draws of a likelihood bound know no such unit: they mask token by token.

  Fields:
    eos_id: −1 takes it from the data's tokenizer.
    cut: probability with which the run is cut to a uniform length, at least one.
  """

  count: str = "bernoulli"
  eos_id: int = -1
  cut: float = 0.0

  def __post_init__(self):
    super().__post_init__()
    if self.count != "bernoulli" or self.complement:
      raise ValueError(f"count is {self.count!r}, complement {self.complement}; expected 'bernoulli', False")
    if not 0 <= self.cut <= 1:
      raise ValueError(f"cut is {self.cut}; it is a probability")

  def run(self, row: Row) -> Array:
    """bool[B, N]: the EOS tokens that end a document."""
    _, hi = rows.doc_bounds(row.doc)
    other = (row.tokens != self.eos_id) | (row.role != TEXT)
    return (row.doc >= 0) & (rows.count_in(rows.coordinates(row.doc) + jnp.zeros_like(hi), hi, other) == 0)

  def trimmed(self, row, key, step, bound=None) -> Row:
    if self.cut == 0 or bound is not None:
      return row
    run, n = self.run(row), rows.coordinates(row.doc)
    lo, hi = rows.doc_bounds(row.doc)
    length = rows.count_in(lo, hi, run)
    draw = lambda lane: rows.of_doc(row.doc, rng.doc_uniform(row, key, step, lane, rng.VALUE))
    kept = jnp.where(draw(0) < self.cut, jnp.ceil(draw(1) * length).astype(jnp.int32), length)
    gone = run & (n - (hi - length) >= kept)
    return row.replace(doc=jnp.where(gone, -1, row.doc), role=jnp.where(gone, CONTEXT, row.role))

  def draw(self, row, key, step, latent=None, bound=None) -> Noise:
    noise = super().draw(row, key, step, latent, bound)
    if bound is not None:
      return noise
    run = self.run(row)
    count = rows.count_in(*rows.doc_bounds(row.doc), run)
    return noise.replace(share=jnp.where(run, 1 / jnp.maximum(count, 1), 1.0))

  def _bernoulli(self, row, key, at, p, ok, unit_lo, unit_hi):
    hit = super()._bernoulli(row, key, at, p, ok, unit_lo, unit_hi)
    run = self.run(row)
    lo, hi = rows.doc_bounds(row.doc)
    first = jnp.minimum(hi - rows.count_in(lo, hi, run), row.doc.shape[1] - 1)
    return jnp.where(run, jnp.take_along_axis(hit, first, 1), hit)
