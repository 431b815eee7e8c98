"""What a run says about itself: FLOPs and MFU, rates, losses by group, files, progress, goodput.

FLOP convention (every number printed here): a matrix weight costs 2 FLOPs a slot forward and 4
backward, an allowed (query, key) pair 4·heads·head_dim forward and 8 backward, so 6·N and 12·D·pairs
in a training step; recomputation, normalisations and the optimiser count nothing. Pairs are those
the *mask* allows, counted from the batch: sparsity is neither flattered nor punished. MFU divides by
the dense bf16 peak of the device, which is printed beside it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genmodels import optim, state
from genmodels.contracts import Array, Row

# Dense bf16 FLOP/s of one jax device, from the vendors' data sheets; v2, v3 and 7x show two devices
# a chip. The key is searched in device_kind, longest first.
PEAKS = {
  "TPU v2": 22.5e12,
  "TPU v3": 61.5e12,
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5p": 459e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
  "TPU7x": 1153.5e12,
  "A100": 312e12,
  "H100 NVL": 835e12,
  "H100 PCIe": 756e12,
  "H100": 989e12,
  "H200": 989e12,
  "B200": 2250e12,
}

TRAINING = ("step", "data")  # ledger categories that a rate is taken over


# ------------------------------------------------------------------------------------------- FLOPs


@dataclasses.dataclass(frozen=True)
class ModelFlops:
  """The numbers of a model that its FLOPs follow from.

  Fields:
    trunk: matrix weights every slot passes through; of a stack of experts, those of the ones it is routed to.
    frozen: those of them that are not trained (adapters on a frozen base): no weight gradient.
    cond: matrix weights every entry of the condition table passes through (AdaLN).
    heads: {head: matrix weights of a read position}.
    attention: {mask pattern: Σ over its layers of heads · head_dim}.
    still: nothing outside of the heads is trained, so the trunk has no backward pass.
  """

  trunk: int
  frozen: int
  cond: int
  heads: dict[str, int]
  attention: dict[str, int]
  still: bool = False


def model_flops(
  abstract_params: Any,
  logical_axes: Any,
  attention: Mapping[str, int],
  heads: Mapping[str, str],
  trainable: Any = None,
  active: Mapping[str, tuple[int, int]] | None = None,
) -> ModelFlops:
  """ModelFlops from the parameters and the names of their axes.

  Args:
    abstract_params: the parameters (shapes).
    logical_axes: same nesting, tuples of names; `optim.role` tells matrices from tables.
    attention: {mask pattern: Σ over its layers of heads · head_dim}.
    heads: {head: regex of the paths of its weights, "" for none}; a tied head names the embedding table.
      Other matrices belong to the trunk, other tables cost nothing.
    trainable: bool tree like the parameters (`optim.trainable`); None is all.
    active: {regex of paths: (k, n)}, stacks of n experts of which a slot passes through k.

  Raises:
    ValueError: a head without weights; a stack of experts that `active` does not name.
  """
  params = state.param_paths(abstract_params)
  axes = state.param_paths(logical_axes, is_leaf=lambda x: isinstance(x, tuple))
  trained = {p: True for p in params} if trainable is None else state.param_paths(trainable)
  size = {p: math.prod(leaf.shape) for p, leaf in params.items()}
  for p in [p for p in params if "expert" in axes[p]]:
    shares = [share for pattern, share in (active or {}).items() if re.search(pattern, p)]
    if not shares:
      raise ValueError(
        f"metrics: {p} is a stack of experts; `active` must say how many a slot passes through"
      )
    size[p] = size[p] * shares[0][0] // shares[0][1]
  kind = {p: optim.role(tuple(axes[p]))[0] for p in params}
  by_head = {}
  for head, pattern in heads.items():
    paths = [p for p in params if kind[p] != "vector" and re.search(pattern, p)]
    if not pattern:
      paths = []
    elif not paths:
      raise ValueError(
        f"metrics: head {head!r} has no weights: {pattern!r} matches none of {', '.join(list(params)[:6])} …"
      )
    by_head[head] = paths
  claimed = {p for paths in by_head.values() for p in paths}
  rest = [p for p in params if kind[p] in ("matrix", "head") and p not in claimed]
  of_heads = {p for p in params for pattern in heads.values() if pattern and re.search(pattern, p)}
  cond = [p for p in rest if "cond" in axes[p]]
  trunk = [p for p in rest if "cond" not in axes[p]]
  return ModelFlops(
    trunk=sum(size[p] for p in trunk),
    frozen=sum(size[p] for p in trunk if not trained[p]),
    cond=sum(size[p] for p in cond),
    heads={head: sum(size[p] for p in paths) for head, paths in by_head.items()},
    attention=dict(attention),
    still=not any(trained[p] for p in params if p not in of_heads),
  )


def step_flops(model: ModelFlops, work: Mapping[str, Any], passes: int = 3) -> dict[str, float]:
  """FLOPs of one net call over the global batch (sum them over the calls of a step).

  Args:
    model: its numbers.
    work: host totals: "slots", "pairs" {pattern: n}, optional "reads" {head: n} and "entries".
    passes: 3 trained, 1 forward only (teacher, reference, rollout, evaluation).

  Returns:
    {"trunk", "attention", "heads", "total"}.

  Raises:
    ValueError: a pattern or head that the model does not have.
  """
  if passes not in (1, 3):
    raise ValueError(f"passes = {passes}: 3 for a trained call, 1 for a forward pass")
  for name, known, given in (
    ("pairs", model.attention, work["pairs"]),
    ("reads", model.heads, work.get("reads", {})),
  ):
    if unknown := set(given) - set(known):
      raise ValueError(f"work[{name!r}] counts {sorted(unknown)}, the model has {sorted(known)}")
  slots = int(work["slots"])
  whole = 1 if model.still else passes
  weights = whole * (model.trunk - model.frozen) + min(whole, 2) * model.frozen
  trunk = 2 * weights * slots + 2 * passes * model.cond * int(work.get("entries", 0))
  attention = 4 * whole * sum(model.attention[p] * int(n) for p, n in work["pairs"].items())
  heads = 2 * passes * sum(model.heads[h] * int(n) for h, n in work.get("reads", {}).items())
  return {
    "trunk": float(trunk),
    "attention": float(attention),
    "heads": float(heads),
    "total": float(trunk + attention + heads),
  }


def limbs(counts: Array) -> Array:
  """Exact sum of non-negative int32 counts inside jit, as int32[5] sums of their 7-bit digits.

  One row of 2·64k two-stream slots allows more pairs than an int32 holds, and jax has no int64 by
  default. Limbs add up (over micro-batches, devices) for up to 2²⁴ counts; `unlimb` reads them. They
  are int32 so that one all-reduce takes them and the other counts of a step together.
  """
  digit = (counts.astype(jnp.int32).reshape(-1)[:, None] >> (jnp.arange(5) * 7)) & 127
  return jnp.sum(digit, axis=0, dtype=jnp.int32)


def unlimb(x: Any) -> int:
  """The integer that int32[5] limbs stand for (host)."""
  return sum(int(v) << (7 * i) for i, v in enumerate(np.asarray(x)))


@dataclasses.dataclass(frozen=True)
class Peak:
  """What MFU divides by: FLOP/s of one device, and how it is called in print."""

  flops: float
  text: str


def peak(device: Any = None, measure: bool = False) -> Peak | None:
  """Peak of a device: the vendor's dense bf16 rate; None where there is none (a CPU).

  Args:
    device: a jax device, or its device_kind; default the first one.
    measure: where the table has no entry, time float32 matrix products on it and say so.
  """
  device = jax.local_devices()[0] if device is None else device
  kind = device if isinstance(device, str) else device.device_kind
  for key in sorted(PEAKS, key=len, reverse=True):
    if key.lower() in kind.lower():
      return Peak(PEAKS[key], f"{PEAKS[key] / 1e12:g} TFLOP/s (dense bf16, {kind})")
  if not measure:
    return None
  n = 1024
  x = jax.device_put(jnp.ones([n, n], jnp.float32), None if isinstance(device, str) else device)
  product = jax.jit(lambda a: a @ a)
  product(x).block_until_ready()
  best = math.inf
  for _ in range(5):
    start = time.perf_counter()
    product(x).block_until_ready()
    best = min(best, time.perf_counter() - start)
  rate = 2 * n**3 / best
  return Peak(rate, f"{rate / 1e12:.3g} TFLOP/s (measured float32 {n}³ product, {kind})")


# ------------------------------------------------------------------------------------------- rates


class Meter:
  """Rates between two reports, over training time alone.

  Args:
    total_steps: length of the run, for the ETA.
    clock: seconds spent training so far (`Ledger.training`), so that evaluations and saves lower no
      rate; any monotonic clock will do.
    peak: of one device, or None: no MFU.
    devices: how many share the work.
  """

  def __init__(
    self,
    total_steps: int,
    clock: Callable[[], float] = time.monotonic,
    peak: Peak | None = None,
    devices: int = 1,
  ):
    self.total_steps, self.clock, self.peak, self.devices = total_steps, clock, peak, devices
    self._sums: collections.Counter = collections.Counter()
    self._steps, self._since = 0, clock()

  def add(self, *, tokens: int = 0, slots: int = 0, loss_tokens: int = 0, flops: float = 0.0) -> None:
    """Count one step: clean tokens, trunk slots, supervised tokens, FLOPs of the global batch."""
    self._sums.update(tokens=tokens, slots=slots, loss_tokens=loss_tokens, flops=flops)
    self._steps += 1

  def report(self, step: int) -> dict[str, float]:
    """The rates since the last report, and the time left at this pace; {} if no step was counted."""
    now = self.clock()
    seconds, steps, sums = now - self._since, self._steps, self._sums
    if not steps or seconds <= 0:
      return {}
    self._sums, self._steps, self._since = collections.Counter(), 0, now
    out = {
      "step_seconds": seconds / steps,
      "tokens_per_second": sums["tokens"] / seconds,
      "slots_per_second": sums["slots"] / seconds,
      "loss_tokens_per_second": sums["loss_tokens"] / seconds,
      "eta_seconds": max(self.total_steps - step, 0) * seconds / steps,
    }
    if sums["flops"]:
      out["flops_per_second_per_device"] = sums["flops"] / seconds / self.devices
      if self.peak is not None:
        out["mfu"] = out["flops_per_second_per_device"] / self.peak.flops
    return out


# ------------------------------------------------------------------------------------------ groups


def source_of(row: Row) -> Array:
  """int32[B, N]: the data source of each clean token, −1 on padding."""
  source = jnp.take_along_axis(row.docs.source, jnp.maximum(row.doc, 0), axis=1)
  return jnp.where(row.doc >= 0, source, -1)


def by_group(values: Array, weight: Array, group: Array, groups: int) -> dict[str, Array]:
  """Weighted sums by group, inside jit: a loss by data source or by modality.

  A comparison and a sum instead of a scatter: it fuses, keeps its order, and under a mesh becomes
  one small all-reduce.

  Args:
    values, weight: float[…], equal shapes; values at weight 0 are not read (they may be NaN).
    group: int32[…]; entries outside [0, groups) count nowhere.
    groups: number of groups.

  Returns:
    {"sum": float32[groups], "weight": float32[groups]}.
  """
  member = (group[..., None] == jnp.arange(groups)) & (weight != 0)[..., None]
  axes = tuple(range(values.ndim))
  w = jnp.where(member, weight[..., None].astype(jnp.float32), 0)
  v = jnp.where(member, (values * weight)[..., None].astype(jnp.float32), 0)
  return {"sum": jnp.sum(v, axes), "weight": jnp.sum(w, axes)}


def group_means(prefix: str, sums: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
  """{"prefix/name": mean} on the host, for the groups that occurred."""
  total, weight = np.asarray(sums["sum"]), np.asarray(sums["weight"])
  if len(names) != len(total):
    raise ValueError(f"{prefix}: {len(names)} names for {len(total)} groups")
  return {f"{prefix}/{n}": float(t / w) for n, t, w in zip(names, total, weight) if w > 0}


# ------------------------------------------------------------------------------------------- files


class Writer:
  """metrics.jsonl and TensorBoard events of a run; safe to reopen after a crash.

  A record of step s is written after s updates. Reopened at a restored step, records beyond it (of
  steps that will be taken again) and a torn last line are removed, and `dropped` says how many.

  Args:
    workdir: folder, made if missing.
    restored: step of the restored state; 0 in a fresh run.
    tensorboard: also write events.
  """

  def __init__(self, workdir: str | os.PathLike, restored: int = 0, tensorboard: bool = True):
    self.path = pathlib.Path(workdir) / "metrics.jsonl"
    self.path.parent.mkdir(parents=True, exist_ok=True)
    self.dropped = truncate(self.path, lambda record: record["step"] <= restored)
    self._file = open(self.path, "a", encoding="utf-8")
    self._events = None
    if tensorboard:
      from tensorboardX import SummaryWriter  # imports protobuf: only where events are written

      self._events = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=restored + 1)

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Append one record. Values are numbers or strings; NaN and infinities are written as strings,
    which JSON has no numbers for and float() reads back."""
    record = {"step": int(step)} | {k: _plain(v) for k, v in values.items()}
    self._file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
    self._file.flush()
    if self._events is not None:
      for key, value in record.items():
        if key != "step" and isinstance(value, (int, float)):
          self._events.add_scalar(key, value, int(step))

  def close(self) -> None:
    self._file.close()
    if self._events is not None:
      self._events.close()


def truncate(path: pathlib.Path, keep: Callable[[dict], bool]) -> int:
  """Remove the JSONL records that `keep` refuses and lines that are no JSON (a torn last line).

  Atomic; the file is not touched when nothing has to go. Returns the number of lines removed.
  """
  if not path.exists():
    return 0
  kept, dropped = [], 0
  for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
    try:
      good = keep(json.loads(line))
    except (ValueError, KeyError, TypeError):
      good = False
    kept, dropped = (kept + [line], dropped) if good else (kept, dropped + 1)
  if dropped:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)
  return dropped


def _plain(value: Any) -> Any:
  if isinstance(value, str) or value is None:
    return value
  value = np.asarray(value).item()
  return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------------------------------- progress


class Progress:
  """The line a person watches: rewritten in place on a terminal, one line every `every` seconds elsewhere.

  Args:
    total_steps: length of the run.
    out: stream.
    every: seconds between lines without a terminal.
    clock: monotonic seconds.
  """

  def __init__(
    self, total_steps: int, out: Any = None, every: float = 10.0, clock: Callable[[], float] = time.monotonic
  ):
    self.total_steps, self.every, self.clock = total_steps, every, clock
    self.out = sys.stderr if out is None else out
    self.terminal = self.out.isatty()
    self._last, self._open = -math.inf, False

  def show(self, step: int, values: Mapping[str, Any], peak: Peak | None = None) -> None:
    """Show a record; the last step is always shown."""
    now = self.clock()
    if now - self._last < (0.1 if self.terminal else self.every) and step < self.total_steps:
      return
    self._last = now
    line = progress_line(step, self.total_steps, values, peak)
    if self.terminal:
      self.out.write("\r" + line[: max(shutil.get_terminal_size().columns - 1, 20)] + "\x1b[K")
      self._open = True
    else:
      self.out.write(line + "\n")
    self.out.flush()

  def note(self, text: str) -> None:
    """Print a line that stays."""
    self.out.write(("\r\x1b[K" if self._open else "") + text + "\n")
    self.out.flush()
    self._open = False

  def close(self) -> None:
    """End the line that is being rewritten."""
    if self._open:
      self.out.write("\n")
      self.out.flush()
      self._open = False


def progress_line(step: int, total: int, values: Mapping[str, Any], peak: Peak | None = None) -> str:
  """ "step 120/160 · loss 2.312 · 12.3k tok/s · MFU 41.2 % of 459 TFLOP/s (…) · ETA 1m02s"."""
  parts = [f"step {step}/{total}"]
  if "loss" in values:
    parts.append(f"loss {float(values['loss']):.4g}")
  if "tokens_per_second" in values:
    parts.append(f"{_short(values['tokens_per_second'])} tok/s")
  if "mfu" in values and peak is not None:
    parts.append(f"MFU {100 * values['mfu']:.1f} % of {peak.text}")
  elif "flops_per_second_per_device" in values:
    parts.append(f"{values['flops_per_second_per_device'] / 1e12:.3g} TFLOP/s/device")
  if values.get("skipped"):
    parts.append(f"{int(values['skipped'])} skipped")
  if "eta_seconds" in values:
    parts.append(f"ETA {duration(values['eta_seconds'])}")
  return " · ".join(parts)


def _short(x: float) -> str:
  for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
    if x >= scale:
      return f"{x / scale:.3g}{unit}"
  return f"{x:.3g}"


def duration(seconds: float) -> str:
  """ "42s", "1m02s", "3h04m", "2d03h"."""
  s = int(round(seconds))
  if s < 60:
    return f"{s}s"
  if s < 3600:
    return f"{s // 60}m{s % 60:02d}s"
  if s < 86400:
    return f"{s // 3600}h{s % 3600 // 60:02d}m"
  return f"{s // 86400}d{s % 86400 // 3600:02d}h"


# ----------------------------------------------------------------------------------------- goodput


class Ledger:
  """Where the wall-clock time of a run went, over all its restarts: goodput.jsonl.

  Every second belongs to one category: the innermost open `span`, or else the base category ("init"
  until `begin`). Each flush appends the seconds since the last one; `goodput` adds the file up and
  finds what a restart wasted.

  Args:
    path: the JSONL file, or None: account in memory alone (processes other than the first).
    clock, wall: monotonic and absolute seconds.
    age: seconds this process has already lived; default from the operating system, so that the
      imports are "init" too.
  """

  def __init__(
    self,
    path: str | os.PathLike | None,
    clock: Callable[[], float] = time.monotonic,
    wall: Callable[[], float] = time.time,
    age: float | None = None,
  ):
    age = process_age() if age is None else age
    self.clock, self.wall = clock, wall
    self.path = None if path is None else pathlib.Path(path)
    self.totals: collections.Counter = collections.Counter()
    self._pending: collections.Counter = collections.Counter()
    self._stack, self._mark, self._born, self._started = ["init"], clock() - age, wall() - age, False

  def begin(self, restored: int = 0) -> None:
    """Initialisation is over: from here on, time outside spans is "step".

    Args:
      restored: step of the state that training goes on from.
    """
    if self._started:
      raise RuntimeError("Ledger.begin was called twice; one ledger belongs to one process and one run")
    self._charge()
    self._stack[0], self._started = "step", True
    if self.path is not None:
      self.path.parent.mkdir(parents=True, exist_ok=True)
      truncate(self.path, lambda record: isinstance(record, dict))  # a line torn by kill -9
    self._append({"event": "start", "restored": int(restored), "time": self._born})

  @contextlib.contextmanager
  def span(self, category: str):
    """Charge the time inside to `category` ("data", "compile", "save", "eval", "restore" …)."""
    self._charge()
    self._stack.append(category)
    try:
      yield
    finally:
      self._charge()
      self._stack.pop()

  def training(self) -> float:
    """Seconds of this process spent on steps and their data: the clock of `Meter`."""
    self._charge()
    return sum(self.totals[c] for c in TRAINING)

  def flush(self, step: int) -> None:
    """Append the seconds since the last flush; call with every metrics record and at the end."""
    self._charge()
    seconds = {k: round(v, 6) for k, v in self._pending.items() if v}
    self._pending.clear()
    self._append({"event": "spent", "step": int(step), "time": self.wall(), "seconds": seconds})

  def _charge(self) -> None:
    now = self.clock()
    self.totals[self._stack[-1]] += now - self._mark
    self._pending[self._stack[-1]] += now - self._mark
    self._mark = now

  def _append(self, record: dict) -> None:
    if self.path is not None:
      with open(self.path, "a", encoding="utf-8") as f:
        f.write(json.dumps(record) + "\n")


def goodput(path: str | os.PathLike) -> dict[str, float]:
  """The ledger added up.

  Returns:
    Seconds by category over all processes, with steps (and their data) that a later restart took
    again moved to "wasted", and the time between processes in "down"; "wall" from the first start
    to the last record; "unaccounted" = wall − all categories; "goodput" = step / wall.

  Raises:
    ValueError: the file does not begin with a start record.
  """
  records = [json.loads(line) for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines()]
  if not records or records[0].get("event") != "start":
    raise ValueError(f"{path}: a ledger begins with a start record, got {records[:1]}")
  seconds: collections.Counter = collections.Counter()
  done: list[list] = []  # [first step, last step, seconds of training by category], not wasted so far
  first, last, step = records[0]["time"], records[0]["time"], 0
  for record in records:
    if record["event"] == "start":
      step = record["restored"]
      seconds["down"] += record["time"] - last
      for entry in done:
        begin, end, spent = entry
        lost = (end - max(begin, step)) / (end - begin) if end > max(begin, step) else 0.0
        for category in spent:
          seconds[category] -= lost * spent[category]
          seconds["wasted"] += lost * spent[category]
          spent[category] *= 1 - lost
        entry[1] = min(end, max(begin, step))
    else:
      seconds.update(record["seconds"])
      if record["step"] > step:
        spent = {c: record["seconds"][c] for c in TRAINING if c in record["seconds"]}
        done.append([step, record["step"], spent])
      step = record["step"]
    last = record["time"]
  wall = last - first
  out = dict(seconds) | {"wall": wall, "unaccounted": wall - sum(seconds.values())}
  return out | {"goodput": seconds["step"] / wall if wall > 0 else 0.0}


def process_age() -> float:
  """Seconds since this process started; 0 where the operating system does not tell."""
  try:
    # Field 22 of stat, counted after the closing parenthesis of the name, which may hold spaces.
    fields = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    up = float(pathlib.Path("/proc/uptime").read_text().split()[0])
    return max(up - int(fields[19]) / os.sysconf("SC_CLK_TCK"), 0.0)
  except (OSError, ValueError, IndexError):
    return 0.0


def rss_bytes() -> int:
  """Resident memory of this process; its peak where the operating system tells only that."""
  try:
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
  except (OSError, ValueError, IndexError):
    peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak_rss if sys.platform == "darwin" else peak_rss * 1024
