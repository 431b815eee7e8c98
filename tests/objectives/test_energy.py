"""An energy beside a masked denoiser, by noise contrastive estimation (EDLM)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import models
from genmodels.config import ConfigError
from genmodels.objectives import laws
from genmodels.objectives.energy import EnergyNCE, nce
from tests.objectives.test_text import KEY, MASK, diffusion, nets, rows, trunk


@pytest.fixture(scope="module")
def parameters():
  trunk()
  energy()


def objective():
  plain = diffusion()
  terms = plain.terms | {"energy": {"stream": "n", "on": "hit"}}
  kept = {f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)}
  return EnergyNCE(**kept | {"terms": terms, "likelihood": "diffusion"})


@functools.cache
def energy():
  """(network, fresh parameters, parameters whose output says something)."""
  net = models.NETS["energy"]().network(trunk()[0])
  fresh = jax.jit(net.init)(jax.random.key(5))
  head = {"energy": {"kernel": jnp.sin(jnp.arange(32.0))[:, None], "bias": jnp.zeros(1)}}
  return net, fresh, {**fresh, "heads": head}


def both(params=None, player="energy"):
  net, _, loud = energy()
  fn = lambda *a, **kw: net.apply(params or loud, *a, **kw)
  return dataclasses.replace(nets(), fns={**nets().fns, "energy": fn}, player=player)


@functools.cache
def run():
  """One program: the energy's turn at parameters of both trees, and its gradients."""
  obj, (net, _, _) = objective(), energy()

  @jax.jit
  def go(denoiser, params, row):
    def loss(denoiser, params):
      fns = {
        "model": lambda *a, **kw: trunk()[0].apply(denoiser, *a, **kw),
        "energy": lambda *a, **kw: net.apply(params, *a, **kw),
      }
      sums, dens, aux = obj.run(dataclasses.replace(nets(), fns=fns, player="energy"), row, KEY, 3)
      return sums["energy"] / dens["energy"], (dens, aux["ratios"])

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(denoiser, params)

  return go


@pytest.mark.slow
@pytest.mark.strict
def test_the_denoiser_is_mdlm_bit_by_bit(parameters):
  row, plain, obj = rows((13, 6), B=2), diffusion(), objective()
  want = jax.jit(lambda: plain.run(nets(), row, KEY, 3))()
  got = jax.jit(lambda: obj.run(both(player="model"), row, KEY, 3))()
  np.testing.assert_array_equal(got[2]["per_token"]["diffusion"], want[2]["per_token"]["diffusion"])
  assert float(got[1]["diffusion"]) == float(want[1]["diffusion"]) and "energy" not in got[0]
  denominators = jax.jit(lambda: obj.denominators(row, KEY, 3))()
  assert float(denominators["energy"]) == 4 and laws.check(obj) == []


@pytest.mark.slow
def test_a_fresh_energy_prefers_nothing(parameters):
  row, (_, fresh, loud) = rows((13, 6), B=2), energy()
  (loss, (_, ratios)), (to_denoiser, to_energy) = run()(trunk()[1], fresh, row)
  assert float(loss) == pytest.approx(2 * np.log(2), abs=1e-6) and float(ratios["real"][0]) == 0
  size = lambda g: max(float(jnp.abs(x).max()) for x in jax.tree.leaves(g))
  assert size(to_denoiser) == 0 and size(to_energy["heads"]) > 1e-3
  # Control: an energy that says something.
  (loss, (_, ratios)), (_, to_energy) = run()(trunk()[1], loud, row)
  assert abs(float(loss) - 2 * np.log(2)) > 1e-3 and abs(float(ratios["real"][0])) > 1e-3
  assert size(to_energy["embed"]["shown"]) > 1e-5 and size(to_energy["embed"]["tokens"]) > 1e-5


@pytest.mark.slow
def test_an_energy_is_of_its_document(parameters):
  """What is packed beside a document, and padding, change nothing of its energy; the candidate does."""
  obj, (net, _, loud) = objective(), energy()

  @jax.jit
  def of(row, candidate):
    noise = obj.corruption.draw(row, KEY, 3)
    return net.apply(loud, obj.view(row, noise)[0], candidate, row.docs.occurrence.shape[1])[0]

  row = rows((9, 6), B=1, N=19)
  want = of(row, row.tokens)
  other = row.tokens.at[:, 9:].set((row.tokens[:, 9:] + 1) % MASK)
  got = of(row, other)
  assert float(got[0, 0]) == pytest.approx(float(want[0, 0]), abs=1e-6)
  assert abs(float(got[0, 1] - want[0, 1])) > 1e-3


@pytest.mark.slow
def test_negatives_differ_where_tokens_are_masked(parameters):
  obj, row = objective(), rows((13, 6), B=2)

  @jax.jit
  def draw():
    noise = obj.corruption.draw(row, KEY, 3)
    inputs, targets, _ = obj.asked(row, noise)
    dist = nets()["model"](inputs, targets).dists["diffusion"]
    return obj.negative(dist, targets["diffusion"].weight > 0, row, KEY, 3), noise.hit[:, 0]

  negative, hit = draw()
  np.testing.assert_array_equal(np.where(hit, row.tokens, negative), row.tokens)
  changed = np.asarray(negative != row.tokens)
  assert changed[np.asarray(hit)].mean() > 0.5 and not np.isin(negative, MASK).any()


def test_the_minimum_is_the_log_ratio():
  """E = log μ − log p makes the expected loss stationary; from any other energy gradient descent goes there."""
  rng = np.random.default_rng(0)
  p, q = (jnp.asarray(rng.dirichlet(np.full(6, 5.0)), jnp.float32) for _ in range(2))
  loss = lambda e: jnp.sum(p * nce(e, jnp.full(6, jnp.inf)) + q * nce(jnp.full(6, -jnp.inf), e))
  slope = jax.jit(jax.grad(loss))
  best = jnp.log(q) - jnp.log(p)
  np.testing.assert_allclose(slope(best), 0, atol=1e-6)
  assert float(jnp.abs(slope(best + 0.1)).max()) > 1e-3  # no constant is free
  e = jnp.zeros(6)
  e = jax.jit(lambda e: jax.lax.fori_loop(0, 4000, lambda _, e: e - 5 * jax.grad(loss)(e), e))(e)
  np.testing.assert_allclose(e, best, atol=0.02)


def test_refusals():
  with pytest.raises(ValueError, match="energy's own loss"):
    dataclasses.replace(objective(), terms={"diffusion": {"stream": "n", "on": "hit"}})
  with pytest.raises(ValueError, match="one noisy copy"):
    dataclasses.replace(objective(), layout={"kind": "streams", "streams": ("n", "c")}, masks={"full": "bd3"})
  model = models.build({"width": 8, "layers": 1, "num_heads": 1, "mlp": 8, "features": 3, "heads": {}})
  with pytest.raises(ConfigError, match="token ids"):
    models.NETS["energy"]().network(model)
