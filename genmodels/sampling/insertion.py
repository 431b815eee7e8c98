"""Decoding by insertion: one token a step, anywhere (insertion language models, Patel et al. 2505.05755).

A new token is put physically last and carries its place among the tokens explicitly; all places behind it
move up by one. Keys rotate with their places, so nothing is cached.

Legend: B rows · N tokens of a row.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genmodels.config import ConfigError
from genmodels.contracts import CONTEXT, Array, Row, Target, pytree
from genmodels.corruption.base import eligible
from genmodels.sampling import cache, draw
from genmodels.sampling.state import Result, calls_of


@pytree()
class State:
  """A batch of texts that grow.

  Fields:
    tokens, there, at: [B, N] in physical order: ids, whether the slot is filled, the step it was (−1 given).
    place: int32[B, N], place of the token in the text. done: bool[B]. step: int32.
  """

  tokens: Array
  there: Array
  at: Array
  place: Array
  done: Array
  step: Array


@dataclasses.dataclass(frozen=True, eq=False)
class InsertionSampler:
  """A sampler with the call of `Sampler`: one (gap, token) a step from their joint softmax.

  Insertions are allowed behind the last token of the leading prompt and behind everything after it; tokens
  given further on (a suffix) may be told to the model by CONTEXT tokens behind the open ones.

  Fields:
    cfg: SamplerConfig; temperature and top_k apply to the joint softmax's tokens, temperature also to gaps.
    threshold: probability of being complete at which a text stops, or None: stopping is drawn.
  """

  cfg: Any
  objective: Any
  model: Any
  choice: draw.Choice
  threshold: float | None = None

  policy = cache.POLICIES["none"]

  def __post_init__(self):
    object.__setattr__(self, "_jitted", jax.jit(self.run))

  def __call__(self, params, row: Row, key: Array, prefill: int | None = None) -> Result:
    """Fills the TEXT tokens of rows of one document, or fewer; see `Sampler.__call__`.

    Raises:
      ValueError: a row without a given first token.
    """
    del prefill  # nothing is cached
    if not np.asarray(row.role[:, 0] == CONTEXT).all():
      raise ValueError("insertions are behind a token: start every prompt with BOS (role CONTEXT)")
    return self._jitted(params, row, key)

  def run(self, params, row: Row, key: Array) -> Result:
    there = (row.doc >= 0) & ~eligible(row)
    place = jnp.cumsum(there, 1) - 1
    empty = jnp.full(row.tokens.shape, -1, jnp.int32)
    full = ~eligible(row).any(1)
    s = State(row.tokens, there, empty, jnp.where(there, place, 0), full, jnp.int32(0))
    s = jax.lax.while_loop(lambda s: ~s.done.all(), lambda s: self.step(params, row, s, key), s)
    return self.result(row, s)

  def scores(self, params, row: Row, s: State, fn, xs=()):
    """fn over the logits of every gap that is open, and log p(complete) float32[B].

    Args:
      fn: (logits float32[c, V], *chunks of xs) → pytree of [c, …]. xs: arrays [B, N, …].

    Returns:
      fn's pytree of [B, N, …], bool[B, N] the gaps, and log p(stop).
    """
    o = self.objective
    row = row.replace(tokens=s.tokens)
    noise = o.corruption.state(row, s.there)
    inputs, read = o.view(row, noise.replace(order=s.place))
    # The leading prompt is closed, up to its last token.
    lead = jnp.cumprod((row.role == CONTEXT).astype(jnp.int32), 1).sum(1, keepdims=True)
    gap = s.there & (s.place >= lead - 1)
    ask = lambda term, on: Target(
      o.terms[term].head, jnp.where(on, read[term], -1), s.tokens, on.astype(jnp.float32)
    )
    first = jnp.arange(row.tokens.shape[1])[None] == 0
    targets = {o.insert: ask(o.insert, gap), o.stop: ask(o.stop, s.there & first)}
    dists = self.model.apply(params, inputs, targets).dists
    stop = dists[o.stop].map(lambda z: jax.nn.log_softmax(z, -1)[:, 1])[:, 0]
    return dists[o.insert].map(fn, *xs), gap, stop

  def step(self, params, row: Row, s: State, key: Array) -> State:
    """One insertion in every row that goes on."""
    B, N = s.tokens.shape
    keys = draw.row_keys(row, key, draw.TOKEN, s.there.sum(1))
    each = draw.token_keys(keys, jnp.broadcast_to(jnp.arange(N), (B, N)))

    def best(logits, k0, k1):
      """The largest perturbed logit: its maximum over gaps draws from the joint softmax."""
      z = self.choice.logits(logits)
      if self.choice.temperature > 0:
        z = draw.top_k_filter(z / self.choice.temperature, self.choice.top_k)
        z = z + draw.gumbel(k0, k1, z.shape[-1])
      return jnp.argmax(z, -1).astype(jnp.int32), z.max(-1)

    (token, value), gap, stop = self.scores(params, row, s, best, each)
    where = jnp.argmax(jnp.where(gap, value, -jnp.inf), 1)
    take = lambda x: jnp.take_along_axis(x, where[:, None], 1)[:, 0]
    u = draw.uniforms(draw.row_keys(row, key, draw.TIME, s.there.sum(1)))
    complete = jnp.exp(stop) >= (u if self.threshold is None else self.threshold)
    goes = ~s.done & ~complete
    new = jnp.argmax(eligible(row) & ~s.there, 1)  # the next physical slot
    place = take(s.place) + 1
    here = (jnp.arange(N)[None] == new[:, None]) & goes[:, None]
    behind = s.there & (s.place >= place[:, None]) & goes[:, None]
    there = s.there | here
    return State(
      tokens=jnp.where(here, take(token)[:, None], s.tokens),
      there=there,
      at=jnp.where(here, s.step, s.at),
      place=jnp.where(here, place[:, None], s.place + behind),
      done=s.done | complete | ~(eligible(row) & ~there).any(1),
      step=s.step + 1,
    )

  def result(self, row: Row, s: State) -> Result:
    """The texts in order."""
    by = jnp.argsort(jnp.where(s.there, s.place, s.tokens.shape[1]), axis=1, stable=True)
    sort = lambda x: jnp.take_along_axis(x, by, 1)
    length = s.there.sum(1, dtype=jnp.int32)
    zero = jnp.zeros(s.tokens.shape, jnp.float32)
    calls = calls_of(s.at)
    calls["denoise"] += (eligible(row) & ~s.there).any(1)  # one more call, which found the text complete
    return Result(sort(s.tokens), sort(s.at), zero, length, s.done, s.step, s.step, calls, {})


def build(cfg, objective, model, choice: draw.Choice) -> InsertionSampler:
  """The sampler of an insertion model.

  Raises:
    ConfigError: settings without a meaning here.
  """
  for name, off in (("sub_block", 0), ("block", 0)):
    if getattr(cfg, name) != off:
      raise ConfigError(
        "insertion has no blocks", key=f"sampler.{name}", value=getattr(cfg, name), fix=f"{name}={off}"
      )
  if cfg.top_p < 1 or not cfg.guidance.off or cfg.cache not in ("auto", "none"):
    raise ConfigError(
      "the joint softmax over gaps and tokens has no nucleus, guidance or cache",
      key="sampler", value={"top_p": cfg.top_p, "cache": cfg.cache}, fix="top_p=1, cache='none', no guidance",
    )  # fmt: skip
  return InsertionSampler(cfg, objective, model, choice)
