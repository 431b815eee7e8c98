"""The JAX contenders: ours (three modes on Hopper, and XLA), cuDNN, Mosaic GPU attention, tokamax.

Every contender is a function (q, k, v) -> out with its mask as captured operands; forward, backward and both
are three compiled programs, the residuals of the forward are what the backward gets.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.contenders.worker import Contender, Side, Unsupported


def make(device: str) -> Side:
  return JaxSide(device)


class JaxSide(Side):
  xp = jnp

  def __init__(self, device: str):
    super().__init__(device)
    platform = jax.devices()[0].platform
    if platform != device:
      raise RuntimeError(f"JAX found {platform!r}, the benchmark wants {device!r}; install jax's CUDA plugin")

  def put(self, x, dtype=None):
    return jnp.asarray(x).astype(dtype or jnp.bfloat16)

  def wait(self, x=None):
    jax.block_until_ready(x if x is not None else jnp.zeros(()) + 0)

  def numpy(self, x):
    return np.asarray(x)

  def same(self, a, b):
    return bool(_same_bits(a, b))

  def _reference(self, case, inputs):
    with jax.default_matmul_precision("highest"):
      return super()._reference(case, inputs)

  def make(self, name, case):
    return CONTENDERS[name](self, case)

  def versions(self):
    out = {"jax": jax.__version__, "jaxlib": jax.lib.__version__, "device": jax.devices()[0].device_kind}
    for package in ("tokamax", "jax_cuda13_plugin", "jax_cuda12_plugin", "nvidia_cuda_nvcc"):
      out |= _version(package)
    try:
      from jax._src.lib import cuda_versions

      out |= {
        "jax CUDA runtime": cuda_versions.cuda_runtime_get_version(),
        "jax cuDNN": cuda_versions.cudnn_get_version(),
      }
    except (ImportError, AttributeError, RuntimeError):
      pass  # a build without CUDA, or private names that moved
    return out

  def ceilings(self):
    n = 8192 if self.device == "gpu" else 256
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2))
    x = jax.random.normal(jax.random.key(2), (n, n), jnp.float32)
    seconds = _rate(self, jax.jit(jnp.matmul), a, b)
    moved = _rate(self, jax.jit(lambda x: x + 1), x)
    return {"gemm_tflops": 2 * n**3 / seconds / 1e12, "copy_gb_s": 2 * x.nbytes / moved / 1e9}


@jax.jit
def _same_bits(a, b):
  bits = lambda x: jax.lax.bitcast_convert_type(x, {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
  return (bits(a) == bits(b)).all()


def _rate(side, fn, *args, calls=20, repeats=5):
  import time

  side.wait(fn(*args))
  spent = []
  for _ in range(repeats):
    start = time.perf_counter()
    for _ in range(calls):
      out = fn(*args)
    side.wait(out)
    spent.append((time.perf_counter() - start) / calls)
  return float(np.median(spent))


def _version(package: str) -> dict:
  import importlib.metadata

  try:
    return {package: importlib.metadata.version(package)}
  except importlib.metadata.PackageNotFoundError:
    return {}


class _Jitted(Contender):
  """attend(q, k, v, *extra) -> out, compiled as forward, backward and both.

  Args:
    inputs: sets of (q, k, v, d_out).
    extra: arrays that go with every call (a mask, a plan): operands, not constants of the program.
  """

  def __init__(self, attend, inputs, extra=(), backward=True):
    self.inputs, self.extra, self.has_backward = inputs, extra, backward
    q, k, v, d_out = inputs[0]

    def residuals(q, k, v, extra):
      return jax.vjp(lambda q, k, v: attend(q, k, v, *extra), q, k, v)

    def both(q, k, v, d_out, extra):
      out, pull = residuals(q, k, v, extra)
      return out, *pull(d_out)

    if not backward:
      alone = jax.jit(lambda q, k, v, extra: (attend(q, k, v, *extra), None))
      self.forward = measured = alone.lower(q, k, v, extra).compile()
      poisoned = lambda q, k, v, d_out, extra, nan: (attend(q, k, v, *extra),)
    else:
      self.forward = jax.jit(residuals).lower(q, k, v, extra).compile()
      self.both = measured = jax.jit(both).lower(q, k, v, d_out, extra).compile()
      self.pulls = [self.forward(*x[:3], extra)[1] for x in inputs]
      self.backward = jax.jit(lambda pull, d_out: pull(d_out)).lower(self.pulls[0], d_out).compile()
      poisoned = lambda q, k, v, d_out, extra, nan: both(q, k, v, d_out, extra)
    # Donated arguments that nothing reads lend their memory, full of NaN, to the results of the same shape.
    self.poisoned = jax.jit(poisoned, donate_argnums=5, keep_unused=True)
    memory = measured.memory_analysis()
    self.memory = memory.temp_size_in_bytes + memory.output_size_in_bytes

  def run(self, what, at):
    q, k, v, d_out = self.inputs[at]
    if what == "fwd":
      return self.forward(q, k, v, self.extra)[0]
    if what == "bwd":
      return self.backward(self.pulls[at], d_out)
    return self.both(q, k, v, d_out, self.extra)

  def results(self, at):
    like = (0, 0, 1, 2) if self.has_backward else (0,)  # out, dq, dk, dv have the shapes of q, q, k, v
    nan = [jnp.full_like(self.inputs[at][n], jnp.nan) for n in like]
    return self.poisoned(*self.inputs[at], self.extra, nan)


def _ours(side, case, implementation, deterministic=False, **tiles):
  from genmodels import kernels
  from genmodels.kernels import tiles as tile_lists

  try:
    kernels.resolve(implementation)
  except ValueError as e:
    raise Unsupported(str(e)) from e
  chosen = None
  if tiles:
    from genmodels.kernels.pallas_gpu import Tiles

    chosen = Tiles(**tiles)
  doc = jnp.asarray(case.doc())
  planned = jax.jit(lambda doc: kernels.plan(case.encode(doc), chosen, implementation))
  build = lambda: planned(doc)
  plan = build()
  attend = functools.partial(kernels.attention, implementation=implementation, deterministic=deterministic)
  made = _Jitted(attend, side.inputs, (plan,))
  made.build_ms = side.timed_build(build)
  q, k = plan.tiles.q, plan.tiles.k
  counts = jax.jit(lambda doc: tile_lists.plan(case.encode(doc), (q, k)).by_query.start[:, -1])(doc)
  made.executed = float(np.asarray(counts, np.int64).sum() * q * k * (case.rows // case.mask_rows))
  return made


def _dense(side, case):
  """bool[mask rows, 1, S, S] from the definition, jitted."""
  tables = {name: jnp.asarray(t) for name, t in case.tables().items()}

  @jax.jit
  def build(tables):
    at = jnp.arange(case.slots, dtype=jnp.int32)
    rows = jnp.arange(case.mask_rows, dtype=jnp.int32)[:, None, None]
    seen = case.visible(tables, rows, at[None, :, None], at[None, None, :])
    return jnp.broadcast_to(seen, (case.mask_rows, case.slots, case.slots))[:, None]

  return lambda: build(tables)


def _on_gpu(side):
  if side.device != "gpu":
    raise Unsupported("needs a CUDA GPU")


def _cudnn_causal(side, case):
  _on_gpu(side)
  if case.mask not in ("causal", "full") or case.documents:
    raise Unsupported("cuDNN's own masks are none and causal")
  attend = functools.partial(
    jax.nn.dot_product_attention, is_causal=case.mask == "causal", implementation="cudnn"
  )
  made = _Jitted(attend, side.inputs)
  made.executed = float(case.rows * case.slots**2) if case.mask == "full" else None
  return made


def _masked(side, case, implementation):
  """jax.nn.dot_product_attention with a dense mask."""
  if implementation == "cudnn":
    _on_gpu(side)
  if implementation == "xla" and case.rows * case.heads * case.slots**2 > 2**34:
    raise Unsupported("the logits of dense attention in XLA would take more than 64 GiB")
  build = _dense(side, case)
  mask = build()
  wide = jax.jit(lambda m: jnp.broadcast_to(m, (case.rows, 1, case.slots, case.slots)))(mask)

  def attend(q, k, v, mask):
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)

  made = _Jitted(attend, side.inputs, (wide,))
  made.build_ms, made.executed = side.timed_build(build), float(case.rows * case.slots**2)
  return made


def _mgpu_fp16(side, case):
  """jax's example kernel: fp16, no scale argument, forward only (its backward takes no causal mask)."""
  _on_gpu(side)
  if case.mask not in ("causal", "full") or case.documents:
    raise Unsupported("it has no masks but causal")
  try:
    from jax.experimental.pallas.ops.gpu import attention_mgpu as mgpu
  except ImportError as e:
    raise Unsupported(f"not in this jax ({e})") from e
  half = lambda x: x.astype(jnp.float16)
  scale = case.head_dim**-0.5  # goes into q beforehand, outside the measurement
  inputs = [[half(q.astype(jnp.float32) * scale), *map(half, rest)] for q, *rest in side.inputs]
  config = mgpu.TuningConfig(64, 128, 2, use_schedule_barrier=True, causal=case.mask == "causal")
  made = _Jitted(lambda q, k, v: mgpu.attention(q, k, v, config), inputs, backward=False)
  made.executed = float(case.rows * case.slots**2) if case.mask == "full" else None
  return made


def _tokamax(side, case):
  _on_gpu(side)
  try:
    import tokamax
  except ImportError as e:
    raise Unsupported(f"not installed ({e})") from e
  if case.slots > 2**14:
    raise Unsupported("its dense boolean mask is only tried up to 16k slots")
  build = _dense(side, case)

  def attend(q, k, v, mask):
    return tokamax.dot_product_attention(q, k, v, mask=mask, implementation="mosaic_gpu")

  made = _Jitted(attend, side.inputs, (build(),))
  made.build_ms = side.timed_build(build)
  return made


CONTENDERS = {
  "ours": functools.partial(_ours, implementation="pallas_gpu"),
  "ours-deterministic": functools.partial(_ours, implementation="pallas_gpu", deterministic=True),
  "ours-safe": functools.partial(_ours, implementation="pallas_gpu", deterministic=True, safe=True),
  "ours-132-blocks": functools.partial(_ours, implementation="pallas_gpu", blocks=132),
  "ours-xla": functools.partial(_ours, implementation="xla"),
  "jax-cudnn": _cudnn_causal,
  "jax-cudnn-masked": functools.partial(_masked, implementation="cudnn"),
  "jax-xla-masked": functools.partial(_masked, implementation="xla"),
  "jax-mgpu-fp16": _mgpu_fp16,
  "tokamax": _tokamax,
}
