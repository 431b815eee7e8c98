"""DiffuGPT: the random annealing mask, its limits, and the dense path that it takes (T6 of a dense mask)."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import config, kernels, objectives, system
from genmodels.config import ConfigError
from genmodels.kernels import dense
from genmodels.kernels.attention import reference
from genmodels.masks import AttnMask, DenseMask, builders
from genmodels.objectives import Objective
from genmodels.parallel import mesh as meshes
from genmodels.parallel import rules
from tests.objectives.test_text import KEY, MASK, ar, loss, rows, trunk


@pytest.fixture(autouse=True, scope="module")
def _parameters():
  trunk()


@functools.cache
def objective(share=None, ref="diffugpt:tiny") -> Objective:
  obj = objectives.build(config.load(f"language/{ref}").objective, {"mask_id": MASK})
  if share is None:
    return obj
  return dataclasses.replace(obj, corruption=dataclasses.replace(obj.corruption, share=share))


def seen(obj, row, step=3):
  """bool[B, N, N] of a training draw."""
  return np.asarray(jax.jit(lambda row: obj.prepare(row, KEY, step)[0].masks["full"].to_dense())(row))


@pytest.mark.slow
def test_nothing_drawn_is_the_causal_model():
  row, obj = rows((9, 6), B=2), objective(0.0)
  np.testing.assert_array_equal(seen(obj, row), builders.causal(row.doc).to_dense())
  plain = dataclasses.replace(
    obj, corruption={"kind": "absorb", **_absorb(obj)}, masks={"full": {"n>n": "POS_LE"}}
  )
  np.testing.assert_allclose(loss(obj, row)[1], loss(plain, row)[1], atol=1e-5)
  # A masked token is read where the AR model reads it.
  _, targets, _ = obj.prepare(row, KEY, 3)
  _, want, _ = ar().prepare(row, KEY, 3)
  hit = np.asarray(targets["diffusion"].slot >= 0)
  assert hit.sum() > 5
  np.testing.assert_array_equal(
    np.asarray(targets["diffusion"].slot)[hit], np.asarray(want["text"].slot)[hit]
  )


@pytest.mark.slow
def test_everything_drawn_is_full_attention():
  row, obj = rows((9, 6), B=2), objective(1.0)
  np.testing.assert_array_equal(seen(obj, row), builders.full(row.doc).to_dense())
  llama = objective(ref="diffullama:tiny")
  np.testing.assert_allclose(loss(obj, row)[1], loss(llama, row)[1], atol=1e-5)
  causal = objective(0.0)  # control
  assert np.abs(np.asarray(loss(causal, row)[1]) - np.asarray(loss(llama, row)[1])).max() > 1e-3
  # Likelihoods and samplers see everything, by intervals.
  inputs = jax.eval_shape(lambda: obj.prepare(row, KEY, 3, bound=(0, 2))[0])
  assert isinstance(inputs.masks["full"], AttnMask)


def _absorb(obj):
  c = obj.corruption
  return {"unit": c.unit, "count": c.count, "time": c.time, "schedule": c.schedule, "eps": c.eps}


def test_later_tokens_appear_with_the_share_of_the_step():
  obj, row = objective(ref="diffugpt"), rows((60, 40), B=2)
  share = obj.corruption.share
  for step in (0, 1, 4999, 9999, 20_000):
    assert share(step) == pytest.approx(min(1, (step + 1) / 10_000), rel=1e-6)
  mask = seen(obj, row, 3999)
  causal, full = (np.asarray(m(row.doc).to_dense()) for m in (builders.causal, builders.full))
  assert (mask >= causal).all() and (mask <= full).all()  # no document sees another one
  later = full & ~causal
  assert abs(mask[later].mean() - 0.4) < 0.03
  np.testing.assert_array_equal(mask[0], mask[1])  # one matrix for all rows
  assert (seen(obj, row, 4000)[later] != mask[later]).any()  # and another one at another step
  pairs = jax.jit(lambda row: obj.prepare(row, KEY, 3999)[0].masks["full"].pairs())(row)
  np.testing.assert_array_equal(pairs, mask.sum(-1))


@pytest.mark.full
def test_every_shard_draws_the_same_matrix():
  """The loss over two data shards, by tokens, is that of one device; so is the matrix."""
  row, obj = rows((12, 5), B=4), objective(0.5)
  want, matrix = loss(obj, row)[1], seen(obj, row)
  mesh = meshes.make_mesh(meshes.MeshConfig(data=2), jax.devices()[:2])
  with rules.use_mesh(mesh):
    spread = jax.device_put(row, rules.row_sharding(mesh))
    got = loss(dataclasses.replace(obj), spread)[1]
    np.testing.assert_array_equal(seen(obj, spread), matrix)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def drawn(lq, lk, B=2, share=0.4):
  rng = np.random.default_rng(0)
  doc = jnp.asarray(np.repeat([0, 1, -1], (lq // 2, lq - lq // 2 - 3, 3))[None].repeat(B, 0))
  mask = DenseMask(builders.causal(doc), builders.full(doc), jnp.asarray(rng.random((lq, lk)) < share))
  x = lambda heads, n: jnp.asarray(rng.normal(size=(B, n, heads, 8)), jnp.float32)
  return mask, x(4, lq), x(2, lk), x(2, lk)


@pytest.mark.parametrize("length, soft_cap", [(13, None), pytest.param(160, 5.0, marks=pytest.mark.slow)])
def test_the_dense_path_is_the_oracle(length, soft_cap):
  """Output, LSE and three gradients; empty queries; a last chunk that is not full."""
  mask, q, k, v = drawn(length, length)

  class Oracle:
    to_dense = mask.to_dense

  weight = jnp.sin(jnp.arange(q.size, dtype=jnp.float32)).reshape(q.shape)

  def total(fn):
    def f(q, k, v):
      out, lse = fn(q, k, v)
      return jnp.sum(out * weight) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0)), (out, lse)

    return jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True))

  plan = kernels.plan(mask)
  got = total(lambda *x: kernels.attention(*x, plan, soft_cap=soft_cap, return_lse=True))(q, k, v)
  want = total(lambda *x: reference(*x, Oracle, 8**-0.5, soft_cap))(q, k, v)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), got, want)
  assert plan.implementation == "dense" and not np.asarray(got[0][1][0])[:, -3:].any()


def test_it_refuses_long_rows_by_name():
  mask = jax.eval_shape(lambda: drawn(1025, 1025, B=1)[0])
  with pytest.raises(ValueError, match=r"1025 × 1025 pairs.*at most 1024 slots \(kernels.dense.LIMIT\)"):
    jax.eval_shape(kernels.plan, mask)
  assert jax.eval_shape(kernels.plan, jax.eval_shape(lambda: drawn(1024, 1024, B=1)[0])).tiles == (128, 1024)
  obj = objective()
  with pytest.raises(ConfigError, match="data.seq_len = 2048.*anneal_absorb.*at most 1024"):
    system._dense(obj, 2048, None)
  with pytest.raises(ConfigError, match="mesh.context = 2"):
    system._dense(obj, 64, types.SimpleNamespace(shape={"context": 2}))
  assert "dense attention over 64 × 64 pairs" in system._dense(obj, 64, None)
  with pytest.raises(ValueError, match="of one stream"):
    dataclasses.replace(obj, layout={"kind": "streams", "streams": ("n", "c")}, masks={"full": "bd3"})
  with pytest.raises(ValueError, match="share is 1.5"):
    objective(1.5)
  assert dense.LIMIT == 1024
