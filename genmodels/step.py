"""The training step: denominators, gradients over micro-batches, guard, update, averages.

One jitted function for every objective and model. Nothing here knows a paper's name. For each player in turn:

  D      = Σ_micro denominators of its terms         (no forward pass)
  g      = Σ_micro ∇ Σ_term λ_term · sum_term / D_term   (of its own trees; all others stand still)
  update = optimiser(g) where the guard accepts the step, else nothing

then the objective's statistics, then the step. Most systems have one player, "model"; a critic, a
discriminator or a policy is one more, and sees the trees as the players before it left them.

Legend: B rows of the global batch · A micro-batches.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from genmodels import config, metrics, models, optim, system
from genmodels import state as states
from genmodels.config import ConfigError
from genmodels.contracts import Row
from genmodels.models import moe
from genmodels.objectives import router
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


@dataclasses.dataclass(frozen=True)
class PlayerConfig:
  """Section `players.<name>`: who trains what. "model" is there without one and comes first, then the others
  by name.

  Fields:
    trees: names of the trees that it trains; () is the one of its own name.
    terms: objective terms of its loss; () those that no other player names.
    optimizer: OptimConfig; that of "model" is the section `optim`.
    every: it moves at every so many-th step, counted as logs and saves are.
  """

  trees: tuple[str, ...] = ()
  terms: tuple[str, ...] = ()
  optimizer: optim.OptimConfig = dataclasses.field(default_factory=optim.OptimConfig)
  every: int = 1

  def __post_init__(self):
    if self.every < 1:
      raise ValueError(f"every is {self.every}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class Player:
  """A player of `make_train_step`.

  Fields:
    name; trees, terms: what it trains, and by which terms.
    tx: its optimiser, over trees[0] or, of several, over {tree: parameters}.
    every: see PlayerConfig.
    trainable: bool tree like its parameters, see optim.trainable: the rest gets no gradient; None: all.
  """

  name: str
  trees: tuple[str, ...]
  terms: tuple[str, ...]
  tx: optax.GradientTransformation
  every: int = 1
  trainable: Any = None


def micro_batches(row: Row, count: int) -> Row:
  """Splits rows [B, …] into [A, B/A, …], taking rows a::A so that no row leaves its device."""

  def split(x):
    if x.shape[0] % count:
      raise ValueError(f"batch_size {x.shape[0]} is not divisible by train.accumulate {count}")
    return jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)

  return jax.tree.map(split, row)


def bind(
  fns: Mapping[str, Callable],
  trees: Mapping[str, Any],
  latent=None,
  player: str = "model",
  key=None,
  trains: tuple[str, ...] = (),
) -> Nets:
  """Binds network functions fn(trees, *args) to trees; only the player's own trees let gradients pass.

  Gradients pass through every network to its inputs: a generator is trained through a discriminator that
  stands still.

  Args:
    player: the player being trained, "" for none.
    key: its dropout key; without one nothing is dropped.
    trains: names of its trees, by default the one of its own name.
  """
  trains = trains or (player,)
  stopped = {k: v if k in trains else jax.lax.stop_gradient(v) for k, v in trees.items()}

  def bound(name, fn):
    # A view of a trained tree under another name ("teacher") stands still too.
    mine = stopped if name in trains else jax.lax.stop_gradient(stopped)
    noise = {"key": key} if key is not None and name in trains else {}
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
  players: Sequence[Player] = (),
  copies: Mapping[str, int] = {},
) -> Callable[[TrainState, Row, Array], tuple[TrainState, dict]]:
  """Builds step(state, row, key) -> (state, metrics), to be jitted with the state donated.

  Args:
    objective: prepares inputs, targets, denominators; sums the loss.
    fns: {name: fn(trees, inputs, targets, **kw) -> Outputs}.
    tx: the optimiser of trees["model"].
    latent: the bound Latent, or None.
    trainable: bool tree like trees["model"], see optim.trainable: the rest gets no gradient; None: all.
    sources: data sources, for the loss by source (only where there are several).
    players: all players in their order, "model" among them; default: "model" alone, with `tx`, `trainable`
      and every term.
    copies: {tree: steps}, trees that become a copy of the model (of its average, where one is kept) at every
      so many-th step.

  Returns:
    The step. Its metrics: scalars "loss", "loss/<term>", "denominator/<term>", ratios, "grad_norm",
    "update_norm", "skipped"; and trees "work" (objectives.base.work by network) and "source"
    {term: {"sum", "weight"}[sources]}. Scalars of further players stand under "<player>/…" and are 0 at steps
    at which they do not move, their work under "<player>/<network>".
  """
  players = tuple(players) or (Player("model", ("model",), tuple(objective.scales), tx, 1, trainable),)

  def step_fn(state: TrainState, row: Row, key: Array) -> tuple[TrainState, dict]:
    bound = objective.bind(state.stats.get("objective", {}))
    trees, opt, stats = dict(state.trees), dict(state.opt), dict(state.stats)
    out, sums = {"work": {}}, {}
    for player in players:
      guard = stats.get("guard") if player.name == "model" else None

      def turn(trees, opt, guard, player=player):
        return _turn(player, bound, fns, cfg, latent, sources, trees, opt, guard, row, key, state.step)

      args = trees, opt[player.name], guard
      if player.every == 1:
        mine, opt[player.name], guard, m = turn(*args)
      else:
        # An idle player moves nothing and reports zeros.
        shape = jax.eval_shape(turn, *args)[3]
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape)
        idle = lambda trees, opt, guard, p=player, m=nothing: ({t: trees[t] for t in p.trees}, opt, guard, m)
        mine, opt[player.name], guard, m = jax.lax.cond(
          (state.step + 1) % player.every == 0, turn, idle, *args
        )
      trees |= mine
      found = m.pop("stats")
      loads = found.pop(router.LOADS, None)
      sums |= found
      work, ok = m.pop("work"), m.pop("ok")
      if player.name == "model":
        if objective.router.bias:
          if loads is None:
            raise ValueError(f"{type(objective).__name__}.run counts no loads: end it with self.routed(…)")
          # All alike, and 0, where the step was refused.
          trees["model"] = moe.balanced(trees["model"], loads, objective.router.bias)
        out |= m
        out["work"] |= work
        if guard is not None:
          stats["guard"] = guard
        if "ema" in trees:
          average = optim.ema(trees["ema"], trees["model"], stats["ema_count"], cfg.ema)
          trees["ema"] = optim.select(ok, average, trees["ema"])
          stats["ema_count"] = stats["ema_count"] + ok.astype(jnp.int32)
        for name, every in copies.items():
          due = (state.step + 1) % every == 0
          trees[name] = jax.lax.cond(
            due, _anew, lambda trees, opt, old: old, trees, opt["model"], trees[name]
          )
      else:
        m.pop("source")
        out |= {f"{player.name}/{k}": v for k, v in m.items()}
        out["work"] |= {f"{player.name}/{k}": v for k, v in work.items()}
    if "objective" in stats:
      stats["objective"] = objective.update(stats["objective"], sums)
    return TrainState(state.step + 1, trees, opt, stats), out

  return step_fn


def _anew(trees, opt, old):
  """A copy of the model, or of its average where one is kept, in the types of `old`."""
  now = trees["ema"] if "ema" in trees else optim.eval_params(opt, trees["model"])
  return jax.tree.map(lambda new, old: new.astype(old.dtype), now, old)


def _turn(player, objective, fns, cfg, latent, sources, trees, opt, guard, row, key, step):
  """One player's gradient, guard and update: ({tree: parameters}, optimiser state, guard, metrics).

  "ok" is among the metrics: whether the update was accepted. "stats", sums for the objective's `update`, are
  0 where it was not.
  """
  by_name = lambda params: {player.trees[0]: params} if len(player.trees) == 1 else params
  scales = {name: objective.scales[name] for name in player.terms}
  if player.name != "model":
    dropout = jax.random.fold_in(key, zlib.crc32(player.name.encode()))
  else:
    dropout = key

  def denominators(row):
    found = objective.denominators(row, key, step, latent)
    return {t: found[t] for t in player.terms}

  def gradients(params, row, total, index):
    def loss_of(params):
      params = params if player.trainable is None else optim.stop_frozen(params, player.trainable)
      drop = jax.random.fold_in(jax.random.fold_in(dropout, step), index)
      nets = bind(fns, {**trees, **by_name(params)}, latent, player.name, drop, player.trees)
      sums, _, aux = objective.run(nets, row, key, step)
      if lost := sorted(set(total) - set(sums)):
        raise ValueError(
          f"{type(objective).__name__}.run sums no {', '.join(lost)}: end it with self.routed(…)"
        )
      sums = {t: s for t, s in sums.items() if t in scales}
      loss = sum(scales[t](step) * s / jnp.maximum(total[t], 1e-6) for t, s in sums.items())
      # Per-token values become sums here, so that micro-batches add up.
      source = {
        t: metrics.by_group(v, jnp.ones_like(v), metrics.source_of(row), sources)
        for t, v in aux["per_token"].items()
        if sources > 1 and v.shape == row.doc.shape and t in scales
      }
      kept = {"ratios": aux["ratios"], "work": aux.get("work", {}), "stats": aux.get("stats", {})}
      return loss, (sums, kept | {"source": source})

    (loss, (sums, aux)), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    return grads, {"loss": loss, "sums": sums, **aux}

  params = states.owned(trees, player.trees)
  if cfg.accumulate == 1:
    total = denominators(row)
    grads, m = gradients(params, row, total, 0)
  else:
    micro = micro_batches(row, cfg.accumulate)
    add = lambda a, b: jax.tree.map(jnp.add, a, b)
    first = jax.tree.map(lambda x: x[0], micro)
    shape = jax.eval_shape(denominators, first)
    zeros = lambda s: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), s)
    total, _ = jax.lax.scan(lambda c, r: (add(c, denominators(r)), None), zeros(shape), micro)
    one = lambda r, i: gradients(params, r, total, i)
    acc = zeros(jax.eval_shape(one, first, 0))
    index = jnp.arange(cfg.accumulate)
    (grads, m), _ = jax.lax.scan(lambda c, x: (add(c, one(*x)), None), acc, (micro, index))

  grad_norm = optax.global_norm(grads)
  ok, guard = _guard(cfg, guard, m["loss"], grad_norm)
  updates, moved = player.tx.update(grads, opt, params, step=step)
  params = optim.select(ok, optax.apply_updates(params, updates), params)
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
    "stats": jax.tree.map(lambda x: jnp.where(ok, x, 0), m["stats"]),
    "ok": ok,
  }
  return by_name(params), optim.select(ok, moved, opt), guard, out


def initial_stats(cfg: StepConfig, objective: Objective | None = None) -> dict:
  """The statistics that `make_train_step` keeps in TrainState.stats; "objective": the objective's own."""
  stats = {}
  if objective is not None and (own := objective.stats()):
    stats["objective"] = own
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


def flop_counts(parts: system.System, moving=None) -> dict[str, metrics.ModelFlops]:
  """{network: its numbers}: the model, of which `moving` is trained, and trunks beside it."""
  trunks = {"model": parts.model} | parts.nets
  return {
    name: metrics.model_flops(
      net.abstract_params(), net.logical_axes(), models.attention_sizes(net.cfg), models.head_paths(net.cfg),
      moving if name == "model" else None, models.active_experts(net.cfg),
    )
    for name, net in trunks.items()
    if isinstance(getattr(net, "cfg", None), models.TrunkConfig)
  }  # fmt: skip


def flops(numbers: dict[str, metrics.ModelFlops], works: dict[str, dict]) -> float:
  """FLOPs of all network calls of a step; the model's own alone has a backward pass."""
  calls = {name: w for name, w in works.items() if w}
  passes = {name: 3 if name == "model" else 1 for name in calls}
  of = lambda name: numbers.get(name, numbers["model"])
  return sum(metrics.step_flops(of(n), counted(w), passes[n])["total"] for n, w in calls.items())


def counted(work: dict) -> dict:
  """A network's work as the host's integers; see metrics.step_flops."""
  return {
    "slots": int(work["slots"]),
    "pairs": {p: metrics.unlimb(x) for p, x in work["pairs"].items()},
    "reads": {h: int(n) for h, n in work["reads"].items()},
  }


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
    fresh: jitted, key -> a new state in place. rebuild: (trees, {tree: names of leaves that were not loaded})
      -> a state around them.
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


def player_configs(cfg) -> dict[str, PlayerConfig]:
  """The section `players` of a config, by name."""
  section = config.plain(cfg.get("players")) or {}
  return {n: config.build(PlayerConfig, s, f"players.{n}") for n, s in sorted(section.items())}


def players(parts: system.System, model: Player, steps: int) -> tuple[Player, ...]:
  """All players of a system: "model" first, then those of its config's `players` section by name.

  Args:
    model: the player "model" with its optimiser.
    steps: length of the run, for the schedules.

  Raises:
    ConfigError: a player without trees or terms, a tree or a term of two players, or of none that exists.
  """
  made = player_configs(parts.cfg)
  if "optimizer" in ((config.plain(parts.cfg.get("players")) or {}).get("model") or {}):
    raise ConfigError(
      "the player 'model' has the optimiser of the section `optim`", key="players.model.optimizer",
      fix="leave it out",
    )  # fmt: skip
  first, known = made.pop("model", PlayerConfig()), {"model": parts.model, **parts.nets}
  named = [t for p in made.values() for t in p.terms]
  rest = tuple(t for t in parts.objective.scales if t not in named)
  found = [
    dataclasses.replace(model, trees=first.trees or ("model",), terms=first.terms or rest, every=first.every)
  ]
  if found[0].trees != ("model",):
    raise ConfigError(
      "the player 'model' trains the tree 'model'", key="players.model.trees", value=first.trees,
      fix="a player of its own for another tree",
    )  # fmt: skip
  for name, p in made.items():
    trees = p.trees or (name,)
    for tree in trees:
      if tree not in known:
        raise ConfigError(
          "no such tree",
          key=f"players.{name}.trees",
          value=trees,
          fix=f"one of {', '.join(known)}, or trees.{tree}",
        )
    shapes = states.owned({t: known[t].abstract_params() for t in trees}, trees)
    axes = states.owned({t: known[t].logical_axes() for t in trees}, trees)
    tx, _ = optim.build(p.optimizer, shapes, axes, steps)
    found.append(Player(name, trees, p.terms, tx, p.every, optim.trainable(p.optimizer, shapes)))
  for what in ("trees", "terms"):
    held: dict[str, str] = {}
    for p in found:
      for x in getattr(p, what):
        if x in held or (what == "terms" and x not in parts.objective.scales):
          why = f"{x!r} is {held[x]!r}'s already" if x in held else f"the objective has no term {x!r}"
          raise ConfigError(
            why, key=f"players.{p.name}.{what}", value=getattr(p, what), fix="one player each"
          )
        held[x] = p.name
      if not getattr(p, what):
        raise ConfigError(
          f"a player without {what}", key=f"players.{p.name}.{what}", value=(),
          fix=f"some of {', '.join(parts.objective.scales)}",
        )  # fmt: skip
  return tuple(found)


def program(parts: system.System, cfg: StepConfig, ocfg: optim.OptimConfig, steps: int, mesh) -> Program:
  """The training step of a system, as the trainer runs it.

  Args:
    steps: length of the run, for the schedule.

  Raises:
    ValueError: parameters that the mesh does not divide, a schedule that does not fit.
  """
  model, objective = parts.model, parts.objective
  shapes, axes = model.abstract_params(), model.logical_axes()
  if objective.router.bias and ocfg.name == "schedule_free":
    raise ConfigError(
      "schedule-free makes the parameters of a step from its own averages, which undo the experts' bias",
      key="objective.router.bias", value=objective.router.bias, fix="another optim.name, or 0",
    )  # fmt: skip
  tx, lr = optim.build(ocfg, shapes, axes, steps)
  moving = optim.trainable(ocfg, shapes)
  seats = players(parts, Player("model", ("model",), (), tx, 1, moving), steps)
  owns = {p.name: p.trees for p in seats}

  def begin(trees, fresh=None):
    trees = models.joint.start(model.cfg, parts.nets, trees, fresh)
    trees |= {name: trees["model"] for name in parts.copies}
    return states.create(trees, {p.name: p.tx for p in seats}, initial_stats(cfg, objective), owns)

  def fresh(key):
    params = model.init(key)
    own = {n: net for n, net in parts.nets.items() if n not in parts.copies}
    others = {n: net.init(jax.random.fold_in(key, zlib.crc32(n.encode()))) for n, net in own.items()}
    return begin({"model": params, "ema": params, **others} if cfg.ema else {"model": params, **others})

  dropped: list[str] = []
  key = jax.eval_shape(lambda: jax.random.key(0))
  key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=rules.replicated(mesh))
  with rules.use_mesh(mesh):
    abstract = jax.eval_shape(fresh, key)
    placed = {
      name: rules.sharding_tree(mesh, net.logical_axes(), net.abstract_params(), dropped=dropped)
      for name, net in {"model": model, **parts.nets}.items()
    }
    shardings = states.shardings(abstract, placed, mesh, owns)
    state = states.abstract(fresh, key, shardings=shardings)
  sources = len(parts.data.meta.sources)
  step = make_train_step(objective, parts.fns, tx, cfg, parts.latent, sources, moving, seats, parts.copies)
  return Program(
    parts=parts,
    mesh=mesh,
    accumulate=cfg.accumulate,
    step=step,
    jitted=jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)),
    state=state,
    key=key,
    fresh=jax.jit(fresh, out_shardings=shardings),
    rebuild=lambda trees, new=None: jax.jit(lambda t: begin(t, new or {}), out_shardings=shardings)(trees),
    lr=lr,
    moving=moving,
    shapes=shapes,
    axes=axes,
    dropped=tuple(dropped),
  )
