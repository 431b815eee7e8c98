"""Drawing tokens from logits: keys that know no batch, high-range Gumbel noise, filters, scores.

Legend: B rows · N tokens of a row · M tokens asked for · c tokens of a chunk · V vocabulary.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from genmodels.contracts import Row, pytree
from genmodels.corruption import rng

Array = jax.Array

# What a sampler draws for; the training tags of corruption/rng.py are below 16.
TOKEN, REVEAL, TIME = 16, 17, 18

SCORES = ("prob", "margin", "neg_entropy", "random")


def row_keys(row: Row, key: Array, tag: int, counter: Array) -> tuple[Array, Array]:
  """Two uint32[B], the key of each row's draw number `counter` int32[B] (or scalar).

  Derived from the example id of the row's document, so a row draws the same whatever the order and the
  size of the batch and however many devices it is spread over.
  """
  k0, k1 = (k[:, 0] for k in rng.doc_key(row, key, 0, 0, tag))
  return rng.threefry2x32(k0, k1, counter.astype(jnp.uint32), np.uint32(0))


def token_keys(keys: tuple[Array, Array], at: Array) -> tuple[Array, Array]:
  """Two uint32[B, M]: keys of the tokens at coordinates int32[B, M]."""
  return rng.threefry2x32(keys[0][:, None], keys[1][:, None], at.astype(jnp.uint32), np.uint32(1))


def gumbel(k0: Array, k1: Array, V: int) -> Array:
  """float32[c, V] standard Gumbel noise of keys uint32[c], with a right tail up to 45.

  The usual −log(−log u) of a 23-bit uniform never exceeds 15.9, which lowers the temperature of large
  vocabularies without a word. Here 1 − u has 64 bits, so that its small values keep their precision.
  """
  i = jnp.arange(V, dtype=jnp.uint32)[None]
  x0, x1 = rng.threefry2x32(k0[:, None], k1[:, None], i, np.uint32(2))
  v = x0.astype(jnp.float32) * np.float32(2**-32) + (x1.astype(jnp.float32) + 0.5) * np.float32(2**-64)
  v = jnp.minimum(v, np.float32(1 - 2**-24))
  return -jnp.log(-jnp.log1p(-v))


def top_k_filter(z: Array, k: int) -> Array:
  """Logits [c, V] with all but the k largest (and what ties with the k-th) at −inf; k = 0 keeps all."""
  if not 0 < k < z.shape[-1]:
    return z
  return jnp.where(z >= jax.lax.top_k(z, k)[0][..., -1:], z, -jnp.inf)


def top_p_filter(z: Array, p: float) -> Array:
  """Logits [c, V] of the nucleus: the smallest set of likeliest tokens whose mass reaches p."""
  if p >= 1:
    return z
  prob = jax.nn.softmax(z, -1)
  down = -jnp.sort(-prob, -1)
  before = jnp.cumsum(down, -1) - down  # mass of the likelier tokens
  least = jnp.min(jnp.where(before < p, down, jnp.inf), -1, keepdims=True)
  return jnp.where(prob >= least, z, -jnp.inf)


@pytree()
class Picked:
  """A token for each asked slot.

  Fields:
    token: int32[…]. score: float32[…], how sure the model is of it.
  """

  token: Array
  score: Array


@dataclasses.dataclass(frozen=True)
class Choice:
  """How one token is chosen and how sure it is; see the fields of SamplerConfig."""

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  score: str = "prob"
  forbid: tuple[int, ...] = ()

  def logits(self, logits: Array) -> Array:
    """float32 logits [c, V] with forbidden ids at −inf."""
    z = logits.astype(jnp.float32)
    if self.forbid:
      z = z.at[..., np.array(self.forbid)].set(-jnp.inf)
    return z

  def law(self, logits: Array) -> Array:
    """float32[c, V], the distribution that tokens of logits [c, V] are drawn from: temperature and filters
    applied, one-hot at temperature 0."""
    z = self.logits(logits)
    if self.temperature == 0:
      return jax.nn.one_hot(jnp.argmax(z, -1), z.shape[-1])
    return jax.nn.softmax(self.filtered(z), -1)

  def filtered(self, z: Array) -> Array:
    """Logits [c, V] under the temperature (above 0) and the filters."""
    return top_p_filter(top_k_filter(z / self.temperature, self.top_k), self.top_p)

  def nothing(self, *shape: int) -> Picked:
    """A Picked without content."""
    return Picked(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))

  def __call__(self, logits: Array, k0: Array, k1: Array) -> Picked:
    """A token for each of the logits [c, V], with keys uint32[c].

    The score is that of the distribution itself, in float32: temperature and filters shape what is
    drawn, not how confident the model is.
    """
    raw = self.logits(logits)
    z = raw
    if self.temperature > 0:
      z = self.filtered(raw)
      z = z + gumbel(k0, k1, z.shape[-1])
    token = jnp.argmax(z, -1).astype(jnp.int32)
    if self.score == "random":
      return Picked(token, rng.uniform(rng.threefry2x32(k0, k1, np.uint32(0), np.uint32(3))[0]))
    logp = jax.nn.log_softmax(raw, -1)
    if self.score == "margin":
      two = jnp.exp(jax.lax.top_k(logp, 2)[0])
      score = two[..., 0] - two[..., 1]
    elif self.score == "neg_entropy":
      score = jnp.sum(jnp.where(logp > -jnp.inf, jnp.exp(logp) * logp, 0.0), -1)
    else:
      score = jnp.exp(jnp.take_along_axis(logp, token[..., None], -1)[..., 0])
    return Picked(token, score)


def uniforms(keys: tuple[Array, Array]) -> Array:
  """float32 uniforms in (0, 1), one for each key."""
  return rng.uniform(rng.threefry2x32(*keys, np.uint32(0), np.uint32(4))[0])
