"""Decoding in a generation order that is known beforehand, with an exact cache.

The corruption's `plan` says in which order the open tokens of a row come and how many of them, at the
front, may be decoded several at a time: diffusion; the rest follow one by one. A call computes the clean
slots of what was committed last and the noisy slots of what is decoded now, nothing else. Where clean slots
see earlier ranks only, their keys and values are final as soon as they are computed, during diffusion too
(Sahoo et al., "Esoteric Language Models", 2506.01928). Any-subset models (Guo & Ermon, 2504.20456) decode one
by one.

Legend: B rows · N tokens of a row · W tokens of a step · A slots of a call.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genmodels.config import ConfigError
from genmodels.contracts import CLEAN, Array, Row, Target, pytree
from genmodels.corruption.base import eligible
from genmodels.masks.relations import parse
from genmodels.models import write_cache
from genmodels.sampling import cache, draw
from genmodels.sampling.state import Result, at_coordinate, calls_of, eos_at, first_where


@pytree()
class State:
  """A batch of generations.

  Fields:
    tokens, committed, at: [B, N]; at is the step of a commit, −1 for given or open tokens.
    fresh: int32[B], tokens committed last, not in the cache yet. cache: or
      None. done: bool[B]. step, forwards: int32.
  """

  tokens: Array
  committed: Array
  at: Array
  fresh: Array
  cache: Any
  done: Array
  step: Array
  forwards: Array


@dataclasses.dataclass(frozen=True, eq=False)
class OrderedSampler:
  """A sampler with the call of `Sampler`, for objectives whose corruption has a `plan`.

  Each token of the diffusion part comes in a uniformly drawn one of `steps` steps, as in ancestral sampling;
  of those that come together at most W do, the others in the next call.

  Fields:
    cfg: SamplerConfig. term: the term that decodes. steps: of diffusion. policy: CachePolicy.
  """

  cfg: Any
  objective: Any
  model: Any
  term: str
  choice: draw.Choice
  steps: int
  policy: cache.CachePolicy

  def __post_init__(self):
    object.__setattr__(self, "_jitted", jax.jit(self.run))
    object.__setattr__(self, "_clean", self.objective.layout.streams.index(CLEAN))
    object.__setattr__(
      self, "_noisy", self.objective.layout.streams.index(self.objective.terms[self.term].stream)
    )

  def __call__(self, params, row: Row, key: Array, prefill: int | None = None) -> Result:
    """Generates the TEXT tokens of rows of one document each; given ones may stand anywhere.

    Raises:
      ValueError: a row with several documents.
    """
    del prefill  # the given tokens of a row are one call
    if np.asarray(row.doc).max() > 0:
      raise ValueError("a row to generate holds one document (index 0), then padding (−1)")
    return self._jitted(params, row, key)

  @property
  def cached(self) -> bool:
    return self.policy.stores

  def width(self, row: Row) -> int:
    """W, twice the mean of a step (static)."""
    N = row.tokens.shape[1]
    return min(N, -(-2 * N // self.steps))

  def run(self, params, row: Row, key: Array) -> Result:
    s = self.start(params, row)
    s = jax.lax.while_loop(lambda s: ~s.done.all(), lambda s: self.step(params, row, s, key), s)
    return self.result(row, s)

  def start(self, params, row: Row) -> State:
    """The state before the first step: what is given is in the cache."""
    B, N = row.tokens.shape
    given = ~eligible(row)
    kept = None
    if self.cached:
      keep = given & (row.doc >= 0)
      at = jnp.broadcast_to(jnp.arange(N, dtype=jnp.int32), (B, N))
      inputs, _ = self.view(row, given, pairs(self._clean, at, keep))
      kept = self.model.init_cache(B, N)
      kept = write_cache(kept, self.model.apply(params, inputs, {}, cache=kept).new, keep)
    zero = jnp.zeros((B,), jnp.int32)
    one = jnp.int32(self.cached)
    return State(
      row.tokens, given, jnp.full((B, N), -1, jnp.int32), zero, kept, given.all(1), jnp.int32(0), one
    )

  def view(self, row: Row, committed: Array, only: Array):
    return self.objective.view(row, self.objective.corruption.state(row, committed), only)

  def now(self, row: Row, s: State, key: Array) -> tuple[Array, Array]:
    """The next tokens: coordinates int32[B, W], and which of them are decoded bool[B, W]."""
    order, parallel = self.objective.corruption.plan(row)
    (B, N), W = order.shape, self.width(row)
    j = jnp.arange(N, dtype=jnp.int32)
    done = (s.committed & eligible(row)).sum(1)[:, None]
    # Every token of the diffusion part has a step of its own, uniform: counts are multinomial, and none is 0.
    keys = draw.row_keys(row, key, draw.REVEAL, jnp.int32(0))
    u = draw.uniforms(draw.token_keys(keys, jnp.broadcast_to(j, (B, N))))
    when = jnp.sort(jnp.where(j < parallel[:, None], jnp.floor(u * self.steps), jnp.inf), 1)
    alike = (j >= done) & (when == at_coordinate(when, done))
    count = jnp.where(done < parallel[:, None], jnp.minimum(alike.sum(1, keepdims=True), W), 1)
    count = jnp.where(s.done[:, None], 0, jnp.minimum(count, eligible(row).sum(1, keepdims=True) - done))
    first = ((row.doc >= 0) & s.committed).sum(1, keepdims=True)
    return self.at_rank(row, order, first), jnp.arange(W) < count

  def at_rank(self, row: Row, order: Array, first: Array) -> Array:
    """int32[B, W]: coordinates of the tokens of ranks first, first + 1, …; first int32[B, 1]."""
    N = order.shape[1]
    by = jnp.argsort(jnp.where(row.doc >= 0, order, N), axis=1).astype(jnp.int32)
    return at_coordinate(by, first + jnp.arange(self.width(row)))

  def ask(self, row: Row, s: State, at: Array, use: Array):
    """(Inputs, slot int32[B, W] that predicts each token, keep bool[B, A]) of a call."""
    B, N = row.tokens.shape
    W = at.shape[1]
    row = row.replace(tokens=s.tokens)
    if self.cached:
      first = ((row.doc >= 0) & s.committed).sum(1) - s.fresh
      past = self.at_rank(row, self.objective.corruption.plan(row)[0], first[:, None])
      on = jnp.arange(W) < s.fresh[:, None]
    else:
      past = jnp.broadcast_to(jnp.arange(N, dtype=jnp.int32), (B, N))
      on = s.committed & (row.doc >= 0)
    only = jnp.concatenate([pairs(self._clean, past, on), pairs(self._noisy, at, use)], 1)
    inputs, read = self.view(row, s.committed, only)
    slot = jnp.where(use, at_coordinate(read[self.term], at), -1)
    return inputs, slot, jnp.concatenate([on, jnp.zeros_like(use)], 1)

  def predict(self, params, row: Row, s: State, at: Array, use: Array, fn, xs):
    """fn over the logits of the asked tokens (pytree of [B, W, …]), and the cache behind the call."""
    inputs, slot, keep = self.ask(row, s, at, use)
    head = self.objective.terms[self.term].head
    target = Target(head, slot, jnp.zeros_like(slot), use.astype(jnp.float32))
    out = self.model.apply(params, inputs, {self.term: target}, cache=s.cache)
    kept = write_cache(s.cache, out.new, keep) if self.cached else None
    return out.dists[self.term].map(fn, *xs), kept

  def step(self, params, row: Row, s: State, key: Array) -> State:
    """Decodes the next tokens of every row."""
    at, use = self.now(row, s, key)
    keys = draw.token_keys(draw.row_keys(row, key, draw.TOKEN, s.committed.sum(1)), at)
    picked, kept = self.predict(params, row, s, at, use, self.choice, keys)
    N = row.tokens.shape[1]
    rows_, target = jnp.arange(at.shape[0])[:, None], jnp.where(use, at, N)
    put = lambda x, v: x.at[rows_, target].set(v, mode="drop")
    tokens, committed = put(s.tokens, picked.token), put(s.committed, True)
    return State(
      tokens=tokens,
      committed=committed,
      at=put(s.at, s.step),
      fresh=use.sum(1, dtype=jnp.int32),
      cache=kept,
      done=s.done
      | committed.all(1)
      | (eos_at(self.cfg.eos, row, tokens, committed) < first_where(~committed)),
      step=s.step + 1,
      forwards=s.forwards + 1,
    )

  def result(self, row: Row, s: State) -> Result:
    """What a state has generated so far."""
    open_at, eos = first_where(~s.committed), eos_at(self.cfg.eos, row, s.tokens, s.committed)
    total = (row.doc >= 0).sum(1, dtype=jnp.int32)
    lengths = jnp.where(eos < open_at, eos + 1, jnp.minimum(open_at, total))
    zero = jnp.zeros(s.tokens.shape, jnp.float32)
    calls = calls_of(s.at, int(self.cached))
    return Result(s.tokens, s.at, zero, lengths, s.done, s.step, s.forwards, calls, {})


def pairs(stream: int, at: Array, keep: Array) -> Array:
  """int32[B, A, 2] of (stream, coordinate), empty where not kept."""
  return jnp.where(keep[..., None], jnp.stack([jnp.full_like(at, stream), at], -1), -1)


def build(cfg, objective, model, name: str, choice: draw.Choice) -> OrderedSampler:
  """The sampler of an objective with a generation order.

  Raises:
    ConfigError: settings without a meaning here, or a cache that would not be exact.
  """
  for key, off in (("sub_block", 0), ("block", 0)):
    if getattr(cfg, key) != off:
      raise ConfigError(
        "the generation order has no blocks",
        key=f"sampler.{key}",
        value=getattr(cfg, key),
        fix=f"{key}={off}",
      )
  if not cfg.guidance.off:
    raise ConfigError("no conditions to drop", key="sampler.guidance", value=cfg.guidance, fix="guidance=1")
  causal = (((("ORD_LE", 0),)),)
  own = [
    dict(r.table).get((CLEAN, CLEAN), "") for p, r in objective.relations.items() if p in model.cfg.patterns
  ]
  exact = all(parse(r) == causal for r in own)
  if cfg.cache not in ("auto", "none", "causal_exact") or (cfg.cache == "causal_exact" and not exact):
    raise ConfigError(
      "the cache would not be exact: shown tokens see tokens that are committed later", key="sampler.cache",
      value=cfg.cache, fix="'none', or a mask that is causal in generation order",
    )  # fmt: skip
  steps = getattr(cfg.quota, "steps", 1)
  policy = cache.POLICIES["causal_exact" if exact and cfg.cache != "none" else "none"]
  return OrderedSampler(cfg, objective, model, name, choice, steps, policy)
