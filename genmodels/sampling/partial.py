"""Caches inside the front unit: a step computes some of its slots anew and reads the others as they were.

The entries of a unit are addressed by coordinate. A call hides the entries of the slots that it computes and
*replaces* them afterwards; all others stay visible, whatever has been committed since. So a policy is one
function, `recompute`: which slots of the unit a step computes. Those that predict a token that may be
committed now always are, but under `keeps`, where their last prediction stands, and under `foresees`, where
those are that will be committed.

Which of these are exact depends on who sees whom, not on their names: `laws.exact` finds out.

The number of slots varies from row to row and from step to step, shapes are static: a call is compiled for a
few widths, and each step takes the smallest that holds the slots of all rows, gathered to the front.

Legend: B rows · N tokens of a row · A slots of the unit · M asked tokens · Lc cache entries.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from genmodels.contracts import Array, pytree
from genmodels.corruption.base import eligible
from genmodels.masks import CODE_HIDDEN
from genmodels.models import relabel_cache, value_similarity, write_cache
from genmodels.sampling import draw
from genmodels.sampling.state import at_coordinate, first_where

LONG_AGO = 2**30


@pytree("bound")
class Look:
  """What a policy may look at.

  Fields:
    at: int32[B, A], coordinates of the unit's slots; use: bool[B, A], slots that hold a token.
    open: bool[B, A], not committed; since: int32[B, A], steps since the commit (1: in the last step).
    need: bool[B, A], slots that predict a token that may be committed now.
    sure: float32[B, A], largest logit of the last prediction of each slot; +inf where nothing is open.
    lo, hi: int32[B], the window of asked tokens; before: start of the window before it (or lo).
    first: bool[B], nothing of this unit has been computed; fresh: the window is a new one.
    k: int32[B], steps in this window; step: int32 scalar, steps in all.
    bound: the most steps that the quota takes for a window (static).
    given: bool[B, A], slots of the prompt.
    chosen: bool[B, A], slots whose prediction is committed in this step; None unless the policy `foresees`.
    similar: float32[B, A], `models.value_similarity` between the last two times that a slot was computed, 1
      before the second; None unless the policy `compares`.
  """

  at: Array
  use: Array
  open: Array
  since: Array
  need: Array
  sure: Array
  lo: Array
  hi: Array
  before: Array
  first: Array
  fresh: Array
  k: Array
  step: Array
  bound: int
  given: Array
  chosen: Array | None = None
  similar: Array | None = None


@dataclasses.dataclass(frozen=True)
class Partial:
  """Base of the policies.

  Fields:
    refresh: the whole unit is computed anew every so many steps, at least; 0: not for that reason.
    widths: static widths that a call is compiled for, from that of the window to that of the unit.
    exact: demand that decoding equals decoding without a cache; a config where it does not is refused.
  """

  refresh: int = 0
  widths: int = 3
  exact: bool = False

  keeps = False  # predictions of slots that were not computed stay candidates
  foresees = False  # what a step commits is known before its predictions, and is all that has to be computed
  compares = False  # values are compared with those that they replace

  def __post_init__(self):
    if self.refresh < 0 or self.widths < 1:
      raise ValueError(f"refresh is {self.refresh}, widths is {self.widths}; at least 0 and 1")

  def due(self, look: Look) -> Array:
    """bool[B]: rows whose whole unit is computed: at a new window, and every `refresh` steps in it."""
    on = look.first | look.fresh
    return on | (look.k % self.refresh == 0) if self.refresh else on

  def recompute(self, look: Look) -> Array:
    """bool[B, A], slots computed anew."""
    raise NotImplementedError

  def ladder(self, A: int, window: int) -> tuple[int, ...]:
    """Ascending static widths, the last is A.

    Args:
      window: slots that predict the tokens of a window; A where the window is all of the unit.
    """
    low = window if window < A else max(A >> (self.widths - 1), 1)
    steps = max(self.widths - 1, 1)
    sizes = {math.ceil(low * (A / low) ** (i / steps)) for i in range(self.widths - 1)}
    return (*sorted(w for w in sizes if w < A), A)

  def small(self) -> Partial:
    """The same policy for a row of a few tokens."""
    return dataclasses.replace(self, refresh=min(self.refresh, 3), widths=1, exact=False)


@dataclasses.dataclass(frozen=True)
class Prefix(Partial):
  """Everything before the window is read, the window and all behind it is computed; refreshed at each new
  window (Fast-dLLM's prefix cache, Wu et al. 2505.22618)."""

  def recompute(self, look):
    return self.due(look)[:, None] | (look.at >= look.lo[:, None])


@dataclasses.dataclass(frozen=True)
class Dual(Partial):
  """Only the window is computed, what precedes and what follows it is read (Fast-dLLM's DualCache; inside a
  block of a block model Fast-dLLM v2's sub-block cache)."""

  def recompute(self, look):
    return self.due(look)[:, None] | (look.at >= look.lo[:, None]) & (look.at < look.hi[:, None])

  def ladder(self, A, window):
    return (window, A) if window < A else super().ladder(A, window)


@dataclasses.dataclass(frozen=True)
class Vicinity(Partial):
  """As `dual`, but `around` tokens on both sides of the window are computed too (dInfer's vicinity refresh,
  2510.08666: 16)."""

  around: int = 16

  def __post_init__(self):
    super().__post_init__()
    if self.around < 0:
      raise ValueError(f"around is {self.around}; a number of tokens, at least 0")

  def recompute(self, look):
    lo, hi = look.lo - self.around, look.hi + self.around
    return self.due(look)[:, None] | (look.at >= lo[:, None]) & (look.at < hi[:, None])

  def ladder(self, A, window):
    width = window + 2 * self.around
    return (width, A) if width < A else super().ladder(A, A)

  def small(self):
    return dataclasses.replace(super().small(), around=min(self.around, 1))


@dataclasses.dataclass(frozen=True)
class Free(Partial):
  """The prompt and finished windows are read and never refreshed (each is computed once more after its last
  commit); what is behind shrinks as windows finish (FreeCache, Hu et al. 2505.21467; details unverified)."""

  def due(self, look):
    return _every(look, self.refresh)

  def recompute(self, look):
    return self.due(look)[:, None] | (look.at >= look.before[:, None])


@dataclasses.dataclass(frozen=True)
class Delayed(Partial):
  """A token is read from the second step after its commit on, when it has been computed once with its final
  content; open tokens are always computed (dKV-Cache-Decode, Ma et al. 2505.15781). The whole unit is
  computed every `refresh` steps of the generation."""

  refresh: int = 8

  def due(self, look):
    return _every(look, self.refresh)

  def recompute(self, look):
    return self.due(look)[:, None] | look.open | (look.since <= 1)


@dataclasses.dataclass(frozen=True)
class Greedy(Delayed):
  """Computed are the tokens that this step commits, those that the last step committed, and a few open ones
  around the former; all others are read (dKV-Cache-Greedy, 2505.15781: refresh 2, window 4). A step computes
  a constant number of slots, a generation O(N²) pairs in place of O(N³).

  What a step commits has to be known before the forward pass, as it is where the order is random. Windows
  that overlap are not made longer, as the released code does; they end at the last open token.

  Fields:
    window: open tokens around each token that is committed, half of them on either side.
  """

  refresh: int = 2
  window: int = 4

  foresees = True

  def __post_init__(self):
    super().__post_init__()
    if self.window < 0:
      raise ValueError(f"window is {self.window}; a number of tokens, at least 0")

  def due(self, look):
    return Partial.due(self, look)

  def recompute(self, look):
    rank = jnp.cumsum(look.open, 1)  # of an open slot among them: 1, 2, …
    B, A = rank.shape
    # [first, behind) of each window, marked at its ends among the ranks, and counted.
    edge = jnp.zeros((B, A + 2), jnp.int32)
    put = lambda x, at, by: x.at[jnp.arange(B)[:, None], jnp.clip(at, 0, A + 1)].add(by)
    on = look.chosen.astype(jnp.int32)
    edge = put(edge, rank - (self.window + 1) // 2, on)
    edge = put(edge, rank + self.window // 2 + 1, -on)
    inside = jnp.take_along_axis(jnp.cumsum(edge, 1), rank, 1) > 0
    return self.due(look)[:, None] | look.chosen | (look.since <= 1) | (look.open & inside)

  def ladder(self, A, window):
    del window
    return super().ladder(A, min(2 + self.window, A))

  def small(self):
    return dataclasses.replace(super().small(), window=min(self.window, 1))


@dataclasses.dataclass(frozen=True)
class LogitSelective(Partial):
  """The `ratio` of a unit's tokens with the largest logits is read, and their last prediction stands (the
  max-logit cache of Lumina-DiMOO, 2510.06308). Given and committed tokens count as the surest ones.

  Two deviations that the paper's text leaves open: a token that was committed in the last step is always
  computed, and steps are counted within a window.

  Fields:
    ratio: share that is read; 0 is exact.
    warm: part of a window's steps that compute everything, at the start.
  """

  refresh: int = 5
  ratio: float = 0.9
  warm: float = 0.3

  keeps = True

  def __post_init__(self):
    super().__post_init__()
    for name in ("ratio", "warm"):
      if not 0 <= getattr(self, name) <= 1:
        raise ValueError(f"{name} is {getattr(self, name)}; a share in [0, 1]")

  def recompute(self, look):
    total = look.use.sum(1)
    kept = jnp.floor(self.ratio * total.astype(jnp.float32)).astype(jnp.int32)
    last = look.since <= 1
    sure = jnp.where(look.use, jnp.where(last, -jnp.inf, look.sure), -jnp.inf)
    order = jnp.argsort(-sure, axis=1, stable=True)
    rank = jnp.argsort(order, axis=1)
    warm = look.k < self.warm * look.bound
    return (self.due(look) | warm)[:, None] | (rank >= kept[:, None]) | last

  def small(self):
    return dataclasses.replace(super().small(), ratio=min(self.ratio, 0.5), warm=0.0)


@dataclasses.dataclass(frozen=True)
class ValueSimilarity(Partial):
  """The prompt is computed every `prompt` steps, the answer every `refresh` steps; in between the `ratio` of
  the answer whose values have moved most, and what was committed in the last step. Other predictions stand
  (dLLM-Cache, Liu et al. 2506.06295: K_p = 100, K_r = 7, ρ = .25).

  The released code chooses anew in each layer, by its values before and now, and each layer computes other
  slots. In its first layer the values are those of the token alone, so that the choice falls on what was just
  committed, and among equals. Here one choice serves all layers: values are compared whenever a slot is
  computed, and the mean over layers counts.

  Fields:
    refresh: K_r. prompt: K_p; 0: never again. ratio: ρ, a share of the answer's tokens.
  """

  refresh: int = 7
  prompt: int = 100
  ratio: float = 0.25

  keeps = True
  compares = True

  def __post_init__(self):
    super().__post_init__()
    if self.prompt < 0 or not 0 <= self.ratio <= 1:
      raise ValueError(f"prompt is {self.prompt}, ratio {self.ratio}; at least 0, and a share in [0, 1]")

  def due(self, look):
    return _every(look, self.refresh)

  def recompute(self, look):
    answer, last = look.use & ~look.given, look.since <= 1
    count = jnp.floor(self.ratio * answer.sum(1).astype(jnp.float32)).astype(jnp.int32)
    order = jnp.argsort(jnp.where(answer & ~last, look.similar, jnp.inf), axis=1, stable=True)
    moved = answer & (jnp.argsort(order, axis=1) < count[:, None])
    asked = look.fresh[:, None] & look.need  # by a new window, for the first time
    given = look.given & _every(look, self.prompt)[:, None]
    return given | (answer & self.due(look)[:, None]) | moved | last | asked

  def small(self):
    return dataclasses.replace(super().small(), prompt=min(self.prompt, 3), ratio=min(self.ratio, 0.5))


def _every(look: Look, steps: int) -> Array:
  """bool[B]: the first step, and every so many steps of the generation; 0: no other."""
  return look.first | (look.step % steps == 0) if steps else look.first


REGISTRY = {
  "prefix": Prefix,
  "dual": Dual,
  "vicinity": Vicinity,
  "free": Free,
  "delayed": Delayed,
  "delayed_greedy": Greedy,
  "logit_selective": LogitSelective,
  "value_similarity": ValueSimilarity,
}


# -- one call -----------------------------------------------------------------------------------------


def capacity(sampler, row) -> int:
  """Entries of a row's cache: its tokens, and, where a unit is predicted in another stream than it is kept
  in, the unit's slots behind them."""
  N = row.tokens.shape[1]
  own = sampler.store in (None, sampler.stream)
  return N if own or sampler.policy.partial is None else N + sampler.active.width(sampler, row)


def ladder(sampler, row) -> tuple[int, ...]:
  """The static widths of a sampler's calls, ascending."""
  A, W = sampler.active.width(sampler, row), sampler.active.window(sampler, row)
  shifted = sampler.objective.terms[sampler.term].align != "same"
  return sampler.policy.partial.ladder(A, W if W >= A else min(W + shifted, A))


def memory(sampler, row, used: Array, prefill: int):
  """What is remembered of a generation: {"slots": int32, slots computed per row, padding and all guidance
  branches included; "used": int32[B], those of one branch that held a token}, and the last predictions.

  Args:
    used: int32[B], tokens of a first call of width `prefill`.
  """
  B, M = row.tokens.shape[0], sampler.active.asked(sampler, row)
  out = {"slots": jnp.int32(prefill * sampler.branches), "used": used}
  if sampler.policy.partial is not None and sampler.policy.partial.keeps:
    out["sure"] = jnp.zeros((B, M), jnp.float32)
    out["picked"] = sampler.choice.nothing(B, M)
    if sampler.policy.partial.compares:
      out["similar"] = jnp.ones((B, sampler.active.width(sampler, row)), jnp.float32)
  return out


def look(sampler, a, s, key) -> Look:
  """A policy's view of a call over the whole unit. The key is that of the run, for what `foresees`."""
  at, use = a.only[..., 1], a.only[..., 1] >= 0
  B, A = at.shape
  N = s.tokens.shape[1]
  safe = jnp.maximum(at, 0)
  done_at = at_coordinate(s.committed_at, safe)
  open_ = use & ~at_coordinate(s.committed, safe)
  rows_ = jnp.arange(B)[:, None]
  slot = jnp.where(a.can & a.under, a.slot, A)
  slots = lambda flag: jnp.zeros((B, A), bool).at[rows_, jnp.where(flag, a.slot, A)].set(True, mode="drop")
  sure = jnp.where(open_, -jnp.inf, jnp.inf)
  if sampler.policy.partial.keeps:
    sure = sure.at[rows_, slot].set(s.memory["cache"]["sure"], mode="drop")
  window = sampler.active.window(sampler, a.row)
  hi = jnp.minimum(a.wlo + window, a.hi) if sampler.cfg.sub_block else a.hi
  # A document that is one unit begins with the prompt, which no window contains.
  lo = jnp.maximum(a.wlo, first_where(eligible(a.row))) if sampler.whole else a.wlo
  return Look(
    at=at,
    use=use,
    open=open_,
    since=jnp.where(open_ | (done_at < 0), LONG_AGO, s.step - done_at),
    need=slots(a.can & a.under),
    sure=sure,
    lo=lo,
    hi=hi,
    before=jnp.where(a.fresh & (s.unit >= a.lo), s.unit, lo),
    first=s.unit < a.lo,
    fresh=a.fresh,
    k=jnp.where(a.fresh, 0, s.k),
    step=s.step,
    bound=sampler.quota.bound(max(min(window, N), 1)),
    given=use & ~at_coordinate(eligible(a.row), safe),
    chosen=slots(sampler.foreseen(s, a, key)) if sampler.policy.partial.foresees else None,
    similar=s.memory["cache"].get("similar"),
  )


def select(sampler, a, s, key) -> Array:
  """bool[B, A]: the slots of a call that are computed; all of those that enter an exact cache."""
  view, policy = look(sampler, a, s, key), sampler.policy.partial
  chosen = policy.recompute(view)
  if policy.foresees:
    chosen |= view.chosen
  elif not policy.keeps:
    chosen |= view.need
  return view.use & (chosen | ~a.denoise[:, None])


def predict(sampler, params, a, s, key, fn, xs):
  """`Sampler.predict` over the slots that the policy computes.

  Returns:
    fn's pytree of [B, M, …]; bool[B, M], tokens that were predicted now; Look.similar after the call, or
    None; the caches with this call's entries; int32, the width of the call; int32[B], slots computed.
  """
  chosen = select(sampler, a, s, key)
  N = s.tokens.shape[1]
  base = sampler.stream if sampler.store is None else sampler.store
  stream, at = a.only[..., 0], a.only[..., 1]
  entry = jnp.where(stream == base, at, N + at - a.lo[:, None])
  past = tuple(_hide(c, a.inputs.masks, entry, at >= 0, chosen) for c in s.caches)
  count = chosen.sum(1, dtype=jnp.int32)
  widths = ladder(sampler, a.row)

  def narrow(width):
    def run(past):
      order = jnp.argsort(~chosen, axis=1, stable=True)[:, :width]
      take = lambda x: jnp.take_along_axis(x, order, 1)
      keep = take(chosen)
      only = jnp.where(keep[..., None], jnp.take_along_axis(a.only, order[..., None], 1), -1)
      inputs, read = sampler.view(a.row, a.noise, only, 0)
      slot = at_coordinate(read[sampler.term], a.at)
      now = a.can & (slot >= 0)
      b = a.replace(only=only, keep=keep, inputs=inputs, can=now, slot=jnp.where(now, slot, -1))
      out, news = sampler.predict(params, b, s.replace(caches=past), fn, xs)
      where, similar = take(entry), None
      if sampler.policy.partial.compares:
        similar = value_similarity(past[0], news[0], where)
        similar = jnp.where((s.unit < a.lo)[:, None], 1.0, similar)  # nothing was there
        index = jnp.where(keep, order, chosen.shape[1])
        similar = (
          s.memory["cache"]["similar"].at[jnp.arange(len(index))[:, None], index].set(similar, mode="drop")
        )
      return out, now, similar, tuple(write_cache(c, n, keep, where) for c, n in zip(past, news, strict=True))

    return run

  index = sum((count.max() > w).astype(jnp.int32) for w in widths[:-1])
  if len(widths) == 1:
    out, now, similar, caches = narrow(widths[0])(past)
  else:
    # A loop of one turn or none for each width: loops update the cache in place, branches of a conditional
    # write a copy of it.
    zeros = lambda x: jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), x)
    carry = (*zeros(jax.eval_shape(narrow(widths[0]), past)[:3]), past)
    once = lambda run, c: (jnp.bool_(False), *run(c[4]))
    for i, width in enumerate(widths):
      turn = functools.partial(once, narrow(width))
      carry = jax.lax.while_loop(lambda c: c[0], turn, (index == i, *carry))[1:]
    out, now, similar, caches = carry
  return out, now, similar, caches, jnp.asarray(widths, jnp.int32)[index], count


def _hide(cache, masks, entry, there, chosen):
  """The cache with the unit's entries under their present codes, but those to be replaced hidden."""
  rows_ = jnp.arange(entry.shape[0])[:, None]
  index = jnp.where(there, entry, cache.capacity)
  code = {}
  for name, old in cache.code.items():
    now = jnp.where(chosen, CODE_HIDDEN, jnp.broadcast_to(masks[name].code, entry.shape))
    code[name] = old.at[rows_, index].set(now, mode="drop")
  return relabel_cache(cache, code)


def counted(sampler, s, a, ran=True):
  """{"slots", "used"} after a call over all slots of an Ask, if it `ran`."""
  kept, A = s.memory["cache"], a.only.shape[1]
  used = (a.only[..., 1] >= 0).sum(1, dtype=jnp.int32)
  return {
    "slots": kept["slots"] + jnp.where(ran, A * sampler.branches, 0),
    "used": kept["used"] + jnp.where(ran, used, 0),
  }


def forward(sampler, params, s, a, key, xs):
  """(draw.Picked of the asked tokens, caches, memory) of one step; see `Sampler.forward`."""
  kept = s.memory["cache"]
  if sampler.policy.partial.keeps:

    def fn(logits, *xs):
      return sampler.choice(logits, *xs), sampler.choice.logits(logits).max(-1)

    (picked, sure), now, similar, caches, width, count = predict(sampler, params, a, s, key, fn, xs)
    stay = lambda new, old: jnp.where(now.reshape(*now.shape, *[1] * (new.ndim - 2)), new, old)
    picked = jax.tree.map(stay, picked, kept["picked"])
    kept = kept | {"picked": picked, "sure": stay(sure, kept["sure"])}
    kept |= {} if similar is None else {"similar": similar}
  else:
    picked, *_, caches, width, count = predict(sampler, params, a, s, key, sampler.choice, xs)
    if sampler.policy.partial.foresees and sampler.choice.score == "random":
      picked = picked.replace(score=draw.random_score(*xs[:2]))  # tokens that were not computed have one, too
  kept = kept | {"slots": kept["slots"] + width * sampler.branches, "used": kept["used"] + count}
  return picked, caches, kept


# -- inspection ---------------------------------------------------------------------------------------


def without_cache(sampler):
  """The same sampler with nothing kept: every call computes all that its predictions depend on."""
  from genmodels.sampling.cache import POLICIES

  return dataclasses.replace(sampler, policy=POLICIES["none"])


def drift(sampler, params, row, key, steps: int):
  """How far a cache is from no cache, along a generation with it: each step's logits beside those that the
  same state has without any cache.

  Args:
    steps: of the loop, static.

  Returns:
    float32[steps, B], the largest |Δ logit| over the tokens that were predicted; the last State.
  """
  prefill = sampler.prefill_width(row)
  return jax.jit(lambda *args: scan_drift(sampler, *args, steps, prefill))(params, row, key)


def scan_drift(sampler, params, row, key, steps: int, prefill: int):
  """`drift`, traceable; `prefill` is the width of the first call."""
  plain = without_cache(sampler)
  finite = lambda x: jnp.where(jnp.isfinite(x), x, 0)

  def body(s, _):
    logits, a = sampler.logits(params, row, s, key)
    want, _ = plain.logits(params, row, s.replace(caches=()), key)
    off = jnp.abs(finite(logits) - finite(want)).max(-1)
    return sampler.step(params, row, s, key), jnp.where(a.can, off, 0).max(-1)

  s, out = jax.lax.scan(body, sampler.start(params, row, prefill, key), length=steps)
  return out, s
