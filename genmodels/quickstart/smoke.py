"""`genmodels quickstart --smoke`: train, be killed, go on, convert, sample; each promise is checked.

The AR run is a process of its own, `genmodels train`, killed with SIGKILL after its first save. Started
again it must continue from that save and repeat, bit for bit, the losses that the killed process had
already logged for the steps it lost.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np

from genmodels import config, train
from genmodels.sampling import run as saved

STEPS, SAVE = 60, 10


class SmokeError(RuntimeError):
  """A promise that did not hold."""


def overrides(part: str, root: pathlib.Path) -> list[str]:
  """Command-line overrides of the tiny configs."""
  out = [
    f"train.steps={STEPS}", f"train.save_every={SAVE}", "train.log_every=1", "train.tensorboard=false",
    "eval.every=0", f"data.path={root / 'data'}",
  ]  # fmt: skip
  if part == "bd3lm":
    out.append(f"init={{'kind': 'workdir', 'path': {str(root / 'ar')!r}}}")
  return out


def smoke(workdir: str, out=None) -> int:
  """Runs the smoke test in `workdir`, which is emptied first if an earlier one left it.

  Returns:
    0. Raises SmokeError naming what failed.
  """
  from genmodels.quickstart import run  # it imports this module

  out = sys.stderr if out is None else out
  say = lambda text: print(text, file=out, flush=True)
  began = time.monotonic()
  root = pathlib.Path(workdir).resolve()
  if root.exists():
    if not (root / "smoke.json").exists():
      raise config.ConfigError(
        "exists and is no earlier smoke run", key="workdir", value=str(root), fix="give another --workdir"
      )
    shutil.rmtree(root)
  root.mkdir(parents=True)
  (root / "smoke.json").write_text("{}")

  say("[1/4] AR training, killed after its first save")
  killed, lost = kill_after_save(root)
  say(f"      killed at step {max(killed)}; {lost} steps since the save are lost")
  say("[2/4] the same command again")
  finish(root)
  again = losses(root / "ar")
  starts = [e["restored"] for e in ledger(root / "ar") if e["event"] == "start"]
  if starts[0] != 0 or starts[-1] < SAVE or starts[-1] % SAVE:
    raise SmokeError(f"the second process went on from step {starts[-1]}; expected a multiple of {SAVE}")
  if sorted(again) != list(range(1, STEPS + 1)):
    raise SmokeError(f"metrics.jsonl has the steps {sorted(again)}, expected 1 … {STEPS}, each once")
  differ = [s for s, v in killed.items() if again[s] != v]
  if differ:
    raise SmokeError(f"after the restart the losses of steps {differ} are others than before it")
  say(f"      went on from step {starts[-1]}; the losses logged before the kill are repeated bit for bit")

  say("[3/4] conversion to block diffusion")
  run.keep_compiled(root)
  cfg = config.load("language/bd3lm:tiny", overrides("bd3lm", root))
  trained = train.train(cfg, str(root / "bd3lm"), out=out)
  curve = losses(root / "bd3lm")
  first, last = (float(np.mean([curve[s + d] for d in range(8)])) for s in (1, STEPS - 7))
  if not last < first:
    raise SmokeError(f"the block-diffusion loss did not fall: from {first:.3f} to {last:.3f}")

  say("[4/4] samples")
  for part in ("ar", "bd3lm"):
    drawn = run.draw(saved.load_run(root / part), new=24)
    if any(step < 0 for row in drawn["rows"] for step in row["step"][-1:]):
      raise SmokeError(f"{part}: a sampled row ends in a token that was never committed")
    say(f"      {part}: {''.join(drawn['rows'][0]['text'])!r}")
  say(f"smoke: ok, {trained.step} steps, {time.monotonic() - began:.0f} s")
  return 0


def command(root: pathlib.Path) -> list[str]:
  """`genmodels train` of the AR run, as a person would type it."""
  where = ["--config", "language/ar:tiny", "--workdir", str(root / "ar")]
  return [sys.executable, "-m", "genmodels.cli", "train", *where, *overrides("ar", root)]


def kill_after_save(root: pathlib.Path) -> tuple[dict[int, float], int]:
  """Starts the AR run and kills it when a save is complete and later steps are logged.

  Returns:
    {step: loss} as logged, and the number of steps lost.
  """
  with open(root / "killed.log", "w") as log:
    process = subprocess.Popen(command(root), stdout=log, stderr=log, env=_environment(root))
  try:
    while True:
      if process.poll() is not None:
        raise SmokeError(f"training ended with status {process.returncode}; {_tail(root / 'killed.log')}")
      done, saved = losses(root / "ar"), complete(root / "ar")
      if saved and max(done, default=0) > max(saved):
        break
      time.sleep(0.02)
  finally:
    if process.poll() is None:
      os.kill(process.pid, signal.SIGKILL)
    process.wait()
  done, saved = losses(root / "ar"), complete(root / "ar")
  return done, max(done) - max(saved)


def finish(root: pathlib.Path) -> None:
  """Runs the same command to its end."""
  with open(root / "resumed.log", "w") as log:
    status = subprocess.run(command(root), stdout=log, stderr=log, env=_environment(root)).returncode
  if status:
    raise SmokeError(f"the restarted training ended with status {status}; {_tail(root / 'resumed.log')}")


def losses(workdir: pathlib.Path) -> dict[int, float]:
  """{step: loss} of the whole lines in metrics.jsonl."""
  path, out = workdir / "metrics.jsonl", {}
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      record = json.loads(line)
    except ValueError:
      continue  # torn by the kill
    out[record["step"]] = record["loss"]
  return out


def complete(workdir: pathlib.Path) -> list[int]:
  """Steps whose checkpoint has been committed."""
  folder = workdir / "checkpoints"
  return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def ledger(workdir: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in (workdir / "goodput.jsonl").read_text().splitlines()]


def _environment(root: pathlib.Path) -> dict[str, str]:
  cache = {"JAX_COMPILATION_CACHE_DIR": root / "cache", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0.5}
  return os.environ | {k: str(v) for k, v in cache.items()}


def _tail(log: pathlib.Path) -> str:
  lines = log.read_text(errors="replace").splitlines()[-8:]
  return f"the end of {log}:\n" + "\n".join(lines)
