"""Draft trees: what nodes see, the walk, and that no tree changes an id."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import sampling
from genmodels.config import ConfigError
from genmodels.masks import STREAM, AttnMask
from genmodels.sampling import draft_heads, speculate, tree_speculate, trees, verify
from genmodels.sampling.drafter import Draft, Drafter
from genmodels.sampling.trees import Tree
from tests.sampling import systems as S
from tests.sampling import test_draft_heads as H
from tests.sampling import test_speculate as T

KEY = jax.random.key(3)
PATHS = ((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (2, 0), (0, 0, 0), (2, 0, 0), (2, 0, 1))
TREE = Tree.of_ranks(PATHS)[0]


def random_tree(rng, nodes):
  return Tree(tuple(int(rng.integers(0, i)) for i in range(1, nodes)))


def ancestors(tree):
  """bool[M, M], [node, itself or an ancestor], by the parents alone."""
  out = np.eye(tree.nodes, dtype=bool)
  for i, p in enumerate(tree.parents, 1):
    out[i] |= out[p]
  return out


@pytest.mark.parametrize("window", [pytest.param(0, marks=pytest.mark.full), 3])
def test_a_node_sees_the_text_and_its_ancestors(window):
  """The interval mask against the definition, over cached text and the nodes, for random trees."""
  rng, n = np.random.default_rng(window), np.array([6, 9])
  terms = set()
  for tree in [TREE, Tree.chain(4)] + [random_tree(rng, m) for m in ((20,) if window else (5, 20, 64))]:
    terms.add(tree.terms)
    at = n[:, None] - 1 + tree.depth  # coordinates
    lo = np.maximum(at + 1 - window, 0) if window else 0 * at
    base = AttnMask(
      *(jnp.asarray(x, jnp.int32) for x in (STREAM + at, STREAM + lo[:, None], STREAM + at[:, None] + 1))
    )
    made = trees.mask(tree, base, 2 * STREAM)
    text = jnp.broadcast_to(STREAM + jnp.arange(9, dtype=jnp.int32), (2, 9))  # cached, of coordinates < n − 1
    text = jnp.where(jnp.arange(9) < n[:, None] - 1, text, -(2**30))
    seen = np.asarray(AttnMask(jnp.concatenate([text, made.code], 1), made.lo, made.hi).to_dense())
    for b in range(2):
      above = ancestors(tree) & (at[b][None] >= lo[b][:, None])
      before = (np.arange(9) < n[b] - 1) & (np.arange(9)[None] >= lo[b][:, None])
      np.testing.assert_array_equal(seen[b], np.concatenate([before, above], 1))
    assert made.lo.shape[1] == tree.terms
    leaves = sum(i not in tree.parents for i in range(1, tree.nodes))
    assert 2 ** (tree.terms - 1) <= leaves
  assert 1 in terms and max(terms) > 2


def test_one_chain_is_the_linear_walk():
  """Any verdicts, lengths and ends: the tree of one chain goes where the chain goes."""
  rng, (B, K) = np.random.default_rng(0), (200, 3)
  token = lambda *shape: jnp.asarray(rng.integers(0, 5, shape), jnp.int32)
  verdict = verify.Verdict(jnp.asarray(rng.uniform(size=(B, K + 1, 1, 1)), jnp.float32), token(B, K + 1, 2))
  tokens, count = token(B, 1, K), jnp.asarray(rng.integers(0, K + 1, (B, 1)), jnp.int32)
  u = jnp.asarray(rng.uniform(size=(B, K + 1, 1)), jnp.float32)
  can = jnp.arange(K + 1) < jnp.asarray(rng.integers(0, K + 2, (B, 1)))
  line = verify.walk(verdict, tokens, count, u, can)
  use = jnp.arange(K + 1) <= count
  grown = trees.walk(Tree.chain(K), verdict, jnp.pad(tokens[:, 0], ((0, 0), (1, 0))), use, u, can)
  on = np.arange(K + 1) <= np.asarray(line.accepted)[:, None]
  for name in ("taken", "accepted", "chain"):
    np.testing.assert_array_equal(getattr(line, name), getattr(grown, name))
  np.testing.assert_array_equal(np.where(on, line.tokens, 0), np.where(on, grown.tokens, 0))
  np.testing.assert_array_equal(np.where(on, line.node, 0), np.where(on, grown.node, 0))
  assert len(np.unique(line.accepted)) == K + 1


def test_trees_are_checked():
  with pytest.raises(ValueError, match="a parent below"):
    Tree((0, 3))
  with pytest.raises(ValueError, match="all its beginnings"):
    Tree.of_ranks(((0,), (1, 0)))
  assert Tree.of_ranks(((1,), (0,), (0, 1))) == (Tree((0, 0, 1)), (0, 1, 1))
  target = S.sampler(S.ar())
  # Every node of a binary tree of depth 4 branches: 4 branchings above its last leaf.
  wide = Grown(Tree(tuple((i - 1) // 2 for i in range(1, 31))))
  with pytest.raises(ConfigError, match="branches off 4 times"):
    speculate.build(target, wide)
  with pytest.raises(ConfigError, match="no independent draws"):
    tree_speculate.check(target, Grown(TREE), verify.Rejection())
  with pytest.raises(ConfigError, match="a cached text"):
    speculate.build(S.sampler(S.ar(), cache="none"), Grown(TREE))


# -- decoding -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Grown(Drafter):
  """Trees that the caller wrote down: own int32[N, B, M−1] by the row's length."""

  size: int = 0
  tree: Tree = None

  def __init__(self, tree):
    object.__setattr__(self, "tree", tree)
    object.__setattr__(self, "size", int(tree.depth.max()))

  def draft(self, params, own, context, state):
    return Draft(own[context.length, jnp.arange(len(context.length))]), state


def drafts(tree, want, kind):
  """int32[N, B, M−1]: right at every depth along one path from the root to a leaf (of each row), or random."""
  rng, M = np.random.default_rng(2), tree.nodes
  at = np.minimum(np.arange(S.N)[:, None] + tree.depth[None, 1:] - 1, S.N - 1)
  right = np.moveaxis(np.asarray(want.tokens)[:, at], 0, 1)
  if kind == "random":
    return rng.integers(-1, S.V, right.shape).astype(np.int32)
  leaf = M - 1  # the last one: no node of its path but the root is on the first path
  path = np.flatnonzero(ancestors(tree)[leaf])[1:] - 1
  wrong = (right + 1 + rng.integers(0, 3, right.shape)) % S.V
  out = wrong.copy()
  out[..., path] = right[..., path]
  if kind == "half":
    out = np.where(rng.uniform(size=out.shape) < 0.5, out, wrong)
  return out.astype(np.int32)


@functools.cache
def grown(tree, temperature):
  target, want = T.plain(temperature=temperature)
  return speculate.build(target, Grown(tree)), want


def follow(tree, kind, temperature=0.0):
  sampler, want = grown(tree, temperature)
  made = dataclasses.replace(sampler, own=jnp.asarray(drafts(tree, want, kind)))
  object.__setattr__(made, "_jitted", sampler._jitted)
  return made(S.params(), S.row(), KEY), want


@pytest.mark.slow
def test_no_tree_changes_an_id():
  """T19: arbitrary trees; the right path is followed wherever it lies, and is cached as the text."""
  steps = {}
  for kind in ("random", "half", "right"):
    result, want = follow(TREE, kind)
    T.assert_same(result, want)
    steps[kind] = int(result.steps)
  assert steps["right"] == -(-(S.N - 1) // 4) < steps["half"] < S.N - 1
  assert (np.asarray(result.memory["drafted"]) > np.asarray(result.memory["accepted"])).all()


@pytest.mark.full
def test_sampled_ids_are_those_of_plain_decoding():
  result, want = follow(TREE, "half", 1.0)
  T.assert_same(result, want)
  assert (np.asarray(result.memory["accepted"]) > 0).any()


@pytest.mark.full
def test_a_tree_of_one_chain_is_the_linear_verification():
  sampler, want = T.given(0.0)
  line = dataclasses.replace(sampler, own=jnp.asarray(T.tables(want, "half")))(S.params(), S.row(), KEY)
  made, _ = grown(Tree.chain(3), 0.0)
  tree = dataclasses.replace(made, own=jnp.asarray(T.tables(want, "half")))(S.params(), S.row(), KEY)
  for name in ("tokens", "committed_at", "lengths", "steps", "calls", "memory"):
    jax.tree.map(np.testing.assert_array_equal, getattr(line, name), getattr(tree, name))


@pytest.mark.full
@pytest.mark.parametrize("name", ["medusa", "hydra"])
def test_heads_draft_trees(name):
  """Ids stay; the tree's first chain is the chain that the heads draft alone, so no fewer are accepted."""
  sampler, params, want = H.target(name)
  section = {"eos": -2, "temperature": 0.0, "draft": {"kind": "heads", "paths": PATHS}}
  made = sampling.build(section, sampler.objective, sampler.model)
  assert type(made) is tree_speculate.TreeSpeculative and made.tree == TREE and made.drafter.size == 3
  result = made(params, S.row(), KEY)
  T.assert_same(result, want)
  context = speculate.Context(
    S.row(), jnp.full((4,), 5), jnp.zeros((4,), bool), jnp.zeros((4,), bool),
    jax.random.normal(KEY, (4, 32)), (jnp.zeros((4,), jnp.uint32),) * 2, None,
  )  # fmt: skip
  tree = np.asarray(made.drafter.draft(params, None, context, ())[0].tokens)
  chain = np.asarray(draft_heads.Heads(3).bind(sampler).draft(params, None, context, ())[0].tokens)
  nodes = [sorted(PATHS, key=lambda p: (len(p), p)).index(p) for p in ((0,), (0, 0), (0, 0, 0))]
  np.testing.assert_array_equal(tree[:, nodes], chain)
  first = [sorted(PATHS, key=lambda p: (len(p), p)).index(p) for p in ((0,), (1,), (2,))]
  assert all(len(set(row)) == 3 for row in tree[:, first])


@pytest.mark.full
def test_typical_acceptance_is_another_law():
  """It says so, and it is seen: with a high threshold for what passes, fewer ids are the target's."""
  sampler, want = grown(TREE, 1.0)
  rule = verify.Typical(epsilon=0.05, delta=0.05)
  loose = dataclasses.replace(sampler, rule=rule, own=jnp.asarray(drafts(TREE, want, "random")))
  result = loose(S.params(), S.row(), KEY)
  assert not rule.exact and verify.Match().exact
  assert (np.asarray(result.tokens) != np.asarray(want.tokens)).any() and bool(result.done.all())
