"""Cached decoding equals one uncached pass, and the cache's own operations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import models
from genmodels.masks import CODE_HIDDEN

from . import cases


def stepper(model):
  """Hidden states of some slots given the cache, and the cache with the kept ones of them."""

  @jax.jit
  def step(params, cache, x, keep):
    out = model.apply(params, x, {}, cache=cache)
    return out.layers["hidden"], models.write_cache(cache, out.new, keep)

  return step


def part(x, index):
  """Inputs and per-row masks at slots `index`."""
  masks = {
    name: m.replace(code=m.code[:, index], lo=m.lo[:, :, index], hi=m.hi[:, :, index])
    for name, m in x.masks.items()
  }
  return x.replace(ids=x.ids[:, index], pos=x.pos[:, index], doc=x.doc[:, index], masks=masks)


def full(model, params, x):
  return jax.jit(lambda p, x: model.apply(p, x, {}).layers["hidden"])(params, x)


@pytest.mark.parametrize(
  "fields", [{}, dict(layers=3, pattern=[dict(mask="local"), dict()], attn_soft_cap=3.0)]
)
def test_causal_decode_equals_one_pass(fields):
  model, params = cases.build(**fields)
  x = cases.inputs(cases.tokens(2, 9))
  want = full(model, params, x)
  step, cache = stepper(model), model.init_cache(2, 12)
  for at in (slice(0, 3), slice(3, 6), slice(6, 9)):  # chunks: a prefill is the same code
    got, cache = step(params, cache, part(x, at), jnp.ones((2, 3), bool))
    np.testing.assert_allclose(got, want[:, at], atol=1e-5)
  assert cache.length.tolist() == [9, 9]
  empty, _ = step(params, model.init_cache(2, 12), part(x, slice(6, 9)), jnp.ones((2, 3), bool))
  assert np.abs(np.asarray(empty - want[:, 6:])).max() > 1e-2  # negative control: the cache is read


def test_block_diffusion_decode_equals_the_two_stream_pass():
  """Noisy slots of block b over the cached clean blocks < b; then the clean block enters the cache."""
  B, N, block = 2, 8, 4
  model, params = cases.build()
  slots = cases.two_streams(B, N, block)
  pos = slots.pos[..., None].astype(jnp.float32)
  x = cases.inputs(cases.tokens(B, 2 * N), {"full": cases.BD3.mask(slots)}, pos=pos)
  want = full(model, params, x)
  step, cache = stepper(model), model.init_cache(B, N)
  for b in range(N // block):
    noisy = slice(b * block, (b + 1) * block)
    clean = slice(N + b * block, N + (b + 1) * block)
    got, same = step(params, cache, part(x, noisy), jnp.zeros((B, block), bool))
    np.testing.assert_allclose(got, want[:, noisy], atol=1e-5)
    assert same.length.tolist() == cache.length.tolist()
    got, cache = step(params, cache, part(x, clean), jnp.ones((B, block), bool))
    np.testing.assert_allclose(got, want[:, clean], atol=1e-5)


def test_rows_keep_different_slots():
  """Row 0 keeps slots 0 and 2, row 1 slot 1: only those are visible later, at their own codes."""
  model, params = cases.build()
  x = cases.inputs(cases.tokens(2, 4))
  keep = jnp.asarray([[True, False, True], [False, True, False]])
  step = stepper(model)
  _, cache = step(params, model.init_cache(2, 4), part(x, slice(0, 3)), keep)
  assert cache.length.tolist() == [2, 1]
  hidden = CODE_HIDDEN
  assert cache.code["full"].tolist() == [[0, 2, hidden, hidden], [1, hidden, hidden, hidden]]
  leaf = cache.layers["s0"]["l0"]["k"]
  assert np.abs(np.asarray(leaf[:, 1, 1:])).max() == 0 and np.abs(np.asarray(leaf[:, 0, 1])).max() > 0


def fake(cfg, B, S, start):
  """What a call would return as `new`: every number distinct."""
  new = models.init_cache(cfg, B, S)
  count = lambda x, n: (jnp.arange(x.size, dtype=x.dtype) + n).reshape(x.shape)
  return {
    "code": {p: count(c, start) for p, c in new.code.items()},
    "layers": jax.tree.map(lambda x: count(x, 1), new.layers),
  }


def test_write_overflow_overwrite_crop_relabel_fork():
  cfg = cases.build()[0].cfg
  cache = models.init_cache(cfg, 2, 3)
  write = jax.jit(models.write_cache)
  cache = write(cache, fake(cfg, 2, 2, 10), jnp.ones((2, 2), bool))
  over = write(cache, fake(cfg, 2, 2, 20), jnp.asarray([[True, True], [False, True]]))
  assert over.length.tolist() == [3, 3]  # the fourth entry of row 0 does not fit: dropped
  assert over.code["full"].tolist() == [[10, 11, 20], [12, 13, 23]]
  again = write(over, fake(cfg, 2, 2, 30), jnp.ones((2, 2), bool), jnp.asarray([[1, 0], [2, -1]]))
  assert again.code["full"].tolist() == [[31, 30, 20], [12, 13, 32]]
  assert again.length.tolist() == [3, 3]
  np.testing.assert_array_equal(
    again.layers["s0"]["l0"]["k"][1, 0, 0], fake(cfg, 2, 2, 30)["layers"]["s0"]["l0"]["k"][1, 0, 1]
  )
  cropped = models.crop_cache(again, jnp.asarray([1, 5]))
  assert cropped.length.tolist() == [1, 3]
  assert cropped.code["full"].tolist() == [[31, CODE_HIDDEN, CODE_HIDDEN], [12, 13, 32]]
  moved = models.relabel_cache(cropped, {"full": cropped.code["full"] + 5})
  assert moved.code["full"][1].tolist() == [17, 18, 37]
  with pytest.raises(ValueError, match="local"):
    models.relabel_cache(cropped, {"local": cropped.code["full"]})
  forked = models.fork_cache(cropped, jnp.asarray([1, 1, 0]))
  assert forked.length.tolist() == [3, 3, 1]
  np.testing.assert_array_equal(forked.layers["s0"]["l0"]["v"][:, 1], again.layers["s0"]["l0"]["v"][:, 1])


def test_the_write_is_in_place_and_nothing_is_concatenated():
  """One decode step of a donated cache needs little beside it."""
  model, params = cases.build(layers=24)
  B, Lc = 2, 2048
  cache = model.init_cache(B, Lc)
  x = part(cases.inputs(cases.tokens(B, 4)), slice(0, 4))

  def step(params, cache, x):
    out = model.apply(params, x, {}, cache=cache)
    return out.layers["hidden"], models.write_cache(cache, out.new, jnp.ones((B, 4), bool))

  memory = jax.jit(step, donate_argnums=1).lower(params, cache, x).compile().memory_analysis()
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
  assert memory.alias_size_in_bytes >= size
  assert memory.temp_size_in_bytes < 0.1 * size, (memory.temp_size_in_bytes, size)
