"""The TPU kernels of grouped products, interpreted on a CPU: against a loop over rows, forward and backward.

Legend: M rows · E groups · D inputs · F outputs · m rows of a tile.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from genmodels import compat, kernels
from genmodels.kernels import grouped_matmul, pallas_tpu, resolve_grouped
from genmodels.kernels import pallas_tpu_grouped as grouped
from genmodels.kernels.pallas_tpu_lists import _CHIPS
from tests.kernels.test_grouped import oracle

INTERPRETED = kernels.Target("tpu", "TPU v5p", interpret=True)
# Rows of no group and odd widths; tiles of 16 rows in parts of 8, two blocks of columns, the last one short,
# in chunks with a shorter one behind.
M, D, F = 44, 20, 27
PRODUCT = grouped.ProductTiles(rows=16, columns=16, part=8, chunk=6)
WEIGHTS = grouped.WeightTiles(rows=16, inputs=12, outputs=16, part=8, chunk=5)
SIZES = [
  (0, 16, 0, 28),  # borders on tiles, an empty group between, nothing left over
  (3, 0, 5, 20),  # borders inside a tile and inside a part; rows of no group
  (1, 1, 1, 1),  # a part shared by all, and two tiles of no group
  (0, 0, 0, 44),
  (44, 0, 0, 0),
  (0, 31, 2, 0),
  (0, 0, 0, 0),
]


@pytest.fixture(autouse=True)
def _interpreted():
  with kernels.building_for(INTERPRETED):
    yield


@pytest.fixture
def small_tiles(monkeypatch):
  monkeypatch.setattr(grouped, "product_tiles", lambda *_: PRODUCT)
  monkeypatch.setattr(grouped, "weight_tiles", lambda *_: WEIGHTS)


def _pulled(x, w, sizes, g):
  y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, "pallas_tpu"), x, w)
  return y, *pull(g)


def _operands(M, E, D, F, seed=0, dtype=np.float32):
  rng = np.random.default_rng(seed)
  make = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
  return make(M, D), make(E, D, F), make(M, F)


def _check(run, x, w, g, sizes, **tolerance):
  """Rows of no group hold NaN: nothing of them may reach an output."""
  sizes, total = np.asarray(sizes, np.int32), sum(sizes)
  garbage = jnp.where((jnp.arange(len(x)) < total)[:, None], 0, jnp.nan)
  y, dx, dw = (
    np.asarray(a, np.float32) for a in run(x + garbage.astype(x.dtype), w, sizes, g + garbage.astype(x.dtype))
  )
  x, w, g = (np.asarray(a, np.float64) for a in (x, w, g))
  want = np.zeros_like(w)
  for r, e in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
    want[e] += np.outer(x[r], g[r])
  tolerance = tolerance or dict(atol=2e-5)
  np.testing.assert_allclose(y, oracle(x, w, sizes), **tolerance)
  np.testing.assert_allclose(dx, oracle(g, w.swapaxes(1, 2), sizes), **tolerance)
  np.testing.assert_allclose(dw, want, **tolerance)
  assert not y[total:].any() and not dx[total:].any() and not dw[sizes == 0].any()


@pytest.mark.compat
def test_is_a_loop_over_rows(small_tiles):
  """One program: the sizes are data."""
  run = jax.jit(_pulled)
  x, w, g = _operands(M, 4, D, F)
  rng = np.random.default_rng(1)
  drawn = [np.diff(np.sort(np.r_[0, rng.integers(0, M + 1, 4)])) for _ in range(20)]
  for sizes in (*SIZES, *drawn):
    _check(run, x, w, g, sizes)
  assert run._cache_size() == 1


def test_comparison_can_fail(small_tiles, monkeypatch):
  monkeypatch.setattr(grouped, "_of", lambda rows, size, offset: jnp.ones((size, 1), bool))
  x, w, _ = _operands(M, 4, D + 1, F)  # a shape of its own: the kernel's jit does not know the patch
  sizes = np.asarray(SIZES[1], np.int32)
  made = jax.jit(lambda *a: grouped_matmul(*a, "pallas_tpu"))(x, w, sizes)
  error = np.abs(np.asarray(made) - oracle(np.asarray(x), np.asarray(w), sizes)).max(1)
  assert (error[3:8] < 1e-4).all() and error[:3].max() > 0.1  # the last of a part's groups is right


# Fewer rows than a tile, more groups than rows, a last tile that sticks out, odd widths.
@pytest.mark.slow
@pytest.mark.parametrize(
  "kind, M, sizes, D, F",
  [
    ("TPU v5p", 9, (2, 0, 0, 1, 0, 0, 0, 4, 0, 0, 0, 0), 6, 5),
    ("TPU v6e", 9, (9,), 6, 5),
    ("TPU v5p", 700, (100, 0, 300, 1, 212, 0, 60), 130, 256),
    ("TPU v6e", 300, (0, 130, 1, 2, 100, 0), 256, 130),
  ],
)
def test_tiles_of_the_chips(kind, M, sizes, D, F):
  with kernels.building_for(kernels.Target("tpu", kind, interpret=True)):
    _check(jax.jit(_pulled), *_operands(M, len(sizes), D, F), sizes, atol=2e-4, rtol=1e-5)


@pytest.mark.slow
def test_bfloat16(small_tiles):
  """Sums in float32, one rounding: within half a unit in the last place of what float64 gives."""
  x, w, g = _operands(M, 4, D, F, dtype=jnp.bfloat16)
  made = jax.jit(_pulled)(x, w, np.asarray(SIZES[1], np.int32), g)
  assert all(a.dtype == jnp.bfloat16 for a in made)
  _check(jax.jit(_pulled), x, w, g, SIZES[1], atol=1e-3, rtol=2**-8)


@pytest.mark.slow
def test_nothing_is_read_before_it_is_written(small_tiles):
  """Memory starts as NaN, and every access is checked for races."""
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call
  from jax.experimental.pallas import tpu as pltpu

  params = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan")
  with kernels.building_for(kernels.Target("tpu", "TPU v5p", interpret=params)):
    _check(jax.jit(_pulled), *_operands(M, 4, D, F), SIZES[1])
  assert not interpret_pallas_call.races.races_found


# -- steps and tiles ------------------------------------------------------------------------------------


@pytest.mark.parametrize("every_group", [False, True])
def test_steps_are_the_pairs_with_rows_in_common(every_group):
  m, E, rng = 8, 6, np.random.default_rng(0)
  run = jax.jit(lambda sizes: grouped._steps(sizes, 37, m, every_group))
  tiles = 5
  longest = 0
  for _ in range(30):
    cuts = rng.integers(0, 38, E) * (rng.random(E) < 0.7)
    sizes = np.diff(np.sort(np.r_[0, cuts])).astype(np.int32)
    steps, count = jax.tree.map(np.asarray, run(sizes))
    group = np.repeat(np.arange(E), sizes)
    want = {}
    for r, e in enumerate(group):
      want.setdefault((r // m, e), []).append(r)
    seen, order = {}, []
    for s in range(count):
      g, t = steps.group[s], steps.tile(s)
      lo, hi = (np.clip(rows[g] - t * m, 0, m) for rows in (steps.start, steps.end))
      assert 0 <= t < tiles
      order.append((t, g))
      if lo < hi:
        seen[t, g] = list(range(t * m + lo, t * m + hi))
      else:
        assert g == E or sizes[g] == 0
    assert seen == want
    ranks = [g for _, g in order] if every_group else [t for t, _ in order]
    assert ranks == sorted(ranks) and set(ranks) == set(range(E if every_group else tiles))
    assert len(order) == len(set(order)) <= tiles + E - 1
    assert steps.group[count] != steps.group[count - 1]
    longest = max(longest, len(order))
  assert longest > tiles + 2


SHAPES = [
  (16384, 2048, 768, 2),
  (64, 2048, 768, 2),
  (4096, 7168, 2048, 2),
  (5000, 2880, 2880, 2),
  (4096, 4096, 14336, 2),
  (300, 250, 131, 4),
  (4096, 2048, 1408, 4),
]


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v5", "TPU v6", "TPU7"])
@pytest.mark.parametrize("M, D, F, size", SHAPES, ids=str)
def test_tiles_fit_the_chip(kind, M, D, F, size):
  on, dtype = _CHIPS[kind], {2: jnp.bfloat16, 4: jnp.float32}[size]
  for k, n in ((D, F), (F, D)):
    rows, columns, part, chunk = grouped.product_tiles(M, k, n, size, on)
    assert rows % part == 0 and rows % 16 == 0 and (columns == n or columns % 128 == 0)
    assert chunk == columns or chunk % 128 == 0
    assert -(-n // columns) % on.cores == 0 or n <= 128
    held = [((rows, k), dtype), ((k, columns), dtype), ((rows, columns), dtype)]
    assert pallas_tpu.vmem_bytes(held, [], 0) < 0.7 * on.vmem
  rows, inputs, outputs, part, chunk = grouped.weight_tiles(M, D, F, size, on)
  assert (inputs == D or inputs % 128 == 0) and (outputs == F or outputs % 128 == 0) and rows % part == 0
  held = [((rows, inputs), dtype), ((rows, outputs), dtype), ((inputs, outputs), dtype)]
  assert pallas_tpu.vmem_bytes(held, [((inputs, outputs), jnp.float32)], 0) < 0.7 * on.vmem


def test_rows_are_read_once_where_memory_allows():
  on = _CHIPS["TPU v6"]
  assert grouped.product_tiles(16384, 2048, 768, 2, on) == (512, 768, 256, 768)
  assert grouped.weight_tiles(16384, 2048, 768, 2, on)[1:3] == (2048, 768)
  assert grouped.product_tiles(16384, 2048, 768, 2, _CHIPS["TPU v5"]).columns == 384  # a block a core


# -- where it runs ----------------------------------------------------------------------------------------


def test_what_auto_takes_and_what_is_refused():
  shape = jax.ShapeDtypeStruct
  x, w = shape((64, 128), jnp.bfloat16), shape((4, 128, 256), jnp.bfloat16)
  half = shape((64, 128), jnp.float16)
  wide = shape((64, 2**20), jnp.bfloat16), shape((4, 2**20, 2**20), jnp.bfloat16)
  here = lambda platform, kind="": kernels.building_for(kernels.Target(platform, kind))
  with here("tpu", "TPU v5 lite"):
    assert resolve_grouped("auto") == resolve_grouped("auto", x, w) == "pallas_tpu"
    for operands, message in (((half, w), "not float16"), (wide, "too wide for 128 MiB")):
      assert resolve_grouped("auto", *operands) == "blocks"
      with pytest.raises(ValueError, match=message):
        resolve_grouped("pallas_tpu", *operands)
  with here("tpu", "TPU v3"):
    assert resolve_grouped("auto") == "blocks"
    with pytest.raises(ValueError, match="'pallas_tpu' cannot run here: .*scalar memory.*use 'auto'"):
      resolve_grouped("pallas_tpu")
  for platform in ("cpu", "gpu"):
    with here(platform):
      assert resolve_grouped("auto", x, w) == "blocks" and resolve_grouped("ragged") == "ragged"
      with pytest.raises(ValueError, match="needs a TPU"):
        resolve_grouped("pallas_tpu", x, w)


def test_no_rows():
  y, dx, dw = _pulled(
    *(jnp.zeros(s) for s in ((0, 3), (2, 3, 5))), jnp.zeros(2, jnp.int32), jnp.zeros((0, 5))
  )
  assert y.shape == (0, 5) and dx.shape == (0, 3) and not dw.any()


def _sharded(mesh, check):
  """Loss of a product inside shard_map: rows over both axes, kernels gathered over fsdp; its gradients."""

  def local(x, w, sizes):
    w = jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)
    return jnp.tanh(grouped_matmul(x, w, sizes[0], "pallas_tpu"))

  both = ("data", "fsdp")
  run = compat.shard_map(local, mesh, (P(both), P("fsdp"), P(both)), P(both), check=check)
  return jax.value_and_grad(lambda x, w, sizes: (run(x, w, sizes) ** 2).sum(), (0, 1))


needs_8 = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 host devices")


@needs_8
@pytest.mark.slow
def test_inside_shard_map(small_tiles):
  """Each device has its own sizes; a kernel's gradient is the sum over all. The interpreter knows no axes."""
  mesh = compat.make_mesh((2, 4), ("data", "fsdp"))
  x, w, _ = _operands(8 * M, 4, D, F)
  sizes = jnp.asarray([*SIZES, SIZES[1]], jnp.int32)
  value, (dx, dw) = jax.jit(_sharded(mesh, check=False))(x, w, sizes)

  def whole(x, w):
    rows = x.reshape(8, M, D)
    y = [jnp.tanh(grouped_matmul(r, w, s, "blocks")) for r, s in zip(rows, sizes, strict=True)]
    return sum((a**2).sum() for a in y)

  want = jax.jit(jax.value_and_grad(whole, (0, 1)))(x, w)
  for a, b in zip((value, dx, dw), (want[0], *want[1]), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@needs_8
def test_inside_a_shard_map_that_checks(monkeypatch):
  """Traced as for a chip; the negative control says nothing of the axes that the output varies over."""
  mesh = compat.make_mesh((2, 4), ("data", "fsdp"))
  x, w, _ = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in _operands(8 * M, 4, D, F))
  sizes = jax.ShapeDtypeStruct((8, 4), jnp.int32)
  with kernels.building_for(kernels.Target("tpu", "TPU v5p")):
    value, (dx, dw) = jax.eval_shape(_sharded(mesh, check=True), x, w, sizes)
    assert (dx.shape, dw.shape) == (x.shape, w.shape)
    monkeypatch.setattr(grouped.jax, "typeof", lambda a: type("none", (), {"manual_axis_type": None}))
    with pytest.raises(ValueError, match="vma|varying|manual"):
      jax.eval_shape(_sharded(mesh, check=True), x, w, sizes)


@pytest.mark.slow
def test_under_scan_and_remat(small_tiles):
  """Two rematerialised layers: the gradient is that of the loop over blocks."""
  x, w, _ = _operands(M, 4, D, F)
  down = _operands(M, 4, F, D, 1)[1]
  sizes = jnp.asarray(SIZES[1], jnp.int32)

  def loss(stacks, implementation):
    product = functools.partial(grouped_matmul, sizes=sizes, implementation=implementation)

    def layer(x, kernels):
      wide, narrow = kernels
      return x + product(jnp.tanh(product(x, wide)), narrow) * 0.1, None

    return (jax.lax.scan(jax.checkpoint(layer), x, stacks)[0] ** 2).sum()

  stacks = jnp.stack([w, -w]), jnp.stack([down, down])
  ours, theirs = (
    jax.jit(jax.grad(functools.partial(loss, implementation=i)))(stacks) for i in ("pallas_tpu", "blocks")
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, theirs)


@pytest.mark.parametrize("kept, calls", [(True, 3), (False, 4)])
def test_remat_by_name_spares_the_kernel(kept, calls):
  """Where a policy keeps the product, the backward pass has no second forward kernel; else it has."""
  x, w, _ = _operands(16, 2, 8, 8)
  names = jax.checkpoint_policies.save_only_these_names("y" if kept else "other")

  def layer(x, w):
    y = grouped_matmul(x, w, jnp.asarray([5, 6]), "pallas_tpu")
    return jnp.sin(jax.ad_checkpoint.checkpoint_name(y, "y")).sum()

  made = jax.make_jaxpr(jax.grad(jax.checkpoint(layer, policy=names), (0, 1)))(x, w)
  assert str(made).count("name=grouped_matmul") == calls, made
