"""Masked blocks whose sizes are drawn one after another (CtrlDiff).

Legend: B rows · N clean tokens · C sizes to choose from.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from genmodels import rows
from genmodels.contracts import Noise, Row
from genmodels.corruption import rng
from genmodels.corruption.absorb import Absorb

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class SampledAbsorb(Absorb):
  """Each block of a document takes one of a few sizes; the next one begins behind it.

  Huang & Tang, "CtrlDiff: Boosting Large Diffusion Language Models with Dynamic Block Prediction and
  Controllable Generation", 2505.14455. Here the sizes follow a fixed law; `objectives.policy` takes them from
  a policy. Likelihoods and samplers use equal blocks of `blocks.size`.

  Fields:
    sizes: to choose from. probs: their probabilities; () all alike.
  """

  unit: str = "block"
  sizes: tuple[int, ...] = (4, 8, 16)
  probs: tuple[float, ...] = ()

  def __post_init__(self):
    super().__post_init__()
    if not self.sizes or min(self.sizes) < 1:
      raise ValueError(f"sizes is {self.sizes}; a block has at least one token")
    if self.probs and (
      len(self.probs) != len(self.sizes) or min(self.probs) < 0 or abs(sum(self.probs) - 1) > 1e-6
    ):
      raise ValueError(f"probs is {self.probs}; one for each of sizes, and their sum is 1")
    if self.blocks.whole or self.blocks.sizes or self.blocks.anchor != "document":
      raise ValueError(
        "blocks are the equal ones of likelihoods and samplers, counted from the document: "
        "blocks.size=<one of sizes>"
      )

  @property
  def longest(self) -> int:
    return max(max(self.sizes), self.blocks.longest)

  def draw(self, row: Row, key: Array, step, latent=None, bound: tuple | None = None) -> Noise:
    if bound is not None:
      return super().draw(row, key, step, latent, bound)
    probs = np.array(self.probs or [1 / len(self.sizes)] * len(self.sizes), np.float32)
    choice = self.choose(row, key, step, jnp.log(jnp.maximum(probs, 1e-30)))
    return self.within(row, key, step, *self.cut(row, choice))

  def choose(self, row: Row, key: Array, step, logp: Array) -> Array:
    """int32[B, N]: the size, by its index, that a block would take if it began at the token.

    Args:
      logp: float32[C] or [B, N, C], log-probabilities.
    """
    u = rng.token_uniform(row, key, step, 0, rng.SIZE)
    below = jnp.cumsum(jnp.exp(logp), -1)[..., :-1]
    return (u[..., None] > below).sum(-1, dtype=jnp.int32)

  def cut(self, row: Row, choice: Array) -> tuple[Array, Array]:
    """The block of every token, two int32[B, N], from the choices int32[B, N] at all tokens."""
    return chain(row.doc, jnp.asarray(self.sizes, jnp.int32)[choice])


def chain(doc: Array, size: Array) -> tuple[Array, Array]:
  """Blocks [lo, hi), int32[B, N] each, where a block that begins at token n has size[n] tokens.

  The first begins with the document, each next one where the last ends; the last of a document is cut. Which
  tokens begin a block is found by doubling jumps: log2 N passes, no loop over tokens.

  Args:
    doc: int32[B, N]. size: int32[B, N], at least 1.
  """
  doc_lo, doc_hi = rows.doc_bounds(doc)
  n, N = rows.coordinates(doc), doc.shape[1]
  edge = lambda x, value: jnp.pad(x, ((0, 0), (0, 1)), constant_values=value)  # N: behind the row
  jump = edge(jnp.minimum(n + size, doc_hi), N)
  first = edge(n == doc_lo, True)
  mark = jax.vmap(lambda first, jump: first.at[jump].max(first))
  for _ in range(max(N - 1, 1).bit_length()):
    first = mark(first, jump)
    jump = jnp.take_along_axis(jump, jump, 1)
  first = first[:, :N]
  lo = jax.lax.cummax(jnp.where(first, n, 0), axis=1)
  following = edge(first[:, 1:], True)
  hi = jax.lax.cummin(jnp.where(following, n + 1, N), axis=1, reverse=True)
  return lo, hi
