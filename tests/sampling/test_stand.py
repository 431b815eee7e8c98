"""STAND: n-grams that remember distributions, trees drawn from them, and exactness."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import sampling
from genmodels.config import ConfigError
from genmodels.sampling import speculate, stand, verify
from tests.sampling import systems as S
from tests.sampling import test_speculate as T

KEY = jax.random.key(3)
PATHS = ((0,), (1,), (0, 0), (1, 0), (1, 1))


def test_the_mean_of_what_was_said():
  """Every id once with the mean of its probabilities; laws that do not count, and empty places, are left out."""
  ids = jnp.array([[[3, 5], [5, 7], [1, 2]]])
  logp = jnp.log(jnp.array([[[0.75, 0.25], [0.5, 0.5], [0.9, 0.1]]]))
  got, law = stand.mean_law(ids, logp, jnp.array([[True, True, False]]))
  found = {int(i): float(np.exp(x)) for i, x in zip(got[0], law[0]) if x > stand.NONE}
  assert found == pytest.approx({3: 0.375, 5: 0.375, 7: 0.25})
  _, empty = stand.mean_law(ids, logp, jnp.zeros((1, 3), bool))
  assert (empty == stand.NONE).all()


def test_places_with_the_longest_match():
  tokens = jnp.array([[1, 2, 3, 9, 2, 3, 1, 2, 3, 0, 0]])
  last = jnp.array([[[1, 2, 3], [-1, -1, 3], [8, 8, 8]]])
  found = np.asarray(stand.matches(tokens, jnp.array([9]), last))[0]
  np.testing.assert_array_equal(np.flatnonzero(found[0]), [2, 5])  # the newest place itself is none
  assert found[0, 2] == 3 and found[0, 5] == 2 and found[1, 2] == 1 and not found[2].any()


def drafted(temperature):
  """(drafter, row, its first draft): the text said 4 or 5 behind "1 2"."""
  target = S.sampler(S.ar(), temperature=temperature)
  drafter = stand.Stand(paths=PATHS, longest=2, top=2).bind(target)
  row = sampling.prompt_row([[1, 2, 4, 1, 2]] * 64, S.N, S.N)
  memory = drafter.start(None, None, row, None)
  said = jnp.log(jnp.array([0.6, 0.4]))
  memory = memory.replace(ids=memory.ids.at[:, 1].set(jnp.array([4, 5])), logp=memory.logp.at[:, 1].set(said))
  keys = tuple(jax.random.bits(k, (64,)) for k in jax.random.split(KEY))
  none = jnp.zeros((64,), bool)
  context = speculate.Context(row, jnp.full((64,), 5), none, none, jnp.zeros((64, 1)), keys, None)
  return jax.jit(lambda: drafter.draft(None, None, context, memory)[0])()


@pytest.mark.full
def test_a_tree_is_drawn_from_them():
  """Both candidates behind the match, in the order of their draw; behind the certain token its certain one."""
  best = np.asarray(drafted(0.0).tokens)  # nodes (0), (1), (0, 0), (1, 0), (1, 1)
  np.testing.assert_array_equal(best[:, :3], np.tile([4, 5, 1], (64, 1)))
  assert (best[:, 4] == -1).all()  # the text has said nothing behind "2 5"
  out = drafted(1.0)
  tokens, (ids, logq) = np.asarray(out.tokens), out.logits
  assert {tuple(x) for x in tokens[:, :2]} == {(4, 5), (5, 4)}
  assert 0.4 < (tokens[:, 0] == 4).mean() < 0.8
  np.testing.assert_allclose(np.exp(np.asarray(logq[:, 0])).sum(1), 1, rtol=1e-5)
  assert ids.shape[:2] == (64, 6)


@pytest.mark.full
def test_ids_and_law():
  """T19 and T20, through the loop: greedy ids, and with drawn trees the target's law."""
  target, want = T.plain(temperature=0.0)
  T.assert_same(speculate.build(target, stand.Stand(paths=PATHS))(S.params(), S.row(), KEY), want)
  model, params, _ = T.toy()
  made = sampling.build({"eos": -2, "forbid": (T.V,)}, S.ar(), model)
  drafter = stand.Stand(paths=((0,), (1,), (0, 0)), longest=1, top=3)
  sampler = speculate.build(made, drafter)
  assert type(sampler.rule) is verify.Recursive
  p, result = T.judged(sampler, params, 1 << 15)
  assert p > 1e-3 and 0.1 < float(result.memory["accepted"].sum() / result.memory["drafted"].sum()) < 0.95


def test_what_does_not_fit_is_refused():
  with pytest.raises(ValueError, match="drawn in turn"):
    stand.Stand(paths=((0,), (2,)))
  assert stand.Stand().tree.nodes == 29 and stand.Stand().size == 4
  with pytest.raises(ConfigError, match="without replacement"):
    S.sampler(S.ar(), draft="ngram", verify="recursive")
  with pytest.raises(ConfigError, match="no independent draws"):
    S.sampler(S.ar(), draft="stand", verify="rejection")
