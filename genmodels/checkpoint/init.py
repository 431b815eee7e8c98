"""Where a run's state comes from.

The order, stated once, and `initialise` follows it:

  1. own workdir   the newest verified checkpoint of this run: the same command continues
  2. resume        init.kind = "resume": another run's whole state, step and optimizer included
  3. init          init.kind = "workdir": parameters of another workdir, or of an imported folder
                   (`genmodels import`), through an InitRecipe; step 0
  4. scratch       fresh parameters; step 0

The first that applies is used, and `initialise` returns a line that says which.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from genmodels import config
from genmodels.checkpoint import folder, surgery
from genmodels.checkpoint.manager import Manager, RestoreError
from genmodels.state import param_paths

CHECKPOINTS = "checkpoints"  # of a workdir


def open_folder(path: str) -> Manager | folder.Folder:
  """The checkpoints of a workdir, or an imported folder, for reading.

  Raises:
    RestoreError: it has none.
  """
  root = pathlib.Path(path).expanduser()
  if folder.is_imported(root):
    return folder.Folder.open(root)
  manager = Manager(root / CHECKPOINTS if (root / CHECKPOINTS).is_dir() else root, read_only=True)
  if manager.latest() is None:
    raise RestoreError(f"{path} holds no checkpoint; expected {root / CHECKPOINTS}/<step> or {root}/<step>")
  return manager


@dataclasses.dataclass(frozen=True)
class Resume:
  """Goes on with another run: its whole state.

  Fields:
    path: its workdir.
    step: −1 the newest that verifies.
  """

  path: str
  step: int = -1


@dataclasses.dataclass(frozen=True)
class InitRecipe:
  """Parameters from another workdir or imported folder, changed on the way; everything is accounted for.

  Names are those inside a tree, '/'-joined ("layers/mlp/up/kernel"); patterns are regular expressions
  that match a whole name.

  Fields:
    path: workdir, or imported folder.
    step: −1 the newest that verifies.
    average: further steps of the same run; the parameters are the mean over `step` and these (checkpoint
      merging in place of a decay of the learning rate: Tian et al., "WSM", 2507.17634).
    tree: tree to read, "model" or "ema".
    to: trees that get it; () means "model", and "ema" where the run has one.
    rename: (pattern on this run's name, replacement) → name in the source.
    scratch: patterns of this run's leaves that keep fresh values (new heads, tables).
    drop: patterns of source leaves that are left behind.
    resize_vocab: allow another number of vocabulary rows: cut, or continued with fresh rows.
    mask_row: "" none, "reserved" or "mean_noise" (surgery.set_mask_row), on every leaf with a
      vocabulary axis.
    mask_id: the mask token's id; −1 with a mask_row is an error.
    reserved_id: for "reserved".
    seed: of the noise.
    beside: {tree: InitRecipe}, where networks beside the model (section `trees`) come from.

  Raises:
    ValueError: a mask row without ids, or an unknown kind of it.
  """

  path: str
  step: int = -1
  average: tuple[int, ...] = ()
  tree: str = "model"
  to: tuple[str, ...] = ()
  rename: tuple[tuple[str, str], ...] = ()
  scratch: tuple[str, ...] = ()
  drop: tuple[str, ...] = ()
  resize_vocab: bool = False
  mask_row: str = ""
  mask_id: int = -1
  reserved_id: int = -1
  seed: int = 0
  beside: dict = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    parts = {n: config.build(InitRecipe, s, f"init.beside.{n}") for n, s in sorted(self.beside.items())}
    object.__setattr__(self, "beside", parts)
    if self.mask_row not in ("", "reserved", "mean_noise"):
      raise ValueError(f"mask_row = {self.mask_row!r}: '', 'reserved' or 'mean_noise'")
    if self.average and (self.step < 0 or len({self.step, *self.average}) <= len(self.average)):
      raise ValueError(
        f"average is {self.average}; it takes different steps, and step is {self.step}: name one"
      )
    if self.mask_row and self.mask_id < 0:
      raise ValueError(f"mask_row = {self.mask_row!r} needs mask_id, the id of the mask token")
    if self.mask_row == "reserved" and self.reserved_id < 0:
      raise ValueError("mask_row = 'reserved' needs reserved_id, an id that the pretraining left unused")

  def load(
    self, fresh: dict[str, jax.Array], axes: dict[str, tuple] | None
  ) -> tuple[dict[str, jax.Array], int, Any]:
    """The leaves of one tree.

    Args:
      fresh: {name: array} of a fresh tree, whose shapes, dtypes and shardings the result has.
      axes: {name: logical axes}; needed to resize the vocabulary or to set a mask row.

    Returns:
      {name: array}, the step they were saved at, and what was saved beside them.

    Raises:
      RestoreError: no such tree, nothing verifies, or a shape differs.
      CoverageError: a leaf on either side is not accounted for.
    """
    if axes is None and (self.mask_row or self.resize_vocab):
      raise ValueError("mask_row and resize_vocab need the logical axes of the parameters")
    axes = axes or {}
    manager = open_folder(self.path)
    step = manager.latest() if self.step < 0 else self.step
    prefix = f"trees/{self.tree}/"
    recorded = {n.removeprefix(prefix): d for n, d in manager.recorded(step).items() if n.startswith(prefix)}
    if not recorded:
      trees = sorted({n.split("/")[1] for n in manager.recorded(step) if n.startswith("trees/")})
      raise RestoreError(f"{self.path}, step {step}: no tree {self.tree!r}; it has {trees}")
    mapping = surgery.cover(list(fresh), list(recorded), self.rename, self.scratch, self.drop)
    for name, source in mapping.items():
      have, want = tuple(recorded[source]["shape"]), fresh[name].shape
      axis = surgery.vocab_axis(axes, name)
      other = [
        i for i in range(max(len(have), len(want))) if i >= min(len(have), len(want)) or have[i] != want[i]
      ]
      if other and not (self.resize_vocab and other == [axis]):
        fix = (
          "set init.resize_vocab=True" if other == [axis] else "rename, or list it in `scratch` and `drop`"
        )
        raise RestoreError(f"{self.path}: {source} is {list(have)}, this run's {name} is {list(want)}; {fix}")
    users: dict[str, list[str]] = {}
    for name, source in mapping.items():
      users.setdefault(source, []).append(name)

    def place(name, shape):
      for target in users.get(name.removeprefix(prefix) if name.startswith(prefix) else "", ()):
        sharding = fresh[target].sharding
        if fresh[target].shape == shape or not isinstance(sharding, NamedSharding):
          return sharding
        return NamedSharding(sharding.mesh, PartitionSpec())  # other rows: whole, until it is cut
      return None

    values, step, meta = manager.read(None if self.step < 0 else self.step, place)
    for more, at in enumerate(self.average, 2):  # one at a time: no more than two trees in memory
      other = manager.read(at, place)[0]
      mean = jax.jit(lambda x, y, n: x + (y - x) / n, donate_argnums=0)
      values = {n: mean(x, other[n], np.float32(more)) for n, x in values.items()}
    out = dict(fresh)
    for name, source in mapping.items():
      out[name] = self._fit(name, values[prefix + source], fresh[name], surgery.vocab_axis(axes, name))
    return out, step, meta

  def _fit(self, name: str, value: jax.Array, fresh: jax.Array, axis: int | None) -> jax.Array:
    """One leaf with this run's rows, dtype and sharding, mask row set."""
    key = np.uint32(self.seed), np.uint32(zlib.crc32(name.encode()))

    def fit(value, fresh):
      if value.shape != fresh.shape:
        value = surgery.resize_rows(value, fresh, axis)
      if self.mask_row and axis is not None:
        k = jax.random.fold_in(jax.random.key(key[0]), key[1])
        value = surgery.set_mask_row(value, axis, self.mask_id, self.mask_row, k, self.reserved_id)
      return value.astype(fresh.dtype)

    if value.shape == fresh.shape and value.dtype == fresh.dtype and not (self.mask_row and axis is not None):
      return value
    return jax.jit(fit, out_shardings=fresh.sharding)(value, fresh)


REGISTRY = {"resume": Resume, "workdir": InitRecipe}


def initialise(
  manager: Manager,
  abstract: Any,
  make: Callable[[], Any],
  section: Any = None,
  steps: int = 0,
  *,
  axes: Any = None,
  rebuild: Callable[..., Any] | None = None,
  others: Mapping[str, Any] | None = None,
  cfg: Mapping[str, Any] | None = None,
) -> tuple[Any, str]:
  """The state to start from, by the order in the module's docstring.

  Args:
    manager: checkpoints of the run's own workdir.
    abstract: the state as ShapeDtypeStructs with shardings.
    make: () → a fresh state, on its shardings.
    section: the config's `init` section, {} or None for none.
    steps: length of the run, for the message only.
    axes: logical axes of the parameters (tree of tuples), for vocabulary surgery.
    rebuild: {tree: parameters} → state; needed where the optimizer's state depends on the parameters
      (schedule-free keeps a copy of them). Where leaves keep fresh values, their names {tree: set} come
      second.
    others: {network beside the model: its logical axes}.
    cfg: the run's whole config, plain. The line then names what differs from the config saved with the
      checkpoint: everything of a run that goes on, the model's of one that is initialised. No shape shows
      another RoPE base or learning rate.

  Returns:
    The state, and a line that says where it comes from.

  Raises:
    ConfigError: a wrong `init` section.
    RestoreError: checkpoints exist and none verifies, or they hold another state.
  """
  source = config.build_kind(REGISTRY, section, "init") if section else None
  restored = manager.restore(abstract)
  if restored is not None:
    done = " (the run is complete)" if steps and restored.step >= steps else ""
    ignored = "; `init` does not apply" if source is not None else ""
    changed = _changed(restored.meta, cfg)
    return (
      restored.state,
      f"continuing from {manager.directory}, step {restored.step}{done}{ignored}{changed}",
    )
  if isinstance(source, Resume):
    other = open_folder(source.path)
    restored = other.restore(abstract, None if source.step < 0 else source.step)
    changed = _changed(restored.meta, cfg)
    return (
      restored.state,
      f"resuming {other.directory}, step {restored.step}, in a workdir of its own{changed}",
    )
  if source is None:
    return make(), "from scratch"

  state = make()
  names = source.to or tuple(t for t in ("model", "ema") if t in state.trees)
  for key, wanted in (("to", names), ("beside", tuple(source.beside))):
    unknown = [t for t in wanted if t not in state.trees]
    if unknown:
      raise config.ConfigError(
        f"the run has the trees {sorted(state.trees)}",
        key=f"init.{key}",
        value=unknown,
        fix="name trees of this run",
      )
  flat = lambda axes: None if axes is None else param_paths(axes, is_leaf=_is_axes)
  recipes = [(tree, source, flat(axes)) for tree in names]
  recipes += [(tree, recipe, flat((others or {}).get(tree))) for tree, recipe in source.beside.items()]
  trees, loaded, steps_at, metas, kept = dict(state.trees), {}, {}, {}, {}
  for tree, recipe, flat_axes in recipes:
    fresh = param_paths(state.trees[tree])
    structure = id(recipe), *((n, x.shape, x.dtype, x.sharding) for n, x in fresh.items())
    if structure not in loaded:
      leaves, steps_at[id(recipe)], metas[id(recipe)] = recipe.load(fresh, flat_axes)
      loaded[structure] = leaves
    else:
      leaves = {n: x.copy() for n, x in loaded[structure].items()}  # own buffers: both may be donated
    if recipe.scratch:
      kept[tree] = {n for n in fresh if any(re.fullmatch(p, n) for p in recipe.scratch)}
    trees[tree] = jax.tree.unflatten(jax.tree.structure(state.trees[tree]), [leaves[n] for n in fresh])
  step = steps_at[id(source)]
  if rebuild is not None:
    state = rebuild(trees, kept) if kept else rebuild(trees)
  else:
    _check_independent(state)
    state = state.replace(trees=trees)
  averaged = f" averaged with {', '.join(map(str, source.average))}" if source.average else ""
  what = f"{', '.join(names)} from {source.tree!r} of {source.path}, step {step}{averaged}"
  extras = [f"mask row {source.mask_id} ({source.mask_row})"] if source.mask_row else []
  extras += [f"fresh: {', '.join(source.scratch)}"] if source.scratch else []
  extras += [f"left behind: {', '.join(source.drop)}"] if source.drop else []
  extras += [f"{t} from {r.tree!r} of {r.path}, step {steps_at[id(r)]}" for t, r in source.beside.items()]
  return state, "; ".join([what, *extras]) + _changed(metas[id(source)], cfg, "model")


def _changed(meta: Any, cfg: Mapping[str, Any] | None, section: str = "", most: int = 8) -> str:
  """ "; changed since: …", or "" where nothing did or nothing is known."""
  saved = meta.get("config") if isinstance(meta, Mapping) else None
  if not saved or cfg is None:
    return ""
  if section:
    saved, cfg = saved.get(section, {}), cfg.get(section, {})
  found = config.differences(saved, cfg, section)
  more = [f"and {len(found) - most} more"] if len(found) > most else []
  return f"; changed since: {', '.join([*found[:most], *more])}" if found else ""


def _is_axes(x: Any) -> bool:
  return isinstance(x, tuple) or x is None


def _check_independent(state: Any) -> None:
  """Raises if the fresh optimizer state is not zero where it has the shape of the parameters."""
  params = {tuple(n.split("/")): x.shape for n, x in param_paths(state.trees["model"]).items()}
  for name, x in param_paths(state.opt).items():
    parts = tuple(name.split("/"))
    same = any(params.get(parts[i:]) == x.shape for i in range(len(parts)))
    if same and x.size and bool(jax.jit(lambda x: (x != 0).any())(x)):
      raise ValueError(f"optimizer state {name} is made from the parameters: pass `rebuild` to initialise")


def load_tree(path: str, tree: str, abstract: Any, step: int = -1) -> tuple[Any, int]:
  """One tree of a workdir's newest verified checkpoint, for sampling and evaluation.

  Args:
    path: workdir, imported folder, or directory of checkpoints.
    tree: "model", "ema", …
    abstract: the tree as ShapeDtypeStructs with shardings.
    step: −1 the newest that verifies.

  Returns:
    The tree, and the step it was saved at.

  Raises:
    RestoreError, CoverageError: as InitRecipe.load.
  """
  recipe = InitRecipe(path, step=step, tree=tree)
  flat = param_paths(abstract)
  leaves, at, _ = recipe.load(flat, None)
  return jax.tree.unflatten(jax.tree.structure(abstract), [leaves[n] for n in flat]), at
