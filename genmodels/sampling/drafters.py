"""Drafters that need no training of their own: n-grams, Jacobi iteration, a smaller model, TiDAR's masks.

Legend: B rows · N tokens of a row · R chains · K drafts · G masks of a group · V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genmodels.config import ConfigError
from genmodels.contracts import Array, Row, Target, pytree
from genmodels.models import crop_cache, fork_cache, write_cache
from genmodels.sampling import draw
from genmodels.sampling.drafter import Context, Draft, Drafter, Seen


def drawn(choice: draw.Choice, logits: Array, k0: Array, k1: Array) -> tuple[Array, Array]:
  """Tokens int32[c] of logits [c, V], and the float32[c, V] logits whose softmax they were drawn from."""
  z = choice.logits(logits)
  return choice(logits, k0, k1).token, choice.filtered(z) if choice.temperature > 0 else z


def hesitant(choice: draw.Choice, fallback: float, logits: Array, k0: Array, k1: Array):
  """As `drawn`, and bool[c]: the likeliest token has at least probability `fallback`, at temperature 1."""
  sure = jax.nn.softmax(choice.logits(logits), -1).max(-1) >= fallback
  return *drawn(choice, logits, k0, k1), sure


def ahead_of(tokens: Array, start: Array, size: int) -> Array:
  """int32[B, size]: tokens [B, N] at coordinates start int32[B] and behind, clipped into the row."""
  at = jnp.clip(start[:, None] + np.arange(size), 0, tokens.shape[1] - 1)
  return jnp.take_along_axis(tokens, at, 1)


@dataclasses.dataclass(frozen=True)
class NGram(Drafter):
  """What followed the longest earlier occurrence of the last tokens in the row itself (prompt lookup, Saxena
  2023).

  Fields:
    longest: most tokens that are compared. The longest match wins, of equal ones the latest.
  """

  longest: int = 3

  def draft(self, params, own, context: Context, state):
    tokens, n = context.row.tokens, context.length
    N = tokens.shape[1]
    at = jnp.arange(N)[None]
    match, same = jnp.zeros(tokens.shape, jnp.int32), jnp.ones(tokens.shape, bool)
    for j in range(self.longest):
      # Does the token j before `at` equal the token j before the newest one?
      shifted = jnp.pad(tokens, ((0, 0), (j, 0)))[:, :N]
      newest = jnp.take_along_axis(tokens, jnp.maximum(n - 1 - j, 0)[:, None], 1)
      same &= (shifted == newest) & (at >= j) & (n[:, None] > j)
      match += same
    match = jnp.where(at < n[:, None] - 1, match, 0)
    best = jnp.argmax(match * N + at, 1).astype(jnp.int32)
    found = jnp.take_along_axis(match, best[:, None], 1)[:, 0] > 0
    count = jnp.where(found, jnp.minimum(self.size, n - 1 - best), 0)
    return Draft(ahead_of(tokens, best + 1, self.size), count=count), state


@dataclasses.dataclass(frozen=True)
class Jacobi(Drafter):
  """The last verification's own predictions are the next guess (Jacobi decoding: Santilli et al. 2305.10427;
  consistency language models, Kou et al. 2403.00835, are trained to need few iterations).

  Every forward fixes at least one token, so n tokens take at most n forwards, whatever the first guess.

  Fields:
    guess: token that fills the window where nothing was predicted; −1 repeats the newest token.
  """

  size: int = 15
  guess: int = -1

  def start(self, params, own, row: Row, length: Array):
    return jnp.full((len(length), self.size), -1, jnp.int32)

  def draft(self, params, own, context: Context, state):
    newest = ahead_of(context.row.tokens, context.length - 1, 1)
    fill = newest if self.guess < 0 else jnp.full_like(newest, self.guess)
    return Draft(jnp.where(state < 0, fill, state)), state

  def observe(self, params, own, seen: Seen, state):
    # Token j was predicted for the place `accepted + 1` drafts earlier than the new window's j-th.
    at = seen.accepted[:, None] + 1 + np.arange(self.size)
    moved = jnp.take_along_axis(seen.predicted, jnp.minimum(at, self.size), 1)
    return jnp.where(at <= self.size, moved, -1)


@pytree()
class Aside:
  """A smaller model beside the target: its cache, and counts int32[B] for the report.

  Fields:
    forwards: its evaluations that the row took part in.
    handovers: drafts that ended because it was not sure. rejections: drafts of which something was rejected.
  """

  cache: Any
  forwards: Array
  handovers: Array
  rejections: Array


@dataclasses.dataclass(frozen=True)
class Small(Drafter):
  """A smaller autoregressive model over the same vocabulary (Leviathan et al. 2211.17192), with a cache of
  its own. With a `fallback` it hands over to the target where it is not sure (BiLD, Kim et al. 2302.07863
  §3.2): a draft then costs as many forwards as the longest one of the batch.

  Fields:
    path: workdir of its run.
    chains: independent drafts, verified by k-SEQ.
    temperature: of the drafts; −1 takes the target's, with its filters. 0 drafts the likeliest tokens.
    fallback: α_FB: a place where no token has this probability ends the draft; 0: none does.
    target: Sampler of the small model, filled in by `load`.
  """

  path: str = ""
  chains: int = 1
  temperature: float = -1.0
  fallback: float = 0.0
  target: Any = None

  def __post_init__(self):
    if not 0 <= self.fallback <= 1:
      raise ValueError(f"fallback is {self.fallback}; it is a probability")

  @property
  def stochastic(self) -> bool:
    return self.target is not None and self.target.choice.temperature > 0

  @property
  def forwards(self) -> int:
    return self.size

  def load(self, load):
    if not self.path or load is None:
      raise ConfigError(
        "the drafting model has no run", key="sampler.draft.path", value=self.path,
        fix="sampler.draft.path=<workdir of an autoregressive run>",
      )  # fmt: skip
    target, params = load(self.path)
    return dataclasses.replace(self, target=target), params

  def bind(self, sampler):
    small = self.target
    if not small.single or small.model.cfg.vocab != sampler.model.cfg.vocab:
      raise ConfigError(
        f"the drafting model is no next-token model over the target's {sampler.model.cfg.vocab} ids (it has "
        f"{small.model.cfg.vocab})", key="sampler.draft.path", value=self.path,
        fix="a run of an autoregressive config with the same tokenizer",
      )  # fmt: skip
    if self.chains < 1:
      raise ConfigError(
        "there is at least one chain", key="sampler.draft.chains", value=self.chains, fix="chains=1"
      )
    choice = sampler.choice if self.temperature < 0 else dataclasses.replace(
      sampler.choice, temperature=self.temperature
    )  # fmt: skip
    small = dataclasses.replace(small, choice=choice)
    if self.chains > 1 and choice.temperature == 0:
      raise ConfigError("chains without randomness are all the same", key="sampler.draft.chains",
                        value=self.chains, fix="chains=1, or a temperature above 0")  # fmt: skip
    return dataclasses.replace(self, target=small)

  def start(self, params, own, row: Row, length: Array):
    # The whole row at once: only slots of committed tokens are computed, and kept.
    small, (B, N) = self.target, row.tokens.shape
    cache = small.model.init_cache(B, N)
    at = jnp.broadcast_to(jnp.arange(N, dtype=jnp.int32), (B, N))
    keep = at < length[:, None] - 1
    zero = jnp.zeros_like(length)
    return Aside(self.run(own, row, cache, at, keep, at[:, :1] * 0 - 1)[1], zero, zero, zero)

  def run(self, own, row: Row, cache, at: Array, keep: Array, ask: Array):
    """A Dist for the tokens at coordinates `ask` int32[B, 1], and the cache with the slots `keep` of `at`."""
    small, N = self.target, row.tokens.shape[1]
    noise = small.objective.corruption.state(row, row.doc >= 0)
    stream = jnp.full_like(at, small.stream)
    only = jnp.where(keep[..., None], jnp.stack([stream, at], -1), -1)
    inputs, read = small.objective.view(row, noise, only, small.latent)
    slot = jnp.take_along_axis(read[small.term], jnp.clip(ask, 0, N - 1), 1)
    slot = jnp.where((ask >= 0) & (ask < N), slot, -1)
    target = Target(small.objective.terms[small.term].head, slot, slot * 0, (slot >= 0).astype(jnp.float32))
    out = small.model.apply(own, inputs, {small.term: target}, cache=cache)
    return out.dists[small.term], write_cache(cache, out.new, keep)

  def draft(self, params, own, context: Context, state: Aside):
    K, R = self.size, self.chains
    B, N = context.row.tokens.shape
    cache = crop_cache(state.cache, context.length - 1)
    # What is not in the cache: the newest token, and the last draft where all were accepted.
    at = context.length[:, None] + np.array([-2, -1])
    dist, kept = self.run(own, context.row, cache, at, at >= cache.length[:, None], at[:, 1:] + 1)
    branch, row, n, keys = kept, context.row, context.length, context.keys
    if R > 1:
      repeat = jnp.repeat(jnp.arange(B), R)
      row, n, keys = jax.tree.map(lambda x: x[repeat], (row, n, keys))
      branch = fork_cache(kept, repeat)
      dist = dist.replace(hidden=dist.hidden[repeat], valid=dist.valid[repeat])
      keys = draw.token_keys(keys, jnp.tile(jnp.arange(R), B)[:, None])
      keys = keys[0][:, 0], keys[1][:, 0]
    here = jnp.arange(B * R)[:, None]
    unsure = functools.partial(hesitant, self.target.choice, self.fallback)

    def pick(dist, at):
      token, z, sure = dist.map(unsure, *draw.token_keys(keys, at))
      return token[:, 0], z[:, 0], sure[:, 0]

    def more(carry):
      i, _, _, alive, *_ = carry
      return (i < K) & alive.any()

    def extend(carry):
      i, tokens, branch, alive, count, drafts, logits = carry
      at = (n + i - 1)[:, None]
      token = jax.lax.dynamic_index_in_dim(drafts, i - 1, 1)
      tokens = tokens.at[here, jnp.where(at < N, at, N)].set(token, mode="drop")
      dist, branch = self.run(own, row.replace(tokens=tokens), branch, at, at < N, at + 1)
      token, z, sure = pick(dist, at + 1)
      alive = alive & sure
      drafts = drafts.at[:, i].set(token)
      logits = None if logits is None else logits.at[:, i].set(z)
      return i + 1, tokens, branch, alive, count + alive, drafts, logits

    token, z, sure = pick(dist, n[:, None])
    idle = jnp.repeat(context.done, R)  # rows that are over keep nobody waiting
    sure = sure & ~idle
    drafts = jnp.zeros((B * R, K), jnp.int32).at[:, 0].set(token)
    logits = jnp.zeros((B * R, K, z.shape[1]), z.dtype).at[:, 0].set(z) if self.stochastic else None
    carry = jnp.int32(1), row.tokens, branch, sure, sure.astype(jnp.int32), drafts, logits
    i, _, branch, _, count, drafts, logits = jax.lax.while_loop(more, extend, carry)
    shape = (B, R, K) if R > 1 else (B, K)
    logits = None if logits is None else logits.reshape(*shape, -1)
    count = count.reshape(B, R)
    room = jnp.minimum(K, (context.row.doc >= 0).sum(1) - context.length)
    # One chain's keys and values are kept, a rejected tail is cropped at the next draft. Of several chains
    # only the committed tokens are kept.
    state = Aside(
      cache=branch if R == 1 else kept,
      forwards=state.forwards + jnp.where(context.done, 0, i),
      handovers=state.handovers + (~context.done & (count.max(1) < room)),
      rejections=state.rejections,
    )
    return Draft(drafts.reshape(shape), logits, count), state

  def observe(self, params, own, seen: Seen, state: Aside):
    left = (seen.row.doc >= 0).sum(1) - seen.before
    fewer = seen.active & (seen.accepted < jnp.minimum(seen.count, left))
    return state.replace(rejections=state.rejections + fewer)

  def report(self, state: Aside):
    return {
      "draft_forwards": state.forwards, "handovers": state.handovers, "rejections": state.rejections
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TiDAR(Drafter):
  """The model's own diffusion stream drafts behind every possible number of accepted drafts, in the verifying
  forward (TiDAR, Liu et al. 2511.08923): one forward per step.

  The slots of a step are [newest token, K drafts | group 0 | … | group K]; group j is a block of K + 1 masks
  that begins behind j drafts, as a training block begins behind its clean prefix. Its first mask stands where
  the target draws a token itself; the others draft the next step.

  Fields:
    size: K; −1: one less than the trained block.
    term: the diffusion term; "" is the only one on a noisy stream.
    sample: draw the drafts (at the target's temperature, verified by rejection) instead of the likeliest
      tokens.
    stream, shift, target: of the term, and the target's Sampler, filled in by `bind`.
  """

  size: int = -1
  term: str = ""
  sample: bool = False
  stream: str = ""
  shift: bool = False
  target: Any = None

  needs_hidden = True

  @property
  def stochastic(self) -> bool:
    return self.sample

  @property
  def ahead(self) -> int:
    return self.size + 1

  def bind(self, sampler):
    objective = sampler.objective
    noisy = {n: t for n, t in objective.terms.items() if t.stream in objective.layout.noisy}
    name = self.term or (next(iter(noisy)) if len(noisy) == 1 else "")
    if name not in noisy:
      raise ConfigError(
        "drafts come from a term on a noisy stream", key="sampler.draft.term", value=self.term,
        fix=f"one of {', '.join(noisy)}" if noisy else "a model with a noisy stream (language/tidar)",
      )  # fmt: skip
    blocks = objective.corruption.blocks
    size = self.size
    if size < 0:
      if blocks.whole or blocks.sizes:
        raise ConfigError("the blocks have no one size", key="sampler.draft.size", value=size, fix="size=7")
      size = int(blocks.size(0)) - 1
    if self.sample and sampler.choice.temperature == 0:
      raise ConfigError(
        "nothing is drawn at temperature 0", key="sampler.draft.sample", value=True, fix="sample=False"
      )
    term = noisy[name]
    return dataclasses.replace(
      self, size=size, term=name, stream=term.stream, shift=term.align != "same", target=sampler
    )

  def start(self, params, own, row: Row, length: Array):
    B, V = len(length), self.target.model.cfg.vocab
    logits = jnp.zeros((B, self.size, V), jnp.float32) if self.sample else None
    return Draft(jnp.zeros((B, self.size), jnp.int32), logits)

  def draft(self, params, own, context: Context, state):
    return state, state

  def observe(self, params, own, seen: Seen, state):
    # The states are of coordinates n − 1 …; a shifted head reads the draft of n there, others one place on.
    states = seen.ahead[:, : self.size] if self.shift else seen.ahead[:, 1:]
    at = seen.length[:, None] + np.arange(self.size)
    dist = seen.dist(self.term, states, jnp.broadcast_to(seen.active[:, None], at.shape))
    choice = self.target.choice if self.sample else dataclasses.replace(self.target.choice, temperature=0)
    token, logits = dist.map(functools.partial(drawn, choice), *draw.token_keys(seen.keys, at))
    return Draft(token, logits if self.sample else None)
