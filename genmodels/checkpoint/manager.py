"""Checkpoints: asynchronous Orbax saves with digests, verified restores that fall back.

One step is one directory, committed by one rename, with three items:

  state    the arrays, as nested dicts named by their path in the state (OCDBT)
  digests  {leaf: shape, dtype, digest}, sealed with its own xxh3; without it a step is no checkpoint
  meta     whatever the caller records (resolved config, data plan digest, cursors), sealed likewise

The digests are taken from the device arrays before the save and compared with those of the restored
device arrays, so anything that goes wrong in between is seen: host memory, file system, bit rot.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import logging
import os
import pathlib
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from genmodels.checkpoint import verify
from genmodels.parallel import multihost
from genmodels.state import param_paths

logger = logging.getLogger(__name__)

QUARANTINE = "damaged"  # under the checkpoint directory: steps that failed verification


class RestoreError(ValueError):
  """No step could be restored although steps exist; or the state does not fit the checkpoint."""


class SaveError(RuntimeError):
  """A background save failed or missed its deadline."""


class _Damaged(Exception):
  """A step that cannot be trusted; the message names the leaf or file."""


class _Misfit(Exception):
  """A sound step of another state."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """What to keep, and how long a save may take.

  Fields:
    keep_last: newest steps kept; at least 2, so that a damaged newest step has an older one behind it.
    keep_every: also keep the steps that are multiples of it; 0 none.
    keep_best: also keep this many steps of lowest `metric`; 0 none.
    deadline_s: seconds that a save may take before the run is stopped with an error.
  """

  keep_last: int = 3
  keep_every: int = 0
  keep_best: int = 0
  deadline_s: float = 1800.0

  def __post_init__(self):
    if self.keep_last < 2:
      raise ValueError(
        f"keep_last = {self.keep_last}: with fewer than 2, one damaged file loses the run; set 2 or more"
      )
    for name in ("keep_every", "keep_best"):
      if getattr(self, name) < 0:
        raise ValueError(f"{name} = {getattr(self, name)}: 0 (off) or more")
    if self.deadline_s <= 0:
      raise ValueError(f"deadline_s = {self.deadline_s}: positive seconds")


@dataclasses.dataclass(frozen=True)
class Restored:
  """What a restore gives: the state (as the caller's tree), its step, the recorded meta."""

  state: Any
  step: int
  meta: Any


def nested(flat: Mapping[str, Any]) -> dict:
  """Nested dicts from '/'-joined names."""
  out: dict = {}
  for name, value in flat.items():
    *parents, last = name.split("/")
    node = out
    for p in parents:
      node = node.setdefault(p, {})
    node[last] = value
  return out


def _is_key(x) -> bool:
  return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _plain_spec(x) -> jax.ShapeDtypeStruct:
  """The stored form of an abstract leaf: typed keys are stored as their key data."""
  if not _is_key(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
  data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(x.shape, x.dtype))
  return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=x.sharding)


def _wrap_key(data: jax.Array, like) -> jax.Array:
  if not _is_key(like):
    return data
  impl = []  # of an abstract key: only a traced one says
  jax.eval_shape(lambda k: impl.append(jax.random.key_impl(k)), jax.ShapeDtypeStruct(like.shape, like.dtype))
  return jax.random.wrap_key_data(data, impl=impl[0])


class Manager:
  """Checkpoints of one directory; every process calls every method, in the same order.

  Args:
    directory: created if it does not exist, unless read_only.
    cfg: what to keep.
    read_only: never writes, moves or deletes anything there (another run's directory).
  """

  def __init__(
    self, directory: str | os.PathLike, cfg: CheckpointConfig = CheckpointConfig(), read_only=False
  ):
    self.directory = pathlib.Path(directory).absolute()
    self.cfg = cfg
    self.read_only = read_only
    self._orbax: ocp.CheckpointManager | None = None
    self._deadline: threading.Timer | None = None
    self._late: str | None = None
    self._pending = False

  # ------------------------------------------------------------------------------------------ saving

  def save(self, step: int, state: Any, meta: Any = None, metric: float | None = None) -> None:
    """Starts saving `state` as `step`; returns once the arrays may be changed or donated.

    Args:
      step: newer than every step present.
      state: pytree of jax Arrays (global ones, with several processes).
      meta: JSON value stored beside it.
      metric: what `keep_best` ranks by, lower is better.

    Raises:
      SaveError: an earlier save failed or was late.
      ValueError: the step exists, or a leaf is not an array of all processes.
    """
    if self.read_only:
      raise ValueError(f"{self.directory} is open for reading only: save step {step} elsewhere")
    self.check()
    self.wait()  # one save at a time: a second one would hold a second copy in host memory
    flat = param_paths(state)
    for name, x in flat.items():
      if not isinstance(x, jax.Array):
        raise ValueError(
          f"{name}: a {type(x).__name__}, expected a jax.Array; put it on the mesh before saving"
        )
      if jax.process_count() > 1 and x.is_fully_addressable:
        raise ValueError(
          f"{name}: an array of this process alone; with {jax.process_count()} processes every leaf lives on "
          f"the global mesh (jit with out_shardings, or make_array_from_callback)"
        )
    flat = {name: jax.random.key_data(x) if _is_key(x) else x for name, x in flat.items()}
    sums = verify.digest(flat)
    leaves = {name: d | {"digest": list(sums[name])} for name, d in verify.describe(flat).items()}
    orbax = self._manager()
    self._watch(step)
    self._pending = True
    orbax.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.PyTreeSave(nested(flat)),
        digests=ocp.args.JsonSave(verify.seal({"step": step, "leaves": leaves})),
        meta=ocp.args.JsonSave(verify.seal({"step": step, "meta": meta})),
      ),
      metrics=None if metric is None else {"metric": float(metric)},
      force=True,
    )

  def wait(self) -> None:
    """Blocks until the save in progress is durable.

    Raises:
      SaveError: it failed, or took longer than `deadline_s`.
    """
    if not self._pending:
      return
    try:
      while self._orbax.is_saving_in_progress() and not self._late:
        time.sleep(0.005)
      if self._late:
        raise SaveError(self._late)
      self._orbax.wait_until_finished()
      self._orbax.check_for_errors()
    except SaveError:
      raise
    except BaseException as e:
      raise SaveError(f"{self.directory}: the background save failed: {type(e).__name__}: {e}") from e
    finally:
      if not self._late:
        self._unwatch()
        self._pending = False

  def check(self) -> None:
    """Raises SaveError if a background save has failed or is late; costs nothing, call it every step."""
    if self._late:
      raise SaveError(self._late)
    if self._pending and not self._orbax.is_saving_in_progress():
      self.wait()

  def close(self) -> None:
    """Waits for the save in progress and lets go of the directory."""
    self.wait()
    if self._orbax is not None:
      self._orbax.close()
      self._orbax = None

  def _manager(self) -> ocp.CheckpointManager:
    if self._orbax is None:
      policies = [keep.LatestN(self.cfg.keep_last)]
      if self.cfg.keep_every:
        policies.append(keep.EveryNSteps(self.cfg.keep_every))
      if self.cfg.keep_best:
        policies.append(
          keep.BestN(
            get_metric_fn=lambda m: -m["metric"], n=self.cfg.keep_best, keep_checkpoints_without_metrics=False
          )
        )
      self._orbax = ocp.CheckpointManager(
        self.directory,
        options=ocp.CheckpointManagerOptions(
          preservation_policy=keep.AnyPreservationPolicy(policies),
          best_fn=(lambda m: -m["metric"]) if self.cfg.keep_best else None,  # makes Orbax store the metric
          cleanup_tmp_directories=True,  # what a kill inside a save left behind
          async_options=ocp.AsyncOptions(timeout_secs=max(1, int(self.cfg.deadline_s))),
        ),
      )
    return self._orbax

  def _watch(self, step: int) -> None:
    def late():
      self._late = (
        f"{self.directory}: the save of step {step} has not finished within {self.cfg.deadline_s:g} s "
        f"(checkpoint.deadline_s); the storage may hang. Older checkpoints are intact; restart the run"
      )
      logger.error("%s", self._late)
      faulthandler.dump_traceback(file=sys.__stderr__)

    self._unwatch()
    self._deadline = threading.Timer(self.cfg.deadline_s, late)
    self._deadline.daemon = True
    self._deadline.start()

  def _unwatch(self) -> None:
    if self._deadline is not None:
      self._deadline.cancel()
      self._deadline = None

  # --------------------------------------------------------------------------------------- restoring

  def steps(self) -> list[int]:
    """Steps that are committed and have digests, oldest first; process 0 looks, all agree."""
    return self._steps("digests")[0]

  def _steps(self, item: str) -> tuple[list[int], list[int]]:
    """Newest committed steps that have `item`, and those that lack it."""
    found: tuple[list[int], list[int]] = ([], [])
    if jax.process_index() == 0 and self.directory.is_dir():
      for d in self.directory.iterdir():
        if d.name.isdigit():
          found[0 if (d / item).is_dir() else 1].append(int(d.name))
    return tuple(json.loads(multihost.gather_text(json.dumps([sorted(f)[-48:] for f in found]))[0]))

  def latest(self) -> int | None:
    """The newest committed step, not yet verified; None if there is none."""
    steps = self.steps()
    return steps[-1] if steps else None

  def restore(self, abstract_state: Any, step: int | None = None) -> Restored | None:
    """The newest step that verifies, on the mesh of `abstract_state`'s shardings.

    A step that raises or whose digests differ, on any process, is named and the next older one is
    tried; once one verifies, those that did not are moved to `damaged/`, so that the run may save
    under their numbers. If none verifies nothing is moved.

    Args:
      abstract_state: pytree of ShapeDtypeStructs with shardings; the state comes back in its form.
      step: this step and no other.

    Returns:
      None if the directory has no steps.

    Raises:
      RestoreError: no step verifies; or a sound step holds another state (other leaves, shapes, dtypes).
    """
    self.wait()
    steps, bare = self._steps("digests")
    if bare:
      logger.warning("%s: steps %s have no digests, so they are no checkpoints", self.directory, bare)
    if step is not None:
      if step not in steps:
        raise RestoreError(f"{self.directory} has no step {step}; it has {steps or 'none'}")
      steps = [step]
    if not steps:
      self._set_aside(bare)
      return None
    flat = param_paths(abstract_state)
    treedef = jax.tree.structure(abstract_state)
    failures: dict[int, str] = {}
    for s in reversed(steps):
      values, meta, error = self._try(s, flat)
      if error is None:
        if failures:
          skipped = "; ".join(failures.values())
          logger.warning(
            "restored step %d of %s, the newest that verifies; skipped %s", s, self.directory, skipped
          )
        self._set_aside([*failures, *bare])
        leaves = [_wrap_key(values[name], like) for name, like in flat.items()]
        return Restored(jax.tree.unflatten(treedef, leaves), s, meta)
      failures[s] = f"step {s}: {error}"
      logger.error("checkpoint %s: step %d is not usable: %s", self.directory, s, error)
    raise RestoreError(
      f"{self.directory}: no checkpoint verifies. {'; '.join(failures.values())}. Nothing was changed there; "
      "repair it, or start in another workdir"
    )

  def recorded(self, step: int) -> dict[str, dict]:
    """{leaf: {"shape", "dtype", "digest"}} of a step, from its digests alone.

    Raises:
      RestoreError: they are missing or damaged.
    """
    path = self.directory / str(step) / "digests"
    try:
      return verify.unseal(_read_json(path), str(path))["leaves"]
    except (_Damaged, verify.SealError) as e:
      raise RestoreError(f"{self.directory}, step {step}: {e}") from None

  def read(self, step: int | None = None, shardings=None) -> tuple[dict[str, jax.Array], int, Any]:
    """Named arrays of the newest verified step as they were saved, whatever state they belonged to.

    Args:
      step: this step and no other.
      shardings: function (name, shape) → Sharding, or None to leave the array unread; default: all of
        them, whole on the first local device.

    Returns:
      {name: Array}, the step, the meta.

    Raises:
      RestoreError: no step, or none verifies.
    """
    steps = self.steps() if step is None else [step]
    if not steps or step is not None and step not in self.steps():
      raise RestoreError(f"{self.directory}: no checkpoint{'' if step is None else f' of step {step}'}")
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    failures = []
    for s in reversed(steps):
      values, meta, error = self._try(s, None, shardings or (lambda *_: one))
      if error is None:
        return values, s, meta
      failures.append(f"step {s}: {error}")
      logger.error("checkpoint %s: step %d is not usable: %s", self.directory, s, error)
    raise RestoreError(f"{self.directory}: no checkpoint verifies. " + "; ".join(failures))

  def _try(self, step: int, flat, shardings=None):
    """(values, meta, None) of one step, or (None, None, what is wrong), the same on all processes."""
    values = meta = None
    error, misfit = "", False
    try:
      values, meta, recorded = self._load(step, flat, shardings)
    except _Misfit as e:
      error, misfit = str(e), True
    except Exception as e:  # every kind of damage ends here: Orbax, TensorStore and JSON raise their own
      text = " ".join(str(e).split())
      error = text if isinstance(e, _Damaged | verify.SealError) else f"{type(e).__name__}: {text[:400]}"
    # One process may read what another cannot: nobody goes on alone.
    errors = multihost.gather_text(("!" if misfit else "") + error)
    if any(errors):
      where = next(i for i, e in enumerate(errors) if e)
      text = errors[where].lstrip("!")
      if errors[where].startswith("!"):
        raise RestoreError(f"{self.directory}, step {step}: {text}")
      return None, None, text + (f" (process {where})" if len(errors) > 1 else "")
    sums = verify.digest(values)
    wrong = [name for name, got in sums.items() if tuple(recorded[name]["digest"]) != got]
    if wrong:
      more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
      return None, None, f"leaf {wrong[0]}{more}: the restored bits do not have the digest taken at the save"
    return values, meta, None

  def _load(self, step: int, flat, shardings):
    """Reads one step, no verification of array bits; no barrier inside."""
    path = self.directory / str(step)
    digests = verify.unseal(_read_json(path / "digests"), f"{path}/digests")
    meta = verify.unseal(_read_json(path / "meta"), f"{path}/meta")
    if digests["step"] != step or meta["step"] != step:
      raise _Damaged(f"{path}: holds step {digests['step']} (digests) and {meta['step']} (meta)")
    recorded = digests["leaves"]
    if flat is not None:
      want = {name: _plain_spec(x) for name, x in flat.items()}
      _compare(recorded, verify.describe(want))
    else:
      placed = {name: shardings(name, tuple(d["shape"])) for name, d in recorded.items()}
      want = {
        name: jax.ShapeDtypeStruct(recorded[name]["shape"], recorded[name]["dtype"], sharding=sharding)
        for name, sharding in placed.items()
        if sharding is not None
      }
    # The handler itself, not the Checkpointer: that one waits at a barrier for processes that failed.
    handler = ocp.PyTreeCheckpointHandler()
    args = {
      name: ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=tuple(x.shape), dtype=x.dtype)
      for name, x in want.items()
    }
    tree = handler.restore(
      path / "state",
      args=ocp.args.PyTreeRestore(item=nested(want), restore_args=nested(args), partial_restore=flat is None),
    )
    values = param_paths(tree)
    missing = set(want) - set(values)
    if missing:
      raise _Damaged(f"{path}/state: leaf {min(missing)} is missing")
    return jax.block_until_ready({name: values[name] for name in want}), meta["meta"], recorded

  def _set_aside(self, steps: list[int]) -> None:
    """Moves steps that are no good to `damaged/`; deletes nothing."""
    if self.read_only or not steps:
      return
    if jax.process_index() == 0:
      target = self.directory / QUARANTINE
      target.mkdir(exist_ok=True)
      for step in steps:
        n = sum(1 for d in target.iterdir() if d.name.startswith(f"{step}-"))
        os.rename(self.directory / str(step), target / f"{step}-{n}")
    multihost.barrier("damaged steps set aside")
    if self._orbax is not None:
      self._orbax.reload()


def _read_json(directory: pathlib.Path) -> Any:
  path = directory / "metadata"
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    raise _Damaged(f"{path} is missing") from None
  except (json.JSONDecodeError, UnicodeDecodeError) as e:
    raise _Damaged(f"{path} is no JSON: {e}") from None


def _compare(recorded: Mapping[str, dict], want: Mapping[str, dict]) -> None:
  """Raises _Misfit if the stored leaves are not those that are wanted."""
  lines = []
  for name in sorted(set(recorded) | set(want)):
    if name not in want:
      lines.append(f"{name} is in the checkpoint only")
    elif name not in recorded:
      lines.append(f"{name} is not in the checkpoint")
    else:
      a, b = ({k: d[name][k] for k in ("shape", "dtype")} for d in (recorded, want))
      if a != b:
        lines.append(
          f"{name} is {a['dtype']}{a['shape']} in the checkpoint, {b['dtype']}{b['shape']} in this config"
        )
  if lines:
    more = f"; and {len(lines) - 6} more" if len(lines) > 6 else ""
    raise _Misfit(
      "the checkpoint holds another state: " + "; ".join(lines[:6]) + more + ". Use the config it was saved "
      "with, another workdir, or `init` to take over its parameters"
    )
