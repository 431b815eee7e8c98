"""A masked diffusion model drafts for an autoregressive one (DiffuSpec, Li et al. 2510.02358).

One forward of the denoiser over K masks behind the committed tokens gives a lattice: the likeliest M tokens
of each place, independent of each other. A beam search from left to right picks a path that is also
consistent in causal order, by a bigram model of the row's own committed tokens. How many tokens are
proposed follows how many were accepted. The constants are not those of the paper, which has no public code
(unverified).

Legend: B rows · N tokens of a row · K places · M tokens of a place · W beams.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genmodels.config import ConfigError
from genmodels.contracts import Array, Row, Target
from genmodels.sampling.active import pairs
from genmodels.sampling.drafter import Context, Draft, Drafter, Seen


def bigrams(tokens: Array, length: Array, last: Array, candidates: Array, vocab: int) -> Array:
  """ln p(candidate | last) float32[B, W, M] of the first `length` tokens of rows [B, N].

  Counts of pairs, smoothed by the smoothed counts of single tokens: (c(a, b) + p(b))/(c(a) + 1).

  Args:
    last: int32[B, W]. candidates: int32[B, M].
  """
  here = jnp.arange(tokens.shape[1])[None] < length[:, None]
  first = (tokens[:, None] == last[..., None]) & here[:, None]
  of = (tokens[:, None] == candidates[..., None]) & here[:, None]
  first, of = first.astype(jnp.float32), of.astype(jnp.float32)
  both = jnp.einsum("bwn,bmn->bwm", first[..., :-1], of[..., 1:])
  single = (of.sum(-1) + 1) / (length[:, None] + vocab)
  # The newest token starts no pair yet.
  starts = first.sum(-1) - (last == jnp.take_along_axis(tokens, length[:, None] - 1, 1))
  return jnp.log((both + single[:, None]) / (starts[..., None] + 1))


def search(ids: Array, logp: Array, start: Array, proxy, weight: float, beams: int) -> Array:
  """int32[B, K], the best path of a lattice by Σ_i logp_i(x_i) + weight·proxy(x_i | x_{i−1}).

  Args:
    ids, logp: [B, K, M]. start: int32[B], the token before the first place.
    proxy: (last int32[B, W], candidates int32[B, M]) → float32[B, W, M].
    beams: W, paths kept at each place; min(W, M^K) of them exist.
  """
  (B, K, M), W = ids.shape, beams

  def place(carry, x):
    score, last, paths, i = carry
    ids, logp = x
    total = score[..., None] + logp[:, None]
    if weight:
      total = total + weight * proxy(last, ids)
    score, best = jax.lax.top_k(total.reshape(B, W * M), W)
    token = jnp.take_along_axis(ids, best % M, 1)
    paths = jnp.take_along_axis(paths, (best // M)[..., None], 1)
    return (score, token, jnp.where(jnp.arange(K) == i, token[..., None], paths), i + 1), None

  only = jnp.where(jnp.arange(W) == 0, 0.0, -jnp.inf)
  carry = (
    jnp.broadcast_to(only, (B, W)),
    jnp.broadcast_to(start[:, None], (B, W)),
    jnp.zeros((B, W, K), jnp.int32),
  )
  lattice = ids.swapaxes(0, 1), logp.swapaxes(0, 1)
  return jax.lax.scan(place, (*carry, 0), lattice)[0][2][:, 0]


@dataclasses.dataclass(frozen=True)
class DiffuSpec(Drafter):
  """A masked diffusion model as drafter.

  Fields:
    path: workdir of its run; the tokenizer is the target's.
    top: M, tokens of a place. beams: W. weight: of the causal proxy, 0 takes the likeliest tokens.
    adaptive: propose the running mean of what was accepted and `margin` tokens more, not all K.
    decay, margin: of the running mean.
    denoiser: Sampler of that run, filled in by `load`; eos: the target's.
  """

  size: int = 8
  path: str = ""
  top: int = 4
  beams: int = 4
  weight: float = 0.5
  adaptive: bool = True
  decay: float = 0.7
  margin: int = 2
  denoiser: Any = None
  eos: int = -2

  forwards = 1

  def __post_init__(self):
    if min(self.top, self.beams, self.margin) < 1:
      raise ValueError(f"top is {self.top}, beams {self.beams}, margin {self.margin}; at least 1")
    if not 0 <= self.decay < 1:
      raise ValueError(f"decay is {self.decay}; expected 0 <= decay < 1")

  def load(self, load):
    if not self.path or load is None:
      raise ConfigError(
        "the drafting model has no run", key="sampler.draft.path", value=self.path,
        fix="sampler.draft.path=<workdir of a masked diffusion run>",
      )  # fmt: skip
    denoiser, params = load(self.path)
    return dataclasses.replace(self, denoiser=denoiser), params

  def bind(self, sampler):
    other = self.denoiser
    if (
      not other.whole
      or not other.denoises
      or other.objective.terms[other.term].align == "shift_clean_boundary"
    ):
      raise ConfigError(
        "the drafting model does not denoise whole documents", key="sampler.draft.path", value=self.path,
        fix="a run of language/mdlm, llada or dream, or draft='tidar' for a model with both streams",
      )  # fmt: skip
    top = min(self.top, other.model.cfg.vocab - 1)
    return dataclasses.replace(self, eos=sampler.cfg.eos, top=top)

  def start(self, params, own, row: Row, length: Array):
    return jnp.full((len(length),), float(self.size), jnp.float32)

  def lattice(self, own, row: Row, length: Array) -> tuple[Array, Array]:
    """ids int32[B, K, M] and their log-probabilities, from one forward over tokens and K masks behind
    them."""
    other, (B, N), K = self.denoiser, row.tokens.shape, self.size
    at = jnp.broadcast_to(jnp.arange(N, dtype=jnp.int32), (B, N))
    noise = other.objective.corruption.state(row, at < length[:, None])
    inputs, read = other.view(row, noise, pairs(other.stream, at, at < length[:, None] + K), 0)
    ask = length[:, None] + np.arange(K)
    slot = jnp.take_along_axis(read[other.term], jnp.minimum(ask, N - 1), 1)
    slot = jnp.where(ask < (row.doc >= 0).sum(1)[:, None], slot, -1)
    target = Target(other.objective.terms[other.term].head, slot, slot * 0, (slot >= 0).astype(jnp.float32))
    dist = other.model.apply(own, inputs, {other.term: target}).dists[other.term]

    def best(logits):
      logp, ids = jax.lax.top_k(jax.nn.log_softmax(other.choice.logits(logits), -1), self.top)
      return ids.astype(jnp.int32), logp

    return dist.map(best)

  def draft(self, params, own, context: Context, mean):
    row, n = context.row, context.length
    ids, logp = self.lattice(own, row, n)
    newest = jnp.take_along_axis(row.tokens, n[:, None] - 1, 1)[:, 0]
    vocab = self.denoiser.model.cfg.vocab
    proxy = lambda last, candidates: bigrams(row.tokens, n, last, candidates, vocab)
    tokens = search(ids, logp, newest, proxy, self.weight, self.beams)
    count = jnp.full_like(n, self.size)
    if self.adaptive:
      count = jnp.minimum(count, jnp.ceil(mean).astype(jnp.int32) + self.margin)
    if self.eos >= 0:  # nothing behind an end is proposed
      is_end = tokens == self.eos
      count = jnp.minimum(count, jnp.where(is_end.any(1), jnp.argmax(is_end, 1) + 1, self.size))
    return Draft(tokens, count=count), mean

  def observe(self, params, own, seen: Seen, mean):
    accepted = seen.accepted.astype(jnp.float32)
    return jnp.where(seen.active, self.decay * mean + (1 - self.decay) * accepted, mean)
