"""The training state: one pytree with everything that a step reads and writes.

Noise is no part of it: noise is a function of (seed, step, example), so the step counter is the
whole random state and a resumed run draws what the uninterrupted run would have drawn.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genmodels.contracts import Array, pytree

Mesh = jax.sharding.Mesh
NamedSharding = jax.sharding.NamedSharding
PartitionSpec = jax.sharding.PartitionSpec


@pytree()
class TrainState:
  """What a checkpoint holds.

  Fields:
    step: int32[], optimizer steps taken or skipped, which is also the index of the next batch.
    trees: {name: parameters}; "model" is trained, others are trained by further players ("policy", "critic"),
      follow ("ema") or stand still ("teacher").
    opt: {player: optax state}, over the tree or the trees that the player trains.
    stats: {name: arrays} that no gradient moves: the skip-step statistics; the objective's under "objective".
  """

  step: Array
  trees: dict[str, Any]
  opt: dict[str, Any]
  stats: dict[str, Any]


def owned(trees: dict[str, Any], names: tuple[str, ...]) -> Any:
  """What a player trains: a tree, or {tree: parameters} of several."""
  return trees[names[0]] if len(names) == 1 else {name: trees[name] for name in names}


def create(
  trees: dict[str, Any],
  txs: dict[str, Any],
  stats: dict[str, Any] | None = None,
  owns: dict[str, tuple[str, ...]] | None = None,
) -> TrainState:
  """A state at step 0; jit it with `out_shardings` so that every leaf is born where it belongs.

  Args:
    trees: {name: parameters}.
    txs: {player: optax transformation}.
    stats: initial statistics.
    owns: {player: names of the trees it trains}; one that is not named trains the tree of its own name.

  Raises:
    ValueError: a player trains a tree that is not there.
  """
  owns = {player: (owns or {}).get(player, (player,)) for player in txs}
  for player, names in owns.items():
    if not set(names) <= set(trees):
      raise ValueError(
        f"player {player!r} trains no tree of {sorted(trees)}; name the player after one, or name its trees"
      )
  opt = {player: tx.init(owned(trees, owns[player])) for player, tx in txs.items()}
  return TrainState(jnp.zeros([], jnp.int32), dict(trees), opt, dict(stats or {}))


def abstract(make: Callable[..., TrainState], *args, shardings: TrainState | None = None) -> TrainState:
  """The state that make(*args) would return, as ShapeDtypeStructs (no memory, nothing compiled).

  Args:
    make: a function that returns a TrainState, e.g. `lambda p: create({"model": p}, {"model": tx})`.
    args: its arguments, arrays or ShapeDtypeStructs.
    shardings: a TrainState of NamedShardings to attach, as a restore onto a mesh wants them.
  """
  out = jax.eval_shape(make, *args)
  if shardings is None:
    return out
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), out, shardings)


def step_key(seed: int, step: Array) -> Array:
  """The key of the draws that belong to a step and not to an example (dropout, per-batch draws)."""
  return jax.random.fold_in(jax.random.key(seed), step)


def like_params(tree: Any, abstract_params: Any, param_shardings: Any, mesh: Mesh) -> Any:
  """Shardings for a tree derived from the parameters: optimizer moments, averages, factored moments.

  A leaf belongs to the parameter whose path is the longest suffix of the leaf's path. With equal
  shapes it takes the parameter's sharding; factored moments (Adafactor's `v_row`, `v_col`, which
  drop the largest and the second largest axis) take it without the dropped axis; all else (counts,
  placeholders of shape [1]) is replicated.

  Args:
    tree: pytree of arrays or ShapeDtypeStructs whose parameter-shaped parts keep the nesting of
      the parameters.
    abstract_params: the parameters (shapes).
    param_shardings: NamedShardings, same structure as abstract_params.
    mesh: the mesh of the replicated leaves.

  Returns:
    NamedShardings, same structure as tree.
  """
  shapes = jax.tree_util.tree_flatten_with_path(abstract_params)[0]
  specs = jax.tree.leaves(param_shardings, is_leaf=lambda x: isinstance(x, NamedSharding))
  if len(shapes) != len(specs):
    raise ValueError(f"param_shardings has {len(specs)} leaves, abstract_params {len(shapes)}: not one model")
  known = {_names(path): (leaf.shape, s) for (path, leaf), s in zip(shapes, specs)}
  replicated = NamedSharding(mesh, PartitionSpec())

  def place(path, leaf):
    names = _names(path)
    for start in range(len(names)):
      if names[start:] in known:
        return _project(names[:start], leaf.shape, *known[names[start:]], replicated)
    return replicated

  return jax.tree_util.tree_map_with_path(place, tree)


def shardings(
  abstract_state: TrainState,
  param_shardings: dict[str, Any],
  mesh: Mesh,
  owns: dict[str, tuple[str, ...]] | None = None,
) -> TrainState:
  """NamedShardings of a whole state.

  Args:
    abstract_state: from `abstract`.
    param_shardings: {tree: NamedShardings}; a tree without an entry takes those of "model" where
      paths and shapes agree (an EMA), and is replicated elsewhere.
    mesh: the device mesh.
    owns: as of `create`.

  Returns:
    TrainState of NamedShardings: trees as given, optimizer states like their player's tree,
    step and stats replicated.
  """
  rep = NamedSharding(mesh, PartitionSpec())

  def tree(name, value):
    if name in param_shardings:
      return param_shardings[name]
    return like_params(value, abstract_state.trees["model"], param_shardings["model"], mesh)

  trees = {name: tree(name, value) for name, value in abstract_state.trees.items()}
  own = lambda what, player: owned(what, (owns or {}).get(player, (player,)))
  opt = {
    p: like_params(o, own(abstract_state.trees, p), own(trees, p), mesh)
    for p, o in abstract_state.opt.items()
  }
  return TrainState(rep, trees, opt, jax.tree.map(lambda _: rep, abstract_state.stats))


def param_paths(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> collections.OrderedDict[str, Any]:
  """{'/'-joined path: leaf} in flattening order; what path regexes in configs are matched against."""
  flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
  return collections.OrderedDict(("/".join(_names(path)), leaf) for path, leaf in flat)


def _names(path) -> tuple[str, ...]:
  return tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def _project(prefix, shape, param_shape, sharding, replicated):
  """The sharding of a leaf that belongs to a parameter."""
  if tuple(shape) == tuple(param_shape):
    return sharding
  drop = {"v_row": -1, "v_col": -2}.get(prefix[-1] if prefix else "")
  if drop is None or len(shape) != len(param_shape) - 1:
    return replicated
  # optax factors over the two largest axes (np.argsort order settles ties) and drops one of them.
  axis = int(np.argsort(param_shape)[drop])
  if tuple(shape) != tuple(param_shape[:axis]) + tuple(param_shape[axis + 1 :]):
    return replicated
  spec = tuple(sharding.spec) + (None,) * (len(param_shape) - len(sharding.spec))
  return NamedSharding(sharding.mesh, PartitionSpec(*spec[:axis], *spec[axis + 1 :]))
