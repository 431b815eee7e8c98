"""Position-dependent masking: its marginals are right, and weighting by them is unbiased (Efficient-DLM)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels.contracts import CONTEXT, TEXT, token_row
from genmodels.corruption import Absorb, Blocks, PositionAbsorb
from genmodels.corruption.biased import inclusion, marginals

KEY = jax.random.key(0)


def _row(B, N, context=0):
  role = np.full((B, N), TEXT)
  role[:, :context] = CONTEXT
  return token_row(np.zeros((B, N)), role=role)


def _by_enumeration(n, k, slope):
  """P(i among the first k) by summing over all ordered draws without replacement."""
  w = np.exp(slope * np.arange(n))
  out = np.zeros(n)
  for order in itertools.permutations(range(n), k):
    p, left = 1.0, w.sum()
    for i in order:
      p, left = p * w[i] / left, left - w[i]
    out[list(order)] += p
  return out


@pytest.mark.parametrize("n, k, slope", [(2, 1, 1.0), (5, 2, 0.7), (6, 5, 0.4), (7, 4, 0.05), (4, 1, 3.0)])
def test_inclusion_is_the_sum_over_all_draws(n, k, slope):
  np.testing.assert_allclose(inclusion(n, k, slope), _by_enumeration(n, k, slope), atol=1e-9)


def test_marginals_have_the_right_sum_and_limits():
  table = marginals(16, 2.0)
  for n in range(1, 17):
    np.testing.assert_allclose(table[n, : n + 1, :n].sum(-1), np.arange(n + 1), rtol=1e-6)
    assert np.all(np.diff(table[n, 1 : n + 1, :n], axis=-1) >= 0)  # later tokens at least as likely
  assert table[16, 4, 15] > 1.5 * table[16, 4, 0]  # and clearly so at low noise
  flat = marginals(4, 0.0)
  np.testing.assert_allclose(flat[4, 3], 0.75, rtol=1e-6)


def test_marginal_is_the_frequency():
  """Blocks of 8 with a ragged last one and two context tokens: hits against the stated marginal."""
  B, N = 4096, 22
  row = _row(B, N, context=2)
  noise = jax.jit(PositionAbsorb(blocks=Blocks(8), bias=2.0, time="uniform").draw)(row, KEY, 0)
  hit, p = np.asarray(noise.hit[:, 0]), np.asarray(noise.marginal[:, 0])
  assert not hit[:, :2].any()
  # Sum of (hit − p) over documents: mean zero, variance at most Σ p(1−p).
  z = (hit - p)[:, 2:].sum(0) / np.sqrt((p * (1 - p))[:, 2:].sum(0))
  assert np.abs(z).max() < 4
  assert hit[:, 15].mean() > hit[:, 8].mean() + 0.05
  # Control: k/n, as if all tokens of a block were alike, is refuted by the same draws.
  k = np.asarray(hit[:, 8:16].sum(1, keepdims=True) / 8 * np.ones(8))
  assert np.abs((hit[:, 8:16] - k).sum(0) / np.sqrt((k * (1 - k)).sum(0) + 1e-9)).max() > 6


def test_weighting_by_the_marginal_is_unbiased():
  """E[hit/p · f] = f for every token: the expected loss of context-free predictions is that of all tokens."""
  row = _row(8192, 8)
  noise = jax.jit(PositionAbsorb(blocks=Blocks(8), bias=2.0, time="uniform").draw)(row, KEY, 1)
  w = np.asarray(noise.hit[:, 0] / noise.marginal[:, 0])
  mean, error = w.mean(0), w.std(0) / np.sqrt(len(w))
  assert np.all(np.abs(mean - 1) < 4 * error)


def test_bound_draws_and_no_bias_are_uniform():
  row = _row(4, 16)
  draw = lambda c, **kw: np.asarray(c.draw(row, KEY, 3, **kw).hit)
  plain = Absorb(blocks=Blocks(8), unit="block", time="uniform")
  biased = PositionAbsorb(blocks=Blocks(8), bias=2.0, time="uniform")
  np.testing.assert_array_equal(draw(biased, bound=(1, 4)), draw(plain, bound=(1, 4)))
  zero = PositionAbsorb(blocks=Blocks(8), time="uniform")
  np.testing.assert_array_equal(draw(zero), draw(plain))
  assert (draw(biased) != draw(plain)).any()


@pytest.mark.parametrize(
  "settings, words",
  [
    ({"unit": "doc"}, "unit='block'"),
    ({"count": "bernoulli"}, "count='exact'"),
    ({"bias": -1.0}, "bias >= 0"),
    ({"bias": 1.0, "blocks": {"size": 0}}, "a whole document"),
    ({"bias": 1.0, "blocks": {"size": 256}}, "from 1 to 128"),
  ],
)
def test_what_has_no_marginal_is_refused(settings, words):
  from genmodels import config
  from genmodels.corruption import REGISTRY

  section = {"kind": "position_absorb", "blocks": {"size": 8}} | settings
  with pytest.raises(config.ConfigError, match=words):
    config.build_kind(REGISTRY, section, "corruption")


def test_observed_first_ranks():
  """Inside a block the shown tokens come first; ranks are a permutation of every block."""
  row = _row(3, 20)
  noise = Absorb(blocks=Blocks(8), unit="block", time="uniform", order="observed_first").draw(row, KEY, 2)
  for hit, order in zip(np.asarray(noise.hit[:, 0]), np.asarray(noise.order)):
    for lo in (0, 8, 16):
      block = slice(lo, min(lo + 8, 20))
      want = np.concatenate([np.flatnonzero(~hit[block]), np.flatnonzero(hit[block])])
      np.testing.assert_array_equal(np.argsort(order[block]), want)
      assert sorted(order[block]) == list(range(block.start, block.stop))
  assert jnp.any(noise.order != Absorb(blocks=Blocks(8), unit="block").draw(row, KEY, 2).order)
