"""Interval attention, tile lists, chunked cross-entropy. See docs/masks.md."""

from genmodels.kernels.attention import attention, merge, resolve
from genmodels.kernels.cross_entropy import chunked_map, nll, project
from genmodels.kernels.tiles import Plan, Tiles, plan

__all__ = ["Plan", "Tiles", "attention", "chunked_map", "merge", "nll", "plan", "project", "resolve"]
