"""Blockwise interval attention in plain XLA: any backend, O(L · D) memory, real tile skipping.

Forward: for each line of the tile list a loop over its entries with online softmax. Backward: one pass
over the transposed list with five products a tile; dk, dv stay in the loop, dq is added in place.

Legend: B rows · L positions · H query heads · h key heads · G queries per key head · D head size
· g groups of rows · r rows of a group · R rows of a group in the mask (1 if shared) · T intervals
· I query tiles · J key tiles · i, j positions inside a tile · x = G · i.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from genmodels.kernels import tiles as tile_lists
from genmodels.kernels.tiles import Plan, TileList, plan
from genmodels.kernels.varying import axes_of, vary

Array = jax.Array

# Masked logits lie so far below the smallest running maximum that exp underflows to exactly 0: no
# second `where` on the probabilities, and rows without a key come out with a zero sum.
_MASKED = -1e30
_FLOOR = -1e29


class _Options(NamedTuple):
  scale: float
  soft_cap: float | None


__all__ = ["attend", "gradients", "plan"]


def attend(
  q: Array, k: Array, v: Array, plan: Plan, scale: float, soft_cap: float | None, deterministic: bool = False
):
  """out [B, Lq, H, Dv], lse float32[B, H, Lq]; arguments as in `kernels.attention`."""
  del deterministic  # it always is
  operands = (q, k, v, plan)
  return _attend(_Options(scale, soft_cap), *vary(operands, axes_of(operands)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, q, k, v, plan):
  return _forward(options, q, k, v, plan)[0]


def _forward(options, q, k, v, plan):
  B, lq, H, _ = q.shape
  h, dv = k.shape[2], v.shape[3]
  qt = _query_tiles(q, h, plan)  # [(g, I), r, h, x, D]
  kt, vt = _key_tiles(k, plan), _key_tiles(v, plan)  # [g, J, r, h, j, D]
  lo, hi, code = _mask_tiles(plan)
  lines = qt.shape[0]
  per_group = lines // kt.shape[0]

  def line(_, x):
    n, q, lo, hi, start, stop = x
    group = n // per_group

    def body(e, carry):
      top, total, acc = carry
      entry = plan.by_query.entry[group, e]
      j, t = tile_lists.column(entry), tile_lists.term(entry)
      s, _ = _scores(options, q, kt[group, j], lo[t], hi[t], code[group, j])
      new = jnp.maximum(top, s.max(-1))
      p = jnp.exp(s - new[..., None])
      shrink = jnp.exp(top - new)
      value = vt[group, j]
      acc = acc * shrink[..., None] + _dot("rhxj,rhjd->rhxd", p.astype(value.dtype), value)
      return new, total * shrink + p.sum(-1), acc

    # Zeros are made from the operands: in shard_map a carry must vary over the axes they vary over.
    zero = jnp.zeros_like(q[..., 0], jnp.float32)
    init = zero + _FLOOR, zero, zero[..., None] + jnp.zeros((dv,), jnp.float32)
    top, total, acc = jax.lax.fori_loop(start, stop, body, init)
    some = total > 0
    safe = jnp.where(some, total, 1)
    return None, ((acc / safe[..., None]).astype(q.dtype), jnp.where(some, top + jnp.log(safe), -jnp.inf))

  xs = (jnp.arange(lines, dtype=jnp.int32), qt, lo, hi, *_ranges(plan.by_query))
  _, (out, lse) = jax.lax.scan(line, None, xs)
  out = checkpoint_name(_from_query_tiles(out, B, lq, H), "attn_out")
  lse = checkpoint_name(_from_query_tiles(lse[..., None], B, lq, H)[..., 0].transpose(0, 2, 1), "attn_lse")
  return (out, lse), (q, k, v, plan, out, lse)


def _backward(options, residuals, cotangents):
  q, k, v, plan, out, lse = residuals
  d_out, d_lse = cotangents
  B, lq, H, _ = q.shape
  h = k.shape[2]
  some = lse > -jnp.inf
  # dS = P (dP − Δ) with Δ = Σ out·d_out, and P·d_lse more from the LSE output.
  delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1) - d_lse.transpose(0, 2, 1)
  delta = jnp.where(some.transpose(0, 2, 1), delta, 0)
  lse = jnp.where(some, lse, 0).transpose(0, 2, 1)  # empty rows: every logit is masked below
  qt, gt = _query_tiles(q, h, plan), _query_tiles(d_out.astype(q.dtype), h, plan)
  rows = _query_tiles(jnp.stack([lse, delta], -1), h, plan)  # [(g, I), r, h, x, 2]
  kt, vt = _key_tiles(k, plan), _key_tiles(v, plan)
  lo, hi, code = _mask_tiles(plan)
  groups, J = kt.shape[:2]
  I = qt.shape[0] // groups

  def line(dq, x):
    n, k, v, code, start, stop = x

    def body(e, carry):
      dk, dv, dq = carry
      entry = plan.by_key.entry[n // J, e]
      i, t = n // J * I + tile_lists.column(entry), tile_lists.term(entry)
      q, g = qt[i], gt[i]
      s, slope = _scores(options, q, k, lo[i, t], hi[i, t], code)
      p = jnp.exp(s - rows[i, ..., :1])
      dp = _dot("rhxd,rhjd->rhxj", g, v)
      ds = p * (dp - rows[i, ..., 1:])
      ds = (ds if slope is None else ds * slope).astype(q.dtype)
      dv = dv + _dot("rhxj,rhxd->rhjd", p.astype(g.dtype), g)
      dk = dk + _dot("rhxj,rhxd->rhjd", ds, q)
      dq = jax.lax.dynamic_update_index_in_dim(dq, dq[i] + _dot("rhxj,rhjd->rhxd", ds, k), i, 0)
      return dk, dv, dq

    init = jnp.zeros_like(k, jnp.float32), jnp.zeros_like(v, jnp.float32), dq
    dk, dv, dq = jax.lax.fori_loop(start, stop, body, init)
    return dq, (dk * options.scale, dv)

  flat = [x.reshape(groups * J, *x.shape[2:]) for x in (kt, vt, code)]
  xs = (jnp.arange(groups * J, dtype=jnp.int32), *flat, *_ranges(plan.by_key))
  dq, (dk, dv) = jax.lax.scan(line, jnp.zeros_like(qt, jnp.float32), xs)
  dq = _from_query_tiles(dq * options.scale, B, lq, H).astype(q.dtype)
  dk, dv = (_from_key_tiles(x, groups, B, k.shape[1]) for x in (dk, dv))
  return dq, dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_forward, _backward)


def gradients(q, k, v, plan, out, lse, d_out, d_lse, scale, soft_cap, deterministic=False):
  """dq, dk, dv of one key segment; arguments as in `kernels.gradients`."""
  del deterministic
  operands = (q, k, v, plan, out, lse), (d_out, d_lse)
  residuals, cotangents = vary(operands, axes_of(operands))
  return _backward(_Options(scale, soft_cap), residuals, cotangents)[:3]


def _scores(options, q, k, lo, hi, code):
  """Masked logits float32[r, h, x, j] and the slope of the soft-cap (None without one).

  Args:
    q: [r, h, x, D], k: [r, h, j, D], lo, hi: int32[R, i], code: int32[R, j].
  """
  r, h, x, _ = q.shape
  s = _dot("rhxd,rhjd->rhxj", q, k) * options.scale
  slope = None
  if options.soft_cap is not None:
    ratio = jnp.tanh(s / options.soft_cap)
    s, slope = options.soft_cap * ratio, 1 - ratio * ratio
  seen = (lo[..., None] <= code[:, None]) & (code[:, None] < hi[..., None])  # [R, i, j]
  s = s.reshape(r, h, -1, *seen.shape[1:])
  return jnp.where(seen[:, None, None], s, _MASKED).reshape(r, h, x, -1), slope


def _dot(spec, a, b):
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _ranges(tiles: TileList) -> tuple[Array, Array]:
  """First and last + 1 entry of every line, int32[(g, line)]."""
  return tiles.start[:, :-1].reshape(-1), tiles.start[:, 1:].reshape(-1)


def _groups(plan: Plan, B: int) -> tuple[int, int]:
  """(groups of rows, rows of a group); a mask with one row puts the whole batch into one group."""
  return (1, B) if plan.code.shape[0] == 1 else (B // plan.tiles.rows, plan.tiles.rows)


def _query_tiles(x: Array, h: int, plan: Plan) -> Array:
  """[B, L, H, D] -> [(g, I), r, h, (G, i), D], zero-padded."""
  B, L, H, D = x.shape
  x = jnp.pad(x, [(0, 0), (0, plan.lo.shape[2] - L), (0, 0), (0, 0)])
  g, r = _groups(plan, B)
  x = x.reshape(g, r, -1, plan.tiles.q, h, H // h, D).transpose(0, 2, 1, 4, 5, 3, 6)
  return x.reshape(-1, r, h, H // h * plan.tiles.q, D)


def _from_query_tiles(x: Array, B: int, L: int, H: int) -> Array:
  lines, r, h, _, D = x.shape
  G = H // h
  x = x.reshape(B // r, lines * r // B, r, h, G, -1, D).transpose(0, 2, 1, 5, 3, 4, 6)
  return x.reshape(B, -1, H, D)[:, :L]


def _key_tiles(x: Array, plan: Plan) -> Array:
  """[B, L, h, D] -> [g, J, r, h, j, D], zero-padded."""
  B, L, h, D = x.shape
  x = jnp.pad(x, [(0, 0), (0, plan.code.shape[1] - L), (0, 0), (0, 0)])
  g, r = _groups(plan, B)
  return x.reshape(g, r, -1, plan.tiles.k, h, D).transpose(0, 2, 1, 4, 3, 5)


def _from_key_tiles(x: Array, groups: int, B: int, L: int) -> Array:
  _, r, h, j, D = x.shape
  return x.reshape(groups, -1, r, h, j, D).transpose(0, 2, 1, 4, 3, 5).reshape(B, -1, h, D)[:, :L]


def _mask_tiles(plan: Plan):
  """lo, hi [(g, I), T, R, i] and code [g, J, R, j]."""
  rows, T, _ = plan.lo.shape
  g, r = (1, 1) if rows == 1 else _groups(plan, rows)
  lo, hi = (
    x.reshape(g, r, T, -1, plan.tiles.q).transpose(0, 3, 2, 1, 4).reshape(-1, T, r, plan.tiles.q)
    for x in (plan.lo, plan.hi)
  )
  return lo, hi, plan.code.reshape(g, r, -1, plan.tiles.k).transpose(0, 2, 1, 3)
