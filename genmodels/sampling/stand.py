"""N-grams that remember distributions draft a tree (STAND, Song et al. 2506.04708).

Where the last tokens have occurred before, the model has said what comes behind them: its `top` likeliest
tokens and their probabilities are kept for every place of the row (of a prompt, whose places were never
asked, the token that is there). A node's law is the mean over the `recent` latest places with the longest
match; its children are drawn from it without replacement by Gumbel-top-k, and verified as such (`recursive`),
or are its likeliest at temperature 0. The paper's tables are shared by all trajectories of a question, its
trees fitted to data, its table sizes unverified; here a row knows itself, and the tree is given.

Legend: B rows · N tokens of a row · M nodes · P parents of one depth · r places · k tokens of a place · g
compared tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genmodels.contracts import Array, Row, pytree
from genmodels.sampling import draw, trees
from genmodels.sampling.drafter import Context, Draft, Drafter, Seen
from genmodels.sampling.drafters import ahead_of
from genmodels.sampling.state import put

NONE = -1e30  # log-probability of what is not there


@pytree()
class Memory:
  """ids int32[B, N, k] and logp float32[B, N, k]: what was said at a place about the token behind it."""

  ids: Array
  logp: Array


def matches(tokens: Array, length: Array, last: Array) -> Array:
  """int32[B, P, N]: how many of the last tokens of each of P lines stand at and before a place of the row.

  Args:
    tokens: int32[B, N], the first `length` int32[B] count. last: int32[B, P, g], the newest token last.
  """
  at = jnp.arange(tokens.shape[1])
  same, found = jnp.ones((*last.shape[:2], tokens.shape[1]), bool), 0
  for j in range(last.shape[2]):
    shifted = jnp.pad(tokens, ((0, 0), (j, 0)))[:, : tokens.shape[1]]
    same &= (shifted[:, None] == last[..., -1 - j][..., None]) & (at >= j)
    found = found + same
  return jnp.where(at < length[:, None, None] - 1, found, 0).astype(jnp.int32)


def mean_law(ids: Array, logp: Array, weight: Array) -> tuple[Array, Array]:
  """The mean of sparse laws: ids int32[..., rk] and float32[..., rk] log-probabilities, each id once (NONE
  elsewhere).

  Args:
    ids, logp: [..., r, k]. weight: bool[..., r], laws that count.
  """
  p = jnp.where(weight[..., None], jnp.exp(logp), 0)
  p = (p / jnp.maximum(p.sum((-2, -1), keepdims=True), 1e-30)).reshape(*p.shape[:-2], -1)
  ids = ids.reshape(p.shape)
  same = ids[..., :, None] == ids[..., None, :]
  total = jnp.where(same, p[..., None, :], 0).sum(-1)
  index = jnp.arange(p.shape[-1])
  first = ~(same & (index[:, None] > index[None]) & (p[..., None, :] > 0)).any(-1)
  return ids, jnp.where(first & (p > 0), jnp.log(jnp.maximum(total, 1e-30)), NONE)


@dataclasses.dataclass(frozen=True)
class Stand(Drafter):
  """Fields:
  size: depth of the tree, that of `paths`.
  paths: nodes by ranks, see draft_heads.Heads; (): 4, 2, 1, 1 candidates one behind the other.
  longest: g, most tokens that are compared. top: k. recent: r.
  target: the target's Sampler, filled in by `bind`.
  """

  size: int = -1
  paths: tuple[tuple[int, ...], ...] = ()
  longest: int = 3
  top: int = 8
  recent: int = 4
  target: Any = None

  def __post_init__(self):
    if not self.paths:
      widths = 4, 2, 1, 1
      paths = [p for d in range(1, 5) for p in itertools.product(*map(range, widths[:d]))]
      object.__setattr__(self, "paths", tuple(paths))
    object.__setattr__(self, "size", int(self.tree.depth.max()))
    missing = [p for p in self.paths if p[-1] and (*p[:-1], p[-1] - 1) not in self.paths]
    if missing:  # what was drawn before a candidate is tried before it
      raise ValueError(f"paths holds {missing[0]} without the choice before it; candidates are drawn in turn")
    if min(self.longest, self.top, self.recent) < 1:
      raise ValueError(f"longest is {self.longest}, top {self.top}, recent {self.recent}; at least 1")

  @property
  def tree(self) -> trees.Tree:
    return trees.Tree.of_ranks(self.paths)[0]

  @property
  def stochastic(self) -> bool:
    return self.target is not None and self.target.choice.temperature > 0

  def bind(self, sampler):
    top = min(self.top, sampler.model.cfg.vocab)
    return dataclasses.replace(self, target=sampler, top=top)

  def start(self, params, own, row: Row, length: Array):
    # The prompt's own tokens, with certainty.
    ids = jnp.broadcast_to(jnp.roll(row.tokens, -1, 1)[..., None], (*row.tokens.shape, self.top))
    return Memory(ids, jnp.broadcast_to(jnp.where(jnp.arange(self.top) == 0, 0.0, NONE), ids.shape))

  def law(self, row: Row, length: Array, last: Array, memory: Memory) -> tuple[Array, Array]:
    """ids int32[B, P, rk] and log-probabilities of what follows the lines `last` int32[B, P, g]."""
    found = matches(row.tokens, length, last)
    N, r = found.shape[2], min(self.recent, found.shape[2])
    score, place = jax.lax.top_k(found * N + jnp.arange(N), r)
    longest = score[..., :1] // N
    counts = (score // N == longest) & (longest > 0)
    pick = jax.vmap(lambda x, i: x[i])
    ids, logp = mean_law(pick(memory.ids, place), pick(memory.logp, place), counts)
    return ids, logp

  def draft(self, params, own, context: Context, memory: Memory):
    (tree, ranks), g, n = trees.Tree.of_ranks(self.paths), self.longest, context.length
    before = ahead_of(context.row.tokens, n - g, g)
    # Places before the row's first token match nothing.
    before = jnp.where(n[:, None] - g + np.arange(g) >= 0, before, -1)
    lines, tokens, laws = {0: before}, {}, {}
    for d in range(self.size):
      parents = [i for i in range(tree.nodes) if tree.depth[i] == d and (tree.children[i] >= 0).any()]
      last = jnp.stack([lines[i] for i in parents], 1)
      ids, logp = self.law(context.row, n, last, memory)
      order = logp
      if self.stochastic:  # one key a node: Gumbel-top-k draws its children without replacement
        k0, k1 = draw.token_keys(context.keys, jnp.broadcast_to(np.array(parents), last.shape[:2]))
        g0 = draw.gumbel(k0.reshape(-1), k1.reshape(-1), ids.shape[2]).reshape(ids.shape)
        order = jnp.where(logp > NONE, logp + g0, NONE)
      best, at = jax.lax.top_k(order, min(max(ranks) + 1, ids.shape[2]))
      drawn = jnp.where(best > NONE, jnp.take_along_axis(ids, at, 2), -1)
      for p, i in enumerate(parents):
        laws[i] = ids[:, p], logp[:, p]
        for child in (c for c in tree.children[i] if c >= 0):
          rank = ranks[child - 1]
          tokens[child] = drawn[:, p, rank] if rank < drawn.shape[2] else jnp.full_like(n, -1)
          lines[child] = jnp.concatenate([lines[i][:, 1:], tokens[child][:, None]], 1)
    drafted = jnp.stack([tokens[i] for i in range(1, tree.nodes)], 1)
    if not self.stochastic:
      return Draft(drafted), memory
    nothing = jax.tree.map(jnp.zeros_like, laws[0])
    each = [laws.get(i, nothing) for i in range(tree.nodes)]
    return Draft(drafted, jax.tree.map(lambda *x: jnp.stack(x, 1), *each)), memory

  def observe(self, params, own, seen: Seen, memory: Memory):
    """Keeps what the model said at every place that is committed now."""
    target, K = self.target, self.size
    made = np.arange(K + 1) < jnp.where(seen.active, seen.length - seen.before, 0)[:, None]
    at = seen.before[:, None] - 1 + np.arange(K + 1)

    def likeliest(z):
      z = target.choice.logits(z)
      z = target.choice.filtered(z) if target.choice.temperature > 0 else z
      logp, ids = jax.lax.top_k(jax.nn.log_softmax(z, -1), self.top)
      return ids.astype(jnp.int32), jnp.maximum(logp, NONE)

    ids, logp = seen.dist(target.term, seen.path, made).map(likeliest)
    return Memory(put(memory.ids, at, ids, made), put(memory.logp, at, logp, made))
