"""The Hopper tile lists against a count in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from genmodels import compat
from genmodels.kernels import pallas_gpu_lists as lists
from genmodels.masks import CODE_HIDDEN, AttnMask

ROWS, TERMS, LQ, LK = 2, 2, 300, 520
TILES = lists.Tiles(128, 64, dq=(64, 128), dkv=(64, 192))

_plan = jax.jit(lists.plan, static_argnums=1)


def _random_mask(seed: int, rows: int = ROWS) -> AttnMask:
  """Two bands below a diagonal, with empty queries and hidden keys: tiles of all three kinds.

  Neighbouring queries have overlapping intervals and the codes leave no gap, so the extremes of a tile tell
  exactly which tiles have a visible pair.
  """
  rng = np.random.default_rng(seed)
  code = np.broadcast_to(np.arange(LK), (rows, LK)).copy()
  code[:, -30:] = CODE_HIDDEN
  start = np.sort(rng.integers(-100, 200, (rows, 1, LQ)), -1)
  start[:, :, :128] = start[:, :, :1]
  widths = rng.integers((60, 10, 400), (160, 60, 500), (rows, 3))[..., None] + rng.integers(
    0, 2, (rows, 3, LQ)
  )
  cuts = np.cumsum(np.concatenate([start, widths], 1), 1)
  lo, hi = cuts[:, 0::2].copy(), cuts[:, 1::2].copy()
  hi[:, 1, 150::7] = lo[:, 1, 150::7]
  hi[:, :, 260:] = lo[:, :, 260:]
  return AttnMask(*(jnp.asarray(x, jnp.int32) for x in (code, lo, hi)))


def _kinds(code, lo, hi, q: int, k: int):
  """bool[B, I, T, J] twice: (partial, full) tile and interval pairs, counted pair by pair."""
  seen = (lo[..., None] <= code[:, None, None]) & (code[:, None, None] < hi[..., None])  # [B, T, Lq', Lk']
  rows, terms, lq, lk = seen.shape
  seen = seen.reshape(rows, terms, lq // q, q, lk // k, k).transpose(0, 2, 1, 4, 3, 5)
  some, every = seen.any((4, 5)), seen.all((4, 5))
  return some & ~every, every


def _check(got: lists.Lines, partial, full):
  """Every line holds exactly the wanted (interval, column) pairs, partial ones first."""
  rows, n = partial.shape[:2]
  for b in range(rows):
    assert sorted(got.line[b]) == list(range(n)) and (np.diff(got.count[b].sum(-1)) <= 0).all()
    for r, line in enumerate(got.line[b]):
      both = [[(t, c) for t, c in zip(*np.nonzero(kind[b, line]))] for kind in (partial, full)]
      assert tuple(got.count[b, r]) == (len(both[0]), len(both[1]))
      entry = got.entry[b, r, : len(both[0]) + len(both[1])]
      assert list(zip(lists.term(entry), lists.column(entry))) == both[0] + both[1]


@pytest.mark.compat
@pytest.mark.parametrize("seed", [0, 1])
def test_lines_hold_the_tiles_that_a_count_of_pairs_finds(seed):
  made = jax.tree.map(np.asarray, _plan(_random_mask(seed), TILES))
  code, lo, hi = made.code, made.lo, made.hi
  assert code.shape == (ROWS, 768) and lo.shape == (ROWS, TERMS, 384) and made.lengths == (LQ, LK)
  kinds = {edges: _kinds(code, lo, hi, *edges) for edges in ((128, 64), (64, 128), (64, 192))}
  assert all(kind.any() for pair in kinds.values() for kind in pair), "every kind of tile must occur"
  for edges, got, transposed in (
    ((128, 64), made.forward, False),
    ((64, 128), made.dq, False),
    ((64, 192), made.dkv, True),
  ):
    kind = [x.transpose(0, 3, 2, 1) if transposed else x for x in kinds[edges]]
    _check(got, *kind)


def test_equal_tiles_share_one_list():
  made = lists.plan(_random_mask(0), (128, 128))
  assert made.own_dq is None and made.dq is made.forward
  assert made.tiles == lists.Tiles()
  np.testing.assert_array_equal(made.mask.to_dense(), _random_mask(0).to_dense())


def test_a_new_mask_does_not_recompile():
  traces = []

  @jax.jit
  def build(mask):
    traces.append(1)
    return lists.plan(mask)

  mask = _random_mask(0)
  counts = [np.asarray(build(m).forward.count) for m in (mask, mask.replace(hi=mask.lo))]
  assert len(traces) == 1 and counts[0].any() and not counts[1].any()


def test_a_plan_leaves_shard_map_by_its_leading_axis():
  mesh = AbstractMesh((4,), ("data",), (AxisType.Auto,))
  build = compat.shard_map(functools.partial(lists.plan, tiles=TILES), mesh, P("data"), P("data"))
  mask = jax.eval_shape(lambda: _random_mask(0, rows=8))
  local = jax.eval_shape(lambda: lists.plan(_random_mask(0), TILES))
  shapes = [x.shape for x in jax.tree.leaves(jax.eval_shape(build, mask))]
  assert shapes == [(8, *x.shape[1:]) for x in jax.tree.leaves(local)] and len(shapes) == 12


@pytest.mark.parametrize(
  "tiles",
  [
    (64, 128),
    (128, 96),
    (128, 128, 1),
    (128, 128, 0, (128, 100)),
    (128, 128, 0, (128, 128), (64, 128), False, -1),
  ],
)
def test_tiles_that_the_kernels_cannot_take_are_refused(tiles):
  with pytest.raises(ValueError, match="drop `tiles`"):
    lists.plan(_random_mask(0), tiles)
