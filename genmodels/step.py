"""The training step: denominators, gradients over micro-batches, guard, update, averages.

One jitted function for every objective and model. Nothing here knows a paper's name:

  D      = Σ_micro denominators                      (no forward pass)
  g      = Σ_micro ∇ Σ_term λ_term · sum_term / D_term
  update = optimiser(g) where the guard accepts the step, else nothing

Legend: B rows of the global batch · A micro-batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from genmodels import metrics, optim, system
from genmodels import state as states
from genmodels.contracts import Row
from genmodels.objectives.base import Nets, Objective
from genmodels.parallel import multihost, rules
from genmodels.state import TrainState

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class StepConfig:
  """How a step is taken.

  Fields:
    accumulate: micro-batches of a step; they divide the global batch.
    ema: decay of the "ema" tree, 0 keeps none.
    guard_window, guard_sigma: see optim.guard; a window of 0 refuses only non-finite steps.
  """

  accumulate: int = 1
  ema: float = 0.0
  guard_window: int = 128
  guard_sigma: float = 6.0

  def __post_init__(self):
    if self.accumulate < 1:
      raise ValueError(f"accumulate is {self.accumulate}; it must be at least 1")
    if not 0 <= self.ema < 1:
      raise ValueError(f"ema is {self.ema}; it must lie in [0, 1)")


def micro_batches(row: Row, count: int) -> Row:
  """Splits rows [B, …] into [A, B/A, …], taking rows a::A so that no row leaves its device."""

  def split(x):
    if x.shape[0] % count:
      raise ValueError(f"batch_size {x.shape[0]} is not divisible by train.accumulate {count}")
    return jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)

  return jax.tree.map(split, row)


def bind(
  fns: Mapping[str, Callable], trees: Mapping[str, Any], latent=None, player: str = "model", key=None
) -> Nets:
  """Binds network functions fn(trees, *args) to trees; only the player's own tree lets gradients pass.

  Args:
    player: the network being trained, "" for none.
    key: its dropout key; without one nothing is dropped.
  """
  stopped = {k: v if k == player else jax.lax.stop_gradient(v) for k, v in trees.items()}

  def bound(name, fn):
    mine = stopped if name == player else jax.lax.stop_gradient(stopped)
    noise = {"key": key} if key is not None and name == player else {}
    return lambda *args, **kw: fn(mine, *args, **(noise | kw))

  return Nets({name: bound(name, fn) for name, fn in fns.items()}, stopped, latent, player)


def make_train_step(
  objective: Objective,
  fns: Mapping[str, Callable],
  tx: optax.GradientTransformation,
  cfg: StepConfig = StepConfig(),
  latent: Any = None,
  sources: int = 1,
  trainable: Any = None,
) -> Callable[[TrainState, Row, Array], tuple[TrainState, dict]]:
  """Builds step(state, row, key) -> (state, metrics), to be jitted with the state donated.

  Args:
    objective: prepares inputs, targets, denominators; sums the loss.
    fns: {name: fn(trees, inputs, targets, **kw) -> Outputs}; "model" is trained.
    tx: the optimiser of trees["model"].
    latent: the bound Latent, or None.
    trainable: bool tree like trees["model"], see optim.trainable: the rest gets no gradient; None: all.
    sources: data sources, for the loss by source (only where there are several).

  Returns:
    The step. Its metrics: scalars "loss", "loss/<term>", "denominator/<term>", ratios, "grad_norm",
    "update_norm", "skipped"; and trees "work" (objectives.base.work by network) and "source"
    {term: {"sum", "weight"}[sources]}.
  """
  scales = objective.scales

  def denominators(row, key, step):
    return objective.denominators(row, key, step, latent)

  def gradients(params, trees, row, key, step, total, index):
    def loss_of(params):
      params = params if trainable is None else optim.stop_frozen(params, trainable)
      drop = jax.random.fold_in(jax.random.fold_in(key, step), index)
      nets = bind(fns, {**trees, "model": params}, latent, key=drop)
      sums, _, aux = objective.run(nets, row, key, step)
      if lost := sorted(set(total) - set(sums)):
        raise ValueError(
          f"{type(objective).__name__}.run sums no {', '.join(lost)}: end it with self.routed(…)"
        )
      loss = sum(scales[t](step) * s / jnp.maximum(total[t], 1e-6) for t, s in sums.items())
      # Per-token values become sums here, so that micro-batches add up.
      source = {
        t: metrics.by_group(v, jnp.ones_like(v), metrics.source_of(row), sources)
        for t, v in aux["per_token"].items()
        if sources > 1 and v.shape == row.doc.shape
      }
      return loss, (sums, {"ratios": aux["ratios"], "work": aux.get("work", {}), "source": source})

    (loss, (sums, aux)), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    return grads, {"loss": loss, "sums": sums, **aux}

  def step_fn(state: TrainState, row: Row, key: Array) -> tuple[TrainState, dict]:
    params, step = state.trees["model"], state.step
    if cfg.accumulate == 1:
      total = denominators(row, key, step)
      grads, m = gradients(params, state.trees, row, key, step, total, 0)
    else:
      micro = micro_batches(row, cfg.accumulate)
      add = lambda a, b: jax.tree.map(jnp.add, a, b)
      first = jax.tree.map(lambda x: x[0], micro)
      shape = jax.eval_shape(lambda r: denominators(r, key, step), first)
      zeros = lambda s: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), s)
      total, _ = jax.lax.scan(lambda c, r: (add(c, denominators(r, key, step)), None), zeros(shape), micro)
      one = lambda r, i: gradients(params, state.trees, r, key, step, total, i)
      acc = zeros(jax.eval_shape(one, first, 0))
      index = jnp.arange(cfg.accumulate)
      (grads, m), _ = jax.lax.scan(lambda c, x: (add(c, one(*x)), None), acc, (micro, index))

    grad_norm = optax.global_norm(grads)
    ok, guard = _guard(cfg, state.stats.get("guard"), m["loss"], grad_norm)
    updates, opt = tx.update(grads, state.opt["model"], params, step=step)
    trees = {**state.trees, "model": optax.apply_updates(params, updates)}
    if "ema" in state.trees:
      count = state.stats["ema_count"]
      trees["ema"] = optim.ema(state.trees["ema"], trees["model"], count, cfg.ema)
    trees = optim.select(ok, trees, state.trees)
    opt = optim.select(ok, opt, state.opt["model"])
    stats = dict(state.stats)
    if guard is not None:
      stats["guard"] = guard
    if "ema_count" in stats:
      stats["ema_count"] = stats["ema_count"] + ok.astype(jnp.int32)
    out = {
      "loss": m["loss"],
      **{f"loss/{t}": s / jnp.maximum(total[t], 1e-6) for t, s in m["sums"].items()},
      **{f"denominator/{t}": d for t, d in total.items()},
      **{k: s / jnp.maximum(n, 1) for k, (s, n) in m["ratios"].items()},
      "grad_norm": grad_norm,
      "update_norm": optax.global_norm(updates),
      "skipped": jnp.logical_not(ok).astype(jnp.int32),
      "work": m["work"],
      "source": m["source"],
    }
    return TrainState(step + 1, trees, {**state.opt, "model": opt}, stats), out

  return step_fn


def initial_stats(cfg: StepConfig) -> dict:
  """The statistics that `make_train_step` keeps in TrainState.stats."""
  stats = {}
  if cfg.guard_window:
    stats["guard"] = optim.guard_stats(cfg.guard_window)
  if cfg.ema:
    stats["ema_count"] = jnp.zeros([], jnp.int32)
  return stats


def _guard(cfg, stats, loss, grad_norm):
  if stats is None:
    return jnp.isfinite(loss) & jnp.isfinite(grad_norm), None
  return optim.guard(stats, loss, grad_norm, cfg.guard_window, cfg.guard_sigma)


def evaluated_trees(state: TrainState, cfg: StepConfig) -> dict:
  """The trees to evaluate and to sample from: the average where one is kept."""
  model = state.trees["ema"] if cfg.ema else optim.eval_params(state.opt["model"], state.trees["model"])
  return {**state.trees, "model": model}


@dataclasses.dataclass(frozen=True)
class Program:
  """A training step on a mesh and the state it moves. Nothing is compiled, no array is made: the mesh may be
  of devices that are not here.

  Use everything inside `rules.use_mesh(mesh)`.

  Fields:
    parts, mesh, accumulate: what it was made of.
    step: (state, row, key) -> (state, metrics), not jitted; jitted: the same, compiled on its first call,
      the state donated.
    state: TrainState of ShapeDtypeStructs with their shardings. key: of the run, alike.
    fresh: jitted, key -> a new state in place. rebuild: jitted, trees -> a state around them.
    lr: step -> learning rate. moving: bool tree, what is trained.
    shapes, axes: of the parameters. dropped: parameters left whole where the mesh does not divide them.
  """

  parts: Any
  mesh: Any
  accumulate: int
  step: Callable
  jitted: Callable
  state: TrainState
  key: jax.ShapeDtypeStruct
  fresh: Callable
  rebuild: Callable
  lr: Callable
  moving: Any
  shapes: Any
  axes: Any
  dropped: tuple[str, ...]

  def rows(self, count: int = 0) -> Row:
    """The global batch (or `count` rows) as ShapeDtypeStructs with their shardings; reads one row of data."""
    count = count or int(self.parts.cfg.batch_size)
    tokens, others = rules.batch_sharding(self.mesh), rules.row_sharding(self.mesh)

    def shape(name, x):
      sharding = tokens if name in multihost.TOKEN_ARRAYS else others
      return jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype, sharding=sharding)

    return system.row_of({name: shape(name, x) for name, x in self.parts.data.batch(0, [(0, 1)]).items()})

  def lower(self):
    """The step lowered for the mesh's devices: `.compile()` it to learn its memory before there are any."""
    with rules.use_mesh(self.mesh):
      return self.jitted.lower(self.state, self.rows(), self.key)

  def tiles(self) -> dict[str, Any]:
    """{mask pattern: tile sizes} of the attention of a training step."""
    parts = self.parts

    def plans(row, key):
      return parts.model.plans(parts.objective.prepare(row, key, jnp.int32(0), parts.latent)[0])

    with rules.use_mesh(self.mesh):
      made = jax.eval_shape(plans, self.rows(int(parts.cfg.batch_size) // self.accumulate), self.key)
    return {pattern: plan.tiles for pattern, plan in made.items()}


def program(parts: system.System, cfg: StepConfig, ocfg: optim.OptimConfig, steps: int, mesh) -> Program:
  """The training step of a system, as the trainer runs it.

  Args:
    steps: length of the run, for the schedule.

  Raises:
    ValueError: parameters that the mesh does not divide, a schedule that does not fit.
  """
  model, objective = parts.model, parts.objective
  shapes, axes = model.abstract_params(), model.logical_axes()
  tx, lr = optim.build(ocfg, shapes, axes, steps)
  begin = lambda trees: states.create(trees, {"model": tx}, initial_stats(cfg))

  def fresh(key):
    params = model.init(key)
    return begin({"model": params, "ema": params} if cfg.ema else {"model": params})

  dropped: list[str] = []
  key = jax.eval_shape(lambda: jax.random.key(0))
  key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=rules.replicated(mesh))
  with rules.use_mesh(mesh):
    abstract = jax.eval_shape(fresh, key)
    placed = rules.sharding_tree(mesh, axes, shapes, dropped=dropped)
    shardings = states.shardings(abstract, {"model": placed}, mesh)
    state = states.abstract(fresh, key, shardings=shardings)
  moving = optim.trainable(ocfg, shapes)
  sources = len(parts.data.meta.sources)
  step = make_train_step(objective, parts.fns, tx, cfg, parts.latent, sources, moving)
  return Program(
    parts=parts,
    mesh=mesh,
    accumulate=cfg.accumulate,
    step=step,
    jitted=jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)),
    state=state,
    key=key,
    fresh=jax.jit(fresh, out_shardings=shardings),
    rebuild=jax.jit(begin, out_shardings=shardings),
    lr=lr,
    moving=moving,
    shapes=shapes,
    axes=axes,
    dropped=tuple(dropped),
  )
