"""One sampling loop for every model: active set, score, quota, commit, cache, guidance, stop.

A generation in progress is a Row whose uncommitted tokens are the noise: every input, mask and read-out
comes from `objective.view(row, corruption.state(row, committed), only)`, as in training. In each row one
*front* moves over the document, unit by unit:

  next-token models   a unit is one token; its clean slot predicts the token behind it
  block models        a unit is a block; its noisy slots are denoised until it is complete, then a pass
                      over its clean slots enters the cache (and a shifted head predicts the next token)
  next-scale models   a unit is a scale; its slots predict it at once and enter the cache in the same pass
  whole sequences     the document is one unit, nothing is cached

Rows have prompts of their own length and are in different units and phases at one time: each call computes
[B, slots of a unit] with the stream chosen per row, so shapes are static and the loop compiles once.

A cache entry is written when, and only when, everything its slot sees is committed. Then it is what
training computes for the clean stream, and decoding with and without the cache is the same function.

Legend: B rows · N tokens of a row · W tokens of a unit that are asked for · M asked (W, and the next token)
· A slots of a call · D documents of a row (one is generated).
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genmodels import rows
from genmodels.contracts import CONTEXT, TEXT, Array, Noise, Row, Target, pytree
from genmodels.corruption.absorb import block_ordinals
from genmodels.corruption.base import eligible
from genmodels.models import write_cache
from genmodels.parallel import rules
from genmodels.parallel.rules import current_mesh
from genmodels.sampling import draw
from genmodels.sampling.quota import Unit


@pytree()
class State:
  """A batch of generations in progress.

  Fields:
    tokens, committed, committed_at: [B, N]; committed_at is the step (0 first), −1 for given or open tokens.
    level_at: float32[B, N], noise level when the token was committed.
    cursor: int32[B], tokens whose unit is behind the front (in the cache, where there is one).
    unit, k, size, level: the unit being denoised: its first token, steps taken, masked tokens and noise
      level; [B].
    done: bool[B]. step, forwards: int32 scalars.
    caches: one per guidance branch, or none. draft: predictions kept while nothing changes, or none.
    changed: bool, some row changed in the last step.
  """

  tokens: Array
  committed: Array
  committed_at: Array
  level_at: Array
  cursor: Array
  unit: Array
  k: Array
  size: Array
  level: Array
  done: Array
  step: Array
  forwards: Array
  caches: tuple
  draft: Any
  changed: Array


@pytree()
class Result:
  """What was generated.

  Fields:
    tokens: int32[B, N], prompts included; only the first `lengths` are meant.
    committed_at: int32[B, N], step at which a token was committed; −1 for prompts and open tokens.
    level_at: float32[B, N], noise level left in its unit when it was committed.
    lengths: int32[B], valid tokens of the row, EOS included.
    done: bool[B], False only where the loop ran into its step limit.
    steps, forwards: int32 scalars: iterations of the loop, evaluations of the network (prefill included).
  """

  tokens: Array
  committed_at: Array
  level_at: Array
  lengths: Array
  done: Array
  steps: Array
  forwards: Array


@pytree()
class Ask:
  """One call: what to compute and what it may commit.

  Fields:
    only: int32[B, A, 2]; keep: bool[B, A], slots that enter the cache.
    at: int32[B, M], coordinates asked for; can: bool[B, M], those that may be committed; slot: int32[B, M].
    denoise: bool[B], rows under a quota (others commit all they can); fresh: their window is a new one.
    lo, hi, wlo: int32[B], the front unit, and the first token of the window inside it.
    row, noise, inputs: what was viewed, and the first branch's Inputs.
  """

  only: Array
  keep: Array
  at: Array
  can: Array
  slot: Array
  denoise: Array
  fresh: Array
  lo: Array
  hi: Array
  wlo: Array
  row: Row
  noise: Noise
  inputs: Any


def first_where(flag: Array) -> Array:
  """int32[B]: the first flagged coordinate of each row, N if none."""
  return jnp.where(flag.any(1), jnp.argmax(flag, 1), flag.shape[1]).astype(jnp.int32)


def at_coordinate(x: Array, at: Array) -> Array:
  """x [B, N] at coordinates int32[B] or [B, M], clipped into the row."""
  index = jnp.clip(at, 0, x.shape[1] - 1)
  if at.ndim == 1:
    return jnp.take_along_axis(x, index[:, None], 1)[:, 0]
  return jnp.take_along_axis(x, index, 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
  """A sampler of one objective and model; `sampling.build` makes it and checks the laws.

  Fields:
    cfg: SamplerConfig, resolved. objective: frozen at the step of the parameters. model: models.Model.
    latent: bound latent or None.
    term: the term decoded. stream, store: stream that predicts; stream that commits (None: nothing is
      kept behind the front).
    single: a unit is one token; whole: it is the document. capacity: tokens of the largest unit, 0 for
      the whole row.
    denoises: units are filled step by step (else: in the pass that stores them).
    policy: CachePolicy. choice, quota: how tokens and their number are chosen.
  """

  cfg: Any
  objective: Any
  model: Any
  latent: Any
  term: str
  stream: int
  store: int | None
  single: bool
  whole: bool
  capacity: int
  denoises: bool
  policy: Any
  choice: draw.Choice
  quota: Any

  def __post_init__(self):
    object.__setattr__(self, "_jitted", {})

  # -- the public call ------------------------------------------------------------------------------

  def __call__(self, params, row: Row, key: Array, prefill: int | None = None) -> Result:
    """Generates the TEXT tokens of a batch of rows; CONTEXT tokens are given. Jitted once per shape.

    Args:
      params: of the model.
      row: one document a row, from coordinate 0, padding behind it. See `prompt_row`.
      key: of the run; a row's draws also depend on its example id, on nothing else of the batch.
      prefill: static width of the first call, which caches whole units of the prompts; default: what
        these rows need, rounded up to a power of two.

    Raises:
      ValueError: a row that cannot be started: its first token has no predictor.
    """
    self.check(row)
    if prefill is None:
      prefill = self.prefill_width(row)
    # On a mesh rows are spread as a training batch is, and every process gets the whole result.
    mesh = current_mesh()
    if mesh not in self._jitted:
      out = None if mesh is None else rules.replicated(mesh)
      self._jitted[mesh] = jax.jit(self.run, static_argnames=("prefill",), out_shardings=out)
    if mesh is not None:
      fits = row.tokens.shape[0] % math.prod(mesh.shape[a] for a in rules.BATCH_AXES) == 0
      row = jax.device_put(row, rules.row_sharding(mesh) if fits else rules.replicated(mesh))
    return self._jitted[mesh](params, row, key, prefill=prefill)

  def check(self, row: Row) -> None:
    """Raises ValueError for rows that this sampler cannot generate."""
    first = np.asarray(row.doc[:, 0] >= 0) & np.asarray(row.role[:, 0] == TEXT)
    if self.lead and first.any():
      align = self.objective.terms[self.term].align
      raise ValueError(
        f"row {int(first.argmax())} has no given token: under align={align!r} nothing predicts the first "
        "token of a document; start every prompt with BOS (role CONTEXT)"
      )
    doc = np.asarray(row.doc)
    if self.branches > 1 and self.unguided(row):
      warnings.warn(
        "guidance has no effect: dropping the conditions of these rows changes no input", stacklevel=3
      )
    if (doc[:, 1:] > doc[:, :-1]).any() or doc.max() > 0:
      raise ValueError(
        "a row to generate holds one document (index 0) from its first token on, then padding (−1)"
      )

  def unguided(self, row: Row) -> bool:
    """Both branches see the same: the objective drops nothing, or the rows have no condition."""

    def same(row):
      committed = jnp.logical_not(eligible(row))
      noise = self.objective.corruption.state(row, committed)
      at = jnp.broadcast_to(rows.coordinates(row.doc), row.doc.shape)
      only = self.only(jnp.full((at.shape[0], 1), self.stream), at, row.doc >= 0)
      a, b = (jax.tree.leaves(self.view(row, noise, only, i)[0]) for i in range(2))
      return jnp.stack([(x == y).all() for x, y in zip(a, b, strict=True)]).all()

    return bool(jax.jit(same)(row))

  def prefill_width(self, row: Row) -> int:
    """The first call's width for concrete rows: 0, or a power of two (at most N)."""
    if not self.policy.stores:
      return 0
    most = int(jnp.max(jax.jit(self.start_cursor)(row)))
    return min(1 << (most - 1).bit_length(), row.tokens.shape[1]) if most else 0

  # -- geometry -------------------------------------------------------------------------------------

  @property
  def lead(self) -> bool:
    """A unit's last committed slot predicts the first token behind it."""
    return self.objective.terms[self.term].align != "same"

  @property
  def branches(self) -> int:
    return 1 if self.cfg.guidance.off else 2

  def units(self, row: Row, noise: Noise) -> tuple[Array, Array]:
    """The unit of every token as an interval, int32[B, N] each."""
    if self.whole:
      return rows.doc_bounds(row.doc)
    if not self.single:
      return noise.blk_lo, noise.blk_hi
    n = jnp.broadcast_to(rows.coordinates(row.doc), row.doc.shape)
    return n, n + 1

  def width(self, row: Row) -> int:
    """Slots of the front unit in a call (static)."""
    return min(self.capacity, row.tokens.shape[1]) if self.capacity else row.tokens.shape[1]

  def start_cursor(self, row: Row) -> Array:
    """int32[B]: how many given tokens precede the first front. All whole units, but one where its slots
    predict the first open token."""
    committed = jnp.logical_not(eligible(row))
    noise = self.objective.corruption.state(row, committed)
    lo, _ = self.units(row, noise)
    whole = at_coordinate(lo, first_where(~committed))
    if self.lead:
      whole = jnp.where(whole > 0, at_coordinate(lo, whole - 1), 0)
    return jnp.where(committed.all(1), 0, whole) if self.store is not None else jnp.zeros_like(whole)

  # -- the loop -------------------------------------------------------------------------------------

  def run(self, params, row: Row, key: Array, prefill: int) -> Result:
    """`__call__` without the host's part; traceable."""
    state = self.start(params, row, prefill)
    limit = self.step_limit(row)

    def more(s: State):
      return jnp.logical_not(s.done.all()) & (s.step < limit)

    s = jax.lax.while_loop(more, lambda s: self.step(params, row, s, key), state)
    return self.result(row, s)

  def step_limit(self, row: Row) -> int:
    """More steps than any generation takes: a guard against a loop without progress."""
    N, W = row.tokens.shape[1], self.window(row)
    units = -(-N // max(W, 1)) + 2 if not self.objective.corruption.blocks.sizes else N
    return units * (self.quota.bound(max(W, 1)) + 2) + N

  def start(self, params, row: Row, prefill: int) -> State:
    """The state before the first step: given tokens committed, whole units of the prompts cached."""
    B, N = row.tokens.shape
    committed = jnp.logical_not(eligible(row))
    cursor = self.start_cursor(row)
    caches, forwards = (), 0
    if self.policy.stores:
      cache = self.model.init_cache(B, N)
      caches = (cache,) * self.branches
      if prefill:
        at = jnp.broadcast_to(jnp.arange(prefill, dtype=jnp.int32), (B, prefill))
        keep = at < jnp.minimum(cursor, prefill)[:, None]
        only = self.only(jnp.full((B, 1), self.store), at, keep)
        noise = self.objective.corruption.state(row, committed)
        outs = []
        for i, cache in enumerate(caches):
          inputs, _ = self.view(row, noise, only, i)
          new = self.model.apply(params, inputs, {}, cache=cache).new
          outs.append(write_cache(cache, new, keep))
        caches, forwards = tuple(outs), self.branches
    zero = jnp.zeros((B,), jnp.int32)
    M = self.window(row) + self.lead
    draft = (jnp.zeros((B, M), jnp.int32), jnp.zeros((B, M), jnp.float32)) if self.reuse else ()
    return State(
      tokens=row.tokens,
      committed=committed,
      committed_at=jnp.full((B, N), -1, jnp.int32),
      level_at=jnp.zeros((B, N), jnp.float32),
      cursor=cursor,
      unit=zero - 1,
      k=zero,
      size=zero,
      level=jnp.ones((B,), jnp.float32),
      done=committed.all(1),
      step=jnp.int32(0),
      forwards=jnp.int32(forwards),
      caches=caches,
      draft=draft,
      changed=jnp.bool_(True),
    )

  @property
  def reuse(self) -> bool:
    return self.quota.reuse

  def window(self, row: Row) -> int:
    """Tokens of the front unit that a call asks for (static): a sub-block, or all; none if a unit is one
    token that predicts the next."""
    if self.single:
      return 0
    return min(self.cfg.sub_block, self.width(row)) if self.cfg.sub_block else self.width(row)

  def only(self, stream: Array, at: Array, keep: Array) -> Array:
    """int32[B, A, 2] from a stream (broadcast) and a coordinate per slot; empty where not kept."""
    pair = jnp.stack([jnp.broadcast_to(stream, at.shape).astype(jnp.int32), at], -1)
    return jnp.where(keep[..., None], pair, -1)

  def view(self, row: Row, noise: Noise, only: Array, branch: int):
    """The objective's view; branch 1 has every condition dropped."""
    if self.branches > 1:
      drop = jnp.full(row.docs.occurrence.shape, branch == 1)
      noise = noise.replace(drop=drop)
    return self.objective.view(row, noise, only, self.latent)

  def ask(self, row: Row, s: State) -> Ask:
    """What the next step computes."""
    B, N = row.tokens.shape
    row = row.replace(tokens=s.tokens)
    open_ = ~s.committed
    noise = self.objective.corruption.state(row, s.committed)
    unit_lo, unit_hi = self.units(row, noise)
    lo, hi = at_coordinate(unit_lo, s.cursor), at_coordinate(unit_hi, s.cursor)
    first = first_where(open_)
    denoise = (first < hi) & ~s.done & self.denoises
    wlo, whi = lo, hi
    if self.cfg.sub_block:
      origin = jnp.maximum(lo, first_where(eligible(row)))
      wlo = origin + jnp.maximum(first - origin, 0) // self.cfg.sub_block * self.cfg.sub_block
      wlo = jnp.where(denoise, wlo, lo)
      whi = jnp.minimum(wlo + self.cfg.sub_block, hi)

    A = self.width(row)
    at = lo[:, None] + jnp.arange(A, dtype=jnp.int32)
    use = (at < hi[:, None]) & ~s.done[:, None]
    if self.store is None:
      stream = jnp.full((B, 1), self.stream)
    else:
      stream = jnp.where(denoise, self.stream, self.store)[:, None]
    keep = use & ~denoise[:, None] if self.store is not None else jnp.zeros_like(use)
    only = self.only(stream, at, use)
    if self.store is not None and not self.policy.stores:  # everything behind the front, once more
      past = jnp.broadcast_to(jnp.arange(N, dtype=jnp.int32), (B, N))
      behind = (past < lo[:, None]) & ~s.done[:, None]
      only = jnp.concatenate([self.only(jnp.full((B, 1), self.store), past, behind), only], 1)
      keep = jnp.concatenate([jnp.zeros_like(behind), keep], 1)

    ask = wlo[:, None] + jnp.arange(self.window(row), dtype=jnp.int32)
    valid = ask < whi[:, None]
    if self.lead:
      ask = jnp.concatenate([ask, hi[:, None]], 1)
      valid = jnp.concatenate([valid, (hi < N)[:, None]], 1)
    valid &= ~s.done[:, None]
    fresh = denoise & (s.unit != wlo)
    if self.quota.timed:
      level = jnp.where(fresh, 1.0, s.level)[:, None, None]
      noise = noise.replace(level=jnp.where(noise.hit, level, noise.level))
    inputs, read = self.view(row, noise, only, 0)
    slot = at_coordinate(read[self.term], ask)
    can = valid & at_coordinate(open_, ask) & (slot >= 0)
    slot = jnp.where(can, slot, -1)
    return Ask(only, keep, ask, can, slot, denoise, fresh, lo, hi, wlo, row, noise, inputs)

  def predict(self, params, a: Ask, s: State, fn, xs):
    """fn over the logits of the asked tokens, guided.

    Args:
      fn: (logits float32[c, V], *chunks of xs) → pytree of [c, …]. xs: arrays [B, M, …].

    Returns:
      fn's pytree of [B, M, …], and a list of Outputs.new by branch.
    """
    term = self.objective.terms[self.term]
    zero = jnp.zeros(a.at.shape, jnp.int32)
    target = Target(head=term.head, slot=a.slot, value=zero, weight=a.can.astype(jnp.float32))
    dists, news = [], []
    for i in range(self.branches):
      inputs = self.view(a.row, a.noise, a.only, i)[0] if i else a.inputs
      cache = s.caches[i] if s.caches else None
      out = self.model.apply(params, inputs, {self.term: target}, cache=cache)
      dists.append(out.dists[self.term])
      news.append(out.new)
    dist = dists[0]
    if self.branches > 1:
      scale = self.cfg.guidance(self.progress(s, a))
      dist = dist.guide(dists[1], jnp.broadcast_to(scale[:, None], a.at.shape))
    return dist.map(fn, *xs), news

  def progress(self, s: State, a: Ask) -> Array:
    """float32[B] in [0, 1]: how far a row is, in tokens committed or in units."""
    if self.cfg.guidance.over == "tokens":
      text = eligible(a.row)
      return (s.committed & text).sum(1) / jnp.maximum(text.sum(1), 1)
    ordinal, total = block_ordinals(a.row, self.units(a.row, a.noise)[0])
    return at_coordinate(ordinal, a.lo) / jnp.maximum(at_coordinate(total, a.lo) - 1, 1)

  def logits(self, params, row: Row, s: State) -> tuple[Array, Ask]:
    """float32[B, M, V] of the asked tokens (0 where none may be committed), for tests and inspection."""
    a = self.ask(row, s)
    return self.predict(params, a, s, self.choice.logits, ())[0], a

  def step(self, params, row: Row, s: State, key: Array) -> State:
    """One iteration: predict, commit, write the cache, move the front, stop."""
    B, N = row.tokens.shape
    a = self.ask(row, s)
    # Keyed by how much is committed, not by the step: as long as a row stays as it is, so do its draws.
    # That makes kept predictions the same as recomputed ones.
    keys = draw.row_keys(row, key, draw.TOKEN, s.committed.sum(1))
    keys = draw.token_keys(keys, a.at)

    def forward():
      picked, news = self.predict(params, a, s, self.choice, keys)
      caches = s.caches
      if caches:
        caches = tuple(write_cache(c, n, a.keep) for c, n in zip(caches, news, strict=True))
      return picked, caches

    if self.reuse:
      (token, score), caches = jax.lax.cond(s.changed, forward, lambda: (s.draft, s.caches))
      forwards = s.forwards + self.branches * s.changed
    else:
      (token, score), caches = forward()
      forwards = s.forwards + self.branches

    in_unit = a.can & a.denoise[:, None] & (a.at < a.hi[:, None])
    unit = Unit(
      can=in_unit,
      score=score,
      k=jnp.where(a.fresh, 0, s.k),
      size=jnp.where(a.fresh, in_unit.sum(1, dtype=jnp.int32), s.size),
      level=jnp.where(a.fresh, 1.0, s.level),
      token_u=draw.uniforms(draw.token_keys(draw.row_keys(row, key, draw.REVEAL, s.step), a.at)),
      row_u=draw.uniforms(draw.row_keys(row, key, draw.TIME, s.step)),
    )
    chosen, level = self.quota.select(unit)
    commit = (chosen & in_unit) | (a.can & ~a.denoise[:, None])

    rows_ = jnp.arange(B)[:, None]
    target = jnp.where(commit, a.at, N)
    put = lambda x, v: x.at[rows_, target].set(v, mode="drop")
    tokens = put(s.tokens, token)
    committed = put(s.committed, True)
    cursor = jnp.where(s.done | a.denoise | (self.store is None), s.cursor, a.hi)
    level = jnp.where(a.denoise, level, s.level)
    done = s.done | committed.all(1) | self.ended(row, tokens, committed)
    return State(
      tokens=tokens,
      committed=committed,
      committed_at=put(s.committed_at, s.step),
      level_at=put(s.level_at, jnp.broadcast_to(jnp.where(a.denoise, level, 0.0)[:, None], a.at.shape)),
      cursor=cursor,
      unit=jnp.where(a.denoise, a.wlo, s.unit),
      k=jnp.where(a.denoise, unit.k + 1, s.k),
      size=unit.size,
      level=level,
      done=done,
      step=s.step + 1,
      forwards=forwards,
      caches=caches,
      draft=(token, score) if self.reuse else (),
      changed=commit.any() | (cursor != s.cursor).any(),
    )

  def ended(self, row: Row, tokens: Array, committed: Array) -> Array:
    """bool[B]: an EOS is committed and so is everything before it."""
    return self._eos_at(row, tokens, committed) < first_where(~committed)

  def _eos_at(self, row, tokens, committed):
    if self.cfg.eos < 0:
      return jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32)
    return first_where((tokens == self.cfg.eos) & committed & eligible(row))

  def result(self, row: Row, s: State) -> Result:
    """What a state has generated so far."""
    total = (row.doc >= 0).sum(1, dtype=jnp.int32)
    open_at = first_where(~s.committed)
    eos = self._eos_at(row, s.tokens, s.committed)
    lengths = jnp.where(eos < open_at, eos + 1, jnp.minimum(open_at, total))
    return Result(s.tokens, s.committed_at, s.level_at, lengths, s.done, s.step, s.forwards)


def prompt_row(
  prompts, length: int, new: int, *, example_ids=None, side=None, pad: int = 0, axes: int = 1
) -> Row:
  """Rows to generate from prompts of unequal length (host).

  Args:
    prompts: sequence of int sequences (BOS included where the model wants one); may be empty.
    length: N, tokens of a row.
    new: tokens to generate per row at most; a row ends at `length`.
    example_ids: uint32[B, 2]; by default the row's number. Equal ids draw equal noise.
    side: {name: [B, 1, …]} tables of conditions.
    axes: position axes.

  Raises:
    ValueError: a prompt that leaves no room.
  """
  from genmodels.contracts import Documents

  B = len(prompts)
  tokens = np.full((B, length), pad, np.int32)
  doc = np.full((B, length), -1, np.int32)
  role = np.full((B, length), TEXT, np.int32)
  for i, p in enumerate(prompts):
    p = np.asarray(p, np.int32).reshape(-1)
    if len(p) >= length:
      raise ValueError(
        f"prompt {i} has {len(p)} tokens, a row has {length}; raise the length or cut the prompt"
      )
    tokens[i, : len(p)] = p
    role[i, : len(p)] = CONTEXT
    doc[i, : min(len(p) + new, length)] = 0
  if example_ids is None:
    example_ids = np.stack([np.zeros(B), np.arange(B)], -1)
  zero = np.zeros((B, 1), np.int32)
  docs = Documents(
    example_id=jnp.asarray(np.asarray(example_ids, np.uint32)[:, None]),
    occurrence=jnp.asarray(zero),
    rank=jnp.asarray(np.stack([np.arange(B), np.full(B, B)], -1)[:, None].astype(np.int32)),
    mode=jnp.asarray(zero),
    source=jnp.asarray(zero),
    side={k: jnp.asarray(v) for k, v in (side or {}).items()},
  )
  pos = np.zeros((B, length, axes), np.float32)
  pos[..., 0] = np.arange(length)
  none = np.full((B, length), -1, np.int32)
  return Row(*(jnp.asarray(x) for x in (tokens, doc, pos, role, np.zeros_like(doc), none)), docs)
