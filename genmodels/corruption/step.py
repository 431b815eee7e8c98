"""Two states of one path: a masked document, and the same with one more token shown.

Legend: B rows · N clean tokens.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from genmodels import rows
from genmodels.corruption import rng
from genmodels.corruption.absorb import Absorb


@dataclasses.dataclass(frozen=True)
class Step(Absorb):
  """Copy 0 masks k of a document's n tokens, k uniform; copy 1 shows one of those k as well, each alike."""

  copies = 2

  def __post_init__(self):
    super().__post_init__()
    if (self.unit, self.count, self.order, self.complement) != ("doc", "exact", "logical", False):
      raise ValueError(
        "a step of a path is of a whole document with an exact count: unit='doc', count='exact', "
        "order='logical', complement=False"
      )

  def draw(self, row, key, step, latent=None, bound=None):
    noise = super().draw(row, key, step, latent, bound)
    at = jnp.uint32(rng.EVAL_STEP) if bound is not None else step
    hit = noise.hit[:, 0]
    lo, _ = rows.doc_bounds(row.doc)
    next_ = hit & (rows.rank_in_unit(lo, rng.token_bits(row, key, at, 0, rng.ORDER), hit) == 0)
    twice = lambda x: jnp.concatenate([x, x], 1)
    return noise.replace(
      hit=jnp.stack([hit, hit & ~next_], 1),
      level=twice(noise.level),
      marginal=twice(noise.marginal),
      nelbo=twice(noise.nelbo),
    )
