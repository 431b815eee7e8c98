"""Static schedules: how many instruction bundles a TPU kernel spends where, without a TPU.

libtpu can write down the final VLIW schedule of what it compiles: one bundle a cycle, and for each
bundle how many slots of every unit it fills. Control flow is annotated as numbered regions, so the
bundles of a loop body or of a branch can be counted exactly. Stalls (DMA that is not hidden, a full
queue) are not in it: bundles are a lower bound of cycles, and a sharp relative measure.

Dumping is a flag of the library's initialisation, so every compilation here runs in a child process.

  job = Job("v5e:2x2", "genmodels.aot.attention:program", {"length": 4096})
  made = compile_all([job])[0]
  made.kernel("interval_attention_fwd").bodies[0].bundles
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

MXU, SPILL, FILL = "MATMUL", "VSTORE:SPILL", "VLOAD:FILL"  # column names of libtpu's utilisation table


class ScheduleError(RuntimeError):
  """A dump that does not look as this module expects: another libtpu."""


@dataclasses.dataclass(frozen=True)
class Body:
  """An innermost region with matrix products: one branch that works off a tile, or a part of one.

  Attributes:
    bundles: of the region, from its first to its last; cycles if nothing stalls.
    used: slots filled, by unit.
    capacity: slots of a bundle, by unit.
  """

  bundles: int
  used: dict[str, int]
  capacity: dict[str, int]

  def occupancy(self, unit: str = MXU) -> float:
    """Share of a unit's slots that are filled."""
    return self.used[unit] / (self.capacity[unit] * self.bundles)


@dataclasses.dataclass(frozen=True)
class Kernel:
  """Schedule of one Pallas call.

  Attributes:
    name: of pallas_call.
    bundles: of the whole program, grid control, DMA and prologues included; each counted once.
    spills, fills: vector registers stored to and loaded from memory because there are too few.
    bodies: in the order of the program.
  """

  name: str
  bundles: int
  spills: int
  fills: int
  bodies: tuple[Body, ...]


@dataclasses.dataclass(frozen=True)
class Job:
  """What to compile: `builder` ("module:function") called with `arguments` under the topology's target
  gives (function, its arguments as ShapeDtypeStructs); they live on one device."""

  topology: str
  builder: str
  arguments: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Compiled:
  """Outcome of a job.

  Attributes:
    error: the compiler's message, None if it compiled. The rest is 0 or empty otherwise.
    argument_bytes, output_bytes, temp_bytes: device memory.
    seconds: of tracing and compiling.
    versions: of jax and libtpu.
    kernels: the Pallas calls, in the order of compilation.
  """

  job: Job
  error: str | None
  argument_bytes: int
  output_bytes: int
  temp_bytes: int
  seconds: float
  versions: dict[str, str]
  kernels: tuple[Kernel, ...]

  def kernel(self, name: str) -> Kernel:
    """The only Pallas call of that name; under autodiff a name is wrapped: "jvp_name_".

    Raises:
      KeyError: not one such. ValueError: the job did not compile.
    """
    if self.error is not None:
      raise ValueError(f"{self.job} did not compile: {self.error}")
    found = [k for k in self.kernels if re.fullmatch(rf"(\w+_)?{re.escape(name)}_*", k.name)]
    if len(found) != 1:
      raise KeyError(f"one kernel {name!r} among {[k.name for k in self.kernels]}")
    return found[0]


def versions() -> dict[str, str]:
  """Of the packages that a schedule depends on."""
  return {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}


# ------------------------------------------------------------------------------- the child processes


def compile_all(
  jobs: Sequence[Job], workers: int = 1, progress: Callable[[Compiled], None] | None = None
) -> list[Compiled]:
  """Compiles jobs in `workers` child processes (one core and about 2 GB each).

  Args:
    progress: called after each job, by one thread at a time.

  Returns:
    As many, in order. A program that the compiler refuses has `error` set.

  Raises:
    ModuleNotFoundError: no libtpu. RuntimeError: a child died; its last words are in the message.
  """
  from genmodels.aot import topology

  if reason := topology.missing():
    raise ModuleNotFoundError(f"aot: {reason}", name="libtpu")
  jobs = list(jobs)
  results: dict[int, Compiled] = {}
  failures: list[str] = []
  processes: list[subprocess.Popen] = []
  lock = threading.Lock()

  def work(share: list[int]) -> None:
    try:
      for at, made in _child(jobs, share, processes):
        with lock:
          results[at] = made
          if progress is not None:
            progress(made)
    except Exception as e:  # a thread's own; raised below
      failures.append(f"{type(e).__name__}: {e}")

  workers = max(1, min(workers, len(jobs)))
  threads = [
    threading.Thread(target=work, args=(list(range(w, len(jobs), workers)),)) for w in range(workers)
  ]
  for t in threads:
    t.start()
  try:
    for t in threads:
      t.join()
  except BaseException:  # an interrupt: the children would go on
    for process in processes:
      process.kill()
    raise
  if failures:
    raise RuntimeError("; ".join(failures))
  return [results[i] for i in range(len(jobs))]


def _child(jobs: Sequence[Job], share: list[int], processes: list[subprocess.Popen]):
  """(index, Compiled) of the jobs of a share as a process of their own gets them done."""
  from genmodels.aot import topology

  with tempfile.TemporaryDirectory(prefix="genmodels-schedule-") as folder:
    flags = (
      f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
      # The final passes only: 5 to 20 MB instead of 100 to 500.
      "--xla_jf_dump_llo_pass_label_regex=.*final.*"
    )
    env = {**topology.environment("cpu"), **os.environ, "JAX_PLATFORMS": "cpu"}
    env["LIBTPU_INIT_ARGS"] = f"{env.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    with tempfile.TemporaryFile("w+") as errors:
      process = subprocess.Popen(
        [sys.executable, "-m", "genmodels.aot.schedule", folder],
        env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
      )  # fmt: skip
      processes.append(process)
      try:
        process.stdin.write(json.dumps([dataclasses.asdict(jobs[i]) for i in share]))
        process.stdin.close()
        for at, line in zip(share, process.stdout, strict=False):
          yield at, _from_json(json.loads(line))
        status = process.wait()
      finally:
        process.kill()
        process.wait()
        process.stdout.close()
      if status:
        errors.seek(0)
        raise RuntimeError(f"aot: the compiling process ended with {status}: {errors.read()[-2000:]}")


def _from_json(made: dict) -> Compiled:
  kernels = tuple(
    Kernel(**{**k, "bodies": tuple(Body(**b) for b in k["bodies"])}) for k in made.pop("kernels")
  )
  return Compiled(**{**made, "job": Job(**made["job"])}, kernels=kernels)


def _main(folder: str) -> None:
  """Reads jobs (JSON) from stdin, writes a line of JSON for each to stdout, which nothing else may use."""
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  for job in [Job(**j) for j in json.load(sys.stdin)]:
    print(json.dumps(dataclasses.asdict(_compile(job, pathlib.Path(folder)))), file=answers, flush=True)


def _compile(job: Job, folder: pathlib.Path) -> Compiled:
  import jax

  from genmodels import kernels
  from genmodels.aot import topology

  start = time.perf_counter()
  device = topology.devices(job.topology)[0]
  module, function = job.builder.split(":")
  build = getattr(importlib.import_module(module), function)
  where = jax.sharding.SingleDeviceSharding(device)
  error, sizes, found = None, (0, 0, 0), ()
  with kernels.building_for(kernels.Target.of(device)):
    made, arguments = build(**job.arguments)
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), arguments)
    lowered = jax.jit(made).lower(*arguments)
  try:
    memory = lowered.compile().memory_analysis()
    sizes = memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes
    found = read(folder)
  except jax.errors.JaxRuntimeError as e:
    error = str(e)
  for path in folder.iterdir():
    path.unlink()
  return Compiled(job, error, *sizes, time.perf_counter() - start, versions(), found)


# ----------------------------------------------------------------------------------------- the dumps

_BUNDLES = "-final_bundles.txt"
_USE = "-final_hlo-static-per-bundle-utilization.txt"
_ANALYSIS = "-schedule-analysis_final_bundles.txt"
_OPCODE = re.compile(r"\[opcode\].*%\): (\S+)")
_FILE = re.compile(r"(?P<key>\d+-(?P<name>.+?)(\.\d+)?)-\d+$")


def read(folder: pathlib.Path) -> tuple[Kernel, ...]:
  """The Pallas calls among the dumps in a folder.

  Raises:
    ScheduleError: files that do not fit each other or have another format.
  """
  groups: dict[str, dict[str, pathlib.Path]] = {}
  for path in sorted(folder.iterdir()):
    for ending in (_ANALYSIS, _BUNDLES, _USE):  # the first ends like the second
      if path.name.endswith(ending):
        match = _FILE.match(path.name.removesuffix(ending))
        if match:
          groups.setdefault(match["key"], {"name": match["name"]})[ending] = path
        break
  found = []
  for files in groups.values():
    # A Pallas call is a program of one custom call; the program that calls them all lists other things too.
    if _ANALYSIS in files and set(_OPCODE.findall(files[_ANALYSIS].read_text())) == {"custom-call"}:
      if _BUNDLES not in files or _USE not in files:
        raise ScheduleError(f"{folder}: {files['name']} has no bundles or no utilisation; a new libtpu?")
      found.append(parse(files["name"], files[_USE].read_text(), files[_BUNDLES].read_text()))
  return tuple(found)


def parse(name: str, utilisation: str, bundles: str) -> Kernel:
  """A kernel from the two texts of its final schedule: slots used by each bundle, and the bundles.

  Raises:
    ScheduleError: another format.
  """
  units, capacity, rows = _use(utilisation)
  spans = _regions(bundles, len(rows))
  mxu = units.index(MXU)
  with_products = sorted(
    {span for span in spans if any(row[mxu] for row in rows[span[0] : span[1] + 1])},
    key=lambda s: (s[0], -s[1]),
  )
  inner = [
    s for s in with_products if not any(s != o and s[0] <= o[0] and o[1] <= s[1] for o in with_products)
  ]
  total = lambda part: {u: sum(row[i] for row in part) for i, u in enumerate(units)}
  bodies = tuple(Body(b - a + 1, total(rows[a : b + 1]), capacity) for a, b in inner)
  everything = total(rows)
  return Kernel(name, len(rows), everything[SPILL], everything[FILL], bodies)


def _use(text: str) -> tuple[list[str], dict[str, int], list[list[int]]]:
  """Unit names, their slots in a bundle, and the slots that each bundle uses."""
  lines = text.splitlines()
  try:
    head = next(i for i, line in enumerate(lines) if line.startswith(f"{MXU},"))
    units = [u.strip() for u in lines[head].split(",")]
    capacity = dict(zip(units, map(int, lines[head + 1].split()), strict=True))
    rows = [[int(n) for n in line.split()] for line in lines[head + 3 :] if line.strip()]
  except (StopIteration, ValueError) as e:
    raise ScheduleError(f"utilisation table of another format: {text[:200]!r}") from e
  if not {MXU, SPILL, FILL} <= set(units) or any(len(row) != len(units) for row in rows):
    raise ScheduleError(f"utilisation table with other columns: {units}")
  return units, capacity, rows


_ADDRESS = re.compile(r"\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:")
_KEY = "= control target key start"
_MARK = re.compile(r"(Start/End empty|Start|End) region (\d+)")


def _regions(text: str, bundles: int) -> list[tuple[int, int]]:
  """(first, last) bundle of each region that is closed by a marker, and of the program."""
  at, opened, spans = -1, {}, [(0, bundles - 1)]
  for line in text.splitlines():
    if match := _ADDRESS.match(line):
      at = int(match[1], 0)
    for kind, region in _MARK.findall(line):
      if kind == "Start":
        opened[region] = at
      elif kind == "End" and region in opened:
        spans.append((opened.pop(region), at))
  if at + 1 != bundles:
    raise ScheduleError(f"{at + 1} bundles are listed, {bundles} have a line of utilisation")
  if _KEY not in text or (" sbr.rel " in text and len(spans) == 1):
    raise ScheduleError("branches, but no region markers among the bundles")
  return spans


if __name__ == "__main__":
  _main(sys.argv[1])
