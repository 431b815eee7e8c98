"""`make study-conversion`: one AR model on real text, then every conversion recipe on the same token budget.

  python -m genmodels.studies.conversion --workdir runs/study-conversion
  python -m genmodels.studies.conversion --workdir runs/small --scale 0.05 --recipes nbdiff,bd3lm

  data → ar → recipes from it, masked diffusion from scratch → likelihoods → curves → memory, pace → report

The estimate is printed first. A finished stage is read back, an interrupted one goes on from its last
checkpoint, so the same command may be killed and repeated. The report is Markdown with PNG figures, and
study.json beside it.

Every run has the trunk, the tokenizer, the batch and the optimiser of the AR model; objective and corruption
are those of the paper's config, with one block size for all and curricula stretched to the run. So what is
compared are objectives, not the papers' hyper-parameters.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import shutil
import statistics
import sys
import time
import warnings
from typing import Any

import jax
import ml_collections

from genmodels import aot, config, evals, metrics, train
from genmodels.config import ConfigError
from genmodels.data import prepare
from genmodels.evals import curve, texts
from genmodels.quickstart import run as quick
from genmodels.quickstart.live import Live
from genmodels.sampling import run as saved
from genmodels.studies import conversion_report, corpus

# name: (system, run it starts from or "", share of the AR budget it takes instead of the recipe's)
RECIPES = {
  "nbdiff": ("nbdiff", "ar", 0),
  "bd3lm": ("bd3lm", "ar", 0),
  "sdar": ("sdar", "ar", 0),
  "fast_dllm_v2": ("fast_dllm_v2", "ar", 0),
  "efficient_dlm": ("efficient_dlm", "ar", 0),
  "wedlm": ("wedlm", "ar", 0),
  "tidar": ("tidar", "ar", 0),
  "dream": ("dream", "ar", 0),
  "diffullama": ("diffullama", "ar", 0),
  "llada": ("llada", "ar", 0),
  "scratch": ("mdlm", "", 0),
  "scratch_all": ("mdlm", "", 1),  # the tokens of the AR model and of a conversion together
}
BLOCKS = (1, 2, 4, 8, 16, 32)
TAUS = (0.05, 0.1, 0.2)  # small models are seldom surer
STEPS = (8, 16, 32, 64)  # of NEW tokens, and of as many in blocks
GIVEN, NEW = 32, 64
DRAWS = 8  # of a likelihood bound
PACE = (3, 15)  # a short run's steps whose median is its pace: behind compilation
STAGE_S = 15.0  # compilation and opening of a stage; measured on two CPU cores


@dataclasses.dataclass(frozen=True)
class Options:
  """What a study is; a workdir belongs to one.

  Fields:
    scale: factor on the token budgets.
    recipes: names in RECIPES.
    size: "small" (1 M parameters, 3 M and 0.7 M tokens) or "large" (20 M, 200 M and 50 M tokens: for a GPU).
    block: block size of the block recipes.
    prompts: continued by every model for the curves.
    documents: held-out pieces evaluated.
  """

  scale: float = 1.0
  recipes: tuple[str, ...] = tuple(RECIPES)
  size: str = "small"
  block: int = 8
  prompts: int = 64
  documents: int = 64

  def __post_init__(self):
    if not 0 < self.scale <= 1000:
      raise ValueError(f"scale is {self.scale}; it must be positive")
    if self.size not in SIZES:
      raise ValueError(f"size is {self.size!r}; expected one of {', '.join(SIZES)}")
    if unknown := [r for r in self.recipes if r not in RECIPES]:
      raise ValueError(f"recipes {unknown} are unknown; known: {', '.join(RECIPES)}")


SIZES = {
  "small": {
    "model": dict(width=128, layers=4, num_heads=4, num_kv_heads=4, head_dim=32, mlp=352, dtype="float32"),
    "tokenizer": "bpe:1024", "seq_len": 256, "batch_size": 16, "lr": 6e-3, "tokens": (3_000_000, 700_000),
  },
  "large": {
    "model": dict(width=384, layers=8, num_heads=6, num_kv_heads=6, head_dim=64, mlp=1024, dtype="bfloat16"),
    "tokenizer": "bpe:8192", "seq_len": 1024, "batch_size": 64, "lr": 3e-3,
    "tokens": (200_000_000, 50_000_000),
  },
}  # fmt: skip


def tokens_of(options: Options, name: str) -> int:
  """Data tokens that a run sees."""
  ar, recipe = (int(n * options.scale) for n in SIZES[options.size]["tokens"])
  if name == "ar":
    return ar
  return recipe + RECIPES[name][2] * ar


def recipe(name: str, root: pathlib.Path, options: Options) -> ml_collections.ConfigDict:
  """The config of one run: "ar" or a name in RECIPES."""
  size = SIZES[options.size]
  system, source, _ = ("ar", "", 0) if name == "ar" else RECIPES[name]
  cfg = config.load(f"language/{system}:tiny")
  steps = max(tokens_of(options, name) // (size["batch_size"] * size["seq_len"]), 10)
  _stretch(cfg.objective, int(cfg.train.steps), steps)
  with cfg.unlocked():
    cfg.batch_size = size["batch_size"]
    cfg.model = {**size["model"], "vocab_multiple": 8, "qk_norm": "rms", "remat": {"preset": "none"}}
    cfg.data = {"kind": "text", "path": str(root / "data"), "seq_len": size["seq_len"]}
    cfg.eval = {"every": 0, "documents": options.documents, "draws": DRAWS}
    cfg.optim = {
      "name": "muon", "lr": size["lr"] * (1 if not source else 2 / 3), "weight_decay": 0.1, "b2": 0.95,
      "schedule": {"kind": "wsd", "warmup": max(steps // 20, 1), "decay_steps": max(steps // 3, 1)},
    }  # fmt: skip
    cfg.train = {"steps": steps, "log_every": 1, "save_every": max(steps // 4, 1), "tensorboard": False}
    cfg.checkpoint = {"keep_last": 2}
    cfg.sampler.length = GIVEN + NEW
    if source:
      cfg.init = {"kind": "workdir", "path": str(root / source)}
  blocks = cfg.objective.get("corruption", {}).get("blocks")
  if blocks and blocks.get("size") is not None and not isinstance(blocks.size, ml_collections.ConfigDict):
    blocks.size = options.block
  return cfg


def _stretch(section, old: int, new: int) -> None:
  """Schedules of the step inside an objective, from a run of `old` steps to one of `new`."""
  for value in section.values() if hasattr(section, "values") else ():
    if hasattr(value, "get") and value.get("kind") == "steps":
      value["at"] = tuple(int(a) * new // old for a in value["at"])
    elif hasattr(value, "values"):
      _stretch(value, old, new)


def estimate(options: Options, rate: float) -> float:
  """Seconds: matmul FLOPs of training and likelihoods at `rate` FLOP/s, and STAGE_S for every stage.

  FLOPs are of slots, not of tokens: two and three streams cost twice and three times.
  """
  size = SIZES[options.size]
  m = size["model"]
  vocab = int(size["tokenizer"].partition(":")[2])
  heads = m["head_dim"] * (2 * m["num_heads"] + 2 * m["num_kv_heads"])
  attention = m["num_heads"] * m["head_dim"] * size["seq_len"]
  per_slot = 6 * m["layers"] * (m["width"] * heads + 3 * m["width"] * m["mlp"] + attention)
  total = 0.0
  for name in ("ar", *options.recipes):
    objective = config.load(f"language/{'ar' if name == 'ar' else RECIPES[name][0]}:tiny").objective
    streams = len(objective.get("layout", {}).get("streams", "c"))
    evaluated = options.documents * size["seq_len"] * (1 if name == "ar" else DRAWS)
    if streams > 1:
      evaluated *= len(BLOCKS)
    tokens = tokens_of(options, name) + evaluated / 3  # an evaluation is a forward pass
    total += tokens * (per_slot * streams + 6 * m["width"] * vocab)
  return total / rate + STAGE_S * 4 * (len(options.recipes) + 1)


def matmul_rate() -> float:
  """FLOP/s that a training step reaches here, about: a tenth of a large matmul's on an accelerator, a seventh
  on a CPU, whose small matrices stay in the cache."""
  peak = metrics.peak(measure=True)
  share = 0.15 if jax.default_backend() == "cpu" else 0.1
  return share * peak.flops * jax.device_count()


# ------------------------------------------------------------------------------------------- stages


def study(root: str, options: Options, out=None) -> dict:
  """Runs what is left of a study in `root`; writes study.json, report.md and figures there.

  Returns:
    The summary.

  Raises:
    ConfigError: the workdir holds a study with other options.
  """
  folder = pathlib.Path(root)
  folder.mkdir(parents=True, exist_ok=True)
  quick.keep_compiled(folder)
  names = [
    "data",
    "ar",
    *options.recipes,
    *(f"{k}-{r}" for k in ("likelihood", "curve") for r in ("ar", *options.recipes)),
    "memory",
    *(f"pace-{r}" for r in ("ar", *options.recipes)),
  ]
  with Live(out) as live:
    stages = quick.Stages(folder, options, live, names)
    began = time.monotonic()
    seconds = estimate(options, matmul_rate())
    live.write(f"{len(names)} stages, about {metrics.duration(seconds)} on this machine if it is idle\n")
    facts = stages("data", "text of this machine", lambda: _prepare(folder, options))
    runs, held, curves = {}, {}, {}
    for name in ("ar", *options.recipes):
      runs[name] = stages(name, f"training: {name}", functools.partial(_train, name, folder, options, live))
    opened = functools.cache(lambda name: saved.load_run(folder / name))
    for name in runs:
      do = functools.partial(_likelihood, name, opened, options)
      held[name] = stages(f"likelihood-{name}", f"held-out likelihood: {name}", do)
    for name in runs:
      do = functools.partial(_curve, name, opened, options)
      curves[name] = stages(f"curve-{name}", f"quality against parallelism: {name}", do)
    memory = stages("memory", "memory of the steps", lambda: _memory(folder, options))
    pace = {}
    for name in runs:
      do = functools.partial(_pace, name, folder, options, live)
      pace[name] = stages(f"pace-{name}", f"time of a step: {name}", do)
    live.stage("", "writing study.json and report.md")
    summary = {
      "options": dataclasses.asdict(options), "data": facts, "runs": runs, "likelihood": held,
      "curves": curves, "memory": memory, "pace": pace, "machine": quick.machine(),
      "estimated_seconds": seconds,
    }  # fmt: skip
    quick._write_json(folder / "study.json", summary)
    conversion_report.write(summary, folder)
    live.write(f"{folder / 'report.md'} ({metrics.duration(time.monotonic() - began)})\n")
  return summary


def _prepare(root: pathlib.Path, options: Options) -> dict:
  out, found = root / "data", {}
  if not out.exists():
    progress = prepare.Progress()
    tokenizer = SIZES[options.size]["tokenizer"]
    prepare.prepare(
      corpus.documents(progress, found), str(out), tokenizer=tokenizer, heldout=0.03, progress=progress,
      meta={"sources": found},
    )  # fmt: skip
  manifests = {s: json.loads((out / s / "manifest.json").read_text()) for s in ("train", "heldout")}
  keys = ("documents", "tokens", "source_bytes", "vocab_size")
  return {s: {k: m[k] for k in keys} for s, m in manifests.items()} | {"sources": found}


def _train(name: str, root: pathlib.Path, options: Options, live: Live) -> dict:
  cfg = recipe(name, root, options)
  run = train.train(cfg, str(root / name), out=live)
  if run.stopped:
    raise KeyboardInterrupt  # SIGTERM: the run is saved, the same command goes on
  spent = metrics.goodput(root / name / "goodput.jsonl")
  size = SIZES[options.size]
  ledger = {k: round(v, 3) for k, v in spent.items() if k not in ("wall", "unaccounted", "goodput")}
  tokens = int(cfg.train.steps) * size["batch_size"] * size["seq_len"]
  return {
    "steps": int(cfg.train.steps), "tokens": tokens, "loss": run.last.get("loss"),
    "parameters": sum(int(x.size) for x in jax.tree.leaves(run.state.trees["model"])),
    "step_seconds": ledger.get("step", 0.0), "ledger": ledger,
  }  # fmt: skip


def _likelihood(name: str, opened, options: Options) -> dict:
  """Held-out bits per byte: by block size where there are blocks, and of an AR stream where there is one."""
  run = opened(name)
  ecfg = config.build(evals.EvalConfig, run.cfg.eval, "eval")
  key = jax.random.key(int(run.cfg.seed))
  blocks = run.parts.objective.corruption.blocks
  by_block: dict[str, Any] = {}
  evaluator = evals.Evaluator(ecfg, run.parts, run.mesh, key)
  exact = evaluator.likelihood(run.step).exact
  for size in (0,) if exact or blocks.whole else BLOCKS:
    by_block[str(size)] = evaluator(run.trees, run.step, size)
  return {"exact": exact, "blocks": by_block, "ar": _ar_stream(run, ecfg, key)}


def _ar_stream(run, ecfg, key) -> dict | None:
  """Bits per byte of a diffusion model's clean stream read as a next-token model."""
  objective = run.parts.objective
  term = next((n for n, t in objective.terms.items() if t.stream == "c" and t.align == "shift"), None)
  if term is None or term == objective.likelihood:
    return None
  parts = dataclasses.replace(run.parts, objective=dataclasses.replace(objective, likelihood=term))
  return evals.Evaluator(ecfg, parts, run.mesh, key)(run.trees, run.step)


def _curve(name: str, opened, options: Options) -> dict:
  """Points of quality against tokens per forward, judged by the AR model."""
  ask = texts.TextConfig(batch_size=16, length=GIVEN + NEW, seed=1)
  judge = texts.TextModel(opened("ar"), ask)
  model = judge if name == "ar" else texts.TextModel(opened(name), ask)
  prompts, rest = curve.held_out(model, options.prompts, GIVEN, NEW)
  if not prompts:
    raise ConfigError(f"no held-out document has {GIVEN + NEW} tokens", key="data", fix="more text")
  objective = model.run.parts.objective
  common = {"temperature": 1.0, "top_p": 0.95}
  if name == "ar" or objective.terms[objective.likelihood].stream == "c":
    settings = [("", {})]
  elif objective.corruption.blocks.whole:
    settings = [(f"steps={s}", {"quota": {"kind": "linear", "steps": s}, "sub_block": 0}) for s in STEPS]
  else:
    quotas = {f"tau={t}": {"kind": "threshold", "tau": t} for t in TAUS}
    if model.run.parts.cfg.sampler.get("active", "blocks") == "blocks":  # a moving window has no fixed steps
      steps = {s: s * options.block // NEW for s in STEPS if s * options.block >= NEW}
      quotas = {f"steps={s}": {"kind": "linear", "steps": n} for s, n in steps.items()}
      quotas[f"tau={TAUS[-1]}"] = {"kind": "threshold", "tau": TAUS[-1]}
    settings = [(name, {"quota": quota, "score": "prob"}) for name, quota in quotas.items()]
  points = []
  for setting, section in settings:
    point = curve.measure(judge, model, name, "", setting, {**section, **common}, prompts, NEW)
    points.append(dataclasses.asdict(point))
  scores = curve.judged(judge, judge, prompts, rest)
  return {"points": points, "held_out": sum(b for b, _ in scores) / sum(n for _, n in scores)}


def _memory(root: pathlib.Path, options: Options) -> dict:
  """Compiled temporaries of the training steps: AR, one copy, two streams, three."""
  out = {}
  for name in ("ar", *(r for r in ("llada", "bd3lm", "fast_dllm_v2") if r in options.recipes)):
    compiled = aot.program(recipe(name, root, options), jax.devices()[:1]).lower().compile()
    found = compiled.memory_analysis()
    out[name] = {"temp_bytes": found.temp_size_in_bytes, "argument_bytes": found.argument_size_in_bytes}
  return out


def _pace(name: str, root: pathlib.Path, options: Options, live: Live) -> dict:
  """Seconds of a step: the median of a short run. Short runs follow each other, so that they have met the
  same machine, which runs of an hour have not."""
  cfg = recipe(name, root, options)
  cfg.train.update(steps=PACE[1], save_every=0)
  cfg.optim.schedule.update(warmup=1, decay_steps=1)
  folder = root / "pace" / name
  shutil.rmtree(folder, ignore_errors=True)  # of an interrupted try
  if train.train(cfg, str(folder), out=live).stopped:
    raise KeyboardInterrupt
  rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  taken = [r["step_seconds"] for r in rows if r.get("step", 0) > PACE[0] and "step_seconds" in r]
  shutil.rmtree(folder)
  return {"step_seconds": statistics.median(taken), "fastest": min(taken), "steps": len(taken)}


def main(argv: list[str] | None = None) -> int:
  """`python -m genmodels.studies.conversion`."""
  p = argparse.ArgumentParser(
    prog="study-conversion", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  p.add_argument("--workdir", default="runs/study-conversion", help="folder of runs and report")
  p.add_argument("--scale", type=float, default=1.0, help="factor on the token budgets")
  p.add_argument("--recipes", default=",".join(RECIPES), help="names, separated by commas")
  p.add_argument("--size", choices=tuple(SIZES), help="default: large where there is an accelerator")
  p.add_argument("--block", type=int, default=8, help="block size of the block recipes")
  p.add_argument("--prompts", type=int, default=64, help="prompts of the curves")
  p.add_argument("--documents", type=int, default=64, help="held-out pieces evaluated")
  args = p.parse_args(argv)
  size = args.size or ("small" if jax.default_backend() == "cpu" else "large")
  options = Options(
    args.scale, tuple(r for r in args.recipes.split(",") if r), size, args.block, args.prompts, args.documents
  )
  warnings.filterwarnings("ignore", message="sampler.block")
  try:
    study(args.workdir, options)
  except ConfigError as e:
    print(f"study-conversion: {e}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())
