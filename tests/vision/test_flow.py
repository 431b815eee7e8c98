"""Captions and patches in one row: two terms with their own denominators, noise of the flow head, leaks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from genmodels import state as states
from genmodels import step as steps
from genmodels.contracts import token_row
from genmodels.objectives.flow import TextImageFlow
from tests.vision import systems

NAME = "multimodal/flow_digits"
WORDS, PATCHES = 6, 16


def row_of(count, seed=0):
  """Captions of 6 bytes, some of them given, before 16 patches; the last image of the batch is missing."""
  rng = np.random.default_rng(seed)
  N = WORDS + PATCHES
  tokens = rng.integers(97, 123, (count, N))
  tokens[:, WORDS:] = 0
  role = np.ones((count, N), np.int32)
  role[:, 0] = 0
  for b in range(count):
    role[b, : 1 + b % 4] = 0  # unequal numbers of words
  doc = np.zeros((count, N), np.int32)
  doc[count - 1, WORDS:] = -1  # and of patches
  row = token_row(tokens, doc, role=role)
  pixels = jnp.asarray(rng.integers(0, 17, (count, 1, 8, 8)), jnp.int32)
  modality = jnp.broadcast_to((jnp.arange(N) >= WORDS).astype(jnp.int32), (count, N))
  return row.replace(modality=modality, docs=row.docs.replace(side={"pixels": pixels}))


def system():
  return systems.build(NAME, "model.heads.image.depth=1", "model.heads.image.width=16")


@dataclasses.dataclass(frozen=True)
class DividesInside(TextImageFlow):
  """Wrong on purpose: means of each micro-batch, averaged."""

  def run(self, nets, row, key, step):
    sums, denominators, metrics = super().run(nets, row, key, step)
    return {k: s / jnp.maximum(denominators[k], 1) for k, s in sums.items()}, denominators, metrics

  def denominators(self, row, key, step, latent=None):
    return {k: jnp.ones(()) for k in self.terms}


def after_one_step(digits, objective, accumulate):
  """Parameters after one plain gradient step."""
  tx = optax.with_extra_args_support(optax.sgd(1.0))
  cfg = steps.StepConfig(accumulate=accumulate)
  fns = {"model": lambda trees, *args, **kw: digits.model.apply(trees["model"], *args, **kw)}
  step = steps.make_train_step(objective, fns, tx, cfg, digits.latent)
  state = states.create({"model": digits.params}, {"model": tx}, steps.initial_stats(cfg))
  state, metrics = jax.jit(step)(state, row_of(8), jax.random.key(1))
  assert not int(metrics["skipped"])
  return state.trees["model"], metrics


def difference(a, b):
  """Largest difference of two trees, relative to the largest change that the step made."""
  size = max(
    float(jnp.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(system().params))
  )
  return max(float(jnp.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))) / size


@pytest.mark.slow
def test_one_step_equals_four_micro_batches():
  digits = system()
  one, metrics = after_one_step(digits, digits.objective, 1)
  four, again = after_one_step(digits, digits.objective, 4)
  assert difference(one, four) < 1e-5
  for name in ("loss", "loss/text", "loss/image", "denominator/text", "denominator/image"):
    assert float(metrics[name]) == pytest.approx(float(again[name]), rel=1e-5)
  assert float(metrics["denominator/image"]) == 7 * PATCHES
  wrong = DividesInside(
    **{f.name: getattr(digits.objective, f.name) for f in dataclasses.fields(TextImageFlow)}
  )
  assert difference(one, after_one_step(digits, wrong, 4)[0]) > 1e-2


@jax.jit
def prepare(row, step):
  digits = system()
  return digits.objective.prepare(row, jax.random.key(0), step, digits.latent)


@jax.jit
def forward(params, inputs, targets):
  return system().model.apply(params, inputs, targets)


def test_leak_by_perturbation():
  """Slot n knows tokens up to n only: bytes, and patches by their pixels."""
  digits = system()
  row = row_of(2)
  row = jax.tree.map(lambda x: jnp.repeat(x[:1], 1 + WORDS + PATCHES, 0), row)
  tokens, pixels = np.array(row.tokens), np.array(row.docs.side["pixels"])
  for n in range(WORDS):
    tokens[1 + n, n] += 1
  for j in range(PATCHES):
    r, c = 2 * (j // 4), 2 * (j % 4)
    pixels[1 + WORDS + j, 0, r : r + 2, c : c + 2] = 16 - pixels[1 + WORDS + j, 0, r : r + 2, c : c + 2]
  row = row.replace(tokens=jnp.asarray(tokens), docs=row.docs.replace(side={"pixels": jnp.asarray(pixels)}))
  out = np.asarray(forward(digits.params, prepare(row, 0)[0], {}).layers["hidden"])
  moved = np.abs(out[1:] - out[:1]).max(-1) > 0
  n = np.arange(WORDS + PATCHES)
  assert not moved[n[:, None] > n].any()
  assert moved[n[:, None] <= n].all()


def test_targets_are_the_next_patches():
  """The slot before a patch predicts it, the last word's slot the first one; words have words as targets."""
  digits = system()
  row = row_of(4)
  inputs, targets, denominators = prepare(row, 0)
  image, text = targets["image"], targets["text"]
  np.testing.assert_array_equal(
    np.asarray(image.slot)[0], [-1] * WORDS + list(range(WORDS - 1, WORDS + PATCHES - 1))
  )
  np.testing.assert_array_equal(np.asarray(text.slot)[0], [-1, *range(WORDS - 1)] + [-1] * PATCHES)
  patches = np.asarray(digits.latent.encode(row.docs.side["pixels"][:, 0]))
  np.testing.assert_array_equal(np.asarray(image.value)[:3, WORDS:], patches[:3])
  np.testing.assert_array_equal(np.asarray(inputs.features)[:3, WORDS:], patches[:3])
  assert not np.asarray(inputs.features)[:, :WORDS].any() and (np.asarray(inputs.ids)[:3, WORDS:] == -1).all()
  assert (float(denominators["text"]), float(denominators["image"])) == (5 + 4 + 3 + 2, 3 * PATCHES)


def test_noise_lies_on_the_path():
  """z = (1 − t)·x + t·ε with ε standard normal and t logit-normal, keyed by the document, not its row."""
  row = row_of(64)
  make = lambda row, step: prepare(row, step)[1]["image"]
  image = make(row, 3)
  z, t = np.asarray(image.given["z"])[:-1, WORDS:], np.asarray(image.given["t"])[:-1, WORDS:]
  x = np.asarray(image.value)[:-1, WORDS:]
  assert t.shape == (63, PATCHES, 4)
  eps = (z - (1 - t[..., None]) * x[:, :, None]) / t[..., None]
  n = eps.size
  assert abs(eps.mean()) < 4 / np.sqrt(n) and abs(eps.var() - 1) < 4 * np.sqrt(2 / n)
  logit = np.log(t / (1 - t))
  assert abs(logit.mean()) < 4 / np.sqrt(t.size) and abs(logit.var() - 1) < 4 * np.sqrt(2 / t.size)
  assert abs(np.corrcoef(eps[..., 0].ravel(), eps[..., 1].ravel())[0, 1]) < 4 / np.sqrt(t.size)
  turned = make(jax.tree.map(lambda x: x[::-1], row), 3)
  np.testing.assert_array_equal(np.asarray(turned.given["z"])[::-1], np.asarray(image.given["z"]))
  assert (np.asarray(make(row, 4).given["t"]) != np.asarray(image.given["t"])).all()


def test_caption_likelihood_ignores_the_image_term():
  """`bound` is the exact likelihood of the words: their cross-entropies, their number, no noise."""
  digits = system()
  row = row_of(4)
  run = jax.jit(functools.partial(digits.objective.bound, digits.nets), static_argnums=(3,))
  nll, count = run(row, jax.random.key(0), 0, 1)
  np.testing.assert_array_equal(np.asarray(count)[:, 0], [5, 4, 3, 2])
  inputs, targets, _ = prepare(row, 5)
  outputs = forward(digits.params, inputs, targets)
  sums, metrics = jax.jit(digits.objective.loss)(outputs, targets)
  np.testing.assert_allclose(
    np.asarray(nll)[:, 0], np.asarray(metrics["per_token"]["text"].sum(1)), rtol=1e-5
  )
  assert float(sums["image"]) > 0


def test_oracle_velocity_recovers_the_patch():
  """Euler steps along ε − x, from t = 1 to 0, end at x: the head's convention is the objective's."""
  digits = system()
  inputs, targets, _ = prepare(row_of(4), 0)
  dist = forward(digits.params, inputs, targets).dists["image"]
  x = targets["image"].value

  class Oracle(type(dist)):
    def velocity(self, z, t):
      clean = x if z.ndim == 3 else x[:, :, None]
      return (z - clean) / jnp.maximum(jnp.broadcast_to(t, z.shape[:-1]), 1e-4)[..., None]

  fields = {f.name: getattr(dist, f.name) for f in dataclasses.fields(dist)}
  valid = np.asarray(dist.valid)
  got = np.asarray(jax.jit(lambda key: Oracle(**fields).sample(key, steps=4))(jax.random.key(1)))
  np.testing.assert_allclose(got[valid], np.asarray(x)[valid], atol=1e-5)
  assert (
    float(jnp.abs(Oracle(**fields).nll(x)).max())
    < 1e-6
    < float(jax.jit(type(dist).nll)(dist, x)[valid].mean())
  )
