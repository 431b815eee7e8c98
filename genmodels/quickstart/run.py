"""The stages of a quickstart: each leaves a record, so the same command goes on where it stopped.

  data → ar → convert → scratch → evaluations → samples → summary.json, report.html

Lengths are steps. The from-scratch run takes as many steps as reach the counted FLOPs of AR pretraining
and conversion together; no length depends on seconds, so two runs print the same numbers.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import platform
import resource
import subprocess
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import genmodels
from genmodels import config, evals, metrics, train
from genmodels.data import prepare
from genmodels.parallel import rules
from genmodels.quickstart import recipes, report
from genmodels.quickstart.live import Live
from genmodels.sampling import run as saved

# name: (run, block size to evaluate and to decode with; 0 for none)
MODELS = {"ar": ("ar", 0), **{f"b{b}": ("convert", b) for b in recipes.BLOCKS}, "scratch": ("scratch", 0)}
PROMPTS = ("def ", "class ")
NEW_TOKENS = 96


@dataclasses.dataclass(frozen=True)
class Options:
  """What distinguishes one quickstart from another; a workdir belongs to one of them.

  Fields:
    steps_scale: factor on the lengths of pretraining and conversion.
  """

  steps_scale: float = 1.0

  def __post_init__(self):
    if not 0 < self.steps_scale <= 1000:
      raise ValueError(f"steps_scale is {self.steps_scale}; it must be positive")


class Stages:
  """Runs stages once: a finished one is read back from its record.

  Args:
    root: the quickstart's workdir.
    options: of this quickstart; records of others are refused.
    live: where to write.
    names: stages in order, for "stage 2/9".

  Raises:
    ConfigError: the workdir holds a quickstart with other options.
  """

  def __init__(self, root: pathlib.Path, options: Any, live: Live, names: list[str]):
    self.root, self.live, self.names = root, live, names
    key = {"options": dataclasses.asdict(options), "version": genmodels.__version__}
    self.key = json.loads(json.dumps(key))  # as it will be read: a tuple comes back as a list
    mark = root / "quickstart.json"
    if mark.exists() and (found := json.loads(mark.read_text())) != self.key:
      raise config.ConfigError(
        f"{root} was begun with {found}, now {self.key}", key="workdir", value=str(root),
        fix="give another --workdir, or delete this one",
      )  # fmt: skip
    (root / "stages").mkdir(parents=True, exist_ok=True)
    _write_json(mark, self.key)

  def __call__(self, name: str, title: str, do: Callable[[], dict]) -> dict:
    """The result of a stage, with "seconds" and "cpu_seconds" of the process that finished it added."""
    path = self.root / "stages" / f"{name}.json"
    head = f"[{self.names.index(name) + 1}/{len(self.names)}] {title}"
    if path.exists():
      self.live.stage("", f"{head}: done before")
      return json.loads(path.read_text())
    self.live.stage(title, head)
    wall, cpu = time.monotonic(), _cpu_seconds()
    result = do()
    result |= {"seconds": time.monotonic() - wall, "cpu_seconds": _cpu_seconds() - cpu}
    _write_json(path, result)
    return result


def quickstart(root: str, options: Options = Options(), out=None) -> dict:
  """Runs what is left of a quickstart in `root`; writes summary.json and report.html there.

  Args:
    root: workdir, made if missing.
    options: lengths.
    out: stream for progress, default stderr.

  Returns:
    The summary.

  Raises:
    ConfigError: the workdir holds a quickstart with other options.
  """
  folder = pathlib.Path(root)
  folder.mkdir(parents=True, exist_ok=True)
  keep_compiled(folder)
  names = ["data", *recipes.PARTS, *(f"eval-{m}" for m in MODELS), "samples"]
  with Live(out) as live:
    stages = Stages(folder, options, live, names)
    began = time.monotonic()
    live.write(f"quickstart in {folder}: about 330 seconds of CPU time\n")
    facts = stages("data", "text of the Python standard library", lambda: _prepare(folder))
    runs = {}
    for part in recipes.PARTS:
      do = functools.partial(_train, part, folder, options, runs, live)
      runs[part] = stages(part, recipes.TITLES[part], do)
    opened = functools.cache(lambda part: saved.load_run(folder / part))
    evaluator = functools.cache(lambda part: _evaluator(opened(part)))
    results = []
    for name, (part, block) in MODELS.items():
      do = functools.partial(lambda part, block: evaluator(part)(opened(part).trees, 0, block), part, block)
      found = stages(f"eval-{name}", f"held-out likelihood: {title(name)}", do)
      results.append({"name": name, "title": title(name), "run": part, "block": block, **found})
    samples = stages("samples", "samples", lambda: _samples(opened))

    live.stage("", "writing summary.json and report.html")
    summary = _summary(facts, runs, results, samples, folder, options)
    _write_json(folder / "summary.json", summary)
    report.write(summary, folder, folder / "report.html")
    live.write(table(summary) + "\n")
    live.write(f"{folder / 'report.html'} ({metrics.duration(time.monotonic() - began)})\n")
  return summary


def title(name: str) -> str:
  """A name of MODELS in words."""
  titles = {"ar": "autoregressive", "scratch": "masked diffusion, from scratch"}
  return titles.get(name) or f"converted, blocks of {name[1:]}"


# ------------------------------------------------------------------------------------------- stages


def _prepare(root: pathlib.Path) -> dict:
  out = root / "data"
  if not out.exists():
    progress = prepare.Progress()
    texts = prepare.read_python(progress, recipes.FILES)
    prepare.prepare(texts, str(out), tokenizer=recipes.TOKENIZER, heldout=recipes.HELD_OUT, progress=progress)
  splits = {s: json.loads((out / s / "manifest.json").read_text()) for s in ("train", "heldout")}
  keys = ("documents", "tokens", "source_bytes", "vocab_size")
  return {s: {k: m[k] for k in keys} for s, m in splits.items()}


def _train(part: str, root: pathlib.Path, options: Options, runs: dict, live: Live) -> dict:
  """Trains one run, counting its FLOPs first."""
  steps = 0
  if part == "scratch":
    live.stage("counting FLOPs")
    steps = recipes.equal_steps(str(root), runs["ar"]["flops"] + runs["convert"]["flops"])
  cfg = recipes.recipe(part, str(root), scale=options.steps_scale, steps=steps)
  live.stage(recipes.TITLES[part])
  flops = recipes.total_flops(cfg)
  run = train.train(cfg, str(root / part), out=live)
  if run.stopped:
    raise KeyboardInterrupt  # SIGTERM: the run is saved, the same command goes on
  steps = int(cfg.train.steps)
  tokens = sum(int((b["doc"] >= 0).sum()) for b in (run.system.data.batch(s) for s in range(steps)))
  spent = metrics.goodput(root / part / "goodput.jsonl")  # over all restarts
  return {
    "steps": steps,
    "flops": flops,
    "tokens": tokens,
    "parameters": sum(int(x.size) for x in jax.tree.leaves(run.state.trees["model"])),
    "ledger": {k: round(v, 3) for k, v in spent.items() if k not in ("wall", "unaccounted", "goodput")},
  }


def _evaluator(run: saved.Run) -> evals.Evaluator:
  ecfg = config.build(evals.EvalConfig, run.cfg.eval, "eval")
  return evals.Evaluator(ecfg, run.parts, run.mesh, jax.random.key(int(run.cfg.seed)))


def _samples(opened: Callable[[str], saved.Run]) -> dict:
  """The same prompts continued by every model."""
  out = {}
  for name, (part, block) in MODELS.items():
    # Two tokens a step, the surest first.
    own = {"block": block, "quota": {"kind": "linear", "steps": block // 2}} if block else {}
    out[name] = draw(opened(part), NEW_TOKENS, own)
  return {"models": out}


def draw(run: saved.Run, new: int, sampler: dict | None = None) -> dict:
  """Samples of one model.

  Args:
    new: tokens to generate behind each prompt.
    sampler: changes to the run's sampler section.

  Returns:
    "rows": per prompt the "text" of every token and the "step" it was committed at (−1: given); "steps",
    "forwards" of the loop; "sampler", its settings.
  """
  section = config.plain(run.cfg.sampler) | (sampler or {})
  with rules.use_mesh(run.mesh), warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="sampler.block")  # other block sizes are the point
    made = saved.sampler_of(run.parts, run.step, section)
    row = saved.text_row(run.parts, made, PROMPTS, new)
    got = jax.device_get(made(saved.parameters(run.parts, run.trees), row, jax.random.key(int(run.cfg.seed))))
  rows = []
  for tokens, at, length in zip(got.tokens, got.committed_at, got.lengths):
    shown = range(1, int(length))  # behind BOS
    text = [run.parts.data.tokenizer.decode([tokens[i]]) for i in shown]
    rows.append({"text": text, "step": [int(at[i]) for i in shown]})
  counts = {"steps": int(got.steps), "forwards": int(got.forwards)}
  return {"rows": rows, "sampler": section, **counts}


# ------------------------------------------------------------------------------------------ summary


def _summary(facts, runs, results, samples, folder, options) -> dict:
  """What the report is made of. Whatever a second run may measure differently is under "measured"."""
  clocks = ("seconds", "cpu_seconds", "ledger")
  still = lambda d: {k: v for k, v in d.items() if k not in clocks}
  table, before = [], {"ar": ("ar",), "convert": ("ar", "convert"), "scratch": ("scratch",)}
  for r in results:
    parts = before[r["run"]]
    cost = {k: sum(runs[p][k] for p in parts) for k in ("steps", "tokens", "flops")}
    table.append(still(r) | {"train": cost})
  bound = {r["name"]: r["bits_per_byte"] for r in table}
  pick = lambda r: [runs[p] for p in before[r["run"]]]
  return {
    "options": dataclasses.asdict(options),
    "data": still(facts),
    "runs": {p: still(r) for p, r in runs.items()},
    "results": table,
    "converted_beats_scratch": all(bound[f"b{b}"] < bound["scratch"] for b in recipes.BLOCKS),
    "samples": still(samples),
    "configs": {p: json.loads((folder / p / "config.json").read_text()) for p in runs},
    "measured": {
      "seconds": {
        "data": facts["seconds"], "samples": samples["seconds"],
        **{p: r["seconds"] for p, r in runs.items()},
        **{f"eval-{r['name']}": r["seconds"] for r in results},
      },
      "cpu_seconds": {
        "data": facts["cpu_seconds"], "samples": samples["cpu_seconds"],
        **{p: r["cpu_seconds"] for p, r in runs.items()},
        **{f"eval-{r['name']}": r["cpu_seconds"] for r in results},
      },
      "training_seconds": {r["name"]: sum(map(_training_seconds, pick(r))) for r in results},
      "ledger": {p: r["ledger"] for p, r in runs.items()},
      "machine": machine(),
    },
  }  # fmt: skip


def _training_seconds(run: dict) -> float:
  """Seconds from the first step's compilation to the last save, over all restarts of a run."""
  return sum(v for k, v in run["ledger"].items() if k not in ("init", "down"))


def table(summary: dict) -> str:
  """The results as text."""
  lines = [f"{'model':<32}{'bits/byte':>10}{'tokens':>12}{'TFLOPs':>9}{'seconds':>9}"]
  for r in summary["results"]:
    seconds = summary["measured"]["training_seconds"][r["name"]]
    sign = "" if r["exact"] else "≤ "
    lines.append(
      f"{r['title']:<32}{sign + format(r['bits_per_byte'], '.3f'):>10}{r['train']['tokens']:>12,}"
      f"{r['train']['flops'] / 1e12:>9.2f}{seconds:>9.0f}"
    )
  return "\n".join(lines)


def machine() -> dict:
  """Hardware, versions and commit."""
  import importlib.metadata as meta

  packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
  devices = jax.devices()
  return {
    "cpu": _cpu_name(),
    "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    "devices": f"{len(devices)} × {devices[0].device_kind}",
    "system": f"{platform.system()} {platform.machine()}",
    "python": platform.python_version(),
    "versions": {p: meta.version(p) for p in packages},
    "genmodels": genmodels.__version__,
    "commit": _commit(),
    "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
  }


def _cpu_name() -> str:
  try:
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
      if line.startswith("model name"):
        return line.partition(":")[2].strip()
  except OSError:
    pass
  return platform.processor() or platform.machine()


def _commit() -> str:
  """The checkout's commit, with "+" where files are changed; "" outside of one."""
  here = pathlib.Path(genmodels.__file__).resolve().parent.parent
  ask = lambda *a: subprocess.run(["git", "-C", str(here), *a], capture_output=True, text=True, timeout=10)
  try:
    if not (here / ".git").exists():
      return ""
    commit = ask("rev-parse", "--short=12", "HEAD").stdout.strip()
    return commit + ("+" if ask("status", "--porcelain", "--untracked-files=no").stdout.strip() else "")
  except (OSError, subprocess.TimeoutExpired):
    return ""


def _cpu_seconds() -> float:
  used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
  return sum(u.ru_utime + u.ru_stime for u in used)


def _write_json(path: pathlib.Path, value: Any) -> None:
  temporary = path.with_suffix(".tmp")
  temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False, default=_number), encoding="utf-8")
  os.replace(temporary, path)


def _number(x):
  return np.asarray(x).item()


def keep_compiled(root: pathlib.Path) -> None:
  """Keeps compiled programs in the workdir: going on after an interruption compiles nothing again."""
  jax.config.update("jax_compilation_cache_dir", str((root / "cache").resolve()))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def main(argv: list[str] | None = None) -> int:
  """`genmodels quickstart`."""
  p = argparse.ArgumentParser(
    prog="genmodels quickstart",
    description="Train, convert, evaluate and sample a small model here; the same command again continues.",
  )
  p.add_argument("--workdir", help="folder of runs and report (default runs/quickstart or runs/smoke)")
  p.add_argument("--smoke", action="store_true", help="train, kill, resume, convert, sample; no report")
  p.add_argument("--steps-scale", type=float, default=1.0, help="factor on the lengths of the runs")
  args = p.parse_args(argv)
  if args.smoke:
    from genmodels.quickstart import smoke

    return smoke.smoke(args.workdir or "runs/smoke")
  summary = quickstart(args.workdir or "runs/quickstart", Options(args.steps_scale))
  if not summary["converted_beats_scratch"]:
    print("warning: a converted model is not better than masked diffusion from scratch at equal FLOPs")
  return 0
