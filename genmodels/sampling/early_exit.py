"""The target drafts with its own first layers; which exit, and how many tokens, follows from the text (DEL).

Self-speculation by early exit (LayerSkip, 2404.16710): the state behind layer l, through the final norm and
the head, proposes a token. DEL (Entezari Zarch et al., 2504.05598) chooses the exit l and the number of
drafts d of every round by what they are expected to give, tokens per layer:

  TPL(l, d) = (1 + α_l + … + α_l^d) / (d·l + L)

L layers of the target; α_l the share of tokens that exit l would have guessed. All exits are judged by every
verification, not only the one that drafted: the states behind each of them are there, and their heads'
choices ("shadow tokens") are compared with what was committed. Counts fade by `fade` a round (constant and
prior unverified; the paper's dynamic confidence threshold, which ends a draft early, is not here).

A batch drafts with one exit and one length, those that give all rows together the most: layers are run for
all of them. A draft token costs a call of l layers over the slots of the verifying call, which reads the
target's cache and writes nothing: each draft computes the ones before it anew (a few slots more, the same
weights).

Legend: B rows · N tokens of a row · K drafts · E exits · L layers · D width · V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from genmodels.config import ConfigError
from genmodels.contracts import Array, Row, Target, pytree
from genmodels.sampling import draw
from genmodels.sampling.active import pairs
from genmodels.sampling.draft_heads import Drawing
from genmodels.sampling.drafter import Context, Draft, Seen
from genmodels.sampling.drafters import ahead_of, drawn
from genmodels.sampling.state import put


def best(alpha: Array, exits: tuple[int, ...], layers: int, size: int, on: Array) -> tuple[Array, Array]:
  """(index into `exits`, number of drafts 0 … size), int32 scalars: the most tokens per layer.

  Args:
    alpha: float32[B, E], acceptance of each exit. on: bool[B], rows that count.
  """
  tokens = jnp.cumsum(alpha[..., None] ** np.arange(size + 1, dtype=np.float32), -1)  # [B, E, K+1]
  cost = np.asarray(exits, np.float32)[:, None] * np.arange(size + 1) + layers
  rate = jnp.where(on[:, None, None], tokens, 0).sum(0) / cost
  at = jnp.argmax(rate).astype(jnp.int32)  # of equal ones the shallowest exit, then the shortest draft
  return at // (size + 1), at % (size + 1)


@pytree()
class Judged:
  """What is known of the exits.

  Fields:
    right, tried: float32[B, E], faded counts. chosen: int32[E], rounds of each exit; drafts: int32, of all.
    layers: int32, layers run by drafts.
  """

  right: Array
  tried: Array
  chosen: Array
  drafts: Array
  layers: Array

  @property
  def alpha(self) -> Array:
    return self.right / self.tried


@dataclasses.dataclass(frozen=True)
class EarlyExit(Drawing):
  """Fields:
  size: K, most drafts of a round.
  exits: numbers of layers to draft with; (): about six, evenly up to three quarters of the target's.
  fade: what is left of a count after a round. prior: acceptance before anything was seen, as of one token.
  layers: L, filled in by `bind`.
  """

  size: int = 6
  exits: tuple[int, ...] = ()
  fade: float = 0.95
  prior: float = 0.5
  layers: int = 0

  needs_hidden = False

  def __post_init__(self):
    if not (0 < self.fade <= 1 and 0 <= self.prior <= 1):
      raise ValueError(f"fade is {self.fade}, prior {self.prior}; expected 0 < fade ≤ 1 and 0 ≤ prior ≤ 1")

  @property
  def watch(self) -> tuple[int, ...]:
    return tuple(exit - 1 for exit in self.exits)

  def bind(self, sampler):
    cfg = sampler.model.cfg
    if cfg.adaln != "none" or cfg.anchor:
      raise ConfigError(
        "the states behind a layer are read by the final norm alone", key="model.adaln", value=cfg.adaln,
        fix="a plain autoregressive model",
      )  # fmt: skip
    if not sampler.policy.stores:
      raise ConfigError(
        "drafts read the target's cache", key="sampler.cache", value=sampler.policy.name,
        fix="sampler.cache='auto'",
      )  # fmt: skip
    most = max(1, 3 * cfg.layers // 4)
    exits = self.exits or tuple(sorted({-(-most * i // 6) for i in range(1, 7)}))
    if any(not 1 <= x <= cfg.layers for x in exits) or list(exits) != sorted(set(exits)):
      raise ConfigError(
        f"exits are ascending numbers of the {cfg.layers} layers", key="sampler.draft.exits", value=exits,
        fix="exits=()",
      )  # fmt: skip
    return self.bound(sampler, exits=tuple(exits), layers=cfg.layers)

  def start(self, params, own, row: Row, length: Array):
    shape, zero = (len(length), len(self.exits)), jnp.int32(0)
    chosen = jnp.zeros((shape[1],), jnp.int32)
    return Judged(jnp.full(shape, self.prior), jnp.ones(shape), chosen, zero, zero)

  def draft(self, params, own, context: Context, state: Judged):
    B, K = len(context.length), self.size
    on = ~context.done
    exit, count = best(state.alpha, self.exits, self.layers, K, on)
    depth = jnp.asarray(self.exits, jnp.int32)[exit]
    ask = functools.partial(self.ask, params, context, depth)

    def extend(i, carry):
      row, drafts, logits = carry
      token, z = ask(row, i)
      row = row.replace(tokens=put(row.tokens, context.length[:, None] + i, token[:, None], on[:, None]))
      return row, drafts.at[:, i].set(token), None if logits is None else logits.at[:, i].set(z)

    V = self.target.model.cfg.vocab
    logits = jnp.zeros((B, K, V), jnp.float32) if self.sample else None
    carry = context.row, jnp.zeros((B, K), jnp.int32), logits
    _, drafts, logits = jax.lax.fori_loop(0, count, extend, carry)
    state = dataclasses.replace(
      state,
      chosen=state.chosen.at[exit].add(1),
      drafts=state.drafts + count,
      layers=state.layers + count * depth,
    )
    return Draft(drafts, logits, jnp.broadcast_to(count, (B,))), state

  def ask(self, params, context: Context, depth: Array, row: Row, i: Array):
    """Token int32[B] of coordinate n + i by the first `depth` layers, and the float32[B, V] logits it is of.

    Args:
      row: with i drafts in place.
    """
    target, n, K = self.target, context.length, self.size
    total = (row.doc >= 0).sum(1, dtype=jnp.int32)[:, None]
    at = n[:, None] - 1 + np.arange(K)
    use = (np.arange(K) <= i) & (at < total) & ~context.done[:, None]
    noise = target.objective.corruption.state(row, jnp.arange(row.tokens.shape[1]) < n[:, None])
    only = pairs(target.stream, at, use)
    inputs, read = target.objective.view(row, noise, only, target.latent)
    place = n[:, None] + i
    slot = jnp.take_along_axis(read[target.term], jnp.minimum(place, row.tokens.shape[1] - 1), 1)
    slot = jnp.where((place < total) & ~context.done[:, None], slot, -1)
    term = target.objective.terms[target.term]
    asked = {target.term: Target(term.head, slot, slot * 0, (slot >= 0).astype(jnp.float32))}
    out = target.model.apply(params, inputs, asked, cache=context.cache, depth=depth)
    choice = target.choice if self.sample else dataclasses.replace(target.choice, temperature=0)
    token, z = out.dists[target.term].map(
      functools.partial(drawn, choice), *draw.token_keys(context.keys, place)
    )
    return token[:, 0], z[:, 0]

  def observe(self, params, own, seen: Seen, state: Judged):
    """Counts, for every exit, how many of the tokens that this round committed it would have guessed."""
    K, target = self.size, self.target
    cfg = dataclasses.replace(target.model.cfg, watch=self.watch)
    there = np.arange(K + 1) < jnp.where(seen.active, seen.length - seen.before, 0)[:, None]
    right = ahead_of(seen.row.tokens, seen.before, K + 1)
    greedy = dataclasses.replace(target.choice, temperature=0)
    guess = lambda z: jnp.argmax(greedy.logits(z), -1).astype(jnp.int32)

    def judge(states):
      hidden = target.model.normed(params, states)
      head = target.objective.terms[target.term].head
      shadow = target.model.read(params, head, hidden, there).map(guess)
      return ((shadow == right) & there).sum(1)

    taps = jnp.stack([seen.taps[cfg.taps.index(i)] for i in self.watch])
    hits = jax.lax.map(judge, taps).T.astype(jnp.float32)
    fade = jnp.where(seen.active, self.fade, 1.0)[:, None]
    right, tried = state.right * fade + hits, state.tried * fade + there.sum(1, keepdims=True)
    return dataclasses.replace(state, right=right, tried=tried)

  def report(self, state: Judged):
    return {
      "exits": state.chosen, "draft_layers": state.layers, "draft_forwards": state.drafts,
      "acceptance": state.alpha,
    }  # fmt: skip
