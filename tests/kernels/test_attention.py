"""The blockwise kernel against dense attention under the papers' masks, forward and backward.

Legend: B rows · S slots · H query heads · h key heads · D, Dv head sizes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from genmodels import compat, kernels
from genmodels.kernels import tiles as tile_lists
from genmodels.masks import CODE_HIDDEN, AttnMask, builders
from tests.masks import oracles

B, S, T = oracles.B, 3 * oracles.N, 2  # every mask is padded to one shape: one program serves them all


_plan = jax.jit(kernels.plan, static_argnums=1)


def _padded(mask: AttnMask) -> AttnMask:
  pad = S - mask.code.shape[1]
  bounds = [jnp.pad(x, ((0, 0), (0, T - x.shape[1]), (0, pad))) for x in (mask.lo, mask.hi)]
  return AttnMask(jnp.pad(mask.code, ((0, 0), (0, pad)), constant_values=CODE_HIDDEN), *bounds)


def _tensors(lq, lk, H, h, D, Dv, rows=B, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 5)
  shapes = (rows, lq, H, D), (rows, lk, h, D), (rows, lk, h, Dv), (rows, lq, H, Dv), (rows, H, lq)
  *main, d_lse = (jax.random.normal(k, s) for k, s in zip(keys, shapes))
  return [x.astype(dtype) for x in main] + [d_lse]


def dense_attention(q, k, v, seen, scale, soft_cap):
  """The definition, in float32, for bool[B, Lq, Lk]; a query that sees nothing gives 0 and −inf."""
  q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
  k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
  s = jnp.einsum("bihd,bjhd->bhij", q, k, precision="highest") * scale
  s = s if soft_cap is None else soft_cap * jnp.tanh(s / soft_cap)
  p = jnp.where(seen[:, None], jnp.exp(s), 0)
  total = p.sum(-1, keepdims=True)
  safe = jnp.where(total > 0, total, 1)
  out = jnp.einsum("bhij,bjhd->bihd", p / safe, v, precision="highest")
  return out, jnp.where(total > 0, jnp.log(safe), -jnp.inf)[..., 0]


@functools.partial(jax.jit, static_argnums=0)
def _pulled(attend, q, k, v, d_out, d_lse):
  """out, lse, dq, dk, dv for cotangents of both outputs (of the LSE where it is finite)."""

  def loss(q, k, v):
    out, lse = attend(q, k, v)
    finite = jnp.where(lse > -jnp.inf, lse, 0)
    return (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum() + (finite * d_lse).sum(), (out, lse)

  grads, outs = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
  return (*outs, *grads)


@functools.cache
def _programs(tiles, implementation, shape, soft_cap=None, scale=0.3):
  """(ours, dense): jitted functions of a mask in our encoding, and as a bool array."""
  traces = []

  @jax.jit
  def ours(tensors, mask):
    traces.append(1)
    attend = functools.partial(
      kernels.attention, mask=mask, scale=scale, soft_cap=soft_cap, return_lse=True, tiles=tiles,
      implementation=implementation,
    )  # fmt: skip
    return _pulled(attend, *tensors)

  @jax.jit
  def dense(tensors, seen):
    return _pulled(lambda q, k, v: dense_attention(q, k, v, seen, scale, soft_cap), *tensors)

  return ours, dense, traces


def _assert_close(got, want, tolerance=3e-6):
  for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want):
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    if name == "lse":
      np.testing.assert_array_equal(np.isneginf(a), np.isneginf(b))
      a, b = np.where(np.isneginf(a), 0, a), np.where(np.isneginf(b), 0, b)
    assert np.isfinite(a).all(), name
    error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-6)
    assert error <= tolerance, f"{name}: relative error {error:.2e}"


def _check(name, seed, tiles, implementation="xla", soft_cap=None, heads=(4, 2, 16, 8), **more):
  r = oracles.rows(seed)
  mask, seen = _padded(oracles.CASES[name][0](r)), oracles.dense(name, r)
  pad = S - seen.shape[1]
  seen = np.pad(seen, ((0, 0), (0, pad), (0, pad)))
  shape = (S, S, *heads)
  ours, dense, traces = _programs(tiles, implementation, shape, soft_cap)
  tensors = _tensors(*shape, **more)
  _assert_close(ours(tensors, mask), dense(tensors, seen))
  return traces


@pytest.mark.compat
@pytest.mark.parametrize("name", oracles.CASES)
def test_kernel_is_dense_attention(name):
  # T6: output, LSE and three gradients for cotangents of both outputs; GQA, ragged tiles, empty rows.
  traces = _check(name, seed=5, tiles=(16, 32, 1))
  assert len(traces) == 1, "a new mask must not recompile"


def test_reference_is_dense_attention():
  _check("bd3", seed=6, tiles=None, implementation="reference", soft_cap=2.0)


def test_soft_cap_and_rows_that_share_a_tile_list():
  _check("bd3", seed=6, tiles=(16, 16, 2), soft_cap=2.0)


@pytest.mark.slow
@pytest.mark.parametrize("soft_cap", [None, 5.0])
@pytest.mark.parametrize("heads", [(4, 4, 32, 32), (8, 1, 16, 16), (6, 2, 8, 24)])
@pytest.mark.parametrize("tiles", [(8, 8, 1), (24, 16, 2), (72, 72, 1), (80, 8, 2), None])
def test_kernel_product(tiles, heads, soft_cap):
  for name in oracles.CASES:
    for seed in (7, 8):
      _check(name, seed, tiles, soft_cap=soft_cap, heads=heads)


def test_comparison_can_fail():
  r = oracles.rows(5)
  wrong = oracles.dense("context_causal", r)
  tensors = _tensors(48, 48, 2, 2, 8, 8)
  mask = builders.bd3(r.doc, (r.blk_lo, r.blk_hi))
  got = _pulled(functools.partial(kernels.attention, mask=mask, return_lse=True), *tensors)
  want = _pulled(lambda q, k, v: dense_attention(q, k, v, wrong, 8**-0.5, None), *tensors)
  with pytest.raises(AssertionError):
    _assert_close(got, want)


def test_bfloat16():
  mask = builders.bd3(oracles.rows(9).doc, 4)
  tensors = _tensors(48, 48, 4, 2, 32, 32, dtype=jnp.bfloat16)
  got = _pulled(functools.partial(kernels.attention, mask=mask, return_lse=True), *tensors)
  want = _pulled(lambda q, k, v: dense_attention(q, k, v, mask.to_dense(), 32**-0.5, None), *tensors)
  assert got[0].dtype == got[2].dtype == jnp.bfloat16 and got[1].dtype == jnp.float32
  _assert_close(got, want, 1e-2)


def test_two_intervals_of_one_tile_are_two_entries():
  mask = builders.bd3(jnp.zeros((1, 16), jnp.int32), 4)
  whole = kernels.plan(mask, (32, 32))
  assert int(whole.by_query.start[0, -1]) == 2
  assert sorted(tile_lists.term(whole.by_query.entry[0, :2]).tolist()) == [0, 1]


@pytest.mark.parametrize("name", oracles.CASES)
def test_tile_lists_miss_nothing(name):
  # Kernels §3.3: active wherever a pair is visible, full only where all are, both lists the same set.
  for seed, sizes in ((10, (8, 16, 1)), (11, (16, 8, 2))):
    made = _plan(_padded(oracles.CASES[name][0](oracles.rows(seed))), sizes)
    groups, terms = B // sizes[2], made.lo.shape[1]
    code = np.asarray(made.code)[:, None, None, :]
    lo, hi = np.asarray(made.lo)[..., None], np.asarray(made.hi)[..., None]
    seen = (lo <= code) & (code < hi)  # [B, T, I·q, J·k]
    seen = seen.reshape(groups, sizes[2], terms, -1, sizes[0], made.code.shape[1] // sizes[1], sizes[1])
    needed, full = seen.any((1, 4, 6)), seen.all((1, 4, 6))  # [g, T, I, J]
    sets = []
    for lists, axis in ((made.by_query, 2), (made.by_key, 3)):
      found = set()
      for g in range(groups):
        start = np.asarray(lists.start[g])
        assert start[0] == 0 and (np.diff(start) >= 0).all()
        for line in range(len(start) - 1):
          for e in np.asarray(lists.entry[g])[start[line] : start[line + 1]]:
            at = int(tile_lists.column(e)), line
            i, j = at[::-1] if axis == 2 else at
            found.add((g, int(tile_lists.term(e)), i, j, bool(tile_lists.is_full(e))))
      sets.append(found)
    assert sets[0] == sets[1]
    listed = {x[:4] for x in sets[0]}
    assert listed >= {tuple(map(int, x)) for x in np.argwhere(needed)}
    assert {x[:4] for x in sets[0] if x[4]} == {tuple(map(int, x)) for x in np.argwhere(full)}


@pytest.mark.parametrize(
  "L, block, tile, active", [(4096, 32, 128, 26.6), (4096, 32, 256, 28.1), (4096, 32, 512, 31.2)]
)
def test_tiles_visited_by_bd3(L, block, tile, active):
  # T32, kernels §3.5: n² + 2n of 4n² tiles, 3n of them partial, for n tiles a stream.
  mask = builders.bd3(jnp.zeros((1, L), jnp.int32), block)
  made = _plan(mask, (tile, tile))
  count, n = int(made.by_query.start[0, -1]), L // tile
  partial = count - int(tile_lists.is_full(made.by_query.entry[0, :count]).sum())
  assert (count, partial) == (n * n + 2 * n, 3 * n)
  assert round(100 * count / (4 * n * n), 1) == active


def test_skipped_tiles_are_not_read():
  # NaN in keys that no tile of the list touches must not matter: the loop really skips them.
  doc = jnp.repeat(jnp.arange(4), 16)[None]
  q, k, v, d_out, d_lse = _tensors(64, 64, 2, 2, 8, 8, rows=1)
  bad = [x.at[:, 16:].set(jnp.nan) for x in (q, k, v)]
  attend = functools.partial(kernels.attention, mask=builders.causal(doc), return_lse=True, tiles=(16, 16, 1))
  good = _pulled(attend, q, k, v, d_out, d_lse)
  got = _pulled(attend, *bad, d_out, d_lse)
  for a, b in zip(good, got):
    a, b = (jnp.moveaxis(x, 2, 1) if x.ndim == 3 else x for x in (a, b))
    np.testing.assert_array_equal(a[:, :16], b[:, :16])


def test_memory_grows_with_length_not_its_square():
  def temporary(L):
    mask = builders.bd3(jnp.zeros((1, L), jnp.int32), 32)
    x = jnp.zeros((1, 2 * L, 2, 16))
    step = jax.jit(jax.grad(lambda q: kernels.attention(q, q, q, mask, tiles=(128, 128, 1)).sum()))
    return step.lower(x).compile().memory_analysis().temp_size_in_bytes

  small, large = temporary(1024), temporary(4096)
  assert large < 5 * small
  assert large < 8192 * 8192  # a byte per pair would already be more


def test_segments_merge_to_the_whole():
  # A cache and the slots of this call as two key segments, with a query that sees only one of them.
  mask = builders.bd3(oracles.rows(5).doc, 4)
  tensors = _tensors(48, 48, 4, 2, 8, 8)

  def split(q, k, v):
    parts = []
    for at in (slice(0, 20), slice(20, 48)):
      segment = mask.replace(code=mask.code[:, at])
      parts.append(kernels.attention(q, k[:, at], v[:, at], segment, return_lse=True, tiles=(16, 16, 1)))
    return kernels.merge(*zip(*parts))

  got = _pulled(split, *tensors)
  want = _pulled(lambda q, k, v: dense_attention(q, k, v, mask.to_dense(), 8**-0.5, None), *tensors)
  _assert_close(got, want)


def test_a_shared_mask_equals_one_per_row():
  mask = builders.block_causal(jnp.zeros((1, 40), jnp.int32), 8)
  wide = jax.tree.map(lambda x: jnp.broadcast_to(x, (3, *x.shape[1:])), mask)
  tensors = _tensors(40, 40, 2, 2, 8, 8, rows=3)
  runs = [
    _pulled(functools.partial(kernels.attention, mask=m, return_lse=True, tiles=(16, 16, r)), *tensors)
    for m, r in ((mask, 1), (wide, 3))
  ]
  _assert_close(*runs)


@pytest.mark.compat
def test_inside_shard_map():
  # Rows over data, heads over tensor, a plan made outside: the same gradients; one key head replicated
  # over tensor gets its gradient summed.
  mesh = compat.make_mesh((2, 2), ("data", "tensor"), jax.devices()[:4])
  mask = builders.bd3(oracles.rows(5).doc, 4)
  rows, heads = P("data"), P("data", None, "tensor")
  made = kernels.plan(mask, (16, 16, 1))
  for h, key_spec in ((2, heads), (1, rows)):
    q, k, v, d_out, _ = _tensors(48, 48, 4, h, 8, 8)
    local = compat.shard_map(kernels.attention, mesh, (heads, key_spec, key_spec, rows), heads)
    gradients = []
    for f in (local, kernels.attention):
      loss = lambda q, k, v, f=f, d_out=d_out: (f(q, k, v, made) * d_out).sum()
      gradients.append(jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v))
    for a, b in zip(*gradients):
      np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.compat
def test_remat_by_name_keeps_attention():
  # In a scanned, rematerialised layer: saving attn_out and attn_lse spares the third loop.
  mask = builders.causal(jnp.zeros((1, 32), jnp.int32))
  q = jax.random.normal(jax.random.key(0), (1, 32, 2, 8))
  weights = jax.random.normal(jax.random.key(1), (3, 8, 8)) * 0.3

  def gradient(policy):
    def layer(x, w):
      y = x @ w
      return x + kernels.attention(y, y, y, mask, tiles=(16, 16, 1)), None

    return jax.grad(lambda w: (jax.lax.scan(jax.checkpoint(layer, policy=policy), q, w)[0] ** 2).sum())

  keep = gradient(jax.checkpoint_policies.save_only_these_names("attn_out", "attn_lse"))
  again = gradient(None)
  assert str(jax.make_jaxpr(keep)(weights)).count("while[") == 2
  assert str(jax.make_jaxpr(again)(weights)).count("while[") == 3


def test_dispatch_is_explicit():
  assert kernels.resolve() == "xla" and kernels.resolve("reference") == "reference"
  for name in ("pallas_tpu", "pallas_gpu"):
    with pytest.raises(ValueError, match="cannot run here"):
      kernels.resolve(name)
  with pytest.raises(ValueError, match="unknown implementation 'flash'"):
    kernels.resolve("flash")


def test_shapes_that_do_not_fit_are_named():
  mask = builders.causal(jnp.zeros((1, 8), jnp.int32))
  x = jnp.zeros((2, 8, 4, 8))
  for args, kwargs, message in [
    ((x, x[:, :, :3], x[:, :, :3], mask), {}, "4 query heads are no multiple of 3 key heads"),
    ((x, x[:, :7], x[:, :7], mask), {}, r"\(Lq, Lk\) = \(8, 8\)"),
    ((x, x[:, :7], x, mask), {}, "must share"),
    ((x[0], x, x, mask), {}, r"must be \[B, L, H, D\]"),
    ((x, x, x, jax.tree.map(lambda y: jnp.tile(y, (3,) + (1,) * (y.ndim - 1)), mask)), {}, "1 row"),
    ((x, x, x, kernels.plan(mask, (8, 8))), {"tiles": (4, 4)}, "drop `tiles`"),
  ]:
    with pytest.raises(ValueError, match=message):
      kernels.attention(*args, **kwargs)
  with pytest.raises(ValueError, match="must divide the mask's 1 rows"):
    kernels.plan(mask, (8, 8, 2))
