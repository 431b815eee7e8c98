"""The TPU kernels, interpreted on a CPU, against dense attention under the papers' masks.

Legend: B rows · S slots · H query heads · h key heads · D, Dv head sizes · T intervals · I query tiles
· J key tiles.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from genmodels import compat, kernels
from genmodels.kernels import pallas_tpu, pallas_tpu_bodies, pallas_tpu_lists
from genmodels.kernels import tiles as tile_lists
from genmodels.kernels.pallas_tpu_lists import Tiles
from genmodels.masks import CODE_HIDDEN, AttnMask, builders
from tests.kernels.test_attention import (
  S,
  _assert_close,
  _padded,
  _programs,
  _pulled,
  _tensors,
  dense_attention,
)
from tests.masks import oracles

# Forward tiles in two parts; other tiles in the backward kernels, none of which divides S = 72.
TILES = Tiles(16, 32, 16, dq=(32, 16), dkv=(16, 48, 16))
HEADS = 4, 2, 16, 8


@pytest.fixture(autouse=True)
def _interpreted():
  with kernels.building_for(kernels.Target("tpu", "TPU v5p", interpret=True)):
    yield


def _attend(mask, **options):
  options = dict(scale=0.3, return_lse=True, tiles=TILES, implementation="pallas_tpu") | options
  return functools.partial(kernels.attention, mask=mask, **options)


def _run(mask, tensors, **options):
  """out, lse and gradients in a program of this test's own: kernels.attention's target is no key of jit."""
  return jax.jit(lambda m, *xs: _pulled.__wrapped__(_attend(m, **options), *xs))(mask, *tensors)


@functools.cache
def _case(name, seed=5):
  r = oracles.rows(seed)
  seen = oracles.dense(name, r)
  pad = S - seen.shape[1]
  return _padded(oracles.CASES[name][0](r)), np.pad(seen, ((0, 0), (0, pad), (0, pad)))


def _check(mask, seen, heads=HEADS, soft_cap=None, tiles=TILES):
  shape = (S, S, *heads)
  ours, dense, traces = _programs(tiles, "pallas_tpu", shape, soft_cap)
  tensors = _tensors(*shape)
  got = ours(tensors, mask)
  _assert_close(got, dense(tensors, seen))
  assert len(traces) == 1, "a new mask must not recompile"
  return got


@pytest.mark.compat
@pytest.mark.parametrize("name", oracles.CASES)
def test_kernels_are_dense_attention(name):
  # Output, LSE, three gradients for cotangents of both outputs; GQA, ragged tiles, Dv != D, empty rows.
  _check(*_case(name))


def test_a_row_that_sees_nothing():
  mask, seen = _case("bd3")
  mask = mask.replace(code=mask.code.at[0].set(CODE_HIDDEN))
  seen = seen & (np.arange(len(seen)) > 0)[:, None, None]
  out, lse, *grads = _check(mask, seen)
  assert not np.asarray(out[0]).any() and np.isneginf(lse[0]).all()
  assert all(not np.asarray(g[0]).any() and np.asarray(g[1]).any() for g in grads)


def test_comparison_can_fail(monkeypatch):
  # Partial tiles computed as if they were full.
  each = pallas_tpu_bodies._each_part
  monkeypatch.setattr(
    pallas_tpu_bodies, "_each_part", lambda layout, e, body: each(layout, e, lambda c, masked: body(c, False))
  )
  mask, seen = _case("bd3")
  tensors = _tensors(S, S, *HEADS)
  # A scale of its own: kernels are traced under a jit, whose cache does not know the patch.
  want = dense_attention(*tensors[:3], seen, 0.29, None)
  with pytest.raises(AssertionError):
    _assert_close(jax.jit(_attend(mask, scale=0.29))(*tensors[:3]), want)


def test_bfloat16():
  # Kernels §13.3: relative Frobenius 5e-3 forward, 1e-2 gradients.
  mask = builders.bd3(oracles.rows(9).doc, 4)
  tensors = _tensors(48, 48, 4, 1, 64, 64, dtype=jnp.bfloat16)
  got = _run(mask, tensors, tiles=(16, 32), soft_cap=20.0, scale=0.125)
  want = _pulled(lambda q, k, v: dense_attention(q, k, v, mask.to_dense(), 0.125, 20.0), *tensors)
  assert got[0].dtype == got[2].dtype == got[3].dtype == jnp.bfloat16 and got[1].dtype == jnp.float32
  _assert_close(got[:2], want[:2], 5e-3)
  _assert_close(got, want, 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
  "heads, soft_cap, tiles",
  [
    ((4, 4, 32, 32), None, (16, 16)),
    ((4, 1, 64, 64), 5.0, (32, 16)),
    ((8, 1, 16, 24), None, (72, 72)),
    ((2, 2, 128, 128), None, Tiles(24, 48, 24)),
    ((3, 1, 256, 256), 2.0, (24, 24)),
    ((8, 2, 8, 136), None, None),
  ],
)
def test_kernel_product(heads, soft_cap, tiles):
  for name in oracles.CASES:
    _check(*_case(name, 7), heads, soft_cap, tiles)


def test_a_shared_mask_equals_one_per_row():
  # One list, the rows of the batch joined to the heads, three rows; queries are fewer than keys.
  mask = builders.block_causal(jnp.zeros((1, 40), jnp.int32), 8)
  mask = mask.replace(lo=mask.lo[..., 7:], hi=mask.hi[..., 7:])
  wide = jax.tree.map(lambda x: jnp.broadcast_to(x, (3, *x.shape[1:])), mask)
  tensors = _tensors(33, 40, 4, 2, 8, 8, rows=3)
  runs = [_run(m, tensors, tiles=(16, 16)) for m in (mask, wide)]
  for a, b in zip(*runs):
    np.testing.assert_array_equal(a, b)
  _assert_close(
    runs[0],
    _pulled(lambda q, k, v: dense_attention(q, k, v, wide.to_dense(), 0.3, None), *tensors),
  )


@pytest.mark.slow
def test_divided_lists_compute_the_same(monkeypatch):
  mask, seen = _case("bd3")
  tensors = _tensors(S, S, *HEADS)
  whole = _run(mask, tensors)
  monkeypatch.setattr(pallas_tpu_lists, "MAX_ENTRIES", 36)
  made = jax.jit(lambda m: kernels.plan(m, TILES, "pallas_tpu"))(mask)
  calls = [len(x) for x in (made.fwd, made.dq, made.dkv)]
  assert calls == [2, 3, 2], calls
  assert all(x.entry.shape[1] <= 36 for lists in (made.fwd, made.dq, made.dkv) for x in lists)
  for a, b in zip(_run(mask, tensors), whole):
    np.testing.assert_array_equal(a, b)
  monkeypatch.setattr(pallas_tpu_lists, "MAX_ENTRIES", 10)
  with pytest.raises(ValueError, match="do not fit scalar memory .* even with one line a call"):
    kernels.plan(mask, TILES, "pallas_tpu")


def test_too_small_a_capacity_poisons_and_says_so():
  tensors = _tensors(S, S, *HEADS)
  small = TILES._replace(capacity=0.4)
  step = jax.jit(lambda m, *xs: _pulled.__wrapped__(_attend(m, tiles=small), *xs))
  make = jax.jit(lambda m: kernels.plan(m, small, "pallas_tpu"))
  for name, fits in (("window", True), ("full", False)):
    mask, seen = _case(name)
    if not fits:  # one document of the whole row, and a second interval that no tile misses
      mask = jax.tree.map(lambda x: jnp.broadcast_to(x[:, :1], x.shape), _everything(mask))
    made = make(mask)
    assert made.overflow.shape == (1,) and bool(made.overflow[0]) is not fits
    got = step(mask, *tensors)
    assert all(bool(jnp.isnan(x).all()) is not fits for x in got)
    if fits:
      _assert_close(got, _pulled(lambda q, k, v: dense_attention(q, k, v, seen, 0.3, None), *tensors))
  assert not bool(jax.jit(lambda m: kernels.plan(m, TILES, "pallas_tpu"))(mask).overflow[0])


def _everything(mask: AttnMask) -> AttnMask:
  """Every query sees every key, half of them by each interval."""
  lk = mask.code.shape[1]
  code = jnp.broadcast_to(jnp.arange(lk) % 2, mask.code.shape).astype(jnp.int32)
  edge = jnp.broadcast_to(jnp.arange(2, dtype=jnp.int32)[:, None], mask.lo.shape)
  return AttnMask(code, edge, edge + 1)


def test_pages_are_looked_up():
  # A pool with twice the pages, in another order, poisoned where nobody looks; bfloat16 of a float32 query.
  mask, seen = _case("causal")
  lk, page = 64, 16
  mask = mask.replace(code=mask.code[:, :lk])
  q, k, v, *_ = _tensors(S, lk, *HEADS)
  k, v = (x.astype(jnp.bfloat16) for x in (k, v))
  made = _planner((16, page))(mask)
  rng = np.random.default_rng(0)
  pages = rng.permutation(16)[: 2 * 4].reshape(2, 4)
  pools = [
    jnp.full((16, page, *x.shape[2:]), jnp.nan, x.dtype)
    .at[pages.reshape(-1)].set(x.reshape(-1, page, *x.shape[2:]))
    for x in (k, v)
  ]  # fmt: skip
  unused = ~np.asarray((mask.code != CODE_HIDDEN).reshape(2, 4, page).any(-1))
  pages = np.where(unused, 99, pages)
  got = jax.jit(lambda *xs: pallas_tpu.attend_pages(*xs, 0.3, None))(q, *pools, made, jnp.asarray(pages))
  want = dense_attention(q, k, v, seen[..., :lk], 0.3, None)
  _assert_close(got, want)
  with pytest.raises(ValueError, match="a page is a key tile"):
    pallas_tpu.attend_pages(q, *(x[:, :8] for x in pools), made, jnp.asarray(pages), 0.3, None)


@functools.cache
def _planner(tiles):
  return jax.jit(lambda m: kernels.plan(m, tiles, "pallas_tpu"))


def _read(lists, by_key):
  """{(row, term, i, j): (full, parts)}, and the lines in the order of the list, with their flags."""
  found, lines = {}, []
  for x in lists:
    at, count = x.layout, int(x.count[0])
    assert not np.asarray(x.entry[0, count:]).any()
    for e in x.entry[0, :count]:
      row, line = int(at.row_of(e)), int(at.line_of(e)) + at.start
      lines.append((row, line, bool(at.is_first(e)), bool(at.is_last(e))))
      place = (int(at.column_of(e)), line) if by_key else (line, int(at.column_of(e)))
      parts = int(at.parts_of(e))
      if parts:
        key = (row, int(at.term_of(e)), *place)
        assert key not in found
        found[key] = bool(at.is_full(e)), parts
  return found, lines


@pytest.mark.parametrize("name", oracles.CASES)
def test_lists_hold_what_is_visible(name):
  # Both orders list one set; the count is numpy's; every line is there, in one stretch, first and last marked.
  mask, _ = _case(name, 10)
  made = _planner(Tiles(8, 24, 8))(mask)
  code = np.asarray(mask.code)[:, None, None, :]
  lo, hi = np.asarray(mask.lo)[..., None], np.asarray(mask.hi)[..., None]
  seen = ((lo <= code) & (code < hi)).reshape(oracles.B, lo.shape[1], S // 8, 8, S // 24, 3, 8)
  tile = seen.transpose(0, 1, 2, 4, 5, 3, 6)  # [B, T, I, J, parts, 8, 8]
  parts = (tile.any((5, 6)) << np.arange(3)).sum(-1)
  want = {
    tuple(map(int, at)): (bool(tile[tuple(at)].all()), int(parts[tuple(at)])) for at in np.argwhere(parts)
  }
  for lists, by_key, count in ((made.fwd, False, S // 8), (made.dkv, True, S // 24)):
    found, lines = _read(lists, by_key)
    # Classification by min and max may list a part without a visible pair, never miss one.
    assert found.keys() >= want.keys()
    assert {k for k, v in found.items() if v[0]} == {k for k, v in want.items() if v[0]}
    assert all(found[k][1] & p == p for k, (_, p) in want.items())
    active, _ = (
      np.asarray(x) for x in tile_lists.classify(mask.code, mask.lo, mask.hi, kernels.Tiles(8, 24))
    )
    assert len(found) == active.sum()
    assert [x[:2] for x in lines if x[2]] == [(b, n) for b in range(oracles.B) for n in range(count)]
    assert [x[:2] for x in lines if x[3]] == [x[:2] for x in lines if x[2]]
    assert [x[:2] for x in lines] == sorted(x[:2] for x in lines)
  assert _read(made.fwd, False)[0] == _read(made.dkv, True)[0]


def test_default_tiles():
  for kind, lengths, want in [
    ("TPU v5 lite", (8192, 8192), ((512, 1024, 512), (512, 1024, 512))),
    ("TPU v5", (32768, 32768), ((1024, 1024, 512), (1024, 1024, 512))),
    ("TPU v6 lite", (8192, 8192), ((1024, 1024, 512), (1024, 1024, 512))),
    ("TPU7x", (64, 700), ((128, 768, 384), (128, 768, 384))),  # whole lanes
    ("TPU v5", (1100, 1100), ((384, 640, 640), (384, 640, 640))),  # tiles of equal size: little padding
    ("", (256, 256), ((256, 256, 256), (256, 256, 256))),
  ]:  # fmt: skip
    with kernels.building_for(kernels.Target("tpu", kind)):
      mask = AttnMask(
        *(jax.ShapeDtypeStruct(s, jnp.int32) for s in ((1, lengths[1]), *2 * [(1, 1, lengths[0])]))
      )
      made = jax.eval_shape(lambda m: kernels.plan(m, None, "pallas_tpu"), mask).tiles
    assert (tuple(made.fwd), made.dq) == want and made.dkv == made.dq, (kind, lengths, made)


def test_what_cannot_run_is_named():
  unavailable = pallas_tpu.unavailable
  assert unavailable(kernels.Target("tpu", "TPU v5p")) is None
  assert unavailable(kernels.Target("cpu", interpret=True)) is None
  assert unavailable(kernels.Target("cpu", interpret=pltpu.InterpretParams())) is None
  assert "platform is 'cpu'" in unavailable(kernels.Target("cpu"))
  assert "platform is 'gpu'" in unavailable(kernels.Target("gpu", interpret=True))
  assert "scalar memory" in unavailable(kernels.Target("tpu", "TPU v3"))
  mask, _ = _case("bd3")
  shape = lambda tiles, m=mask: jax.eval_shape(lambda m: kernels.plan(m, tiles, "pallas_tpu"), m)
  with pytest.raises(ValueError, match="k_compute=24 must divide the tile's 32 keys"):
    shape((16, 32, 24))
  with pytest.raises(ValueError, match="with one B"):
    shape((16, 32), mask.replace(code=mask.code[:1]))
  with pytest.raises(ValueError, match="an entry has 31 bits"):
    shape(Tiles(8, 128, 4))
  x = jax.ShapeDtypeStruct((1, 4096, 2, 128), jnp.bfloat16)
  with kernels.building_for(kernels.Target("tpu", "TPU v4")):
    with pytest.raises(ValueError, match="multiples of 128"):
      shape((16, 32))
    full = AttnMask(*(jax.ShapeDtypeStruct(s, jnp.int32) for s in ((1, 4096), (1, 1, 4096), (1, 1, 4096))))
    with pytest.raises(ValueError, match="MiB of vector memory, the chip has 16"):
      jax.eval_shape(lambda m, x: kernels.attention(x, x, x, m, tiles=(2048, 2048)), full, x)


def _layers(policy, tiles=None):
  """The gradient of three scanned, rematerialised layers in their weights."""

  def loss(x, w, mask):
    made = kernels.plan(mask, tiles, "pallas_tpu")

    def layer(x, w):
      y = (x @ w).reshape(1, -1, 1, 128)
      return x + kernels.attention(y, y, y, made).reshape(x.shape), None

    return jax.lax.scan(jax.checkpoint(layer, policy=policy), x, w)[0].astype(jnp.float32).sum()

  return jax.grad(loss, 1)


_KEPT = [(jax.checkpoint_policies.save_only_these_names("attn_out", "attn_lse"), 3), (None, 4)]


@pytest.mark.compat
@pytest.mark.skipif(
  jax.__version_info__ < (0, 12), reason="before jax 0.12 only XLA drops a dead pallas_call"
)
@pytest.mark.parametrize("policy, calls", _KEPT)
def test_remat_by_name_spares_a_forward_kernel(policy, calls):
  mask = builders.causal(jnp.zeros((1, 32), jnp.int32))
  made = jax.make_jaxpr(_layers(policy, (16, 16)))(jnp.zeros((32, 128)), jnp.zeros((3, 128, 128)), mask)
  assert str(made).count("name=interval_attention") == calls


@pytest.mark.aot
@pytest.mark.parametrize("policy, calls", _KEPT)
def test_a_compiled_remat_by_name_spares_a_forward_kernel(policy, calls, monkeypatch):
  pytest.importorskip("libtpu", reason="compiles for a TPU")
  for name in ("ALLOW_MULTIPLE_LIBTPU_LOAD", "TPU_SKIP_MDS_QUERY"):
    monkeypatch.setenv(name, "1")
  device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
  where = jax.sharding.SingleDeviceSharding(device)
  array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
  mask = AttnMask(*(array(*x, dtype=jnp.int32) for x in ((1, 256), (1, 2, 256), (1, 2, 256))))
  with kernels.building_for(kernels.Target.of(device)):
    lowered = jax.jit(_layers(policy)).lower(array(256, 128), array(3, 128, 128), mask)
  assert lowered.compile().as_text().count('custom_call_target="tpu_custom_call"') == calls


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
def test_no_races_and_nothing_read_before_it_is_written(shared):
  # Memory starts as NaN, transfers end when they are waited for, and every access is checked for races.
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call

  mask, seen = _case("bd3")
  if shared:
    mask, seen = jax.tree.map(lambda x: x[:1], mask), np.broadcast_to(seen[:1], seen.shape)
  params = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan")
  tensors = _tensors(S, S, 4, 2, 128, 128)
  with kernels.building_for(kernels.Target("tpu", "TPU v5p", interpret=params)):
    got = _run(mask, tensors)
  assert not interpret_pallas_call.races.races_found
  _assert_close(got, _pulled(lambda q, k, v: dense_attention(q, k, v, seen, 0.3, None), *tensors))


@pytest.mark.slow
@pytest.mark.compat
def test_inside_shard_map():
  # Rows over data, heads over tensor, plans made inside (and leaving it with P on every leaf's leading axis);
  # a key head that is replicated over tensor gets its gradient summed. The interpreter knows no varying axes.
  mesh = compat.make_mesh((4, 2), ("data", "tensor"))
  mask = jax.tree.map(lambda x: jnp.tile(x, (2,) + (1,) * (x.ndim - 1)), builders.bd3(oracles.rows(5).doc, 4))
  rows, heads = P("data"), P("data", None, "tensor")
  tiles = (16, 16)
  shard = functools.partial(compat.shard_map, mesh=mesh, check=False)
  for h, key_spec in ((2, heads), (1, rows)):
    q, k, v, d_out, _ = _tensors(48, 48, 4, h, 8, 8, rows=4)

    def local(q, k, v, mask, key_spec=key_spec):
      made = shard(lambda m: kernels.plan(m, tiles, "pallas_tpu"), in_specs=(rows,), out_specs=rows)(mask)
      return shard(kernels.attention, in_specs=(heads, key_spec, key_spec, rows), out_specs=heads)(
        q, k, v, made
      )

    whole = lambda q, k, v, mask: kernels.attention(q, k, v, mask, tiles=tiles)
    gradients = []
    for f in (local, whole):
      loss = lambda q, k, v, f=f, d_out=d_out: (f(q, k, v, mask) * d_out).sum()
      gradients.append(jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v))
    for a, b in zip(*gradients):
      np.testing.assert_allclose(a, b, atol=2e-6)
