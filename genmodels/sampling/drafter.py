"""What proposes tokens to speculative decoding: the interface between a drafter and `speculate.Speculative`.

One step of the loop, for a row with n committed tokens (coordinates 0 … n−1):

  draft    the drafter proposes tokens for coordinates n … n+K−1
  verify   one forward of the target over the last committed token (n−1) and the drafts, and over the masks of
           `ahead`, if the drafter asks for them; a ≤ K drafts are accepted, one token more is drawn: n ←
           n+a+1
  observe  the drafter is shown what that forward computed, and may keep what it needs for the next draft

Whatever a drafter proposes, an exact rule of `verify` keeps the law of the target: a bad draft costs time
only. The one thing a drafter must be honest about is `Draft.logits`.

Legend: B rows · N tokens of a row · R chains · K tokens of a chain · G masks of a group · D width · V
vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from genmodels.contracts import Dist, Row, pytree

Array = jax.Array


@pytree()
class Draft:
  """Proposed tokens.

  Fields:
    tokens: int32[B, K], or [B, R, K]: R chains that all start at coordinate n. Of a drafter with a tree
      [B, M−1], of nodes 1 …, −1 where there is no such node.
    logits: float32 of the shape of tokens, and [V]: tokens were drawn from softmax(logits) independently of
      what is not committed yet but the chain's own earlier tokens; chains are independent of each other.
      Of a drafter with a tree (ids int32[B, M, k], float32[B, M, k]): the law, of at most k tokens, from
      which a node's children were drawn one after another without replacement.
      None: tokens are a function of the committed ones (and of randomness that no verification reads), q is
        one-hot.
    count: int32[B] (or [B, R]) or None: only the first `count` tokens of each chain are meant (adaptive
      lengths, n-grams that were not found); None: all K. Unless logits is None, whether token j is meant must
      depend on nothing that was drawn but the tokens of its chain before it.
  """

  tokens: Array
  logits: Array | None = None
  count: Array | None = None


@dataclasses.dataclass(frozen=True)
class Context:
  """What a drafter may look at.

  Fields:
    row: tokens at coordinates < length are committed, others unspecified.
    length: int32[B], n ≥ 1. done: bool[B], rows that are over.
    first: bool[B], no verification yet: hidden is zero.
    hidden: [B, D], the state that draft heads read (the trunk's final one, or that of its prefix layers) of
      the slot that predicted the newest token (of coordinate n−2): Medusa's head k drafts coordinate n−1+k.
    keys: two uint32[B], fresh for each row and step; see `draw.token_keys`.
    cache: the target's cache, entries of coordinates < n−1, read only; None with cache "none".
  """

  row: Row
  length: Array
  done: Array
  first: Array
  hidden: Array
  keys: tuple[Array, Array]
  cache: Any


@dataclasses.dataclass(frozen=True)
class Seen:
  """What one verifying forward computed, for rows whose new length is `length`.

  Fields:
    row, length, keys: as in Context, after the commit.
    accepted: int32[B], drafts accepted.
    active: bool[B], rows that were not done before the call.
    predicted: int32[B, K+1], what the target drew at each place of the first chain: token j is for coordinate
      (old n) + j, given the chain's first j tokens (Jacobi's next guess).
    hidden: [B, D], as in Context.
    ahead: [B, G, D] or None: states of the masks behind the accepted drafts, coordinates n−1 … n−2+G (n new).
    dist: (term, states [B, M, D], valid bool[B, M]) → Dist of that term's head over any states.
    before: int32[B], the length before the call. count: int32[B], drafts that were meant, of the longest
      chain.
    path: [B, K+1, D], final states of the newest token and the drafts that were followed, coordinates (old n)
      − 1 …; the first `accepted` + 1 of them are committed.
    taps: [T, B, K+1, D] or None: outputs of the model's tapped layers at the newest token and the drafts
      that were followed, as of `path`.
  """

  row: Row
  length: Array
  keys: tuple[Array, Array]
  accepted: Array
  active: Array
  predicted: Array
  hidden: Array
  ahead: Array | None
  dist: Callable[[str, Array, Array], Dist]
  before: Array
  count: Array
  path: Array
  taps: Array | None = None


@dataclasses.dataclass(frozen=True)
class Drafter:
  """Base of all drafters; a frozen dataclass of static settings, all arrays go through `state`.

  Fields:
    size: K, most tokens of a draft (static).
  """

  size: int = 4

  chains = 1  # R (static)
  tree = None  # trees.Tree of M nodes: one draft is a tree of depth K
  stochastic = False  # `Draft.logits` is given: tokens are drawn from them
  ahead = (
    0  # G (static): masks of the noisy stream behind every number of accepted drafts, in the same forward
  )
  needs_hidden = False  # drafts nothing before the first verification: the loop sets count to 0 there
  watch = ()  # layers of the target whose outputs `Seen.taps` has, besides those that its heads read
  forwards = 0  # evaluations of a network of its own per draft, for reports

  def load(self, load: Callable | None) -> tuple[Drafter, Any]:
    """The drafter with what its config names by path, and its own parameters or None.

    Args:
      load: workdir → (Sampler of that run, its parameters); None where nothing can be loaded.

    Raises:
      ConfigError: nothing is named, or nothing can be loaded.
    """
    del load
    return self, None

  def bind(self, sampler) -> Drafter:
    """The drafter for a target `Sampler` (its objective, model and choice), checked against it.

    Raises:
      ConfigError: it cannot draft for that target.
    """
    del sampler
    return self

  def start(self, params, own, row: Row, length: Array) -> Any:
    """The drafter's state before the first step: any pytree of arrays of static shapes.

    Args:
      params: of the target. own: the drafter's own parameters, or None.
    """
    del params, own, row, length
    return ()

  def prompted(self, params, own, row: Row, length: Array, taps: Array | None, state: Any) -> Any:
    """The state after the prompts, whose first `length` int32[B] tokens were put into the target's cache.

    Args:
      taps: [T, B, W, D], outputs of the tapped layers at coordinates 0 … W − 1 (W ≥ length), or None.
    """
    del params, own, row, length, taps
    return state

  def report(self, state: Any) -> dict[str, Array]:
    """What `Result.memory` says of the drafter, {name: array}."""
    del state
    return {}

  def draft(self, params, own, context: Context, state: Any) -> tuple[Draft, Any]:
    """Proposes; returns the draft and its state."""
    raise NotImplementedError

  def observe(self, params, own, seen: Seen, state: Any) -> Any:
    """The state after a verification."""
    del params, own, seen
    return state
