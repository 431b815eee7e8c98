"""The training loop: mesh, data, system, state; restore; steps, evaluations, samples, saves.

  genmodels train --config configs/language/bd3lm.py:tiny --workdir runs/bd3lm [key=value …]

The same command again continues the run. Files in the workdir: config.json (as resolved), metrics.jsonl and
TensorBoard events, goodput.jsonl, samples/, checkpoints/. SIGTERM saves and exits 0.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

from genmodels import config, evals, metrics, models, optim, system
from genmodels import step as steps
from genmodels.checkpoint import adopt, hf_export
from genmodels.checkpoint import init as initialisation
from genmodels.checkpoint import manager as checkpoints
from genmodels.config import ConfigError
from genmodels.parallel import mesh as meshes
from genmodels.parallel import multihost, rules
from genmodels.sampling import run as runs


@dataclasses.dataclass(frozen=True)
class TrainConfig(steps.StepConfig):
  """Section `train`: the loop's knobs besides those of a step.

  Fields:
    steps: length of the run.
    log_every: steps between metric records.
    save_every: steps between checkpoints, 0 saves only at the end.
    sample_every: steps between samples, 0 never samples.
    samples: rows of a sample.
    tensorboard: write event files besides metrics.jsonl.
    measure_peak: on a device without a known peak, measure a matmul to state an MFU against.
  """

  steps: int = 1000
  log_every: int = 10
  save_every: int = 1000
  sample_every: int = 0
  samples: int = 4
  tensorboard: bool = True
  measure_peak: bool = False

  def __post_init__(self):
    super().__post_init__()
    if self.steps < 1 or self.log_every < 1:
      raise ValueError(f"steps is {self.steps} and log_every {self.log_every}; both must be at least 1")


@dataclasses.dataclass
class Run:
  """What a finished (or stopped) run leaves in memory."""

  state: Any
  system: Any
  mesh: Any
  step: int
  last: dict
  evals: list
  stopped: bool


def train(cfg, workdir: str, *, debug: bool = False, out=None) -> Run:
  """Trains the system `cfg` in `workdir`, going on from the newest verified checkpoint there.

  Args:
    cfg: ConfigDict of a system.
    workdir: folder of the run; created if needed.
    debug: run without jit and without scan, printing shapes and the first non-finite tensor.
    out: stream of the progress line (default stderr).

  Raises:
    ConfigError: before anything compiles.
    RestoreError: checkpoints exist and none verifies.
  """
  lead = jax.process_index() == 0
  workdir = pathlib.Path(workdir)
  ledger = metrics.Ledger(workdir / "goodput.jsonl" if lead else None)
  adopt.networks(cfg, str(workdir))

  # -- the pieces, all checked before anything compiles -----------------------------------------------
  tcfg = config.build(TrainConfig, cfg.train, "train")
  ocfg = config.build(optim.OptimConfig, cfg.optim, "optim")
  ecfg = config.build(evals.EvalConfig, cfg.eval, "eval")
  ccfg = config.build(checkpoints.CheckpointConfig, cfg.checkpoint, "checkpoint")
  mcfg = config.build(meshes.MeshConfig, cfg.mesh, "mesh")
  batch_size = int(cfg.batch_size)
  if batch_size % tcfg.accumulate:
    raise ConfigError(
      "the global batch is not divisible by train.accumulate", key="batch_size", value=batch_size,
      fix=f"a multiple of {tcfg.accumulate}",
    )  # fmt: skip
  mesh = meshes.make_mesh(mcfg)
  shards = mesh.shape["data"] * mesh.shape["fsdp"]
  if batch_size % shards:
    raise ConfigError(
      f"the global batch does not divide over the mesh's data × fsdp = {shards}",
      key="batch_size", value=batch_size,
      fix=f"a multiple of {shards}",
    )  # fmt: skip
  parts = system.build(cfg, workdir=str(workdir), mesh=mesh)
  model, objective = parts.model, parts.objective
  program = steps.program(parts, tcfg, ocfg, tcfg.steps, mesh)
  others = steps.player_configs(cfg)
  # A table: computed when it is logged, the rate would queue behind the running step and be charged its time.
  rates = np.asarray(jax.jit(jax.vmap(program.lr))(np.arange(tcfg.steps)))
  resolved = config.resolved(
    {
      "train": tcfg,
      "optim": ocfg,
      "eval": ecfg,
      "checkpoint": ccfg,
      "mesh": mcfg,
      "model": model.cfg,
      "objective": objective,
      "players": others,
    }
  )
  if lead:
    workdir.mkdir(parents=True, exist_ok=True)
    config.write_json(workdir / "config.json", config.plain(cfg))
    config.write_json(workdir / "resolved.json", resolved)
    if cfg.init.get("path"):
      hf_export.carry(cfg.init.path, workdir)
  progress = metrics.Progress(tcfg.steps, out) if lead else None
  say = progress.note if lead else (lambda text: None)
  for note in parts.notes:
    say(f"note: {note}")
  tiles = ", ".join(f"{pattern} {t[0]}×{t[1]}" for pattern, t in program.tiles().items())
  say(f"attention {parts.attention} · tiles {tiles}")

  # -- state: born sharded, restored, imported or fresh -----------------------------------------------
  key = jax.jit(lambda: jax.random.key(int(cfg.seed)), out_shardings=rules.replicated(mesh))()
  with rules.use_mesh(mesh):
    saver = checkpoints.Manager(workdir / "checkpoints", ccfg)
    with ledger.span("restore"):
      state, origin = initialisation.initialise(
        saver, program.state, lambda: program.fresh(key), config.plain(cfg.init), tcfg.steps,
        axes=program.axes, rebuild=program.rebuild,
        others={name: net.logical_axes() for name, net in parts.nets.items()}, cfg=config.plain(cfg),
      )  # fmt: skip
  say(f"parameters {models.count(program.shapes):,} · mesh {dict(mesh.shape)} · {origin}")
  for text in program.dropped:
    say(f"note: replicated: {text}")

  # -- step, data, evaluation, samples -----------------------------------------------------------------
  compiled = program.step if debug else program.jitted
  ranges = multihost.row_ranges(rules.row_sharding(mesh), batch_size)
  held = evals.Evaluator(ecfg, parts, mesh, key) if ecfg.every else None
  survey = evals.survey.of(parts, mesh, key)
  peak = metrics.peak(measure=tcfg.measure_peak)
  meter = metrics.Meter(tcfg.steps, ledger.training, peak, mesh.size)
  flops = steps.flop_counts(parts, program.moving)
  start = int(state.step)
  writer = metrics.Writer(workdir, restored=start, tensorboard=tcfg.tensorboard) if lead else None
  preemption = multihost.Preemption()
  run = Run(state, parts, mesh, start, {}, [], False)
  tokens_per_step = parts.data.meta.seq_len * batch_size

  def record(at: int, m: dict, documents: list) -> None:
    """Metrics of step `at`, fetched when the next one is already running."""
    m = jax.device_get(m)  # waits for the step: this time is the step's
    with ledger.span("metrics"):
      _refuse_overflow(at, m["work"], model.cfg.attention_capacity)
      if at > start + 1:  # the first step's time is compilation, which no rate counts
        meter.add(
          tokens=tokens_per_step,
          slots=sum(int(w["slots"]) for w in m["work"].values() if w),
          loss_tokens=sum(int(n) for w in m["work"].values() if w for n in w["reads"].values()),
          flops=steps.flops(flops, m["work"]),
        )
      idle = tuple(f"{name}/" for name, p in others.items() if at % p.every)  # they report zeros
      m = {k: v for k, v in m.items() if not k.startswith(idle)}
      scalars = {k: float(v) for k, v in m.items() if np.ndim(v) == 0 and not isinstance(v, dict)}
      if scalars["skipped"]:
        say(
          f"step {at}: update refused (loss {scalars['loss']:.4g}, gradient norm "
          f"{scalars['grad_norm']:.4g}); documents {documents}"
        )
      if at % tcfg.log_every and at != tcfg.steps:
        return
      for term, sums in m["source"].items():
        scalars |= metrics.group_means(f"source/{term}", sums, parts.data.meta.sources)
      scalars |= meter.report(at) | {"lr": float(rates[at - 1]), "rss_bytes": metrics.rss_bytes()}
      run.last = scalars
      if lead:
        writer.write(at, scalars)
        progress.show(at, scalars, peak)
        ledger.flush(at)

  def save(at: int, metric=None) -> None:
    with ledger.span("save"):
      saver.save(
        at, state, meta={"config": config.plain(cfg), "plan": parts.data.plan.chain()[-1:]}, metric=metric
      )

  pending = None
  # After the first step nothing may move between host and device unless the code says so.
  guard = (lambda: jax.transfer_guard("disallow")) if not debug else contextlib.nullcontext
  try:
    with rules.use_mesh(mesh), _debugging(debug, say):
      ledger.begin(restored=start)
      batches = parts.data.loader(ranges).at(start)
      for at in range(start + 1, tcfg.steps + 1):
        with ledger.span("data"):
          local = next(batches)
          row = system.row_of(multihost.global_batch(local, mesh, batch_size))
        first = at == start + 1
        # On a CPU nothing is gained by a second step in flight: host and device are the same cores, and on a
        # mesh of host devices several steps deadlock its collectives. Rates are then of their own steps.
        wait = first or jax.default_backend() == "cpu"
        with (
          ledger.span("compile") if first else contextlib.nullcontext(),
          contextlib.nullcontext() if first else guard(),
        ):
          state, m = compiled(state, row, key)
          if wait:
            jax.block_until_ready((state, m))
        if pending is not None:
          record(*pending)
        pending = (at, m, _examples(local))
        if wait:
          record(*pending)
          pending = None
        if survey is not None and survey.due(at):
          if pending is not None:
            record(*pending)
            pending = None
          with ledger.span("survey"):
            state = survey(state, at)
            found = {k: np.round(np.asarray(v), 4).tolist() for k, v in state.stats["objective"].items()}
            say(f"step {at}: survey of held-out losses: {found}")
        run.state, run.step = state, at

        metric = None
        if held is not None and (at % ecfg.every == 0 or at == tcfg.steps):
          if pending is not None:
            record(*pending)
            pending = None
          with ledger.span("eval"):
            result = held(steps.evaluated_trees(state, tcfg), at)
            run.evals.append({"step": at, **result})
            metric = result[evals.METRIC]
            if lead:
              writer.write(at, {f"eval/{k}": v for k, v in result.items() if np.ndim(v) == 0})
              say(f"step {at}: held out {metric:.4f} {evals.METRIC.replace('_', ' ')}")
        if tcfg.sample_every and at % tcfg.sample_every == 0:
          with ledger.span("sample"):
            runs.during_training(
              cfg, parts, steps.evaluated_trees(state, tcfg), workdir / "samples", at, tcfg.samples
            )
        saver.check()  # a save that failed in the background
        stop = preemption.requested(at)
        if stop or at == tcfg.steps or (tcfg.save_every and at % tcfg.save_every == 0):
          if pending is not None:  # a step that must not stand is not saved either
            record(*pending)
            pending = None
          save(at, metric)
        if stop and at < tcfg.steps:
          run.stopped = True
          say(f"step {at}: asked to stop; saved, the same command goes on from here")
          break
      if pending is not None:
        record(*pending)
      with ledger.span("save"):
        saver.wait()
  finally:
    preemption.close()
    saver.close()
    ledger.flush(run.step)
    if lead:
      writer.close()
      progress.close()
  return run


def _examples(batch: dict, most: int = 16) -> list:
  """(source and document, piece) of the first documents of a batch, for messages."""
  used = [batch["example_id"][b, : d.max() + 1] for b, d in enumerate(batch["doc"])]
  return np.concatenate(used)[:most].tolist()


def _refuse_overflow(at: int, work: dict, capacity) -> None:
  """ConfigError if tile lists of step `at` were too short: its loss is NaN for that reason alone."""
  found = {p: int(n) for w in work.values() for p, n in w.get("overflow", {}).items() if int(n)}
  if found:
    more = f"{min(2 * capacity, 1.0):g}, or None (room for every mask)"
    raise ConfigError(
      f"step {at}: the batch's mask touches more tiles than the attention's lists have room for (pattern "
      f"{', '.join(found)}), so its loss is NaN; the update was refused and the parameters are as before",
      key="model.attention_capacity", value=capacity, fix=more,
    )  # fmt: skip


@contextlib.contextmanager
def _debugging(on: bool, say):
  """No jit and no scan, every module's shapes, and the first non-finite tensor by name."""
  if not on:
    yield
    return
  with jax.disable_jit(), models.debug(say):
    yield


def main(argv: list[str] | None = None) -> int:
  """`genmodels train`."""
  parser = argparse.ArgumentParser(prog="genmodels train", description=__doc__.split("\n")[0])
  parser.add_argument("--config", required=True, help="path or name of a system, with :variant")
  parser.add_argument("--workdir", required=True, help="folder of the run; the same one again continues it")
  parser.add_argument(
    "--from", dest="source", default="", help="an import: its model, vocabulary and parameters (at step 0)"
  )
  parser.add_argument(
    "--debug", action="store_true", help="no jit, no scan; shapes and the first non-finite tensor"
  )
  parser.add_argument("overrides", nargs="*", help="key.path=value")
  args = parser.parse_args(argv)
  cfg = config.load(args.config, args.overrides)
  multihost.initialize()
  if args.source:
    adopted = adopt.adopt(cfg, args.source, args.workdir)
    for text in args.overrides:  # they win over the checkpoint too
      config.override(cfg, text)
    if jax.process_index() == 0:
      print("\n".join(adopted.notes))
  run = train(cfg, args.workdir, debug=args.debug)
  if jax.process_index() == 0 and not run.stopped:
    loss = f", loss {run.last['loss']:.4f}" if run.last else ""
    print(f"done: step {run.step}{loss}, workdir {args.workdir}")
  return 0
