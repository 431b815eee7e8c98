"""Speculative decoding whose drafts are trees; see trees.py.

All nodes are clean slots: their positions, what they see of the text and the codes that they are kept under
come from the objective's view of slots at their coordinates; their own tokens and their ancestors are put in.

Legend: B rows · N tokens of a row · M nodes · C children of a node · K depth.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from genmodels.config import ConfigError
from genmodels.contracts import Array, Row
from genmodels.masks import MAX_TERMS, STREAM
from genmodels.sampling import draw, trees, verify
from genmodels.sampling.active import pairs
from genmodels.sampling.drafter import Context
from genmodels.sampling.speculate import DRAFT, Laid, Progress, Speculative
from genmodels.sampling.state import until


@dataclasses.dataclass(frozen=True, eq=False)
class TreeSpeculative(Speculative):
  """A Sampler that verifies trees; `speculate.build` makes it for drafters that have one."""

  @property
  def tree(self) -> trees.Tree:
    return self.drafter.tree

  @property
  def branching(self) -> int:
    return self.tree.children.shape[1]

  def propose(self, both, row: Row, s: Progress, key: Array):
    """tokens int32[B, M] (of the root: −1), the laws they were drawn from or None, bool[B, M] nodes that are
    meant, the drafter's state."""
    B, M = len(s.length), self.tree.nodes
    keys = draw.row_keys(row, key, DRAFT, s.length)
    context = Context(row, s.length, s.done, s.first, s.hidden, keys, s.cache)
    drafted, state = self.drafter.draft(*both, context, s.draft)
    if drafted.tokens.shape != (B, M - 1) or drafted.count is not None:
      raise ValueError(
        f"{type(self.drafter).__name__} drafted {drafted.tokens.shape}, expected [B, {M - 1}] tokens of a "
        "tree, −1 where there is none, and no count"
      )
    tokens = jnp.pad(drafted.tokens, ((0, 0), (1, 0)), constant_values=-1)
    idle = s.done | (s.first if self.drafter.needs_hidden else False)
    known = (tokens >= 0) & (tokens < self.model.cfg.vocab) & ~idle[:, None]
    known = known.at[:, 0].set(True)
    use = known
    for _ in range(self.drafter.size):  # a node without its parent is none
      use = known & use[:, (0, *self.tree.parents)]
    return tokens, drafted.logits, use, state

  def meant(self, count: Array, room: Array) -> Array:
    return (count & (self.tree.depth > 0) & (self.tree.depth <= room[:, None])).sum(1, dtype=jnp.int32)

  def lay(self, row: Row, s: Progress, tokens: Array, count: Array, total: Array) -> Laid:
    depth, N = self.tree.depth, row.tokens.shape[1]
    at = s.length[:, None] - 1 + depth
    use = count & (at < until(s.done, total))
    noise = self.objective.corruption.state(row, jnp.arange(N) < s.length[:, None])
    slots = self.objective.layout.arrange(row, noise, pairs(self.stream, at, use))
    inputs = self.objective.inputs(row, noise, slots, self.latent)
    ids = inputs.ids.at[..., 0].set(jnp.where(use & (depth > 0), tokens, inputs.ids[..., 0]))
    offset = len(self.objective.layout.streams) * STREAM
    masks = {p: trees.mask(self.tree, m, offset) for p, m in inputs.masks.items()}
    code = {p: m.code for p, m in inputs.masks.items()}
    can = use & (at + 1 < total[:, None])
    slot = jnp.where(can, np.arange(self.tree.nodes, dtype=np.int32), -1)
    return Laid(inputs.replace(ids=ids, masks=masks), slot, can, use, code)

  def told(self, q) -> tuple[Array, Array]:
    return q

  def candidates(self, tokens: Array) -> tuple[np.ndarray, Array]:
    children = self.tree.children
    return self.tree.depth, jnp.where(children >= 0, tokens[:, np.maximum(children, 0)], -1)

  def follow(self, found: verify.Verdict, tokens: Array, count: Array, u: Array, can: Array) -> verify.Walk:
    return trees.walk(self.tree, found, tokens, count, u, can)


def check(sampler, drafter, rule: verify.Rule) -> None:
  """Raises ConfigError for what a tree cannot be verified with: key, value, reason, fix."""
  term = sampler.objective.terms[sampler.term]
  if isinstance(rule, verify.Rejection):
    raise ConfigError(
      "children of a node are different tokens, no independent draws", key="sampler.verify",
      value="rejection", fix="sampler.verify='recursive' where they are drawn, 'match' for any",
    )  # fmt: skip
  if drafter.ahead or drafter.chains > 1 or term.align != "shift":
    raise ConfigError(
      "a tree takes no masks and no chains beside it", key="sampler.draft.tree", value=drafter.tree.nodes,
      fix="no tree",
    )  # fmt: skip
  if not sampler.policy.stores:
    raise ConfigError(
      "a tree's slots are those behind a cached text", key="sampler.cache", value=sampler.policy.name,
      fix="sampler.cache='auto'",
    )  # fmt: skip
  terms = max(r.terms for r in sampler.objective.relations.values()) * drafter.tree.terms
  if terms > MAX_TERMS:
    raise ConfigError(
      f"nodes of this tree see {terms} intervals, {MAX_TERMS} is the most that kernels take: below some node "
      f"it branches off {drafter.tree.terms - 1} times", key="sampler.draft.tree",
      value=drafter.tree.nodes, fix="fewer candidates behind candidates that are not the first",
    )  # fmt: skip
