"""Functions of logits, chunk by chunk: [R, V] never exists, forward or backward.

Legend: R rows (positions, flattened) · c rows of a chunk · D width · V vocabulary.

Inside shard_map: rows are local to the device, the weight is gathered over fsdp before the call and
enters replicated over the row axes. Its gradient is then summed over them by the transpose of
shard_map (or of the step that makes it vary), not here. How many chunks run differs from device to
device, so neither `fn` nor `logits_fn` may hold a collective over an axis that splits rows; one over
an axis that splits only the vocabulary is fine, since there all devices see the same rows.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from genmodels.kernels.varying import axes_of, vary

Array = jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def project(weight: Array, hidden: Array, transposed: bool = False) -> Array:
  """Logits float32[c, V]: the product in hidden's dtype, accumulated in float32.

  Unlike autodiff's, the weight gradient leaves its product in float32 whatever the compute dtype.

  Args:
    weight: [D, V], or [V, D] if `transposed` (a tied embedding table).
    hidden: [c, D].
  """
  spec = "cd,vd->cv" if transposed else "cd,dv->cv"
  return jnp.einsum(spec, hidden, weight.astype(hidden.dtype), preferred_element_type=jnp.float32)


def _project_forward(weight, hidden, transposed):
  return project(weight, hidden, transposed), (weight, hidden)


def _project_backward(transposed, residuals, g):
  weight, hidden = residuals
  g = g.astype(hidden.dtype)
  spec = "cv,vd->cd" if transposed else "cv,dv->cd"
  d_hidden = jnp.einsum(spec, g, weight.astype(hidden.dtype), preferred_element_type=jnp.float32)
  spec = "cv,cd->vd" if transposed else "cv,cd->dv"
  d_weight = jnp.einsum(spec, g, hidden, preferred_element_type=jnp.float32)
  return d_weight.astype(weight.dtype), d_hidden.astype(hidden.dtype)


project.defvjp(_project_forward, _project_backward)


def nll(logits: Array, value: Array) -> Array:
  """−log p(value), float32[c]; an `fn` for `chunked_map`."""
  picked = jnp.take_along_axis(logits, value[:, None], axis=1)[:, 0]
  return jax.nn.logsumexp(logits, axis=1) - picked


def chunked_map(hidden: Array, weight, valid: Array, fn, xs=(), *, chunk: int = 1024, logits_fn=project):
  """fn(logits float32[c, V], *chunks of xs) for all valid rows, recomputed in the backward pass.

  Valid rows are visited in order, `chunk` at a time, and no others: the work follows their number, no
  row is ever dropped. Differentiable in hidden, weight, the floating xs, and what fn closes over; the
  weight's gradient is accumulated in float32. Not under vmap, which would run all chunks.

  Args:
    hidden: [R, D].
    weight: what logits_fn takes: [D, V] by default, else any pytree of arrays.
    valid: bool[R].
    fn: (logits, *xs chunk) -> pytree of [c, …]; row r of its result depends on row r alone.
    xs: tuple of [R, …] arrays; rows past the end of the last chunk are fed as zeros.
    chunk: rows at a time (static).
    logits_fn: (weight, hidden chunk [c, D]) -> logits float32[c, V].

  Returns:
    fn's pytree with leading axis R, exactly zero where not valid.

  Raises:
    ValueError: lengths that differ, a result of fn without a row axis.
  """
  xs = tuple(xs)
  R = hidden.shape[0]
  if hidden.ndim != 2 or valid.shape != (R,) or any(x.shape[:1] != (R,) for x in xs):
    raise ValueError(
      f"chunked_map: hidden [R, D], valid [R] and xs [R, …] must share R, got hidden {hidden.shape}, "
      f"valid {valid.shape}, xs {[x.shape for x in xs]}; flatten the batch and position axes first"
    )
  chunk = min(chunk, R)
  operands = (weight, hidden, valid, xs)
  weight, hidden, valid, xs = vary(operands, axes_of(operands))

  def rows(weight, hidden, *xs):
    return fn(logits_fn(weight, hidden), *xs)

  # What fn closes over (a schedule's value, a temperature) must be an argument of the custom_vjp.
  rows, closed = jax.closure_convert(rows, weight, hidden[:chunk], *(x[:chunk] for x in xs))
  shapes = jax.eval_shape(rows, weight, hidden[:chunk], *(x[:chunk] for x in xs), *closed)
  for leaf in jax.tree.leaves(shapes):
    if leaf.shape[:1] != (chunk,):
      raise ValueError(f"chunked_map: fn must return [c, …] with c={chunk}, got {leaf.shape}")
  return _map(_Static(rows, chunk, len(xs)), (weight, tuple(closed)), hidden, valid, xs)


class _Static:
  """The traced function and the chunk size; equal only to itself."""

  def __init__(self, rows, chunk, count):
    self.rows, self.chunk, self.count = rows, chunk, count

  def __call__(self, params, hidden, xs):
    return self.rows(params[0], hidden, *xs, *params[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _map(static, params, hidden, valid, xs):
  return _forward(static, params, hidden, valid, xs)[0]


def _schedule(static, valid):
  """(int32[R', chunk] rows of each chunk, R where there is none; int32 chunks that have a row)."""
  R, c = valid.shape[0], static.chunk
  order = jnp.argsort(~valid, stable=True).astype(jnp.int32)
  count = valid.sum(dtype=jnp.int32)
  order = jnp.where(jnp.arange(R) < count, order, R)
  return jnp.pad(order, (0, -R % c), constant_values=R).reshape(-1, c), (count + c - 1) // c


def _take(x, rows):
  return x.at[rows].get(mode="fill", fill_value=0)


def _forward(static, params, hidden, valid, xs):
  R = valid.shape[0]
  rows, active = _schedule(static, valid)
  axes = axes_of((params, hidden, valid, xs))

  def body(i, outs):
    new = static(params, _take(hidden, rows[i]), tuple(_take(x, rows[i]) for x in xs))
    return jax.tree.map(lambda out, y: out.at[rows[i]].set(y, mode="drop"), outs, new)

  first = jax.eval_shape(lambda: static(params, _take(hidden, rows[0]), tuple(_take(x, rows[0]) for x in xs)))
  zeros = vary(jax.tree.map(lambda s: jnp.zeros((R, *s.shape[1:]), s.dtype), first), axes)
  return jax.lax.fori_loop(0, active, body, zeros), (params, hidden, valid, xs)


def _backward(static, residuals, g):
  params, hidden, valid, xs = residuals
  rows, active = _schedule(static, valid)
  axes = axes_of(residuals)
  leaves, tree = jax.tree.flatten(params)
  learn = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.inexact)]
  follow = [i for i, x in enumerate(xs) if jnp.issubdtype(x.dtype, jnp.inexact)]
  g = [y for y in jax.tree.leaves(g) if y.dtype != jax.dtypes.float0]

  def body(i, carry):
    d_params, d_hidden, d_xs = carry
    part = [_take(x, rows[i]) for x in xs]

    def run(some, hidden, floats):
      full, inputs = list(leaves), list(part)
      for at, x in zip(learn, some, strict=True):
        full[at] = x
      for at, x in zip(follow, floats, strict=True):
        inputs[at] = x
      outs = jax.tree.leaves(static(jax.tree.unflatten(tree, full), hidden, tuple(inputs)))
      return [y for y in outs if jnp.issubdtype(y.dtype, jnp.inexact)]

    _, pull = jax.vjp(run, [leaves[at] for at in learn], _take(hidden, rows[i]), [part[at] for at in follow])
    a, b, c = pull([_take(y, rows[i]) for y in g])
    d_params = [total + x.astype(total.dtype) for total, x in zip(d_params, a, strict=True)]
    d_hidden = d_hidden.at[rows[i]].set(b, mode="drop")
    d_xs = [total.at[rows[i]].set(x, mode="drop") for total, x in zip(d_xs, c, strict=True)]
    return d_params, d_hidden, d_xs

  zeros = (
    [jnp.zeros(leaves[at].shape, jnp.promote_types(leaves[at].dtype, jnp.float32)) for at in learn],
    jnp.zeros_like(hidden),
    [jnp.zeros_like(xs[at]) for at in follow],
  )
  d_params, d_hidden, d_xs = jax.lax.fori_loop(0, active, body, vary(zeros, axes))
  out_leaves, out_xs = [None] * len(leaves), [None] * len(xs)
  for at, x in zip(learn, d_params, strict=True):
    out_leaves[at] = x.astype(leaves[at].dtype)
  for at, x in zip(follow, d_xs, strict=True):
    out_xs[at] = x
  return jax.tree.unflatten(tree, out_leaves), d_hidden, None, tuple(out_xs)


_map.defvjp(_forward, _backward)
