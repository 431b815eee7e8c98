"""Active sets: which tokens one call computes, asks for, and keeps.

An active set turns a state into an Ask. It is the only part of the loop that knows where the front of a row
is, what lies before it, and when something may enter the cache: when, and only when, everything that its
slot sees is committed.

Legend: B rows · N tokens of a row · W tokens of a unit that are asked for · M asked (W, and the next token)
· A slots of a call · G groups of asked tokens.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from genmodels import rows
from genmodels.config import ConfigError
from genmodels.contracts import Array, Noise, Row
from genmodels.corruption.base import eligible
from genmodels.sampling.state import Ask, State, at_coordinate, first_where, until


def pairs(stream: Array, at: Array, keep: Array) -> Array:
  """int32[B, A, 2] from a stream (broadcast) and a coordinate per slot; empty where not kept."""
  pair = jnp.stack([jnp.broadcast_to(stream, at.shape).astype(jnp.int32), at], -1)
  return jnp.where(keep[..., None], pair, -1)


@dataclasses.dataclass(frozen=True)
class Units:
  """One unit of a row at a time: a document, a block, a scale or a token; or its sub-blocks left to right
  (`sampler.sub_block`, LLaDA's block length, Nie et al. 2502.09992 §B.4).

  While a unit has masked tokens, calls are over its noisy slots; then one call over its clean slots enters
  the cache and, with a shifted head, predicts the first token behind it.
  """

  groups = 1  # parts of the asked tokens with a quota of their own

  def check(self, sampler) -> None:
    """Raises ConfigError where the active set does not fit the sampler's objective."""

  # -- geometry -------------------------------------------------------------------------------------

  def units(self, sampler, row: Row, noise: Noise) -> tuple[Array, Array]:
    """The unit of every token as an interval, int32[B, N] each."""
    if sampler.whole:
      return rows.doc_bounds(row.doc)
    if not sampler.single:
      return noise.blk_lo, noise.blk_hi
    n = jnp.broadcast_to(rows.coordinates(row.doc), row.doc.shape)
    return n, n + 1

  def width(self, sampler, row: Row) -> int:
    """Slots of the front in a call (static)."""
    N = row.tokens.shape[1]
    return min(sampler.capacity, N) if sampler.capacity else N

  def window(self, sampler, row: Row) -> int:
    """Tokens of the front that a call asks for (static): a sub-block, or all; none if a unit is one token
    that predicts the next."""
    if sampler.single:
      return 0
    width = self.width(sampler, row)
    return min(sampler.cfg.sub_block, width) if sampler.cfg.sub_block else width

  def asked(self, sampler, row: Row) -> int:
    """M, tokens that a call asks for (static)."""
    return self.window(sampler, row) + sampler.lead

  def start(self, sampler, row: Row, noise: Noise | None = None) -> Array:
    """int32[B]: how many given tokens precede the first front. All whole units, but one where its slots
    predict the first open token. The noise is that of the row as it is given."""
    if sampler.store is None:
      return jnp.zeros(row.doc.shape[:1], jnp.int32)
    committed = jnp.logical_not(eligible(row))
    noise = sampler.objective.corruption.state(row, committed) if noise is None else noise
    lo, _ = self.units(sampler, row, noise)
    whole = at_coordinate(lo, first_where(~committed))
    if sampler.lead:
      whole = jnp.where(whole > 0, at_coordinate(lo, whole - 1), 0)
    return jnp.where(committed.all(1), 0, whole)

  # -- a call ---------------------------------------------------------------------------------------

  def ask(self, sampler, row: Row, s: State) -> Ask:
    """What the next step computes."""
    B, N = row.tokens.shape
    row = row.replace(tokens=s.tokens)
    open_ = ~s.committed
    noise = sampler.noise(row, s)
    unit_lo, unit_hi = self.units(sampler, row, noise)
    lo, hi = at_coordinate(unit_lo, s.cursor), at_coordinate(unit_hi, s.cursor)
    first = first_where(open_)
    denoise = ((first < hi) | s.busy) & ~s.done & sampler.denoises
    wlo, whi = lo, hi
    if length := sampler.cfg.sub_block:
      origin = jnp.maximum(lo, first_where(eligible(row)))
      wlo = origin + jnp.maximum(first - origin, 0) // length * length
      wlo = jnp.where(s.busy, s.unit, jnp.where(denoise, wlo, lo))
      whi = jnp.minimum(wlo + length, hi)

    at = lo[:, None] + jnp.arange(self.width(sampler, row), dtype=jnp.int32)
    use = at < until(s.done, hi)
    keep = jnp.zeros_like(use)
    if sampler.store is None:
      only = pairs(jnp.full((B, 1), sampler.stream), at, use)
    else:
      only = pairs(jnp.where(denoise, sampler.stream, sampler.store)[:, None], at, use)
      keep = use & ~denoise[:, None]
      only, keep = self.with_past(sampler, row, only, keep, lo, s.done)

    ask = wlo[:, None] + jnp.arange(self.window(sampler, row), dtype=jnp.int32)
    valid = ask < until(s.done, whi)
    if sampler.lead:
      ask = jnp.concatenate([ask, hi[:, None]], 1)
      valid = jnp.concatenate([valid, ((hi < N) & ~s.done)[:, None]], 1)
    fresh = denoise & (s.unit != wlo)
    if sampler.quota.timed:
      level = jnp.where(fresh, 1.0, s.level)[:, None, None]
      noise = noise.replace(level=jnp.where(noise.hit, level, noise.level))
    slot, can, inputs = self.read(sampler, row, s, noise, only, ask, valid)
    inside = valid & denoise[:, None] & (ask < hi[:, None])
    return Ask(
      only=only,
      keep=keep,
      at=ask,
      can=can,
      slot=slot,
      under=can & inside,
      held=inside & ~at_coordinate(open_, ask) & at_coordinate(eligible(row), ask),
      least=jnp.ones((B,), jnp.int32),
      denoise=denoise,
      fresh=fresh,
      lo=lo,
      hi=hi,
      wlo=wlo,
      cursor=jnp.where(s.done | denoise | (sampler.store is None), s.cursor, hi),
      row=row,
      noise=noise,
      inputs=inputs,
    )

  def read(self, sampler, row: Row, s: State, noise: Noise, only: Array, ask: Array, valid: Array):
    """The slot that predicts each asked token, int32[B, M] (−1: none), which may be committed, bool[B, M],
    and the Inputs."""
    inputs, read = sampler.view(row, noise, only, 0)
    slot = at_coordinate(read[sampler.term], ask)
    can = valid & at_coordinate(~s.committed, ask) & (slot >= 0)
    return jnp.where(can, slot, -1), can, inputs

  def with_past(self, sampler, row: Row, only: Array, keep: Array, lo: Array, done: Array):
    """Without a cache everything behind the front, [0, lo), is computed once more, in slots put before."""
    if sampler.policy.stores:
      return only, keep
    B, N = row.tokens.shape
    past = jnp.broadcast_to(jnp.arange(N, dtype=jnp.int32), (B, N))
    behind = past < until(done, lo)
    only = jnp.concatenate([pairs(jnp.full((B, 1), sampler.store), past, behind), only], 1)
    return only, jnp.concatenate([jnp.zeros_like(behind), keep], 1)


@dataclasses.dataclass(frozen=True)
class Runs(Units):
  """Next-token decoding between given tokens: a call stores the last token filled and all given ones behind
  it, and asks for the open token after them. One forward for each open token, wherever given ones stand, as
  long as no run of these is longer than a call.

  Fields:
    size: slots of a call.
  """

  size: int = 8

  def __post_init__(self):
    if self.size < 1:
      raise ValueError(f"size is {self.size}; a call holds at least one token")

  def check(self, sampler):
    if not sampler.single:
      raise ConfigError(
        "the runs are those of a model that predicts the next token", key="sampler.active.kind", value="runs",
        fix="active='units'",
      )  # fmt: skip

  def width(self, sampler, row):
    return min(self.size, row.tokens.shape[1])

  def ask(self, sampler, row, s):
    B, N = row.tokens.shape
    row = row.replace(tokens=s.tokens)
    noise = sampler.noise(row, s)
    lo = s.cursor
    n = jnp.broadcast_to(rows.coordinates(row.doc), row.doc.shape)
    end = jnp.minimum(lo + self.width(sampler, row), at_coordinate(rows.doc_bounds(row.doc)[1], lo))
    hi = jnp.minimum(first_where(~s.committed & (n > lo[:, None])), end)
    at = lo[:, None] + jnp.arange(self.width(sampler, row), dtype=jnp.int32)
    use = at < until(s.done, hi)
    only, keep = pairs(jnp.full((B, 1), sampler.store), at, use), use
    only, keep = self.with_past(sampler, row, only, keep, lo, s.done)
    ask = hi[:, None]
    slot, can, inputs = self.read(sampler, row, s, noise, only, ask, ask < until(s.done, N))
    none = jnp.zeros((B,), bool)
    return Ask(
      only=only,
      keep=keep,
      at=ask,
      can=can,
      slot=slot,
      under=jnp.zeros_like(can),
      held=jnp.zeros_like(can),
      least=jnp.ones((B,), jnp.int32),
      denoise=none,
      fresh=none,
      lo=lo,
      hi=hi,
      wlo=lo,
      cursor=jnp.where(s.done, s.cursor, hi),
      row=row,
      noise=noise,
      inputs=inputs,
    )


@dataclasses.dataclass(frozen=True)
class Moving(Units):
  """Base of active sets without a fixed unit: a call stores what is complete at its left end while it decodes
  what stands behind."""

  def check(self, sampler):
    kind = next(k for k, cls in REGISTRY.items() if cls is type(self))
    if not sampler.quota.stateless:
      raise ConfigError(
        f"the quota counts the steps of one unit, and there is no one unit under active={kind!r}",
        key="sampler.quota", value=type(sampler.quota).__name__,
        fix="quota 'threshold', 'factor', 'entropy_budget' or 'all'",
      )  # fmt: skip
    if sampler.remask.active:
      raise ConfigError(
        "tokens are stored while others of the same call are open, and what was stored has seen them",
        key="sampler.remask", value=type(sampler.remask).__name__, fix="active='units', or remask='never'",
      )  # fmt: skip

  def call(self, sampler, row, s, noise, only, keep, ask, valid, least, marks) -> Ask:
    """The Ask of one call.

    Args:
      only, keep: the call's slots and those that enter the cache. ask, valid: the tokens asked for.
      least: of Ask. marks: its lo, hi, wlo and cursor; with a shifted head the token at the new cursor is
        committed at once, because its predictor is stored now.
    """
    lo, hi, wlo, cursor = marks
    only, keep = self.with_past(sampler, row, only, keep, lo, s.done)
    slot, can, inputs = self.read(sampler, row, s, noise, only, ask, valid)
    denoise = can.any(1)
    return Ask(
      only=only,
      keep=keep,
      at=ask,
      can=can,
      slot=slot,
      under=can & (ask != cursor[:, None]) if sampler.lead else can,
      held=jnp.zeros_like(can),
      least=least,
      denoise=denoise,
      fresh=denoise,
      lo=lo,
      hi=hi,
      wlo=wlo,
      cursor=cursor,
      row=row,
      noise=noise,
      inputs=inputs,
    )


@dataclasses.dataclass(frozen=True)
class Pipeline(Moving):
  """Several blocks at once, each seeing the unfinished ones before it (D2F, 2508.09192 §4.3).

  A block enters when the one before it is complete to the share `add`, and must commit a token in every call
  once that share is `act`; until then it commits only what passes the quota's own test. Complete blocks at
  the front enter the cache in the call that decodes the blocks behind them: exact, because no slot sees a
  later block. add = 1 is one block after another.

  Fields:
    blocks: the most blocks of a call (static).
    add, act: shares of a block's tokens.
  """

  blocks: int = 4
  add: float = 0.1
  act: float = 0.95

  def __post_init__(self):
    if self.blocks < 2:
      raise ValueError(f"blocks is {self.blocks}; a pipeline holds at least 2")
    if not 0 <= self.add <= 1 or not 0 <= self.act <= 1:
      raise ValueError(f"add is {self.add}, act {self.act}; both are shares of a block")

  @property
  def groups(self) -> int:
    return self.blocks

  def check(self, sampler):
    why = None
    if sampler.whole or sampler.single or sampler.objective.corruption.blocks.sizes:
      why = "a pipeline needs blocks of one size"
    elif sampler.store != sampler.stream:
      why = (
        "a block that is open at the same time as the one before it sees nothing of it: its context is the "
      )
      why += "clean stream"
    elif sampler.cfg.sub_block:
      why = "a pipeline has no sub-blocks"
    if why:
      raise ConfigError(
        why, key="sampler.active.kind", value="pipeline",
        fix="an objective of one noisy stream under 'block_causal' (D2F), or active='units'",
      )  # fmt: skip
    super().check(sampler)

  def width(self, sampler, row):
    return self.blocks * sampler.capacity

  def window(self, sampler, row):
    return self.width(sampler, row)

  def ask(self, sampler, row, s):
    B, N = row.tokens.shape
    K, b = self.blocks, sampler.capacity
    row = row.replace(tokens=s.tokens)
    noise = sampler.noise(row, s)
    lo = at_coordinate(noise.blk_lo, s.cursor)
    end = at_coordinate(rows.doc_bounds(row.doc)[1], s.cursor)[:, None]
    at = lo[:, None] + jnp.arange(K * b, dtype=jnp.int32)
    inside = at < until(s.done, end[:, 0])
    per_block = lambda x: x.reshape(B, K, b).sum(2, dtype=jnp.int32)
    length, filled = per_block(inside), per_block(inside & at_coordinate(s.committed, at))
    complete = jnp.cumprod((filled == length) & (length > 0), 1).astype(bool)  # from the front on
    part = filled / jnp.maximum(length, 1)
    first = jnp.ones((B, 1), bool)
    present = jnp.cumprod(jnp.concatenate([first, part[:, :-1] >= self.add], 1), 1).astype(bool)
    must = jnp.concatenate([first, part[:, :-1] >= self.act], 1)

    spread = lambda x: jnp.repeat(x, b, axis=1)
    use = inside & spread(present)
    keep = use & spread(complete)
    only = pairs(jnp.full((B, 1), sampler.stream), at, use)
    cursor = jnp.where(s.done, s.cursor, jnp.minimum(lo + complete.sum(1, dtype=jnp.int32) * b, N))
    # With a shifted head the first token behind what is stored now has its predictor in this call only.
    ask, valid = at, use
    if sampler.lead:
      last = lo[:, None] + K * b
      ask = jnp.concatenate([at, last], 1)
      valid = jnp.concatenate([use, (last < end) & (last == cursor[:, None])], 1)
      valid |= (ask == cursor[:, None]) & (ask > lo[:, None]) & (ask < until(s.done, end[:, 0]))
    least = (present & must).reshape(-1).astype(jnp.int32)
    hi = jnp.minimum(lo + K * b, N)
    return self.call(sampler, row, s, noise, only, keep, ask, valid, least, (lo, hi, lo, cursor))


@dataclasses.dataclass(frozen=True)
class Window(Moving):
  """A sliding window over the tokens that follow the cache, filled and masked (WeDLM, 2512.22737 §4).

  The filled tokens at its left end enter the cache in the call that predicts the masked ones: their slots are
  those of the clean stream, which is causal, so the cache is that of an AR prefill. The other slots are one
  noisy block that begins behind them (under order="observed_first" the filled ones first, and all of it
  causal). Then the window moves over what was stored.

  Fields:
    size: W, slots of a call.
  """

  size: int = 16

  def __post_init__(self):
    if self.size < 1:
      raise ValueError(f"size is {self.size}; a window holds at least one token")

  def check(self, sampler):
    why = None
    if sampler.store is None or sampler.stored != "causal" or sampler.single:
      why = "what leaves the window is stored token by token, so stored slots must see no later ones"
    elif sampler.store == sampler.stream:
      why = "the window is a noisy block of its own, beside a clean stream"
    elif sampler.cfg.sub_block:
      why = "a window has no sub-blocks"
    if why:
      raise ConfigError(
        why, key="sampler.active.kind", value="window",
        fix="an objective with streams ('n', 'c') under 'wedlm' or 'context_causal', or active='units'",
      )  # fmt: skip
    super().check(sampler)

  def units(self, sampler, row, noise):
    n = jnp.broadcast_to(rows.coordinates(row.doc), row.doc.shape)
    return n, n + 1

  def width(self, sampler, row):
    return self.size

  def window(self, sampler, row):
    return self.size

  def ask(self, sampler, row, s):
    B = row.tokens.shape[0]
    row = row.replace(tokens=s.tokens)
    corruption = sampler.objective.corruption
    n = jnp.broadcast_to(rows.coordinates(row.doc), row.doc.shape)
    lo, end = s.cursor, at_coordinate(rows.doc_bounds(row.doc)[1], s.cursor)
    hi = jnp.minimum(lo + self.size, end)
    run = jnp.minimum(first_where(~s.committed & (n >= lo[:, None])), hi)  # [lo, run) is filled
    hit = jnp.logical_not(s.committed) & eligible(row)
    inside = (n >= run[:, None]) & (n < hi[:, None])
    blk_lo, blk_hi = jnp.where(inside, run[:, None], n), jnp.where(inside, hi[:, None], n + 1)
    share = (hit & inside).sum(1) / jnp.maximum(inside.sum(1), 1)
    level = jnp.broadcast_to(share[:, None, None], (B, 1, n.shape[1])).astype(jnp.float32)
    noise = corruption.noise(row, blk_lo, blk_hi, hit[:, None], level)

    at = lo[:, None] + jnp.arange(self.size, dtype=jnp.int32)
    use = at < until(s.done, hi)
    keep = use & (at < run[:, None])
    only = pairs(jnp.where(keep, sampler.store, sampler.stream), at, use)
    ask, valid = at, use
    if sampler.lead:  # the token behind the run has its predictor in this call only
      behind = lo[:, None] + self.size
      ask = jnp.concatenate([at, behind], 1)
      valid = jnp.concatenate([use, (behind == run[:, None]) & (behind < until(s.done, end))], 1)
    cursor = jnp.where(s.done, s.cursor, run)
    least = jnp.ones((B,), jnp.int32)
    return self.call(sampler, row, s, noise, only, keep, ask, valid, least, (lo, hi, run, cursor))


REGISTRY = {"units": Units, "runs": Runs, "pipeline": Pipeline, "window": Window}
