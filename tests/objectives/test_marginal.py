"""Marginalisation models: what the squared error measures, and that it makes marginals."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import config, models, objectives
from genmodels.contracts import CONTEXT, TEXT, Outputs, Target, token_row
from genmodels.objectives import Nets, laws
from tests.objectives import table_net as tn

KEY = jax.random.key(0)


def objective(mask_id=tn.MASK):
  return objectives.build(config.load("language/mam:tiny").objective, {"mask_id": mask_id})


@dataclasses.dataclass
class Scalar:
  value: jax.Array

  def map(self, fn):
    return fn(self.value.reshape(-1, 1)).reshape(self.value.shape)


def net(table, marginal):
  """Conditionals log p(x_i | shown) and a log-marginal of every pattern, as tables; both streams."""
  table, marginal = jnp.asarray(table, jnp.float32), jnp.asarray(marginal, jnp.float32)

  def fn(inputs, targets):
    pattern = tn.index_jnp(inputs.ids[..., 0].reshape(-1, 2, tn.L))  # [B, 2]
    dists = {"conditional": tn.TableDist(table[pattern[:, 0]])}
    if "consistency" in targets:
      dists["consistency"] = Scalar(jnp.repeat(marginal[pattern], tn.L, 1))
    return Outputs(dists=dists)

  return fn


def log_marginals(joint):
  out = np.zeros((tn.V + 1) ** tn.L)
  for pattern in itertools.product(range(tn.V + 1), repeat=tn.L):
    sub = joint[tuple(slice(None) if s == tn.MASK else slice(s, s + 1) for s in pattern)]
    out[tn.index(np.array(pattern))] = np.log(sub.sum())
  return out


@pytest.mark.slow
def test_true_marginals_have_no_error():
  joint = tn.random_joint(3)
  table, true = tn.oracle_table(joint), log_marginals(joint)
  obj = objective()
  x = np.random.default_rng(0).choice(tn.V**tn.L, 512, p=joint.reshape(-1))
  row = token_row(np.stack(np.unravel_index(x, joint.shape), 1))
  jitted = jax.jit(lambda row, f: obj.run(Nets({"model": net(table, f)}), row, KEY, 2))
  run = lambda f: jitted(row, jnp.asarray(f, jnp.float32))
  sums, denominators, _ = run(true)
  assert float(denominators["consistency"]) == 512 and float(sums["consistency"]) < 1e-6 * 512
  # Another f: its error is (g(S) − g(S ∪ d))², by hand from the draws; g(∅) never counts.
  g = np.random.default_rng(1).normal(size=true.shape)
  got = np.asarray(run(true + g)[2]["per_token"]["consistency"])
  noise = jax.jit(lambda row: obj.corruption.draw(row, KEY, 2))(row)
  hit = np.asarray(noise.hit)
  shown = np.where(hit, tn.MASK, np.asarray(row.tokens)[:, None])
  before, after = (g[tn.index(shown[:, i])] for i in (0, 1))
  before = np.where(hit[:, 0].all(1), 0.0, before)
  np.testing.assert_allclose(got[:, 0], (before - after) ** 2, rtol=1e-3, atol=1e-4)
  assert not got[:, 1:].any() and (hit[:, 0].sum(1) - hit[:, 1].sum(1) == 1).all()
  assert laws.check(obj) == []


@pytest.mark.slow
def test_likelihood_is_the_any_order_bound():
  table = tn.random_table(1)
  x = np.array([2, 0, 1, 1])
  row = token_row(np.tile(x, (8000, 1)))
  obj = objective()
  bound = jax.jit(lambda: obj.bound(Nets({"model": net(table, np.zeros(256))}), row, KEY, 0, 1)[0])
  nats = np.asarray(bound(), np.float64)[:, 0]
  assert abs(nats.mean() - tn.closed_form(x, table, tn.L)) < 3.5 * nats.std() / np.sqrt(8000)


@pytest.mark.full
def test_fitted_marginals_sum_up():
  """A trunk fitted to a toy: exp f sums to one over all texts, and Σ_v exp f(S, v) = exp f(S)."""
  import optax

  V, L, BOS, M = 2, 3, 3, 2
  section = dict(width=32, layers=2, num_heads=2, mlp=64, vocab=4)
  model = models.build(section | {"heads": {"text": {"forbid": (M, BOS)}, "marginal": {"size": 1}}})
  obj, params = objective(M), jax.jit(model.init)(KEY)
  joint = np.random.default_rng(0).dirichlet(np.ones(V**L))
  tx = optax.adam(optax.cosine_decay_schedule(3e-3, 3000))

  def row_of(x):
    tokens = jnp.concatenate([jnp.full((len(x), 1), BOS), x], 1)
    return token_row(tokens, role=jnp.where(jnp.arange(L + 1) > 0, TEXT, CONTEXT) * jnp.ones_like(tokens))

  def loss(p, row, step):
    sums, den, _ = obj.run(Nets({"model": lambda i, t: model.apply(p, i, t)}), row, KEY, step)
    return sum(sums[n] / den[n] for n in sums)

  @jax.jit
  def train(params):
    def one(carry, step):
      params, opt = carry
      x = jax.random.choice(jax.random.fold_in(KEY, step), V**L, (64,), p=jnp.asarray(joint))
      row = row_of(jnp.stack([(x >> i) & 1 for i in range(L)], 1))
      updates, opt = tx.update(jax.grad(loss)(params, row, step), opt)
      return (optax.apply_updates(params, updates), opt), None

    return jax.lax.scan(one, (params, tx.init(params)), jnp.arange(3000))[0][0]

  params = train(params)
  patterns = np.array(list(itertools.product(range(3), repeat=L)))  # 2: masked
  row = row_of(jnp.asarray(np.where(patterns == M, 0, patterns)))
  noise = obj.corruption.state(
    row, jnp.asarray(np.pad(patterns != M, ((0, 0), (1, 0)), constant_values=True))
  )
  noise = noise.replace(hit=jnp.concatenate([noise.hit] * 2, 1))
  inputs, read = obj.view(row, noise)
  slot = jnp.zeros((27, 1), jnp.int32)
  target = {"f": Target("marginal", slot, slot, jnp.ones((27, 1)))}
  f = np.asarray(model.apply(params, inputs, target).dists["f"].map(lambda z: z[:, 0]))[:, 0]
  f = dict(zip(map(tuple, patterns), np.where((patterns == M).all(1), 0.0, f)))
  assert abs(sum(np.exp(v) for k, v in f.items() if M not in k) - 1) < 0.1
  for k, v in f.items():
    for i in np.flatnonzero(np.array(k) == M):
      both = [np.exp(f[k[:i] + (a,) + k[i + 1 :]]) for a in range(V)]
      assert abs(sum(both) - np.exp(v)) < 0.05
