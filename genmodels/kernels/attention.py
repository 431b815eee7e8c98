"""Interval attention: one signature, explicit implementations.

Legend: B rows · L, Lq queries · Lk keys · H query heads · Hk key heads (H = Hk · G) · D, Dv head
sizes · T intervals of a query.
"""

from __future__ import annotations

import importlib
import inspect

import jax
import jax.numpy as jnp

from genmodels.kernels import dense, target
from genmodels.masks import AttnMask, DenseMask

Array = jax.Array

IMPLEMENTATIONS = ("auto", "reference", "xla", "pallas_tpu", "pallas_gpu")


def resolve(implementation: str = "auto") -> str:
  """The implementation that runs on `target.current()`. Nothing falls back silently: "auto" takes the kernel
  of the platform if it can run there, else "xla"; print what `explain` says of it.

  Raises:
    ValueError: an unknown name, or a pinned implementation that cannot run here (the reason, the fix).
  """
  return explain(implementation)[0]


def explain(implementation: str = "auto") -> tuple[str, str]:
  """`resolve`, and why: (implementation, reason in words). Raises as it does."""
  if implementation not in IMPLEMENTATIONS:
    known = ", ".join(IMPLEMENTATIONS)
    raise ValueError(f"attention: unknown implementation {implementation!r}; one of {known}")
  reason = _unavailable(implementation)
  if implementation != "auto":
    if reason:
      raise ValueError(
        f"attention: implementation {implementation!r} cannot run here: {reason}; use 'auto' or 'xla'"
      )
    return implementation, "as configured"
  here = target.current()
  own = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}.get(here.platform)
  if own is None:
    return "xla", f"auto: no kernel of its own for {here.platform}"
  if reason := _unavailable(own):
    return "xla", f"auto: {own} cannot run here: {reason}"
  return own, f"auto: the kernel of {here.kind or here.platform}"


def bounded(implementation: str) -> bool:
  """Whether plans of an implementation take a `capacity`; others always hold the worst case."""
  return "capacity" in inspect.signature(backend(implementation).plan).parameters


def safe_tiles(implementation: str, tiles=None):
  """`tiles` with operands passed through shared memory, where the implementation has such a mode."""
  made = getattr(backend(implementation), "Tiles", None)
  if "safe" not in getattr(made, "_fields", ()):
    return tiles
  return made(*(tiles or ()))._replace(safe=True)


def caution(implementation: str, safe: bool = False) -> str | None:
  """What to say at start-up of this machine's tool chain, if an implementation has something to say."""
  warn = getattr(backend(implementation), "toolchain_warning", None)
  return warn(safe_tiles(implementation) if safe else None) if warn else None


def plan(mask: AttnMask, tiles=None, implementation: str = "auto", capacity: float | None = None):
  """A mask with the tile lists of an implementation. Build it once per batch; every layer shares it.

  Pure and jit-able; a new mask of the same shape does not recompile. The leading axis of every array is the
  rows of the mask, groups of them, or the one list of this call: a plan built inside shard_map leaves it
  with P(mesh axes) for all leaves.

  Args:
    mask: AttnMask, or a DenseMask, which takes kernels.dense whatever the implementation.
    tiles: tile sizes, (q, k) or the `Tiles` of the implementation; its defaults by default.
    implementation: see `resolve`.
    capacity: share of the worst case that the lists have room for, in (0, 1]; None: all of it. Not used where
      not `bounded`. A mask that needs more sets `overflow`, bool[1], and outputs and gradients are NaN.

  Returns:
    A plan of that implementation, with `mask`, `tiles`, `lengths` (Lq, Lk) and `implementation`.

  Raises:
    ValueError: as `resolve`; shapes of the mask that do not fit each other.
  """
  if isinstance(mask, DenseMask):
    return dense.plan(mask)
  implementation = resolve(implementation)
  more = {} if capacity is None or not bounded(implementation) else {"capacity": capacity}
  return backend(implementation).plan(mask, tiles, **more)


def backend(name: str):
  """Module of an implementation: plan(mask, tiles[, capacity]), attend(q, k, v, plan, scale, soft_cap,
  deterministic); a Pallas one has unavailable(target) -> str | None too; any may have `gradients` and
  `attend_pages`.

  Imported when asked for: one platform's Pallas dialect need not import on another's jax.
  """
  return importlib.import_module(f"genmodels.kernels.{'xla' if name == 'reference' else name}")


def _unavailable(name: str) -> str | None:
  """Why an implementation cannot run on the current target; None if it can."""
  if not name.startswith("pallas"):
    return None
  try:
    return backend(name).unavailable(target.current())
  except ModuleNotFoundError as e:
    return f"this build lacks it ({e})"


def attention(
  q: Array,
  k: Array,
  v: Array,
  mask,
  *,
  scale: float | None = None,
  soft_cap: float | None = None,
  return_lse: bool = False,
  implementation: str = "auto",
  tiles=None,
  deterministic: bool = False,
):
  """softmax(cap(scale · q kᵀ)) v over the keys that the mask shows to each query.

  A query that sees no key gives 0, with LSE −inf and zero gradients. Differentiable in q, k, v, the
  LSE included. Usable under jit, scan, remat (names "attn_out", "attn_lse") and inside shard_map on
  local rows and heads.

  Args:
    q: [B, Lq, H, D].
    k: [B, Lk, Hk, D], v: [B, Lk, Hk, Dv], Hk a divisor of H.
    mask: AttnMask with 1 or B rows, or its `plan`, built once per batch; or the plan of a DenseMask.
    scale: of the logits; D^−0.5 by default.
    soft_cap: c · tanh(logits / c) if given.
    return_lse: also return the log-sum-exp of the logits, natural log.
    implementation: see `resolve`.
    tiles: tile sizes; not with a plan, which has its own.
    deterministic: ask for bit-equal repeats where an implementation has a faster way without: gradients of
      "pallas_gpu" up to head size 128. All else always is.

  Returns:
    out [B, Lq, H, Dv] in q's dtype; with `return_lse` (out, lse float32[B, H, Lq]).

  Raises:
    ValueError: shapes that do not fit.
  """
  if isinstance(mask, dense.Plan):
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if (q.shape[1], k.shape[1]) != mask.lengths or mask.seen.shape[0] not in (1, q.shape[0]):
      raise ValueError(f"attention: q {q.shape}, k {k.shape}, dense mask {mask.seen.shape}")
    out, lse = dense.attend(q, k, v, mask, scale, soft_cap)
    return (out, lse) if return_lse else out
  is_plan = not isinstance(mask, AttnMask)
  if is_plan and tiles is not None and tuple(tiles) != tuple(mask.tiles):
    raise ValueError(f"attention: the plan was built for {mask.tiles}, got tiles={tiles}; drop `tiles`")
  implementation = resolve(implementation)
  if is_plan and implementation not in ("reference", mask.implementation):
    raise ValueError(
      f"attention: a plan of {mask.implementation!r} cannot run on {implementation!r}; build it with "
      f"kernels.plan(mask, implementation={implementation!r})"
    )
  scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
  soft_cap = None if soft_cap is None else float(soft_cap)
  _check(q, k, v, mask)
  if implementation == "reference":
    out, lse = reference(q, k, v, mask.mask if is_plan else mask, scale, soft_cap)
  else:
    made = mask if is_plan else plan(mask, tiles, implementation)
    out, lse = backend(implementation).attend(q, k, v, made, scale, soft_cap, deterministic)
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


def gradients(
  q: Array,
  k: Array,
  v: Array,
  plan,
  out: Array,
  lse: Array,
  d_out: Array,
  d_lse: Array,
  *,
  scale: float,
  soft_cap: float | None = None,
  implementation: str = "auto",
  deterministic: bool = False,
) -> tuple[Array, Array, Array]:
  """dq, dk, dv of attention over several key segments, the part of one segment.

  With out and LSE of all segments the probabilities are the final ones, so parts of dq add up and dk, dv need
  no correction. An implementation may have `gradients` of the same positional arguments; without one, the
  segment's forward pass is run again and its gradients weighted by its share of each query's sum.

  Args:
    q, k, v, plan: as `attention` took them for this segment.
    out: [B, Lq, H, Dv], lse: float32[B, H, Lq], of all segments together; d_out, d_lse: their cotangents.
  """
  implementation = resolve(implementation)
  if implementation != "reference" and hasattr(own := backend(implementation), "gradients"):
    return own.gradients(q, k, v, plan, out, lse, d_out, d_lse, scale, soft_cap, deterministic)
  attend = lambda q, k, v: attention(
    q, k, v, plan, scale=scale, soft_cap=soft_cap, return_lse=True, implementation=implementation,
    deterministic=deterministic,
  )  # fmt: skip
  (part, part_lse), pull = jax.vjp(attend, q, k, v)
  share = jnp.where(part_lse > -jnp.inf, jnp.exp(part_lse - lse), 0)  # [B, H, Lq]
  d_out = d_out.astype(jnp.float32)
  moved = part.astype(jnp.float32) - out.astype(jnp.float32)
  d_part_lse = share * ((moved * d_out).sum(-1).transpose(0, 2, 1) + d_lse)
  return pull(((d_out * share.transpose(0, 2, 1)[..., None]).astype(part.dtype), d_part_lse))


def _check(q, k, v, mask):
  is_mask = isinstance(mask, AttnMask)
  lengths = (mask.lo.shape[2], mask.code.shape[1]) if is_mask else mask.lengths
  rows = mask.code.shape[0]
  shapes = f"q {q.shape}, k {k.shape}, v {v.shape}, mask rows {rows}, mask lengths {lengths}"
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
