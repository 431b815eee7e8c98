"""Uniform-state corruption: tokens are replaced by random ones, and nothing tells which.

Austin et al., "Structured Denoising Diffusion Models in Discrete State-Spaces", 2107.03006; Schiff et al.,
"Simple Guidance Mechanisms for Discrete Diffusion Models", 2412.10193.

Legend: B rows · N clean tokens.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from genmodels import rows
from genmodels.contracts import CONTEXT, Noise, Row
from genmodels.corruption import rng
from genmodels.corruption.absorb import Absorb, masked_probability
from genmodels.corruption.base import eligible

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Uniform(Absorb):
  """Each token by itself, with probability p(t), becomes one drawn uniformly from the vocabulary.

  A *hit* token was drawn anew and may by chance be what it was; its shown value is `Noise.value`.

  Fields:
    count: "bernoulli".
    vocab: ids that are drawn from are 0 … vocab − 1; −1 takes the data's.
    exclude: ids among them that are never drawn; the mask id is added.
    prefix: a random share, up to this one, of every document is given: prefix language modelling of plain
      text. Likelihoods give nothing.
  """

  count: str = "bernoulli"
  vocab: int = -1
  exclude: tuple[int, ...] = ()
  prefix: float = 0.0

  absorbing = False

  def __post_init__(self):
    super().__post_init__()
    if (self.count, self.order, self.complement, self.retries) != ("bernoulli", "logical", False, 0):
      raise ValueError(
        "random tokens are drawn one by one: count='bernoulli', order='logical', complement=False, retries=0"
      )
    if not 0 <= self.prefix <= 1:
      raise ValueError(f"prefix is {self.prefix}; it is a share of a document")

  @property
  def states(self) -> int:
    """Ids that are drawn from."""
    return self.vocab - len(self.exclude)

  def random_tokens(self, row: Row, key: Array, at, copy) -> Array:
    """int32[B, N], uniform over the ids that are not excluded."""
    if self.states < 2:
      raise ValueError(f"vocab is {self.vocab}, exclude {self.exclude}; random tokens need two ids at least")
    value = (rng.token_bits(row, key, at, copy, rng.VALUE) % np.uint32(self.states)).astype(jnp.int32)
    for i in sorted(set(self.exclude)):
      value = value + (value >= i)
    return value

  def given(self, row: Row, key: Array, at) -> Row:
    """The row with a prefix of each document as CONTEXT; at least one token is left."""
    if not self.prefix:
      return row
    lo, hi = rows.doc_bounds(row.doc)
    share = self.prefix * rows.of_doc(row.doc, rng.doc_uniform(row, key, at, 0, rng.ORDER))
    first = jnp.floor(share * (hi - lo)).astype(jnp.int32)
    inside = rows.coordinates(row.doc) - lo < jnp.minimum(first, hi - lo - 1)
    return row.replace(role=jnp.where(inside, CONTEXT, row.role))

  def draw(self, row: Row, key: Array, step, latent=None, bound: tuple | None = None) -> Noise:
    lo, hi = self.blocks.bounds(row, step)
    at = jnp.uint32(rng.EVAL_STEP) if bound is not None else step
    copy = bound[0] if bound is not None else 0
    t, weight = self.levels(row, lo, hi, key, at, step, bound), None
    p = masked_probability(self.schedule, t, self.eps)
    if bound is not None:
      # A token drawn anew at a small t counts 1/t: the second moment diverges under uniform t, not under u².
      t, weight = t * t, 2 * t
      p = t
    hit = eligible(row) & (rng.token_uniform(row, key, at, copy, rng.WHICH) < p)
    value = self.random_tokens(row, key, at, copy)[:, None]
    drop = self.dropped(row, key, at, bound)
    nelbo = None if weight is None else weight[:, None]
    return self.noise(row, lo, hi, hit[:, None], t[:, None], p[:, None], nelbo, value=value, drop=drop)

  def state(self, row: Row, committed: Array, step=0) -> Noise:
    """Open tokens show random ones, the same ones throughout a generation."""
    noise = super().state(row, committed, step)
    value = self.random_tokens(row, jnp.zeros((2,), jnp.uint32), rng.EVAL_STEP, 0)
    return noise.replace(value=value[:, None])
