"""`genmodels train` itself over several processes: same losses, SIGTERM, kill -9, a flipped byte, resume."""

import json
import pathlib
import signal

import numpy as np
import pytest

from genmodels.checkpoint.manager import Manager
from launch import local
from tests.reliability.test_processes import flip, wait_for

pytestmark = pytest.mark.multiprocess
ROOT = pathlib.Path(__file__).parents[2]
LIMIT = 400
ENDLESS = 100_000


def start(workdir, processes, devices, steps, mesh=(("fsdp", 2),)):
  settings = {
    "train.steps": steps,
    "train.log_every": 1,
    "train.save_every": 4,
    "train.tensorboard": False,
    "eval.every": 0,
    "optim.schedule": "{'kind':'constant','warmup':2}",
  } | {f"mesh.{axis}": size for axis, size in mesh}
  arguments = ["--config", "configs/language/bd3lm.py:tiny", "--workdir", str(workdir)]
  arguments += [f"{k}={v}" for k, v in settings.items()]
  env = {"PYTHONPATH": str(ROOT)}
  return local.start(
    [*local.TRAIN, *arguments], processes, devices, heartbeat_s=10, logs=workdir / "logs", env=env
  )


def finish(job, workdir):
  status = job.wait(LIMIT)
  assert set(status) == {0}, (status, log(workdir))


def log(workdir, process=0):
  return (workdir / "logs" / f"{process}.log").read_text()[-6000:]


def losses(workdir):
  file = workdir / "metrics.jsonl"
  lines = [json.loads(s) for s in file.read_text().splitlines() if s.endswith("}")] if file.exists() else []
  return {x["step"]: x["loss"] for x in lines if "loss" in x}


def saved(workdir):
  return Manager(workdir / "checkpoints", read_only=True).latest() or 0


def test_stopped_killed_and_damaged_the_run_goes_on_as_if_nothing_had_happened(tmp_path):
  run = tmp_path / "run"
  run.mkdir()
  # SIGTERM to one process: one agreed step, saved, exit 0 everywhere.
  job = start(run, 2, 2, ENDLESS)
  wait_for(job, lambda: len(losses(run)) >= 9, "9 steps", LIMIT)
  job.signal(signal.SIGTERM, 1)
  finish(job, run)
  stopped = saved(run)
  first = losses(run)
  assert stopped == max(first) < ENDLESS

  # The same command goes on; kill -9 of one process: the other one leaves, no committed step is lost.
  job = start(run, 2, 2, ENDLESS)
  wait_for(job, lambda: saved(run) >= stopped + 8, "two more saves", LIMIT)
  job.signal(signal.SIGKILL, 1)
  status = job.wait(LIMIT)
  assert status[1] == -signal.SIGKILL and status[0] != 0
  newest = saved(run)
  before = losses(run)
  assert all(before[s] == first[s] for s in first)  # the first part still stands in the file
  assert min(s for s in before if s not in first) == stopped + 1

  # A flipped byte in the newest: the older one is used, and the steps done again are the same, to the bit.
  older = [s for s in Manager(run / "checkpoints").steps() if s < newest][-1]
  flip(run / "checkpoints" / str(newest))
  finish(start(run, 2, 2, newest + 2), run)
  assert f"step {newest} is not usable" in log(run) and f"step {older}" in log(run)
  after = losses(run)
  again = [s for s in after if older < s and s in before]
  assert len(again) >= newest - older and all(after[s] == before[s] for s in again)
  assert saved(run) == newest + 2 == max(after)

  # One process with the same mesh of four devices saw the same batches.
  alone = tmp_path / "alone"
  finish(start(alone, 1, 4, 9), alone)
  got = losses(alone)
  np.testing.assert_allclose([got[s] for s in range(1, 10)], [first[s] for s in range(1, 10)], rtol=1e-5)


def test_any_mesh_sees_the_same_first_20_losses(tmp_path):
  meshes = {
    1: (),
    2: (("fsdp", 2),),
    4: (("tensor", 2), ("fsdp", 2)),
    8: (("data", 2), ("fsdp", 2), ("tensor", 2)),
  }
  got = {}
  for devices, mesh in meshes.items():
    finish(start(tmp_path / str(devices), 1, devices, 20, mesh), tmp_path / str(devices))
    got[devices] = [losses(tmp_path / str(devices))[s] for s in range(1, 21)]
  for devices in (2, 4, 8):
    np.testing.assert_allclose(got[devices], got[1], rtol=1e-5, err_msg=f"{devices} devices")
  assert got[1][-1] < got[1][0]


@pytest.mark.full
def test_four_processes_see_the_same_losses(tmp_path):
  finish(start(tmp_path / "four", 4, 1, 8), tmp_path / "four")
  finish(start(tmp_path / "one", 1, 4, 8), tmp_path / "one")
  a, b = losses(tmp_path / "four"), losses(tmp_path / "one")
  np.testing.assert_allclose([a[s] for s in range(1, 9)], [b[s] for s in range(1, 9)], rtol=1e-5)
