"""Draft trees: several continuations that share their beginnings, verified in one forward.

Node 0 is the newest token; every other node is a candidate behind its parent. A node sees what is committed,
its ancestors and itself (Miao et al. 2305.09781; Medusa 2401.10774 §3.2).

That is an interval mask. Cut the tree into paths, each from a node down through one child after another; the
nodes of a path get consecutive codes, and a node's ancestors are a beginning of its own path, a beginning of
the path that this one branched off, and so on: one interval each. The first path starts at the root and
continues the codes of the text, so that text and path are one interval. With the child of the largest
Strahler number kept on the path, the number of branchings above a node is as small as it can be; it is at
most 2 with fewer than 8 leaves and 3 with fewer than 16.

Legend: B rows · M nodes · C children of a node · K depth · T intervals of a query.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from genmodels.contracts import Array
from genmodels.masks import CODE_HIDDEN, AttnMask
from genmodels.sampling.verify import Verdict, Walk


@dataclasses.dataclass(frozen=True)
class Tree:
  """The shape of a draft, static.

  Fields:
    parents: of nodes 1, 2, …: each a smaller number; 0 is the root.
  """

  parents: tuple[int, ...]

  def __post_init__(self):
    bad = [(i, p) for i, p in enumerate(self.parents, 1) if not 0 <= p < i]
    if bad or not self.parents:
      raise ValueError(f"parents is {self.parents}; node i has a parent below i, and there is a node 1")

  @classmethod
  def of_ranks(cls, paths) -> tuple[Tree, tuple[int, ...]]:
    """(tree, rank of each node 1 …) of paths of ranks: (0, 2) is the third choice behind the first one.

    Raises:
      ValueError: a path whose beginning is no path, or a path given twice.
    """
    paths = sorted((tuple(p) for p in paths), key=lambda p: (len(p), p))
    number = {(): 0} | {p: i for i, p in enumerate(paths, 1)}
    if len(number) != len(paths) + 1 or any(not p or p[:-1] not in number for p in paths):
      raise ValueError(f"tree is {paths}; each path once, and with it all its beginnings")
    return cls(tuple(number[p[:-1]] for p in paths)), tuple(p[-1] for p in paths)

  @classmethod
  def chain(cls, size: int) -> Tree:
    return cls(tuple(range(size)))

  @property
  def nodes(self) -> int:
    return len(self.parents) + 1

  @functools.cached_property
  def depth(self) -> np.ndarray:
    """int32[M], 0 of the root."""
    depth = [0]
    for p in self.parents:
      depth.append(depth[p] + 1)
    return np.array(depth, np.int32)

  @functools.cached_property
  def children(self) -> np.ndarray:
    """int32[M, C], in ascending order, −1 behind them."""
    found = [[i for i, p in enumerate(self.parents, 1) if p == n] for n in range(self.nodes)]
    most = max(map(len, found))
    return np.array([c + [-1] * (most - len(c)) for c in found], np.int32)

  @functools.cached_property
  def paths(self) -> tuple[np.ndarray, np.ndarray, tuple[tuple[tuple[int, int, int], ...], ...]]:
    """How nodes are coded and what they see.

    Returns:
      (int32[M] path of each node, int32[M] its code: the depth on path 0, else its place among all nodes of
      other paths; for each node its segments ((first code, first depth, last depth), …) on other paths).
    """
    strahler = np.zeros(self.nodes, np.int64)
    heavy = np.full(self.nodes, -1)
    for n in reversed(range(self.nodes)):
      below = sorted((c for c in self.children[n] if c >= 0), key=lambda c: (-strahler[c], c))
      if below:
        heavy[n] = below[0]
        strahler[n] = max(strahler[below[0]], *(strahler[c] + 1 for c in below[1:]), 0)
    path, code = np.zeros(self.nodes, np.int32), self.depth.copy()
    starts, used = {0: 0}, 0
    for n in range(1, self.nodes):
      if heavy[self.parents[n - 1]] == n:
        continue
      starts[n] = n
      run, at = [n], n
      while heavy[at] >= 0:
        at = heavy[at]
        run.append(at)
      path[run] = n
      code[run] = used + np.arange(len(run))
      used += len(run)
    segments = []
    for n in range(self.nodes):
      found, at = [], n
      while path[at]:
        first = path[at]
        found.append((int(code[first]), int(self.depth[first]), int(self.depth[at])))
        at = self.parents[first - 1]
      segments.append((int(self.depth[at]), tuple(found)))
    return path, code, tuple(segments)

  @property
  def terms(self) -> int:
    """T, intervals of a query where the text alone is one."""
    return 1 + max(len(found) for _, found in self.paths[2])


def mask(tree: Tree, base: AttnMask, offset: int) -> AttnMask:
  """What nodes see, from what slots of their coordinates would see in one line.

  Args:
    base: of M slots, codes and intervals of the clean stream by coordinates; whatever an interval shows of
      the coordinates behind the text it shows of a node's own ancestors (so windows are windows).
    offset: first code of nodes off the first path; no other key has codes from there on.
  """
  path, code, segments = tree.paths
  root = base.code[:, :1]
  newest = jnp.where(root == CODE_HIDDEN, 0, root)
  own = jnp.where(path == 0, base.code, offset + code)
  codes = jnp.where(base.code == CODE_HIDDEN, CODE_HIDDEN, own)
  main = np.array([depth for depth, _ in segments], np.int32)
  lo, hi = [base.lo], [jnp.minimum(base.hi, (newest + main + 1)[:, None])]
  # Intervals by depth: 0 is the newest token.
  first, last = base.lo - newest[:, None], base.hi - newest[:, None]
  for i in range(tree.terms - 1):
    at = [found[i] if i < len(found) else (0, 1, 0) for _, found in segments]  # none: an empty interval
    begin, top, bottom = np.array(at, np.int32).T
    a, b = jnp.maximum(first, top), jnp.minimum(last, bottom + 1)
    some = a < b
    lo.append(jnp.where(some, offset + begin + a - top, 0))
    hi.append(jnp.where(some, offset + begin + b - top, 0))
  lo, hi = jnp.concatenate(lo, 1), jnp.concatenate(hi, 1)
  return AttnMask(codes, jnp.where(lo < hi, lo, 0), jnp.where(lo < hi, hi, 0))


def walk(tree: Tree, verdict: Verdict, tokens: Array, use: Array, u: Array, can: Array) -> Walk:
  """Follows the accepted nodes from the root: children are tried in their order.

  Args:
    verdict: of every node, leaves [B, M, …], of its children as candidates.
    tokens: int32[B, M]. use: bool[B, M], nodes that are meant; with a node all its ancestors are.
    u: float32[B, K+1, C], uniforms. can: bool[B, K+1], places that exist; a prefix.
  """
  B, K = len(tokens), u.shape[1] - 1
  children = jnp.asarray(tree.children)

  def of(x, index):
    return jnp.take_along_axis(x, index.reshape(B, *(1,) * (x.ndim - 1)), 1)[:, 0]

  def place(carry, i):
    node, on, accepted = carry
    below = children[node]  # [B, C]
    there = jnp.take_along_axis(use, jnp.maximum(below, 0), 1)
    live = (below >= 0) & there & (i < K)
    k = live.sum(1, dtype=jnp.int32)
    accept = of(of(verdict.accept, node), jnp.maximum(k - 1, 0))
    ok = live & (u[:, i] < accept)
    some = ok.any(1)
    chosen = jnp.take_along_axis(below, jnp.argmax(ok, 1)[:, None], 1)[:, 0]
    token = jnp.where(some, of(tokens, jnp.maximum(chosen, 0)), of(of(verdict.token, node), k))
    taken = on & can[:, i]
    went = taken & some
    return (jnp.where(went, chosen, node), went, accepted + went), (token, taken, node)

  zero = jnp.zeros((B,), jnp.int32)
  carry = zero, jnp.ones((B,), bool), zero
  (_, _, accepted), (token, taken, node) = jax.lax.scan(place, carry, jnp.arange(K + 1))
  return Walk(token.T, taken.T, accepted, zero, node.T)
