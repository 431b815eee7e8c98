"""DEL: what the exits are worth, which one is taken, and that none of it changes a token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import models, sampling
from genmodels.config import ConfigError
from genmodels.contracts import Target
from genmodels.sampling import early_exit, speculate
from tests.sampling import systems as S
from tests.sampling import test_speculate as T

KEY = jax.random.key(3)


def tokens_per_layer(alpha, exit, d, layers):
  """The paper's closed form; α = 1 is its limit."""
  tokens = d + 1 if alpha == 1 else (1 - alpha ** (d + 1)) / (1 - alpha)
  return tokens / (d * exit + layers)


def test_the_best_exit_and_length():
  """Against the table of all pairs, one row and several; nothing is drafted where nothing is worth it."""
  exits, layers, size = (2, 5, 8), 32, 4
  rng = np.random.default_rng(0)
  chosen = set()
  for alpha in [*rng.uniform(size=(20, 3)), [0.9, 0.91, 0.92], [0.01, 0.05, 0.2], [0, 0, 0], [0.2, 1.0, 1.0]]:
    table = [[tokens_per_layer(a, e, d, layers) for d in range(size + 1)] for a, e in zip(alpha, exits)]
    e, d = map(
      int, early_exit.best(jnp.asarray([alpha], jnp.float32), exits, layers, size, jnp.array([True]))
    )
    assert table[e][d] == pytest.approx(np.max(table), rel=1e-5)
    chosen.add((e, d))
  assert len(chosen) > 5 and (0, 0) in chosen
  two = jnp.asarray([[0.95, 0.95, 0.95], [0.0, 0.0, 1.0]])
  at = lambda *on: tuple(map(int, early_exit.best(two, exits, layers, size, jnp.array(on))))
  assert at(True, False)[0] == 0 and at(False, True)[0] == 2  # rows that are over do not count
  sums = sum(
    np.array([[tokens_per_layer(a, e, d, layers) for d in range(5)] for a, e in zip(r, exits)])
    for r in [[0.95] * 3, [0, 0, 1]]
  )
  assert at(True, True) == np.unravel_index(sums.argmax(), sums.shape)


@functools.cache
def target(layers=3):
  model = S.model(layers)
  sampler = sampling.build({"eos": -2, "temperature": 0.0}, S.ar(), model)
  return sampler, jax.tree.map(np.asarray, sampler(S.params(layers), S.row(), KEY))


@pytest.mark.full
def test_a_call_of_some_layers_is_the_model_cut_there():
  """depth l = a model of the first l layers, as data; all of them = the whole model, to the bit."""
  model, params = S.model(3), S.params(3)
  row = S.row()
  inputs, read = S.ar().view(row, S.ar().corruption.state(row, row.doc >= 0))
  asked = {"t": Target("text", read["text"], row.tokens, (read["text"] >= 0).astype(jnp.float32))}
  run = jax.jit(lambda p, depth: model.apply(p, inputs, asked, depth=depth).dists["t"].map(lambda z: z))
  whole = model.apply(params, inputs, asked)
  np.testing.assert_allclose(run(params, jnp.int32(3)), whole.dists["t"].map(lambda z: z), atol=2e-5)
  cut = models.build(
    dataclasses.replace(model.cfg, segments=(), layers=1, pattern=model.cfg.segments[0].pattern)
  )
  first = {**params, "stack": jax.tree.map(lambda x: x[:1], params["stack"])}
  want = cut.apply(first, inputs, asked).dists["t"].map(lambda z: z)
  np.testing.assert_allclose(run(params, jnp.int32(1)), want, atol=2e-5)
  assert np.abs(run(params, jnp.int32(2)) - want).max() > 0.1  # control


@pytest.mark.slow
def test_no_exit_changes_an_id():
  """T19; and with all layers as the only exit every draft is right, and is known to be."""
  sampler, want = target()
  made = speculate.build(sampler, early_exit.EarlyExit(3, exits=(1, 2, 3)))
  assert made.model.cfg.taps == (0, 1, 2) and made.drafter.watch == (0, 1, 2)
  result = jax.tree.map(np.asarray, made(S.params(3), S.row(), KEY))
  T.assert_same(result, want)
  seen = result.memory
  # The last exit is the model: its shadow tokens are the committed ones.
  made_of = (result.committed_at >= 0).sum(1)
  held = 1 - 0.5 * 0.95 ** result.calls["verify"] / tried(result)
  np.testing.assert_allclose(seen["acceptance"][:, 2], held, rtol=1e-4)
  assert (seen["acceptance"][:, 0] < 1).any() and (made_of > 0).all()
  assert seen["exits"].sum() == result.steps and seen["draft_layers"] >= seen["draft_forwards"]


def tried(result):
  """Faded number of committed tokens of each row, and the prior's one, from the steps of the commits."""
  out = []
  for steps in result.committed_at:
    made = [int((steps == i).sum()) for i in range(steps.max() + 1)]
    n = 1.0
    for m in made:
      n = n * 0.95 + m
    out.append(n)
  return np.array(out)


@pytest.mark.full
def test_the_shadow_of_an_exit_is_what_it_would_draft():
  """With the whole model as the one exit every draft is accepted; with the first layer, as many as its α says."""
  sampler, want = target()
  made = speculate.build(sampler, early_exit.EarlyExit(3, exits=(3,), prior=1.0))
  result = made(S.params(3), S.row(), KEY)
  T.assert_same(result, want)
  np.testing.assert_array_equal(result.memory["accepted"], result.memory["drafted"])


@pytest.mark.full
def test_sampled_exits_keep_the_law():
  """T20: exit and length follow from earlier tokens alone, so rejection stays exact."""
  model, params, _ = T.toy()
  made = sampling.build({"eos": -2, "forbid": (T.V,)}, S.ar(), model)
  drafter = early_exit.EarlyExit(2, exits=(1,), sample=True, prior=0.9)
  p, _ = T.judged(speculate.build(made, drafter), params, 1 << 13)
  assert p > 1e-3


def test_what_does_not_fit_is_refused():
  sampler = sampling.build({"eos": -2}, S.ar(), S.model())
  assert early_exit.EarlyExit().bind(sampler).exits == (1,)
  with pytest.raises(ConfigError, match="ascending numbers"):
    early_exit.EarlyExit(exits=(2, 1)).bind(sampler)
  with pytest.raises(ConfigError, match="target's cache"):
    early_exit.EarlyExit().bind(sampling.build({"eos": -2, "cache": "none"}, S.ar(), S.model()))
  with pytest.raises(ValueError, match="fade is 0"):
    early_exit.EarlyExit(fade=0)
