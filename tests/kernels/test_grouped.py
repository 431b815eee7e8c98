"""Grouped products: both implementations against a loop over rows, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels.kernels import grouped_matmul, resolve_grouped

# Rows, sizes: empty groups, a group larger than a block, rows of no group, no row at all.
CASES = [
  (24, (3, 0, 5, 16)),
  (40, (0, 31, 2, 0)),
  (16, (0, 0, 0, 0)),
  (9, (9,)),
]


def oracle(x, w, sizes):
  group = np.repeat(np.arange(len(sizes)), sizes)
  y = np.zeros((x.shape[0], w.shape[2]), np.float64)
  for r, e in enumerate(group):
    y[r] = x[r].astype(np.float64) @ w[e].astype(np.float64)
  return y


def value(implementation):
  def f(x, w, sizes, g):
    y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation), x, w)
    return y, *pull(g)

  return jax.jit(f)


@pytest.mark.parametrize("implementation", ["ragged", "blocks"])
@pytest.mark.parametrize("M, sizes", CASES, ids=str)
def test_is_a_loop_over_rows(M, sizes, implementation):
  rng = np.random.default_rng(0)
  x, g = rng.standard_normal((M, 6), np.float32), rng.standard_normal((M, 5), np.float32)
  w = rng.standard_normal((len(sizes), 6, 5), np.float32)
  y, dx, dw = value(implementation)(x, w, jnp.asarray(sizes, jnp.int32), g)
  np.testing.assert_allclose(y, oracle(x, w, sizes), atol=1e-5)
  np.testing.assert_allclose(dx, oracle(g, w.swapaxes(1, 2), sizes), atol=1e-5)
  group = np.repeat(np.arange(len(sizes)), sizes)
  want = np.zeros_like(w)
  for r, e in enumerate(group):
    want[e] += np.outer(x[r], g[r])
  np.testing.assert_allclose(dw, want, atol=1e-5)
  total = sum(sizes)
  assert not np.asarray(y)[total:].any() and not np.asarray(dx)[total:].any()


def test_rows_of_no_group_may_hold_anything():
  x = jnp.full((4, 3), jnp.nan).at[:2].set(1.0)
  for implementation in ("ragged", "blocks"):
    y, dx, dw = value(implementation)(
      x, jnp.ones((2, 3, 2)), jnp.asarray([1, 1], jnp.int32), jnp.ones((4, 2))
    )
    assert np.isfinite(y).all() and np.isfinite(dx).all() and np.isfinite(dw).all()


def test_work_and_memory_do_not_grow_with_the_groups():
  """The loop over blocks holds no [groups, rows, …] array; the expanded product does: the negative control."""

  def temporaries(implementation, E):
    x, w = jnp.zeros((512, 64), jnp.bfloat16), jnp.zeros((E, 64, 32), jnp.bfloat16)
    f = jax.jit(lambda x, w, s: grouped_matmul(x, w, s, implementation))
    return f.lower(x, w, jnp.zeros((E,), jnp.int32)).compile().memory_analysis().temp_size_in_bytes

  rows = 512 * (64 + 32) * 4
  assert temporaries("blocks", 64) < 4 * rows
  assert temporaries("ragged", 64) > 16 * rows


def test_unknown_implementation():
  with pytest.raises(ValueError, match="'dense' is unknown; one of auto"):
    resolve_grouped("dense")
  assert resolve_grouped("auto") == "blocks"
  with pytest.raises(ValueError, match=r"sizes \[E\]; got \(2, 3\), \(2, 4, 5\)"):
    grouped_matmul(jnp.zeros((2, 3)), jnp.zeros((2, 4, 5)), jnp.zeros((2,), jnp.int32))
