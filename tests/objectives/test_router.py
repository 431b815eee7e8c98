"""Losses of routers: their minimum, their scope, how micro-batches add up, and what transformers computes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from genmodels import config, metrics, models, objectives, step, system
from genmodels import state as states
from genmodels.contracts import Outputs
from genmodels.models import moe
from genmodels.objectives import laws, router
from genmodels.system import functions
from tests.models import cases
from tests.objectives.test_text import rows

MOE = dict(experts=4, top_k=2, mlp=12)


def stats(load, score, slots, z=0.0):
  load, score = jnp.asarray(load, jnp.float32), jnp.asarray(score, jnp.float32)
  full = lambda x: jnp.full(load.shape[:1], x, jnp.float32)
  return {"load": load, "score": score, "slots": full(slots), "z": full(z)}


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_balance_is_least_where_routing_is_uniform(scope):
  even = stats(np.full((3, 4), 10.0), np.full((3, 4), 5.0), 20)  # top-2 of 4 experts, 20 slots
  assert float(router.balance(even, scope)) == pytest.approx(2.0)
  rng = np.random.default_rng(0)
  for _ in range(20):  # slots that agree
    score = rng.dirichlet(np.ones(4), 3) * 20
    order = np.argsort(-score, 1)[:, :2]
    load = np.zeros((3, 4))
    np.put_along_axis(load, order, 20.0, 1)
    assert float(router.balance(stats(load, score, 20), "layer")) > 2.0
  worst = stats([[20, 20, 0, 0]] * 3, [[10, 10, 0, 0]] * 3, 20)
  assert float(router.balance(worst, scope)) == pytest.approx(4.0)
  # No strict bound: two slots prefer the first expert by little, one the second by much.
  below = stats([[2, 1]], [[2 * 0.51, 2 * 0.49 + 1]], 3)
  assert float(router.balance(below, scope)) < 0.9


def test_over_the_model_one_layer_makes_up_for_another():
  """Each layer uses two experts only, all four are used alike: transformers' form is content, the layers' is not."""
  load = [[20, 20, 0, 0], [0, 0, 20, 20]]
  found = stats(load, np.asarray(load) / 2, 20)
  assert float(router.balance(found, "model")) == pytest.approx(2.0)
  assert float(router.balance(found, "layer")) == pytest.approx(4.0)


def test_metrics_and_z():
  found = stats([[20, 20, 0, 0], [10, 10, 10, 10]], np.ones((2, 4)), 20, z=180.0)
  assert float(router.z_loss(found)) == pytest.approx(9.0)
  got = {k: float(a / b) for k, (a, b) in router.ratios(Outputs({}, layers={"router": found})).items()}
  assert got == pytest.approx({"router/load_max": 1.5, "router/load_entropy": 0.75, "router/idle": 0.25})
  assert router.ratios(Outputs({}, layers={"hidden": None})) == {}


def objective(**lambdas):
  return objectives.build(
    {
      "kind": "tokens",
      "terms": {"text": {"align": "shift"}},
      "router": lambdas,
    }
  )


def setup(lambdas, accumulate, B=4, rate=1, **experts):
  """(step function, state, row) of a small model with experts, whose parameters move by rate times the gradient."""
  model, params = cases.build(moe={**MOE, **experts}, pattern=(dict(mlp="moe"),), vocab=40, layers=1)
  scaled = lambda g: jax.tree.map(lambda x: rate * x, g)
  tx = optax.GradientTransformationExtraArgs(lambda p: (), lambda g, s, p=None, *, step=None: (scaled(g), s))
  cfg = step.StepConfig(accumulate=accumulate, guard_window=0)
  fn = step.make_train_step(objective(**lambdas), functions({}, model), tx, cfg)
  state = states.create({"model": params}, {"model": tx}, step.initial_stats(cfg))
  return model, jax.jit(fn), state, rows((12, 9), B=B)


@pytest.mark.slow
def test_terms_are_taken_per_micro_batch_and_averaged():
  lambdas = dict(balance=0.5, z=0.1)
  key = jax.random.key(0)
  model, one, state, row = setup(lambdas, 1)
  _, two, _, _ = setup(lambdas, 2)
  whole, halves = one(state, row, key)[1], two(state, row, key)[1]
  parts = [one(state, jax.tree.map(lambda x: x[i::2], row), key)[1] for i in range(2)]
  for term in ("loss/router_balance", "loss/router_z"):
    want = np.mean([float(p[term]) for p in parts])
    assert float(halves[term]) == pytest.approx(want, rel=1e-5), term
  # The mean over slots (z) may agree by equal halves; a product of means does not: it is no ratio of sums.
  assert abs(float(whole["loss/router_balance"]) - float(halves["loss/router_balance"])) > 1e-4
  assert float(halves["denominator/router_balance"]) == 2
  assert float(whole["loss"]) == pytest.approx(
    float(whole["loss/text"])
    + 0.5 * float(whole["loss/router_balance"])
    + 0.1 * float(whole["loss/router_z"]),
    rel=1e-5,
  )
  assert 1 <= float(whole["router/load_max"]) <= 2 and 0 < float(whole["router/load_entropy"]) <= 1


def test_the_balance_loss_balances():
  """From a router that sends nearly every slot to one expert, by gradient descent on the term alone."""
  cfg = models.Moe(experts=4, top_k=1, mlp=1)
  x = jnp.asarray(1 + np.random.default_rng(0).standard_normal((64, 8)), jnp.float32)

  def loss(kernel):
    experts, _, scores = moe.route(x @ kernel, cfg)
    load = moe.order_by_expert(experts.reshape(-1), 4)[2].astype(jnp.float32)
    return router.balance(stats(load[None], scores.sum(0)[None], 64)), load

  descend = lambda _, k: k - 0.01 * jax.grad(lambda k: loss(k)[0])(k)
  start = jnp.asarray(0.01 * np.random.default_rng(1).standard_normal((8, 4)), jnp.float32).at[:, 0].add(0.5)
  f = jax.jit(lambda k: (loss(k), loss(jax.lax.fori_loop(0, 300, descend, k))))
  (before, load), (after, balanced) = f(start)
  assert float(load.max()) > 50 and float(before) > 3
  assert float(balanced.max()) < float(load.max()) and float(after) < 1.05


def test_the_bias_moves_by_the_sign():
  load = {"s0": {"l0": jnp.array([[3.0, 1, 2, 2], [0, 0, 0, 0]])}}
  mlp = {"expert_bias": jnp.full((2, 4), 0.5), "router": {"kernel": jnp.ones((2, 3, 4))}}
  params = {"stack": {"s0": {"l0": {"mlp": mlp, "norm": 7}, "l1": {"mlp": 1}}}, "heads": 3}
  got = moe.balanced(params, load, 0.1)
  np.testing.assert_allclose(
    got["stack"]["s0"]["l0"]["mlp"]["expert_bias"], [[0.4, 0.6, 0.5, 0.5], [0.5] * 4], rtol=1e-6
  )
  assert (
    got["heads"] == 3 and got["stack"]["s0"]["l1"] == {"mlp": 1} and got["stack"]["s0"]["l0"]["norm"] == 7
  )
  assert float(mlp["expert_bias"].sum()) == 4, "the parameters given are not changed"


@pytest.mark.slow
def test_the_bias_balances_without_a_loss():
  """Nothing else learns here: the fullest expert's load falls towards the mean, and the weights of the mixture
  are not those of the bias. Micro-batches count together; a rate of 0 moves nothing."""
  experts, key = dict(bias=True, score="sigmoid", normalise=True), jax.random.key(0)
  _, fn, state, row = setup(dict(bias=0.02), 1, rate=0, **experts)
  _, halves, _, _ = setup(dict(bias=0.02), 2, rate=0, **experts)
  bias = lambda s: np.asarray(s.trees["model"]["stack"]["s0"]["l0"]["mlp"]["expert_bias"])
  first, m = fn(state, row, key)
  np.testing.assert_array_equal(bias(halves(state, row, key)[0]), bias(first))
  moved = bias(first) - bias(state)
  assert np.isin(np.round(moved / 0.02, 3), (-1, 0, 1)).all() and (moved != 0).any()
  history, s = [float(m["router/load_max"])], first
  for _ in range(30):
    s, m = fn(s, row, key)
    history.append(float(m["router/load_max"]))
  assert history[0] > 1.25 > 1.15 > min(history[-10:]), history
  same = lambda a, b: all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)))
  keep = lambda t: {k: v for k, v in t.items() if k != "stack"}
  assert same(keep(s.trees["model"]), keep(state.trees["model"]))
  assert objective(bias=0.0).router.stats(None) == {}


def test_a_run_that_forgets_the_terms_is_refused():
  @dataclasses.dataclass(frozen=True)
  class Forgetful(objectives.Objective):
    def run(self, nets, row, key, step):
      inputs, targets, denominators = self.prepare(row, key, step)
      sums, aux = self.loss(nets["model"](inputs, targets), targets)
      return sums, denominators, aux

  model, params = cases.build(moe=MOE, pattern=(dict(mlp="moe"),), vocab=40, layers=1)
  made = Forgetful(terms={"text": {"align": "shift"}}, router=router.Router(balance=0.1))
  tx = optax.GradientTransformationExtraArgs(lambda p: (), lambda g, s, p=None, *, step=None: (g, s))
  cfg = step.StepConfig(guard_window=0)
  fn = step.make_train_step(made, functions({}, model), tx, cfg)
  state = states.create({"model": params}, {"model": tx}, {})
  with pytest.raises(ValueError, match="Forgetful.run sums no router_balance"):
    jax.eval_shape(fn, state, rows((12, 9), B=2), jax.random.key(0))


def test_laws():
  assert "no ratios of sums" in laws.check(objective(balance=1e-2))[-1]
  assert laws.check(objective()) == [] and objective().scales.keys() == {"text"}
  with pytest.raises(config.ConfigError, match="scope is 'row'"):
    objective(scope="row")
  model = models.build({**cases.BASE})
  with pytest.raises(config.ConfigError, match="no experts for router_z"):
    system._agree(objective(z=1e-3), model)


def test_the_shipped_system():
  """LLaDA-MoE as published: 7B parameters, 1.4B of them in use for a token."""
  cfg = config.load("language/llada_moe")
  model = models.build(cfg.model)
  shapes, axes = model.abstract_params(), model.logical_axes()
  total = models.count(shapes)
  numbers = metrics.model_flops(
    shapes, axes, models.attention_sizes(model.cfg), models.head_paths(model.cfg),
    active=models.active_experts(model.cfg),
  )  # fmt: skip
  assert f"{total / 1e9:.1f}" == "7.4"
  assert (
    f"{(numbers.trunk + numbers.heads['text']) / 1e9:.1f}" == "1.4"
  )  # in use for a token, as the abstract says
  assert objectives.build(cfg.objective, {"mask_id": 156895}).scales.keys() == {"diffusion", "router_balance"}


@pytest.mark.parity
def test_transformers_computes_the_same_loss():
  torch = pytest.importorskip("torch")
  modeling = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
  rng = np.random.default_rng(0)
  L, T, E, K = 3, 29, 8, 3
  logits = rng.standard_normal((L, T, E)).astype(np.float32)
  mask = (rng.random(T) < 0.7).astype(np.float32)
  cfg = models.Moe(experts=E, top_k=K, mlp=1)
  found = []
  for z in logits:
    experts, _, scores = moe.route(jnp.asarray(z), cfg)
    _, _, sizes = moe.order_by_expert(jnp.where(mask[:, None] > 0, experts, E).reshape(-1), E)
    found.append((sizes, (scores * mask[:, None]).sum(0)))
  load, score = (jnp.stack(x) for x in zip(*found))
  got = float(router.balance(stats(load, score, mask.sum()), "model"))
  want = modeling.load_balancing_loss_func(
    tuple(torch.tensor(z) for z in logits), E, K, torch.tensor(mask[None])
  )
  assert got == pytest.approx(float(want), rel=1e-5)
  unmasked = modeling.load_balancing_loss_func(tuple(torch.tensor(z) for z in logits), E, K)
  assert got != pytest.approx(float(unmasked), rel=1e-3)  # negative control: padding does count there
