"""BiLD: a small model writes while it is sure, a large one takes back what surprises it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels.sampling import drafters, draw, speculate, verify
from tests.sampling import systems as S
from tests.sampling.test_speculate import KEY, assert_same, plain


def test_what_is_taken_back():
  """−ln p(x) against the limit; below ln 2 only the likeliest token passes, at ∞ every one."""
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(200, 5)) * 2, jnp.float32)
  p = np.asarray(jax.nn.softmax(logits, -1))
  every = jnp.broadcast_to(jnp.arange(5), (200, 5))
  keys = jnp.zeros((200,), jnp.uint32)
  choice = draw.Choice(0.0)

  def passed(limit):
    found = verify.Rollback(limit)(choice, logits, every, None, keys, keys)
    np.testing.assert_array_equal(found.token, np.broadcast_to(p.argmax(1)[:, None], (200, 6)))
    return np.asarray(found.accept[:, 0]) > 0

  np.testing.assert_array_equal(passed(1.0), p >= math.exp(-1.0))
  tight = passed(math.log(2) - 1e-3)
  assert tight.any() and (tight <= (np.arange(5) == p.argmax(1)[:, None])).all()
  assert (passed(1.0).sum(1) > 1).any()  # control: a larger limit lets others pass
  assert passed(math.inf).all() and not verify.Rollback().exact
  with pytest.raises(ValueError, match="limit is -1"):
    verify.Rollback(-1)
  with pytest.raises(ValueError, match="a probability"):
    drafters.Small(fallback=1.5)


def generated(fallback, limit):
  """(what the pair writes, what the large model writes alone); the small one is the large one, worse."""
  target, want = plain(temperature=0.0)
  small = drafters.Small(3, fallback=fallback, target=target)
  rule = verify.Rollback(limit)
  sampler = speculate.build(target, small, rule, own=jax.tree.map(lambda x: x * 0.8, S.params()))
  return jax.tree.map(np.asarray, sampler(S.params(), S.row(), KEY)), want


@pytest.mark.full
def test_a_tight_limit_is_the_large_model():
  """Greedy ids are the large model's below ln 2, whatever the small one is sure of."""
  result, want = generated(0.35, 0.69)
  assert_same(result, want)
  calls, seen = result.calls["verify"], result.memory
  assert (seen["handovers"] > 0).any() and (seen["rejections"] > 0).any()
  assert (seen["handovers"] <= calls).all() and (seen["rejections"] <= calls).all()
  assert (seen["draft_forwards"] < 3 * calls).any() and (seen["draft_forwards"] >= calls).all()


@pytest.mark.full
def test_an_unsure_model_hands_over_every_token():
  result, want = generated(1.0, math.inf)
  assert_same(result, want)
  made = (result.committed_at >= 0).sum(1)
  for x in (result.calls["verify"], result.memory["handovers"], result.memory["draft_forwards"]):
    np.testing.assert_array_equal(x, made)
  assert (result.memory["drafted"] == 0).all()


@pytest.mark.full
def test_without_a_limit_nothing_is_taken_back():
  """Negative control: three tokens of four are the small model's, so the ids are no longer the large one's."""
  result, want = generated(0.0, math.inf)
  np.testing.assert_array_equal(result.memory["accepted"], result.memory["drafted"])
  assert (result.memory["rejections"] == 0).all() and (result.memory["handovers"] == 0).all()
  assert (result.tokens != want.tokens).any()
  target, _ = plain(temperature=0.0)
  alone = dataclasses.replace(target)
  b = 0  # one prompt token: places 1, 2, 3 are the small model's greedy text
  small = np.asarray(alone(jax.tree.map(lambda x: x * 0.8, S.params()), S.row(), KEY).tokens)
  np.testing.assert_array_equal(result.tokens[b, :4], small[b, :4])
