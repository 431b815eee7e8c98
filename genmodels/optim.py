"""Optimisers, learning-rate schedules, parameter averages and the guard that skips bad steps.

The assembly is optax; what is added is the knowledge that sits in the *logical axes* of a parameter
and not in its shape. Layers are stacked by a scan, attention weights keep heads and head_dim apart,
so ndim says nothing: a stacked bias has two or three axes, a stacked matrix three or four. `role`
reads the names instead, and weight decay, Muon and their exceptions follow from it.

Every optimiser has one form: (clip) → direction −u → −weight_decay·p → ·lr(step)·multiplier. The
learning rate is a function of the state's step, handed to `tx.update(grads, opt, params, step=step)`,
and not of a counter inside the optimiser: skipped steps do not shift it and the logged rate is the
one used.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from genmodels import state as state_lib
from genmodels.config import ConfigError
from genmodels.contracts import Array

NAMES = ("adamw", "muon", "adafactor", "schedule_free", "sgd")
KINDS = ("constant", "cosine", "linear", "wsd")

# Axes over which a leaf is a stack of independent weights.
STACK_AXES = frozenset({"layers", "expert"})
# Axes that form one dimension of a matrix when they stand side by side: [heads, head_dim].
HEAD_AXES = frozenset({"heads", "kv_heads", "head_dim"})
# Axes that are looked up by index: rows of a table are no input of a matrix product.
TABLE_AXES = frozenset({"vocab", "pos"})


@dataclasses.dataclass(frozen=True)
class LrSchedule:
  """Shape of the learning rate over the run, as a factor of the peak `lr`.

  Fields:
    kind: constant, cosine, linear (decay from the end of the warm-up to `steps`), or wsd (warm-up,
      stable, decay over the last `decay_steps`; Hu et al., 2404.06395).
    warmup: steps of linear warm-up; step s runs at (s + 1) / warmup.
    steps: where the decay ends; None is the length of the run.
    decay_steps: length of the wsd decay; None is a tenth of `steps`.
    end: final factor.
    shape: form of the wsd decay, "linear" or "sqrt" (1 − √x; Hägele et al., 2405.18392).
  """

  kind: str = "cosine"
  warmup: int = 0
  steps: int | None = None
  decay_steps: int | None = None
  end: float = 0.0
  shape: str = "linear"

  def __post_init__(self):
    if self.kind not in KINDS:
      raise ValueError(f"kind = {self.kind!r}: expected one of {', '.join(KINDS)}")
    if self.warmup < 0:
      raise ValueError(f"warmup = {self.warmup}: expected a number of steps >= 0")
    if not 0.0 <= self.end <= 1.0:
      raise ValueError(f"end = {self.end}: a factor of lr in [0, 1]; give the fraction, not the rate")
    if self.shape not in ("linear", "sqrt"):
      raise ValueError(f"shape = {self.shape!r}: expected linear or sqrt")

  def factor(self, total_steps: int) -> Callable[[Any], Array]:
    """step -> factor of the peak, a float32 scalar; traceable.

    Raises:
      ConfigError: the warm-up and the decay do not fit into the run.
    """
    steps = total_steps if self.steps is None else self.steps
    decay = self.decay_steps if self.decay_steps is not None else max(1, steps // 10)
    if self.kind == "wsd" and self.warmup + decay > steps:
      raise ConfigError(
        f"warmup + decay_steps ({decay}) exceed the schedule's steps {steps}", key="optim.schedule.warmup",
        value=self.warmup, fix="shorten warmup or decay_steps, or lengthen the run",
      )  # fmt: skip
    if self.kind in ("cosine", "linear") and self.warmup >= max(steps, 1):
      raise ConfigError(
        f"the warm-up takes all of the schedule's steps {steps}: nothing is left to decay",
        key="optim.schedule.warmup", value=self.warmup, fix="shorten it, or lengthen the run (train.steps)",
      )  # fmt: skip
    begin, length = (
      (steps - decay, decay) if self.kind == "wsd" else (self.warmup, max(steps - self.warmup, 1))
    )

    def at(step):
      step = jnp.asarray(step, jnp.float32)
      up = jnp.minimum((step + 1) / self.warmup, 1.0) if self.warmup else jnp.float32(1)
      if self.kind == "constant":
        return up
      x = jnp.clip((step - begin) / length, 0.0, 1.0)
      if self.kind == "cosine":
        down = 0.5 * (1 + jnp.cos(jnp.pi * x))
      else:
        down = 1 - (jnp.sqrt(x) if self.kind == "wsd" and self.shape == "sqrt" else x)
      return up * (self.end + (1 - self.end) * down)

    return at


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """One player's optimiser. Regexes are searched in '/'-joined parameter paths.

  Fields:
    name: adamw, muon, adafactor, schedule_free (AdamW), sgd.
    lr: peak learning rate. Muon updates are scaled to AdamW's RMS (`muon_rms`), so one rate fits both.
    b1, b2, eps: AdamW, schedule-free and the Adam part of Muon; sgd uses b1 as momentum.
    weight_decay: decoupled, multiplied by the learning rate.
    decay: regexes of the decayed leaves; None: weight matrices by logical axes (`role`), hence no
      embedding, norm or bias, stacked or not.
    clip_norm: global-norm clip over the trained leaves; 0 is off.
    schedule: LrSchedule.
    freeze: regexes of leaves without update and without optimiser state.
    lr_mult: (regex, factor) pairs; the first that matches a leaf scales its rate.
    moment_dtype: dtype of first moments.
    muon_beta, muon_steps: momentum and Newton–Schulz iterations.
    muon_rms: RMS of a Muon update (0.2: Liu et al., 2502.16982); None: √max(1, out/in) of Jordan, 2024.
    muon_adam: regexes of matrices that stay with Adam (heads of another kind, adapters).
  """

  name: str = "adamw"
  lr: float = 3e-4
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  decay: tuple[str, ...] | None = None
  clip_norm: float = 1.0
  schedule: LrSchedule = dataclasses.field(default_factory=LrSchedule)
  freeze: tuple[str, ...] = ()
  lr_mult: tuple[tuple[str, float], ...] = ()
  moment_dtype: str = "float32"
  muon_beta: float = 0.95
  muon_steps: int = 5
  muon_rms: float | None = 0.2
  muon_adam: tuple[str, ...] = ()

  def __post_init__(self):
    if self.name not in NAMES:
      raise ValueError(f"name = {self.name!r}: expected one of {', '.join(NAMES)}")
    if self.lr < 0 or self.weight_decay < 0 or self.clip_norm < 0:
      raise ValueError("lr, weight_decay and clip_norm must be >= 0 (clip_norm = 0 is off)")
    for key in ("b1", "b2", "muon_beta"):
      if not 0.0 <= getattr(self, key) < 1.0:
        raise ValueError(f"{key} = {getattr(self, key)}: expected a decay in [0, 1)")
    if self.name == "schedule_free" and self.schedule.kind != "constant":
      raise ValueError(
        f"schedule.kind = {self.schedule.kind!r} with name = 'schedule_free': its average replaces "
        "the decay; set schedule.kind = 'constant' (a warm-up is fine)"
      )
    if self.name == "schedule_free" and self.b1 == 0:
      raise ValueError("b1 = 0 with name = 'schedule_free': the interpolation needs b1 > 0; 0.9 is usual")
    if self.moment_dtype not in ("float32", "bfloat16"):
      raise ValueError(f"moment_dtype = {self.moment_dtype!r}: expected float32 or bfloat16")
    for pattern in (*self.freeze, *(self.decay or ()), *self.muon_adam, *(p for p, _ in self.lr_mult)):
      try:
        re.compile(pattern)
      except re.error as e:
        raise ValueError(f"{pattern!r} is no regular expression: {e}") from e


def role(axes: tuple[str | None, ...]) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
  """What a parameter is, from the names of its axes.

  Stack axes are set aside, adjacent head axes are folded; two dimensions are then left of a matrix,
  or three with a nameless one between them, which counts as a stack (AdaLN's six modulations).
  Weights are stored input first (einsum "...i,io->...o"), so the first is the reduction.

  Args:
    axes: logical axis names, one for each dimension.

  Returns:
    (kind, reduction, output): kind is "matrix", "head" (a matrix onto a table axis or a nameless one:
    logits, features), "table" (embeddings) or "vector" (norms, biases, everything else); reduction and
    output are the dimensions of a matrix or head, else empty.
  """
  groups: list[list[int]] = []
  for i, name in enumerate(axes):
    if name in STACK_AXES:
      continue
    if groups and groups[-1][-1] == i - 1 and name in HEAD_AXES and axes[i - 1] in HEAD_AXES:
      groups[-1].append(i)
    else:
      groups.append([i])
  if len(groups) == 3 and axes[groups[1][0]] is None:
    del groups[1]
  if len(groups) > 1 and axes[groups[0][0]] in TABLE_AXES:
    return "table", (), ()
  if len(groups) != 2:
    return "vector", (), ()
  output = axes[groups[1][0]]
  return "head" if output is None or output in TABLE_AXES else "matrix", tuple(groups[0]), tuple(groups[1])


def labels(cfg: OptimConfig, abstract_params: Any, logical_axes: Any) -> Any:
  """Which rule updates each leaf: "frozen", "muon", or "main" (AdamW under Muon).

  Args:
    cfg: the optimiser.
    abstract_params: the parameters (shapes).
    logical_axes: same nesting, leaves are tuples of names.

  Returns:
    A pytree of strings, same structure as abstract_params.

  Raises:
    ValueError: a regex matches no parameter, or the logical axes do not fit the parameters.
  """
  axes = _axes(abstract_params, logical_axes)
  frozen, adam = _match(cfg.freeze, axes, "freeze"), _match(cfg.muon_adam, axes, "muon_adam")

  def label(path):
    if path in frozen:
      return "frozen"
    return "muon" if cfg.name == "muon" and role(axes[path])[0] == "matrix" and path not in adam else "main"

  return _tree(abstract_params, [label(p) for p in axes])


def trainable(cfg: OptimConfig, abstract_params: Any) -> Any:
  """bool tree: the leaves that are updated, for `stop_frozen`."""
  paths = state_lib.param_paths(abstract_params)
  frozen = _match(cfg.freeze, paths, "freeze")
  return _tree(abstract_params, [p not in frozen for p in paths])


def stop_frozen(params: Any, mask: Any) -> Any:
  """The parameters with gradients stopped where `mask` (from `trainable`) is False.

  Applied inside the loss, it makes the compiler drop the weight gradients of a frozen base and keeps
  them out of the gradient norm that the guard sees.
  """
  return jax.tree.map(lambda p, keep: p if keep else jax.lax.stop_gradient(p), params, mask)


def build(
  cfg: OptimConfig, abstract_params: Any, logical_axes: Any, total_steps: int
) -> tuple[optax.GradientTransformationExtraArgs, Callable[[Any], Array]]:
  """The optimiser of one player.

  Args:
    cfg: its config.
    abstract_params: the parameters (shapes and dtypes).
    logical_axes: same nesting, leaves are tuples of logical axis names.
    total_steps: length of the run, for the schedule.

  Returns:
    (tx, lr): tx.init(params); tx.update(grads, opt, params, step=step) -> (updates, opt), where step
    is the state's step; lr(step) -> float32[], the rate that update uses.

  Raises:
    ValueError: a regex matches no parameter, the axes do not fit, or the schedule does not fit.
  """
  axes = _axes(abstract_params, logical_axes)
  label = labels(cfg, abstract_params, logical_axes)
  factor = cfg.schedule.factor(total_steps)

  def lr(step):
    return jnp.float32(cfg.lr) * factor(step)

  decayed = {p for p, a in axes.items() if role(a)[0] in ("matrix", "head")}
  if cfg.decay is not None:
    decayed = _match(cfg.decay, axes, "decay")
  mults = []
  for path in axes:
    mults.append(next((m for pattern, m in cfg.lr_mult if re.search(pattern, path)), 1.0))
  for pattern, _ in cfg.lr_mult:
    _match((pattern,), axes, "lr_mult")
  finish = _finish(
    lr,
    cfg.weight_decay,
    _tree(abstract_params, [p in decayed for p in axes]),
    _tree(abstract_params, mults),
  )
  tx = _rule(cfg, _tree(abstract_params, [role(a) for a in axes.values()]), label, lr, finish)
  if cfg.clip_norm:
    tx = optax.chain(optax.clip_by_global_norm(cfg.clip_norm), tx)
  if cfg.freeze:
    # Outermost, so that neither the clip nor any state sees a frozen leaf.
    outer = jax.tree.map(lambda x: "frozen" if x == "frozen" else "trained", label)
    tx = optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, outer)
  return optax.with_extra_args_support(tx), lr


def opt_shardings(tx: Any, abstract_params: Any, param_shardings: Any, mesh: jax.sharding.Mesh) -> Any:
  """NamedShardings of tx's state: moments like their parameter, factored moments like it without
  the dropped axis, counters replicated. See `state.like_params`."""
  return state_lib.like_params(
    jax.eval_shape(tx.init, abstract_params), abstract_params, param_shardings, mesh
  )


def eval_params(opt_state: Any, params: Any) -> Any:
  """The parameters to evaluate and export: the average x of schedule-free, else `params` as they are.

  Schedule-free trains at y = (1 − b1) z + b1 x (Defazio et al., 2405.15682); z is in the state.
  """
  is_state = lambda s: isinstance(s, contrib.ScheduleFreeState)
  found = [s for s in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(s)]
  if not found:
    return params
  (s,) = found
  hidden = lambda z: isinstance(z, optax.MaskedNode)
  x = lambda z, y: y if hidden(z) else (y - (1 - s.b1) * z) / s.b1
  return jax.tree.map(x, s.z, params, is_leaf=hidden)


def ema(average: Any, params: Any, count: Array, decay: float) -> Any:
  """One step of the debiased exponential average of the parameters.

  The factor β(1 − βᵗ)/(1 − βᵗ⁺¹) makes the stored tree equal to Adam's bias-corrected average at
  every t: the first update copies the parameters, no weight of the initial values remains, and the
  tree can be evaluated without correction.

  Args:
    average: float32 tree like params.
    params: the parameters after the update.
    count: int32[], updates of the average so far (t).
    decay: β in [0, 1).
  """
  if not 0.0 <= decay < 1.0:
    raise ValueError(f"ema decay = {decay}: expected a value in [0, 1)")
  if decay == 0.0:
    return params
  t = count.astype(jnp.float32)
  # expm1 keeps 1 − βᵗ exact where β is close to 1.
  log = math.log(decay)
  keep = decay * jnp.expm1(t * log) / jnp.expm1((t + 1) * log)
  return jax.tree.map(lambda a, p: a + (1 - keep).astype(a.dtype) * (p.astype(a.dtype) - a), average, params)


def guard_stats(window: int = 128) -> dict[str, Array]:
  """Initial statistics of `guard`, for TrainState.stats."""
  return {
    "loss": jnp.zeros([window], jnp.float32),
    "norm": jnp.zeros([window], jnp.float32),
    "count": jnp.zeros([], jnp.int32),
    "skipped": jnp.zeros([], jnp.int32),
    "in_row": jnp.zeros([], jnp.int32),
  }


def guard(
  stats: dict[str, Array], loss: Array, grad_norm: Array, window: int = 128, sigma: float = 6.0
) -> tuple[Array, dict[str, Array]]:
  """Decides, inside jit, whether a step may touch the weights.

  A step is refused if loss or gradient norm is not finite, or if one of them lies more than `sigma`
  standard deviations above its mean over the last `window` finite steps (once a quarter of the
  window is known; only upwards). Outliers enter the window too: p refused of the last `window`
  steps inflate the deviation until (1 − p) <= sigma·√(p(1 − p)), so a lasting change of level (a
  curriculum, another data stage) costs window/(1 + sigma²) steps, 4 by default, and not the run.

  Args:
    stats: from guard_stats or the last call.
    loss, grad_norm: float32[], global.
    window, sigma: see above.

  Returns:
    (ok bool[], new stats); use with `select`. "skipped" counts all refusals, "in_row" those without
    an accepted step between.
  """
  if stats["loss"].shape != (window,):
    raise ValueError(
      f"guard: statistics of shape {stats['loss'].shape} for window {window}; use guard_stats(window)"
    )
  loss, grad_norm = loss.astype(jnp.float32), grad_norm.astype(jnp.float32)
  finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
  known = jnp.arange(window) < stats["count"]
  n = jnp.maximum(jnp.minimum(stats["count"], window), 1).astype(jnp.float32)

  def usual(x, ring):
    mean = jnp.sum(jnp.where(known, ring, 0)) / n
    var = jnp.sum(jnp.where(known, jnp.square(ring - mean), 0)) / n
    # The floor keeps a constant loss (deviation 0 up to rounding) from refusing every step.
    return x - mean <= sigma * jnp.maximum(jnp.sqrt(var), 1e-3 * jnp.abs(mean))

  early = stats["count"] < max(window // 4, 2)
  ok = finite & (early | (usual(loss, stats["loss"]) & usual(grad_norm, stats["norm"])))
  at = stats["count"] % window
  put = lambda ring, x: jnp.where(finite, ring.at[at].set(jnp.where(finite, x, 0)), ring)
  skip = (~ok).astype(jnp.int32)
  new = {
    "loss": put(stats["loss"], loss),
    "norm": put(stats["norm"], grad_norm),
    "count": stats["count"] + finite.astype(jnp.int32),
    "skipped": stats["skipped"] + skip,
    "in_row": (stats["in_row"] + 1) * skip,
  }
  return ok, {**stats, **new}


def select(ok: Array, new: Any, old: Any) -> Any:
  """new where ok, else old, leaf by leaf; old bits are kept exactly, whatever new holds."""
  return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)


def _rule(cfg, roles, label, lr, finish):
  """The named optimiser between clip and freeze: gradients to final updates."""
  dtype = jnp.dtype(cfg.moment_dtype)
  adam = optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps, mu_dtype=dtype)
  if cfg.name == "adamw":
    return optax.chain(adam, optax.scale(-1.0), finish)
  if cfg.name == "sgd":
    return optax.chain(
      optax.trace(cfg.b1, accumulator_dtype=dtype) if cfg.b1 else optax.identity(), optax.scale(-1.0), finish
    )
  if cfg.name == "adafactor":
    return optax.chain(
      optax.scale_by_factored_rms(decay_rate=0.8), optax.clip_by_block_rms(1.0), optax.scale(-1.0), finish
    )
  if cfg.name == "schedule_free":
    base = optax.chain(optax.scale_by_rms(cfg.b2, cfg.eps, bias_correction=True), optax.scale(-1.0), finish)
    # The wrapper counts from 1; its rate only weighs the average.
    return contrib.schedule_free(base, lambda count: lr(count - 1), b1=cfg.b1)
  is_role = lambda x: isinstance(x, tuple) and len(x) == 3 and isinstance(x[0], str)
  dims = jax.tree.map(
    lambda r, how: contrib.MuonDimensionNumbers(r[1], r[2]) if how == "muon" else None,
    roles,
    label,
    is_leaf=is_role,
  )
  muon = contrib.muon(
    learning_rate=1.0,
    ns_steps=cfg.muon_steps,
    beta=cfg.muon_beta,
    eps=cfg.eps,
    mu_dtype=dtype,
    adam_b1=cfg.b1,
    adam_b2=cfg.b2,
    muon_weight_dimension_numbers=dims,
    consistent_rms=cfg.muon_rms,
  )
  return optax.chain(muon, finish)


def _finish(lr, weight_decay, decayed, mults):
  """(−u − weight_decay·p) · lr(step) · multiplier, the common end of every optimiser."""

  def update(updates, state, params=None, *, step=None, **_):
    if step is None:
      raise ValueError("tx.update needs the state's step: tx.update(grads, opt, params, step=state.step)")
    rate = lr(step)

    def leaf(u, p, decay, mult):
      if isinstance(u, optax.MaskedNode):
        return u
      u = u - weight_decay * p.astype(u.dtype) if decay and weight_decay else u
      return (u * (rate * mult if mult != 1.0 else rate)).astype(p.dtype)

    masked = lambda x: isinstance(x, optax.MaskedNode)
    return jax.tree.map(leaf, updates, params, decayed, mults, is_leaf=masked), state

  return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _axes(abstract_params, logical_axes):
  """{path: axis names}, checked against the parameters."""
  params = state_lib.param_paths(abstract_params)
  axes = state_lib.param_paths(
    logical_axes, is_leaf=lambda x: isinstance(x, (tuple, jax.sharding.PartitionSpec))
  )
  for path, leaf in params.items():
    if path not in axes:
      raise ValueError(f"logical_axes has no entry for parameter {path}; every parameter needs one")
    if len(axes[path]) != len(leaf.shape):
      raise ValueError(
        f"{path}: logical axes {tuple(axes[path])} name {len(axes[path])} axes, shape is {leaf.shape}"
      )
  return {path: tuple(axes[path]) for path in params}


def _match(patterns, paths, where):
  """The paths that some pattern matches; a pattern that matches none is an error, most often a typo."""
  found = set()
  for pattern in patterns:
    hit = {p for p in paths if re.search(pattern, p)}
    if not hit:
      shown = ", ".join(list(paths)[:6])
      raise ValueError(f"optim.{where}: {pattern!r} matches no parameter; paths look like {shown}")
    found |= hit
  return found


def _tree(like, leaves):
  return jax.tree.unflatten(jax.tree.structure(like), leaves)
