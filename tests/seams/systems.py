"""Shipped systems at their tiny size, set up as the trainer sets them up, on any subset of the devices.

The loop itself is tested in tests/test_train.py; here a step is what counts, on meshes of 1, 2, 4, 8.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from typing import Any

import jax

from genmodels import config, optim, system
from genmodels import state as states
from genmodels import step as steps
from genmodels.parallel import mesh as meshes
from genmodels.parallel import multihost, rules

SMALL = ("model.width=32", "model.mlp=64", "data.seq_len=32", "data.documents=40", "eval.every=0")


@functools.cache
def corpus() -> str:
  """Where this process keeps its prepared text."""
  return tempfile.mkdtemp(prefix="genmodels-seams-") + "/python"


@functools.cache
def build(name: str, *overrides: str) -> system.System:
  """The system of configs/<name>.py:tiny, narrowed, then with `overrides`."""
  return system.build(config.load(f"{name}:tiny", [*SMALL, f"data.path={corpus()}", *overrides]))


@dataclasses.dataclass(frozen=True)
class Bench:
  """A system on a mesh: state, compiled step, batches.

  Fields:
    fresh: () → TrainState, placed. step: (state, row, key) → (state, metrics); donates nothing, so that a
      test may start several steps from one state.
    row: step index → Row of the global batch, placed.
  """

  parts: system.System
  mesh: Any
  fresh: Any
  step: Any
  row: Any
  key: jax.Array

  def run(self, count: int) -> tuple[list[float], list]:
    """Losses of the first `count` steps, and [state after the first, state after the last]."""
    losses, kept = [], []
    with rules.use_mesh(self.mesh):
      # Every step waits for all that went before: programs with collectives in flight together may deadlock
      # devices that share few cores.
      state = jax.block_until_ready(self.fresh())
      for at in range(count):
        row = jax.block_until_ready(self.row(at))
        state, m = jax.block_until_ready(self.step(state, row, self.key))
        losses.append(float(m["loss"]))
        if at in (0, count - 1):
          kept.append(jax.device_get(state))
    return losses, kept


def bench(parts: system.System, train: steps.StepConfig = steps.StepConfig(), **sizes: int) -> Bench:
  """`parts` on a mesh of the given sizes (default: one device), by the trainer's own calls."""
  cfg = parts.cfg
  mcfg = meshes.MeshConfig(**{"data": 1, **sizes})
  count = mcfg.data * mcfg.fsdp * mcfg.tensor * mcfg.context
  mesh = meshes.make_mesh(mcfg, jax.devices()[:count])
  shapes, axes = parts.model.abstract_params(), parts.model.logical_axes()
  tx, _ = optim.build(config.build(optim.OptimConfig, cfg.optim, "optim"), shapes, axes, int(cfg.train.steps))
  key = jax.jit(lambda: jax.random.key(int(cfg.seed)), out_shardings=rules.replicated(mesh))()

  def fresh(key):
    return states.create({"model": parts.model.init(key)}, {"model": tx}, steps.initial_stats(train))

  with rules.use_mesh(mesh):
    placed = rules.sharding_tree(mesh, axes, shapes)
    shardings = states.shardings(jax.eval_shape(fresh, key), {"model": placed}, mesh)
    make = jax.jit(fresh, out_shardings=shardings)
  one = steps.make_train_step(parts.objective, parts.fns, tx, train, parts.latent)
  batch_size = int(cfg.batch_size)
  ranges = multihost.row_ranges(rules.row_sharding(mesh), batch_size)

  def row(at):
    return system.row_of(multihost.global_batch(parts.data.batch(at, ranges), mesh, batch_size))

  return Bench(parts, mesh, lambda: make(key), jax.jit(one, out_shardings=(shardings, None)), row, key)
