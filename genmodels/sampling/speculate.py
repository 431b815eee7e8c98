"""Speculative decoding of next-token models: drafts, one verifying forward, exact acceptance.

A row with n committed tokens keeps the keys and values of the first n − 1. Each step runs the clean slots of
the newest token and of the drafts through the objective's view and the causal cache, walks along the accepted
drafts (`verify.walk`), takes one token more, and writes the slots that turned out to be committed. Rows
accept different numbers of drafts, have prompts of any length and end at different steps; shapes are static.

Two things go beyond a plain view, and both are the training table with streams of their own:

  chains   R > 1 drafts of the same coordinates. Chain 0 lies in the clean stream; each other one is a stream
           that sees the committed clean tokens and itself as the clean stream does. What is kept enters the
           cache under clean codes.
  ahead    groups of masks that draft the next step in this forward (TiDAR; multi-token prediction): group j
           is a noisy copy with its own block, which begins behind j drafts and sees the clean tokens before
           it.

Legend: B rows · N tokens of a row · R chains · K drafts · G masks of a group · M = 1 + R·K nodes · A slots.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genmodels import rows
from genmodels.config import ConfigError
from genmodels.contracts import CLEAN, Array, Noise, Row, Slots, Target, pytree
from genmodels.corruption import rng
from genmodels.corruption.base import Corruption, eligible
from genmodels.masks import STREAM
from genmodels.models import Model, write_cache
from genmodels.sampling import draw, verify
from genmodels.sampling.active import pairs
from genmodels.sampling.drafter import Context, Drafter, Seen
from genmodels.sampling.loop import Sampler
from genmodels.sampling.state import Result, first_where, put, until

# What draws are for, besides those of draw.py.
DRAFT, VERIFY = 32, 33


@pytree()
class Progress:
  """A batch of generations in progress.

  Fields:
    tokens, committed_at: int32[B, N]. length: int32[B], n. done: bool[B].
    first: bool[B], nothing verified yet. hidden: [B, D], of the slot that predicted the newest token.
    step: int32. calls: {"prefill", "verify": int32[B]}, forwards of the target that a row took part in.
    drafted, accepted: int32[B], drafts that were verified and accepted.
    cache: entries of coordinates < n − 1, or None. draft: the drafter's state.
  """

  tokens: Array
  committed_at: Array
  length: Array
  done: Array
  first: Array
  hidden: Array
  step: Array
  calls: dict[str, Array]
  drafted: Array
  accepted: Array
  cache: Any
  draft: Any


@dataclasses.dataclass(frozen=True)
class Copies(Corruption):
  """Stands for the noise of a widened layout, which the loop itself assembles."""

  copies: int = 1


@dataclasses.dataclass(frozen=True)
class Call:
  """The slots of one verifying forward: what each one is, as static arrays over A slots.

  Fields:
    stream: index in the widened layout. offset: coordinate − (n − 1). origin: of the slot's block − (n − 1).
    ahead: group of a mask, −1 for clean slots and chains.
  """

  stream: np.ndarray
  offset: np.ndarray
  origin: np.ndarray
  ahead: np.ndarray


@pytree()
class Laid:
  """One verifying call, ready to run. A node of the draft is the slot of its number; others stand behind.

  Fields:
    inputs: of all slots. slot: int32[B, M], the slot that predicts behind each node; can: bool[B, M].
    use: bool[B, A], slots of this step in use. code: {pattern: int32[B, A]}, codes that they are kept under.
  """

  inputs: Any
  slot: Array
  can: Array
  use: Array
  code: dict[str, Array]


def node_keys(row: Row, key: Array, tag: int, at: Array) -> tuple[Array, Array]:
  """Two uint32 of at's shape: keys of tokens at coordinates int32[B, …], those of Sampler for that token.

  Sampler counts committed tokens, padding included: a token at coordinate n is drawn when n are before it.
  """
  padding = (row.doc < 0).sum(1, dtype=jnp.int32)
  shape = (-1, *(1,) * (at.ndim - 1))
  k0, k1 = (k[:, 0].reshape(shape) for k in rng.doc_key(row, key, 0, 0, tag))
  k0, k1 = rng.threefry2x32(k0, k1, (padding.reshape(shape) + at).astype(jnp.uint32), np.uint32(0))
  return rng.threefry2x32(k0, k1, at.astype(jnp.uint32), np.uint32(1))


def widen(objective, chains: int, groups: int, noisy: str):
  """The objective with a stream for each further chain, and for each group of masks of stream `noisy`.

  Streams are appended, so the codes of the others stay. A chain sees what the clean stream sees, of the clean
  stream only what is committed (BLK_LT: its block begins behind that).
  """
  if chains == 1 and not groups:
    return objective
  streams = objective.layout.streams
  extra = tuple(f"chain{r}" for r in range(1, chains)) + tuple(f"ahead{j}" for j in range(groups))
  masks = {}
  for pattern, relations in objective.relations.items():
    table = dict(relations.table)
    pairs = {f"{q}>{k}": r for (q, k), r in table.items()}
    for name in extra:
      if name.startswith("chain"):
        own = table[CLEAN, CLEAN]
        past = " | ".join(f"{c}&BLK_LT" for c in own.split("|"))
      else:
        own, past = table.get((noisy, noisy)), table.get((noisy, CLEAN))
      pairs |= {f"{name}>{name}": own} if own else {}
      pairs |= {f"{name}>{CLEAN}": past} if past else {}
    masks[pattern] = pairs
  layout = dataclasses.replace(objective.layout, streams=(*streams, *extra))
  corruption = Copies(blocks=objective.corruption.blocks, copies=len(layout.noisy))
  return dataclasses.replace(objective, layout=layout, masks=masks, corruption=corruption)


@dataclasses.dataclass(frozen=True, eq=False)
class Speculative(Sampler):
  """A Sampler of a next-token model that verifies drafts; `speculate.build` makes it.

  Fields:
    drafter: bound to the target. rule: of verify. own: the drafter's parameters, or None.
    wide: the objective with the streams of chains and groups.
  """

  drafter: Drafter = None
  rule: verify.Rule = None
  own: Any = None
  wide: Any = None

  # -- the public call ------------------------------------------------------------------------------

  def __call__(self, params, row: Row, key: Array, prefill: int | None = None) -> Result:
    """As Sampler; `Result.memory` has "drafted" and "accepted", int32[B], drafts verified and accepted.

    Raises:
      ValueError: also for given tokens behind open ones, or a first call that is too short for the prompts.
    """
    needed = self.prefill_width(row)
    if prefill is not None and prefill < needed:
      raise ValueError(
        f"prefill is {prefill}; speculative decoding caches the prompts at once, at least {needed}"
      )
    return super().__call__((params, self.own), row, key, max(needed, prefill or 0))

  def check(self, row: Row) -> None:
    super().check(row)
    given = np.asarray(~eligible(row) & (row.doc >= 0))
    if (given[:, 1:] > given[:, :-1]).any():
      i = int((given[:, 1:] > given[:, :-1]).any(1).argmax())
      raise ValueError(f"row {i} has given tokens behind open ones; speculative decoding continues a prompt")

  def run(self, params, row: Row, key: Array, prefill: int) -> Result:
    """`__call__` without the host's part; traceable."""
    state = self.begin(params, row, prefill)
    limit = row.tokens.shape[1]

    def more(s: Progress):
      return ~s.done.all() & (s.step < limit)

    s = jax.lax.while_loop(more, lambda s: self.advance(params, row, s, key), state)
    return self.result(row, s)

  # -- the slots of a call ----------------------------------------------------------------------------

  @property
  def plan(self) -> Call:
    """Which slots a verifying forward has; all static."""
    R, K, G = self.drafter.chains, self.drafter.size, self.drafter.ahead
    streams = self.wide.layout.streams
    clean = streams.index(CLEAN)
    stream, offset, origin, ahead = [clean] * (K + 1), list(range(K + 1)), list(range(K + 1)), [-1] * (K + 1)
    for r in range(1, R):
      stream += [streams.index(f"chain{r}")] * K
      offset += range(1, K + 1)
      origin += [1] * K
      ahead += [-1] * K
    for j in range((K + 1) if G else 0):
      stream += [streams.index(f"ahead{j}")] * G
      offset += range(1 + j, 1 + j + G)
      origin += [1 + j] * G
      ahead += [j] * G
    return Call(*(np.array(x, np.int32) for x in (stream, offset, origin, ahead)))

  def place(self, row: Row, s: Progress, tokens: Array, count: Array) -> tuple[Slots, Noise, Array]:
    """Slots and noise of a call, and bool[B, A], the slots of this step (behind the cached ones).

    Args:
      row: with the drafts of chain 0 in place. tokens: int32[B, R, K]; count: int32[B, R].
    """
    call, (B, N), R = self.plan, row.tokens.shape, tokens.shape[1]
    K, total = tokens.shape[2], (row.doc >= 0).sum(1, dtype=jnp.int32)
    at = s.length[:, None] - 1 + call.offset
    use = at < until(s.done, total)
    # A slot is computed if the drafts before it are meant: place i of its chain, or i = j drafts of its
    # group.
    chain = np.concatenate([np.zeros(K + 1, int), np.repeat(np.arange(1, R), K)])
    chain = np.pad(chain, (0, len(call.offset) - len(chain)))
    depth = np.where(call.ahead >= 0, call.ahead, call.offset)
    use &= depth <= count[:, chain]
    only = pairs(call.stream, at, use)
    if s.cache is None:  # everything before, once more
      past = jnp.broadcast_to(jnp.arange(N, dtype=jnp.int32), (B, N))
      behind = past < until(s.done, s.length - 1)
      only = jnp.concatenate([only, pairs(self.stream, past, behind)], 1)
    noise = self.objective.corruption.state(row, rows.coordinates(row.doc) < s.length[:, None])
    if self.wide is not self.objective:
      noise = self.widened(noise, row, s, tokens)
    slots = self.wide.layout.arrange(row, noise, only)
    lo = s.length[:, None] - 1 + call.origin
    lo = jnp.concatenate([lo, slots.blk_lo[:, lo.shape[1] :]], 1)
    # Clean slots keep their block; chains and groups have their own.
    own = np.zeros(only.shape[1], bool)
    own[: len(call.stream)] = call.stream >= len(self.objective.layout.streams)
    reach = max(K, self.drafter.ahead)
    slots = slots.replace(
      blk_lo=jnp.where(own & (slots.src >= 0), lo, slots.blk_lo),
      blk_hi=jnp.where(own & (slots.src >= 0), jnp.minimum(lo + reach, total[:, None]), slots.blk_hi),
    )
    return slots, noise, use

  def widened(self, noise: Noise, row: Row, s: Progress, tokens: Array) -> Noise:
    """The noise of all copies: chains show their drafts, groups are masks."""
    B, N = row.tokens.shape
    R, K = tokens.shape[1:]
    noisy = self.wide.layout.noisy
    wide = lambda x, fill: jnp.broadcast_to(jnp.asarray(fill, x.dtype), (B, len(noisy), N))
    value = jnp.full((B, len(noisy), N), self.objective.mask_id, jnp.int32)
    at = jnp.where(s.length[:, None] + np.arange(K) < N, s.length[:, None] + np.arange(K), N)
    for r in range(1, R):
      copy = noisy.index(f"chain{r}")
      value = value.at[jnp.arange(B)[:, None], copy, at].set(tokens[:, r], mode="drop")
    return noise.replace(
      hit=wide(noise.hit, True), level=wide(noise.level, 1), marginal=wide(noise.marginal, 1),
      nelbo=wide(noise.nelbo, 1), value=value,
    )  # fmt: skip

  # -- the loop -------------------------------------------------------------------------------------

  def begin(self, both, row: Row, prefill: int) -> Progress:
    """The prompts committed and cached, but for their last token."""
    params, own = both
    base = super().start(params, row, 0)
    B, N = row.tokens.shape
    length = jnp.minimum(first_where(~base.committed), (row.doc >= 0).sum(1, dtype=jnp.int32))
    zero = jnp.zeros((B,), jnp.int32)
    cfg = self.model.cfg
    draft = self.drafter.start(params, own, row, length)
    caches, used = base.caches, zero
    if caches and prefill:
      kept = jnp.minimum(base.cursor, prefill)
      noise = self.objective.corruption.state(row, base.committed)
      caches, used, layers = self.prefill(params, row, caches, noise, kept, prefill)
      draft = self.drafter.prompted(params, own, row, kept, layers.get("taps"), draft)
    return Progress(
      tokens=row.tokens,
      committed_at=jnp.full((B, N), -1, jnp.int32),
      length=length,
      done=base.done,
      first=jnp.ones((B,), bool),
      hidden=jnp.zeros((B, cfg.width), jnp.dtype(cfg.dtype)),
      step=jnp.int32(0),
      calls={"prefill": used, "verify": zero},
      drafted=zero,
      accepted=zero,
      cache=caches[0] if caches else None,
      draft=draft,
    )

  def propose(self, both, row: Row, s: Progress, key: Array):
    """tokens int32[B, R, K], logits float32[B, R, K, V] or None, count int32[B, R], the drafter's state."""
    R, K, V = self.drafter.chains, self.drafter.size, self.model.cfg.vocab
    keys = draw.row_keys(row, key, DRAFT, s.length)
    context = Context(row, s.length, s.done, s.first, s.hidden, keys, s.cache)
    drafted, state = self.drafter.draft(*both, context, s.draft)
    tokens, logits, count = drafted.tokens, drafted.logits, drafted.count
    if tokens.ndim == 2:
      tokens = tokens[:, None]
      logits = None if logits is None else logits[:, None]
    if tokens.shape[1:] != (R, K):
      raise ValueError(
        f"{type(self.drafter).__name__} drafted {tokens.shape}, expected {R} chains of {K} tokens"
      )
    count = jnp.full((len(tokens), 1), K) if count is None else jnp.reshape(count, (len(tokens), -1))
    # Ids outside of the vocabulary end a chain: they have no embedding.
    known = jnp.cumprod((tokens >= 0) & (tokens < V), 2).sum(2)
    count = jnp.minimum(jnp.clip(count, 0, K), known)
    idle = s.done | (s.first if self.drafter.needs_hidden else False)
    return tokens, logits, jnp.where(idle[:, None], 0, count).astype(jnp.int32), state

  def advance(self, both, row: Row, s: Progress, key: Array) -> Progress:
    """One step: draft, verify, commit."""
    params, own = both
    B, K = len(s.length), self.drafter.size
    row = row.replace(tokens=s.tokens)
    total = (row.doc >= 0).sum(1, dtype=jnp.int32)
    tokens, q, count, state = self.propose(both, row, s, key)

    ahead = s.length[:, None] + np.arange(K + 1)  # coordinates that this step may commit
    laid = self.lay(row, s, tokens, count, total)
    out = self.evaluate(params, laid.inputs, laid.slot, laid.can, s.cache)
    found = self.decide(row, key, out.dists[self.term], tokens, q, s.length)
    keys = [node_keys(row, key, VERIFY + r, ahead) for r in range(self.branching)]
    u = jnp.stack([draw.uniforms(k) for k in keys], -1)
    exists = ahead < until(s.done, total)
    went = self.follow(found, tokens, count, u, exists)

    taken = went.taken & ~self.behind_eos(went.tokens)
    length = s.length + taken.sum(1, dtype=jnp.int32)
    now = put(s.tokens, ahead, went.tokens, taken)
    ended = (taken & (went.tokens == self.cfg.eos)).any(1) if self.cfg.eos >= 0 else jnp.zeros((B,), bool)
    done = s.done | ended | (length >= total)
    at_end = jnp.take_along_axis(went.node, went.accepted[:, None], 1)[:, 0]
    pick = lambda i: jnp.take_along_axis(out.layers["hidden"], i[..., None], 1)
    read = out.layers.get("prefix", out.layers["hidden"])
    last = jnp.take_along_axis(read, slot_of(laid.slot, at_end)[:, None, None], 1)[:, 0]
    hidden = jnp.where(s.done[:, None], s.hidden, last)
    state = self.drafter.observe(
      params, own,
      self.seen(row.replace(tokens=now), key, s, length, count, went, found, out, pick, hidden), state,
    )  # fmt: skip
    return Progress(
      tokens=now,
      committed_at=put(s.committed_at, ahead, s.step, taken),
      length=length,
      done=done,
      first=s.first & s.done,
      hidden=hidden,
      step=s.step + 1,
      calls=s.calls | {"verify": s.calls["verify"] + ~s.done},
      drafted=s.drafted + jnp.where(s.done, 0, self.meant(count, total - s.length)),
      accepted=s.accepted + jnp.where(s.done, 0, jnp.minimum(went.accepted, length - s.length)),
      cache=self.keep(s.cache, out.new, laid, went),
      draft=state,
    )

  @property
  def branching(self) -> int:
    """Candidates that are tried at one place, at most."""
    return self.drafter.chains

  def meant(self, count: Array, room: Array) -> Array:
    """int32[B], drafts that are verified, of those that fit."""
    return jnp.minimum(count.max(1), room)

  def lay(self, row: Row, s: Progress, tokens: Array, count: Array, total: Array) -> Laid:
    """The slots of a verifying call, its inputs, and what is asked of it."""
    drafts = s.length[:, None] + np.arange(self.drafter.size)
    filled = row.replace(tokens=put(s.tokens, drafts, tokens[:, 0], drafts < row.tokens.shape[1]))
    slots, noise, use = self.place(filled, s, tokens, count)
    inputs = self.wide.inputs(filled, noise, slots, self.latent)
    slot, can = self.nodes(filled, noise, slots, s, total)
    call = self.plan
    shift = (self.wide.layout.streams.index(CLEAN) - call.stream) * STREAM
    code = {p: m.code[:, : len(shift)] + shift for p, m in inputs.masks.items()}
    return Laid(inputs, slot, can, use, code)

  def follow(self, found: verify.Verdict, tokens: Array, count: Array, u: Array, can: Array) -> verify.Walk:
    """The walk along the accepted drafts."""
    return verify.walk(found, tokens, count, u, can)

  def nodes(self, row: Row, noise: Noise, slots: Slots, s: Progress, total: Array) -> tuple[Array, Array]:
    """The slot that predicts behind each node, int32[B, M], and which of them are asked, bool[B, M]."""
    R, K, N = self.drafter.chains, self.drafter.size, row.tokens.shape[1]
    term = self.wide.terms[self.term]
    found = []
    for r in range(R):
      stream = term.stream if r == 0 else f"chain{r}"
      read = self.wide.read(row, noise, slots, dataclasses.replace(term, stream=stream))
      at = s.length[:, None] + np.arange(r > 0, K + 1)
      slot = jnp.take_along_axis(read, jnp.minimum(at, N - 1), 1)
      found.append(jnp.where(at < total[:, None], slot, -1))
    slot = jnp.concatenate(found, 1)
    can = (slot >= 0) & ~s.done[:, None]
    return jnp.where(can, slot, -1), can

  def evaluate(self, params, inputs, slot: Array, can: Array, cache):
    """The model's Outputs; a Dist for the target's term, and empty ones of other terms for `Seen.dist`."""
    weight, zero = can.astype(jnp.float32), jnp.zeros(slot.shape, jnp.int32)
    targets = {self.term: Target(self.wide.terms[self.term].head, slot, zero, weight)}
    for name, term in self.wide.terms.items():
      if name != self.term and self.model.cfg.head(term.head).kind == "categorical":
        targets[name] = Target(term.head, slot[:, :1] * 0 - 1, zero[:, :1], weight[:, :1] * 0)
    return self.model.apply(params, inputs, targets, cache=cache)

  def decide(self, row: Row, key: Array, dist, tokens: Array, q, length: Array) -> verify.Verdict:
    """The rule's verdict of every node."""
    depth, candidates = self.candidates(tokens)
    keys = node_keys(row, key, draw.TOKEN, length[:, None] + depth)
    xs = {"candidates": candidates, "k0": keys[0], "k1": keys[1]}
    if q is not None and self.rule.needs_logits:
      xs["q"] = self.told(q)

    def fn(logits, x):
      return self.rule(self.choice, logits, x["candidates"], x.get("q"), x["k0"], x["k1"])

    return dist.map(fn, xs)

  def told(self, q) -> Any:
    """What the rule is told of the law of each node's candidates, leaves [B, M, …], from `Draft.logits`."""
    _, R, K, _ = q.shape
    chain, depth = np.repeat(np.arange(R), K), np.tile(np.arange(1, K + 1), R)
    return q[:, np.append(0, chain), np.minimum(np.append(0, depth), K - 1)]

  def candidates(self, tokens: Array) -> tuple[np.ndarray, Array]:
    """(int32[M] tokens before each node of a draft, int32[B, M, R] what is tried behind it)."""
    B, R, K = tokens.shape
    depth = np.concatenate([[0], np.tile(np.arange(1, K + 1), R)])
    padded = jnp.concatenate([tokens, jnp.full((B, R, 1), -1, tokens.dtype)], 2)
    return depth, jnp.moveaxis(padded, 1, 2)[:, depth]

  def behind_eos(self, tokens: Array) -> Array:
    """bool[B, K+1]: an EOS stands before."""
    if self.cfg.eos < 0:
      return jnp.zeros(tokens.shape, bool)
    is_end = (tokens == self.cfg.eos).astype(jnp.int32)
    return jnp.cumsum(is_end, 1) - is_end > 0

  def keep(self, cache, new, laid: Laid, went: verify.Walk):
    """The cache with the slots that are committed now, as slots of the clean stream."""
    if cache is None:
      return None
    on = np.arange(went.node.shape[1]) <= went.accepted[:, None]
    path = jnp.where(on, went.node, -1)[..., None]  # a node is the slot of that number
    kept = (path == np.arange(laid.use.shape[1])).any(1)
    return write_cache(cache, {**new, "code": laid.code}, kept & laid.use)

  def seen(self, row, key, s: Progress, length, count, went, found, out, pick, hidden) -> Seen:
    """What the drafter may observe."""
    K, G = self.drafter.size, self.drafter.ahead
    ahead = None
    if G:
      base = 1 + self.drafter.chains * K
      ahead = pick(base + went.accepted[:, None] * G + np.arange(G))

    taps = out.layers.get("taps")
    if taps is not None:
      taps = jnp.take_along_axis(taps, went.node[None, ..., None], 2)

    def dist(term, hidden, valid):
      return out.dists[term].replace(hidden=hidden, valid=valid)

    return Seen(
      row=row,
      length=length,
      keys=draw.row_keys(row, key, DRAFT, length),
      accepted=went.accepted,
      active=~s.done,
      predicted=jnp.take_along_axis(found.token[..., 0], went.node, 1),
      hidden=hidden,
      ahead=ahead,
      dist=dist,
      before=s.length,
      count=count.max(1),
      path=pick(went.node),
      taps=taps,
    )

  def result(self, row: Row, s: Progress) -> Result:
    """What a state has generated so far."""
    return Result(
      tokens=s.tokens,
      committed_at=s.committed_at,
      level_at=jnp.zeros(s.tokens.shape, jnp.float32),
      lengths=s.length,
      done=s.done,
      steps=s.step,
      forwards=s.step + s.calls["prefill"].any(),
      calls=s.calls,
      memory={"drafted": s.drafted, "accepted": s.accepted} | self.drafter.report(s.draft),
    )


def slot_of(slot: Array, node: Array) -> Array:
  """int32[B], the slot of node int32[B] among slot int32[B, M]; 0 where there is none."""
  return jnp.maximum(jnp.take_along_axis(slot, node[:, None], 1)[:, 0], 0)


def unadorned(sampler: Sampler) -> None:
  """Refuses what verification does not do: guided logits, stop rules besides EOS.

  Raises:
    ConfigError: key, value, reason, fix.
  """
  if sampler.branches > 1:
    raise ConfigError(
      "guided logits are not verified", key="sampler.guidance", value=sampler.cfg.guidance.scale,
      fix="sampler.guidance=1, or sampler.draft.kind='plain'",
    )  # fmt: skip
  if sampler.stops:
    raise ConfigError(
      "a verified row stops at its EOS only", key="sampler.stop", value=sampler.stops[0],
      fix="sampler.stop=(), or sampler.draft.kind='plain'",
    )  # fmt: skip


def build(
  sampler: Sampler, drafter: Drafter, rule: verify.Rule | str = "auto", own: Any = None
) -> Speculative:
  """Speculative decoding with the target of `sampler`.

  Args:
    rule: a Rule, a name of verify.REGISTRY, or "auto": rejection for drafts that come with logits, match
      for others.
    own: the drafter's own parameters.

  Raises:
    ConfigError: a target or a rule that does not fit: key, value, reason, fix.
  """
  term = sampler.objective.terms[sampler.term]
  if not sampler.single or term.stream != CLEAN:
    raise ConfigError(
      "drafts are verified by a next-token head on a causal clean stream; this term predicts otherwise",
      key="sampler.term", value=sampler.term, fix="a term with stream='c' and align='shift'",
    )  # fmt: skip
  unadorned(sampler)
  drafter = drafter.bind(sampler)
  if drafter.size < 1:
    raise ConfigError(
      "a draft has at least one token", key="sampler.draft.size", value=drafter.size, fix="size=4"
    )
  if rule == "auto":
    kind = "rejection" if drafter.tree is None else "recursive"
    rule = kind if drafter.stochastic else "match"
  rule = verify.REGISTRY[rule]() if isinstance(rule, str) else rule
  if isinstance(rule, verify.Recursive) and drafter.tree is None:
    raise ConfigError(
      "only the children of a node are drawn without replacement", key="sampler.verify", value="recursive",
      fix="sampler.verify='rejection'",
    )  # fmt: skip
  if rule.needs_logits and not drafter.stochastic:
    raise ConfigError(
      "these drafts are no draws from a law that the drafter knows", key="sampler.verify", value="rejection",
      fix="sampler.verify='match', which accepts as many of them",
    )  # fmt: skip
  cls = Speculative
  if drafter.tree is not None:
    from genmodels.sampling import tree_speculate  # here: it is made of this module's parts

    tree_speculate.check(sampler, drafter, rule)
    cls = tree_speculate.TreeSpeculative
  groups = drafter.size + 1 if drafter.ahead else 0
  noisy = getattr(drafter, "stream", "")
  wide = widen(sampler.objective, drafter.chains, groups, noisy)
  fields = {f.name: getattr(sampler, f.name) for f in dataclasses.fields(Sampler)}
  if drafter.watch:
    fields["model"] = Model(dataclasses.replace(sampler.model.cfg, watch=tuple(drafter.watch)))
  return cls(**fields, drafter=drafter, rule=rule, own=own, wide=wide)
