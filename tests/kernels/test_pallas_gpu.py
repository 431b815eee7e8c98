"""Attention on Hopper against dense attention: forward and the seam in the interpreter, lowering for cuda.

The interpreter models shared memory, barriers and TMA, fills memory with NaN and reports races; it costs about
a second per key tile, so every case is a few tiles. It has neither wgmma with an operand in registers nor
accumulators with an initial value: of the fast variant only the lowering is checked here.

Legend: B rows · Lq, Lk lengths · H query heads · h key heads · D, Dv head sizes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from genmodels import compat, kernels
from genmodels.kernels import pallas_gpu, pallas_gpu_fwd
from genmodels.kernels import pallas_gpu_lists as lists
from genmodels.masks import CODE_HIDDEN, AttnMask, builders
from tests.kernels import ptxas
from tests.kernels.test_attention import _assert_close, _pulled, dense_attention

OLD = not hasattr(plgpu, "InterpretGPUParams")
needs_interpreter = pytest.mark.skipif(
  OLD, reason=f"jax {jax.__version__}: Mosaic GPU kernels need jax >= 0.11"
)
H200 = kernels.Target("gpu", "NVIDIA H200")
N = 96  # clean tokens of a row: a dual mask is one tile and a half


def _docs(*lengths):
  return jnp.concatenate([jnp.full((n,), i, jnp.int32) for i, n in enumerate(lengths)])


def _rows(n):
  """Two rows with other documents."""
  return jnp.stack([_docs(n // 2 - 7, 5, n // 2 + 2), _docs(n // 3, n - n // 3)])


def _holes():
  """Row 0: causal, some queries see nothing and some keys are hidden. Row 1: nothing to see at all."""
  mask = builders.causal(_rows(2 * N))
  lo = mask.lo.at[0, :, 70:75].set(mask.hi[0, :, 70:75]).at[0, :, 128:].set(mask.hi[0, :, 128:])
  return AttnMask(mask.code.at[1].set(CODE_HIDDEN).at[0, 20:30].set(CODE_HIDDEN), lo, mask.hi)


def _long_block():
  """Block-causal with blocks of 128 and one document: full tiles, and several steps of the ring."""
  return builders.block_causal(_docs(384)[None], 128)


MASKS = {
  "bd3": lambda: builders.bd3(_rows(N), 16),
  "nbdiff": lambda: builders.context_causal(_rows(N), 16),
  "three_streams": lambda: builders.bd3(_rows(64), 16, copies=2),
  "packed_causal": lambda: builders.causal(_rows(2 * N)),
  "window": lambda: builders.window(_rows(2 * N), 20),
  "long_block": _long_block,
  "holes": _holes,
}


def _interpreted():
  return kernels.Target("gpu", "NVIDIA H200", interpret=plgpu.InterpretGPUParams(detect_races=True))


def _cases(table, compat):
  """Names of a table as parameters; some run on the newer jax of `make test-compat` too."""
  return [pytest.param(name, marks=[pytest.mark.compat] * (name in compat)) for name in table]


def _tensors(mask, H=2, h=1, D=64, Dv=None, rows=None, dtype=jnp.bfloat16):
  rows, Dv = rows or mask.code.shape[0], Dv or D
  lq, lk = mask.lo.shape[2], mask.code.shape[1]
  shapes = (rows, lq, H, D), (rows, lk, h, D), (rows, lk, h, Dv), (rows, lq, H, Dv), (rows, H, lq)
  *main, d_lse = (jax.random.normal(k, s) for k, s in zip(jax.random.split(jax.random.key(3), 5), shapes))
  return [x.astype(dtype) for x in main] + [d_lse]


@functools.cache
def _program(tiles, target, scale, soft_cap, gradients=False, implementation="pallas_gpu"):
  def run(mask, q, k, v, *cotangents):
    attend = functools.partial(
      kernels.attention, mask=mask, scale=scale, soft_cap=soft_cap, return_lse=True, tiles=tiles,
      implementation=implementation,
    )  # fmt: skip
    with kernels.building_for(target):
      return _pulled(attend, q, k, v, *cotangents) if gradients else attend(q, k, v)

  return jax.jit(run)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _dense(scale, soft_cap, seen, q, k, v):
  return dense_attention(q, k, v, seen, scale, soft_cap)


def _ran(program, *args):
  """The interpreter's threads use jax themselves: nothing else may run until they are done."""
  return jax.block_until_ready(program(*jax.block_until_ready(args)))


def _run(mask, scale=0.2, soft_cap=None, tiles=None, **more):
  """((out, lse) of the kernel, those of dense attention)."""
  q, k, v, *_ = _tensors(mask, **more)
  got = _ran(_program(tiles, _interpreted(), scale, soft_cap), mask, q, k, v)
  seen = jnp.broadcast_to(mask.to_dense(), (q.shape[0], q.shape[1], k.shape[1]))
  assert got[0].dtype == q.dtype and got[1].dtype == jnp.float32
  return got, _dense(scale, soft_cap, seen, q, k, v)


@pytest.fixture
def raceless(capfd):
  """The interpreter forgets the races of a kernel at the next one, but prints each."""
  yield
  assert "RACE" not in capfd.readouterr().out


@needs_interpreter
@pytest.mark.compat
def test_output_and_gradients_are_dense_attentions(raceless):
  # Through the public function: packed BD3 in two rows that differ, GQA, two intervals, a ragged tile,
  # cotangents of output and LSE.
  mask = MASKS["bd3"]()
  tensors = _tensors(mask)
  got = _ran(_program(None, _interpreted(), None, 3.0, gradients=True), mask, *tensors)
  f32 = [x.astype(jnp.float32) for x in tensors]
  want = _pulled(lambda q, k, v: dense_attention(q, k, v, mask.to_dense(), 64**-0.5, 3.0), *f32)
  assert [x.dtype for x in got] == [jnp.bfloat16, jnp.float32] + [jnp.bfloat16] * 3
  _assert_close(got, want, 6e-3)


@needs_interpreter
@pytest.mark.slow
def test_gradients_of_key_segments_add_up(raceless):
  """A ring's backward pass: with the final output and LSE each segment of keys gives its share."""
  mask = MASKS["packed_causal"]()
  q, k, v, d_out, d_lse = _tensors(mask)
  f32 = [x.astype(jnp.float32) for x in (q, k, v)]
  attend = lambda q, k, v: dense_attention(q, k, v, mask.to_dense(), 0.2, None)
  want = _pulled(attend, *f32, d_out.astype(jnp.float32), d_lse)
  out, lse = want[0].astype(q.dtype), want[1]

  @jax.jit
  def part(code, k, v):
    with kernels.building_for(_interpreted()):
      plan = kernels.plan(AttnMask(code, mask.lo, mask.hi), implementation="pallas_gpu")
      options = dict(scale=0.2, implementation="pallas_gpu", deterministic=True)
      return kernels.gradients(q, k, v, plan, out, lse, d_out, d_lse, **options)

  parts = [_ran(part, mask.code[:, s], k[:, s], v[:, s]) for s in (slice(0, N), slice(N, None))]
  dq = sum(p[0].astype(jnp.float32) for p in parts)
  dk, dv = (jnp.concatenate([p[i] for p in parts], 1) for i in (1, 2))
  _assert_close((*want[:2], dq, dk, dv), want, 8e-3)
  assert np.abs(np.asarray(parts[0][0], np.float32)).max() > 1e-2  # each has one


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("name", _cases(MASKS, ("three_streams", "long_block", "holes")))
def test_masks(name, raceless):
  mask = MASKS[name]()
  got, want = _run(mask)
  _assert_close(got, want, 4e-3)
  if name == "holes":
    empty = np.isneginf(got[1])
    assert empty[0, :, 70:75].all() and empty[0, :, 128:].all() and empty[1].all()
    assert not np.asarray(got[0], np.float32)[np.moveaxis(empty, 1, 2)].any()
  if name == "long_block":
    counts = np.asarray(lists.plan(mask).forward.count)
    assert counts[0].tolist() == [[0, 3], [0, 2], [0, 1]], "longest first, and all of them full"


VARIANTS = {
  "heads_4_4": dict(H=4, h=4, rows=2),
  "heads_8_1": dict(H=8, h=1, rows=2),
  "head_128": dict(D=128),
  "head_128_float16_soft_cap": dict(D=128, dtype=jnp.float16, soft_cap=3.0),
  "head_256": dict(D=256, H=1),
  "narrow_heads_of_two_sizes": dict(D=40, Dv=72),
  "negative_scale": dict(scale=-0.2),
  "soft_cap": dict(soft_cap=3.0),
  "blocks_that_take_many_items": dict(H=4, h=2, tiles=lists.Tiles(blocks=3)),
  "wide_entries": dict(tiles=lists.Tiles(k=256)),
  "narrow_entries_and_a_short_ring": dict(tiles=lists.Tiles(k=64, stages=2)),
}


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize(
  "name", _cases(VARIANTS, ("head_128", "blocks_that_take_many_items", "narrow_heads_of_two_sizes"))
)
def test_variants(name, raceless):
  _assert_close(*_run(MASKS["bd3"](), **VARIANTS[name]), 4e-3)


@needs_interpreter
@pytest.mark.compat
@pytest.mark.slow
def test_fewer_queries_than_keys_and_a_shared_mask(raceless):
  # The last 101 queries of a causal row of 261, one mask for three rows of the batch.
  whole = builders.causal(_docs(261)[None])
  mask = AttnMask(whole.code, whole.lo[:, :, -101:], whole.hi[:, :, -101:])
  _assert_close(*_run(mask, rows=3), 4e-3)


@needs_interpreter
@pytest.mark.slow
def test_comparison_can_fail():
  (out, lse), want = _run(MASKS["bd3"]())
  other = _dense(0.2, None, MASKS["nbdiff"]().to_dense(), *_tensors(MASKS["bd3"]())[:3])
  with pytest.raises(AssertionError, match="relative error"):
    _assert_close((out, lse), other, 4e-3)
  _assert_close((out, lse), want, 4e-3)


@needs_interpreter
@pytest.mark.compat
def test_races_are_seen(monkeypatch, capfd):
  # Codes read in the generic proxy, without the fence before TMA overwrites them.
  monkeypatch.setattr(pallas_gpu_fwd.plgpu, "commit_smem", lambda: None)
  mask = _long_block()
  code = jnp.where(jnp.arange(384) % 7 == 3, CODE_HIDDEN, mask.code)  # no tile is full
  q, k, v, *_ = _tensors(mask, H=1)
  run = _program(lists.Tiles(stages=2), _interpreted(), 0.21, None)
  said = ""
  try:
    _ran(run, mask.replace(code=code), q, k, v)
  except jax.errors.JaxRuntimeError as e:  # jax 0.12 raises, 0.11 prints
    said = str(e)
  assert "RACE" in said + capfd.readouterr().out


def _lowered(D, *, tiles=None, soft_cap=None, dtype=jnp.bfloat16, gradients=False, heads=(4, 2), lengths=(300, 520), terms=2):  # fmt: skip
  """The program for cuda, from shapes alone."""
  (lq, lk), (H, h), S = lengths, heads, jax.ShapeDtypeStruct
  mask = AttnMask(S((2, lk), jnp.int32), *[S((2, terms, lq), jnp.int32)] * 2)
  q, kv = S((2, lq, H, D), dtype), S((2, lk, h, D), dtype)
  cotangents = (q, S((2, H, lq), jnp.float32)) if gradients else ()
  run = _program(tiles, H200, None, soft_cap, gradients)
  return run.trace(mask, q, kv, kv, *cotangents).lower(lowering_platforms=("cuda",))


@needs_interpreter
@pytest.mark.compat
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("D", [64, 128, 256])
def test_fast_forward_lowers_for_cuda(D, dtype):
  # Layouts, swizzles, and shared memory within the 227 KiB of a thread block.
  assert "mosaic_gpu" in _lowered(D, dtype=dtype).as_text()


@needs_interpreter
@pytest.mark.compat
def test_forward_and_backward_lower_for_cuda_inside_shard_map():
  # Checked replication types, plans built per shard, heads over a tensor axis.
  mesh = AbstractMesh((2, 2), ("data", "tensor"), (AxisType.Auto,) * 2)
  heads, S = P("data", None, "tensor"), jax.ShapeDtypeStruct

  def local(q, k, v, mask):
    made = kernels.plan(mask, implementation="pallas_gpu")
    return kernels.attention(q, k, v, made, return_lse=True, implementation="pallas_gpu")

  def loss(q, k, v, mask):
    out_specs = heads, P("data", "tensor")
    out, lse = compat.shard_map(local, mesh, (heads, heads, heads, P("data")), out_specs)(q, k, v, mask)
    return out.astype(jnp.float32).sum() + jnp.where(lse > -jnp.inf, lse, 0).sum()

  mask = AttnMask(S((2, 300), jnp.int32), *[S((2, 2, 300), jnp.int32)] * 2)
  q, kv = S((2, 300, 4, 128), jnp.bfloat16), S((2, 300, 2, 128), jnp.bfloat16)
  with kernels.building_for(H200):
    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, kv, kv, mask)
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("mosaic_gpu_v2") >= 2


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("D", [64, 128, 256, 80])
def test_every_variant_lowers_for_cuda(D):
  for more in (
    dict(tiles=lists.Tiles(safe=True)),
    dict(tiles=lists.Tiles(k=64)),
    dict(tiles=lists.Tiles(k=256, stages=2)),
    dict(soft_cap=30.0, terms=1),
    dict(heads=(8, 1), terms=4),
    dict(heads=(2, 2), lengths=(1, 4096)),
    dict(gradients=True),
    dict(gradients=True, tiles=lists.Tiles(safe=True), dtype=jnp.float16),
  ):
    assert _lowered(D, **more)


@needs_interpreter
@pytest.mark.aot
@pytest.mark.skipif(ptxas.missing() is not None, reason=str(ptxas.missing()))
@pytest.mark.parametrize(
  "D, tiles, spills",
  [(D, lists.Tiles(), 0) for D in (64, 128, 256)]
  + [(D, lists.Tiles(blocks=132), 0) for D in (64, 128)]
  + [(128, lists.Tiles(safe=True), 0), (256, lists.Tiles(safe=True), 2048)],
)
def test_machine_code_keeps_everything_in_registers(D, tiles, spills, tmp_path):
  # The last case is the control: two accumulators of 256 columns do not fit.
  (kernel,) = ptxas.compiled(_lowered(D, tiles=tiles), tmp_path)
  assert not kernel.remarks and kernel.spilled <= spills and (kernel.spilled > 0) == (spills > 0), kernel


@needs_interpreter
def test_lowering_sees_too_much_shared_memory():
  with pytest.raises(ValueError, match="shared memory"):
    _lowered(256, tiles=lists.Tiles(stages=4))


@needs_interpreter
@pytest.mark.parametrize("safe", [True, False])
def test_safe_mode_multiplies_no_register_operand(monkeypatch, safe):
  multiply, left = plgpu.wgmma, []
  monkeypatch.setattr(plgpu, "wgmma", lambda acc, a, b: (left.append(a), multiply(acc, a, b)))
  _lowered(64, tiles=lists.Tiles(safe=safe), soft_cap=7.0)  # a program of its own: traced here
  assert len(left) == 4 and any(isinstance(a, jax.Array) for a in left) == (not safe)


@pytest.mark.parametrize(
  "target, reason",
  [
    (kernels.Target("cpu"), "this is 'cpu'"),
    (kernels.Target("tpu", "TPU v5p", interpret=True), "this is 'tpu'"),
    (kernels.Target("gpu", "NVIDIA A100-SXM4-80GB"), "jax >= 0.11" if OLD else "this is 'NVIDIA A100"),
    (kernels.Target("gpu", "NVIDIA B200"), "jax >= 0.11" if OLD else "this is 'NVIDIA B200"),
    (kernels.Target("gpu", "NVIDIA H100 80GB HBM3"), "jax >= 0.11" if OLD else None),
    (kernels.Target("gpu", "NVIDIA GH200 480GB"), "jax >= 0.11" if OLD else None),
    (kernels.Target("gpu", "", interpret=True), "jax >= 0.11" if OLD else None),
  ],
)
def test_unavailable_says_why(target, reason):
  got = pallas_gpu.unavailable(target)
  assert got is None if reason is None else reason in got
  with kernels.building_for(target):
    if target.platform == "gpu":
      assert kernels.resolve("auto") == ("pallas_gpu" if reason is None else "xla")
    if reason is not None:
      with pytest.raises(ValueError, match="cannot run here"):
        kernels.resolve("pallas_gpu")


@needs_interpreter
@pytest.mark.parametrize(
  "more, message", [(dict(dtype=jnp.float32), "cast all three to bfloat16"), (dict(D=512), "up to 256")]
)
def test_tensors_the_kernels_cannot_take_are_refused(more, message):
  with pytest.raises(ValueError, match=message):
    _lowered(more.pop("D", 64), **more)


@pytest.mark.parametrize(
  "version, tiles, said",
  [
    ((12, 9), None, "CUDA 12.9"),
    ((13, 0), lists.Tiles(), "Tiles\\(safe=True\\)"),
    ((13, 0), lists.Tiles(safe=True), None),
    ((13, 3), None, None),
    (None, None, None),
  ],
)
def test_an_old_ptxas_is_spoken_of(monkeypatch, version, tiles, said):
  monkeypatch.setattr(pallas_gpu, "_ptxas_version", lambda: version)
  warning = pallas_gpu.toolchain_warning(tiles)
  if said is None:
    assert warning is None
  else:
    with pytest.raises(ValueError, match=said):
      raise ValueError(warning)


def test_ptxas_version_is_read_from_the_binary(monkeypatch, tmp_path):
  def missing(name):
    raise pallas_gpu.importlib.metadata.PackageNotFoundError(name)

  binary = tmp_path / "bin" / "ptxas"
  binary.parent.mkdir()
  binary.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
  binary.chmod(0o755)
  monkeypatch.setattr(pallas_gpu.importlib.metadata, "version", missing)
  monkeypatch.setenv("CUDA_HOME", str(tmp_path))
  assert pallas_gpu._ptxas_version() == (13, 0)
