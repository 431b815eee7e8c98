"""Attention and table lookups over the mesh: rows over data × fsdp, heads over tensor, slots over context.

Kernels see local rows and heads only. Tile lists are built once per call and mask pattern, on each
device for its own rows and queries, and every layer shares them. Over the context axis keys are gathered or
go round, see kernels.context.

Legend: B rows · S slots · H query heads · G key heads · K head dimension · Lc cached keys.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from genmodels import kernels
from genmodels.kernels import context
from genmodels.masks import AttnMask, DenseMask
from genmodels.parallel import current_mesh
from genmodels.parallel.rules import BATCH_AXES


def active_mesh():
  """The current mesh if it spans several devices and we are not inside a shard_map; else None."""
  mesh = current_mesh()
  if mesh is None or mesh.size == 1 or jax.sharding.get_abstract_mesh().manual_axes:
    return None
  return mesh


def split(mesh, axes: tuple[str, ...], size: int) -> tuple[str, ...]:
  """Leading mesh axes of `axes` over which `size` divides evenly (a batch of one stays whole)."""
  out: tuple[str, ...] = ()
  for a in axes:
    if mesh.shape[a] > 1:
      if size % (math.prod(mesh.shape[x] for x in out) * mesh.shape[a]):
        break
      out += (a,)
  return out


def lookup(table, ids, split_rows: bool = False):
  """Rows of a table [n, D] at ids int32[B, S], as [B, S, D]; −1 gives zeros.

  On a mesh each device looks up its own slots, with the table gathered as any FSDP weight is; with
  `split_rows` (a vocabulary) it keeps its own rows over tensor, and the parts are summed. Left to the
  partitioner, a gather from a table that is sharded both ways replicates the result.
  """

  def take(table, ids):
    there = (ids >= 0) & (ids < table.shape[0])
    return jnp.where(there[..., None], table[jnp.clip(ids, 0, table.shape[0] - 1)], 0)

  mesh = active_mesh()
  if mesh is None:
    return take(table, ids)
  b, c = split(mesh, BATCH_AXES, ids.shape[0]), split(mesh, ("context",), ids.shape[1])
  rows = split(mesh, ("tensor",), table.shape[0]) if split_rows else ()

  def local(table, ids):
    if not rows:
      return take(table, ids)
    return jax.lax.psum(take(table, ids - jax.lax.axis_index(rows) * table.shape[0]), rows)

  return jax.shard_map(local, mesh=mesh, in_specs=(P(rows), P(b, c)), out_specs=P(b, c))(table, ids)


def plans(
  masks: dict[str, AttnMask | DenseMask],
  rows: int,
  implementation: str = "auto",
  strategy: str | None = None,
  *,
  tiles=None,
  capacity=None,
  decode=None,
) -> dict:
  """Tile lists of each mask pattern for `rows` rows; on a mesh each device holds its own.

  Args:
    strategy: one of context.STRATEGIES for keys that are split over the context axis as the queries are; None
      for keys that every context shard holds whole (with a cache).
    tiles, capacity: as of `kernels.plan`.
    decode: (query heads, key heads, safe) of the model: plans for `attention` with a cache.
  """
  mesh = active_mesh()
  if decode is None:
    build = lambda m: kernels.plan(m, tiles, implementation, capacity)
  else:
    H, G, safe = decode
    build = lambda m: kernels.decode_plan(m, H // (G * _repeats(mesh, H, G)), implementation, safe=safe)
  if mesh is None:
    return {name: build(mask) for name, mask in masks.items()}
  out = {}
  for name, mask in masks.items():
    if isinstance(mask, DenseMask):
      if mesh.shape["context"] > 1:
        raise ValueError(
          f"dense attention (mask {name!r}) does not split over mesh.context={mesh.shape['context']}"
        )
      out[name] = kernels.plan(mask)
      continue
    b, c = split(mesh, BATCH_AXES, rows), split(mesh, ("context",), mask.lo.shape[2])
    r = b if mask.code.shape[0] > 1 else None
    along = c if strategy else ()
    spec = mask.replace(code=P(r, along), lo=P(r, None, c), hi=P(r, None, c))
    made, specs = build, P(b + c)
    if c and strategy:
      local = mask.local if mask.shards == mesh.shape["context"] else ()
      made = functools.partial(
        context.plan, axis="context", strategy=strategy, local=local, tiles=tiles,
        implementation=implementation, capacity=capacity,
      )  # fmt: skip
      specs = context.specs(strategy, local, b + c)
    out[name] = jax.shard_map(made, mesh=mesh, in_specs=(spec,), out_specs=specs)(mask)
  return out


def attention(
  q, k, v, plan, *, cache=None, scale: float, soft_cap: float | None, implementation: str, deterministic=True
):
  """Attention of this call's slots over themselves and, if given, over a cache: two key segments in one call
  of `kernels.decode`; nothing is concatenated.

  Args:
    q: [B, S, H, K]; k, v: [B, S, G, K].
    plan: of this call's mask, from `plans`.
    cache: (keys, values [B, Lc, G, K], plan over the cached codes) or None. With a cache both plans are made
      with `decode`.
    deterministic: as of `kernels.attention`.

  Returns:
    [B, S, H, K].
  """
  options = dict(scale=scale, soft_cap=soft_cap, implementation=implementation)
  over_slots = functools.partial(kernels.attention, deterministic=deterministic)
  if isinstance(plan, context.Plan):
    over_slots = functools.partial(context.attention, axis="context", deterministic=deterministic)

  def local(q, k, v, plan, cache):
    if cache is None:
      return over_slots(q, k, v, plan, **options)
    return kernels.decode(q, [kernels.Segment(*cache), kernels.Segment(k, v, plan)], **options)

  local = jax.named_scope("attention")(local)
  mesh = active_mesh()
  if mesh is None:
    return local(q, k, v, plan, cache)
  b, c = split(mesh, BATCH_AXES, q.shape[0]), split(mesh, ("context",), q.shape[1])
  t = split(mesh, ("tensor",), q.shape[2])
  repeats = _repeats(mesh, q.shape[2], k.shape[2])
  widen = lambda x: jnp.repeat(x, repeats, axis=2) if repeats > 1 else x
  heads, whole, lists = P(b, c, t), P(b, None, t), P(b + c)
  if cache is not None:
    cache = (widen(cache[0]), widen(cache[1]), cache[2])
  own, keys = lists, whole
  if isinstance(plan, context.Plan):
    own, keys = context.specs(plan.strategy, plan.local, b + c), heads
  specs = (heads, keys, keys, own, None if cache is None else (whole, whole, lists))
  return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=heads)(q, widen(k), widen(v), plan, cache)


def _repeats(mesh, heads: int, key_heads: int) -> int:
  """How often key heads are repeated so that every tensor shard gets whole ones (2 key heads on 4 shards)."""
  ways = mesh.shape["tensor"] if mesh is not None and split(mesh, ("tensor",), heads) else 1
  n = ways // math.gcd(key_heads, ways)
  if heads % (key_heads * n):
    raise ValueError(
      f"attention: {key_heads} key heads of {heads} heads do not split over tensor={ways}: choose a tensor "
      f"axis that divides {key_heads}, or is a multiple of it that divides {heads}"
    )
  return n
