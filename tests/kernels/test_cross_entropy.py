"""Chunked functions of logits against dense ones.

Legend: R rows · D width · V vocabulary.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from genmodels import compat
from genmodels.kernels import chunked_map, nll, project

R, D, V = 40, 8, 33


def _data(seed=0):
  k = jax.random.split(jax.random.key(seed), 6)
  return {
    "hidden": jax.random.normal(k[0], (R, D)),
    "weight": jax.random.normal(k[1], (D, V)),
    "value": jax.random.randint(k[2], (R,), 0, V),
    "valid": jax.random.bernoulli(k[3], 0.4, (R,)),
    "x": jax.random.normal(k[4], (R,)),
    "cotangent": jax.random.normal(k[5], (R,)),
  }


def _fn(temperature):
  def fn(logits, value, x):
    log_p = jax.nn.log_softmax(logits)
    return {
      "nll": nll(logits / temperature, value) * x,
      "entropy": -(jnp.exp(log_p) * log_p).sum(1),
      "best": logits.argmax(1),
      "pair": logits[:, :2],
    }

  return fn


@pytest.mark.compat
@pytest.mark.parametrize("valid", ["some", "none", "all"])
@pytest.mark.parametrize("chunk", [7, 64])
def test_value_and_all_gradients(chunk, valid):
  # Hidden, weight, floating xs and what fn closes over; a chunk size that divides nothing.
  d = _data()
  mask = {"some": d["valid"], "none": jnp.zeros(R, bool), "all": jnp.ones(R, bool)}[valid]
  xs = d["value"], d["x"]

  def chunked(hidden, weight, x, temperature):
    return chunked_map(hidden, weight, mask, _fn(temperature), (xs[0], x), chunk=chunk)

  def dense(hidden, weight, x, temperature):
    out = _fn(temperature)(hidden @ weight, xs[0], x)
    return jax.tree.map(lambda y: jnp.where(mask.reshape(-1, *[1] * (y.ndim - 1)), y, 0), out)

  def run(f):
    def loss(*args):
      out = f(*args)
      total = (out["nll"] + out["entropy"] ** 2 + out["pair"].sum(1)) * d["cotangent"]
      return total.sum(), out

    grad = jax.grad(loss, (0, 1, 2, 3), has_aux=True)
    return jax.jit(grad)(d["hidden"], d["weight"], d["x"], jnp.float32(1.3))

  (got_grads, got), (want_grads, want) = run(chunked), run(dense)
  np.testing.assert_array_equal(got["best"], want["best"])
  for a, b in zip(jax.tree.leaves((got, got_grads)), jax.tree.leaves((want, want_grads))):
    np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)


def test_rows_that_are_not_valid_cannot_matter():
  # Zero out, zero gradient, even where their inputs are NaN; and no chunk is run for them.
  d = _data()
  hidden = jnp.where(d["valid"][:, None], d["hidden"], jnp.nan)
  ran = []

  def fn(logits, value):
    jax.debug.callback(lambda: ran.append(1))
    return nll(logits, value)

  def loss(hidden, weight):
    return chunked_map(hidden, weight, d["valid"], fn, (d["value"],), chunk=4).sum()

  value, (d_hidden, d_weight) = jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, d["weight"])
  jax.effects_barrier()
  assert jnp.isfinite(value) and jnp.isfinite(d_weight).all()
  assert (d_hidden[~d["valid"]] == 0).all() and (d_hidden[d["valid"]] != 0).any()
  chunks = -(-int(d["valid"].sum()) // 4)
  assert chunks < R // 4 and len(ran) in (chunks, 2 * chunks)  # forward, and recomputed in backward


def test_weight_gradient_is_summed_in_float32():
  # 512 equal contributions: a bfloat16 running sum stops growing at 256 times one of them.
  n = 512
  hidden, weight = jnp.ones((n, 2), jnp.bfloat16), jnp.zeros((2, 4), jnp.bfloat16)
  value = jnp.zeros((n,), jnp.int32)

  def loss(weight, dtype):
    return chunked_map(hidden, weight.astype(dtype), jnp.ones(n, bool), nll, (value,), chunk=1).sum()

  for dtype in (jnp.bfloat16, jnp.float32):
    got = jax.jit(jax.grad(loss), static_argnums=1)(weight.astype(jnp.float32), dtype)
    np.testing.assert_allclose(got[:, 0], -0.75 * n, rtol=1e-6)
  wrong = jax.lax.fori_loop(0, n, lambda _, s: s + jnp.bfloat16(0.75), jnp.bfloat16(0))
  assert wrong < 0.75 * n - 1


def test_tied_table_and_any_logits_function():
  d = _data()
  params = {"table": d["weight"].T, "bias": d["cotangent"][:V]}

  def logits_fn(p, hidden):
    return 30 * jnp.tanh((project(p["table"], hidden, True) + p["bias"]) / 30)

  def chunked(p):
    out = chunked_map(d["hidden"], p, d["valid"], nll, (d["value"],), chunk=16, logits_fn=logits_fn)
    return (out * d["cotangent"]).sum()

  def dense(p):
    out = nll(30 * jnp.tanh((d["hidden"] @ p["table"].T + p["bias"]) / 30), d["value"])
    return (jnp.where(d["valid"], out, 0) * d["cotangent"]).sum()

  got, want = jax.jit(jax.value_and_grad(chunked))(params), jax.jit(jax.value_and_grad(dense))(params)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)


def _buffers(text, elements):
  """Shapes of the compiled program with at least that many elements."""
  shapes = re.findall(r"\b(?:f32|bf16|s32)\[([\d,]+)\]", text)
  return {s for s in shapes if np.prod([int(n) for n in s.split(",")]) >= elements}


def test_no_buffer_of_all_logits():
  rows, width, vocabulary, chunk = 2048, 32, 1000, 128
  shapes = [
    jax.ShapeDtypeStruct((rows, width), jnp.bfloat16),
    jax.ShapeDtypeStruct((width, vocabulary), jnp.float32),
    jax.ShapeDtypeStruct((rows,), jnp.bool_),
    jax.ShapeDtypeStruct((rows,), jnp.int32),
  ]

  def chunked(hidden, weight, valid, value):
    return chunked_map(hidden, weight, valid, nll, (value,), chunk=chunk).sum()

  def dense(hidden, weight, valid, value):
    return jnp.where(valid, nll(project(weight, hidden), value), 0).sum()

  def compiled(loss):
    return jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile()

  ours, naive = compiled(chunked), compiled(dense)
  assert _buffers(naive.as_text(), rows * vocabulary), "the check must see logits where there are some"
  assert not _buffers(ours.as_text(), rows * vocabulary)
  assert ours.memory_analysis().temp_size_in_bytes < rows * vocabulary * 4 / 2
  assert naive.memory_analysis().temp_size_in_bytes >= rows * vocabulary * 4


@pytest.mark.compat
@pytest.mark.parametrize("check", [True, False])
def test_rows_over_data_inside_shard_map(check):
  # Each device has its own number of valid rows; shard_map's transpose sums the weight gradient.
  d = _data()
  mesh = compat.make_mesh((4,), ("data",), jax.devices()[:4])
  valid = d["valid"] & (jnp.arange(R) >= 10)  # the first device has none
  rows = P("data")
  local = compat.shard_map(
    lambda h, w, ok, y: chunked_map(h, w, ok, nll, (y,), chunk=4), mesh, (rows, P(), rows, rows), rows, check
  )
  plain = lambda h, w, ok, y: jnp.where(ok, nll(h @ w, y), 0)
  got, want = (
    jax.jit(jax.grad(lambda h, w, f=f: (f(h, w, valid, d["value"]) * d["cotangent"]).sum(), (0, 1)))(
      d["hidden"], d["weight"]
    )
    for f in (local, plain)
  )
  for a, b in zip(got, want):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_wrong_shapes_are_named():
  d = _data()
  with pytest.raises(ValueError, match="must share R"):
    chunked_map(d["hidden"], d["weight"], d["valid"][:-1], nll, (d["value"],))
  with pytest.raises(ValueError, match=r"must return \[c, …\]"):
    chunked_map(d["hidden"], d["weight"], d["valid"], lambda logits: logits.sum(), ())
