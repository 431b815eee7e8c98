"""The backward of the Hopper kernels against dense attention, in the interpreter and in the compiler's front.

The interpreter models shared memory, barriers and TMA, fills memory with NaN and reports races. It has neither
wgmma with an operand in registers nor TMA reductions: the fast variants are lowered for cuda only.

Legend: B rows · Lq, Lk lengths · H query heads · h key heads · D head size.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from genmodels import kernels
from genmodels.kernels import pallas_gpu_bwd as bwd
from genmodels.kernels import pallas_gpu_lists as lists
from genmodels.masks import CODE_HIDDEN, AttnMask, builders
from tests.kernels.test_attention import dense_attention

pytestmark = pytest.mark.skipif(
  not hasattr(plgpu, "InterpretGPUParams"),
  reason=f"jax {jax.__version__}: Mosaic GPU kernels need jax >= 0.11",
)

N = 96  # clean tokens of a row: dual masks are 192 long, one tile and a half


def _doc(*lengths):
  return jnp.concatenate([jnp.full((n,), i, jnp.int32) for i, n in enumerate(lengths)])


def _docs(n=N):
  return jnp.stack([_doc(n // 2 - 7, 5, n // 2 + 2), _doc(n // 3, n - n // 3)])


def _holes():
  """Row 0: causal, some queries empty and some keys hidden. Row 1: nothing to see at all."""
  mask = builders.causal(_docs(2 * N))
  lo = mask.lo.at[0, :, 70:75].set(mask.hi[0, :, 70:75]).at[0, :, 150:].set(mask.hi[0, :, 150:])
  return AttnMask(mask.code.at[1].set(CODE_HIDDEN).at[0, 20:30].set(CODE_HIDDEN), lo, mask.hi)


MASKS = {
  "bd3": lambda: builders.bd3(_docs(), 16),
  "nbdiff": lambda: builders.context_causal(_docs(), 16),
  "window": lambda: builders.window(_docs(2 * N), 20),
  "full": lambda: builders.full(_docs(2 * N)),  # whole tiles without a mask
  "holes": _holes,
}


def _two_terms(mask):
  """Every mask of one shape: one program serves them all."""
  bounds = [jnp.pad(x, ((0, 0), (0, 2 - x.shape[1]), (0, 0))) for x in (mask.lo, mask.hi)]
  return AttnMask(mask.code, *bounds)


def _interpreted():
  return kernels.Target("gpu", "NVIDIA H200", interpret=plgpu.InterpretGPUParams(detect_races=True))


@functools.cache
def _program(options, target, reads=()):
  del reads  # of globals that a test patched

  def run(plan, *tensors):
    with kernels.building_for(target):
      return bwd.backward(options, plan, *tensors)

  return jax.jit(run)


def _tensors(mask, H, h, D, dtype, rows=None):
  rows = rows or mask.code.shape[0]
  lq, lk = mask.lo.shape[2], mask.code.shape[1]
  shapes = (rows, lq, H, D), (rows, lk, h, D), (rows, lk, h, D), (rows, lq, H, D), (rows, H, lq)
  *main, d_lse = (jax.random.normal(k, s) for k, s in zip(jax.random.split(jax.random.key(3), 5), shapes))
  return [x.astype(dtype) for x in main] + [d_lse]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _dense(scale, soft_cap, q, k, v, d_out, d_lse, seen):
  """out, lse and the three gradients, float32."""

  def loss(q, k, v):
    out, lse = dense_attention(q, k, v, seen, scale, soft_cap)
    finite = jnp.where(lse > -jnp.inf, lse, 0)
    return (out * d_out.astype(jnp.float32)).sum() + (finite * d_lse).sum(), (out, lse)

  q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
  grads, (out, lse) = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
  return out, lse, grads


def _run(mask, H=2, h=1, D=64, *, rows=None, dtype=jnp.bfloat16, soft_cap=None, scale=0.2,
         deterministic=True, tiles=None, d_lse_seen=True):  # fmt: skip
  """(kernels' gradients, dense ones)."""
  tensors = _tensors(mask, H, h, D, dtype, rows)
  q, k, v, d_out, d_lse = tensors
  seen = jnp.broadcast_to(mask.to_dense(), (q.shape[0], q.shape[1], k.shape[1]))
  out, lse, want = _dense(scale, soft_cap, *tensors, seen)
  options = lists.Options(scale, soft_cap, deterministic)
  got = _program(options, _interpreted())(
    lists.plan(mask, tiles), q, k, v, out.astype(dtype), lse, d_out, d_lse * d_lse_seen
  )
  jax.block_until_ready(got)  # two interpreted programs at a time wait for each other forever
  assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in (q, k, v)]
  return got, want


def _assert_close(got, want, tolerance=1e-2):
  for name, a, b in zip(("dq", "dk", "dv"), got, want):
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    assert np.isfinite(a).all(), name
    error = np.linalg.norm(a - b) / np.linalg.norm(b)
    assert error <= tolerance, f"{name}: relative error {error:.2e}"


@pytest.fixture
def raceless(capfd):
  """The interpreter forgets the races of a kernel at the next one, but prints each."""
  yield
  assert "RACE" not in capfd.readouterr().out


@pytest.mark.compat
@pytest.mark.parametrize("deterministic", [True, False])
def test_gradients_are_dense_attentions(deterministic, raceless):
  # Packed BD3 in two rows that differ, GQA, two intervals, a ragged tile, cotangents of both outputs.
  _assert_close(*_run(MASKS["bd3"](), deterministic=deterministic), 5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("name", MASKS)
def test_masks(name, deterministic, raceless):
  got, want = _run(_two_terms(MASKS[name]()), deterministic=deterministic)
  _assert_close(got, want, 5e-3)
  if name == "holes":
    assert not np.asarray(got[0][0, 70:75]).any() and not np.asarray(got[1][0, 20:30]).any()
    assert not any(np.asarray(x[1]).any() for x in got)


VARIANTS = {
  "heads_4_4": dict(H=4, h=4),
  "heads_4_1": dict(H=4, h=1),
  "heads_8_1": dict(H=8, h=1),
  "soft_cap": dict(soft_cap=3.0),
  "float16": dict(dtype=jnp.float16),
  "head_128": dict(D=128),
  "head_128_soft_cap": dict(D=128, soft_cap=3.0, dtype=jnp.float16),
  "head_256": dict(H=1, D=256, soft_cap=3.0),
  "small_tiles": dict(tiles=lists.Tiles(dq=(64, 64), dkv=(64, 64))),
  "steps_of_an_entry": dict(tiles=lists.Tiles(dq=(128, 256), dkv=(128, 128))),
  "blocks_of_a_line": dict(tiles=lists.Tiles(dq=(192, 128), dkv=(192, 192))),
}


@pytest.mark.slow
@pytest.mark.parametrize(
  "name, deterministic", [(n, d) for n in VARIANTS for d in (True, False) if d or n != "head_256"]
)
def test_variants(name, deterministic, raceless):
  _assert_close(*_run(MASKS["bd3"](), **VARIANTS[name], deterministic=deterministic), 5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", [True, False])
def test_fewer_queries_than_keys_and_a_shared_mask(deterministic, raceless):
  # The last 100 queries of a causal row, one mask for three rows of the batch.
  whole = builders.causal(_doc(260)[None])
  mask = AttnMask(whole.code, whole.lo[:, :, -100:], whole.hi[:, :, -100:])
  _assert_close(*_run(mask, rows=3, deterministic=deterministic), 5e-3)


@pytest.mark.slow
def test_repeats_are_equal_and_the_fused_kernel_agrees():
  mask = MASKS["bd3"]()
  runs = [_run(mask, deterministic=d)[0] for d in (True, True, False)]
  for a, b, fused in zip(*runs):
    np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
    a, fused = (np.asarray(x, np.float32) for x in (a, fused))
    assert np.linalg.norm(a - fused) <= 1e-3 * np.linalg.norm(a)


@pytest.mark.slow
def test_comparison_can_fail():
  # Without the LSE's cotangent dq and dk are wrong, and dv is not.
  got, want = _run(MASKS["bd3"](), d_lse_seen=False)
  for wrong in (0, 1):
    with pytest.raises(AssertionError, match="relative error"):
      _assert_close(got[wrong : wrong + 1], want[wrong : wrong + 1])
  _assert_close(got[2:], want[2:])


@pytest.mark.compat
def test_races_are_seen(monkeypatch, capfd):
  # A producer that does not wait for room in its ring overwrites what is being read.
  monkeypatch.setattr(bwd, "_wait_for_room", lambda *_: None)
  monkeypatch.setattr(bwd, "_drain", lambda *_: None)
  mask = builders.full(_doc(384)[None])
  options = lists.Options(0.2, None, True)
  q, k, v, d_out, d_lse = _tensors(mask, 1, 1, 64, jnp.bfloat16)
  said = ""
  try:
    jax.block_until_ready(
      _program(options, _interpreted(), "patched")(lists.plan(mask), q, k, v, q, d_lse, d_out, d_lse)
    )
  except jax.errors.JaxRuntimeError as e:  # jax 0.12 stops at the first race
    said = str(e)
  assert "RACE" in said + capfd.readouterr().out


def _lowered(D, *, safe=False, deterministic=True, soft_cap=None, dtype=jnp.bfloat16, tiles=lists.Tiles(), terms=2,
             heads=(4, 2), lengths=(304, 520)):  # fmt: skip
  """For cuda, from shapes alone."""
  (lq, lk), (H, h), S = lengths, heads, jax.ShapeDtypeStruct
  mask = AttnMask(S((2, lk), jnp.int32), *[S((2, terms, lq), jnp.int32)] * 2)
  q, kv, lse = S((2, lq, H, D), dtype), S((2, lk, h, D), dtype), S((2, H, lq), jnp.float32)
  options = lists.Options(0.2, soft_cap, deterministic)

  def run(mask, *tensors):
    return bwd.backward(options, lists.plan(mask, tiles._replace(safe=safe)), *tensors)

  with kernels.building_for(kernels.Target("gpu", "NVIDIA H200")):
    traced = jax.jit(run).trace(mask, q, kv, kv, q, lse, q, lse)
    return traced.lower(lowering_platforms=("cuda",))


@pytest.mark.compat
@pytest.mark.parametrize(
  "D, deterministic", [(64, True), (128, True), (256, True), (64, False), (128, False)]
)
def test_lowers_for_cuda(D, deterministic):
  # Layouts, swizzles, and shared memory within the 227 KiB of a thread block.
  text = _lowered(D, deterministic=deterministic).as_text()
  assert ("output_operand_alias" in text) == (not deterministic)  # dq is added to in place


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("D", [64, 128, 256])
def test_every_variant_lowers_for_cuda(D, safe, deterministic):
  for more in (
    dict(soft_cap=3.0, dtype=jnp.float16),
    dict(tiles=lists.Tiles(dq=(64, 64), dkv=(64, 64))),
    dict(tiles=lists.Tiles(dq=(192, 256), dkv=(128, 192)), terms=1),
    dict(heads=(8, 1), lengths=(8, 4096), terms=4),
  ):
    assert _lowered(D, safe=safe, deterministic=deterministic, **more)


@pytest.mark.slow
def test_lowers_in_a_scanned_rematerialised_layer():
  # dq is added to an array that lives inside the backward of one layer.
  mask, S = builders.causal(_docs(2 * N)), jax.ShapeDtypeStruct
  keep = jax.checkpoint_policies.save_only_these_names("attn_out", "attn_lse")

  def loss(weights, x):
    plan = kernels.plan(mask, implementation="pallas_gpu")

    def layer(x, w):
      y = x @ w
      return x + kernels.attention(y, y, y, plan, implementation="pallas_gpu"), None

    return jax.lax.scan(jax.checkpoint(layer, policy=keep), x, weights)[0].astype(jnp.float32).sum()

  with kernels.building_for(kernels.Target("gpu", "NVIDIA H200")):
    traced = jax.jit(jax.grad(loss)).trace(S((3, 64, 64), jnp.bfloat16), S((2, 2 * N, 2, 64), jnp.bfloat16))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("@mosaic_gpu_v2") == 2, (
    "a forward and a fused backward; saved names spare the second forward"
  )


@pytest.mark.compat
def test_lowering_sees_too_much_shared_memory(monkeypatch):
  monkeypatch.setattr(bwd, "_STAGES", 4)
  with pytest.raises(ValueError, match="shared memory"):
    _lowered(256)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("deterministic", [True, False])
def test_safe_mode_multiplies_no_register_operand(monkeypatch, safe, deterministic):
  multiply, left = plgpu.wgmma, []
  monkeypatch.setattr(plgpu, "wgmma", lambda acc, a, b: (left.append(a), multiply(acc, a, b)))
  _lowered(64, safe=safe, deterministic=deterministic, soft_cap=7.0)
  registers = 2 * (
    3 if deterministic else 2
  )  # dS of dq, P and dS of dkv, in a loop with a mask and in one without
  assert sum(isinstance(a, jax.Array) for a in left) == (0 if safe else registers)


def test_other_heads_and_dtypes_are_refused():
  mask = builders.causal(_doc(64)[None])
  options, plan = lists.Options(0.2, None, True), lists.plan(mask)
  for D, dtype in ((96, jnp.bfloat16), (64, jnp.float32)):
    q, k, v, d_out, d_lse = _tensors(mask, 2, 1, D, dtype)
    with pytest.raises(ValueError, match="head size 64, 128 or 256"):
      bwd.backward(options, plan, q, k, v, q, d_lse, d_out, d_lse)
