"""Gumbel tails, filters and scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels.sampling import draw


def keys(n, seed=0):
  a = jnp.arange(n, dtype=jnp.uint32)
  return a * np.uint32(2654435761) + np.uint32(seed), a ^ np.uint32(seed * 7919)


def pick(choice, logits, n):
  picked = choice(logits, *keys(n))
  return picked.token, picked.score


def test_gumbel_has_its_tail():
  """The maximum of 2·10⁷ draws is about ln n + 0.577 = 17.4; 23-bit uniforms never pass 15.95. And the
  draws beyond 11.5 (10⁻⁵ of them) follow the exponential tail (Kolmogorov–Smirnov)."""
  rows, V, chunks = 200, 1000, 100

  @jax.jit
  def largest(i):
    k0, k1 = keys(rows)
    g = draw.gumbel(k0 + i.astype(jnp.uint32) * np.uint32(rows), k1, V).reshape(-1)
    return jax.lax.top_k(g, 64)[0], g.mean(), (g**2).mean()

  top, mean, square = jax.lax.map(largest, jnp.arange(chunks))
  assert float(top.max()) > 16.5
  assert abs(float(mean.mean()) - 0.5772) < 2e-3
  assert abs(float(square.mean()) - (np.pi**2 / 6 + 0.5772**2)) < 6e-3
  tail = np.sort(np.asarray(top, np.float64).ravel())
  tail = tail[tail > 11.5]
  n = 2e7
  assert abs(len(tail) - n * -np.expm1(-np.exp(-11.5))) < 4 * np.sqrt(n * np.exp(-11.5))
  survival = -np.expm1(-np.exp(-tail)) / -np.expm1(-np.exp(-11.5))
  grid = np.arange(len(tail), 0, -1) / len(tail)
  assert np.abs(survival - grid).max() < 1.95 / np.sqrt(len(tail))  # p = 1e-3


def test_low_range_gumbel_would_fail():
  """Negative control: the usual generator saturates below the threshold of the test above."""
  u = jnp.float32(1 - 2**-24)
  assert float(-jnp.log(-jnp.log(u))) < 16.7
  low = jax.random.gumbel(jax.random.key(0), (2_000_000,), mode="low")
  assert float(low.max()) < 15.95 and float(-jnp.log(-jnp.log(jnp.float32(1 - 2**-23)))) < 15.95


def test_draws_follow_the_distribution():
  logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
  n = 40000
  token, score = pick(draw.Choice(temperature=1.0), jnp.tile(logits, (n, 1)), n)
  share = np.bincount(token, minlength=4) / n
  want = np.exp(np.asarray(logits))
  assert np.abs(share - want).max() < 4 * 0.5 / np.sqrt(n)
  np.testing.assert_allclose(score, want[np.asarray(token)], rtol=1e-5)
  cold, _ = pick(draw.Choice(temperature=0.5), jnp.tile(logits, (n, 1)), n)
  share, want = np.bincount(cold, minlength=4) / n, want**2 / (want**2).sum()
  assert np.abs(share - want).max() < 4 * 0.5 / np.sqrt(n)


def test_filters():
  z = jnp.log(jnp.array([[0.4, 0.1, 0.3, 0.2]]))
  kept = lambda x: np.isfinite(np.asarray(x))[0].tolist()
  assert kept(draw.top_k_filter(z, 2)) == [True, False, True, False]
  assert kept(draw.top_k_filter(z, 0)) == kept(draw.top_k_filter(z, 4)) == [True] * 4
  assert kept(draw.top_p_filter(z, 0.65)) == [True, False, True, False]  # the one that crosses stays
  assert kept(draw.top_p_filter(z, 0.75)) == [True, False, True, True]
  assert kept(draw.top_p_filter(z, 0.1)) == [True, False, False, False]


@pytest.mark.parametrize("score", draw.SCORES)
def test_scores(score):
  z = jnp.log(jnp.array([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25]])).astype(jnp.bfloat16)
  token, got = pick(draw.Choice(temperature=0, score=score), z, 2)
  assert token.tolist() == [0, 0] and got.dtype == jnp.float32
  p = np.asarray(jax.nn.softmax(z.astype(jnp.float32), -1))
  want = {
    "prob": p[:, 0],
    "margin": np.sort(p, -1)[:, -1] - np.sort(p, -1)[:, -2],
    "neg_entropy": (p * np.log(p)).sum(-1),
  }
  if score == "random":
    assert got[0] != got[1] and 0 < float(got.min()) and float(got.max()) < 1
  else:
    np.testing.assert_allclose(got, want[score], rtol=1e-5)


def test_forbidden_ids_are_never_drawn():
  z = jnp.tile(jnp.array([[0.0, 50.0, 0.0]]), (500, 1))
  token, score = pick(draw.Choice(forbid=(1,), score="neg_entropy"), z, 500)
  assert set(np.asarray(token).tolist()) == {0, 2}
  np.testing.assert_allclose(score, -np.log(2), rtol=1e-5)
