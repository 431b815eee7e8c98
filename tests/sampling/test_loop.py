"""Quotas, order, stopping, guidance and determinism of the loop (language.md T22, T23; vision.md 8, 18)."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import sampling
from genmodels.contracts import CONTEXT
from genmodels.objectives import Objective
from genmodels.parallel import mesh as meshes
from genmodels.parallel import rules
from tests.sampling import systems as S
from tests.sampling import table_model as T

ROWS = 1 << 15


@functools.cache
def tabled(quota, steps=0, schedule="linear", reuse=True):
  """ROWS samples of the table model from all masks: the Result, and the table."""
  table = T.random_table(1)
  objective = dataclasses.replace(S.mdm(schedule=schedule), mask_id=T.V)
  section = {"kind": quota} | ({"steps": steps, "reuse": reuse} if steps else {})
  sampler = sampling.build({"quota": section, "eos": -2}, objective, T.TableModel(table))
  row = sampling.prompt_row([[]] * ROWS, T.L, T.L)
  return jax.tree.map(np.asarray, sampler({}, row, jax.random.key(7))), table


def law(result):
  index = (result.tokens * T.V ** np.arange(T.L)[::-1]).sum(1)
  return np.bincount(index, minlength=T.V**T.L).reshape((T.V,) * T.L) / ROWS


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.slow
def test_first_hitting_is_the_limit_of_ancestral_sampling(schedule):
  """T22: both have the law of revealing in uniformly random order, and at time s each token is open with
  probability p(s) of its own: the number committed is binomial."""
  first, table = tabled("first_hitting", schedule=schedule)
  many, _ = tabled("ancestral", 256, schedule)
  exact = T.uniform_order_law(table)
  tv = lambda a, b: 0.5 * np.abs(a - b).sum()
  assert tv(law(first), exact) < 0.01
  assert tv(law(many), exact) < 0.01 and tv(law(first), law(many)) < 0.015
  for s in (0.2, 0.5, 0.8):
    p = s if schedule == "linear" else math.cos(math.pi * (1 - s) / 2)
    want = np.array([math.comb(T.L, k) * (1 - p) ** k * p ** (T.L - k) for k in range(T.L + 1)])
    for result in (first, many):
      count = np.bincount((result.level_at >= s).sum(1), minlength=T.L + 1) / ROWS
      assert tv(count, want) < 0.012
  # Negative control: a few steps commit several tokens at once, which the law shows.
  few, _ = tabled("ancestral", 2, schedule)
  assert tv(law(few), exact) > 0.02


def test_ancestral_reuse_changes_nothing_but_the_work():
  row, key = S.row(), jax.random.key(3)
  make = lambda reuse: S.sampler(S.mdm(), quota={"kind": "ancestral", "steps": 40, "reuse": reuse})(
    S.params(), row, key
  )
  kept, again = make(True), make(False)
  np.testing.assert_array_equal(kept.tokens, again.tokens)
  np.testing.assert_array_equal(kept.committed_at, again.committed_at)
  assert int(again.forwards) == int(again.steps)
  changes = len(set(np.asarray(kept.committed_at)[np.asarray(kept.committed_at) >= 0].tolist()))
  # One forward for each step at which some row changed, minus what follows the last change, plus the first.
  assert int(kept.forwards) <= changes + 1 and int(kept.forwards) < int(again.forwards)


def select(quota, size, score=None):
  """Numbers of tokens committed step by step, and the order (token indices)."""
  can, counts, order, k = np.ones((1, size), bool), [], [], 0
  score = np.linspace(0.1, 0.9, size)[None] if score is None else score
  level = np.ones(1, np.float32)
  while can.any():
    u = np.random.default_rng(k).uniform(size=size + 1).astype(np.float32)
    unit = sampling.quota.Unit(
      can=jnp.asarray(can),
      at=jnp.arange(size)[None],
      score=jnp.asarray(score, jnp.float32),
      rank=jnp.asarray(score, jnp.float32),
      least=jnp.array([1]),
      k=jnp.array([k]),
      size=jnp.array([size]),
      level=jnp.asarray(level),
      token_u=jnp.asarray(u[None, :-1]),
      row_u=jnp.asarray(u[-1:]),
    )
    commit, level = map(np.asarray, quota.select(unit))
    assert not (commit & ~can).any()
    counts.append(int(commit.sum()))
    order += np.nonzero(commit[0])[0].tolist()
    can, k = can & ~commit, k + 1
    assert k <= quota.bound(size)
  return counts, order


def test_quota_counts():
  q = sampling.quota
  assert select(q.Linear(steps=4), 10)[0] == [3, 3, 2, 2]  # the remainder first
  assert select(q.Linear(steps=16), 3)[0] == [1, 1, 1]
  cosine = select(q.Cosine(steps=8), 64)[0]
  stay = [64 - sum(cosine[: i + 1]) for i in range(8)]
  assert (
    stay[:-1] == [math.floor(64 * math.cos(math.pi / 2 * (i + 1) / 8)) for i in range(7)] and stay[-1] == 0
  )
  assert min(select(q.Cosine(steps=30), 8)[0]) >= 1
  assert select(q.All(), 5)[0] == [5]
  assert sum(select(q.Ancestral(steps=6, schedule="linear"), 20)[0]) == 20
  assert select(q.Threshold(tau=0.5), 9)[1][:4] == [5, 6, 7, 8]
  assert select(q.Linear(steps=3), 3)[1] == [2, 1, 0]  # the surest first
  assert select(q.Linear(steps=2), 4, np.full((1, 4), 0.5))[1] == [0, 1, 2, 3]  # ties: the earlier


def test_threshold_one_commits_one_token_a_step():
  """T23."""
  sampler = S.sampler(S.mdm(), quota={"kind": "threshold", "tau": 1.0})
  result = sampler(S.params(), S.row(), jax.random.key(1))
  at = np.asarray(result.committed_at)
  for b in range(4):
    steps = np.sort(at[b][at[b] >= 0])
    np.testing.assert_array_equal(steps, np.arange(len(steps)))
  assert bool(result.done.all()) and (np.asarray(result.lengths) == S.N).all()
  assert (np.asarray(result.tokens)[:, : S.N] != S.MASK).all()
  # Given tokens stay.
  given = np.asarray(S.row().role) == CONTEXT
  np.testing.assert_array_equal(np.asarray(result.tokens)[given], np.asarray(S.row().tokens)[given])


@pytest.mark.parametrize(
  "name", ["bd", pytest.param("ar", marks=pytest.mark.slow), pytest.param("mdm", marks=pytest.mark.slow)]
)
def test_stopping_changes_no_committed_token(name):
  """T23: with an EOS, rows are what they are without one, up to and with the first EOS."""
  objective = {"bd": S.bd, "ar": S.ar, "mdm": S.mdm}[name]()
  row, key = S.row((1, 3, 6, 9)), jax.random.key(6)
  quota = {"kind": "linear", "steps": 2}
  free = S.sampler(objective, quota=quota)(S.params(), row, key)
  tokens = np.asarray(free.tokens)
  # An id that the free run produced early in some row, so that rows stop at different places.
  made = np.where(np.asarray(row.role) == CONTEXT, -1, tokens)
  eos = max(range(S.V), key=lambda v: sum((made[b] == v).any() for b in range(4)) - 0.01 * (made == v).sum())
  stopped = S.sampler(objective, quota=quota, eos=eos)(S.params(), row, key)
  assert bool(stopped.done.all())
  early = 0
  for b in range(4):
    where = np.nonzero(made[b] == eos)[0]
    n = where[0] + 1 if len(where) else S.N
    assert int(stopped.lengths[b]) == n
    np.testing.assert_array_equal(np.asarray(stopped.tokens)[b, :n], tokens[b, :n])
    np.testing.assert_array_equal(
      np.asarray(stopped.committed_at)[b, :n], np.asarray(free.committed_at)[b, :n]
    )
    early += n < S.N
  assert early and int(stopped.steps) <= int(free.steps)


def test_a_row_knows_no_batch():
  """Other rows, their order and the devices change nothing (vision.md 18)."""
  sampler = S.sampler(S.bd(), quota={"kind": "threshold", "tau": 0.5})
  lengths = (1, 3, 6, 9, 2, 5, 7, 8)
  row, key = S.row(lengths), jax.random.key(8)
  whole = np.asarray(sampler(S.params(), row, key, prefill=8).tokens)
  order = np.random.default_rng(0).permutation(8)
  shuffled = jax.tree.map(lambda x: x[order], row)
  np.testing.assert_array_equal(
    np.asarray(sampler(S.params(), shuffled, key, prefill=8).tokens), whole[order]
  )
  mesh = meshes.make_mesh(meshes.MeshConfig(data=4, fsdp=2), jax.devices()[:8])
  with rules.use_mesh(mesh):
    spread = sampler(S.params(), row, key, prefill=8)
  np.testing.assert_array_equal(np.asarray(spread.tokens), whole)
  # Negative control: the identity of a row is what keys its draws.
  other = row.replace(docs=dataclasses.replace(row.docs, example_id=row.docs.example_id + 17))
  assert (np.asarray(sampler(S.params(), other, key, prefill=8).tokens) != whole).any()


@dataclasses.dataclass(frozen=True)
class Conditional(Objective):
  """Next-token model whose condition is the given tokens: dropped, they all look alike."""

  def shown(self, row, noise, slots):
    ids = super().shown(row, noise, slots)
    given = jnp.take_along_axis(row.role, jnp.maximum(slots.src, 0), 1) == CONTEXT
    return ids if noise.drop is None else jnp.where(given & noise.drop[:, :1], 0, ids)


def test_guidance():
  """s = 1 is the conditional branch in one pass, s = 0 the unconditional one (vision.md §1.1)."""
  objective = Conditional(terms={"text": {"align": "shift"}})
  row, key = S.row((4, 2)), jax.random.key(9)
  run = lambda o, r, **kw: S.sampler(o, temperature=0.8, **kw)(S.params(), r, key)
  plain = run(S.ar(), row)
  one = run(objective, row, guidance={"scale": 1.0, "schedule": "linear"})
  np.testing.assert_array_equal(one.tokens, plain.tokens)
  assert int(one.forwards) == int(plain.forwards)
  blind = row.replace(tokens=jnp.where(row.role == CONTEXT, 0, row.tokens))
  zero, uncond = run(objective, row, guidance=0.0), run(S.ar(), blind)
  new = np.asarray(row.role) != CONTEXT
  np.testing.assert_array_equal(np.asarray(zero.tokens)[new], np.asarray(uncond.tokens)[new])
  assert int(zero.forwards) == 2 * int(uncond.forwards)
  assert (np.asarray(zero.tokens)[new] != np.asarray(plain.tokens)[new]).any()  # the condition matters
  with pytest.warns(UserWarning, match="guidance has no effect"):
    S.sampler(S.ar(), guidance=2.0).check(row)


def test_guidance_schedules():
  r = jnp.array([0.0, 0.5, 1.0])
  g = lambda **kw: np.asarray(sampling.Guidance(scale=3.0, **kw)(r)).tolist()
  assert g() == [3, 3, 3]
  assert g(schedule="linear") == [1, 2, 3]
  np.testing.assert_allclose(g(schedule="cosine"), [1, 2, 3], atol=1e-6)
  assert g(interval=(0.25, 0.75)) == [1, 3, 1]
  assert g(interval=(0.5, 1.0)) == [1, 3, 3]
  with pytest.raises(ValueError, match="interval"):
    sampling.Guidance(interval=(0.5, 0.5))


def test_block_size_other_than_trained_warns():
  with pytest.warns(UserWarning, match="trained with blocks of 4"):
    S.sampler(S.bd(4), block=2)


def test_a_curriculum_is_sampled_at_its_step():
  size = {"kind": "steps", "values": (1, 4, 8), "at": (0, 10, 20)}
  objective = S.bd(size)
  at = lambda step: sampling.build({"eos": -2}, objective, S.model(), step=step).capacity
  assert [at(0), at(12), at(99)] == [1, 4, 8]
