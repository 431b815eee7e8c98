"""Held-out losses that decide how training goes on: the band of noise levels that BD3-LM searches for.

What is found stands in the training state, and batches and draws follow from the step: a resumed run finds
what the uninterrupted one found.
"""

from __future__ import annotations

import jax
import numpy as np

from genmodels import system
from genmodels.parallel import multihost, rules
from genmodels.state import TrainState
from genmodels.step import bind


class Survey:
  """survey(state, step) → the state with new statistics; one compiled program for all steps.

  Args:
    parts: system.System, whose corruption has a `search`. mesh: where rows are spread. key: of the run.
  """

  def __init__(self, parts: system.System, mesh, key):
    self.parts, self.mesh, self.key = parts, mesh, key
    self.search = parts.objective.corruption.search
    self.batch_size = int(parts.cfg.batch_size)
    self.data = parts.data.heldout(self.batch_size)
    fns, objective = system.functions(parts.cfg, parts.exact), parts.objective

    def sums(trees, row, key, step, r):
      nets = bind(fns, trees, parts.latent, player="")
      return objective.survey(nets, row, key, step, (r, self.search.draws))

    self._sums = jax.jit(sums, out_shardings=rules.replicated(mesh))
    self._update = jax.jit(objective.update, out_shardings=rules.replicated(mesh))

  def due(self, step: int) -> bool:
    return step % self.search.every == 0

  def __call__(self, state: TrainState, step: int) -> TrainState:
    total = None
    with rules.use_mesh(self.mesh):
      for i in range(min(self.search.batches, self.data.plan.steps)):
        row = system.row_of(multihost.whole_batch(self.data.batch(i), self.mesh))
        for r in range(self.search.draws):
          # Fetched one by one: programs with collectives in flight together may deadlock host devices.
          one = jax.device_get(self._sums(state.trees, row, self.key, np.int32(step), np.int32(r)))
          total = one if total is None else jax.tree.map(np.add, total, one)
      found = self._update(state.stats["objective"], total)
    return state.replace(stats={**state.stats, "objective": found})


def of(parts: system.System, mesh, key) -> Survey | None:
  """The survey that a system's corruption asks for, or None."""
  search = parts.objective.corruption.search
  return Survey(parts, mesh, key) if search is not None and search.every else None
