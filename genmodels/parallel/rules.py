"""Logical axis names → mesh axes: one table for parameters, one for activations, one function each.

A parameter (or activation) carries a tuple of logical names, one per dimension, None for none. The
mesh in use is a context (`use_mesh`); without one every function here does nothing, so that model
code runs unchanged on one device.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

logger = logging.getLogger(__name__)

BATCH_AXES = ("data", "fsdp")

# Logical name → mesh axis, axes, or None (whole on every device).
TABLE: dict[str, str | tuple[str, ...] | None] = {
  # parameters
  "layers": None,  # the scanned axis
  "embed": "fsdp",  # model width
  "vocab": "tensor",
  "heads": "tensor",
  "kv_heads": "tensor",
  "head_dim": None,
  "qkv": None,
  "mlp": "tensor",
  "norm": None,
  "expert": "fsdp",  # stacked experts; gathered for use, see models.moe
  "expert_embed": None,  # model width inside an expert: fsdp splits the experts instead
  "lora": None,
  "pos": None,  # learned positions and other short tables
  "cond": None,
  # activations
  "batch": BATCH_AXES,
  "seq": "context",
  "act_embed": None,
  "act_heads": "tensor",
  "act_kv_heads": "tensor",
  "act_mlp": "tensor",
  "act_vocab": "tensor",
}


@dataclasses.dataclass(frozen=True)
class Rules:
  """The rule table and the logical axes that may stay whole where they do not divide.

  Fields:
    table: logical name → mesh axis, tuple of mesh axes, or None.
    replicate: logical names whose rule is dropped, and listed, where the mesh axis does not divide
      the dimension (8 KV heads on 16 tensor shards).
  """

  table: Mapping[str, str | tuple[str, ...] | None] = dataclasses.field(default_factory=lambda: dict(TABLE))
  replicate: tuple[str, ...] = ("kv_heads",)

  def axes(self, name: str | None) -> tuple[str, ...]:
    """The mesh axes of a logical name.

    Raises:
      ValueError: the name has no rule.
    """
    if name is None:
      return ()
    if name not in self.table:
      raise ValueError(f"logical axis {name!r} has no rule; known: {', '.join(sorted(self.table))}")
    rule = self.table[name]
    return () if rule is None else (rule,) if isinstance(rule, str) else tuple(rule)


RULES = Rules()


def _is_axes(x: Any) -> bool:
  return x is None or (isinstance(x, tuple) and all(a is None or isinstance(a, str) for a in x))


def path_name(path) -> str:
  """'/'-joined name of a pytree path."""
  return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def partition_spec(mesh: Mesh, axes, shape, where: str, rules: Rules = RULES, dropped: list | None = None):
  """The PartitionSpec of one array.

  Args:
    axes: one logical name (or None) per dimension; None for an array that is whole everywhere.
    shape: its shape.
    where: the array's name, for errors.
    dropped: takes a line for every rule that was dropped because `rules.replicate` allows it.

  Raises:
    ValueError: rank, an unknown name, a mesh axis used twice, or a size that does not divide.
  """
  if axes is None:
    return PartitionSpec()
  if len(axes) != len(shape):
    raise ValueError(
      f"{where}: logical axes {axes} name {len(axes)} dimensions, the shape {tuple(shape)} has {len(shape)}"
    )
  used: dict[str, str] = {}
  spec = []
  for i, (name, size) in enumerate(zip(axes, shape)):
    try:
      mesh_axes = tuple(a for a in rules.axes(name) if mesh.shape[a] > 1)
    except ValueError as e:
      raise ValueError(f"{where}: {e}") from None
    ways = math.prod(mesh.shape[a] for a in mesh_axes)
    on = " × ".join(f"{a}={mesh.shape[a]}" for a in mesh_axes)
    if size % ways:
      if name not in rules.replicate:
        raise ValueError(
          f"{where}: axis {i} ({name}) of size {size} does not divide over mesh axis {on}; pad {name} to a "
          f"multiple of {ways}, choose a mesh axis that divides {size}, or declare replicate=({name!r},)"
        )
      if dropped is not None:
        dropped.append(f"{where}: axis {i} ({name}) of size {size} stays whole on {on}")
      mesh_axes = ()
    for a in mesh_axes:
      if a in used:
        raise ValueError(
          f"{where}: axes {used[a]!r} and {name!r} both map to mesh axis {a!r}; give one of them another "
          f"logical name, or None"
        )
      used[a] = name
    spec.append(mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes or None)
  return PartitionSpec(*spec)


def sharding_tree(mesh: Mesh, logical_axes, shapes, rules: Rules = RULES, dropped: list[str] | None = None):
  """NamedShardings of a tree of parameters.

  Args:
    logical_axes: pytree whose leaves are tuples of logical names (or None: whole everywhere).
    shapes: pytree of the same structure, leaves with `.shape`.
    dropped: as in `partition_spec`; the lines are logged too.

  Returns:
    The structure of `shapes` with NamedShardings.

  Raises:
    ValueError: as `partition_spec`, or a leaf without logical axes.
  """
  axes = {path_name(p): a for p, a in jax.tree_util.tree_flatten_with_path(logical_axes, is_leaf=_is_axes)[0]}
  leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes)
  lines: list[str] = []
  out = []
  for path, leaf in leaves:
    name = path_name(path)
    if name not in axes:
      raise ValueError(
        f"{name}: no logical axes for this leaf of shape {tuple(leaf.shape)}; known leaves: {len(axes)}"
      )
    out.append(NamedSharding(mesh, partition_spec(mesh, axes[name], leaf.shape, name, rules, lines)))
  for line in lines:
    logger.info("sharding: %s", line)
  if dropped is not None:
    dropped.extend(lines)
  return jax.tree.unflatten(treedef, out)


_mesh: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("genmodels_mesh", default=None)


@contextlib.contextmanager
def use_mesh(mesh: Mesh | None):
  """Makes `mesh` the current one: `constrain` speaks of it, and jit retraces when it changes.

  It sets the abstract mesh only: arrays made outside jit stay on one device, so a computation that
  one process makes for itself (a sample, a log line) never turns into a collective.
  """
  token = _mesh.set(mesh)
  try:
    if mesh is None:
      yield None
    else:
      with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield mesh
  finally:
    _mesh.reset(token)


def current_mesh() -> Mesh | None:
  """The mesh of the innermost `use_mesh`, or None."""
  return _mesh.get()


def constrain(x: jax.Array, logical_axes, rules: Rules = RULES) -> jax.Array:
  """`with_sharding_constraint` by logical names under the current mesh; changes no value.

  Without a mesh, or inside a `shard_map` for the axes that are manual there, nothing happens. A hint
  to the compiler, hence lenient where `sharding_tree` is strict: a mesh axis that does not divide the
  dimension, or that an earlier dimension took, is skipped.

  Raises:
    ValueError: wrong rank or unknown name.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  if len(logical_axes) != x.ndim:
    raise ValueError(f"constrain: logical axes {logical_axes} for an array of shape {x.shape}")
  taken = set(mesh.manual_axes)
  spec = []
  for name, size in zip(logical_axes, x.shape):
    axes = tuple(a for a in rules.axes(name) if mesh.shape.get(a, 1) > 1 and a not in taken)
    if size % math.prod(mesh.shape[a] for a in axes):
      axes = ()
    taken.update(axes)
    spec.append(axes or None)
  if len(taken) == len(mesh.manual_axes) and mesh.manual_axes:
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Arrays [B, N, …] of a batch: rows over data × fsdp, tokens over context."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES, "context"))


def row_sharding(mesh: Mesh) -> NamedSharding:
  """Arrays [B, …] of a batch that have no token axis (document tables): rows over data × fsdp."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """Whole on every device."""
  return NamedSharding(mesh, PartitionSpec())
