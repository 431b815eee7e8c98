"""Optimisers: labels by logical axes, decay, freeze, rates, averages, the guard, shardings."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from optax import contrib

from genmodels import config, optim, state

# A stack of two layers, shaped as a scanned trunk is: every ndim lies about what the leaf is.
SHAPES = {
  "embed": {"table": ((16, 8), ("vocab", "embed")), "pos": ((12, 8), ("pos", "embed"))},
  "trunk": {
    "attn": {
      "q": {
        "kernel": ((2, 8, 2, 3), ("layers", "embed", "heads", "head_dim")),
        "bias": ((2, 2, 3), ("layers", "heads", "head_dim")),
      },
      "k": {"kernel": ((2, 8, 1, 3), ("layers", "embed", "kv_heads", "head_dim"))},
      "o": {"kernel": ((2, 2, 3, 8), ("layers", "heads", "head_dim", "embed"))},
      "q_norm": {"scale": ((2, 3), ("layers", "head_dim"))},
    },
    "mlp": {"up": {"kernel": ((2, 8, 5), ("layers", "embed", "mlp")), "bias": ((2, 5), ("layers", "mlp"))}},
    "norm": {"scale": ((2, 8), ("layers", "embed"))},
  },
  "final": {"scale": ((8,), ("embed",))},
  "head": {"kernel": ((8, 16), ("embed", "vocab"))},
}
MATRICES = {
  "trunk/attn/q/kernel": ((1,), (2, 3)),
  "trunk/attn/k/kernel": ((1,), (2, 3)),
  "trunk/attn/o/kernel": ((1, 2), (3,)),
  "trunk/mlp/up/kernel": ((1,), (2,)),
}


def is_spec(x):
  return isinstance(x, tuple)


AXES = jax.tree.map(lambda x: x[1], SHAPES, is_leaf=is_spec)


def make_params(seed=0):
  keys = iter(jax.random.split(jax.random.key(seed), 32))
  return jax.tree.map(lambda x: jax.random.normal(next(keys), x[0]) + 0.5, SHAPES, is_leaf=is_spec)


def cfg(**kw):
  kw.setdefault("schedule", optim.LrSchedule(kind="constant"))
  return optim.OptimConfig(**kw)


def one_step(config, params, grads, steps=1):
  tx, _ = optim.build(config, params, AXES, 100)
  opt = tx.init(params)

  @jax.jit
  def run(params, opt, step):
    updates, opt = tx.update(grads, opt, params, step=step)
    return optax.apply_updates(params, updates), opt

  for s in range(steps):
    params, opt = run(params, opt, jnp.int32(s))
  return params, opt


def test_roles_follow_the_axis_names_and_not_ndim():
  roles = {p: optim.role(a) for p, a in state.param_paths(AXES, is_leaf=is_spec).items()}
  assert {p for p, r in roles.items() if r[0] == "matrix"} == set(MATRICES)
  assert {p for p, r in roles.items() if r[0] == "table"} == {"embed/table", "embed/pos"}
  assert {p for p, r in roles.items() if r[0] == "head"} == {"head/kernel"}
  for path, dims in MATRICES.items():
    assert roles[path][1:] == dims
  # Experts are a stack too; a bias of a stack of experts is none.
  assert optim.role(("layers", "expert", "embed", "mlp")) == ("matrix", (2,), (3,))
  assert optim.role(("layers", "expert", "mlp"))[0] == "vector"
  assert optim.role(("layers", "cond", None, "embed")) == ("matrix", (1,), (3,))  # six modulations
  assert optim.role((None, "embed")) == ("matrix", (0,), (1,))  # a projection of features
  assert (
    optim.role(("embed", None)) == ("head", (0,), (1,)) and optim.role((None, "embed", None))[0] == "vector"
  )
  assert optim.role(("pos", "cond"))[0] == "table" and optim.role((None, "embed"))[0] != "table"


def test_muon_labels_and_the_mistake_that_optax_makes_without_them():
  params = make_params()
  label = state.param_paths(optim.labels(cfg(name="muon"), params, AXES))
  assert {p for p, x in label.items() if x == "muon"} == set(MATRICES)
  moments = lambda opt: {
    "/".join(str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey) and k.key != "muon")
    for s in jax.tree.leaves(opt, is_leaf=lambda s: isinstance(s, contrib.MuonState))
    if isinstance(s, contrib.MuonState)
    for path, _ in jax.tree_util.tree_flatten_with_path(s.mu)[0]
  }
  tx, _ = optim.build(cfg(name="muon"), params, AXES, 10)
  assert moments(tx.init(params)) == set(MATRICES)  # the states that exist, not the labels alone
  # Negative control: the default takes embeddings and stacked norms for matrices, and no matrix.
  wrong = moments(contrib.muon(1e-3).init(params))
  assert "embed/table" in wrong and "trunk/norm/scale" in wrong and not wrong & set(MATRICES)


def test_muon_orthogonalises_each_layer_over_folded_heads():
  params, grads = make_params(), make_params(1)
  new, _ = one_step(cfg(name="muon", lr=1.0, weight_decay=0.0, clip_norm=0.0, muon_rms=None), params, grads)
  for path, (rows, cols) in MATRICES.items():
    delta = np.asarray(state.param_paths(new)[path] - state.param_paths(params)[path])
    g = np.asarray(state.param_paths(grads)[path])
    fan_in, fan_out = (int(np.prod([delta.shape[i] for i in dims])) for dims in (rows, cols))
    for layer in range(2):
      u, _, vt = np.linalg.svd(g[layer].reshape(fan_in, fan_out), full_matrices=False)
      d = delta[layer].reshape(fan_in, fan_out) / -np.sqrt(max(1, fan_out / fan_in))
      s = np.linalg.svd(d, compute_uv=False)
      # Five Newton–Schulz iterations bring singular values into about [0.6, 1.3], not to 1.
      assert s.min() > 0.5 and s.max() < 1.4, (path, s)
      assert np.sum(d * (u @ vt)) / np.linalg.norm(d) / np.linalg.norm(u @ vt) > 0.95


@pytest.mark.parametrize("name", optim.NAMES)
def test_weight_decay_touches_matrices_and_heads_alone(name):
  params = make_params()
  zero = jax.tree.map(jnp.zeros_like, params)
  new, _ = one_step(cfg(name=name, lr=0.1, weight_decay=0.5), params, zero)
  old = state.param_paths(params)
  for path, leaf in state.param_paths(new).items():
    moved = not np.allclose(leaf, old[path], rtol=1e-6)
    assert moved == (path in MATRICES or path == "head/kernel"), path
    if moved and name != "schedule_free":
      np.testing.assert_allclose(leaf, old[path] * (1 - 0.1 * 0.5), rtol=1e-5)


def test_decay_regexes_replace_the_rule():
  params = make_params()
  zero = jax.tree.map(jnp.zeros_like, params)
  new, _ = one_step(cfg(name="sgd", lr=0.1, weight_decay=0.5, decay=("trunk/norm/scale",)), params, zero)
  changed = {
    p for p, x in state.param_paths(new).items() if not np.array_equal(x, state.param_paths(params)[p])
  }
  assert changed == {"trunk/norm/scale"}


@pytest.mark.parametrize("name", ("adamw", "muon", "adafactor", "schedule_free"))
def test_frozen_leaves_keep_their_bits_and_have_no_state(name):
  params = make_params()
  grads = jax.tree.map(lambda x: x * jnp.nan if x.ndim == 4 else x, make_params(1))  # attention matrices: NaN
  config = cfg(name=name, freeze=("attn/.*/kernel", "^embed/"), clip_norm=1.0)
  new, opt = one_step(config, params, grads, steps=2)
  frozen = {p for p, t in state.param_paths(optim.trainable(config, params)).items() if not t}
  assert frozen == {p for p in MATRICES if "attn" in p} | {"embed/table", "embed/pos"}
  for path, leaf in state.param_paths(new).items():
    same = np.array_equal(leaf, state.param_paths(params)[path])
    # The clip saw no frozen NaN either: everything else moved and is finite.
    assert same == (path in frozen) and np.isfinite(leaf).all(), path
  shapes = {leaf.shape for leaf in jax.tree.leaves(opt)}
  assert not any(state.param_paths(params)[p].shape in shapes for p in frozen)
  assert (2, 8, 5) in shapes or name == "adafactor"
  if name == "schedule_free":
    assert np.array_equal(optim.eval_params(opt, new)["embed"]["pos"], params["embed"]["pos"])


def test_stop_frozen_drops_gradient_and_its_cost():
  p = {"a": jnp.ones([64, 64]), "b": jnp.ones([64, 64])}
  mask = optim.trainable(cfg(freeze=("a",)), p)

  def grad(p, stop):
    def loss(p):
      p = optim.stop_frozen(p, mask) if stop else p
      return jnp.sum(jnp.square(jnp.ones([64, 64]) @ p["a"] @ p["b"]))

    return jax.grad(loss)(p)

  run = jax.jit(grad, static_argnums=1)
  stopped = run(p, True)
  assert not np.any(stopped["a"]) and np.any(stopped["b"])
  flops = [run.lower(p, s).compile().cost_analysis()["flops"] for s in (True, False)]
  assert flops[0] < 0.8 * flops[1]  # three products instead of five (the input takes no gradient)


def test_rate_multipliers_and_the_step_argument():
  params = make_params()
  ones = jax.tree.map(jnp.ones_like, params)
  schedule = optim.LrSchedule(kind="wsd", warmup=4, decay_steps=10, end=0.1)
  config = cfg(
    name="sgd",
    lr=0.1,
    b1=0.0,
    weight_decay=0.0,
    clip_norm=0.0,
    schedule=schedule,
    lr_mult=(("^head/", 0.5), ("head|mlp", 0.0)),
  )
  tx, lr = optim.build(config, params, AXES, 100)
  updates, _ = tx.update(ones, tx.init(params), params, step=jnp.int32(1))
  np.testing.assert_allclose(updates["final"]["scale"], -0.1 * 2 / 4, rtol=1e-6)
  np.testing.assert_allclose(updates["head"]["kernel"], -0.5 * lr(1), rtol=1e-6)  # the first match wins
  assert not np.any(updates["trunk"]["mlp"]["up"]["kernel"])
  with pytest.raises(ValueError, match="step=state.step"):
    tx.update(ones, tx.init(params), params)


def test_schedules_at_their_corners():
  at = lambda total=100, **kw: optim.LrSchedule(**kw).factor(total)
  wsd = at(kind="wsd", warmup=10, decay_steps=20, end=0.1)
  np.testing.assert_allclose(
    [wsd(s) for s in (0, 9, 10, 79, 80, 90, 100, 500)], [0.1, 1, 1, 1, 1, 0.55, 0.1, 0.1], rtol=1e-6
  )
  np.testing.assert_allclose(at(kind="wsd", decay_steps=100, shape="sqrt")(25), 0.5, rtol=1e-6)
  cosine = at(kind="cosine", warmup=20, end=0.2)
  np.testing.assert_allclose([cosine(s) for s in (19, 20, 60, 100)], [1, 1, 0.6, 0.2], rtol=1e-6)
  np.testing.assert_allclose(at(kind="linear", steps=50)(25), 0.5, rtol=1e-6)
  assert at(kind="constant", warmup=2)(10**6) == 1
  with pytest.raises(ValueError, match=r"optim.schedule.warmup = 95: warmup \+ decay_steps \(10\) exceed"):
    at(kind="wsd", warmup=95)
  with pytest.raises(ValueError, match="fraction"):
    optim.LrSchedule(end=3e-5 + 1)


def test_adamw_equals_optax_adamw():
  params, grads = make_params(), make_params(1)
  new, _ = one_step(cfg(lr=0.01, weight_decay=0.1, clip_norm=1.0), params, grads, steps=3)
  mask = jax.tree.map(lambda a: optim.role(a)[0] in ("matrix", "head"), AXES, is_leaf=is_spec)
  ref = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(0.01, 0.9, 0.95, 1e-8, weight_decay=0.1, mask=mask)
  )
  opt, p = ref.init(params), params
  for _ in range(3):
    u, opt = ref.update(grads, opt, p)
    p = optax.apply_updates(p, u)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), new, p)


def test_schedule_free_average_is_the_running_mean_of_z():
  """With a constant rate x is the plain mean of z_1 … z_t (Defazio et al., 2405.15682, eq. 4)."""
  params, grads = make_params(), make_params(1)
  config = cfg(name="schedule_free", lr=0.05, weight_decay=0.0, clip_norm=0.0)
  tx, _ = optim.build(config, params, AXES, 10)
  opt, p, zs = tx.init(params), params, []
  for s in range(3):
    u, opt = tx.update(jax.tree.map(lambda g, s=s: g * (s + 1), grads), opt, p, step=jnp.int32(s))
    p = optax.apply_updates(p, u)
    zs.append(np.asarray(opt.z["head"]["kernel"]))
  x = optim.eval_params(opt, p)["head"]["kernel"]
  np.testing.assert_allclose(x, np.mean(zs, 0), rtol=1e-4, atol=1e-5)
  assert not np.allclose(x, p["head"]["kernel"], atol=1e-3)  # it differs from the trained point


def test_unmatched_regexes_and_wrong_axes_are_named():
  params = make_params()
  with pytest.raises(
    ValueError, match=r"optim.freeze: 'attention' matches no parameter; paths look like embed/pos"
  ):
    optim.build(cfg(freeze=("attention",)), params, AXES, 10)
  with pytest.raises(ValueError, match="lr_mult"):
    optim.build(cfg(lr_mult=(("nope", 2.0),)), params, AXES, 10)
  with pytest.raises(ValueError, match=r"final/scale: logical axes .* name 2 axes, shape is \(8,\)"):
    optim.build(cfg(), params, {**AXES, "final": {"scale": ("embed", "mlp")}}, 10)
  with pytest.raises(ValueError, match="adamw, muon"):
    cfg(name="lion")
  with pytest.raises(ValueError, match="no regular expression"):
    cfg(freeze=("(",))


def test_config_section_builds_the_nested_schedule():
  section = dict(name="muon", lr=1, schedule=dict(kind="wsd", warmup=3), lr_mult=[["^head/", 2]])
  built = config.build(optim.OptimConfig, section, "optim")
  assert built.schedule == optim.LrSchedule(kind="wsd", warmup=3) and built.lr_mult == (("^head/", 2.0),)
  with pytest.raises(config.ConfigError, match="optim.schedule.warmup = -1"):
    config.build(optim.OptimConfig, dict(schedule=dict(warmup=-1)), "optim")
  with pytest.raises(config.ConfigError, match=r"optim\.wieght_decay(.|\n)*did you mean 'weight_decay'"):
    config.build(optim.OptimConfig, dict(wieght_decay=0.1), "optim")


def test_ema_equals_the_bias_corrected_average():
  beta, steps = 0.999, 6
  p = [jax.random.normal(jax.random.key(i), (4,)) for i in range(steps)]
  average, m = {"w": jnp.full((4,), 100.0)}, np.zeros(4)
  for t in range(steps):
    average = optim.ema(average, {"w": p[t]}, jnp.int32(t), beta)
    m = beta * m + (1 - beta) * np.asarray(p[t], np.float64)
    np.testing.assert_allclose(average["w"], m / (1 - beta ** (t + 1)), rtol=1e-4, atol=1e-5)
  # Without the correction six steps of β = 0.999 would still be at the initial 100.
  assert abs(float(average["w"][0])) < 10


def run_guard(losses, norms=None, window=32, stats=None):
  stats = optim.guard_stats(window) if stats is None else stats
  step = jax.jit(lambda s, a, b: optim.guard(s, a, b, window=window))
  oks = []
  for i, loss in enumerate(losses):
    ok, stats = step(stats, jnp.float32(loss), jnp.float32(1.0 if norms is None else norms[i]))
    oks.append(bool(ok))
  return oks, stats


def noisy(n, level=3.0, seed=0):
  return level + 0.1 * np.random.default_rng(seed).standard_normal(n)


def test_guard_accepts_ordinary_steps_and_first_steps():
  # A fast fall and an early jump within the first quarter of the window: nothing to judge by.
  assert all(run_guard([11, 5, 80, 7, 3])[0])
  assert all(run_guard(noisy(200))[0])
  assert all(run_guard(np.linspace(9, 1, 200))[0])
  assert all(run_guard(np.full(100, 2.5) * (1 + 1e-6 * np.arange(100) % 2))[0])  # constant up to rounding


def test_guard_refuses_spikes_of_loss_and_of_norm():
  oks, stats = run_guard([*noisy(40), 9.0, *noisy(5, seed=1)])
  assert (
    oks.index(False) == 40 and sum(oks) == 45 and int(stats["skipped"]) == 1 and int(stats["in_row"]) == 0
  )
  norms = [*noisy(40, 1.0), 30.0]
  assert run_guard(noisy(41), norms)[0] == [True] * 40 + [False]
  assert run_guard([*noisy(40), 0.1])[0][-1]  # far below the mean is good news


def test_guard_survives_a_lasting_change_of_level():
  window, sigma = 128, 6
  oks, _ = run_guard([*noisy(200), *noisy(40, level=9.0, seed=1)], window=window)
  assert 1 <= oks.count(False) <= int(np.ceil(window / (1 + sigma**2))) and all(oks[210:])


@pytest.mark.parametrize("bad", (np.nan, np.inf, -np.inf))
def test_non_finite_never_reaches_weights_or_statistics(bad):
  params = make_params()
  tx, _ = optim.build(cfg(name="adamw"), params, AXES, 10)

  def step(s, poison, guarded=True):
    grads = jax.tree.map(lambda p: p * poison, s.trees["model"])
    norm = optax.tree.norm(grads)
    ok, stats = optim.guard(s.stats, poison + 2.0, norm)
    updates, opt = tx.update(grads, s.opt["model"], s.trees["model"], step=s.step)
    new = {"model": optax.apply_updates(s.trees["model"], updates)}
    new["ema"] = optim.ema(s.trees["ema"], new["model"], s.step, 0.9)
    new, opt = optim.select(ok | (not guarded), (new, opt), (s.trees, s.opt["model"]))
    return state.TrainState(s.step + 1, new, {"model": opt}, stats)

  first = state.create({"model": params, "ema": params}, {"model": tx}, optim.guard_stats())
  run = jax.jit(step, static_argnums=2)
  good = run(first, jnp.float32(1.0))
  after = run(good, jnp.float32(bad))
  jax.tree.map(np.testing.assert_array_equal, (after.trees, after.opt), (good.trees, good.opt))
  assert int(after.step) == 2 and int(after.stats["skipped"]) == 1 and int(after.stats["count"]) == 1
  again = run(after, jnp.float32(1.0))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(again)) and int(again.stats["in_row"]) == 0
  # Negative control: without the selection the poison is in the weights.
  assert not all(np.isfinite(x).all() for x in jax.tree.leaves(run(good, jnp.float32(bad), False).trees))


@pytest.mark.parametrize("name", optim.NAMES)
def test_optimizer_state_is_placed_like_the_parameters(name):
  shapes = {"w": ((2, 256, 130), ("layers", "embed", "mlp")), "b": ((2, 130), ("layers", "mlp"))}
  params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x[0], jnp.float32), shapes, is_leaf=is_spec)
  axes = jax.tree.map(lambda x: x[1], shapes, is_leaf=is_spec)
  mesh = jax.sharding.Mesh(
    np.array(jax.devices()[:1]).reshape(1, 1),
    ("fsdp", "tensor"),
    axis_types=(jax.sharding.AxisType.Auto,) * 2,
  )
  specs = {"w": PartitionSpec(None, "fsdp", "tensor"), "b": PartitionSpec(None, "tensor")}
  placed = jax.tree.map(
    lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda x: isinstance(x, PartitionSpec)
  )
  tx, _ = optim.build(cfg(name=name), params, axes, 10)
  shard = optim.opt_shardings(tx, params, placed, mesh)
  want = {
    (2, 256, 130): specs["w"],
    (2, 130): specs["b"],
    (2, 256): PartitionSpec(None, "fsdp"),
  }  # the factored moment of w without its mlp axis
  if name == "adafactor":  # v_row drops the largest axis (embed), v_col the second largest (mlp)
    found = {str(s.spec) for s in jax.tree.leaves(shard)}
    assert found == {
      str(s) for s in (PartitionSpec(), PartitionSpec(None, "fsdp"), PartitionSpec(None, "tensor"))
    }
  abstract = jax.eval_shape(tx.init, params)
  jax.tree.map(lambda x, s: s.shard_shape(x.shape), abstract, shard)  # every spec fits its leaf
  for x, s in zip(jax.tree.leaves(abstract), jax.tree.leaves(shard)):
    assert name == "adafactor" or s.spec == want.get(x.shape, PartitionSpec())
