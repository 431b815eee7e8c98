"""Acceptance rules, enumerated (language.md §8.2, T20), and the walk against a loop in Python."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels.sampling import draw, verify


def laws(seed=0, n=6, V=5):
  """Random p, q float64[n, V]: the last rows have zeros, disjoint supports, p = q, one-hot q."""
  rng = np.random.default_rng(seed)
  p, q = rng.dirichlet(np.full(V, 0.7), n), rng.dirichlet(np.full(V, 0.7), n)
  p[-4, :2], q[-4, 1:3] = 0, 0
  p[-3], q[-3] = [0.5, 0.5, 0, 0, 0], [0, 0, 0.2, 0.3, 0.5]
  q[-2] = p[-2]
  q[-1] = np.eye(V)[2]
  return p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)


def law_of(accept, after, q, k):
  """Law of k drafts of q tried in turn, by enumeration of all k-tuples: float64[V]."""
  V = len(q)
  out = np.zeros(V)
  for drafts in itertools.product(range(V), repeat=k):
    left = np.prod([q[x] for x in drafts])
    for x in drafts:
      out[x] += left * accept[x]
      left *= 1 - accept[x]
    out += left * after
  return out


def enumerated(k, wrong=""):
  """max |law − p| over the cases, with the code's own probabilities in float64."""
  p, q = laws()
  with jax.enable_x64(True):
    p_, q_ = jnp.asarray(p), jnp.asarray(q)
    every = jnp.broadcast_to(jnp.arange(p.shape[1]), p.shape)
    rho = verify.solve_rho(p_, q_, k)
    accept = verify.accept_probability(p_, q_, every, rho[:, None])
    after = verify.kseq_residual(p_, q_, rho, k)
    assert after.dtype == jnp.float64
    if wrong == "inverted":
      accept = verify.accept_probability(q_, p_, every)
    if wrong == "residual":
      after = p_
    if wrong == "rho":
      accept = verify.accept_probability(p_, q_, every)
  cases = zip(np.asarray(accept), np.asarray(after), p, q)
  return max(np.abs(law_of(a, r, q, k) - p).max() for a, r, p, q in cases)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_law_is_the_targets(k):
  assert enumerated(k) < 1e-12
  # Negative controls: the ratio upside down, a residual of p itself, k drafts tried as if each were the only one.
  assert enumerated(k, "inverted") > 1e-2 and enumerated(k, "residual") > 1e-2
  assert k == 1 or enumerated(k, "rho") > 1e-2


def without_replacement(p, q, C, wrong=False):
  """Law of C candidates of q without replacement tried in turn, by enumeration: float64[V]."""
  drafts = np.array(list(itertools.permutations(range(len(p)), C)))
  drawn, left = np.ones(len(drafts)), np.ones(len(drafts))
  for x in drafts.T:
    drawn = drawn * np.divide(q[x], left, out=np.zeros(len(x)), where=left > 1e-15)
    left = left - q[x]
  wide = lambda x: jnp.broadcast_to(jnp.asarray(x), (len(drafts), len(x)))
  if wrong:  # each candidate as if it were the only one
    accept = [verify.recursive(wide(p), wide(q), drafts[:, i : i + 1])[0][0] for i in range(C)]
    after = verify.residual(wide(p), wide(q))
  else:
    accept, laws_ = verify.recursive(wide(p), wide(q), jnp.asarray(drafts))
    after = laws_[-1]
  out = np.zeros(len(p))
  for x, a in zip(drafts.T, np.asarray(accept)):
    np.add.at(out, x, drawn * a)
    drawn = drawn * (1 - a)
  return out + drawn @ np.asarray(after)


@pytest.mark.parametrize("C", [3, *(pytest.param(c, marks=pytest.mark.full) for c in (1, 2))])
def test_children_without_replacement_keep_the_law(C):
  """T20 for the children of a node; as if each were the only draw, the law is another."""
  with jax.enable_x64(True):
    for p, q in zip(*four()):
      if (q > 0).sum() >= C:
        assert np.abs(without_replacement(p, q, C) - p).max() < 1e-12
    p, q = (x[0] for x in four())
    assert C == 1 or np.abs(without_replacement(p, q, C, wrong=True) - p).max() > 1e-2


def four():
  """p, q float64[4, 4]: random ones, p = q, disjoint supports."""
  rng = np.random.default_rng(3)
  p, q = rng.dirichlet(np.full(4, 0.7), 4), rng.dirichlet(np.full(4, 0.7), 4)
  q[2] = p[2]
  p[3], q[3] = [0.4, 0.6, 0, 0], [0, 0, 0.3, 0.7]
  return p, q


def test_acceptance():
  """One draft is accepted with 1 − TV(p, q); k drafts with 1 − (1 − β)^k = ρβ, the more the better."""
  p, q = laws()
  with jax.enable_x64(True):
    p_, q_ = jnp.asarray(p), jnp.asarray(q)
    rates = []
    for k in (1, 2, 4):
      rho = verify.solve_rho(p_, q_, k, 60)
      beta = verify.overlap(p_, q_, rho)
      rates.append(np.asarray(verify.one_of(beta, k)))
      np.testing.assert_allclose(rates[-1], rho * beta, atol=1e-12)
      assert (rho >= 1).all() and (rho <= k).all()
  np.testing.assert_allclose(rates[0], 1 - 0.5 * np.abs(p - q).sum(1), atol=1e-12)
  some = rates[0] < 1 - 1e-9
  some[-3] = some[-1] = False  # disjoint, or all drafts equal: k of them are no better
  assert (rates[2][some] > rates[1][some]).all() and (rates[1][some] > rates[0][some]).all()


def test_rejection_in_float32():
  """The rule as the loop calls it: verdicts of every token and many keys have the law of the target."""
  V, n, R = 4, 1 << 15, 2
  rng = np.random.default_rng(3)
  z, q = (jnp.asarray(rng.normal(size=(V,)) * 1.5, jnp.float32) for _ in range(2))
  choice = draw.Choice(temperature=0.7, top_k=3)
  p = np.asarray(choice.law(z[None])[0])
  assert (p == 0).sum() == 1

  @jax.jit
  def run(rule_q, k0):
    wide = lambda x: jnp.broadcast_to(x, (n, V))
    drafts = jax.random.categorical(jax.random.key(1), q, shape=(n, R)).astype(jnp.int32)
    found = verify.Rejection()(choice, wide(z), drafts, wide(rule_q), k0, k0 ^ 77)
    u = jax.random.uniform(jax.random.key(2), (n, 2, R))
    verdict = jax.tree.map(lambda x: jnp.broadcast_to(x[:, None], (n, 3, *x.shape[1:])), found)
    out = verify.walk(verdict, drafts[:, :, None], jnp.ones((n, R), jnp.int32), u, jnp.ones((n, 2), bool))
    return out.tokens[:, 0], out.accepted

  keys = jnp.arange(n, dtype=jnp.uint32)
  tv = lambda tokens: 0.5 * np.abs(np.bincount(np.asarray(tokens), minlength=V) / n - p).sum()
  tokens, accepted = run(q, keys)
  assert tv(tokens) < 0.01 and 0.2 < np.asarray(accepted).mean() < 1
  # Negative control: the drafter lies about its law.
  assert tv(run(-q, keys)[0]) > 0.02


def test_match_is_the_targets_own_draw():
  z = jax.random.normal(jax.random.key(0), (64, 6))
  k0, k1 = jnp.arange(64, dtype=jnp.uint32), jnp.ones((64,), jnp.uint32)
  drafts = jax.random.randint(jax.random.key(1), (64, 2), 0, 6)
  for temperature in (0.0, 1.0):
    choice = draw.Choice(temperature)
    found = jax.jit(functools.partial(verify.Match(), choice))(z, drafts, None, k0, k1)
    want = np.asarray(jax.jit(choice)(z, k0, k1).token)
    assert (np.asarray(found.token) == want[:, None]).all()
    np.testing.assert_array_equal(found.accept[:, 1], np.asarray(drafts) == want[:, None])
  assert (want != np.asarray(z.argmax(-1))).any()
  # One-hot q: the draft is accepted with its probability, the residual never gives it again.
  law = np.asarray(choice.law(z))
  found = jax.jit(functools.partial(verify.Rejection(), choice))(z, drafts[:, :1], None, k0, k1)
  np.testing.assert_allclose(found.accept[:, 0, 0], law[np.arange(64), drafts[:, 0]], rtol=1e-6)
  assert (np.asarray(found.token[:, 1]) != np.asarray(drafts[:, 0])).all()


def test_typical_acceptance_is_not_exact():
  p = jnp.array([[0.5, 0.3, 0.2], [0.98, 0.01, 0.01]])
  every = jnp.broadcast_to(jnp.arange(3), (2, 3))
  np.testing.assert_array_equal(
    verify.typical(p, every, 0.3, 0.09), [[True, True, True], [True, False, False]]
  )
  np.testing.assert_array_equal(
    verify.typical(p, every, 0.3, 10.0), [[True, False, False], [True, False, False]]
  )
  assert not verify.Typical.exact and verify.Match.exact and verify.Rejection.exact
  q = np.array([0.2, 0.2, 0.6])
  got = law_of(np.asarray(verify.typical(p[:1], every[:1], 0.3, 0.09)[0], float), np.asarray(p[0]), q, 1)
  assert np.abs(got - np.asarray(p[0])).max() > 0.1


def test_the_walk():
  """Against the same in plain Python, on random verdicts."""
  B, R, K = 80, 3, 3
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 2, (B, R, K))
  count = rng.integers(0, K + 1, (B, R))
  accept = rng.uniform(size=(B, 1 + R * K, R, R)).astype(np.float32) ** 0.3
  own = rng.integers(2, 9, (B, 1 + R * K, R + 1))
  u = rng.uniform(size=(B, K + 1, R)).astype(np.float32)
  places = rng.integers(0, K + 2, B)
  can = np.arange(K + 1) < places[:, None]
  arrays = [jnp.asarray(x) for x in (accept, own, tokens, count, u, can)]
  got = jax.jit(lambda a, t, *rest: verify.walk(verify.Verdict(a, t), *rest))(*arrays)
  lengths = set()
  for b in range(B):
    live, chain, out, hits = set(range(R)), 0, [], 0
    for i in range(places[b]):
      node = 0 if i == 0 else chain * K + i
      now = [r for r in sorted(live) if i < count[b, r]]
      ok = [r for r in now if u[b, i, r] < accept[b, node, len(now) - 1, r]] if now else []
      if not ok:
        out.append(own[b, node, len(now)])
        break
      out.append(tokens[b, ok[0], i])
      live = {r for r in now if tokens[b, r, i] == out[-1]}
      chain, hits = min(live), hits + 1
    lengths.add(hits)
    assert int(got.accepted[b]) == hits and int(got.chain[b]) == chain
    np.testing.assert_array_equal(np.asarray(got.taken[b]), np.arange(K + 1) < len(out))
    np.testing.assert_array_equal(np.asarray(got.tokens[b, : len(out)]), out)
  assert lengths == {0, 1, 2, 3}
