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

The parts are orthogonal, each a small registered object:

  active set  which units are at the front, what one call computes and keeps        active.py
  choice      a token for each asked slot, and how sure of it                       draw.py
  quota       how many, or which, of them are committed                             quota.py
  commit      in which order, from where                                            commit.py
  remask      which committed tokens of the unit are opened again                   remask.py
  mix         what masked slots show besides the mask                               mix.py
  stop        when the rest is committed at once, or a row is over                  stop.py

Legend: B rows · N tokens of a row · W tokens of a unit that are asked for · M asked (W, and the next token)
· A slots of a call · G groups of asked tokens.
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
from genmodels.contracts import TEXT, Array, Noise, Row, Target
from genmodels.corruption.absorb import block_ordinals
from genmodels.corruption.base import eligible
from genmodels.models import write_cache
from genmodels.parallel import rules
from genmodels.parallel.rules import current_mesh
from genmodels.sampling import active, draw, mix, partial, stop
from genmodels.sampling.quota import Unit
from genmodels.sampling.state import (
  KINDS,
  Ask,
  Result,
  Selected,
  State,
  at_coordinate,
  eos_at,
  first_where,
  mean,
  put,
)


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
    policy: CachePolicy.
    stored: what a stored slot sees: "causal", "block", or "" (nothing is stored).
    active, choice, quota, commit, remask, mix, stops: the plug-ins, see the module.
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
  stored: str
  active: Any
  choice: draw.Choice
  quota: Any
  commit: Any
  remask: Any
  mix: Any
  stops: tuple

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
    need = self.prefill_width(row)
    if prefill is not None and prefill < need:
      raise ValueError(
        f"prefill is {prefill}, but the prompts of these rows put up to {need} tokens into the cache before "
        f"the first step; give at least {need}, or leave it out"
      )
    prefill = need if prefill is None else min(prefill, row.tokens.shape[1])
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
      only = active.pairs(jnp.full((at.shape[0], 1), self.stream), at, row.doc >= 0)
      a, b = (jax.tree.leaves(self.view(row, noise, only, i)[0]) for i in range(2))
      return jnp.stack([(x == y).all() for x, y in zip(a, b, strict=True)]).all()

    return bool(jax.jit(same)(row))

  def prefill_width(self, row: Row) -> int:
    """The first call's width for concrete rows: 0, or a power of two (at most N)."""
    if not self.policy.stores:
      return 0
    most = int(jnp.max(jax.jit(lambda r: self.active.start(self, r))(row)))
    return min(1 << (most - 1).bit_length(), row.tokens.shape[1]) if most else 0

  # -- what follows from the objective --------------------------------------------------------------

  @property
  def lead(self) -> bool:
    """A unit's last committed slot predicts the first token behind it."""
    return self.objective.terms[self.term].align != "same"

  @property
  def branches(self) -> int:
    return 1 if self.cfg.guidance.off else 2

  @property
  def reuse(self) -> bool:
    """Predictions are kept while no row changes; they would change if entries of a partial cache do."""
    looks_back = self.choice.extras or self.choice.credit is not None
    return self.quota.reuse and not looks_back and self.policy.partial is None

  def named_stops(self):
    """(key, rule) of the stop rules."""
    names = {cls: kind for kind, cls in stop.REGISTRY.items()}
    return [(names[type(x)], x) for x in self.stops]

  def view(self, row: Row, noise: Noise, only: Array, branch: int):
    """The objective's view; branch 1 has every condition dropped."""
    if self.branches > 1:
      drop = jnp.full(row.docs.occurrence.shape, branch == 1)
      noise = noise.replace(drop=drop)
    return self.objective.view(row, noise, only, self.latent)

  # -- the loop -------------------------------------------------------------------------------------

  def run(self, params, row: Row, key: Array, prefill: int) -> Result:
    """`__call__` without the host's part; traceable."""
    state = self.start(params, row, prefill, key)
    limit = self.step_limit(row)

    def more(s: State):
      return jnp.logical_not(s.done.all()) & (s.step < limit)

    s = jax.lax.while_loop(more, lambda s: self.step(params, row, s, key), state)
    return self.result(row, s)

  def step_limit(self, row: Row) -> int:
    """More steps than any generation takes: a guard against a loop without progress."""
    N, W = row.tokens.shape[1], self.active.window(self, row)
    limit = self.most_units(row) * (self.quota.bound(max(W, 1)) + 2 + self.mix.refine) + N
    return limit * math.prod(1 + getattr(x, "tries", 0) for x in self.stops)

  def most_units(self, row: Row) -> int:
    """More units, or windows of them, than a row has."""
    N, W = row.tokens.shape[1], self.active.window(self, row)
    return -(-N // max(W, 1)) + 2 if not self.objective.corruption.blocks.sizes else N

  def noise(self, row: Row, s: State) -> Noise:
    """The noise that describes a state: what is not committed is hit."""
    return self.objective.corruption.state(row, s.committed)

  def start(
    self, params, row: Row, prefill: int, key: Array | None = None, noise: Noise | None = None
  ) -> State:
    """The state before the first step: given tokens committed, whole units of the prompts cached.

    Args:
      key: of the run, for samplers that draw something now. noise: of the row as it is given, if known.
    """
    B, N = row.tokens.shape
    committed = jnp.logical_not(eligible(row))
    noise = self.objective.corruption.state(row, committed) if noise is None else noise
    cursor = self.active.start(self, row, noise)
    used = jnp.minimum(cursor, prefill)
    zero = jnp.zeros((B,), jnp.int32)
    caches, forwards, calls = (), 0, dict.fromkeys(KINDS, zero)
    if self.policy.stores:
      caches = (self.model.init_cache(B, partial.capacity(self, row)),) * self.branches
      if prefill:
        caches, some, _ = self.prefill(params, row, caches, noise, used, prefill)
        forwards, calls = self.branches, calls | {"prefill": some}
    M = self.active.asked(self, row)
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
      busy=jnp.zeros((B,), bool),
      done=committed.all(1),
      step=jnp.int32(0),
      forwards=jnp.int32(forwards),
      calls=calls,
      caches=caches,
      draft=self.choice.nothing(B, M) if self.reuse else (),
      changed=jnp.bool_(True),
      memory=self.memory(row) | {"cache": partial.memory(self, row, used, prefill)},
    )

  def memory(self, row: Row) -> dict[str, Any]:
    """What the plug-ins remember, before the first step."""
    zero, shape = jnp.zeros(row.doc.shape[:1], jnp.int32), row.doc.shape
    out = {name: x.memory(row) for name, x in self.named_stops() if x.memory(row)}
    if self.remask.active:
      out["remask"] = {"confidence": jnp.full(shape, -jnp.inf), "tries": zero}
    if self.choice.top:
      out["top"] = mix.remembered(shape, self.choice.top)
    if self.mix.refine:
      out["refined"] = zero
    if self.choice.credit is not None:
      out["credit"] = self.choice.credit.memory(shape)
    return out

  def prefill(self, params, row: Row, caches, noise: Noise, length: Array, width: int):
    """Caches with the first `length` int32[B] ≤ width tokens of the rows, int32[B], rows that had any, and
    `Outputs.layers` of the first branch."""
    B = length.shape[0]
    at = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (B, width))
    keep = at < length[:, None]
    only = active.pairs(jnp.full((B, 1), self.store), at, keep)
    outs, layers = [], None
    for i, cache in enumerate(caches):
      inputs, _ = self.view(row, noise, only, i)
      out = self.model.apply(params, inputs, {}, cache=cache)
      layers = layers if i else out.layers
      outs.append(write_cache(cache, out.new, keep))
    return tuple(outs), (length > 0).astype(jnp.int32), layers

  def ask(self, row: Row, s: State) -> Ask:
    """What the next step computes."""
    return self.active.ask(self, row, s)

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
    add = self.mix.add(self, params, a, s)
    dists, news = [], []
    for i in range(self.branches):
      inputs = self.view(a.row, a.noise, a.only, i)[0] if i else a.inputs
      if add is not None:
        inputs = inputs.replace(add_embed=add)
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
    ordinal, total = block_ordinals(a.row, self.active.units(self, a.row, a.noise)[0])
    return at_coordinate(ordinal, a.lo) / jnp.maximum(at_coordinate(total, a.lo) - 1, 1)

  def logits(self, params, row: Row, s: State, key: Array | None = None) -> tuple[Array, Ask]:
    """float32[B, M, V] of the asked tokens (0 where none may be committed), for tests and inspection.

    Args:
      key: of the run; for caches that compute what a step is going to commit."""
    a = self.ask(row, s)
    if self.policy.partial is None:
      return self.predict(params, a, s, self.choice.logits, ())[0], a
    out, now, *_ = partial.predict(self, params, a, s, key, self.choice.logits, ())
    return out, a.replace(can=now)

  def keys(self, s: State, a: Ask, key: Array) -> tuple[Array, Array]:
    """Two uint32[B, M], of the draws of the asked tokens."""
    # Keyed by how much is committed, not by the step: as long as a row stays as it is, so do its draws.
    # That makes kept predictions the same as recomputed ones.
    # What was opened again, or begun anew, counts as more than any number of tokens.
    again = [s.memory[name]["tries"] for name in ("remask", "entropy_floor") if name in s.memory]
    changes = s.committed.sum(1) + (a.row.doc.shape[1] + 1) * sum(again)
    return draw.token_keys(draw.row_keys(a.row, key, draw.TOKEN, changes), a.at)

  def foreseen(self, s: State, a: Ask, key: Array) -> Array:
    """bool[B, M]: what this step commits, where that does not depend on what it predicts."""
    score = draw.random_score(*self.keys(s, a, key))
    picked = self.choice.nothing(*a.at.shape).replace(score=score)
    return self.select(a.row, s, a, picked, key).commit

  def forward(self, params, row: Row, s: State, a: Ask, key: Array):
    """(draw.Picked of the asked tokens, caches with what the call keeps, evaluations of the network, what is
    remembered of the cache: `partial.memory`)."""
    xs = self.keys(s, a, key)
    if "kl" in self.choice.extras:
      xs += tuple(mix.rows_at(s.memory["top"][name], a.at) for name in ("ids", "prob"))
    if self.choice.credit is not None:
      xs += tuple(mix.rows_at(s.memory["credit"][name], a.at) for name in ("ids", "value"))

    if self.policy.partial is not None:
      picked, caches, kept = partial.forward(self, params, s, a, key, xs)
      return picked, caches, jnp.int32(self.branches), kept

    def run():
      picked, news = self.predict(params, a, s, self.choice, xs)
      caches = s.caches
      if caches:
        caches = tuple(write_cache(c, n, a.keep) for c, n in zip(caches, news, strict=True))
      return picked, caches

    if not self.reuse:
      return *run(), jnp.int32(self.branches), partial.counted(self, s, a)
    picked, caches = jax.lax.cond(s.changed, run, lambda: (s.draft, s.caches))
    return picked, caches, self.branches * s.changed, partial.counted(self, s, a, s.changed)

  def unit(self, row: Row, s: State, a: Ask, picked: draw.Picked, key: Array) -> Unit:
    """What quotas look at: the tokens of the window, split into the groups of the active set."""
    G, W, score = self.active.groups, self.active.window(self, row), self.cfg.score
    split = lambda x: x[:, :W].reshape(x.shape[0] * G, -1)
    each = lambda x: jnp.repeat(x, G, axis=0)
    can, at = split(a.under), split(a.at)
    size = each(jnp.where(a.fresh, a.under.sum(1, dtype=jnp.int32), s.size))
    token_u = split(draw.uniforms(draw.token_keys(draw.row_keys(row, key, draw.REVEAL, s.step), a.at)))
    first = jnp.min(jnp.where(can, at, row.doc.shape[1]), 1, keepdims=True)
    progress = 1 - can.sum(1) / jnp.maximum(size, 1)
    value = score.adjust(split(picked.score), split(picked.token) == self.cfg.eos, at - first, progress)
    return Unit(
      can=can,
      at=at,
      score=value,
      rank=score.rank(value, token_u),
      least=a.least,
      k=each(jnp.where(a.fresh, 0, s.k)),
      size=size,
      level=each(jnp.where(a.fresh, 1.0, s.level)),
      token_u=token_u,
      row_u=each(draw.uniforms(draw.row_keys(row, key, draw.TIME, s.step))),
    )

  def select(self, row: Row, s: State, a: Ask, picked: draw.Picked, key: Array) -> Selected:
    """Which tokens are committed and which are opened again, and the unit after that."""
    B, M = a.at.shape
    none = jnp.zeros((B, M), bool)
    forced = a.can & ~a.under
    if not self.denoises:
      return Selected(forced, none, s.k, s.size, s.level, s.busy, s.memory)
    G, W = self.active.groups, self.active.window(self, row)
    join = lambda x: jnp.pad(x.reshape(B, W), ((0, 0), (0, M - W)))
    unit = self.remask.prepare(self.quota, self.commit.rank(self.unit(row, s, a, picked, key)))
    chosen, level = self.quota.select(unit)
    chosen, opened = self.commit.select(unit, chosen), none
    memory, hold = dict(s.memory), jnp.zeros((B,), bool)
    if self.remask.active:
      u = draw.uniforms(draw.token_keys(draw.row_keys(row, key, draw.REMASK, s.step), a.at))
      held, kept = a.held[:, :W], s.memory["remask"]
      conf = self.remask.confidence(unit, held, at_coordinate(kept["confidence"], unit.at))
      chosen, opened = self.remask.select(self.quota, unit, chosen, held, conf, u[:, :W])
      chosen, opened, conf = join(chosen), join(opened & a.denoise[:, None]), join(conf)
      memory["remask"] = {
        "confidence": put(kept["confidence"], a.at, conf, a.under | a.held),
        "tries": kept["tries"] + opened.any(1),
      }
    else:
      chosen = join(chosen)
    k, size, old, level = (x.reshape(B, G)[:, 0] for x in (unit.k, unit.size, unit.level, level))
    if self.mix.refine:
      done = jnp.where(a.fresh, 0, s.memory["refined"])
      hold = a.denoise & (done < self.mix.refine) & (mean(picked.kl, a.under) >= self.mix.tol)
      memory["refined"] = done + hold
    if self.choice.top:
      memory["top"] = mix.remember(memory["top"], a, picked)
    if self.choice.credit is not None:
      memory["credit"] = self.choice.credit.remember(memory["credit"], a, picked.credit)
    chosen, level = chosen & ~hold[:, None], jnp.where(hold, old, level)
    progress = 1 - a.under.sum(1) / jnp.maximum(size, 1)
    for rule in self.stops:
      chosen |= rule.flush(a, picked, progress)[:, None]
    k = k + ~hold
    return Selected(
      commit=(chosen & a.under) | forced,
      opened=opened,
      k=jnp.where(a.denoise, k, s.k),
      size=size,
      level=jnp.where(a.denoise, level, s.level),
      busy=a.denoise & self.remask.busy(self.quota, k),
      memory=memory,
    )

  def step(self, params, row: Row, s: State, key: Array) -> State:
    """One iteration: predict, commit, write the cache, move the front, stop."""
    a = self.ask(row, s)
    picked, caches, forwards, kept = self.forward(params, row, s, a, key)
    x = self.select(row, s, a, picked, key)
    tokens = put(s.tokens, a.at, picked.token, x.commit)
    committed = put(put(s.committed, a.at, True, x.commit), a.at, False, x.opened)
    at_level = jnp.broadcast_to(jnp.where(a.denoise, x.level, 0.0)[:, None], a.at.shape)
    called = {"denoise": a.denoise, "write": ~a.denoise & ~s.done}
    after = State(
      tokens=tokens,
      committed=committed,
      committed_at=put(put(s.committed_at, a.at, s.step, x.commit), a.at, -1, x.opened),
      level_at=put(s.level_at, a.at, at_level, x.commit),
      cursor=a.cursor,
      unit=jnp.where(a.denoise, a.wlo, s.unit),
      k=x.k,
      size=x.size,
      level=x.level,
      busy=x.busy,
      done=s.done | ((committed.all(1) | self.ended(row, tokens, committed)) & ~x.busy),
      step=s.step + 1,
      forwards=s.forwards + forwards,
      calls=s.calls | {kind: s.calls[kind] + (on & (forwards > 0)) for kind, on in called.items()},
      caches=caches,
      draft=picked if self.reuse else (),
      changed=x.commit.any() | x.opened.any() | (a.cursor != s.cursor).any(),
      memory=x.memory | {"cache": kept},
    )
    for rule in self.stops:
      after = rule.after(self, row, s, after)
    return after

  def ended(self, row: Row, tokens: Array, committed: Array) -> Array:
    """bool[B]: an EOS is committed and so is everything before it."""
    return eos_at(self.cfg.eos, row, tokens, committed) < first_where(~committed)

  def result(self, row: Row, s: State) -> Result:
    """What a state has generated so far."""
    total = (row.doc >= 0).sum(1, dtype=jnp.int32)
    open_at = first_where(~s.committed)
    eos = eos_at(self.cfg.eos, row, s.tokens, s.committed)
    lengths = jnp.where(eos < open_at, eos + 1, jnp.minimum(open_at, total))
    for rule in self.stops:
      lengths = rule.lengths(s, lengths)
    return Result(
      s.tokens, s.committed_at, s.level_at, lengths, s.done, s.step, s.forwards, s.calls, s.memory
    )
