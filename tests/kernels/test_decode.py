"""Decoding over key segments against dense attention over their concatenation.

Legend: B rows · Lq queries · H query heads · h key heads · D, Dv head sizes.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from genmodels import kernels
from genmodels.kernels import pallas_tpu_lists
from genmodels.masks import CODE_HIDDEN, AttnMask
from tests.kernels.test_attention import dense_attention

module = importlib.import_module("genmodels.kernels.decode")  # the package's `decode` is the function
CHIP = kernels.Target("tpu", "TPU v5p", interpret=True)
B, CACHE, D, DV = 3, 40, 16, 8
USED = np.array([40, 0, 13])  # entries in use: a full, an empty and a ragged cache


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
  """Tiles that cut every segment of these tests, and not evenly."""
  monkeypatch.setattr(module, "QUERIES", 8)
  monkeypatch.setattr(module, "KEYS", 16)
  monkeypatch.setattr(pallas_tpu_lists, "default_tiles", lambda lq, lk: pallas_tpu_lists.Tiles(16, 16))


def _case(lq, seed=0):
  """Masks over the cache and over the slots: two active blocks a row behind a cache that row 1 has not begun.

  Slots of the first block see the cache; those of the second also see the first (two intervals in the cache
  for some); an empty slot stands at the end of each row.
  """
  rng = np.random.default_rng(seed)
  at = np.broadcast_to(np.arange(lq), (B, lq))
  order = np.stack([rng.permutation(CACHE) for _ in range(B)])  # codes come in any order
  past = np.where(np.arange(CACHE) < USED[:, None], order, CODE_HIDDEN)
  now = np.where(at < lq - 1, CACHE + at, CODE_HIDDEN)
  half = np.where(at < lq // 2, CACHE + lq // 2, CACHE + lq)
  hole = rng.integers(0, CACHE, (B, lq))  # one stretch of the cache is hidden from each slot
  lo = np.stack([np.zeros_like(hole), hole + 5], 1)
  hi = np.stack([hole, half], 1)
  hi = np.where((at == lq - 1)[:, None], lo, np.maximum(hi, lo))
  masks = [AttnMask(*(jnp.asarray(x, jnp.int32) for x in (code, lo, hi))) for code in (past, now)]
  return masks, np.concatenate([np.asarray(m.to_dense()) for m in masks], 2)


def _tensors(lq, H, h, dtype=jnp.float32):
  rng = np.random.default_rng(1)
  make = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
  q = make(B, lq, H, D)
  return q, [(make(B, n, h, D), make(B, n, h, DV)) for n in (CACHE, lq)]


def _decode(q, pairs, masks, implementation, **more):
  def run(q, pairs, masks):
    segments = [kernels.Segment(k, v, m) for (k, v), m in zip(pairs, masks)]
    return kernels.decode(q, segments, implementation=implementation, **more)

  with kernels.building_for(CHIP if implementation == "pallas_tpu" else kernels.Target("cpu")):
    return jax.jit(run)(q, pairs, masks)


@pytest.mark.parametrize("implementation", ["xla", "reference", "pallas_tpu"])
@pytest.mark.parametrize("lq, H, h, soft_cap", [(6, 8, 2, None), (21, 4, 4, 2.0)])
def test_equals_attention_over_the_concatenation(implementation, lq, H, h, soft_cap):
  masks, seen = _case(lq)
  q, pairs = _tensors(lq, H, h)
  k, v = (jnp.concatenate(x, 1) for x in zip(*pairs))
  want, _ = dense_attention(q, k, v, seen, 0.3, soft_cap)
  got = _decode(q, pairs, masks, implementation, scale=0.3, soft_cap=soft_cap)
  np.testing.assert_allclose(got, want, atol=2e-6)
  assert not np.asarray(got[:, -1]).any()  # the empty slot
  assert np.abs(want[1, :-1]).max() > 0.1  # a row with an empty cache sees its slots
  alone = _decode(q, pairs[1:], masks[1:], implementation, scale=0.3, soft_cap=soft_cap)
  assert np.abs(np.asarray(alone - want))[[0, 2]].max() > 0.1  # negative control: the cache counts


@pytest.mark.compat
@pytest.mark.parametrize(
  "page, implementation", [(8, "xla"), (20, "xla"), (8, "pallas_tpu"), (20, "reference")]
)
def test_pages(page, implementation):
  """Pages of all rows mixed in one pool, of which rows 1 and 2 own fewer than their table has room for."""
  masks, _ = _case(6)
  q, pairs = _tensors(6, 8, 2)
  want = _decode(q, pairs, masks, "xla")
  count = CACHE // page
  owned = -(-USED // page)
  rng = np.random.default_rng(2)
  places = rng.permutation(B * count + 3)
  table = np.full((B, count), 10**6)  # nobody may read there
  pools = [np.full((len(places), page, 2, n), 1e4, np.float32) for n in (D, DV)]
  for b in range(B):
    for n in range(owned[b]):
      table[b, n] = places[b * count + n]
      for pool, x in zip(pools, pairs[0]):
        pool[table[b, n]] = x[b, n * page : (n + 1) * page]

  def run(q, pools, table):
    first = kernels.Segment(*pools, masks[0], table)
    return kernels.decode(q, [first, kernels.Segment(*pairs[1], masks[1])], implementation=implementation)

  with kernels.building_for(CHIP if implementation == "pallas_tpu" else kernels.Target("cpu")):
    run = jax.jit(run)
    got = run(q, [jnp.asarray(p) for p in pools], jnp.asarray(table, jnp.int32))
    moved = run(q, [jnp.asarray(p) for p in pools], jnp.asarray(np.roll(table, 1, 0), jnp.int32))
  np.testing.assert_allclose(got, want, atol=2e-6)
  assert np.abs(np.asarray(moved - want)).max() > 0.1  # negative control: the table is read


def test_one_plan_serves_every_layer_and_no_mask_recompiles():
  traces = []

  @functools.partial(jax.jit, static_argnums=0)
  def run(lq, q, pairs, masks):
    traces.append(1)
    plans = [kernels.decode_plan(m, q.shape[2] // pairs[0][0].shape[2], "xla") for m in masks]
    segments = [kernels.Segment(k, v, p) for (k, v), p in zip(pairs, plans)]
    return [kernels.decode(x, segments, implementation="xla") for x in (q, 2 * q)]

  q, pairs = _tensors(6, 8, 2)
  for seed in (0, 1):
    masks, seen = _case(6, seed)
    k, v = (jnp.concatenate(x, 1) for x in zip(*pairs))
    for got, x in zip(run(6, q, pairs, masks), (q, 2 * q)):
      np.testing.assert_allclose(got, dense_attention(x, k, v, seen, D**-0.5, None)[0], atol=3e-6)
  assert len(traces) == 1


def test_only_touched_tiles_are_visited():
  """Keys in tiles that no row's mask touches may be NaN: they are never read."""
  masks, _ = _case(6)
  far = masks[0].replace(code=jnp.where(jnp.arange(CACHE) < 32, CODE_HIDDEN, masks[0].code))
  q, pairs = _tensors(6, 8, 2)
  (k, v), rest = pairs[0], pairs[1:]
  poison = jnp.where(jnp.arange(CACHE)[:, None, None] < 24, jnp.nan, 0)  # the last tile begins at 24
  want = _decode(q, pairs, [far, masks[1]], "xla")
  got = _decode(q, [(k + poison, v + poison), *rest], [far, masks[1]], "xla")
  np.testing.assert_array_equal(got, want)
  assert np.isnan(_decode(q, [(k + poison, v + poison), *rest], masks, "xla")).any()  # negative control


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
def test_temporaries_stay_far_below_the_cache(implementation, monkeypatch):
  """4 rows of 4,096 keys, a block of 8 slots: nothing of the size of the cache is made."""
  monkeypatch.undo()
  rows, lq, keys, H, h, D = 4, 8, 4096, 8, 2, 64
  shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype)
  mask = lambda n: AttnMask(*(shape(*s, dtype=jnp.int32) for s in ((rows, n), (rows, 1, lq), (rows, 1, lq))))
  segment = lambda n: kernels.Segment(shape(rows, n, h, D), shape(rows, n, h, D), mask(n))
  args = shape(rows, lq, H, D), [segment(keys), segment(lq)]
  cache = 2 * rows * keys * h * D * 4
  with kernels.building_for(CHIP if implementation == "pallas_tpu" else kernels.Target("cpu")):
    run = functools.partial(kernels.decode, implementation=implementation)
    if implementation == "xla":
      temp = jax.jit(run).lower(*args).compile().memory_analysis().temp_size_in_bytes
      assert temp < 0.15 * cache, temp / cache
    assert not _joins(run, args, cache // 8)
  naive = lambda q, segments: jnp.concatenate([s.k for s in segments], 1)
  assert _joins(naive, args, cache // 8)  # negative control


def _joins(f, args, size):
  """Concatenations in f whose result has more bytes."""

  def walk(jaxpr):
    for e in jaxpr.eqns:
      yield e
      for sub in core.jaxprs_in_params(e.params):
        yield from walk(sub)

  found = [
    e.outvars[0].aval for e in walk(jax.make_jaxpr(f)(*args).jaxpr) if e.primitive.name == "concatenate"
  ]
  return [a for a in found if a.size * a.dtype.itemsize > size]


def test_errors_name_what_was_given():
  masks, _ = _case(6)
  q, pairs = _tensors(6, 8, 2)
  (k, v), _ = pairs
  made = kernels.decode_plan(masks[0], 4, "xla")
  go = lambda *s, **kw: kernels.decode(q, [kernels.Segment(*s)], **{"implementation": "xla", **kw})
  with pytest.raises(ValueError, match="plan of 'xla' cannot run on 'reference'"):
    go(k, v, made, implementation="reference")
  with pytest.raises(ValueError, match=r"\(Lq, Lk\) = \(6, 40\)"):
    go(k[:, 1:], v[:, 1:], made)
  with pytest.raises(ValueError, match="k and v share"):
    go(k, v[:, 1:], made)
  with pytest.raises(ValueError, match="page=40"):
    go(k, v, made, jnp.zeros((B, 1), jnp.int32))
  with pytest.raises(ValueError, match="whole number of pages"):
    kernels.decode_plan(masks[0], 4, "xla", page=16)
