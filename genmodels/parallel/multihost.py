"""Many processes: start-up, who reads which rows, global batches, agreement, preemption."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import threading
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from genmodels.parallel import rules

logger = logging.getLogger(__name__)

# Arrays of a batch with a token axis; all others are per row or per document.
TOKEN_ARRAYS = ("tokens", "doc", "role", "modality", "index", "pos")


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
  """How processes find each other.

  Fields:
    processes: number of processes; 0 = the cluster's environment says (TPU pods, Slurm), 1 = alone.
    process_id: which one this is; −1 = the environment says.
    coordinator: host:port of process 0; "" = the environment says.
    heartbeat_s: seconds without a heartbeat after which a process counts as dead and all abort.
    start_s: seconds to wait for all processes at start.
    shutdown_s: seconds to wait for all processes at exit.
  """

  processes: int = 1
  process_id: int = -1
  coordinator: str = ""
  heartbeat_s: int = 100
  start_s: int = 300
  shutdown_s: int = 300

  def __post_init__(self):
    if self.processes < 0:
      raise ValueError(f"processes = {self.processes}: 0 (from the environment), 1 (alone) or more")
    if self.processes > 1 and not self.coordinator:
      raise ValueError("processes > 1 needs coordinator='host:port'; or processes=0 for the environment's")
    if self.processes > 1 and not 0 <= self.process_id < self.processes:
      raise ValueError(f"process_id = {self.process_id} is not in 0 … {self.processes - 1}")
    for name in ("heartbeat_s", "start_s", "shutdown_s"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} = {getattr(self, name)}: at least 1 second")


ENVIRONMENT = "GENMODELS_DISTRIBUTED"  # the fields of DistributedConfig as JSON; launchers set it


def from_environment() -> DistributedConfig:
  """What the launcher wrote into the environment; one process if it wrote nothing.

  Raises:
    ValueError: unknown fields or broken values.
  """
  text = os.environ.get(ENVIRONMENT, "{}")
  try:
    return DistributedConfig(**json.loads(text))
  except (TypeError, ValueError) as e:
    raise ValueError(
      f"environment variable {ENVIRONMENT}={text!r}: {e}; it holds the JSON of a launcher"
    ) from e


def initialize(cfg: DistributedConfig | None = None) -> None:
  """Connects this process to the others; call before anything touches a device. One process: nothing.

  Args:
    cfg: default: `from_environment()`.

  On CPU the collectives between processes run over gloo.
  """
  cfg = from_environment() if cfg is None else cfg
  if cfg.processes == 1:
    return
  if (jax.config.jax_platforms or "").split(",")[0] in ("cpu", ""):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(
    coordinator_address=cfg.coordinator or None,
    num_processes=cfg.processes or None,
    process_id=cfg.process_id if cfg.process_id >= 0 else None,
    heartbeat_timeout_seconds=cfg.heartbeat_s,
    initialization_timeout=cfg.start_s,
    shutdown_timeout_seconds=cfg.shutdown_s,
  )
  logger.info(
    "process %d of %d, %d devices here", jax.process_index(), jax.process_count(), jax.local_device_count()
  )


def row_ranges(sharding: Sharding, batch: int, devices: Sequence | None = None) -> list[tuple[int, int]]:
  """The rows of the global batch that a set of devices holds, as sorted disjoint half-open ranges.

  They are what the *sharding* says, never the n-th part: on real topologies the devices of one host
  are scattered over the batch axes, and under tensor or context axes several hosts hold the same rows.

  Args:
    sharding: of the batch; only its split of axis 0 matters.
    batch: rows of the global batch.
    devices: default: the devices of this process.

  Raises:
    ValueError: the batch does not divide over the batch axes.
  """
  try:
    if devices is None:
      indices = sharding.addressable_devices_indices_map((batch,) + (1 << 20,))
    else:
      every = sharding.devices_indices_map((batch,) + (1 << 20,))
      indices = {d: every[d] for d in devices}
  except ValueError as e:
    shape = dict(getattr(getattr(sharding, "mesh", None), "shape", {}))
    raise ValueError(
      f"batch of {batch} rows does not divide over the batch axes of mesh {shape}; choose batch_size as a "
      f"multiple of data × fsdp"
    ) from e
  spans = sorted({index[0].indices(batch)[:2] for index in indices.values()})
  merged: list[tuple[int, int]] = []
  for lo, hi in spans:
    if merged and lo <= merged[-1][1]:
      merged[-1] = (merged[-1][0], max(hi, merged[-1][1]))
    else:
      merged.append((lo, hi))
  return merged


def _local(index: slice, ranges, batch: int) -> slice:
  """Rows [lo, hi) of the global batch as rows of the concatenated ranges."""
  lo, hi, _ = index.indices(batch)
  start = 0
  for a, b in ranges:
    if a <= lo and hi <= b:
      return slice(start + lo - a, start + hi - a)
    start += b - a
  raise ValueError(f"rows {lo}:{hi} of the batch are not among the rows {ranges} of this process")


def global_batch(rows: Mapping[str, np.ndarray], mesh, batch: int) -> dict[str, jax.Array]:
  """Global arrays from this process's rows.

  Args:
    rows: {name: array [b, …]}, the rows of `row_ranges(batch_sharding(mesh), batch)`, concatenated in
      that order. Names in TOKEN_ARRAYS have a token axis [b, N, …], split over context; others do not.
    mesh: the mesh.
    batch: rows of the global batch.

  Returns:
    {name: Array [batch, …]}, each device with exactly its rows.

  Raises:
    ValueError: an array does not have this process's number of rows.
  """
  ranges = row_ranges(rules.row_sharding(mesh), batch)
  expected = sum(hi - lo for lo, hi in ranges)
  out = {}
  for name, local in rows.items():
    if local.shape[0] != expected:
      raise ValueError(
        f"batch array {name!r} has {local.shape[0]} rows, this process holds {expected} of {batch}: {ranges}"
      )
    sharding = rules.batch_sharding(mesh) if name in TOKEN_ARRAYS else rules.row_sharding(mesh)
    out[name] = jax.make_array_from_callback(
      (batch, *local.shape[1:]),
      sharding,
      lambda index, local=local: local[(_local(index[0], ranges, batch), *index[1:])],
    )
  return out


def whole_batch(rows: Mapping[str, np.ndarray], mesh) -> dict[str, jax.Array]:
  """`global_batch` of a batch that every process has whole: {name: array [batch, …]}."""
  batch = len(next(iter(rows.values())))
  ranges = row_ranges(rules.row_sharding(mesh), batch)
  mine = {k: np.concatenate([v[lo:hi] for lo, hi in ranges]) for k, v in rows.items()}
  return global_batch(mine, mesh, batch)


def agree(flag: bool) -> bool:
  """True if `flag` is true on every process: one all-gather, and every process must call it."""
  if jax.process_count() == 1:
    return bool(flag)
  return bool(np.all(multihost_utils.process_allgather(np.array(flag, np.int32))))


def gather_text(text: str, width: int = 1024) -> list[str]:
  """The (cut) text of every process, on every process."""
  if jax.process_count() == 1:
    return [text]
  data = np.zeros(width, np.uint8)
  raw = text.encode()[:width]
  data[: len(raw)] = np.frombuffer(raw, np.uint8)
  rows = multihost_utils.process_allgather(data)
  return [bytes(r).rstrip(b"\0").decode(errors="replace") for r in rows]


def barrier(name: str) -> None:
  """Waits until every process is here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


class Preemption:
  """SIGTERM to any process → one step, the same on all of them, at which to save and leave.

  With several processes the coordination service spreads the notice and picks the step (one more than
  the furthest process has begun); `requested` is a local look-up, no collective, so it costs no
  time in the loop. Alone, a signal handler sets a flag. Every process must call `requested` at every
  step, with the same sequence of steps.
  """

  def __init__(self):
    self._flag = threading.Event()
    self._previous = None
    if jax.process_count() == 1:
      self._previous = signal.signal(signal.SIGTERM, lambda *_: self._flag.set())

  def requested(self, step: int) -> bool:
    """True at the agreed step: save it, durably, and exit 0."""
    if jax.process_count() == 1:
      return self._flag.is_set()
    return multihost_utils.reached_preemption_sync_point(step)

  def close(self) -> None:
    """Puts the previous signal handler back."""
    if self._previous is not None:
      signal.signal(signal.SIGTERM, self._previous)
      self._previous = None


def fetch(x: jax.Array) -> np.ndarray:
  """A global array on the host of every process (a collective with several processes)."""
  if x.is_fully_addressable:
    return np.asarray(x)
  return np.asarray(multihost_utils.process_allgather(x, tiled=True))
