"""Interval attention over a mesh axis that splits the sequence, on top of any implementation.

Everything here runs inside shard_map, on this shard's queries and keys. Codes travel with their tokens, so
neither offsets nor masks per rank exist: local bounds and the codes that came along are exact, wherever a
layout has put the tokens.

  gather  every shard gathers the keys; the backward pass gathers them again and reduce-scatters dk and dv
          (Llama 3, arXiv:2407.21783 §3.3.2).
  ring    keys go round by one neighbour a step, partial results are merged by their log-sum-exps; no shard
          ever holds more than two shards of keys (Liu et al., arXiv:2310.01889).

Keys that only their own shard's queries see (noisy blocks that lie whole on one shard) take part in neither.

Legend: B rows · L queries of a shard · M keys of a shard that travel · N keys of a shard that stay · n shards
· H query heads · h key heads · D head size · T intervals of a query.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from genmodels import kernels
from genmodels.contracts import pytree
from genmodels.kernels.varying import axes_of, vary
from genmodels.masks import AttnMask

Array = jax.Array
Spans = tuple[tuple[int, int], ...]

STRATEGIES = ("gather", "ring")


@pytree("strategy", "local")
class Plan:
  """Tile lists of one shard.

  Fields:
    home: plan over the keys of the one call of "gather", or of the last step of "ring": those that stay, then
      those that travelled.
    away: plans of the other steps of "ring", stacked on a leading axis; None for "gather".
    strategy: one of STRATEGIES. Static.
    local: spans of the shard's slots whose keys stay. Static.
  """

  home: Any
  away: Any
  strategy: str
  local: Spans


class _Options(NamedTuple):
  axis: str
  scale: float
  soft_cap: float | None
  implementation: str
  deterministic: bool

  def kernel(self) -> dict:
    return {k: v for k, v in self._asdict().items() if k != "axis"}


def plan(
  mask: AttnMask,
  axis: str,
  strategy: str = "gather",
  local: Spans = (),
  *,
  tiles=None,
  implementation: str = "auto",
) -> Plan:
  """The tile lists of this shard, for all steps. Build them once per batch; every layer shares them.

  Args:
    mask: of this shard: code int32[B, N + M] of its keys, lo, hi int32[B, T, L] of its queries.
    axis: the mesh axis.
    strategy: one of STRATEGIES.
    local: disjoint, ascending spans (start, stop) of the shard's keys that no other shard's queries see.
    tiles, implementation: as in `kernels.plan`.

  Raises:
    ValueError: an unknown strategy, or as `kernels.plan`.
  """
  if strategy not in STRATEGIES:
    raise ValueError(f"context: unknown strategy {strategy!r}; one of {', '.join(STRATEGIES)}")
  build = lambda code: kernels.plan(AttnMask(code, mask.lo, mask.hi), tiles, implementation)
  stay, travel = split(mask.code, local)
  whole = jax.lax.all_gather(travel, axis, axis=1, tiled=True)  # 4 B a key, once per batch
  if strategy == "gather":
    return Plan(build(jnp.concatenate([stay, whole], 1)), None, strategy, local)
  n, M = jax.lax.axis_size(axis), travel.shape[1]

  def at_step(s):
    owner = (jax.lax.axis_index(axis) - s) % n
    return jax.lax.dynamic_slice_in_dim(whole, owner * M, M, axis=1)

  away = jax.lax.map(lambda s: build(at_step(s)), jnp.arange(n - 1, dtype=jnp.int32))
  return Plan(build(jnp.concatenate([stay, at_step(n - 1)], 1)), away, strategy, local)


def specs(strategy: str, local: Spans, axes: tuple[str, ...]) -> Plan:
  """out_specs and in_specs of a plan that a shard_map builds: every shard's own lists, over mesh `axes`."""
  away = PartitionSpec(None, axes) if strategy == "ring" else None
  return Plan(PartitionSpec(axes), away, strategy, local)


def split(x: Array, local: Spans) -> tuple[Array, Array]:
  """x [B, S, …] of a shard as (what stays [B, N, …], what travels [B, M, …])."""
  edges = [0, *(e for span in local for e in span), x.shape[1]]
  if any(a > b for a, b in zip(edges, edges[1:])):
    raise ValueError(f"context: local spans {local} are not disjoint, ascending spans of {x.shape[1]} slots")
  parts = [x[:, a:b] for a, b in zip(edges, edges[1:])]
  return jnp.concatenate(parts[1::2] or [x[:, :0]], 1), jnp.concatenate(parts[::2], 1)


def attention(
  q: Array,
  k: Array,
  v: Array,
  plan: Plan,
  *,
  axis: str,
  scale: float | None = None,
  soft_cap: float | None = None,
  return_lse: bool = False,
  implementation: str = "auto",
  deterministic: bool = False,
):
  """`kernels.attention` of this shard's queries over the keys of all shards.

  Args:
    q: [B, L, H, D]; k: [B, N + M, h, D], v: [B, N + M, h, Dv], all of this shard.
    plan: of this shard, see `plan`.

  Returns:
    out [B, L, H, Dv] in q's dtype; with `return_lse` (out, lse float32[B, H, L]).
  """
  scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
  options = _Options(axis, scale, soft_cap, kernels.resolve(implementation), deterministic)
  operands = vary((q, k, v, plan), axes_of((q, k, v, plan)))
  out, lse = (_gather if plan.strategy == "gather" else _ring)(options, *operands)
  return (out, lse) if return_lse else out


# -- gather -------------------------------------------------------------------------------------------


def _gather(options: _Options, q, k, v, plan):
  def attend(q, k, v):
    k, v = (_gathered(x, plan.local, options.axis) for x in (k, v))
    return kernels.attention(q, k, v, plan.home, return_lse=True, **options.kernel())

  # What the backward pass keeps is local: it gathers the keys again, whatever the layers' remat says.
  keep = jax.checkpoint_policies.save_only_these_names("attn_out", "attn_lse")
  return jax.checkpoint(attend, policy=keep, prevent_cse=False)(q, k, v)


def _gathered(x, local, axis):
  stay, travel = split(x, local)
  return jnp.concatenate([stay, jax.lax.all_gather(travel, axis, axis=1, tiled=True)], 1)


# -- ring ---------------------------------------------------------------------------------------------
# Step s of shard r attends to what shard r − s sent: s = 0 … n − 2 in a loop that hands the keys on while it
# computes, then s = n − 1 together with the keys that stay. The backward pass goes the other way round, so
# that dk and dv, which travel with their keys, are at home after the last step.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(options, q, k, v, plan):
  return _ring_forward(options, q, k, v, plan)[0]


def _ring_forward(options, q, k, v, plan):
  B, L, H, _ = q.shape
  (k_stay, k_go), (v_stay, v_go) = split(k, plan.local), split(v, plan.local)
  attend = functools.partial(kernels.attention, return_lse=True, **options.kernel())

  def step(carry, lists):
    keys, out, lse = carry
    following = _pass_on(keys, options.axis, 1)  # asked for first: it arrives while this step computes
    part = attend(q, *keys, lists)
    return (following, *kernels.merge([out, part[0]], [lse, part[1]])), None

  zero = jnp.zeros((B, L, H, v.shape[-1]), jnp.float32), jnp.full((B, H, L), -jnp.inf)
  init = (k_go, v_go), *vary(zero, axes_of((q, k, v, plan)))
  (keys, out, lse), _ = jax.lax.scan(step, init, plan.away)
  last = attend(q, jnp.concatenate([k_stay, keys[0]], 1), jnp.concatenate([v_stay, keys[1]], 1), plan.home)
  out, lse = kernels.merge([out, last[0]], [lse, last[1]])
  out = checkpoint_name(out.astype(q.dtype), "attn_out")
  lse = checkpoint_name(lse, "attn_lse")
  return (out, lse), (q, k, v, plan, out, lse)


def _ring_backward(options, residuals, cotangents):
  q, k, v, plan, out, lse = residuals
  (k_stay, k_go), (v_stay, v_go) = split(k, plan.local), split(v, plan.local)
  N = k_stay.shape[1]

  def gradients(k, v, lists):
    parts = kernels.gradients(q, k, v, lists, out, lse, *cotangents, **options.kernel())
    return [x.astype(jnp.float32) for x in parts]

  keys = _pass_on((k_go, v_go), options.axis, -1)
  following = _pass_on(keys, options.axis, -1)
  k_last, v_last = jnp.concatenate([k_stay, keys[0]], 1), jnp.concatenate([v_stay, keys[1]], 1)
  dq, *d_last = gradients(k_last, v_last, plan.home)

  def step(carry, lists):
    keys, d_keys, dq = carry
    following = _pass_on(keys, options.axis, -1)
    arrived = _pass_on(d_keys, options.axis, -1)
    more, *d_part = gradients(*keys, lists)
    return (following, [a + b for a, b in zip(arrived, d_part)], dq + more), None

  init = following, [x[:, N:] for x in d_last], dq
  (_, d_keys, dq), _ = jax.lax.scan(step, init, plan.away, reverse=True)
  dk, dv = (_joined(x[:, :N], go, plan.local) for x, go in zip(d_last, d_keys))
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_ring.defvjp(_ring_forward, _ring_backward)


def _pass_on(tree, axis: str, by: int):
  """Every shard's arrays to the shard `by` further on."""
  n = jax.lax.axis_size(axis)
  return jax.lax.ppermute(tree, axis, [(i, (i + by) % n) for i in range(n)])


def _joined(stay, travel, local):
  """The inverse of `split`."""
  parts, at, used = [], 0, 0
  for start, stop in local:
    parts += [travel[:, at - used : start - used], stay[:, used : used + stop - start]]
    at, used = stop, used + stop - start
  return jnp.concatenate([*parts, travel[:, at - used :]], 1)
