"""Matrix products of rows that are sorted by group, each group with a matrix of its own (mixture of experts).

  pallas_tpu  kernels of our own for TPU (`pallas_tpu_grouped`): the work of the rows, plus at most one part
              of a tile per group.
  blocks      a loop over blocks of rows of one group each: the work of the rows, plus at most one block per
              group, on any backend.
  ragged      jax.lax.ragged_dot, as XLA takes it: a kernel on GPUs and on some TPU compilers, as many dense
              products as there are groups on XLA:CPU and on others (libtpu 0.0.52 for v5e, v6e, TPU7x).

Legend: M rows · E groups · D inputs · F outputs · m rows of a block.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from genmodels.kernels.target import current
from genmodels.kernels.varying import axes_of, vary

Array = jax.Array

IMPLEMENTATIONS = ("auto", "pallas_tpu", "ragged", "blocks")


def resolve_grouped(implementation: str, x: Array | None = None, w: Array | None = None) -> str:
  """What runs on `target.current()`: "auto" is "pallas_tpu" where that can run, else "blocks".

  Args:
    x, w: the operands of `grouped_matmul`, or their shapes; None asks of no shape in particular.

  Raises:
    ValueError: an unknown name, or "pallas_tpu" where it cannot run (the reason, the fix).
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f"grouped product: {implementation!r} is unknown; one of {', '.join(IMPLEMENTATIONS)}")
  if implementation in ("ragged", "blocks"):
    return implementation
  if implementation == "auto" and current().platform != "tpu":
    return "blocks"
  if (reason := _unavailable(x, w)) is None:
    return "pallas_tpu"
  if implementation == "auto":
    return "blocks"
  raise ValueError(f"grouped product: 'pallas_tpu' cannot run here: {reason}; use 'auto' or 'blocks'")


def _unavailable(x: Array | None, w: Array | None) -> str | None:
  from genmodels.kernels import pallas_tpu, pallas_tpu_grouped

  if x is None or w is None:
    return pallas_tpu.unavailable(current())
  return pallas_tpu_grouped.unavailable(x.shape[0], *w.shape, x.dtype)


def grouped_matmul(x: Array, w: Array, sizes: Array, implementation: str = "auto") -> Array:
  """x[r] @ w[group of row r], for rows sorted by group.

  Args:
    x: [M, D], the rows of group 0 first, then those of group 1, …
    w: [E, D, F].
    sizes: int32[E], rows of each group; rows beyond their sum belong to none.
    implementation: one of IMPLEMENTATIONS, see `resolve_grouped`.

  Returns:
    [M, F] in x's dtype, accumulated in float32; exactly zero for rows of no group, which get and give no
    gradient.

  Raises:
    ValueError: shapes that do not fit, an unknown implementation, or one that cannot run here.
  """
  if x.ndim != 2 or w.ndim != 3 or w.shape[1] != x.shape[1] or sizes.shape != w.shape[:1]:
    raise ValueError(
      f"grouped product: expected x [M, D], w [E, D, F], sizes [E]; got {x.shape}, {w.shape}, {sizes.shape}"
    )
  w = w.astype(x.dtype)
  chosen = resolve_grouped(implementation, x, w)
  if chosen == "pallas_tpu":
    from genmodels.kernels import pallas_tpu_grouped

    return pallas_tpu_grouped.multiply(x, w, sizes)
  if chosen == "blocks":
    axes = axes_of((x, w, sizes))
    return _blocks(*vary((x, w, sizes), axes))
  # A kernel may leave rows of no group as it found them, forward and backward.
  mine = (jnp.arange(x.shape[0]) < sizes.sum())[:, None]
  return jnp.where(mine, jax.lax.ragged_dot(jnp.where(mine, x, 0), w, sizes), 0)


# -- blocks -------------------------------------------------------------------------------------------


def _schedule(M: int, sizes: Array):
  """(m, int32[N] group of each block, its first row, the end of its group, int32 blocks in use)."""
  E = sizes.shape[0]
  m = 8
  while m < min(M // E, 512):
    m *= 2
  N = M // m + E
  count = -(-sizes // m)
  last = jnp.cumsum(count)
  at = jnp.arange(N, dtype=sizes.dtype)
  group = jnp.minimum(jnp.searchsorted(last, at, side="right"), E - 1).astype(jnp.int32)
  end = jnp.cumsum(sizes)
  start = (end - sizes)[group] + (at - (last - count)[group]) * m
  return m, group, start, end[group], last[-1]


def _product(x: Array, w: Array, sizes: Array, spec: str) -> Array:
  """One product per block, in ascending order: what a block writes past its group, the next overwrites."""
  M = x.shape[0]
  m, group, start, _, active = _schedule(M, sizes)
  x = jnp.pad(x, ((0, m), (0, 0)))  # a slice that reaches past the end would be moved back

  def body(i, y):
    rows = jax.lax.dynamic_slice_in_dim(x, start[i], m)
    part = jnp.einsum(spec, rows, w[group[i]], preferred_element_type=jnp.float32)
    return jax.lax.dynamic_update_slice_in_dim(y, part.astype(y.dtype), start[i], 0)

  width = w.shape[2] if spec == "md,df->mf" else w.shape[1]
  y = vary(jnp.zeros((M + m, width), x.dtype), axes_of((x, w, sizes)))
  y = jax.lax.fori_loop(0, active, body, y)[:M]
  return jnp.where((jnp.arange(M) < sizes.sum())[:, None], y, 0)


def _weights(x: Array, g: Array, w: Array, sizes: Array) -> Array:
  """Σ over the rows of each group of x ⊗ g, [E, D, F] in w's dtype; summed in float32."""
  m, group, start, end, active = _schedule(x.shape[0], sizes)
  x, g = (jnp.pad(a, ((0, m), (0, 0))) for a in (x, g))

  def body(i, carry):
    total, out = carry
    mine = (start[i] + jnp.arange(m) < end[i])[:, None]
    rows, grads = (jax.lax.dynamic_slice_in_dim(a, start[i], m) for a in (x, g))
    part = jnp.einsum("md,mf->df", jnp.where(mine, rows, 0), grads, preferred_element_type=jnp.float32)
    first = (i == 0) | (group[i] != group[jnp.maximum(i - 1, 0)])
    total = part + jnp.where(first, 0, total)
    return total, out.at[group[i]].set(total.astype(out.dtype))

  zeros = jnp.zeros(w.shape[1:], jnp.float32), jnp.zeros(w.shape, w.dtype)
  return jax.lax.fori_loop(0, active, body, vary(zeros, axes_of((x, g, w, sizes))))[1]


@jax.custom_vjp
def _blocks(x, w, sizes):
  return _product(x, w, sizes, "md,df->mf")


def _blocks_forward(x, w, sizes):
  return _blocks(x, w, sizes), (x, w, sizes)


def _blocks_backward(residuals, g):
  x, w, sizes = residuals
  return _product(g, w, sizes, "mf,df->md"), _weights(x, g, w, sizes), None


_blocks.defvjp(_blocks_forward, _blocks_backward)
