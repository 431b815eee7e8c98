"""Every difference between the jax versions we support, in one place."""

from __future__ import annotations

import jax
from jax.sharding import AxisType


def make_mesh(shape, names, devices=None):
  """`jax.make_mesh` with Auto axes: 0.11 made Explicit the default, so the types are always named."""
  return jax.make_mesh(tuple(shape), tuple(names), (AxisType.Auto,) * len(names), devices=devices)


def shard_map(f, mesh, in_specs, out_specs, check=True):
  """`jax.shard_map` over all axes of `mesh`."""
  return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check)
