"""Drafters that are part of the target: heads on its last state (Medusa, Hydra), masks under gated adapters.

Legend: B rows · K drafts · D width · V vocabulary · g tokens that a head is fed.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from genmodels.config import ConfigError
from genmodels.contracts import CLEAN, Array, Row
from genmodels.sampling import draw, trees
from genmodels.sampling.drafter import Context, Draft, Drafter, Seen
from genmodels.sampling.drafters import ahead_of, drawn


@dataclasses.dataclass(frozen=True)
class Drawing(Drafter):
  """What both have in common: tokens drawn one after another from heads, which may be fed those before.

  Fields:
    sample: draw the drafts (at the target's temperature, verified by rejection) instead of the likeliest
      tokens.
    target: the target's Sampler, filled in by `bind`.
  """

  size: int = -1
  sample: bool = False
  target: Any = None

  needs_hidden = True

  @property
  def stochastic(self) -> bool:
    return self.sample

  def bound(self, sampler, **fields):
    if self.sample and sampler.choice.temperature == 0:
      raise ConfigError(
        "nothing is drawn at temperature 0", key="sampler.draft.sample", value=True, fix="sample=False"
      )
    return dataclasses.replace(self, target=sampler, **fields)

  def chain(
    self, params, states: list[Array], terms: list[str], before: Array, keys, length: Array, on: Array
  ):
    """Tokens int32[B, K] of coordinates length …, and the float32[B, K, V] logits they were drawn from.

    Args:
      states: K times [B, D], what each head reads. terms: their names.
      before: int32[B, g], committed tokens up to coordinate length − 1, as many as heads may be fed.
      keys: of the row and step. on: bool[B], rows that draft.
    """
    choice = self.target.choice
    choice = choice if self.sample else dataclasses.replace(choice, temperature=0)
    tokens, logits = [], []
    for i, (state, name) in enumerate(zip(states, terms, strict=True)):
      term = self.target.objective.terms[name]
      ids = before[:, None, before.shape[1] - term.given :] if term.given else None
      dist = self.target.model.read(params, term.head, state[:, None], on[:, None], ids)
      token, z = dist.map(functools.partial(drawn, choice), *draw.token_keys(keys, length[:, None] + i))
      before = jnp.concatenate([before[:, 1:], token], 1)
      tokens, logits = [*tokens, token], [*logits, z]
    return jnp.concatenate(tokens, 1), jnp.concatenate(logits, 1)


@dataclasses.dataclass(frozen=True)
class Heads(Drawing):
  """Head k drafts the k-th token behind the newest one, from the state that predicted the newest one.

  Medusa's heads know that state alone (Cai et al. 2401.10774), Hydra's also the tokens drafted before theirs
  (Ankner et al. 2402.05109). One chain, or a tree of the likeliest candidates of each head.

  Fields:
    size: heads that are used; −1: all, or as many as `paths` are long.
    paths: nodes of a tree by ranks: (0, 2) is the second head's third choice behind the first one's first.
    terms: of the heads, in their order; filled in by `bind`.
  """

  paths: tuple[tuple[int, ...], ...] = ()
  terms: tuple[str, ...] = ()

  def __post_init__(self):
    if self.paths:
      trees.Tree.of_ranks(self.paths)

  @property
  def tree(self) -> trees.Tree | None:
    return trees.Tree.of_ranks(self.paths)[0] if self.paths else None

  def bind(self, sampler):
    objective, heads = sampler.objective, dict(sampler.model.cfg.heads)
    found = {
      t.ahead: name
      for name, t in objective.terms.items()
      if t.stream == CLEAN and t.ahead and heads[t.head].kind == "draft"
    }
    most = next(k for k in range(len(found) + 1) if k + 1 not in found)
    if not most:
      raise ConfigError(
        "no head drafts the token behind the next one", key="sampler.draft.kind", value="heads",
        fix="a model of language/medusa or language/hydra",
      )  # fmt: skip
    size = most if self.size < 0 else self.size
    if self.paths:
      size = int(self.tree.depth.max())
    if not 1 <= size <= most:
      raise ConfigError(
        f"the model has {most} heads in a row", key="sampler.draft.size", value=size, fix=f"size={most}"
      )
    if self.paths and self.sample:
      raise ConfigError(
        "a tree holds the likeliest candidates", key="sampler.draft.sample", value=True, fix="sample=False"
      )
    return self.bound(sampler, size=size, terms=tuple(found[k] for k in range(1, size + 1)))

  def draft(self, params, own, context: Context, state):
    fed = max(1, *(self.target.objective.terms[name].given for name in self.terms))
    before = ahead_of(context.row.tokens, jnp.maximum(context.length - fed, 0), fed)
    if self.paths:
      return Draft(self.grown(params, context, before)), state
    states = [context.hidden] * self.size
    tokens, logits = self.chain(
      params, states, list(self.terms), before, context.keys, context.length, ~context.first
    )
    return Draft(tokens, logits if self.sample else None), state

  def grown(self, params, context: Context, before: Array) -> Array:
    """int32[B, M−1], the tokens of the tree: head k proposes behind every node of depth k − 1."""
    tree, ranks = trees.Tree.of_ranks(self.paths)
    tokens: dict[int, Array] = {}

    def text(node: int) -> Array:
      """The last tokens up to a node, as many as `before` has."""
      path = []
      while node:
        path, node = [tokens[node], *path], tree.parents[node - 1]
      return jnp.concatenate([before, *(t[:, None] for t in path)], 1)[:, len(path) :]

    for k, name in enumerate(self.terms, 1):
      term = self.target.objective.terms[name]
      nodes = [n for n in range(1, tree.nodes) if tree.depth[n] == k]
      parents = sorted({tree.parents[n - 1] for n in nodes}) if term.given else [0]
      ids = None
      if term.given:
        ids = jnp.stack([text(p)[:, before.shape[1] - term.given :] for p in parents], 1)
      state = jnp.repeat(context.hidden[:, None], len(parents), 1)
      there = jnp.repeat(~context.first[:, None], len(parents), 1)
      most = max(ranks[n - 1] for n in nodes) + 1
      top = functools.partial(likeliest, self.target.choice, most)
      found = self.target.model.read(params, term.head, state, there, ids).map(top)
      for n in nodes:
        at = parents.index(tree.parents[n - 1]) if term.given else 0
        tokens[n] = found[:, at, ranks[n - 1]]
    return jnp.stack([tokens[n] for n in range(1, tree.nodes)], 1)


def likeliest(choice: draw.Choice, count: int, logits: Array) -> Array:
  """int32[c, count], tokens of logits [c, V], the likeliest first."""
  return jax.lax.top_k(choice.logits(logits), count)[1].astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Masks(Drawing):
  """Masks behind every possible number of accepted drafts, in the verifying forward: whatever is accepted, K
  fresh drafts are there (Samragh et al. 2507.11851, "quadratic decoding").

  The first mask stands in place of the newest token and predicts the one behind it, as in training. With a
  head that is told the token before (the sampler head), drafts follow each other; else every mask speaks for
  itself.

  Fields:
    size: K; −1: the trained group.
    term: on the noisy stream; "": one whose head is fed a token, if there is one.
    stream: of the term, filled in by `bind`.
  """

  term: str = ""
  stream: str = ""

  @property
  def ahead(self) -> int:
    return self.size

  def bind(self, sampler):
    objective, heads = sampler.objective, dict(sampler.model.cfg.heads)
    noisy = {
      name: t
      for name, t in objective.terms.items()
      if t.stream in objective.layout.noisy and t.align == "shift" and not t.ahead
      if heads[t.head].kind in ("categorical", "draft")
    }
    best = sorted(noisy, key=lambda name: -noisy[name].given)
    name = self.term or (best[0] if best else "")
    if name not in noisy:
      raise ConfigError(
        "drafts come from a shifted term on a noisy stream", key="sampler.draft.term", value=self.term,
        fix=f"one of {', '.join(noisy)}" if noisy else "a model of language/mtp",
      )  # fmt: skip
    blocks = objective.corruption.blocks
    if self.size < 0 and (blocks.whole or blocks.sizes):
      raise ConfigError(
        "the groups have no one size", key="sampler.draft.size", value=self.size, fix="size=8"
      )
    size = int(blocks.size(0)) if self.size < 0 else self.size
    return self.bound(sampler, size=size, term=name, stream=noisy[name].stream)

  def start(self, params, own, row: Row, length: Array):
    B, V = len(length), self.target.model.cfg.vocab
    logits = jnp.zeros((B, self.size, V), jnp.float32) if self.sample else None
    return Draft(jnp.zeros((B, self.size), jnp.int32), logits)

  def draft(self, params, own, context: Context, state):
    return state, state

  def observe(self, params, own, seen: Seen, state):
    states = [seen.ahead[:, i] for i in range(self.size)]
    before = ahead_of(seen.row.tokens, seen.length - 1, 1)
    terms = [self.term] * self.size
    tokens, logits = self.chain(params, states, terms, before, seen.keys, seen.length, seen.active)
    return Draft(tokens, logits if self.sample else None)
