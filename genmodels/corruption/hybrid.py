"""Part of a document by diffusion, the rest one token after another: Esoteric language models.

Sahoo et al., "Esoteric Language Models", 2506.01928. A token is kept with probability α_t = α₀(1 − t), so
that a share 1 − α₀ is still masked at t = 0 and left to a left-to-right model that sees what diffusion made:

  −log p(x) ≤ E_{z₀} Σ_{i masked} −log p(x_i | z₀, x_{<i}) + ∫₀¹ α₀/(1−α_t) E_{z_t} Σ_{i masked} CE_i(z_t) dt.

A training document takes part in one of the two sums, by its mode. With K tokens of n left to the sequential
part, the integral is the mean over m = K+1 … n masked tokens of (n − K)/m Σ CE_i.

Both parts share one geometry. Generation ranks put the given tokens first, then the shown ones in random
order, then the masked ones: at random (diffusion) or in text order (sequential). Blocks are intervals of
*ranks*: what is shown is a block, what diffusion has masked is one, each token of the sequential part is one.

Legend: B rows · N clean tokens · n tokens of a document that are predicted.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from genmodels import rows
from genmodels.contracts import Noise, Row
from genmodels.corruption import rng
from genmodels.corruption.base import Corruption, eligible

Array = jax.Array

DIFFUSION, SEQUENTIAL = 0, 1  # modes of a document
_LAST = 1 << 30  # ranks are sorted by a group in the upper two bits


@dataclasses.dataclass(frozen=True)
class Hybrid(Corruption):
  """Masks ever more of a document down to the share that the sequential part fills.

  Fields:
    alpha: α₀, the share that diffusion generates; 1 is masked diffusion, 0 autoregression.
    split: share of the documents of the global batch that take part in the diffusion sum.
    modes: "batch" splits by the document's rank in the global batch, "document" by `Documents.mode`
      (sources of a mixture with a mode each).
    time: "uniform", or "stratified" over the documents of the global batch.
    count: "bernoulli" masks each token by itself (the paper), so that K is binomial; "exact" leaves
      K = ⌈(1 − α₀)·n⌉ tokens to the sequential part and masks exact counts.
  """

  alpha: float = 0.5
  split: float = 0.5
  modes: str = "batch"
  time: str = "stratified"
  count: str = "bernoulli"

  def __post_init__(self):
    super().__post_init__()
    for name in ("alpha", "split"):
      if not 0 <= getattr(self, name) <= 1:
        raise ValueError(f"{name} is {getattr(self, name)}; it is a share between 0 and 1")
    for name, allowed in (
      ("modes", ("batch", "document")),
      ("time", ("uniform", "stratified")),
      ("count", ("bernoulli", "exact")),
    ):
      if getattr(self, name) not in allowed:
        raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
    if not self.blocks.whole:
      raise ValueError("blocks.size is set; here the blocks follow from what is shown: leave it at 0")

  def sequential(self, row: Row) -> Array:
    """bool[B, N]: the token's document takes part in the sequential sum."""
    if self.modes == "document":
      mode = row.docs.mode == SEQUENTIAL
    elif self.alpha in (0, 1):  # one of the sums is empty
      mode = jnp.full(row.docs.mode.shape, self.alpha == 0)
    else:
      index = row.docs.rank[..., 0].astype(jnp.float32)
      mode = jnp.floor((index + 1) * self.split) == jnp.floor(index * self.split)
    return rows.of_doc(row.doc, mode)

  def draw(self, row: Row, key: Array, step, latent=None, bound: tuple | None = None) -> Noise:
    at = jnp.uint32(rng.EVAL_STEP) if bound is not None else step
    copy = bound[0] if bound is not None else 0
    ok, sequential = eligible(row), self.sequential(row)
    lo, hi = rows.doc_bounds(row.doc)
    n = rows.count_in(lo, hi, ok)
    t = rng.doc_level(row, key, at, self.time, bound)
    u = rng.token_uniform(row, key, at, copy, rng.WHICH)
    left = self.left(u, lo, hi, ok, n)
    if self.count == "exact" or bound is not None:
      m = left + jnp.clip(jnp.ceil(t * (n - left)).astype(jnp.int32), jnp.minimum(n - left, 1), n - left)
      m = jnp.where(sequential, left, m)
      m = jnp.where(~sequential & (n == left), 0, m)  # nothing is left to diffusion
      hit = ok & (rows.rank_in_unit(lo, u, ok) < m)
      marginal, weight = m / jnp.maximum(n, 1), (n - left) / jnp.maximum(m, 1)
    else:
      p = jnp.where(sequential, 1 - self.alpha, 1 - self.alpha * (1 - t))
      hit = ok & (u < p) & (sequential | (self.alpha > 0))
      marginal, weight = p, self.alpha / jnp.maximum(p, 1e-6)
    order = self.arrangement(row, hit, sequential, rng.token_bits(row, key, at, copy, rng.ORDER))
    nelbo = jnp.where(sequential, 1.0, weight)
    t = jnp.where(sequential, 0.0, t)
    return self.assemble(row, hit, sequential, order, t, marginal, nelbo)

  def left(self, u: Array, lo: Array, hi: Array, ok: Array, n: Array) -> Array:
    """K int32[B, N], tokens of the document that the sequential part fills."""
    if self.count == "exact":
      return jnp.ceil((1 - self.alpha) * n - 1e-4).astype(jnp.int32)
    return rows.count_in(lo, hi, ok & (u < 1 - self.alpha))

  def arrangement(self, row: Row, hit: Array, sequential: Array, bits: Array) -> Array:
    """Generation rank int32[B, N] of every token: given, shown, masked."""
    lo, _ = rows.doc_bounds(row.doc)
    text = jnp.broadcast_to(rows.coordinates(row.doc), row.doc.shape).astype(jnp.uint32)
    group = jnp.where(hit, 2, eligible(row).astype(jnp.int32)).astype(jnp.uint32)
    within = jnp.where((group == 0) | (hit & sequential), text, bits >> 2)
    return rows.rank_in_unit(lo, group * _LAST + within, row.doc >= 0)

  def assemble(self, row, hit, sequential, order, level, marginal, nelbo) -> Noise:
    """The Noise of these hits and ranks, with blocks as intervals of ranks."""
    lo, hi = rows.doc_bounds(row.doc)
    shown = lo + rows.count_in(lo, hi, ~hit)
    rank = lo + order
    blk_lo = jnp.where(hit, jnp.where(sequential, rank, shown), lo)
    blk_hi = jnp.where(hit, jnp.where(sequential, rank + 1, hi), shown)
    one = lambda x: jnp.broadcast_to(x, hit.shape)[:, None].astype(jnp.float32)
    return self.noise(row, blk_lo, blk_hi, hit[:, None], one(level), one(marginal), one(nelbo), order=order)

  def _planned(self, row: Row) -> tuple[Array, Array]:
    """Generation ranks, and K, of a row to be generated: int32[B, N] each."""
    ok = eligible(row)
    lo, hi = rows.doc_bounds(row.doc)
    n, key = rows.count_in(lo, hi, ok), jnp.zeros((2,), jnp.uint32)
    u = rng.token_uniform(row, key, rng.EVAL_STEP, 0, rng.ORDER)
    left = self.left(u, lo, hi, ok, n)
    late = ok & (rows.rank_in_unit(lo, u, ok) < left)
    planned = self.arrangement(
      row, late, jnp.ones_like(ok), rng.token_bits(row, key, rng.EVAL_STEP, 1, rng.ORDER)
    )
    return planned, left

  def plan(self, row: Row) -> tuple[Array, Array]:
    """How rows of one document are generated: ranks int32[B, N], fixed by the document's id, and how many
    open tokens are of the diffusion part, int32[B]."""
    planned, left = self._planned(row)
    return planned, eligible(row).sum(1, dtype=jnp.int32) - left[:, 0]

  def state(self, row: Row, committed: Array, step=0) -> Noise:
    """A generation in progress: the diffusion part in an order fixed by the document's id, then the rest.

    Tokens committed in that order keep their ranks, and with a causal mask their keys and values.
    """
    ok = eligible(row)
    lo, hi = rows.doc_bounds(row.doc)
    n = rows.count_in(lo, hi, ok)
    planned, left = self._planned(row)
    hit = ok & jnp.logical_not(committed)
    order = rows.rank_in_unit(lo, hit.astype(jnp.uint32) * _LAST + planned.astype(jnp.uint32), row.doc >= 0)
    open_ = rows.count_in(lo, hi, hit)
    share = open_ / jnp.maximum(n, 1)
    return self.assemble(row, hit, open_ <= left, order, share, share, jnp.ones_like(share))
