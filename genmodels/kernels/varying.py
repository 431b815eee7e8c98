"""Which mesh axes a value varies over, inside shard_map.

A checking shard_map wants loop carries and custom gradients of one kind: operands are made to vary
over the same axes before the custom_vjp, and the transpose of that step is the psum which a
replicated operand's gradient needs. Outside shard_map all of this does nothing.
"""

from __future__ import annotations

import jax

Array = jax.Array


def axes_of(tree) -> frozenset:
  """Mesh axes over which any leaf varies; empty outside a shard_map that checks."""
  kinds = [jax.typeof(x).manual_axis_type for x in jax.tree.leaves(tree)]
  return frozenset().union(*(k.varying for k in kinds if k is not None))


def vary(tree, axes: frozenset):
  """The same values, every leaf varying over `axes`."""

  def leaf(x):
    missing = tuple(sorted(axes - axes_of(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x

  return jax.tree.map(leaf, tree)
