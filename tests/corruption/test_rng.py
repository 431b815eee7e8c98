"""Noise is a function of (seed, step, example, occurrence, copy, position) and of nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels.contracts import Documents, token_row
from genmodels.corruption import rng


def test_threefry_known_answers():
  """Random123's published vectors for Threefry-2x32-20."""
  ones = 0xFFFFFFFF
  for key, counter, want in (
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((ones, ones), (ones, ones), (0x1CB996FC, 0xBB002BE7)),
    ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
  ):
    got = rng.threefry2x32(*(np.uint32(k) for k in key), *(np.uint32(c) for c in counter))
    assert tuple(int(g) for g in got) == want


def _docs(ids, occurrence=0):
  ids = jnp.asarray(ids, jnp.uint32)
  B, D = ids.shape
  zero = jnp.zeros((B, D), jnp.int32)
  return Documents(
    jnp.stack([jnp.zeros_like(ids), ids], -1),
    zero + occurrence,
    jnp.stack([zero, zero + 1], -1),
    zero,
    zero,
    {},
  )


def _row(lengths, ids, N=16, occurrence=0):
  doc = np.full((1, N), -1)
  at = 0
  for d, n in enumerate(lengths):
    doc[0, at : at + n] = d
    at += n
  return token_row(np.zeros((1, N)), doc, docs=_docs([ids], occurrence))


@pytest.fixture
def key():
  return jax.random.key(3)


def test_noise_does_not_know_the_packing(key):
  """The same document in another row, at another place, beside others, draws the same bits."""
  a = _row([5, 7], [11, 22])
  b = _row([2, 3, 7], [5, 33, 22])
  bits = lambda row: np.asarray(rng.token_bits(row, key, 4, 0, rng.WHICH))[0]
  np.testing.assert_array_equal(bits(a)[5:12], bits(b)[5:12])
  assert not np.array_equal(bits(a)[:2], bits(b)[:2])  # other documents draw other bits


@pytest.mark.parametrize("change", ["seed", "step", "example", "occurrence", "copy", "tag"])
def test_every_coordinate_matters(key, change):
  args = dict(row=_row([16], [11]), key=key, step=4, copy=0, tag=rng.WHICH)
  other = dict(args)
  other |= {
    "seed": dict(key=jax.random.key(4)),
    "step": dict(step=5),
    "example": dict(row=_row([16], [12])),
    "occurrence": dict(row=_row([16], [11], occurrence=1)),
    "copy": dict(copy=1),
    "tag": dict(tag=rng.LEVEL),
  }[change]
  a, b = rng.token_bits(**args), rng.token_bits(**other)
  assert not np.any(np.asarray(a) == np.asarray(b))


def test_traced_step_draws_what_a_python_step_draws(key):
  row = _row([16], [11])
  traced = jax.jit(lambda s: rng.token_bits(row, key, s, 0, rng.WHICH))(jnp.int32(9))
  np.testing.assert_array_equal(traced, rng.token_bits(row, key, 9, 0, rng.WHICH))


def test_uniform_is_open_and_uniform(key):
  edge = rng.uniform(jnp.asarray([0, 0xFFFFFFFF], jnp.uint32))
  assert 0 < float(edge[0]) and float(edge[1]) < 1
  u = np.sort(np.asarray(rng.token_uniform(_row([20000], [1], N=20000), key, 0, 0, rng.LEVEL))[0])
  ks = np.max(np.abs(u - (np.arange(u.size) + 0.5) / u.size))
  assert ks < 1.63 / np.sqrt(u.size)  # Kolmogorov-Smirnov at 1 %


def test_normal_moments(key):
  z = np.asarray(rng.token_normal(_row([20000], [1], N=20000), key, 0, 0, rng.NOISE, 2))
  assert z.shape == (1, 20000, 2)
  assert abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02
  assert abs(np.corrcoef(z[0].T)[0, 1]) < 0.03
