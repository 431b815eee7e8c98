"""Decoding: a few queries over several key segments (the cache, the active blocks) in one call.

The query heads of a key head are packed into rows of one matrix product, so that a block of 4 to 64 slots
fills a tile, and nothing is concatenated. In plain XLA one online softmax runs through the segments, key tile
by key tile, on the cache as it lies in memory: the temporaries are one tile's. Other implementations run
their kernel on each segment, and the parts are merged by their log-sum-exps.

Legend: B rows · Lq queries · Lk keys · H query heads · h key heads · G query heads per key head · D, Dv head
sizes · T intervals of a query · I query tiles · J key tiles · i, k positions inside a tile · x = G · i
· N pages of a row · P pages of the pool.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from genmodels.contracts import pytree
from genmodels.kernels.attention import attention, backend, merge, plan, resolve, safe_tiles
from genmodels.kernels.varying import axes_of, vary
from genmodels.masks import CODE_HIDDEN, AttnMask

Array = jax.Array

_MASKED, _FLOOR = -1e30, -1e29  # as in the XLA path: masked logits underflow to exactly 0
_BIG = jnp.iinfo(jnp.int32).max
QUERIES = 128  # of a query tile
KEYS = 256  # of a key tile


class Segment(NamedTuple):
  """Keys that the queries see under one mask.

  Attributes:
    k: [B, Lk, h, D], v: [B, Lk, h, Dv], in any float type: they are cast to the queries', a tile at a time.
      With `pages`: the pools [P, page, h, D] and [P, page, h, Dv], and Lk = N · page.
    mask: AttnMask of 1 or B rows over those queries and keys, or its `decode_plan`.
    pages: int32[B, N], the page of the pool that holds a row's n-th page of keys; where all codes of a page
      are hidden, anything may stand there. None: contiguous.
  """

  k: Array
  v: Array
  mask: AttnMask | DecodePlan
  pages: Array | None = None


@pytree("lengths", "tiles", "groups", "implementation")
class DecodePlan:
  """A segment's mask and the key tiles that its queries touch. One serves all layers of a mask pattern.

  The leading axis of every array is the mask's rows, or the one list of this call, as of `kernels.plan`.

  Fields:
    code: int32[B, Lk]; lo, hi: int32[B, T, Lq].
    tile: int32[1, I, J], key tiles, those first that any row needs; count: int32[1, I], how many these are.
    inner: the plan of an implementation's own, with G heads packed into its queries; else None.
    lengths: (Lq, Lk). tiles: (queries, keys) of a tile. groups: G. implementation: whose it is. Static.
  """

  code: Array
  lo: Array
  hi: Array
  tile: Array
  count: Array
  inner: object
  lengths: tuple[int, int]
  tiles: tuple[int, int]
  groups: int
  implementation: str

  @property
  def mask(self) -> AttnMask:
    return AttnMask(self.code, self.lo, self.hi)


def decode_plan(
  mask: AttnMask, groups: int, implementation: str = "auto", *, page: int = 0, safe: bool = False
) -> DecodePlan:
  """What `decode` needs of a segment's mask, built once per call of the network.

  Args:
    mask: AttnMask.
    groups: G, query heads per key head (inside shard_map: of this device's heads).
    implementation: see `kernels.resolve`.
    page: keys of a page where the segment's are paged, 0 where they are not.
    safe: tiles as of `kernels.safe_tiles`.

  Raises:
    ValueError: as `kernels.resolve`; paged keys that the implementation cannot read.
  """
  implementation = resolve(implementation)
  lq, lk = mask.lo.shape[2], mask.code.shape[1]
  inner = None
  if implementation not in ("xla", "reference"):
    if page and not hasattr(backend(implementation), "attend_pages"):
      raise ValueError(
        f"decode: {implementation!r} reads contiguous keys only; use implementation='xla' for paged ones, or "
        f"gather the pages"
      )
    packed = AttnMask(mask.code, *(jnp.repeat(x, groups, axis=2) for x in (mask.lo, mask.hi)))
    sizes = (min(512, -(-lq * groups // 128) * 128), page) if page else None  # a page is a key tile
    inner = plan(packed, safe_tiles(implementation, sizes) if safe else sizes, implementation)
  tiles = min(QUERIES, lq), page or min(KEYS, lk)
  if page and lk % page:
    raise ValueError(f"decode: {lk} keys are no whole number of pages of {page}")
  tile, count = _touched(mask, tiles)
  return DecodePlan(mask.code, mask.lo, mask.hi, tile, count, inner, (lq, lk), tiles, groups, implementation)


def decode(
  q: Array,
  segments,
  *,
  scale: float | None = None,
  soft_cap: float | None = None,
  implementation: str = "auto",
) -> Array:
  """Attention of a few queries over the union of key segments, as if their keys stood in one array.

  Not differentiable in plain XLA (the number of key tiles visited is data). A query that sees no key gives 0.

  Args:
    q: [B, Lq, H, D], the slots of all active blocks.
    segments: of `Segment`s, at least one; no key may stand in two of them.
    scale, soft_cap, implementation: as in `kernels.attention`.

  Returns:
    [B, Lq, H, Dv] in q's dtype.

  Raises:
    ValueError: shapes that do not fit, a plan of another implementation.
  """
  implementation = resolve(implementation)
  scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
  soft_cap = None if soft_cap is None else float(soft_cap)
  made = [_planned(q, s, implementation) for s in segments]
  if implementation == "xla":
    operands = q, made
    return _stream(*vary(operands, axes_of(operands)), scale, soft_cap)
  parts = []
  for k, v, of, pages in made:
    if implementation == "reference":
      k, v = (x if pages is None else _gathered(x, pages) for x in (k, v))
      G, mask = 1, of.mask
    else:
      G, mask = of.groups, of.inner
    if pages is not None and implementation != "reference":
      parts.append(backend(implementation).attend_pages(_pack(q, G), k, v, mask, pages, scale, soft_cap))
      continue
    options = dict(scale=scale, soft_cap=soft_cap, implementation=implementation)
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    parts.append(attention(_pack(q, G), k, v, mask, return_lse=True, **options))
  return _unpack(merge(*zip(*parts))[0] if len(parts) > 1 else parts[0][0], G)


def _planned(q, segment: Segment, implementation: str) -> Segment:
  """The segment with its plan, checked."""
  k, v, mask, pages = segment
  groups = q.shape[2] // max(k.shape[2], 1)
  if not isinstance(mask, DecodePlan):
    mask = decode_plan(mask, groups, implementation, page=0 if pages is None else k.shape[1])
  B, lq, H, D = q.shape
  shapes = f"q {q.shape}, k {k.shape}, v {v.shape}, pages {None if pages is None else pages.shape}"
  if mask.implementation != implementation:
    raise ValueError(
      f"decode: a plan of {mask.implementation!r} cannot run on {implementation!r}; build it with "
      f"kernels.decode_plan(mask, groups, {implementation!r})"
    )
  if k.shape[:3] != v.shape[:3] or k.shape[3] != D or H % k.shape[2] or mask.groups != groups:
    raise ValueError(
      f"decode: k and v share all but their last axis, q and k that one, and there are {mask.groups} query "
      f"heads per key head (of the plan); got {shapes}"
    )
  rows, keys = (k.shape[0], k.shape[1]) if pages is None else (pages.shape[0], pages.shape[1] * k.shape[1])
  if rows != B or mask.lengths != (lq, keys) or mask.code.shape[0] not in (1, B):
    raise ValueError(
      f"decode: the mask speaks of {mask.code.shape[0]} rows and (Lq, Lk) = {mask.lengths}, got {shapes}"
    )
  if pages is not None and mask.tiles[1] != k.shape[1]:
    raise ValueError(f"decode: a page is {k.shape[1]} keys; build the plan with page={k.shape[1]}")
  return Segment(k, v, mask, pages)


def _touched(mask: AttnMask, tiles) -> tuple[Array, Array]:
  """(int32[1, I, J], key tiles, first those that queries of any row see; int32[1, I], how many they are)."""
  lo, hi = (_padded(x, 2, tiles[0], 0) for x in (mask.lo, mask.hi))
  code = _padded(mask.code, 1, tiles[1], CODE_HIDDEN)
  lo, hi = (x.reshape(*x.shape[:2], -1, tiles[0]) for x in (lo, hi))  # [B, T, I, i]
  some = lo < hi
  lo = jnp.where(some, lo, _BIG).min(-1)[..., None]
  hi = jnp.where(some, hi, -_BIG).max(-1)[..., None]
  code = code.reshape(code.shape[0], 1, 1, -1, tiles[1])
  first = jnp.where(code == CODE_HIDDEN, _BIG, code).min(-1)  # hidden codes lie below every interval
  touched = ((code.max(-1) >= lo) & (first < hi)).any((0, 1))  # [I, J]
  order = jnp.argsort(~touched, axis=1, stable=True).astype(jnp.int32)
  return order[None], touched.sum(1, dtype=jnp.int32)[None]


def _stream(q, segments, scale, soft_cap):
  """One online softmax over the key tiles of all segments."""
  B, lq, H, D = q.shape
  h, dv, size = segments[0].k.shape[2], segments[0].v.shape[3], segments[0].mask.tiles[0]
  G = H // h
  q = _padded(q, 1, size, 0)
  I = q.shape[1] // size
  q = q.reshape(B, I, size, h, G, D).transpose(1, 0, 3, 4, 2, 5).reshape(I, B, h, G * size, D)
  bounds = []
  for s in segments:
    pair = (_padded(x, 2, size, 0) for x in (s.mask.lo, s.mask.hi))
    bounds.append(tuple(jnp.moveaxis(x.reshape(*x.shape[:2], I, size), 2, 0) for x in pair))  # [I, B, T, i]

  def tile(_, xs):
    q, bounds, lists = xs
    zero = jnp.zeros_like(q[..., 0], jnp.float32)  # of q, that it varies over the mesh axes of q
    carry = zero + _FLOOR, zero, zero[..., None] + jnp.zeros((dv,), jnp.float32)
    for s, (lo, hi), (order, count) in zip(segments, bounds, lists):
      body = _step(q, s, lo, hi, order, scale, soft_cap)
      carry = jax.lax.fori_loop(0, count, body, carry)
    _, total, acc = carry
    return None, (acc / jnp.where(total > 0, total, 1)[..., None]).astype(q.dtype)

  xs = q, bounds, [(s.mask.tile[0], s.mask.count[0]) for s in segments]
  if I == 1:
    out = tile(None, jax.tree.map(lambda x: x[0], xs))[1][None]
  else:
    out = jax.lax.scan(tile, None, xs)[1]
  out = out.reshape(I, B, h, G, size, dv).transpose(1, 0, 4, 2, 3, 5)
  return out.reshape(B, I * size, H, dv)[:, :lq]


def _step(q, segment, lo, hi, order, scale, soft_cap):
  """The loop's body over the tiles of one segment; it carries top, total [B, h, x] and acc [B, h, x, Dv]."""
  k, v, plan, pages = segment
  B, h, x, _ = q.shape
  keys, lk = plan.tiles[1], plan.lengths[1]

  def body(n, carry):
    top, total, acc = carry
    j = order[n]
    begin = jnp.minimum(j * keys, lk - keys)  # the last tile moves back into the segment,
    fresh = begin + jnp.arange(keys) >= j * keys  # over keys that the one before it has had
    if pages is None:
      take = lambda x: jax.lax.dynamic_slice_in_dim(x, begin, keys, 1)
    else:
      page = jnp.clip(jax.lax.dynamic_index_in_dim(pages, j, 1, keepdims=False), 0, k.shape[0] - 1)
      take = lambda x: x[page]
    code = jax.lax.dynamic_slice_in_dim(plan.code, begin, keys, 1)[:, None, None]  # [B, 1, 1, k]
    seen = ((lo[..., None] <= code) & (code < hi[..., None])).any(1) & fresh  # [B, i, k]
    s = jnp.einsum("bhxd,bkhd->bhxk", q, take(k).astype(q.dtype), preferred_element_type=jnp.float32) * scale
    if soft_cap is not None:
      s = soft_cap * jnp.tanh(s / soft_cap)
    s = s.reshape(B, h, -1, *seen.shape[1:])
    s = jnp.where(seen[:, None, None], s, _MASKED).reshape(B, h, x, keys)
    new = jnp.maximum(top, s.max(-1))
    p, shrink = jnp.exp(s - new[..., None]), jnp.exp(top - new)
    value = take(v).astype(q.dtype)
    acc = acc * shrink[..., None] + jnp.einsum(
      "bhxk,bkhd->bhxd", p.astype(value.dtype), value, preferred_element_type=jnp.float32
    )
    return new, total * shrink + p.sum(-1), acc

  return body


def _pack(q, G):
  """[B, Lq, (h, G), D] -> [B, (Lq, G), h, D]: G queries of a slot stand together, under the same bounds."""
  B, lq, H, D = q.shape
  return q.reshape(B, lq, H // G, G, D).swapaxes(2, 3).reshape(B, lq * G, H // G, D)


def _unpack(out, G):
  B, rows, h, D = out.shape
  return out.reshape(B, rows // G, G, h, D).swapaxes(2, 3).reshape(B, rows // G, h * G, D)


def _gathered(pool, pages):
  """The keys that a row's pages hold, [B, N · page, h, D]."""
  found = pool[jnp.clip(pages, 0, pool.shape[0] - 1)]
  return found.reshape(found.shape[0], -1, *found.shape[3:])


def _padded(x, axis, multiple, value):
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, -x.shape[axis] % multiple)
  return jnp.pad(x, widths, constant_values=value)
