"""Interval attention, tile lists, chunked cross-entropy. See docs/masks.md."""

from genmodels.kernels.attention import attention, gradients, merge, plan, resolve
from genmodels.kernels.cross_entropy import chunked_map, nll, project
from genmodels.kernels.target import Target, building_for, current
from genmodels.kernels.tiles import Plan, Tiles

__all__ = [
  "Plan",
  "Target",
  "Tiles",
  "attention",
  "building_for",
  "chunked_map",
  "current",
  "gradients",
  "merge",
  "nll",
  "plan",
  "project",
  "resolve",
]
