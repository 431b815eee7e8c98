"""What survives: process counts, SIGTERM, kill -9 at any instant, damaged files (R1–R4).

Every test starts real processes over gloo on localhost and reads what they left on disk.
"""

import json
import pathlib
import random
import signal
import sys
import time

import numpy as np
import pytest

from genmodels.checkpoint.manager import Manager
from launch import local

pytestmark = pytest.mark.multiprocess
WORKER = str(pathlib.Path(__file__).with_name("worker.py"))
LIMIT = 180  # seconds; a hang fails


def start(workdir, processes=1, devices=4, heartbeat_s=10, **args):
  workdir.mkdir(parents=True, exist_ok=True)
  command = [sys.executable, WORKER, json.dumps({"workdir": str(workdir), "mesh": {"fsdp": 2}, **args})]
  env = {"PYTHONPATH": str(pathlib.Path(WORKER).parents[2])}
  return local.start(command, processes, devices, heartbeat_s=heartbeat_s, logs=workdir / "logs", env=env)


def run(workdir, *args, **kw):
  status = start(workdir, *args, **kw).wait(LIMIT)
  assert set(status) == {0}, (status, log(workdir)[-6000:])


def log(workdir, process=0):
  """All of it: TensorStore's reads that outlive a failed one fill pages with "Event loop is closed"."""
  return (workdir / "logs" / f"{process}.log").read_text()


def losses(workdir, process=0):
  """{step: loss}, and every step in the order it was run."""
  lines = [
    json.loads(s) for s in (workdir / f"losses-{process}.jsonl").read_text().splitlines() if s.endswith("}")
  ]
  return {x["step"]: float.fromhex(x["loss"]) for x in lines}, [x["step"] for x in lines]


def wait_for(job, condition, what, limit=LIMIT):
  """Until the condition holds; fails, and kills the job, if a process ends first or time is up."""
  end = time.monotonic() + limit
  while not condition():
    over = [p.poll() for p in job.processes]
    if time.monotonic() > end or any(s is not None for s in over):
      job.kill()
      raise AssertionError(f"never happened: {what}; exit statuses {over}")
    time.sleep(0.05)


def reached(workdir, step, process=0):
  def look():
    file = workdir / f"losses-{process}.jsonl"
    return file.exists() and len(file.read_text().splitlines()) >= step

  return look


def verified(workdir):
  """(step, arrays by name) of the newest checkpoint that verifies, on one device here."""
  values, step, _ = Manager(workdir / "checkpoints", read_only=True).read()
  return step, {n: np.asarray(x) for n, x in values.items()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
  """12 uninterrupted steps of 2 processes × 2 devices."""
  workdir = tmp_path_factory.mktemp("reference") / "w"
  run(workdir, 2, 2)
  return workdir


def test_any_number_of_processes_sees_the_same_batches_and_losses(reference, tmp_path):
  want, _ = losses(reference)
  assert losses(reference, 1)[0] == want and len(want) == 12
  for processes, devices in ((1, 4), (4, 1)):
    run(tmp_path / str(processes), processes, devices)
    got, _ = losses(tmp_path / str(processes))
    np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=1e-6)
  assert len(set(want.values())) == 12  # it does train on changing batches


def test_resume_is_bit_exact_on_the_same_mesh_and_close_on_another(reference, tmp_path):
  want, _ = losses(reference)
  run(tmp_path / "a", 2, 2, steps=8)
  run(tmp_path / "a", 2, 2, steps=12)
  got, order = losses(tmp_path / "a")
  assert order == list(range(1, 13)) and got == want
  (step, a), (_, b) = verified(tmp_path / "a"), verified(reference)
  assert step == 12 and all(np.array_equal(a[n], b[n]) for n in b)
  run(tmp_path / "b", 2, 2, steps=8)
  run(tmp_path / "b", 1, 4, steps=12, mesh={"fsdp": 2, "tensor": 2})
  got, _ = losses(tmp_path / "b")
  np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=1e-6)


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_to_one_process_saves_one_step_on_all_and_exits_0(processes, tmp_path):
  job = start(tmp_path, processes, 4 // processes, steps=10_000, save_every=10_000, pause=0.02)
  wait_for(job, reached(tmp_path, 5, processes - 1), "step 5")
  job.signal(signal.SIGTERM, processes - 1)
  assert job.wait(60) == [0] * processes, log(tmp_path)[-6000:]
  last = {losses(tmp_path, p)[1][-1] for p in range(processes)}
  assert len(last) == 1  # one agreed step
  step, _ = verified(tmp_path)
  assert {step} == last and step < 10_000
  run(tmp_path, processes, 4 // processes, steps=step + 2, save_every=10_000)
  assert losses(tmp_path)[1][-2:] == [step + 1, step + 2]


def test_kill_9_of_one_process_loses_only_the_steps_since_the_last_save(reference, tmp_path):
  want, _ = losses(reference)
  job = start(tmp_path, 2, 2, steps=10_000, save_every=4, pause=0.05)
  wait_for(job, lambda: Manager(tmp_path / "checkpoints", read_only=True).latest() == 4, "step 4 saved")
  wait_for(job, reached(tmp_path, 6), "step 6")
  job.signal(signal.SIGKILL, 1)
  status = job.wait(LIMIT)  # the other one notices and leaves: no hang
  assert status[1] == -signal.SIGKILL and status[0] != 0
  step, _ = verified(tmp_path)
  done = losses(tmp_path)[1][-1]
  assert step >= 4 and done - step <= 2 * 4  # one save may have been in flight
  run(tmp_path, 1, 4, steps=12)  # on fewer processes
  got, order = losses(tmp_path)
  assert order[order.index(done) + 1] == step + 1
  np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=1e-6)


def test_kill_9_inside_a_save_leaves_the_older_one(tmp_path):
  status = start(tmp_path, steps=12, kill_in_save=8, sync=True).wait(LIMIT)
  assert status == [-signal.SIGKILL]
  assert list((tmp_path / "checkpoints").glob("8.*")), "the kill was meant to fall inside the save"
  assert verified(tmp_path)[0] == 4
  run(tmp_path, steps=12)
  assert losses(tmp_path)[1] == [1, 2, 3, 4, 5, 6, 7, 8, 5, 6, 7, 8, 9, 10, 11, 12]
  assert not list((tmp_path / "checkpoints").glob("8.*"))


def test_kill_9_at_random_instants_never_loses_a_committed_step(tmp_path):
  rng = random.Random(0)
  floor = 0
  for _ in range(5):
    job = start(tmp_path, steps=100_000, save_every=1, width=512, heartbeat_s=100)
    begun = floor
    wait_for(
      job, lambda b=begun: (Manager(tmp_path / "checkpoints", read_only=True).latest() or 0) > b, "a save"
    )
    time.sleep(rng.random() * 0.4)
    job.kill()
    newest = Manager(tmp_path / "checkpoints", read_only=True).latest()
    step, values = verified(tmp_path)
    assert step == newest and int(values["step"]) == step  # every committed step verifies
    assert losses(tmp_path)[1][-1] - step <= 2
    assert step > floor
    floor = step


def flip(checkpoint: pathlib.Path):
  files = [p for p in (checkpoint / "state").rglob("*") if p.is_file() and "/d/" in str(p)]
  file = max(files, key=lambda p: p.stat().st_size)
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 4
  file.write_bytes(data)


def test_a_flipped_byte_is_found_by_all_and_the_older_step_used(reference, tmp_path):
  want, _ = losses(reference)
  run(tmp_path, 2, 2, steps=8)
  flip(tmp_path / "checkpoints" / "8")
  run(tmp_path, 2, 2, steps=12)
  for p in range(2):
    got, order = losses(tmp_path, p)
    assert order[8:] == [5, 6, 7, 8, 9, 10, 11, 12] and got == want
    assert "step 8 is not usable" in log(tmp_path, p) and "restored step 4" in log(tmp_path, p)
  assert (tmp_path / "checkpoints" / "damaged" / "8-0").is_dir()
  assert Manager(tmp_path / "checkpoints").steps() == [4, 8, 12]


def test_what_one_process_cannot_read_nobody_uses(reference, tmp_path):
  want, _ = losses(reference)
  run(tmp_path, 2, 2, steps=8)
  run(tmp_path, 2, 2, steps=12, fail_load=[1, 8])
  for p in range(2):
    got, order = losses(tmp_path, p)
    assert order[8:] == [5, 6, 7, 8, 9, 10, 11, 12] and got == want
    assert "file of step 8 unreadable here (process 1)" in log(tmp_path, p)


def test_no_step_left_stops_every_process(tmp_path):
  run(tmp_path, 2, 2, steps=8)
  for step in "48":
    flip(tmp_path / "checkpoints" / step)
  status = start(tmp_path, 2, 2, steps=12).wait(LIMIT)
  assert 0 not in status
  assert "no checkpoint verifies" in log(tmp_path, 0) and "no checkpoint verifies" in log(tmp_path, 1)
  assert Manager(tmp_path / "checkpoints").steps() == [4, 8]
