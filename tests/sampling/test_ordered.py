"""Decoding in a known order: the cache is exact at every step, the order is the corruption's, counts are uniform."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import config, sampling
from genmodels.contracts import CONTEXT
from genmodels.sampling import ordered, prompt_row
from tests.objectives.test_esoteric import objective
from tests.objectives.test_text import KEY, MASK, trunk


@pytest.fixture(autouse=True, scope="module")
def _parameters():
  trunk()


def sampler(ref="eso_lm:tiny", **kw):
  obj = objective(ref, **({"alpha": 0.5, "count": "exact"} if "eso" in ref else {}))
  kw = {"quota": {"kind": "ancestral", "steps": 4}, **kw}
  made = sampling.build(kw, obj, trunk()[0], meta={})
  assert isinstance(made, ordered.OrderedSampler)
  return made


def rows():
  """Unequal prompts, one with a given token in the middle of what is open."""
  row = prompt_row([[1, 2], [3, 4, 5, 6, 7], [8]], 14, 14)
  middle = (jnp.arange(14) == 9) & (jnp.arange(3) == 2)[:, None]
  return row.replace(role=jnp.where(middle, CONTEXT, row.role), tokens=jnp.where(middle, 3, row.tokens))


@pytest.mark.slow
@pytest.mark.parametrize("ref", ["eso_lm:tiny", "as_arm:tiny"])
def test_cached_is_uncached_at_every_step(ref):
  """T17 for a batch of unequal prompts, through the sampler's own view; the calls differ in size."""
  a, b = sampler(ref), sampler(ref, cache="none")
  assert a.cached and not b.cached
  params, row = trunk()[1], rows()
  sa, sb = (jax.jit(s.start)(params, row) for s in (a, b))

  def both(s):
    def call(row, st):
      at, use = s.now(row, st, KEY)
      return s.predict(params, row, st, at, use, s.choice.logits, ())[0], at, use

    return jax.jit(call), jax.jit(lambda row, st: s.step(params, row, st, KEY))

  (call_a, step_a), (call_b, step_b) = both(a), both(b)
  steps, order = 0, np.asarray(a.objective.corruption.plan(row)[0])
  while not np.asarray(sa.done).all():
    (x, at, use), (y, *_) = call_a(row, sa), call_b(row, sb)
    use = np.asarray(use)
    np.testing.assert_allclose(np.asarray(x)[use], np.asarray(y)[use], atol=3e-5)
    committed = np.asarray(sa.committed)
    for i in range(3):  # what comes now are the next ranks
      ranks = order[i][np.asarray(at)[i][use[i]]]
      np.testing.assert_array_equal(ranks, committed[i].sum() + np.arange(len(ranks)))
    sa, sb = step_a(row, sa), step_b(row, sb)
    steps += 1
  np.testing.assert_array_equal(sa.tokens, sb.tokens)
  assert (np.asarray(sa.tokens) != MASK).all() and (np.asarray(sa.tokens)[2, 9] == 3)
  if "eso" in ref:
    assert steps < 13  # half of the tokens in four steps, the rest one by one
    at, given = np.asarray(sa.at), np.asarray(row.role == CONTEXT)
    late = np.asarray(a.objective.corruption.plan(row)[1])
    for i in range(3):
      open_ = np.flatnonzero(~given[i])
      tail = open_[np.argsort(order[i][open_])][late[i] :]
      assert (np.diff(tail) > 0).all() and (np.diff(at[i][tail]) == 1).all()  # left to right, one a step


def test_only_causal_orders_are_cached():
  with pytest.raises(config.ConfigError, match="would not be exact"):
    sampler("eso_lm:a", cache="causal_exact")
  assert not sampler("eso_lm:a").cached
  with pytest.raises(config.ConfigError, match="no blocks"):
    sampler(sub_block=4)


@pytest.mark.slow
def test_steps_are_drawn_uniformly():
  """Counts of the diffusion part: a multinomial over the steps, less those without a token; the mean is right."""
  s = sampler(quota={"kind": "ancestral", "steps": 3})
  wide = dataclasses.replace(s, objective=objective("eso_lm:tiny", alpha=1.0, count="exact"))
  row = prompt_row([[1]] * 2000, 7, 7)
  state = ordered.State(
    row.tokens, row.role == CONTEXT, row.tokens * 0, jnp.zeros(2000, jnp.int32), None,
    jnp.zeros(2000, bool), jnp.int32(0), jnp.int32(0),
  )  # fmt: skip
  first = np.asarray(jax.jit(lambda row, st: wide.now(row, st, KEY))(row, state)[1].sum(1))
  # The first of 3 steps that has any of 6 tokens: Binomial(6, 1/3) given ≥ 1, or if none Binomial(6, 1/2), …; ≤ W.
  n, W = np.arange(7), wide.width(row)
  from math import comb

  third = np.array([comb(6, k) / 3**k * (2 / 3) ** (6 - k) for k in n])
  half = np.array([comb(6, k) / 2**6 for k in n])
  law = np.where(n > 0, third + third[0] * half, 0)
  law[6] += third[0] * half[0]
  law[W] += law[W + 1 :].sum()
  want = 2000 * law[1 : W + 1]
  got = np.bincount(first, minlength=7)[1 : W + 1]
  assert got.sum() == 2000 and ((got - want) ** 2 / want).sum() < 20.5  # at most 5 degrees, p = 1e-3
