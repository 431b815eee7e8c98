"""Quotas, scores, commit rules and remasking on one unit: counts and laws (language.md §4; T22, T23)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels.sampling import commit, draw, quota, remask


def unit(score, can=None, **kw):
  """A Unit of one row, all masked unless said otherwise."""
  score = np.atleast_2d(np.asarray(score, np.float32))
  B, M = score.shape
  can = np.ones((B, M), bool) if can is None else np.atleast_2d(np.asarray(can, bool))
  fields = {
    "can": can,
    "at": np.broadcast_to(np.arange(M, dtype=np.int32), (B, M)),
    "score": score,
    "rank": score,
    "least": np.ones(B, np.int32),
    "k": np.zeros(B, np.int32),
    "size": can.sum(1).astype(np.int32),
    "level": np.ones(B, np.float32),
    "token_u": np.full((B, M), 0.5, np.float32),
    "row_u": np.full(B, 0.5, np.float32),
  }
  return quota.Unit(**{k: jnp.asarray(v) for k, v in (fields | kw).items()})


PLACES = 32  # one shape for all sizes, so that a quota compiles once


def counts(q, size, u=lambda k: 0.5):
  """Tokens committed step by step in a unit of `size` masked tokens."""
  can, out, k = np.arange(PLACES) < size, [], 0
  step = jax.jit(q.select)
  while can.any():
    kw = {"k": np.array([k]), "size": np.array([size]), "row_u": np.array([u(k)], np.float32)}
    chosen = np.asarray(step(unit(np.zeros(PLACES), can, **kw))[0])[0]
    assert not (chosen & ~can).any() and k < q.bound(size)
    out.append(int(chosen.sum()))
    can, k = can & ~chosen, k + 1
  return out


def test_doubling_commits_everything_in_log_steps():
  """ASS: 2^i tokens, ⌊log₂ L⌋ steps, Σ quotas = L."""
  assert counts(quota.Doubling(), 8) == [1, 2, 5]
  assert counts(quota.Doubling(), 19) == [1, 2, 4, 12]
  for size in (1, 2, 3, 16, 31):
    got = counts(quota.Doubling(), size)
    assert sum(got) == size and len(got) == max(int(math.log2(size)), 1)


def test_shifted_time():
  """LaViDa: the shift fixes 0 and 1, alpha = 1 is the identity, alpha < 1 commits early."""
  r = jnp.linspace(0, 1, 9)
  for alpha in (1 / 3, 1.0, 3.0):
    masked = np.asarray(quota.Shifted(alpha=alpha).masked(r))
    np.testing.assert_allclose(masked[[0, -1]], [1, 0], atol=1e-6)
    assert (np.diff(masked) < 0).all()
  np.testing.assert_allclose(quota.Shifted(alpha=1.0).masked(r), 1 - r, atol=1e-6)
  assert counts(quota.Shifted(steps=4, alpha=1.0), 12) == [3, 3, 3, 3]
  assert counts(quota.Shifted(steps=4, alpha=1 / 3), 12) == [6, 3, 2, 1]
  assert counts(quota.Shifted(steps=9), 4) == [2, 1, 1]  # at least one
  with pytest.raises(ValueError, match="alpha"):
    quota.Shifted(alpha=0.0)


def test_share_is_dreams_rule():
  """⌊masked·(1 − s/t)⌋ on t = linspace(1, eps, T + 1), by hand; the released rule may commit nothing."""
  for steps, size in ((4, 10), (6, 6), (5, 3)):
    t, left, want = np.linspace(1, 1e-3, steps + 1), size, []
    for k in range(steps):
      n = left if k == steps - 1 else int(left * (1 - t[k + 1] / t[k]))
      want.append(n)
      left -= n
    got = counts(quota.Share(steps=steps, at_least=0), size)
    assert got == want[: len(got)] and sum(got) == size
  assert 0 in counts(quota.Share(steps=6, at_least=0), 6)
  assert min(counts(quota.Share(steps=6), 6)) >= 1


def test_random_sizes_are_compositions():
  """Every draw is a composition of the unit into at most `steps` parts, and the parts vary."""
  rng, q, seen = np.random.default_rng(0), quota.RandomSizes(steps=4), set()
  step = jax.jit(q.select)
  for _ in range(30):
    can, sizes = np.arange(PLACES) < 12, []
    for k in range(4):
      kw = {"k": np.array([k]), "size": np.array([12]), "row_u": rng.uniform(size=1).astype(np.float32)}
      chosen = np.asarray(step(unit(np.zeros(PLACES), can, **kw))[0])[0]
      can = can & ~chosen
      sizes.append(int(chosen.sum()))
    assert sum(sizes) == 12 and min(sizes) >= 1
    seen.add(tuple(sizes))
  first = [s[0] for s in seen]
  assert len(seen) > 15 and min(first) == 1 and max(first) >= 5


def test_factor_is_the_largest_n():
  """Fast-dLLM: the largest n with (n+1)(1 − p₍ₙ₎) < f, at least one; brute force."""
  rng = np.random.default_rng(1)
  for f in (0.3, 1.0, 2.0):
    for _ in range(10):
      p = rng.beta(5, 1, size=7)
      down = np.sort(p)[::-1]
      n = max([1] + [i + 1 for i in range(7) if (i + 2) * (1 - down[i]) < f])
      chosen = np.asarray(quota.Factor(f=f).select(unit(p))[0])[0]
      assert set(np.nonzero(chosen)[0]) == set(np.argsort(-p)[:n])
  can = np.array([1, 0, 1, 0, 0], bool)
  chosen = np.asarray(quota.Factor(f=9.0).select(unit(np.ones(5), can))[0])[0]
  np.testing.assert_array_equal(chosen, can)  # what is not masked counts for nothing


@pytest.mark.parametrize("rule", ["excess", "sum"])
def test_entropy_budget(rule):
  """Brute force of both rules, and at least one token whatever the budget."""
  rng = np.random.default_rng(2)
  for budget in (0.0, 0.35, 1.0):
    H = rng.gamma(1.0, 0.3, size=8)
    up = np.sort(H)
    if rule == "excess":
      n = max(k for k in range(1, 9) if k == 1 or up[:k].sum() - up[:k].max() <= budget)
    else:
      n = max(1, min(8, int(np.searchsorted(np.cumsum(up), budget)) + 1))
    chosen = np.asarray(quota.EntropyBudget(budget=budget, rule=rule).select(unit(-H))[0])[0]
    assert set(np.nonzero(chosen)[0]) == set(np.argsort(H)[:n])


def test_linear_ancestral_is_one_over_steps_left():
  """DiffuLLaMA's rule, 1/(t + 1) with t counting down, is ancestral sampling of the linear schedule."""
  q = quota.Ancestral(steps=7, schedule="linear")
  for k in range(7):
    t = 6 - k
    got = float(q.reveal(unit(np.zeros(3), k=np.array([k])))[0])
    assert got == pytest.approx(1 / (t + 1), rel=1e-5)
  cosine = quota.Ancestral(steps=7, schedule="cosine").reveal(unit(np.zeros(3), k=np.array([1])))
  assert abs(float(cosine[0]) - 1 / 6) > 0.05  # of no other schedule


def test_binomial_counts():
  """The number is that of ancestral sampling, the tokens are the best."""
  u = unit(np.linspace(0, 1, 8), token_u=np.linspace(0.05, 0.95, 8)[None], k=np.array([1]))
  chosen = np.asarray(quota.Binomial(steps=3, schedule="linear").select(u)[0])[0]
  count = int(quota.Ancestral(steps=3, schedule="linear").select(u)[0].sum())
  assert chosen.sum() == count == 4 and chosen[-4:].all()


def test_leftmost_commits_a_prefix():
  can = np.array([0, 1, 1, 0, 1, 1], bool)
  score = np.array([0, 0.95, 0.97, 0, 0.2, 0.99])
  rule = commit.Leftmost()
  u = rule.rank(unit(score, can))
  run = lambda q: np.nonzero(np.asarray(rule.select(u, q.select(u)[0]))[0])[0].tolist()
  assert run(quota.Threshold(tau=0.9)) == [1, 2]  # 5 lies behind a gap
  assert run(quota.Threshold(tau=1.0)) == [1]  # at least the first
  assert run(quota.Linear(steps=2)) == [1, 2]  # a count takes the first tokens, not the best
  assert run(quota.All()) == [1, 2, 4, 5]


@pytest.mark.parametrize("which", ["middle", "surest"])
def test_hierarchical_splits_long_runs(which):
  can = np.array([1, 1, 1, 1, 1, 0, 1, 1], bool)
  score = np.array([0.3, 0.2, 0.1, 0.6, 0.2, 0.9, 0.8, 0.1])
  rule = commit.Hierarchical(run=4, which=which)
  u = unit(score, can)
  none = jnp.zeros_like(u.can)
  extra = 2 if which == "middle" else 3
  assert np.nonzero(np.asarray(rule.select(u, none))[0])[0].tolist() == [extra]  # the short run is left alone
  high = commit.Hierarchical(run=4, which=which, floor=0.7)
  assert not np.asarray(high.select(u, none)).any()
  # Runs are halved: after ⌈log₂ n⌉ steps of it alone none of its length is left.
  size, steps = 33, 0
  can = np.ones(size, bool)
  step = jax.jit(rule.select)
  while max(map(len, "".join("x" if c else " " for c in can).split()), default=0) >= 4:
    can &= ~np.asarray(step(unit(np.full(size, 0.5), can), jnp.zeros((1, size), bool)))[0]
    steps += 1
    assert steps <= (6 if which == "middle" else size)


def test_scores_know_the_place():
  """γ = 1 and λ = 0 are the baseline bit by bit; γ scales EOS alone; the temperature keeps the score."""
  score = jnp.array([[0.9, 0.8, 0.7]])
  eos, d, half = jnp.array([[False, True, False]]), jnp.array([[0, 1, 2]]), jnp.array([0.5])
  plain = draw.Score()
  assert plain.adjust(score, eos, d, half) is score and plain.rank(score, score) is score
  np.testing.assert_allclose(
    draw.Score(eos=0.4).adjust(score, eos, d, half), [[0.9, 0.8 * 0.7, 0.7]], rtol=1e-6
  )
  np.testing.assert_allclose(draw.Score(eos=0.4).adjust(score, eos, d, jnp.array([1.0])), score)
  np.testing.assert_allclose(
    draw.Score(distance=0.1).adjust(score, eos, d, half), [[0.9, 0.7, 0.5]], rtol=1e-6
  )
  with pytest.raises(ValueError, match="eos"):
    draw.Score(kind="neg_entropy", eos=0.5)
  # Ranks are a draw with probability softmax(score/T), the first one at least.
  n, T = 4000, 0.3
  u = jnp.asarray(np.random.default_rng(0).uniform(size=(n, 3)), jnp.float32)
  first = np.asarray(jnp.argmax(draw.Score(temperature=T).rank(jnp.tile(score, (n, 1)), u), 1))
  want = np.exp(np.asarray(score[0]) / T)
  np.testing.assert_allclose(np.bincount(first, minlength=3) / n, want / want.sum(), atol=0.03)


@pytest.mark.parametrize("steps, size", [(3, 7), (4, 4)])
def test_rcr_clean_counts(steps, size):
  """After step i exactly Σ_{j≤i} n_j tokens are clean, and a sure candidate revokes an unsure token."""
  rng, q, rule = np.random.default_rng(3), quota.Linear(steps=steps), remask.RCR()
  revoked = 0
  for k in list(range(steps)) * 5:
    if k == 0:
      clean, conf, total = np.zeros(size, bool), np.full(size, -np.inf), 0
    u = unit(rng.uniform(size=size) + 0.3 * k, ~clean, k=np.array([k]), size=np.array([size]))
    chosen, _ = q.select(u)
    total += int(chosen.sum())
    held = jnp.asarray(clean[None])
    c = rule.confidence(u, held, jnp.asarray(conf[None], jnp.float32))
    put, opened = (np.asarray(x)[0] for x in rule.select(q, u, chosen, held, c, None))
    assert not (put & clean).any() and not (opened & ~clean).any()
    clean, conf, revoked = (clean | put) & ~opened, np.asarray(c)[0], revoked + opened.sum()
    assert clean.sum() == total and (k < steps - 1 or clean.all())
  assert revoked


def test_rcr_with_falling_confidence_is_the_plain_sampler():
  """Where no candidate is surer than what is committed, nothing is revoked."""
  q, rule = quota.Linear(steps=3), remask.RCR()
  u = unit([0.5, 0.1, 0.4, 0.0], [1, 1, 1, 0], k=np.array([1]), size=np.array([4]))
  chosen, held = q.select(u)[0], jnp.array([[False, False, False, True]])
  put, opened = rule.select(q, u, chosen, held, jnp.array([[0.5, 0.1, 0.4, 0.9]]), None)
  np.testing.assert_array_equal(put, chosen)
  assert not opened.any()


RULES = {
  "cap": ({"rule": "cap", "eta": 0.1}, {}),
  "rescale": ({"rule": "rescale", "eta": 0.7}, {}),
  "loop": ({"rule": "loop", "eta": 0.05}, {"hold": (0.55, 0.05, 0.9)}),
  "most": ({"rule": "rescale", "eta": 1.0}, {}),
}


@pytest.mark.parametrize("name", RULES)
def test_remdm_keeps_the_marginal(name):
  """P(clean at s) = α_s for every σ, exactly: the recursion of one token, step by step."""
  section, hold = RULES[name]
  for schedule in ("linear", "cosine"):
    q, rule = quota.Ancestral(steps=20, schedule=schedule, **hold), remask.ReMDM(**section)
    clean, opened = 0.0, 0.0
    for k in range(20):
      u = rule.prepare(q, unit(np.zeros(1), k=np.array([k])))
      sigma, reveal = float(u.sigma[0]), float(q.reveal(u)[0])
      assert 0 <= sigma <= 1 and -1e-6 <= reveal <= 1 + 1e-5
      opened += clean * sigma
      clean = clean * (1 - sigma) + (1 - clean) * reveal
      assert clean == pytest.approx(1 - float(q.times(u)[2][0]), abs=2e-5)
    assert clean == pytest.approx(1, abs=1e-5) and opened > 0.02
  # Negative control: without making up for it the share falls short.
  bare = unit(np.zeros(1), k=np.array([10]))
  q, rule = quota.Ancestral(steps=20, schedule="linear"), remask.ReMDM(rule="rescale", eta=0.7)
  sigma = float(rule.sigma(q, bare)[0])
  assert 0.5 * (1 - sigma) + 0.5 * float(q.reveal(bare)[0]) < 0.55 - 0.01


def test_remdm_by_confidence_opens_the_least_sure():
  q, rule = quota.Ancestral(steps=8, schedule="linear"), remask.ReMDM(rule="conf", eta=1.0)
  u = unit(np.zeros(3), [0, 0, 1], k=np.array([3]))
  held, conf = jnp.array([[True, True, False]]), jnp.array([[0.9, 0.2, 0.0]])
  most = float(rule.sigma(q, u)[0])
  w = np.exp([-0.9, -0.2])
  p = most * w / w.sum()
  for x in (0.999, 1.001):
    _, opened = rule.select(q, u, u.can, held, conf, jnp.asarray([[p[0] * x, p[1] * x, 0.0]], jnp.float32))
    np.testing.assert_array_equal(opened, [[x < 1, x < 1, False]])
