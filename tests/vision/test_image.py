"""Next-token and next-scale image modelling: what each slot knows, decoding = training, exact likelihoods.

Teacher-forced logits are the cached ones, no slot knows its answer, probabilities sum to one, dropped
classes, packing, and positions that only count relative to each other.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels.config import ConfigError
from genmodels.contracts import token_row
from genmodels.corruption import Blocks
from genmodels.models import write_cache
from genmodels.objectives import laws
from tests.vision import systems

SMALL = {
  "vision/raster_digits": ("latent.side=4", "model.rope.axes=(8, 8)"),
  "vision/next_scale_digits": (
    "latent.side=4",
    "latent.sizes=(1, 2, 4)",
    "objective.corruption.blocks.sizes=(1, 4, 16)",
  ),
}
RASTER, SCALES = SMALL


def small(name, *overrides):
  return systems.build(name, *SMALL[name], *overrides)


def small_row(digits, count=2, seed=0):
  row = digits.row(count, seed)
  side = row.docs.side | {"pixels": row.docs.side["pixels"][:, :, :4, :4]}
  return row.replace(docs=row.docs.replace(side=side))


@functools.partial(jax.jit, static_argnums=0)
def logits_of(digits, params, row, drop):
  """float32[B, N, V] logits of the one training pass, conditions dropped where `drop` bool[B, D] says so."""
  row = digits.objective.encoded(row, digits.latent)
  noise = digits.objective.corruption.draw(row, jax.random.key(0), 0, bound=(0, 1)).replace(drop=drop)
  inputs, read = digits.objective.view(row, noise, latent=digits.latent)
  target, _ = digits.objective.target(row, noise, read["text"], digits.objective.terms["text"])
  return systems.logits(digits.model.apply(params, inputs, {"text": target}).dists["text"]), row


def one_pass(digits, row, drop=None):
  """Logits of the training pass, and the row with its codes."""
  drop = np.zeros(row.docs.occurrence.shape, bool) if drop is None else drop
  logits, row = logits_of(digits, digits.params, row, jnp.asarray(drop))
  return np.asarray(logits), row


def decode(digits, row, groups):
  """Logits of the same codes, computed group by group with a cache; later codes are garbage meanwhile.

  Args:
    groups: [(tokens whose slots are computed, tokens read)]; the shorter ones are filled with empty slots.
  """
  obj, model, (B, N) = digits.objective, digits.model, row.tokens.shape
  cache, out = model.init_cache(B, N), {}
  A = max(len(slots) for slots, _ in groups)

  @jax.jit
  def call(params, row, committed, only, cache):
    noise = obj.corruption.state(row, committed)
    inputs, read = obj.view(row, noise, only, digits.latent)
    target, _ = obj.target(row, noise, read["text"], obj.terms["text"])
    outputs = model.apply(params, inputs, {"text": target}, cache=cache)
    return systems.logits(outputs.dists["text"]), write_cache(cache, outputs.new, only[..., 1] >= 0)

  for slots, read in groups:
    known = np.arange(N) < min(read)
    partial = row.replace(tokens=np.where(known, row.tokens, 11))
    only = np.full((B, A, 2), -1, np.int32)
    only[:, : len(slots)] = np.stack([np.zeros(len(slots), np.int32), slots], -1)
    logits, cache = call(digits.params, partial, np.broadcast_to(known, (B, N)), only, cache)
    for n in read:
      out[n] = np.asarray(logits)[:, n]
  return np.stack([out[n] for n in sorted(out)], 1)


def test_cached_decode_equals_one_pass():
  digits = small(RASTER)
  want, row = one_pass(digits, small_row(digits))
  N = row.tokens.shape[1]
  got = decode(digits, row, [([n - 1], [n]) for n in range(1, N)])
  assert got.std() > 0.2
  np.testing.assert_allclose(got, want[:, 1:], atol=1e-5)


def test_next_scale_cached_decode_equals_one_pass():
  digits = small(SCALES)
  want, row = one_pass(digits, small_row(digits))
  edges = np.cumsum((0, *digits.latent.blocks))
  groups = [(list(range(a, b)), list(range(a, b))) for a, b in itertools.pairwise(edges)]
  got = decode(digits, row, groups)
  assert got.std() > 0.2
  np.testing.assert_allclose(got, want, atol=1e-5)


def leaks(digits):
  """bool[N, N]: whether changing code i moves the logits of code j."""
  p = digits.objective.prefix
  row = one_pass(digits, small_row(digits))[1]
  row = jax.tree.map(lambda x: x[:1], row)
  N = row.tokens.shape[1]
  tokens = np.tile(np.asarray(row.tokens), (N - p + 1, 1))
  for i in range(N - p):
    tokens[i + 1, p + i] = (tokens[i + 1, p + i] + 3) % digits.latent.vocab
  many = jax.tree.map(lambda x: jnp.repeat(x, len(tokens), 0), row)
  side = {"label": many.docs.side["label"]}  # no images: the tokens are the codes
  many = many.replace(tokens=jnp.asarray(tokens), docs=many.docs.replace(side=side))
  out = one_pass(digits, many)[0][:, p:]
  return np.abs(out[1:] - out[:1]).max(-1) > 0


def test_leak_by_perturbation():
  moved = leaks(small(RASTER))
  order = np.arange(len(moved))
  assert not moved[order[:, None] >= order].any()
  assert moved[order[:, None] < order].all()


def test_next_scale_leak_by_perturbation():
  digits = small(SCALES)
  moved, scale = leaks(digits), digits.latent.scale_of
  assert not moved[scale[:, None] >= scale].any()
  assert moved[scale[:, None] < scale].all()


def test_leak_law_knows_what_slots_show():
  """Sound as configured; a full mask, or unshifted next tokens, would let the model see its answer."""
  assert laws.check(small(RASTER).objective) == []
  scales = small(SCALES).objective
  assert laws.check(scales) == []
  with pytest.raises(ConfigError, match="clean identity"):
    laws.check(dataclasses.replace(scales, masks={"full": "full"}))
  with pytest.raises(ConfigError, match="clean identity"):
    laws.check(dataclasses.replace(small(RASTER).objective, terms={"text": {"align": "same"}}))


@pytest.mark.parametrize("name", [RASTER, SCALES])
def test_probabilities_sum_to_one(name):
  """All images of 2 × 2 binary pixels (all code strings): Σ exp(−bound) = 1 for a given class."""
  sizes = ("latent.sizes=(1, 2)", "objective.corruption.blocks.sizes=(1, 4)") if name == SCALES else ()
  head = "model.heads.text.size=3" if name == SCALES else "model.vocab=2"
  axes = () if name == SCALES else ("model.rope.axes=(8, 8)",)
  digits = systems.build(name, "latent.side=2", "latent.levels=2", head, *sizes, *axes)
  V, n, p = digits.latent.vocab, digits.latent.length, digits.objective.prefix
  strings = np.array(list(itertools.product(range(V), repeat=n)))
  row = digits.objective.blank(np.full(len(strings), 4), digits.latent)
  row = row.replace(tokens=row.tokens.at[:, p:].set(strings))
  nll, count = jax.jit(lambda row: digits.objective.bound(digits.nets, row, jax.random.key(0), 0, 1))(row)
  assert float(np.exp(-np.asarray(nll, np.float64)).sum()) == pytest.approx(1, abs=1e-5)
  assert (np.asarray(count) == n).all()
  assert np.asarray(nll).std() > 0.1


@pytest.mark.parametrize("name", [RASTER, SCALES])
def test_dropped_condition_is_the_null_class(name):
  digits = small(name)
  obj, row = digits.objective, small_row(digits)
  assert (
    obj.corruption.dropped(row, jax.random.key(0), 0, bound=(0, 1)) is None
  )  # likelihoods are conditional
  cond, _ = one_pass(digits, row)
  null, _ = one_pass(digits, row, [[True], [False]])
  side = row.docs.side | {"label": jnp.full((2, 1), obj.classes)}
  want, _ = one_pass(digits, row.replace(docs=row.docs.replace(side=side)))
  np.testing.assert_array_equal(null[0], want[0])
  np.testing.assert_array_equal(null[1], cond[1])
  assert np.abs(null[0, 1:] - cond[0, 1:]).max() > 1e-3


def test_drop_rate():
  """The share of dropped classes is the config's, drawn per image and step, whatever the batch order."""
  objective = small(RASTER).objective
  row = token_row(np.zeros((4000, 4)))
  draw = lambda row, step: np.asarray(objective.corruption.draw(row, jax.random.key(3), step).drop)[:, 0]
  one = draw(row, 5)
  assert abs(one.mean() - 0.1) < 3.5 * np.sqrt(0.09 / 4000)
  flipped = jax.tree.map(lambda x: x[::-1], row)
  np.testing.assert_array_equal(draw(flipped, 5), one[::-1])
  assert (draw(row, 6) != one).any()


@pytest.mark.parametrize("name", [RASTER, SCALES])
def test_packed_rows_equal_separate_rows(name):
  digits = small(name)
  apart = small_row(digits, 2)
  want, apart = one_pass(digits, apart)
  N = apart.tokens.shape[1]
  flat = lambda x: x.reshape(1, -1, *x.shape[2:])
  docs = jax.tree.map(flat, apart.docs)
  packed = jax.tree.map(flat, apart.replace(docs=docs)).replace(docs=docs)
  packed = packed.replace(doc=jnp.repeat(jnp.arange(2, dtype=jnp.int32), N)[None])
  got, again = one_pass(digits, packed)
  np.testing.assert_array_equal(np.asarray(again.tokens), np.asarray(flat(apart.tokens)))
  np.testing.assert_allclose(got.reshape(want.shape), want, atol=1e-5)
  images = np.asarray(digits.objective.images(again, digits.latent))[0]
  np.testing.assert_array_equal(images, np.asarray(apart.docs.side["pixels"])[:, 0])


def test_rope_is_relative_in_two_axes():
  """Moving the whole grid moves no logit; moving one row of it does. The class slot has no position."""
  digits = small(RASTER)

  @jax.jit
  def view(row):
    return digits.objective.prepare(row, jax.random.key(0), 0, digits.latent, bound=(0, 1))[0]

  inputs = view(small_row(digits))
  run = jax.jit(lambda pos: digits.nets["model"](inputs.replace(pos=pos), {}).layers["hidden"])
  pos = np.array(inputs.pos)
  np.testing.assert_array_equal(pos[0, :6], [[-1, -1], [0, 0], [0, 1], [0, 2], [0, 3], [1, 0]])
  base = np.asarray(run(pos))
  moved, broken = pos.copy(), pos.copy()
  moved[:, 1:] += [3, 5]
  broken[:, 1:9] += [0, 2]
  np.testing.assert_allclose(np.asarray(run(moved)), base, atol=2e-5)
  assert np.abs(np.asarray(run(broken)) - base).max() > 1e-2


def test_wrong_scales_are_refused():
  digits, row = small(SCALES), small_row(small(SCALES), 1)
  corruption = dataclasses.replace(digits.objective.corruption, blocks=Blocks(sizes=(1, 4, 15)))
  wrong = dataclasses.replace(digits.objective, corruption=corruption)
  with pytest.raises(ValueError, match="blocks.sizes"):
    wrong.prepare(row, jax.random.key(0), 0, digits.latent)
  with pytest.raises(ValueError, match="latent="):
    digits.objective.prepare(row, jax.random.key(0), 0)
