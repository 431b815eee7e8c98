"""Bodies of the TPU kernels: what is done with one entry of a tile list.

`place` is the call (`pallas_tpu._Place`): layout of the entries, tile sizes, scale and soft-cap. What
belongs to a query (its interval, its statistics) comes as a row of lanes and is turned into columns of
scratch once a line; scratch of sums lives from the first to the last entry of a line.

Legend: q, k queries and keys of a tile · c keys of a part of it · D, Dv head sizes · T intervals.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from genmodels.kernels.pallas_tpu_lists import LANES, Layout

LOG2E = 1.4426950408889634
_MASKED = -1e30
_FLOOR = -1e29


def forward_kernel(entries, q, k, v, code, bounds, out, lse, limits, top, total, acc, *, place):
  layout, part = place.layout, place.sizes.k_compute
  entry = entries[pl.program_id(1)]

  @pl.when(layout.is_first(entry))
  def _():
    top[...] = jnp.full_like(top, _FLOOR)
    total[...] = jnp.zeros_like(total)
    acc[...] = jnp.zeros_like(acc)
    _turn(bounds, limits)

  def body(c: int, masked: bool):
    keys = slice(c * part, (c + 1) * part)
    s, _ = _logits(place.options, q[...], k[keys, :].astype(q.dtype))  # [q, c]
    if masked:
      t = 2 * layout.term_of(entry)
      s = jnp.where(code[:, keys] - _wide(limits[t], part) < _wide(limits[t + 1], part), s, _MASKED)
    old = top[...]
    new = jnp.maximum(old, s.max(-1)[:, None])
    p = jnp.exp2(s - _wide(new, part))
    shrink = jnp.exp2(old - new)
    top[...] = new
    total[...] = shrink * total[...] + _lane_sums(p)
    acc[...] = acc[...] * _wide(shrink, acc.shape[1]) + dot(
      p.astype(q.dtype), v[keys, :].astype(q.dtype), _NN
    )

  _each_part(layout, entry, body)

  @pl.when(layout.is_last(entry))
  def _():
    whole = jnp.broadcast_to(total[...].sum(-1)[:, None], total.shape)
    some = whole > 0
    safe = jnp.where(some, whole, 1.0)
    out[...] = (acc[...] * _wide(jnp.where(some, 1.0 / safe, 0.0), acc.shape[1])).astype(out.dtype)
    natural = jnp.where(some, (top[...] + jnp.log2(safe)) * (1 / LOG2E), -jnp.inf)
    lse[...] = natural.T[:1]


def grad_queries_kernel(entries, q, k, v, d_out, stats, code, bounds, dq, limits, columns, acc, *, place):
  layout, part = place.layout, place.sizes.k_compute
  entry = entries[pl.program_id(1)]

  @pl.when(layout.is_first(entry))
  def _():
    acc[...] = jnp.zeros_like(acc)
    _turn(bounds, limits)
    _turn(stats, columns)

  def body(c: int, masked: bool):
    keys = slice(c * part, (c + 1) * part)
    s, slope = _logits(place.options, q[...], k[keys, :])  # [q, c]
    if masked:
      t = 2 * layout.term_of(entry)
      s = jnp.where(code[:, keys] - _wide(limits[t], part) < _wide(limits[t + 1], part), s, _MASKED)
    p = jnp.exp2(s - _wide(columns[0], part))
    ds = p * (dot(d_out[...], v[keys, :], _NT) - _wide(columns[1], part))
    ds = ds if slope is None else ds * slope
    acc[...] += dot(ds.astype(k.dtype), k[keys, :], _NN)

  _each_part(layout, entry, body)

  @pl.when(layout.is_last(entry))
  def _():
    dq[...] = (acc[...] * place.options.scale).astype(dq.dtype)


def grad_keys_kernel(entries, q, k, v, d_out, stats, code, bounds, dk, dv, codes, dk_acc, dv_acc, *, place):
  layout, part = place.layout, place.sizes.k_compute
  entry, g = entries[pl.program_id(1)], pl.program_id(2)

  @pl.when(layout.is_first(entry) & (g == 0))
  def _():
    dk_acc[...] = jnp.zeros_like(dk_acc)
    dv_acc[...] = jnp.zeros_like(dv_acc)
    codes[...] = _column(code[...])

  def body(c: int, masked: bool):
    keys = slice(c * part, (c + 1) * part)
    s, slope = _logits(place.options, k[keys, :], q[...])  # [c, q]
    if masked:
      s = jnp.where(_wide(codes[keys, :], s.shape[1]) - bounds[:1] < bounds[1:], s, _MASKED)
    p = jnp.exp2(s - stats[:1])
    dv_acc[keys, :] += dot(p.astype(d_out.dtype), d_out[...], _NN)
    ds = p * (dot(v[keys, :], d_out[...], _NT) - stats[1:])
    ds = ds if slope is None else ds * slope
    dk_acc[keys, :] += dot(ds.astype(q.dtype), q[...], _NN)

  _each_part(layout, entry, body)

  @pl.when(layout.is_last(entry) & (g == place.group - 1))
  def _():
    dk[...] = (dk_acc[...] * place.options.scale).astype(dk.dtype)
    dv[...] = dv_acc[...].astype(dv.dtype)


_NT = (((1,), (1,)), ((), ()))
_NN = (((1,), (0,)), ((), ()))


def dot(a, b, dimensions):
  """a · b as dot_general has it, summed in float32."""
  # A chip multiplies float32 in one bfloat16 pass unless told otherwise.
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _logits(options, a, b):
  """Logits in base 2, and the slope of the soft-cap (None without one)."""
  s = dot(a, b, _NT)
  if options.soft_cap is None:
    return s * (options.scale * LOG2E), None
  ratio = jnp.tanh(s * (options.scale / options.soft_cap))
  return ratio * (options.soft_cap * LOG2E), 1 - ratio * ratio


def _each_part(layout: Layout, entry, body):
  """Runs body(part, masked) for the parts of a tile that its interval meets.

  Two straight lines for tiles that are met everywhere, so that the products of one part run beside the
  softmax of another; the parts of the others are jumped over one by one.
  """
  every, parts = range(layout.parts), layout.parts_of(entry)
  full, whole = layout.is_full(entry), parts == 2**layout.parts - 1

  def straight(masked: bool):
    for c in every:
      body(c, masked)

  pl.when(full)(lambda: straight(False))
  pl.when(whole & ~full)(lambda: straight(True))
  if layout.parts > 1:
    for c in every:
      pl.when(~whole & ((parts & (1 << c)) != 0))(functools.partial(body, c, True))


def _column(x):
  """[1, n] -> [n, LANES], each value over all lanes of its sublane."""
  return jnp.broadcast_to(x, (LANES, x.shape[1])).T


def _turn(rows, columns):
  """Rows of a block [r, n] as columns of scratch [r, n, LANES]: once a line instead of once a tile."""
  for r in range(rows.shape[0]):
    columns[r] = _column(rows[r : r + 1, :])


def _lane_sums(x):
  """[r, n] -> [r, LANES]: sums of every LANES-th column. The sum over lanes can wait for the end of a line;
  the schedule is 3 to 7 % shorter than with a reduction in every tile."""
  x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % LANES))) if x.shape[1] % LANES else x
  return sum(x[:, i : i + LANES] for i in range(0, x.shape[1], LANES))


def _wide(x, n: int):
  """[r, LANES] with equal lanes -> [r, n]."""
  if n < LANES:
    return x[:, :n]
  return jnp.tile(x, (1, -(-n // LANES)))[:, :n]
