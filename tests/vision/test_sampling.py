"""Images through the one sampling loop: steps, caches, guidance, the same tokens on any mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import sampling
from genmodels.parallel import mesh as meshes
from genmodels.parallel import rules
from tests.vision.test_image import RASTER, SCALES, one_pass, small

LABELS = np.arange(4)
BOTH = [pytest.param(RASTER, marks=pytest.mark.slow), SCALES]


@functools.cache
def plain_sampler(name):
  return sampler(name)


def sampler(name, **section):
  digits = small(name)
  return digits, sampling.build({"eos": -2, **section}, digits.objective, digits.model, latent=digits.latent)


def draw(digits, made, seed=0, labels=LABELS):
  return made(digits.params, digits.objective.blank(labels, digits.latent), jax.random.key(seed))


def test_next_scale_takes_one_step_a_scale():
  """One forward a scale through the cache; greedy codes are those of the one pass over what was drawn."""
  digits, made = sampler(SCALES, temperature=0.0)
  assert made.policy.name == "block_exact" and made.policy.exact
  result = draw(digits, made)
  assert bool(result.done.all()) and int(result.forwards) == int(result.steps) == 3
  np.testing.assert_array_equal(np.asarray(result.committed_at), np.tile(digits.latent.scale_of, (4, 1)))
  row = digits.objective.blank(LABELS, digits.latent).replace(tokens=result.tokens)
  logits, _ = one_pass(digits, row)
  np.testing.assert_array_equal(np.asarray(result.tokens), logits.argmax(-1))
  assert len(np.unique(np.asarray(result.tokens))) > 5
  images = np.asarray(digits.objective.images(row, digits.latent))
  assert images.shape == (4, 1, 4, 4) and images.dtype == np.uint8 and images.max() <= 16


def test_raster_takes_one_step_a_pixel():
  digits, made = sampler(RASTER, temperature=0.0)
  assert made.policy.name == "causal_exact"
  result = draw(digits, made)
  assert bool(result.done.all()) and int(result.steps) == 16
  row = digits.objective.blank(LABELS, digits.latent).replace(tokens=result.tokens)
  logits, _ = one_pass(digits, row)
  np.testing.assert_array_equal(np.asarray(result.tokens)[:, 1:], logits[:, 1:].argmax(-1))


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.slow
def test_guidance_ends_at_its_branches(name):
  """s = 1 is one branch, the conditional one; s = 0 draws the null class's tokens from two."""
  digits, plain = plain_sampler(name)
  cond = draw(digits, plain)
  null = draw(digits, plain, labels=np.full(4, digits.objective.classes))
  _, zero = sampler(name, guidance={"scale": 0.0})
  assert (plain.branches, zero.branches) == (1, 2) and plain.cfg.guidance.scale == 1
  np.testing.assert_array_equal(np.asarray(draw(digits, zero).tokens), np.asarray(null.tokens))
  assert (np.asarray(null.tokens) != np.asarray(cond.tokens)).any()


def test_var_schedule():
  """s = 1 + τ with τ = cfg·k/(K − 1): 1 at the first scale, 1 + cfg at the last."""
  guidance = sampling.Guidance(scale=2.5, schedule="linear", over="units")
  r = jnp.arange(10) / 9
  np.testing.assert_allclose(np.asarray(guidance(r)), 1 + 1.5 * np.arange(10) / 9, rtol=1e-6)
  digits, made = sampler(SCALES, guidance=dataclasses.asdict(guidance))
  row = digits.objective.blank(LABELS, digits.latent)
  s, seen = made.start(digits.params, row, 0), []
  step = jax.jit(
    lambda s: (made.progress(s, made.ask(row, s)), made.step(digits.params, row, s, jax.random.key(0)))
  )
  for _ in digits.latent.sizes:
    r, s = step(s)
    seen.append(np.asarray(r))
  np.testing.assert_allclose(np.stack(seen), np.repeat([[0.0], [0.5], [1.0]], 4, 1))


@pytest.mark.parametrize("name", BOTH)
def test_same_key_same_tokens_on_any_mesh(name):
  """Draws are keyed by the image, not by its place: four devices and another batch order change nothing."""
  digits, made = plain_sampler(name)
  want = np.asarray(draw(digits, made).tokens)
  row = digits.objective.blank(LABELS, digits.latent)
  turned = jax.tree.map(lambda x: x[::-1], row)
  np.testing.assert_array_equal(np.asarray(made(digits.params, turned, jax.random.key(0)).tokens)[::-1], want)
  assert (np.asarray(draw(digits, made, seed=1).tokens) != want).any()
  mesh = meshes.make_mesh(meshes.MeshConfig(data=4), jax.devices()[:4])
  again = dataclasses.replace(made)  # compiled anew
  with rules.use_mesh(mesh):
    spread = jax.device_put(row, rules.row_sharding(mesh))
    params = jax.device_put(digits.params, rules.replicated(mesh))
    got = again(params, spread, jax.random.key(0))
  np.testing.assert_array_equal(np.asarray(got.tokens), want)
