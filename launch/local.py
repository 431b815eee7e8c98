"""Many processes on this machine, for tests and for trying a multi-host config on a laptop.

  python launch/local.py --processes 4 --devices 2 -- --config configs/language/ar.py:tiny --workdir runs/ar

Everything behind `--` goes to `genmodels train` of each process. The processes find each other over
localhost and compute their collectives on the CPU over gloo. SIGTERM or Ctrl-C here is passed on as SIGTERM
to every process, so the run saves and ends. The exit status is that of the first process that failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence

TRAIN = (sys.executable, "-m", "genmodels.cli", "train")


def free_port() -> int:
  """A port that nobody listens on."""
  with socket.socket() as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


def environment(process: int, processes: int, port: int, devices: int, heartbeat_s: int) -> dict[str, str]:
  """The variables of one process; JSON fields as in genmodels.parallel.multihost.DistributedConfig."""
  flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in f]
  out = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": " ".join([*flags, f"--xla_force_host_platform_device_count={devices}"]),
  }
  if processes > 1:
    cfg = {"processes": processes, "process_id": process, "coordinator": f"localhost:{port}"}
    out["GENMODELS_DISTRIBUTED"] = json.dumps(
      cfg | {"heartbeat_s": heartbeat_s, "start_s": 120, "shutdown_s": 60}
    )
  else:
    out["GENMODELS_DISTRIBUTED"] = "{}"
  return out


@dataclasses.dataclass
class Job:
  """Running processes, in order of their index."""

  processes: list[subprocess.Popen]

  def wait(self, timeout: float | None = None) -> list[int]:
    """Exit statuses; negative: killed by that signal.

    Raises:
      TimeoutError: some still run after `timeout` seconds; they are killed.
    """
    end = None if timeout is None else time.monotonic() + timeout
    try:
      return [p.wait(None if end is None else max(0.01, end - time.monotonic())) for p in self.processes]
    except subprocess.TimeoutExpired:
      running = [i for i, p in enumerate(self.processes) if p.poll() is None]
      self.kill()
      raise TimeoutError(f"processes {running} still ran after {timeout} s") from None

  def signal(self, number: int, process: int | None = None) -> None:
    """Sends a signal to one process, or to all that still run."""
    for i, p in enumerate(self.processes):
      if process in (None, i) and p.poll() is None:
        p.send_signal(number)

  def kill(self) -> None:
    """kill -9 to all that still run, and waits for them."""
    self.signal(signal.SIGKILL)
    for p in self.processes:
      p.wait()


def start(
  command: Sequence[str],
  processes: int,
  devices: int = 1,
  *,
  heartbeat_s: int = 100,
  logs: str | os.PathLike | None = None,
  env: Mapping[str, str] | None = None,
) -> Job:
  """Starts `command` as `processes` connected processes.

  Args:
    devices: host devices of each.
    heartbeat_s: seconds after which a silent process counts as dead and the others abort.
    logs: folder for the output of each, <index>.log (appended); default: this process's output, with
      the index in front of each line.
    env: further variables.
  """
  port = free_port()
  running = []
  for i in range(processes):
    variables = {**os.environ, **environment(i, processes, port, devices, heartbeat_s), **(env or {})}
    if logs is None:
      p = subprocess.Popen(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
      )
      threading.Thread(target=_prefix, args=(p.stdout, i), daemon=True).start()
    else:
      pathlib.Path(logs).mkdir(parents=True, exist_ok=True)
      with open(pathlib.Path(logs) / f"{i}.log", "a") as out:
        p = subprocess.Popen(command, env=variables, stdout=out, stderr=subprocess.STDOUT)
    running.append(p)
  return Job(running)


def _prefix(stream, index: int) -> None:
  for line in stream:
    sys.stdout.write(f"[{index}] {line}")
    sys.stdout.flush()


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--processes", type=int, default=2)
  parser.add_argument("--devices", type=int, default=1, help="host devices of each process")
  parser.add_argument(
    "--heartbeat-s", type=int, default=100, help="silence after which a process counts as dead"
  )
  parser.add_argument("train", nargs=argparse.REMAINDER, help="-- arguments of `genmodels train`")
  args = parser.parse_args(argv)
  rest = args.train[1:] if args.train[:1] == ["--"] else args.train
  job = start([*TRAIN, *rest], args.processes, args.devices, heartbeat_s=args.heartbeat_s)
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: job.signal(signal.SIGTERM))
  status = job.wait()
  return next((s if s > 0 else 128 - s for s in status if s), 0)


if __name__ == "__main__":
  sys.exit(main())
