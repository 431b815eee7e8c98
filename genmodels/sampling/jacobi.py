"""Jacobi iteration span by span, with every state on the way: greedy text as fixed points, and how it came.

A span of n tokens is guessed (tokens drawn from the text before it), all of it is predicted at once from the
guess, and again from that, until what the predictions are made from stands still: then they are what greedy
decoding gives, whatever was guessed (Santilli et al., arXiv:2305.10427; Song et al., arXiv:2002.03629). The
first i tokens are right after i forwards, so n tokens take at most n. The forward that finds nothing changed
has computed the span's slots from right tokens, and they enter the cache.

`samplers/jacobi` slides its window instead and keeps no state; this is for `genmodels collect`.

Legend: B rows · N tokens of a row · n tokens of a span · K = n − 1 drafts of a forward.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genmodels import rows
from genmodels.contracts import Array, Row, Target, pytree
from genmodels.sampling import draw, speculate, verify
from genmodels.sampling.active import pairs
from genmodels.sampling.drafter import Drafter
from genmodels.sampling.loop import Sampler
from genmodels.sampling.speculate import Speculative, node_keys
from genmodels.sampling.state import put, until

GUESS = 34  # what draws are for, besides those of speculate.py


@dataclasses.dataclass(frozen=True)
class Span(Drafter):
  """Stands for the K tokens of a span that a forward reads; the loop writes them down itself."""


@pytree()
class Progress:
  """A batch of rows on their way.

  Fields:
    tokens: int32[B, N]. length: int32[B], settled tokens: the span begins there. done: bool[B].
    state: int32[B, n], the span's newest state. k: int32[B], forwards of this span so far.
    states: int32[B, N, n], the states that each token went through, −1 where there was none.
    settled_at: int32[B, N], forwards that the token's span took, 0 where it is not settled.
    step: int32. calls: {"prefill", "verify": int32[B]}. cache: entries of coordinates < length − 1, or None.
  """

  tokens: Array
  length: Array
  done: Array
  state: Array
  k: Array
  states: Array
  settled_at: Array
  step: Array
  calls: dict[str, Array]
  cache: Any


@pytree()
class Trajectories:
  """What was decoded, and how.

  Fields:
    tokens: int32[B, N], prompts included. lengths: int32[B], tokens of the row, EOS included.
    states, settled_at: of Progress. A span's fixed point is among its states only where one forward more
      found it unchanged.
    done: bool[B], False only where iteration did not end (arithmetic that differs from call to call).
    greedy: bool[B, N], tokens that one plain forward over the finished row predicts too; all generated ones,
      but for ties that the two programs' rounding breaks differently.
    calls: forwards that a row took part in.
  """

  tokens: Array
  lengths: Array
  states: Array
  settled_at: Array
  done: Array
  greedy: Array
  calls: dict[str, Array]


@dataclasses.dataclass(frozen=True, eq=False)
class SpanIteration(Speculative):
  """Decodes rows by spans; `build` makes it. Its call is that of a Sampler and returns Trajectories."""

  def run(self, params, row: Row, key: Array, prefill: int) -> Trajectories:
    """`__call__` without the host's part; traceable."""
    s = self.begin(params, row, prefill, key)
    n = self.drafter.size + 1
    limit = row.tokens.shape[1] + n

    def more(s: Progress):
      return ~s.done.all() & (s.step < limit)

    s = jax.lax.while_loop(more, lambda s: self.advance(params, row, s, key), s)
    greedy = self.greedy(params, row.replace(tokens=s.tokens), s.length)
    return Trajectories(s.tokens, s.length, s.states, s.settled_at, s.done, greedy, s.calls)

  def begin(self, both, row: Row, prefill: int, key: Array) -> Progress:
    base = super().begin(both, row, prefill)
    (B, N), n = row.tokens.shape, self.drafter.size + 1
    return Progress(
      tokens=base.tokens,
      length=base.length,
      done=base.done,
      state=self.guess(row, key, base.length),
      k=jnp.zeros((B,), jnp.int32),
      states=jnp.full((B, N, n), -1, jnp.int32),
      settled_at=jnp.zeros((B, N), jnp.int32),
      step=jnp.int32(0),
      calls=base.calls,
      cache=base.cache,
    )

  def guess(self, row: Row, key: Array, length: Array) -> Array:
    """int32[B, n]: tokens drawn from those before `length`, by the row's example id."""
    at = length[:, None] + np.arange(self.drafter.size + 1)
    u = draw.uniforms(node_keys(row, key, GUESS, at))
    source = jnp.minimum((u * length[:, None]).astype(jnp.int32), length[:, None] - 1)
    return jnp.take_along_axis(row.tokens, source, 1)

  def advance(self, both, row: Row, s: Progress, key: Array) -> Progress:
    """One forward of every row's span."""
    params, _ = both
    (B, N), K = row.tokens.shape, self.drafter.size
    row = row.replace(tokens=s.tokens)
    total = (row.doc >= 0).sum(1, dtype=jnp.int32)
    ahead = s.length[:, None] + np.arange(K + 1)
    exists = ahead < until(s.done, total)
    drafts = s.state[:, None, :K]
    laid = self.lay(row, s, drafts, jnp.full((B, 1), K, jnp.int32), total)
    out = self.evaluate(params, laid.inputs, laid.slot, laid.can, s.cache)
    now = self.decide(row, key, out.dists[self.term], drafts, None, s.length).token[:, :, 0]

    live = exists & ~self.behind_eos(now)
    # Settled where nothing changes that a prediction is made from: not the last token.
    same = ((now == s.state)[:, :K] | ~live[:, 1:]).all(1) & ~s.done
    taken = live & same[:, None]
    column = jnp.where(s.done, K + 1, s.k)  # beyond the last one: not written
    here = jnp.arange(B)[:, None]
    states = s.states.at[here, jnp.where(exists, ahead, N), column[:, None]].set(s.state, mode="drop")
    length = s.length + taken.sum(1, dtype=jnp.int32)
    tokens = put(s.tokens, ahead, now, taken)
    ended = (taken & (now == self.cfg.eos)).any(1) if self.cfg.eos >= 0 else jnp.zeros((B,), bool)
    node = jnp.broadcast_to(jnp.arange(K + 1, dtype=jnp.int32), (B, K + 1))  # one chain: place i is node i
    went = verify.Walk(now, taken, jnp.where(same, K, -1), jnp.zeros((B,), jnp.int32), node)
    fresh = self.guess(row.replace(tokens=tokens), key, length)
    return Progress(
      tokens=tokens,
      length=length,
      done=s.done | ended | (length >= total),
      state=jnp.where(same[:, None], fresh, now),
      k=jnp.where(same, 0, s.k + 1),
      states=states,
      settled_at=put(s.settled_at, ahead, (s.k + 1)[:, None], taken),
      step=s.step + 1,
      calls=s.calls | {"verify": s.calls["verify"] + ~s.done},
      cache=self.keep(s.cache, out.new, laid, went),
    )

  def greedy(self, both, row: Row, length: Array) -> Array:
    """bool[B, N]: generated tokens that are the likeliest in one uncached forward over the row."""
    params, _ = both
    at = jnp.broadcast_to(rows.coordinates(row.doc), row.doc.shape)
    there = at < length[:, None]
    noise = self.objective.corruption.state(row, row.doc >= 0)
    inputs, read = self.objective.view(row, noise, pairs(self.stream, at, there), self.latent)
    slot = jnp.where(there, read[self.term], -1)
    head = self.objective.terms[self.term].head
    target = Target(head, slot, row.tokens, (slot >= 0).astype(jnp.float32))
    dist = self.model.apply(params, inputs, {self.term: target}).dists[self.term]
    zero = jnp.zeros(at.shape, jnp.uint32)
    return (dist.map(lambda z, a, b: self.choice(z, a, b).token, zero, zero) == row.tokens) & (slot >= 0)


def build(sampler: Sampler, span: int) -> SpanIteration:
  """Iteration of spans with the model of a plain sampler, greedily.

  Raises:
    ConfigError: a sampler whose term is no next-token prediction. ValueError: a span of fewer than 2 tokens.
  """
  if span < 2:
    raise ValueError(f"span is {span}; it has at least 2 tokens")
  plain = dataclasses.replace(sampler, choice=dataclasses.replace(sampler.choice, temperature=0.0))
  made = speculate.build(plain, Span(span - 1), "match")
  return SpanIteration(**{f.name: getattr(made, f.name) for f in dataclasses.fields(made)})
