"""Any-subset speculative decoding (ASSD): the model drafts from its marginals and verifies with its joint.

An any-subset model (AS-ARM, Guo & Ermon 2504.20456) generates the open tokens of a row in one order, by
rank. Each round takes two forwards: queries of the next k ranks see what is committed and give the
marginals q_j, from which k drafts are drawn; then the drafts' contents and the queries behind them, under
the permutation mask, give the joint's factors p_j = p(x_j | committed, drafts before j). Draft j is
accepted with probability min(1, p_j/q_j), the first rejected one is drawn from the residual. The law is
that of one token at a time. The first draft sees the same in both forwards and is always accepted, and one
token more is committed behind the accepted ones, so a round commits at least two: never more forwards than
tokens. The last open token takes one.

Contents see contents of lower rank only, so their keys and values are kept, coded by rank.

Legend: B rows · N tokens of a row · K drafts.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genmodels.config import ConfigError
from genmodels.contracts import CLEAN, Array, Row, Target, pytree
from genmodels.corruption.base import eligible
from genmodels.models import write_cache
from genmodels.sampling import draw, verify
from genmodels.sampling.active import pairs
from genmodels.sampling.cache import POLICIES
from genmodels.sampling.drafter import Drafter
from genmodels.sampling.drafters import drawn
from genmodels.sampling.loop import Sampler
from genmodels.sampling.speculate import DRAFT, VERIFY, node_keys, unadorned
from genmodels.sampling.state import Result, put, until


@dataclasses.dataclass(frozen=True)
class Marginals(Drafter):
  """An any-subset model's own marginals (ASSD); see joint.py."""

  size: int = 5


@pytree()
class Progress:
  """A batch of generations in progress.

  Fields:
    tokens, committed_at: int32[B, N]. rank: int32[B], committed tokens: all of lower rank. done: bool[B].
    cached: int32[B], contents in the cache, all of lower rank. cache.
    step: int32. calls: {"prefill", "draft", "verify": int32[B]}. drafted, accepted: int32[B].
  """

  tokens: Array
  committed_at: Array
  rank: Array
  done: Array
  cached: Array
  cache: Any
  step: Array
  calls: dict[str, Array]
  drafted: Array
  accepted: Array


@dataclasses.dataclass(frozen=True, eq=False)
class Joint(Sampler):
  """A Sampler of an any-subset model that drafts and verifies; `joint.build` makes it.

  Fields:
    size: K.
  """

  size: int = 5

  def prefill_width(self, row: Row) -> int:
    return row.tokens.shape[1]  # the given tokens may lie anywhere

  def run(self, params, row: Row, key: Array, prefill: int) -> Result:
    """`__call__` without the host's part; traceable."""
    noise = self.objective.corruption.state(row, ~eligible(row))
    order = jnp.where(row.doc >= 0, noise.order, row.tokens.shape[1])
    by_rank = jnp.argsort(order, axis=1, stable=True).astype(jnp.int32)
    total = (row.doc >= 0).sum(1, dtype=jnp.int32)
    s = self.begin(params, row, total)

    def more(s: Progress):
      return ~s.done.all() & (s.step < row.tokens.shape[1])

    s = jax.lax.while_loop(more, lambda s: self.round(params, row, s, key, by_rank, total), s)
    committed = (order < s.rank[:, None]) | (row.doc < 0)
    base = super().start(params, row, 0)
    forwards = 1 + s.calls["draft"].max() + s.calls["verify"].max()
    done = base.replace(
      tokens=s.tokens, committed=committed, committed_at=s.committed_at, done=s.done, step=s.step,
      forwards=forwards, calls=s.calls, memory={"drafted": s.drafted, "accepted": s.accepted},
    )  # fmt: skip
    return self.result(row, done)

  def begin(self, params, row: Row, total: Array) -> Progress:
    """The given tokens committed, their contents cached."""
    B, N = row.tokens.shape
    given = ~eligible(row) & (row.doc >= 0)
    rank = given.sum(1, dtype=jnp.int32)
    zero = jnp.zeros((B,), jnp.int32)
    at = jnp.broadcast_to(jnp.arange(N, dtype=jnp.int32), (B, N))
    cache = self.model.init_cache(B, N)
    _, new = self.call(params, row, cache, at, given)
    cache = write_cache(cache, new, given)
    return Progress(
      tokens=row.tokens,
      committed_at=jnp.full((B, N), -1, jnp.int32),
      rank=rank,
      done=rank >= total,
      cached=rank,
      cache=cache,
      step=jnp.int32(0),
      calls={"prefill": (rank > 0).astype(jnp.int32), "draft": zero, "verify": zero},
      drafted=zero,
      accepted=zero,
    )

  def call(self, params, row: Row, cache, content: Array, there: Array, ask=None, can=None):
    """(Dist of the tokens at coordinates `ask` int32[B, M], keys and values of the call's slots: contents
    first).

    Args:
      content: int32[B, C], coordinates of contents; there: bool[B, C]. can: bool[B, M].
    """
    streams, term = self.objective.layout.streams, self.objective.terms[self.term]
    only, targets = pairs(streams.index(CLEAN), content, there), {}
    # A query is a mask, whatever has been drafted for its token; ranks are those of the prompt.
    noise = self.objective.corruption.state(row, ~eligible(row))
    if ask is not None:
      only = jnp.concatenate([only, pairs(streams.index(term.stream), ask, can)], 1)
    inputs, read = self.objective.view(row, noise, only, self.latent)
    if ask is not None:
      slot = jnp.where(can, jnp.take_along_axis(read[self.term], ask, 1), -1)
      targets[self.term] = Target(term.head, slot, slot * 0, can.astype(jnp.float32))
    out = self.model.apply(params, inputs, targets, cache=cache)
    return out.dists.get(self.term), out.new

  def round(self, params, row: Row, s: Progress, key: Array, by_rank: Array, total: Array) -> Progress:
    """Draft, verify, commit."""
    N, K = row.tokens.shape[1], self.size
    row = row.replace(tokens=s.tokens)
    ranks = s.rank[:, None] + np.arange(K + 1)
    at = jnp.take_along_axis(by_rank, jnp.minimum(ranks, N - 1), 1)
    exists = ranks < until(s.done, total)

    newest = jnp.take_along_axis(by_rank, jnp.minimum(s.cached, N - 1)[:, None], 1)
    fresh = ((s.cached < s.rank) & ~s.done)[:, None]
    dist, new = self.call(params, row, s.cache, newest, fresh, at[:, :K], exists[:, :K])
    cache = write_cache(s.cache, new, jnp.pad(fresh, ((0, 0), (0, K))))
    keys = draw.token_keys(draw.row_keys(row, key, DRAFT, s.rank), at[:, :K])
    tokens, q = dist.map(functools.partial(drawn, self.choice), *keys)

    # With one token left there is nothing to verify: its marginal is the joint.
    many = exists[:, 1]
    verified = lambda: self.verify(params, row, cache, key, s.rank, at, exists, tokens, q)
    alone = lambda: (
      verify.Walk(
        jnp.pad(tokens, ((0, 0), (0, 1))),
        exists,
        exists[:, 0].astype(jnp.int32),
        s.rank * 0,
        jnp.zeros(exists.shape, jnp.int32),
      ),
      cache,
    )
    went, cache = jax.lax.cond(many.any(), verified, alone)
    taken = went.taken & exists
    now = put(s.tokens, at, went.tokens, taken)
    rank = s.rank + taken.sum(1, dtype=jnp.int32)
    noise = self.objective.corruption.state(row, ~eligible(row))
    committed = (noise.order < rank[:, None]) | (row.doc < 0)
    return Progress(
      tokens=now,
      committed_at=put(s.committed_at, at, s.step, taken),
      rank=rank,
      done=s.done | (rank >= total) | self.ended(row, now, committed),
      cached=jnp.where(s.done, s.cached, s.rank + went.accepted),
      cache=cache,
      step=s.step + 1,
      calls=s.calls | {"draft": s.calls["draft"] + ~s.done, "verify": s.calls["verify"] + many},
      drafted=s.drafted + exists[:, :K].sum(1, dtype=jnp.int32),
      accepted=s.accepted + jnp.where(s.done, 0, went.accepted),
    )

  def verify(self, params, row, cache, key, rank, at, exists, tokens, q):
    """The walk along the drafts, and the cache with the contents of those accepted."""
    K = self.size
    filled = row.replace(tokens=put(row.tokens, at[:, :K], tokens, exists[:, :K]))
    dist, new = self.call(params, filled, cache, at[:, :K], exists[:, :K], at, exists)
    rule = verify.Match() if self.choice.temperature == 0 else verify.Rejection()
    # Draws are keyed by rank: how many tokens are before it.
    own = node_keys(row, key, draw.TOKEN, rank[:, None] + np.arange(K + 1))
    pad = lambda x: jnp.pad(x, ((0, 0), (0, 1)) + ((0, 0),) * (x.ndim - 2))
    judge = lambda z, x, q, k0, k1: rule(self.choice, z, x, q, k0, k1)
    found = dist.map(judge, pad(tokens)[..., None], pad(q), *own)
    found = found.replace(accept=found.accept.at[:, 0].set(1.0))  # both forwards give the first one's law
    u = draw.uniforms(node_keys(row, key, VERIFY, rank[:, None] + np.arange(K + 1)))[..., None]
    count = jnp.full((len(rank), 1), K, jnp.int32)
    went = verify.walk(found, tokens[:, None], count, u, exists)
    kept = (np.arange(K) < went.accepted[:, None]) & exists[:, :K]
    return went, write_cache(cache, new, jnp.pad(kept, ((0, 0), (0, K + 1))))


def build(sampler: Sampler, drafter: Marginals) -> Joint:
  """Speculative decoding of an any-subset model.

  Raises:
    ConfigError: another model.
  """
  term, relations = sampler.objective.terms[sampler.term], sampler.objective.relations.values()
  want = {(term.stream, CLEAN): "ORD_LT", (CLEAN, CLEAN): "ORD_LE"}
  if term.align != "same" or any(dict(r.table) != want for r in relations):
    raise ConfigError(
      "marginals and joint of one network are those of an any-subset model (masks='any_subset')",
      key="sampler.draft", value="marginals", fix="language/as_arm, or another drafter",
    )  # fmt: skip
  if drafter.size < 2:
    raise ConfigError(
      "a round of two forwards drafts two tokens at least", key="sampler.draft.size", value=drafter.size,
      fix="size=5",
    )  # fmt: skip
  unadorned(sampler)
  if sampler.cfg.cache == "none":
    raise ConfigError(
      "what is committed is read from the cache, under its rank", key="sampler.cache", value="none",
      fix="sampler.cache='auto'",
    )  # fmt: skip
  fields = {f.name: getattr(sampler, f.name) for f in dataclasses.fields(Sampler)}
  fields["policy"] = POLICIES["causal_exact"]  # causal in the order of generation
  return Joint(**fields, size=drafter.size)
