"""Interval attention: one signature, explicit implementations.

Legend: B rows · L, Lq queries · Lk keys · H query heads · Hk key heads (H = Hk · G) · D, Dv head
sizes · T intervals of a query.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from genmodels.kernels import xla
from genmodels.kernels.tiles import Plan, Tiles, plan
from genmodels.masks import AttnMask

Array = jax.Array

IMPLEMENTATIONS = ("auto", "reference", "xla", "pallas_tpu", "pallas_gpu")


def resolve(implementation: str = "auto") -> str:
  """The implementation that will run; print it. Nothing falls back silently.

  Raises:
    ValueError: an unknown name, or an implementation that this build does not have.
  """
  if implementation not in IMPLEMENTATIONS:
    known = ", ".join(IMPLEMENTATIONS)
    raise ValueError(f"attention: unknown implementation {implementation!r}; one of {known}")
  if implementation.startswith("pallas"):
    raise ValueError(
      f"attention: implementation {implementation!r} is not available in this build; use 'auto' or 'xla'"
    )
  return "xla" if implementation == "auto" else implementation


def attention(
  q: Array,
  k: Array,
  v: Array,
  mask: AttnMask | Plan,
  *,
  scale: float | None = None,
  soft_cap: float | None = None,
  return_lse: bool = False,
  implementation: str = "auto",
  tiles: Tiles | None = None,
  deterministic: bool = False,
):
  """softmax(cap(scale · q kᵀ)) v over the keys that the mask shows to each query.

  A query that sees no key gives 0, with LSE −inf and zero gradients. Differentiable in q, k, v, the
  LSE included. Usable under jit, scan, remat (names "attn_out", "attn_lse") and inside shard_map on
  local rows and heads.

  Args:
    q: [B, Lq, H, D].
    k: [B, Lk, Hk, D], v: [B, Lk, Hk, Dv], Hk a divisor of H.
    mask: AttnMask with 1 or B rows, or a Plan of one, built once per batch.
    scale: of the logits; D^−0.5 by default.
    soft_cap: c · tanh(logits / c) if given.
    return_lse: also return the log-sum-exp of the logits, natural log.
    implementation: see `resolve`.
    tiles: tile sizes; not with a Plan, which has its own.
    deterministic: ask for bit-equal repeats where an implementation has a faster way without. The
      implementations of this build are always deterministic.

  Returns:
    out [B, Lq, H, Dv] in q's dtype; with `return_lse` (out, lse float32[B, H, Lq]).

  Raises:
    ValueError: shapes that do not fit.
  """
  del deterministic
  implementation = resolve(implementation)
  if isinstance(mask, Plan) and tiles is not None and Tiles(*tiles) != mask.tiles:
    raise ValueError(f"attention: the plan was built for {mask.tiles}, got tiles={tiles}; drop `tiles`")
  _check(q, k, v, mask)
  scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
  soft_cap = None if soft_cap is None else float(soft_cap)
  if implementation == "reference":
    out, lse = reference(q, k, v, mask.mask if isinstance(mask, Plan) else mask, scale, soft_cap)
  else:
    out, lse = xla.attend(q, k, v, mask if isinstance(mask, Plan) else plan(mask, tiles), scale, soft_cap)
  return (out, lse) if return_lse else out


def reference(q, k, v, mask: AttnMask, scale: float, soft_cap: float | None):
  """The dense oracle: float32, highest precision, [B, H, Lq, Lk] in memory."""
  B, lq, H, D = q.shape
  Hk = k.shape[2]
  high = jax.lax.Precision.HIGHEST
  qs, ks, vs = (x.astype(jnp.float32) for x in (q, k, v))
  s = jnp.einsum("bihgd,bjhd->bhgij", qs.reshape(B, lq, Hk, H // Hk, D), ks, precision=high) * scale
  if soft_cap is not None:
    s = soft_cap * jnp.tanh(s / soft_cap)
  seen = mask.to_dense()[:, None, None]
  some = seen.any(-1, keepdims=True)
  s = jnp.where(seen, s, -jnp.inf)
  top = jax.lax.stop_gradient(jnp.where(some, s.max(-1, keepdims=True), 0))
  p = jnp.exp(s - top)
  total = jnp.where(some, p.sum(-1, keepdims=True), 1)
  out = jnp.einsum("bhgij,bjhd->bihgd", p / total, vs, precision=high)
  lse = jnp.where(some, top + jnp.log(total), -jnp.inf)[..., 0]
  return out.reshape(B, lq, H, -1).astype(q.dtype), lse.reshape(B, H, lq)


def merge(outs, lses):
  """Attention over the union of disjoint key segments, from the parts. Differentiable.

  Args:
    outs: sequence of [B, L, H, D].
    lses: sequence of float32[B, H, L], −inf where a query saw no key of the segment.

  Returns:
    out [B, L, H, D] in the dtype of outs[0], lse float32[B, H, L].
  """
  lse = jnp.stack(list(lses))
  top = lse.max(0)
  some = top > -jnp.inf
  top = jax.lax.stop_gradient(jnp.where(some, top, 0))
  weight = jnp.exp(lse - top)
  total = jnp.where(some, weight.sum(0), 1)
  share = jnp.moveaxis(weight / total, 2, 3)[..., None]  # [segments, B, L, H, 1]
  out = sum(w * o.astype(jnp.float32) for w, o in zip(share, outs, strict=True))
  return out.astype(outs[0].dtype), jnp.where(some, top + jnp.log(total), -jnp.inf)


def _check(q, k, v, mask):
  lengths = mask.lengths if isinstance(mask, Plan) else (mask.lo.shape[2], mask.code.shape[1])
  shapes = f"q {q.shape}, k {k.shape}, v {v.shape}, mask rows {mask.code.shape[0]}, mask lengths {lengths}"
  if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
    raise ValueError(f"attention: q, k, v must be [B, L, H, D], got {shapes}")
  if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
    raise ValueError(f"attention: k and v must share [B, Lk, Hk], q and k B and D; got {shapes}")
  if q.shape[2] % k.shape[2]:
    heads = f"{q.shape[2]} query heads are no multiple of {k.shape[2]} key heads"
    raise ValueError(f"attention: {heads}; {shapes}")
  if (q.shape[1], k.shape[1]) != lengths:
    raise ValueError(f"attention: the mask speaks of (Lq, Lk) = {lengths}, got {shapes}")
  if mask.code.shape[0] not in (1, q.shape[0]):
    raise ValueError(f"attention: a mask has 1 row (shared) or as many as q; got {shapes}")
