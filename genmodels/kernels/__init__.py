"""Interval attention, tile lists, chunked cross-entropy. See docs/masks.md."""

from genmodels.kernels import dense
from genmodels.kernels.attention import (
  attention,
  bounded,
  caution,
  explain,
  gradients,
  merge,
  plan,
  resolve,
  safe_tiles,
)
from genmodels.kernels.cross_entropy import chunked_map, nll, project
from genmodels.kernels.decode import DecodePlan, Segment, decode, decode_plan
from genmodels.kernels.target import Target, building_for, current
from genmodels.kernels.tiles import Plan, Tiles

__all__ = [
  "DecodePlan",
  "Plan",
  "Segment",
  "Target",
  "Tiles",
  "attention",
  "bounded",
  "building_for",
  "caution",
  "chunked_map",
  "current",
  "decode",
  "decode_plan",
  "dense",
  "explain",
  "gradients",
  "merge",
  "nll",
  "plan",
  "project",
  "resolve",
  "safe_tiles",
]
