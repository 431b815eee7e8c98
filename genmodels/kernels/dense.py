"""Dense attention, for the few masks that are no union of intervals: all pairs of at most LIMIT slots.

Explicit: a `DenseMask` takes it and nothing else does. Scores are made and remade for some queries at a time,
so memory is O(CHUNK · L) a head beside the mask itself; nothing is skipped.

Legend: B rows · L, Lq queries · Lk keys · H query heads · h key heads · G queries per key head · D head size
· q queries of a chunk.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from genmodels.contracts import pytree
from genmodels.masks import DenseMask

Array = jax.Array

LIMIT = 1024  # slots: GPT-2's length; a mask of L × L pairs has no place beyond it
CHUNK = 128  # queries at a time


@pytree()
class Plan:
  """A dense mask made out, seen: bool[B, Lq, Lk], shared by all layers; names as of the kernels' plans."""

  seen: Array

  implementation = "dense"

  @property
  def tiles(self) -> tuple[int, int]:
    return min(CHUNK, self.seen.shape[1]), self.seen.shape[2]

  @property
  def lengths(self) -> tuple[int, int]:
    return self.seen.shape[1:]


def plan(mask: DenseMask) -> Plan:
  """The mask, made out.

  Raises:
    ValueError: more slots than LIMIT.
  """
  lq, lk = mask.drawn.shape
  if max(lq, lk) > LIMIT:
    raise ValueError(
      f"dense attention: {lq} × {lk} pairs; a mask that is no union of intervals is for at most {LIMIT} "
      "slots (kernels.dense.LIMIT): shorten data.seq_len, or anneal by block sizes that grow"
    )
  return Plan(mask.to_dense())


def attend(q: Array, k: Array, v: Array, plan: Plan, scale: float, soft_cap: float | None):
  """out [B, Lq, H, Dv], lse float32[B, H, Lq]; arguments as in `kernels.attention`."""
  B, lq, H, D = q.shape
  h = k.shape[2]
  size = min(CHUNK, lq)
  pad = -lq % size

  def chunks(x):
    """[B, Lq, …] -> [chunks, B, q, …]."""
    x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(B, -1, size, *x.shape[2:]), 1, 0)

  @jax.checkpoint  # the backward pass makes a chunk's scores again
  def one(x):
    q, seen = x
    s = jnp.einsum("bqhgd,bjhd->bhgqj", q, k, preferred_element_type=jnp.float32) * scale
    if soft_cap is not None:
      s = soft_cap * jnp.tanh(s / soft_cap)
    seen = seen[:, None, None]
    some = seen.any(-1, keepdims=True)
    s = jnp.where(seen, s, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.where(some, s.max(-1, keepdims=True), 0))
    p = jnp.exp(s - top)
    total = jnp.where(some, p.sum(-1, keepdims=True), 1)
    out = jnp.einsum("bhgqj,bjhd->bqhgd", (p / total).astype(v.dtype), v, preferred_element_type=jnp.float32)
    lse = jnp.where(some, top + jnp.log(total), -jnp.inf)[..., 0]
    return out.astype(q.dtype), lse  # [B, q, h, G, Dv], [B, h, G, q]

  queries = chunks(q.reshape(B, lq, h, H // h, D))
  out, lse = jax.lax.map(one, (queries, chunks(jnp.broadcast_to(plan.seen, (B, *plan.lengths)))))
  out = jnp.moveaxis(out, 0, 1).reshape(B, -1, H, v.shape[3])[:, :lq]
  lse = jnp.moveaxis(lse, 0, 3).reshape(B, H, -1)[:, :, :lq]
  return checkpoint_name(out, "attn_out"), checkpoint_name(lse, "attn_lse")
