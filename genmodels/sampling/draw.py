"""Drawing tokens from logits: keys that know no batch, high-range Gumbel noise, filters, scores.

Legend: B rows · N tokens of a row · M tokens asked for · c tokens of a chunk · V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from genmodels.contracts import Row, pytree
from genmodels.corruption import rng

Array = jax.Array

# What a sampler draws for; the training tags of corruption/rng.py are below 16.
TOKEN, REVEAL, TIME, REMASK = 16, 17, 18, 19

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


@dataclasses.dataclass(frozen=True)
class Score:
  """How sure the model is of a token: what thresholds are compared with and what tokens are ranked by.

  Of the model's own distribution in float32: temperature and filters shape what is drawn, not how confident
  the model is.

  Fields:
    kind: "prob" of the drawn token, "margin" of the two likeliest, "neg_entropy", "random".
    distance: λ: a token d places behind the first masked one of its unit scores λd less (WeDLM: entropy + λd,
      2512.22737; .02).
    eos: γ: the score of an EOS is multiplied by γ at the start of its unit, rising linearly to 1 with the
      share that is committed (EOSER, 2509.23924; .4, with doubling steps .01). 1: off.
    temperature: T > 0: tokens are ranked by score/T plus Gumbel noise, which draws them without replacement
      with probability ∝ exp(score/T) (Dream's alg_temp). Thresholds see the score itself.
  """

  kind: Literal["prob", "margin", "neg_entropy", "random"] = "prob"
  distance: float = 0.0
  eos: float = 1.0
  temperature: float = 0.0

  def __post_init__(self):
    if self.eos != 1 and self.kind == "neg_entropy":
      raise ValueError("eos multiplies scores of at least 0; with kind='neg_entropy' it would raise them")
    if not 0 <= self.eos or self.temperature < 0:
      raise ValueError(f"eos is {self.eos}, temperature {self.temperature}; both must be at least 0")

  def adjust(self, score: Array, is_eos: Array, offset: Array, progress: Array) -> Array:
    """float32[B, M]: the score where a token stands.

    Args:
      is_eos: bool[B, M]. offset: int32[B, M], places behind the first masked token.
      progress: float32[B], share of the unit that is committed.
    """
    if self.eos != 1:
      score = jnp.where(is_eos, score * (self.eos + (1 - self.eos) * progress)[:, None], score)
    return score - self.distance * offset if self.distance else score

  def rank(self, score: Array, u: Array) -> Array:
    """float32[B, M]: what tokens are ordered by, with uniforms u."""
    return score / self.temperature - jnp.log(-jnp.log(u)) if self.temperature else score


@pytree()
class Picked:
  """A token for each asked slot.

  Fields:
    token: int32[…]. score: float32[…], how sure the model is of it.
    gap: float32[…], largest logit less the second one; None unless asked for.
    top: (ids int32[…, R], probabilities float32[…, R]) of the likeliest tokens; None unless asked for.
    kl: float32[…], KL of this distribution to the one remembered, see `kl_on`; None unless asked for.
    spread: float32[…], entropy over ln V; None unless asked for.
    credit: (ids int32[…, R], float32[…, R]), see credit.Credit; None without one.
  """

  token: Array
  score: Array
  gap: Array | None = None
  top: tuple[Array, Array] | None = None
  kl: Array | None = None
  spread: Array | None = None
  credit: tuple[Array, Array] | None = None


def kl_on(logp: Array, ids: Array, prob: Array) -> Array:
  """float32[c]: KL(p ‖ q) on the partition {ids, the rest}, with q given on `ids` alone; a lower bound of the
  whole one (data processing), equal to it where `ids` hold the vocabulary.

  Args:
    logp: float32[c, V]. ids: int32[c, R]. prob: float32[c, R], of q; all zero: there is none, and KL is inf.
  """
  p = jnp.exp(jnp.take_along_axis(logp, ids, -1))
  both = lambda x: jnp.concatenate([x, jnp.maximum(1 - x.sum(-1, keepdims=True), 0.0)], -1)
  p, q = both(p), both(prob)
  terms = jnp.where(p > 0, p * (jnp.log(jnp.maximum(p, 1e-30)) - jnp.log(jnp.maximum(q, 1e-12))), 0.0)
  return jnp.where(prob.sum(-1) > 0, jnp.maximum(terms.sum(-1), 0.0), jnp.inf)


@dataclasses.dataclass(frozen=True)
class Choice:
  """How one token is chosen and how sure it is; see the fields of SamplerConfig.

  Fields:
    score: Score.kind.
    extras: what else of the distribution is wanted: fields of Picked. top: R, likeliest tokens kept.
    credit: a credit.Credit, or None.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  score: str = "prob"
  forbid: tuple[int, ...] = ()
  extras: tuple[str, ...] = ()
  top: int = 0
  credit: Any = None

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

  def __call__(self, logits: Array, k0: Array, k1: Array, *known: Array) -> Picked:
    """A token for each of the logits [c, V].

    Args:
      k0, k1: uint32[c], keys. known: ids int32[c, R] and probabilities float32[c, R] to which the divergence
        is taken, with "kl" only; then the ids and values of the credit, where there is one.
    """
    raw, table = self.logits(logits), None
    if self.credit is not None:
      *known, ids, value = known
      raw, table = self.credit.fused(raw, ids, value)
    z = raw
    if self.temperature > 0:
      z = self.filtered(raw)
      z = z + gumbel(k0, k1, z.shape[-1])
    token = jnp.argmax(z, -1).astype(jnp.int32)
    logp = jax.nn.log_softmax(raw, -1)
    score = self._score(token, logp, k0, k1)
    return Picked(token, score, **self._extras(raw, logp, known), credit=table)

  def _score(self, token, logp, k0, k1):
    if self.score == "random":
      return random_score(k0, k1)
    if self.score == "margin":
      two = jnp.exp(jax.lax.top_k(logp, 2)[0])
      return two[..., 0] - two[..., 1]
    if self.score == "neg_entropy":
      return -_entropy(logp)
    return jnp.exp(jnp.take_along_axis(logp, token[..., None], -1)[..., 0])

  def _extras(self, raw, logp, known):
    out = {}
    if "gap" in self.extras:
      two = jax.lax.top_k(raw, 2)[0]
      out["gap"] = two[..., 0] - two[..., 1]
    if "top" in self.extras:
      value, ids = jax.lax.top_k(logp, min(self.top, logp.shape[-1]))
      out["top"] = ids.astype(jnp.int32), jnp.exp(value)
    if "kl" in self.extras:
      out["kl"] = kl_on(logp, *known)
    if "spread" in self.extras:
      out["spread"] = _entropy(logp) / math.log(logp.shape[-1])
    return out


def random_score(k0: Array, k1: Array) -> Array:
  """float32[…] uniforms of keys uint32[…]: the score of kind "random", which knows no prediction."""
  return rng.uniform(rng.threefry2x32(k0, k1, np.uint32(0), np.uint32(3))[0])


def _entropy(logp: Array) -> Array:
  """float32[c], nats."""
  return -jnp.sum(jnp.where(logp > -jnp.inf, jnp.exp(logp) * logp, 0.0), -1)


def uniforms(keys: tuple[Array, Array]) -> Array:
  """float32 uniforms in (0, 1), one for each key."""
  return rng.uniform(rng.threefry2x32(*keys, np.uint32(0), np.uint32(4))[0])
