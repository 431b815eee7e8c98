"""The grouped products of experts as programs to compile ahead of time.

Legend: M rows · E groups · D inputs · F outputs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from genmodels import kernels

KERNELS = ("grouped_matmul", "grouped_matmul_dx", "grouped_matmul_dw")


def program(
  *,
  rows: int = 16384,
  groups: int = 128,
  inputs: int = 2048,
  outputs: int = 768,
  backward: bool = True,
  implementation: str = "pallas_tpu",
  dtype: str = "bfloat16",
):
  """A grouped product of M = rows with E = groups matrices D × F, forward alone or with both gradients.

  By default that of a Qwen3-30B-A3B layer, for 2,048 slots of a device with 8 experts each.

  Returns:
    (function, arguments), the arguments as ShapeDtypeStructs.
  """
  shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.dtype(dtype))
  x, w, g = shape(rows, inputs), shape(groups, inputs, outputs), shape(rows, outputs)

  def run(x, w, sizes, *cotangent):
    y, pull = jax.vjp(lambda x, w: kernels.grouped_matmul(x, w, sizes, implementation), x, w)
    return y, *(pull(*cotangent) if backward else ())

  return run, (x, w, jax.ShapeDtypeStruct((groups,), jnp.int32), *((g,) if backward else ()))
