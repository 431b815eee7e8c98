"""The attention kernels as programs to compile ahead of time, and the bundles of their tile bodies.

Legend: B rows · L, Lq queries · Lk keys · H query heads · Hk key heads · D head size · T intervals.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from genmodels import kernels
from genmodels.aot.schedule import Compiled, Kernel
from genmodels.masks import AttnMask

FWD, DQ, DKV = KERNELS = ("interval_attention_fwd", "interval_attention_dq", "interval_attention_dkv")


def program(
  *,
  rows: int = 1,
  heads: int = 2,
  key_heads: int = 1,
  head_dim: int = 128,
  lengths: tuple[int, int] = (4096, 4096),
  terms: int = 2,
  shared: bool = True,
  tiles: dict | None = None,
  backward: bool = True,
  plan_inside: bool = False,
  soft_cap: float | None = None,
  dtype: str = "bfloat16",
):
  """Attention of the TPU kernels, forward alone or with all gradients (the LSE's cotangent included).

  Bodies do not depend on the mask, and the grid runs over as many entries as the plan has: one program
  stands for every mask of `terms` intervals.

  Args:
    rows, heads, key_heads, head_dim, lengths: B, H, Hk, D and (Lq, Lk); out [B, Lq, H, D].
    terms: T of the mask. shared: one mask row for all B.
    tiles: fields of the implementation's `Tiles`; its defaults for the chip by default.
    plan_inside: the program takes the mask and builds its own tile lists.

  Returns:
    (function, arguments), the arguments as ShapeDtypeStructs.
  """
  lq, lk = lengths
  shape = jax.ShapeDtypeStruct
  mask_rows = 1 if shared else rows
  bound = shape((mask_rows, terms, lq), jnp.int32)
  mask = AttnMask(shape((mask_rows, lk), jnp.int32), bound, bound)
  q, k = (shape((rows, n, h, head_dim), jnp.dtype(dtype)) for n, h in ((lq, heads), (lk, key_heads)))
  lse = shape((rows, heads, lq), jnp.float32)

  def planned(mask):
    return kernels.plan(mask, _tiles(tiles), "pallas_tpu")

  def forward(q, k, v, plan):
    return kernels.attention(q, k, v, plan, soft_cap=soft_cap, return_lse=True, implementation="pallas_tpu")

  def run(q, k, v, mask_or_plan, *cotangents):
    plan = planned(mask_or_plan) if plan_inside else mask_or_plan
    if not backward:
      return forward(q, k, v, plan)
    out, pull = jax.vjp(lambda *x: forward(*x, plan), q, k, v)
    return out, pull(cotangents)

  return run, (
    q,
    k,
    k,
    mask if plan_inside else jax.eval_shape(planned, mask),
    *((q, lse) if backward else ()),
  )


def _tiles(given: dict | None):
  from genmodels.kernels import pallas_tpu

  if given is None:
    return None
  return pallas_tpu.Tiles(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


@dataclasses.dataclass(frozen=True)
class Tile:
  """Static cost of an attention kernel, in bundles.

  Attributes:
    full, partial: a whole tile without and with the mask.
    parts: each part of a tile alone, with the mask: what a tile costs that is not met everywhere; () where
      tiles have one part.
    rest: everything else in the program, once each: grid control, DMA, first and last entry of a line.
    spills: vector stores for want of registers.
    mxu: share of matrix-product slots filled in `full`, `partial`.
  """

  full: int
  partial: int
  parts: tuple[int, ...]
  rest: int
  spills: int
  mxu: tuple[float, float]


def tile(kernel: Kernel, parts: int) -> Tile:
  """Names the bodies of a kernel: the unmasked straight line, the masked one, then one body a part.

  Args:
    parts: of its tiles, k / k_compute.

  Raises:
    ValueError: other bodies than the kernels are written to have.
  """
  wanted = 2 + (parts if parts > 1 else 0)
  if len(kernel.bodies) != wanted:
    got = [b.bundles for b in kernel.bodies]
    raise ValueError(f"{kernel.name}: {wanted} bodies expected of tiles in {parts} parts, bundles are {got}")
  full, partial, *each = kernel.bodies
  if full.used["VALU"] >= partial.used["VALU"]:
    raise ValueError(f"{kernel.name}: the second body does not do more vector work (the mask) than the first")
  inside = sum(b.bundles for b in kernel.bodies)
  return Tile(
    full.bundles,
    partial.bundles,
    tuple(b.bundles for b in each),
    kernel.bundles - inside,
    kernel.spills,
    (full.occupancy(), partial.occupancy()),
  )


def tiles_of(made: Compiled, parts: dict[str, int]) -> dict[str, Tile]:
  """`tile` of every attention kernel in a program; parts by kernel name."""
  return {name: tile(made.kernel(name), n) for name, n in parts.items()}
