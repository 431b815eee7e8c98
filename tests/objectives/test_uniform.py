"""Uniform-state diffusion: its noise, its bound, unrolled denoising, canvases with self-conditioning."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import config, objectives
from genmodels.contracts import Outputs, token_row
from genmodels.objectives import Nets, laws
from genmodels.objectives.uniform import path_divergence
from tests.objectives.test_text import KEY, MASK, V, ar, loss, rows, trunk


@pytest.fixture(autouse=True, scope="module")
def _parameters():
  trunk()


@functools.cache
def objective(ref: str):
  obj = objectives.build(config.load(f"language/{ref}:tiny").objective, {"mask_id": MASK, "vocab": V})
  if ref == "diffusion_gemma":
    blocks = dataclasses.replace(obj.corruption.blocks, size=4)
    obj = dataclasses.replace(
      obj, embed_scale=1.0, corruption=dataclasses.replace(obj.corruption, blocks=blocks)
    )
  return obj


@pytest.mark.slow
def test_noise_is_uniform():
  obj = objective("ar2diff")
  assert obj.corruption.exclude == (MASK,) and obj.corruption.states == V - 1
  row = rows((64,), B=512)
  noise = jax.jit(lambda row: obj.corruption.draw(row, KEY, 3))(row)
  hit, t = np.asarray(noise.hit[:, 0, 1:]), np.asarray(noise.level[:, 0, 1:])
  assert not np.asarray(noise.hit[:, 0, 0]).any()  # BOS is given
  assert abs((hit - t).mean()) < 3.5 * 0.5 / np.sqrt(hit.size) and np.ptp(t, axis=1).max() == 0
  count = np.bincount(np.asarray(noise.value[:, 0, 1:])[hit], minlength=V)
  assert count[MASK] == 0
  expected = count.sum() / (V - 1)
  assert (((count - expected) ** 2 / expected)[:MASK]).sum() < 27.9  # chi-square, 9 degrees, p = 1e-3
  with pytest.raises(config.ConfigError, match="vocabulary"):
    objectives.build(config.load("language/ar2diff").objective, {"mask_id": MASK})


@dataclasses.dataclass
class Constant:
  """The same distribution everywhere."""

  logits: jax.Array
  shape: tuple

  def map(self, fn, *xs):
    B, M = self.shape
    flat = [x.reshape(B * M) for x in xs]
    return fn(jnp.broadcast_to(self.logits, (B * M, V)), *flat).reshape(B, M)


@pytest.mark.slow
def test_bound_is_tight_for_independent_tokens():
  """A prediction that ignores its input is a model of independent tokens, whose time reversal is exact: the
  bound of every text is its negative log-likelihood."""
  obj = objective("ar2diff")
  p = np.random.default_rng(0).dirichlet(np.ones(V))
  p[MASK] = 0
  p /= p.sum()
  with np.errstate(divide="ignore"):
    logits = jnp.asarray(np.log(p), jnp.float32)
  net = lambda inputs, targets: Outputs({n: Constant(logits, t.value.shape) for n, t in targets.items()})
  x = np.array([3, 0, 7])
  row = token_row(np.tile(x, (20000, 1)))
  nats, tokens = jax.jit(lambda: obj.bound(Nets({"model": net}), row, KEY, 0, 1))()
  nats = np.asarray(nats, np.float64)[:, 0]
  assert abs(nats.mean() + np.log(p[x]).sum()) < 3.5 * nats.std() / np.sqrt(20000)
  assert float(tokens[0, 0]) == 3 and nats.std() < 20


def _reverse_law(logp):
  """p(x) of the reverse process of two binary tokens whose predictions are logp[z0, z1, i, v]."""
  pairs = list(itertools.product(range(2), repeat=2))
  law, ts = np.full(4, 0.25), 1 - np.geomspace(1e-4, 1, 8000)
  for t, s in zip(ts, ts[1:]):
    alpha = 1 - (t + s) / 2
    rates = np.zeros((4, 4))
    for a, z in enumerate(pairs):
      for i in range(2):
        bar = 2 * alpha * np.exp(logp[z][i]) + 1 - alpha
        to = tuple(1 - z[j] if j == i else z[j] for j in range(2))
        rates[a, pairs.index(to)] = bar[to[i]] / bar[z[i]] / (2 * alpha)
    np.fill_diagonal(rates, -rates.sum(1))
    law = law @ np.linalg.inv(np.eye(4) - (t - s) * rates)  # implicit Euler
  return dict(zip(pairs, law))


def test_bound_is_above_the_likelihood():
  """Two binary tokens that depend on each other: the bound, by quadrature, against the law of the process."""
  logp = np.log(np.random.default_rng(3).dirichlet(np.ones(2), (2, 2, 2)))
  law = _reverse_law(logp)
  assert abs(sum(law.values()) - 1) < 1e-6
  t = (np.arange(4000) + 0.5) / 4000
  gap = []
  for x in law:
    total = 0.0
    for z in law:
      q = np.prod([(1 - t) * (x[i] == z[i]) + t / 2 for i in range(2)], 0)
      for i in range(2):
        args = jnp.full(4000, x[i]), jnp.full(4000, z[i]), jnp.asarray(t, jnp.float32)
        total += (q * np.asarray(path_divergence(jnp.tile(logp[z][i], (4000, 1)), *args, 2))).mean()
    gap.append(total + np.log(law[x]))
  assert min(gap) > -2e-3 and max(gap) > 0.02


@pytest.mark.slow
def test_prefix_bears_no_loss():
  obj, row = objective("ar2diff"), rows((16, 9), B=8)
  inputs, targets, denominators = jax.jit(lambda row: obj.prepare(row, KEY, 3))(row)
  weight = np.asarray(targets["diffusion"].weight)
  for b, lo, hi in itertools.product(range(8), (0, 16), (16, 25)):
    if hi - lo not in (16, 9):
      continue
    asked = weight[b, lo:hi] > 0
    assert (
      asked.any() and not asked[0] and not np.any(np.diff(asked.astype(int)) < 0)
    )  # a prefix, then the target
    given = np.asarray(row.tokens[b, lo:hi])[~asked]
    np.testing.assert_array_equal(np.asarray(inputs.ids[b, lo:hi, 0])[~asked], given)
  share = (weight[:, 1:16] > 0).mean(1)
  assert share.min() < 0.4 and share.max() > 0.6 and float(denominators["diffusion"]) == weight.sum()
  assert (np.asarray(inputs.ids[..., 0]) != row.tokens)[weight > 0].any()
  # Likelihoods give nothing, and ask for tokens that were not drawn anew as well.
  targets = jax.jit(lambda row: obj.prepare(row, KEY, 3, bound=(0, 2))[1])(row)
  np.testing.assert_array_equal(targets["diffusion"].weight > 0, row.role == 1)


def _recorded(obj, row):
  """(sums, denominators, per-token values, the Inputs and Dists of every pass) of one evaluation of the loss."""
  model, params = trunk()

  @jax.jit
  def run(params, row):
    calls = []

    def net(inputs, targets):
      out = model.apply(params, inputs, targets)
      logits = {n: d.map(lambda x: x) for n, d in out.dists.items()}
      calls.append((inputs.ids, inputs.add_embed, logits))
      return out

    sums, denominators, aux = obj.run(Nets({"model": net}, {"model": params}), row, KEY, 3)
    return sums, denominators, aux["per_token"], calls

  return run(params, row)


@pytest.mark.slow
def test_second_pass_reads_the_first_ones_output():
  obj, row = objective("ar2diff"), rows((16, 9), B=4)
  sums, denominators, per_token, calls = _recorded(obj, row)
  target = np.asarray(per_token["diffusion"]) > 0
  first, second = (np.asarray(ids[..., 0]) for ids, _, _ in calls)
  np.testing.assert_array_equal(first[~target], second[~target])
  assert (first != second)[target].mean() > 0.5 and (second != MASK).all()
  # The tokens are draws from the first pass's prediction: their mean log-probability is minus its entropy.
  logp = np.asarray(jax.nn.log_softmax(calls[0][2]["diffusion"]))[target]
  of = np.take_along_axis(logp, second[target][:, None], 1)
  p, finite = np.exp(logp), np.where(logp > -np.inf, logp, 0)
  entropy = (p * finite).sum(1)
  spread = (p * finite**2).sum(1) - entropy**2
  assert abs(of.sum() - entropy.sum()) < 3.5 * np.sqrt(spread.sum())
  ce = lambda i: (
    -np.take_along_axis(
      np.asarray(jax.nn.log_softmax(calls[i][2]["diffusion"])), np.asarray(row.tokens)[..., None], 2
    )[..., 0][target]
  )
  np.testing.assert_allclose(float(sums["diffusion"]), (ce(0).sum() + ce(1).sum()) / 2, rtol=1e-5)
  plain = loss(dataclasses.replace(obj, unroll=0), row)[0]
  np.testing.assert_allclose(plain, ce(0).sum() / float(denominators["diffusion"]), rtol=1e-5)


def test_canvas_sees_causal_context_and_itself():
  obj, row = objective("diffusion_gemma"), rows((11, 6), B=1)

  @jax.jit
  def mask(row):
    return obj.relations["full"].mask(obj.layout.arrange(row, obj.corruption.draw(row, KEY, 3))).to_dense()[0]

  dense = np.asarray(mask(row))
  doc = np.asarray(row.doc[0])
  at = np.r_[0:11, 0:6]
  same, block = doc[:, None] == doc, at // 4
  np.testing.assert_array_equal(dense[:17, :17], same & (block[:, None] == block))
  np.testing.assert_array_equal(dense[:17, 17:], same & (block[None] < block[:, None]))
  np.testing.assert_array_equal(dense[17:, 17:], same & (at[None] <= at[:, None]))
  assert not dense[17:, :17].any()
  assert laws.check(obj) == []
  with pytest.raises(config.ConfigError, match="clean identity"):
    laws.check(dataclasses.replace(obj, masks={"full": "bd3"}))
  wrong = {"n>n": "BLK_EQ", "n>c": "BLK_LE", "c>c": "POS_LE"}
  with pytest.raises(config.ConfigError, match="clean identity"):
    laws.check(dataclasses.replace(obj, masks={"full": wrong}))


@pytest.mark.slow
def test_self_conditioning_adds_the_mean_embedding():
  obj, row = objective("diffusion_gemma"), rows((11, 6), B=6)
  sums, denominators, per_token, calls = _recorded(obj, row)
  (first, none, logits), (second, guess, _) = calls
  np.testing.assert_array_equal(first, second)
  assert none is None
  table = trunk()[1]["embed"]["tokens"]["embedding"][:V]
  text = np.asarray(row.role == 1)
  want = np.asarray(jax.nn.softmax(logits["diffusion"], -1) @ table)
  on = np.abs(np.asarray(guess[:, :17])).sum(-1) > 0
  np.testing.assert_allclose(np.asarray(guess[:, :17])[on], want[on], atol=1e-5)
  assert not np.asarray(guess[:, 17:]).any()  # the context reads clean tokens only
  chosen = [on[:, 1:11], on[:, 12:]]  # per document: all of its canvas tokens or none
  for c in chosen:
    assert set(c.mean(1)) <= {0.0, 1.0}
  assert 0 < np.concatenate([c[:, 0] for c in chosen]).mean() < 1 and not on[~text].any()
  plain = loss(dataclasses.replace(obj, self_condition=0.0), row)[1]
  same = np.isclose(np.asarray(per_token["diffusion"]), np.asarray(plain), atol=1e-5)
  assert same[~on].all() and not same[on].all()
  np.testing.assert_allclose(
    np.asarray(per_token["ar"]), np.asarray(loss(ar(), row)[1]), atol=1e-5
  )  # and the AR term is the AR model's loss
