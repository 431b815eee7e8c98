"""Rotary embeddings: relative property in several axes, pairings, prefix, scaling."""

import jax.numpy as jnp
import numpy as np
import pytest

from genmodels.config import ConfigError
from genmodels.models.config import Rope, Scaling
from genmodels.models.rope import angles, inv_freq, rotate

from . import cases


def turn(x, pos, rope, axes, scaling=None):
  cos, sin = angles(rope, axes, pos, rope.base, scaling)
  return rotate(x, cos, sin, rope.pairing)


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize("axes", [(12,), (6, 6), (4, 4, 4), (4, 2)])
def test_logits_depend_on_differences_of_positions(pairing, axes):
  rope = Rope(pairing=pairing, axes=axes)
  q, k = draw(1, 7, 2, 12), draw(1, 7, 2, 12, seed=1)
  pos = jnp.asarray(np.random.default_rng(2).integers(0, 9, (1, 7, len(axes))), jnp.float32)

  def scores(shift):
    a, b = turn(q, pos + shift, rope, axes), turn(k, pos + shift, rope, axes)
    return jnp.einsum("bihd,bjhd->bhij", a, b)

  want = scores(0.0)
  shift = jnp.asarray([3.0, 11.0, 5.0])[: len(axes)]
  np.testing.assert_allclose(scores(shift), want, atol=1e-4)
  one_sided = jnp.einsum("bihd,bjhd->bhij", turn(q, pos + shift, rope, axes), turn(k, pos, rope, axes))
  assert np.abs(np.asarray(one_sided - want)).max() > 0.1  # negative control
  np.testing.assert_allclose(jnp.square(turn(q, pos, rope, axes)).sum(-1), jnp.square(q).sum(-1), rtol=1e-5)
  rest = slice(sum(axes), None)
  np.testing.assert_array_equal(turn(q, pos, rope, axes)[..., rest], q[..., rest])


def test_llamagen_layout_of_two_axes():
  """The first quarter of the pairs turns with the row, the next with the column, base^(−2i/(d/2))."""
  d, base = 8, 100.0
  cos, sin = angles(Rope(), (4, 4), jnp.asarray([[[2.0, 5.0]]]), base, None)
  freq = base ** (-np.arange(0, 4, 2) / 4)
  np.testing.assert_allclose(cos[0, 0], np.cos(np.concatenate([2 * freq, 5 * freq])), atol=1e-6)
  np.testing.assert_allclose(sin[0, 0], np.sin(np.concatenate([2 * freq, 5 * freq])), atol=1e-6)
  assert cos.shape[-1] == d // 2


def test_interleaved_is_half_split_of_permuted_rows():
  """Import identity: reorder the head's rows (0, 2, 4, …, 1, 3, 5, …) and use the other pairing."""
  x, pos = draw(1, 5, 2, 8), jnp.arange(5.0)[None, :, None]
  order = np.concatenate([np.arange(0, 8, 2), np.arange(1, 8, 2)])
  a = turn(x, pos, Rope(pairing="interleaved"), (8,))[..., order]
  b = turn(x[..., order], pos, Rope(pairing="half"), (8,))
  np.testing.assert_allclose(a, b, atol=1e-6)
  assert np.abs(np.asarray(a - turn(x, pos, Rope(), (8,))[..., order])).max() > 0.1


def test_zero_prefix_gives_logit_zero():
  """A prefix slot (pos < 0) has zero q and k: queries see it with logit 0, it attends uniformly."""
  rope = Rope(axes=(4, 4), zero_prefix=True)
  pos = jnp.asarray([[[-1.0, -1.0], [0.0, 0.0], [0.0, 1.0]]])
  x = turn(draw(1, 3, 1, 8), pos, rope, (4, 4))
  assert not np.asarray(x[:, 0]).any()
  np.testing.assert_array_equal(jnp.square(x[:, 1]).sum() > 0, True)
  plain = turn(draw(1, 3, 1, 8), pos, Rope(axes=(4, 4)), (4, 4))
  assert np.asarray(plain[:, 0]).any()


def test_linear_and_ntk_scaling():
  plain, _ = inv_freq(8, 1e4)
  np.testing.assert_allclose(inv_freq(8, 1e4, Scaling("linear", 4.0))[0], plain / 4, rtol=1e-6)
  ntk, _ = inv_freq(8, 1e4, Scaling("ntk", 4.0))
  assert ntk[0] == plain[0]  # the highest frequency is kept, the lowest interpolated by the factor
  np.testing.assert_allclose(ntk[-1], plain[-1] / 4, rtol=1e-6)


def test_rope_base_and_scaling_by_layer():
  """A layer's own base, and unscaled layers, equal models of that base and scaling everywhere."""
  scaling = dict(kind="linear", factor=2.0)
  mixed = dict(rope=dict(base=1e4, scaling=scaling), pattern=[dict(rope_base=1e4, rope_scaling=False)])
  model, params = cases.build(**mixed)
  x = cases.inputs(cases.tokens(1, 8))
  got = cases.run(model, params, x)
  np.testing.assert_allclose(got, cases.run(cases.build(rope=dict(base=1e4))[0], params, x), atol=1e-6)
  other = cases.run(cases.build(rope=dict(base=1e4, scaling=scaling))[0], params, x)
  assert np.abs(np.asarray(got - other)).max() > 1e-3


def test_learned_positions_and_too_few_axes():
  model, params = cases.build(rope=None, learned_pos=8)
  ids = jnp.zeros((1, 4, 1), jnp.int32)
  a = cases.run(model, params, cases.inputs(ids))
  assert np.abs(np.asarray(a[0, 0] - a[0, 1])).max() > 1e-3
  model, params = cases.build(rope=dict(axes=(2, 2)))
  with pytest.raises(ValueError, match="2 axes"):
    cases.run(model, params, cases.inputs(ids))
  with pytest.raises(ConfigError, match="original_len"):
    cases.build(rope=dict(scaling=dict(kind="yarn", factor=2)))
