"""The key-value cache: a pytree that `apply` reads and these functions write.

Inside the layer scan the cache is a read-only input; the scan returns this call's new keys and values
(`Outputs.new`), and one scatter after it writes those that are kept. Jit the function around
`write_cache` with the cache donated, and the write is in place.

Legend: B rows · Lc capacity · S slots of a call · R repeats of a segment · G key heads · K head dimension.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from genmodels.contracts import pytree
from genmodels.masks import CODE_HIDDEN
from genmodels.models.config import TrunkConfig

Array = jax.Array


@pytree()
class Cache:
  """Keys and values of committed slots, under the codes they entered with.

  Fields:
    code: {pattern: int32[B, Lc]}, CODE_HIDDEN where empty.
    length: int32[B], entries in use.
    layers: {"s<segment>": {"l<position>": {"k", "v": [R, B, Lc, G, K]}}}, keys already rotated; those of
      `cfg.prefix` under "prefix".
  """

  code: dict[str, Array]
  length: Array
  layers: Any

  @property
  def capacity(self) -> int:
    return next(iter(self.code.values())).shape[1]


def init_cache(cfg: TrunkConfig, batch: int, capacity: int, dtype=None) -> Cache:
  """An empty cache; `dtype` is the compute dtype by default."""
  dtype = jnp.dtype(cfg.dtype if dtype is None else dtype)
  layers = _layers(cfg, batch, capacity, dtype)
  if cfg.prefix:
    layers["prefix"] = _layers(cfg.prefixed, batch, capacity, dtype)
  code = {p: jnp.full((batch, capacity), CODE_HIDDEN, jnp.int32) for p in cfg.patterns}
  return Cache(code, jnp.zeros((batch,), jnp.int32), layers)


def _layers(cfg: TrunkConfig, batch: int, capacity: int, dtype) -> dict:
  """Zeros for every layer, as `Cache.layers`."""
  layers = {}
  for i, s in enumerate(cfg.segments):
    shape = (s.repeats, batch, capacity, cfg.num_kv_heads, cfg.head_dim)
    layers[f"s{i}"] = {
      f"l{j}": {name: jnp.zeros(shape, dtype) for name in ("k", "v")} for j in range(len(s.pattern))
    }
  return layers


def write_cache(cache: Cache, new, keep: Array, at: Array | None = None) -> Cache:
  """Stores the kept slots of a call, with their codes.

  Args:
    new: `Outputs.new` of that call.
    keep: bool[B, S]; rows may keep different numbers of slots, and none.
    at: int32[B, S], where each slot goes (overwriting what is there); default: behind the last entry,
      in slot order. Slots not kept, and entries beyond the capacity, are dropped.

  Returns:
    The cache, `length` advanced per row: by the slots kept, or to the end of what `at` wrote.
  """
  keep = keep.astype(bool)
  if at is None:
    at = cache.length[:, None] + jnp.cumsum(keep, 1, dtype=jnp.int32) - 1
    length = cache.length + keep.sum(1, dtype=jnp.int32)
  else:
    length = jnp.maximum(cache.length, jnp.where(keep, at + 1, 0).max(1))
  at = jnp.where(keep & (at >= 0), at, cache.capacity)
  code = {
    p: _scatter(c[None, :, :, None], at, new["code"][p][None, :, :, None])[0, :, :, 0]
    for p, c in cache.code.items()
  }
  layers = jax.tree.map(lambda c, n: _scatter(c, at, n), cache.layers, new["layers"])
  return Cache(code, jnp.minimum(length, cache.capacity), layers)


def _scatter(cache: Array, at: Array, new: Array) -> Array:
  """cache [R, B, Lc, …] with new [R, B, S, …] at positions int32[B, S]; a batched scatter, so that
  neither a layout change nor a collective over rows is needed."""
  window = (0, *range(3, cache.ndim))
  numbers = jax.lax.ScatterDimensionNumbers(
    update_window_dims=window,
    inserted_window_dims=(2,),
    scatter_dims_to_operand_dims=(2,),
    operand_batching_dims=(1,),
    scatter_indices_batching_dims=(0,),
  )
  return jax.lax.scatter(
    cache, at[..., None], new.astype(cache.dtype), numbers, mode=jax.lax.GatherScatterMode.FILL_OR_DROP
  )


def crop_cache(cache: Cache, length: Array) -> Cache:
  """The first `length` int32[B] entries of each row; later ones become invisible and are reused."""
  length = jnp.minimum(length, cache.length)
  gone = jnp.arange(cache.capacity) >= length[:, None]
  code = {p: jnp.where(gone, CODE_HIDDEN, c) for p, c in cache.code.items()}
  return Cache(code, length, cache.layers)


def relabel_cache(cache: Cache, code: dict[str, Array]) -> Cache:
  """The same entries under other codes, {pattern: int32[B, Lc]}."""
  if sorted(code) != sorted(cache.code):
    raise ValueError(f"relabel_cache: codes for {sorted(code)}, the cache holds {sorted(cache.code)}")
  return Cache(dict(code), cache.length, cache.layers)


def value_similarity(cache: Cache, new, at: Array) -> Array:
  """float32[B, S]: the cosine of a slot's values with those of its cache entry, the mean over layers.

  Args:
    cache: one without values is compared by all that it holds.
    new: `Outputs.new` of a call. at: int32[B, S], the entry of each slot.
  """
  pairs, _ = jax.tree_util.tree_flatten_with_path(cache.layers)
  fresh = jax.tree.leaves(new["layers"])
  values = [i for i, (path, _) in enumerate(pairs) if path[-1].key == "v"] or range(len(pairs))
  index = jnp.clip(at, 0, cache.capacity - 1)
  total, layers = jnp.zeros(at.shape, jnp.float32), 0
  for i in values:
    x, y = pairs[i][1], fresh[i].astype(jnp.float32)
    x = jnp.take_along_axis(x, index.reshape(1, *index.shape, *(1,) * (x.ndim - 3)), 2).astype(jnp.float32)
    dot = lambda a, b: (a * b).sum(tuple(range(3, a.ndim)))
    total += (dot(x, y) * jax.lax.rsqrt(jnp.maximum(dot(x, x) * dot(y, y), 1e-30))).sum(0)
    layers += x.shape[0]
  return total / layers


def fork_cache(cache: Cache, rows: Array) -> Cache:
  """Rows int32[B'] of the cache, in that order (beams, shared prompts)."""
  return Cache(
    {p: c[rows] for p, c in cache.code.items()},
    cache.length[rows],
    jax.tree.map(lambda x: jnp.take(x, rows, axis=1), cache.layers),
  )
