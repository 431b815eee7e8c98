"""Remasking, stop rules and order in the loop, on a table for a model (language.md T22, T23, §4.4, §4.7, §4.8)."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import sampling
from genmodels.config import ConfigError
from tests.sampling import systems as S
from tests.sampling import table_model as T
from tests.sampling.test_loop import ROWS, law


@functools.cache
def table():
  return T.random_table(1)


def sampler(logp=None, **section):
  objective = dataclasses.replace(S.mdm(), mask_id=T.V)
  return sampling.build({"eos": -2, **section}, objective, T.TableModel(table() if logp is None else logp))


def run(rows=512, logp=None, **section):
  row = sampling.prompt_row([[]] * rows, T.L, T.L)
  made = sampler(logp, **section)
  return jax.tree.map(np.asarray, made({}, row, jax.random.key(7)))


def trajectory(steps, rows, **section):
  """committed bool[T, B, L] after each step, and the last state."""
  made, row, key = sampler(**section), sampling.prompt_row([[]] * rows, T.L, T.L), jax.random.key(3)

  def body(s, _):
    s = made.step({}, row, s, key)
    return s, s.committed

  state, committed = jax.jit(lambda: jax.lax.scan(body, made.start({}, row, 0), length=steps))()
  return np.asarray(committed), state


def test_remdm_in_the_loop():
  """The share of clean tokens at every step is α_s although tokens come and go (4σ); the last step leaves no
  token open, and a unit that is full in between goes on."""
  steps, rows = 8, 4096
  section = {
    "quota": {"kind": "ancestral", "steps": steps},
    "remask": {"kind": "remdm", "rule": "rescale", "eta": 1.0},
  }
  committed, state = trajectory(steps, rows, **section)
  alpha = (np.arange(steps) + 1) / steps
  sigma = np.sqrt(alpha * (1 - alpha) / (rows * T.L))
  assert (np.abs(committed.mean((1, 2)) - alpha) <= 4 * sigma + 1e-9).all()
  opened = (committed[:-1] & ~committed[1:]).sum((1, 2))
  assert opened.sum() > rows / 4 and (committed[:-1].all(2) & ~committed[1:].all(2)).any()
  assert bool(state.done.all()) and int(state.step) == steps


@pytest.mark.slow
def test_remdm_without_remasking_is_mdlm():
  """eta = 0: bit by bit, with the predictions reused or not."""
  quota = {"kind": "ancestral", "steps": 6}
  a, b = run(quota=quota), run(quota=quota, remask={"kind": "remdm", "eta": 0.0})
  np.testing.assert_array_equal(a.tokens, b.tokens)
  np.testing.assert_array_equal(a.committed_at, b.committed_at)


@pytest.mark.slow
def test_rcr_in_the_loop():
  """Clean tokens after step i are Σ_{j≤i} n_j in every row."""
  committed, state = trajectory(3, 256, quota={"kind": "linear", "steps": 3}, remask="rcr", temperature=2.0)
  np.testing.assert_array_equal(committed.sum(2), np.broadcast_to([[1], [2], [3]], (3, 256)))
  assert (committed[:-1] & ~committed[1:]).any() and bool(state.done.all())


@pytest.mark.slow
def test_gap_commits_the_rest():
  """Prophet: infinite thresholds are the baseline bit by bit; lower ones take fewer steps, and what was
  committed before stays (T23)."""
  quota = {"kind": "linear", "steps": 3}
  steps, last = [], run(quota=quota)
  for x in (math.inf, 1.15, 0.0):  # from the second step on: before the first one all rows are alike
    r = run(quota=quota, stop={"kind": "gap", "thresholds": (math.inf, x), "at": (0.0, 0.3)})
    steps.append(int(r.calls["denoise"].sum()))
    for b in range(64):
      early = last.committed_at[b] < r.committed_at[b].max()
      np.testing.assert_array_equal(r.tokens[b][early], last.tokens[b][early])
      np.testing.assert_array_equal(r.committed_at[b][early], last.committed_at[b][early])
    if x == math.inf:
      np.testing.assert_array_equal(r.tokens, last.tokens)
  assert steps[0] == 512 * 3 > steps[1] > steps[2] == 512 * 2
  assert (r.tokens_per_forward == 1.5).all()


def test_gap_stages_follow_the_progress():
  rule = sampling.stop.Gap(thresholds=(7.5, 5.0, 2.5))
  ask = dataclasses.make_dataclass("Ask", ["under"])(jnp.ones((4, 2), bool))
  picked = dataclasses.make_dataclass("Picked", ["gap"])(jnp.full((4, 2), 3.0))
  got = rule.flush(ask, picked, jnp.array([0.0, 0.4, 0.7, 1.0]))
  assert got.tolist() == [False, False, True, True]
  ask.under = jnp.array([[False, False], [True, False], [True, False], [False, False]])
  picked.gap = jnp.array([[9.0, 0.0]] * 4)
  assert rule.flush(ask, picked, jnp.zeros(4)).tolist() == [False, True, True, False]


@pytest.mark.slow
def test_convergence_is_measured_against_the_step_before():
  """tol = 0 is the baseline; a table that ignores its input has converged after two steps."""
  quota = {"kind": "linear", "steps": 3}
  still = np.broadcast_to(table()[-1], table().shape)
  free = run(logp=still, quota=quota)
  never = run(logp=still, quota=quota, stop={"kind": "converged", "tol": 0.0, "top": 2})
  np.testing.assert_array_equal(free.tokens, never.tokens)
  soon = run(logp=still, quota=quota, stop={"kind": "converged", "tol": 1e-4, "top": 2})
  assert (soon.calls["denoise"] == 2).all() and (free.calls["denoise"] == 3).all()
  np.testing.assert_array_equal(soon.committed_at.min(1), 0)


def test_partial_divergence_is_a_lower_bound():
  rng = np.random.default_rng(0)
  p, q = (rng.dirichlet(np.ones(6), 20).astype(np.float32) for _ in range(2))
  full = (p * np.log(p / q)).sum(1)
  for R in (1, 3, 6):
    ids = np.argsort(-q, 1)[:, :R]
    got = np.asarray(sampling.draw.kl_on(jnp.log(p), jnp.asarray(ids), jnp.take_along_axis(q, ids, 1)))
    assert (got <= full + 1e-5).all() and (got >= 0).all()
  np.testing.assert_allclose(got, full, atol=1e-5)
  assert np.isinf(sampling.draw.kl_on(jnp.log(p), jnp.asarray(ids), jnp.zeros((20, 6)))).all()


@pytest.mark.slow
def test_entropy_floor():
  """A floor below 0 is the baseline; rows of one token are cut, or drawn anew as often as allowed, with other
  draws."""
  quota, section = {"kind": "linear", "steps": 3}, {"kind": "entropy_floor", "window": 3}
  free = run(64, quota=quota)
  none = run(64, quota=quota, stop={**section, "floor": -1.0})
  np.testing.assert_array_equal(free.tokens, none.tokens)
  flat = np.array([len(set(t)) == 1 for t in free.tokens])
  assert 0 < flat.sum() < 64
  cut = run(64, quota=quota, stop={**section, "floor": 0.1, "then": "stop"})
  np.testing.assert_array_equal(cut.lengths, np.where(flat, 0, 3))
  np.testing.assert_array_equal(cut.tokens, free.tokens)
  again = run(64, quota=quota, stop={**section, "floor": 0.1, "tries": 8})
  tries = again.memory["entropy_floor"]["tries"]
  np.testing.assert_array_equal(tries > 0, flat)
  np.testing.assert_array_equal(again.tokens[~flat], free.tokens[~flat])
  assert all(len(set(t)) > 1 for t, n in zip(again.tokens, tries) if n < 8) and again.done.all()
  hopeless = np.log(np.broadcast_to([1 - 1e-6, 1e-6], table().shape))
  stuck = run(4, logp=hopeless, quota=quota, stop={**section, "floor": 0.1, "tries": 2})
  assert (stuck.memory["entropy_floor"]["tries"] == 2).all() and (stuck.lengths == 0).all()


@pytest.mark.slow
def test_random_counts_with_a_random_score_are_ancestral():
  """Eso-LM's binomial counts: the same law of the tokens (chi-square over all strings)."""
  r = run(ROWS, quota={"kind": "binomial", "steps": 3}, score="random")
  exact = run(ROWS, quota={"kind": "ancestral", "steps": 3})
  a, b = law(r).ravel() * ROWS, law(exact).ravel() * ROWS
  chi2 = ((a - b) ** 2 / (a + b)).sum()
  assert chi2 < 26.1  # 7 degrees of freedom, p = 5·10⁻⁴
  other = law(run(ROWS, quota={"kind": "binomial", "steps": 3}, score="prob", temperature=1.0)).ravel() * ROWS
  assert ((other - b) ** 2 / (other + b)).sum() > 60  # negative control: ranking changes it


@pytest.mark.parametrize(
  "section, key",
  [
    ({"quota": "threshold", "remask": "remdm"}, "remask"),
    ({"quota": "threshold", "remask": "rcr"}, "remask"),
    ({"quota": "ancestral", "remask": {"kind": "remdm", "rule": "loop"}}, "remask.rule"),
    ({"quota": "ancestral", "remask": {"kind": "remdm", "rule": "conf"}, "score": "random"}, "remask"),
    ({"quota": "ancestral", "remask": "remdm", "stop": "gap"}, "stop"),
    ({"quota": "linear", "remask": "rcr", "commit": "leftmost"}, "commit"),
    ({"quota": "first_hitting", "commit": "leftmost"}, "commit"),
    ({"quota": "factor", "score": "neg_entropy"}, "quota"),
    ({"quota": "entropy_budget"}, "quota"),
    ({"mix": "smooth"}, "mix"),
  ],
)
def test_plug_ins_that_do_not_fit_are_refused(section, key):
  with pytest.raises(ConfigError, match=f"sampler.{key}") as e:
    sampler(**section)
  assert e.value.fix


def test_remasking_ends_where_the_cache_begins():
  """A next-token model stores every token it commits; a pipeline stores while others are open."""
  with pytest.raises(ConfigError, match="nothing can be opened again"):
    S.sampler(S.ar(), quota="linear", remask="rcr")
  with pytest.raises(ConfigError, match="sampler.quota"):
    S.sampler(S.single_stream(), quota="linear", remask="rcr", active="pipeline")
