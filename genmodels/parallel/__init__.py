"""Meshes, logical sharding rules, many processes.

`mesh.make_mesh` lays devices out, `rules` maps logical axis names to mesh axes, `multihost` starts
processes, says which rows each of them reads, and agrees on flags.
"""

from genmodels.parallel.mesh import AXES, MeshConfig, make_mesh
from genmodels.parallel.multihost import Preemption, agree, barrier, global_batch, initialize, row_ranges
from genmodels.parallel.rules import (
  RULES,
  Rules,
  batch_sharding,
  constrain,
  current_mesh,
  replicated,
  row_sharding,
  sharding_tree,
  use_mesh,
)

__all__ = [
  "AXES",
  "MeshConfig",
  "Preemption",
  "RULES",
  "Rules",
  "agree",
  "barrier",
  "batch_sharding",
  "constrain",
  "current_mesh",
  "global_batch",
  "initialize",
  "make_mesh",
  "replicated",
  "row_ranges",
  "row_sharding",
  "sharding_tree",
  "use_mesh",
]
