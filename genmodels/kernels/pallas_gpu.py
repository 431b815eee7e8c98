"""Interval attention for Hopper GPUs, in Pallas (Mosaic GPU): the implementation "pallas_gpu".

The parts: tile lists (`pallas_gpu_lists`), forward (`pallas_gpu_fwd`), backward (`pallas_gpu_bwd`). This
module joins them at the boundary of the operation. Head sizes that the kernels do not have are padded with
zeros, which changes neither logits nor outputs; lengths are padded to what TMA can address, the rest of a
tile it fills and clips itself.

Register-operand hazard. ptxas before CUDA 13.3 can reuse the registers of a running wgmma whose left operand
lives in registers (triton-lang/triton#9433, #11781): wrong numbers, now and then. `toolchain_warning` says
whether this machine's ptxas is older; `Tiles(safe=True)` then passes that operand through shared memory.

Legend: B rows · Lq, Lk lengths · H query heads · Hk key heads (H = Hk · G) · D, Dv head sizes.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re
import shutil
import subprocess

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from genmodels.kernels import pallas_gpu_bwd, pallas_gpu_fwd
from genmodels.kernels.pallas_gpu_lists import Options, Plan, Tiles, pad_to, plan
from genmodels.kernels.target import Target
from genmodels.kernels.varying import axes_of, vary

Array = jax.Array

__all__ = ["Plan", "Tiles", "attend", "gradients", "plan", "toolchain_warning", "unavailable"]

_HEADS = (64, 128, 256)
_LENGTH = 8  # tensors in swizzled tiles have a multiple of their 8 rows
_HOPPER = re.compile(r"\bG?H(100|200|800|20)\b")
_FIXED_CUDA = (13, 3)


def attend(
  q: Array, k: Array, v: Array, plan: Plan, scale: float, soft_cap: float | None, deterministic: bool = False
):
  """out [B, Lq, H, Dv] in q's dtype, lse float32[B, H, Lq]; arguments as in `kernels.attention`.

  Raises:
    ValueError: tensors that are not all bfloat16 or all float16; a head size above 256.
  """
  _check(q, k, v)
  lq, dv = q.shape[1], v.shape[3]
  width = next(w for w in _HEADS if w >= max(q.shape[3], dv))
  q, k, v = (pad_to(pad_to(x, 1, _LENGTH), 3, width) for x in (q, k, v))
  operands = (q, k, v, plan)
  out, lse = _attend(Options(scale, soft_cap, deterministic), *vary(operands, axes_of(operands)))
  return out[:, :lq, :, :dv], lse[:, :, :lq]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, q, k, v, plan):
  return _forward(options, q, k, v, plan)[0]


def _forward(options, q, k, v, plan):
  axes = axes_of((q, k, v, plan))
  out, lse = vary(pallas_gpu_fwd.forward(options, plan, q, k, v), axes)
  out, lse = checkpoint_name(out, "attn_out"), checkpoint_name(lse, "attn_lse")
  return (out, lse), (q, k, v, plan, out, lse)


def _backward(options, residuals, cotangents):
  q, k, v, plan, out, lse = residuals
  axes = axes_of(residuals)
  grads = pallas_gpu_bwd.backward(options, plan, q, k, v, out, lse, *cotangents)
  return *vary(grads, axes), None


_attend.defvjp(_forward, _backward)


def gradients(q, k, v, plan, out, lse, d_out, d_lse, scale, soft_cap, deterministic=False):
  """dq, dk, dv of one key segment; arguments as in `kernels.gradients`."""
  _check(q, k, v)
  (lq, D), (lk, dv) = (q.shape[1], q.shape[3]), (v.shape[1], v.shape[3])
  width = next(w for w in _HEADS if w >= max(D, dv))
  q, k, v, out, d_out = (pad_to(pad_to(x, 1, _LENGTH), 3, width) for x in (q, k, v, out, d_out))
  lse, d_lse = (pad_to(x, 2, _LENGTH) for x in (lse, d_lse))
  operands = (q, k, v, plan, out, lse), (d_out.astype(q.dtype), d_lse)
  residuals, cotangents = vary(operands, axes_of(operands))
  dq, dk, dv_ = _backward(Options(scale, soft_cap, deterministic), residuals, cotangents)[:3]
  return dq[:, :lq, :, :D], dk[:, :lk, :, :D], dv_[:, :lk, :, :dv]


def unavailable(target: Target) -> str | None:
  """Why these kernels cannot be built for a target; None if they can.

  They run on Hopper (compute capability 9.0) and, for any GPU target with `interpret`, in the interpreter.
  """
  if target.platform != "gpu":
    return f"it is for Hopper GPUs (H100, H200, GH200), this is {target.platform!r}"
  if jax.__version_info__ < (0, 11):
    return f"it needs jax >= 0.11 (so Python >= 3.12), this is jax {jax.__version__}"
  if target.interpret is None and not _HOPPER.search(target.kind):
    return f"it is for Hopper GPUs (H100, H200, GH200), this is {target.kind or 'of unknown kind'!r}"
  return None


def toolchain_warning(tiles: Tiles | None = None) -> str | None:
  """What to say at start-up about this machine's ptxas, if it can be told; None if all is well.

  Args:
    tiles: those in use; nothing is said of safe ones.
  """
  if tiles is not None and tiles.safe:
    return None
  version = _ptxas_version()
  if version is None or version >= _FIXED_CUDA:
    return None
  found, fixed = (".".join(map(str, v)) for v in (version, _FIXED_CUDA))
  return (
    f"pallas_gpu: ptxas of CUDA {found} can corrupt products with a register operand (fixed in {fixed}): "
    f"compare with implementation='xla' on random data, or use Tiles(safe=True), which is slower"
  )


def _ptxas_version() -> tuple[int, ...] | None:
  """(major, minor) of the CUDA whose ptxas compiles the kernels: the wheel's, else the machine's."""
  for wheel in ("nvidia-cuda-nvcc", "nvidia-cuda-nvcc-cu13", "nvidia-cuda-nvcc-cu12"):
    try:
      return _major_minor(importlib.metadata.version(wheel))
    except importlib.metadata.PackageNotFoundError:
      pass
  folders = [os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin"), os.environ.get("PATH", "")]
  ptxas = shutil.which("ptxas", path=os.pathsep.join(folders))
  if ptxas is None:
    return None
  said = subprocess.run([ptxas, "--version"], capture_output=True, text=True, check=False).stdout
  release = re.search(r"release ([\d.]+)", said)
  return _major_minor(release[1]) if release else None


def _major_minor(version: str) -> tuple[int, ...]:
  return tuple(int(x) for x in version.split(".")[:2])


def _check(q, k, v):
  dtypes = {x.dtype for x in (q, k, v)}
  if len(dtypes) > 1 or q.dtype not in (jnp.bfloat16, jnp.float16):
    raise ValueError(
      f"attention: pallas_gpu multiplies bfloat16 or float16, got q {q.dtype}, k {k.dtype}, v {v.dtype}; "
      f"cast all three to bfloat16, or use implementation='xla'"
    )
  if max(q.shape[3], v.shape[3]) > _HEADS[-1]:
    raise ValueError(
      f"attention: pallas_gpu has head sizes up to {_HEADS[-1]}, got D={q.shape[3]}, Dv={v.shape[3]}; use "
      f"implementation='xla'"
    )
