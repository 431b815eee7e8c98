"""A block of masks behind the newest token, filled at once by layers beside the target (DFlash).

The drafter that `language/dflash` trains: its block is the newest token (the anchor, whose hidden states do
not exist yet) and K masks; each of its layers also attends to keys and values of the states that some of the
target's layers have of all text before the anchor (arXiv:2602.06036 §3). These are known from the verifying
forward that committed the text, enter the drafter's own cache once, and never change: they pass through no
layer. One forward of a few layers over K + 1 slots a step, whatever the length of the text.

Slots, positions and masks are those of the training view: noisy slots of a block with an origin of its own.

Legend: B rows · N tokens of a row · K drafts · T tapped layers · S tapped slots of a call · D width
· V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from genmodels.config import ConfigError
from genmodels.contracts import CLEAN, Array, Row, pytree
from genmodels.masks import AttnMask
from genmodels.models import drafting_cache, write_cache
from genmodels.sampling import draw
from genmodels.sampling.active import pairs
from genmodels.sampling.draft_heads import Drawing
from genmodels.sampling.drafter import Context, Draft, Seen
from genmodels.sampling.drafters import drawn


@pytree()
class Told:
  """What the drafter knows of a text.

  Fields:
    cache: keys and values of tapped states. taps: [T, B, K+1, D], states that are not in it yet, of
      coordinates `at` int32[B] …; `fresh` int32[B] of them are committed.
  """

  cache: Any
  taps: Array
  at: Array
  fresh: Array


@dataclasses.dataclass(frozen=True)
class Block(Drawing):
  """Fields:
  size: K; −1: one less than the trained block.
  term: of the block head; "": the only one.
  head, stream: of the term, filled in by `bind`.
  """

  term: str = ""
  head: str = ""
  stream: str = ""

  needs_hidden = False
  forwards = 1

  def bind(self, sampler):
    objective, cfg = sampler.objective, sampler.model.cfg
    found = [n for n, t in objective.terms.items() if cfg.head(t.head).kind == "block"]
    name = self.term or (found[0] if len(found) == 1 else "")
    if name not in found:
      raise ConfigError(
        "drafts come from a term with a block head", key="sampler.draft.term", value=self.term,
        fix=f"one of {', '.join(found)}" if found else "a model of language/dflash",
      )  # fmt: skip
    if not sampler.policy.stores:
      raise ConfigError(
        "the drafter reads hidden states that verification leaves with each committed token, so the target "
        "keeps a cache", key="sampler.cache", value=sampler.policy.name, fix="sampler.cache='auto'",
      )  # fmt: skip
    most = int(objective.corruption.blocks.size(0)) - 1
    size = most if self.size < 0 else self.size
    if not 1 <= size <= most:
      raise ConfigError(
        f"the trained block is an anchor and {most} masks", key="sampler.draft.size", value=size,
        fix=f"size={most}",
      )  # fmt: skip
    term = objective.terms[name]
    return self.bound(sampler, size=size, term=name, head=term.head, stream=term.stream)

  def start(self, params, own, row: Row, length: Array):
    (B, N), cfg = row.tokens.shape, self.target.model.cfg
    zero = jnp.zeros((B,), jnp.int32)
    taps = jnp.zeros((len(cfg.taps), B, self.size + 1, cfg.width), jnp.dtype(cfg.dtype))
    return Told(drafting_cache(cfg, self.head, B, N), taps, zero, zero)

  def prompted(self, params, own, row: Row, length: Array, taps, state: Told):
    at = jnp.broadcast_to(jnp.arange(taps.shape[2], dtype=jnp.int32), (len(length), taps.shape[2]))
    nothing = jnp.zeros((len(length), 1), bool)
    _, cache = self.run(params, row, length + 1, nothing, taps, at, at < length[:, None], state.cache)
    return state.replace(cache=cache)

  def run(self, params, row: Row, length: Array, masks: Array, taps: Array, at: Array, keep: Array, cache):
    """A Dist at the slots of the block, and the cache with the tapped states.

    Args:
      length: int32[B], n. masks: bool[B, 1 + k], slots of the block in use: the anchor n − 1, then masks.
      taps: [T, B, S, D], of coordinates at int32[B, S]; keep: bool[B, S], which of them there are.
    """
    objective, S = self.target.objective, at.shape[1]
    streams, total = objective.layout.streams, (row.doc >= 0).sum(1, dtype=jnp.int32)[:, None]
    n, width = length[:, None], masks.shape[1]
    place = n - 1 + np.arange(width)
    masks = masks & (place < total)
    clean = pairs(streams.index(CLEAN), at, keep)
    only = jnp.concatenate([clean, pairs(streams.index(self.stream), place, masks)], 1)
    noise = objective.corruption.state(row, jnp.arange(row.tokens.shape[1]) < n)
    slots = objective.layout.arrange(row, noise, only)
    own = (jnp.arange(S + width) >= S) & (slots.src >= 0)
    slots = slots.replace(
      blk_lo=jnp.where(own, n - 1, slots.blk_lo),
      blk_hi=jnp.where(own, jnp.minimum(n - 1 + width, total), slots.blk_hi),
    )
    inputs = objective.inputs(row, noise, slots, self.target.latent)
    mask = inputs.masks["full"]
    given = {
      "ids": inputs.ids[:, S:, 0],
      "pos": inputs.pos[:, S:],
      "mask": AttnMask(mask.code, mask.lo[..., S:], mask.hi[..., S:]),
    }
    dist, new = self.target.model.draft(params, self.head, taps, inputs.pos[:, :S], given, cache)
    return dist, write_cache(cache, new, jnp.pad(keep, ((0, 0), (0, width))))

  def draft(self, params, own, context: Context, state: Told):
    n, K = context.length, self.size
    at = state.at[:, None] + np.arange(K + 1)
    keep = np.arange(K + 1) < state.fresh[:, None]
    there = jnp.ones((len(n), K + 1), bool)
    dist, cache = self.run(params, context.row, n, there, state.taps, at, keep, state.cache)
    behind = dist.replace(hidden=dist.hidden[:, 1:], valid=dist.valid[:, 1:])
    choice = self.target.choice if self.sample else dataclasses.replace(self.target.choice, temperature=0)
    keys = draw.token_keys(context.keys, n[:, None] + np.arange(K))
    tokens, logits = behind.map(functools.partial(drawn, choice), *keys)
    return Draft(tokens, logits if self.sample else None), state.replace(cache=cache)

  def observe(self, params, own, seen: Seen, state: Told):
    fresh = jnp.where(seen.active, seen.accepted + 1, 0)
    return state.replace(taps=seen.taps.astype(state.taps.dtype), at=seen.before - 1, fresh=fresh)
