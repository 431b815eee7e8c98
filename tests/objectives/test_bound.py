"""Every Monte-Carlo loss against the closed form of the negative ELBO."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels.contracts import token_row
from genmodels.objectives import Nets, Objective
from tests.objectives import table_net as tn

X = np.array([2, 0, 1, 1])
DRAWS = 20000


def objective(block=0, weight="nelbo", **corruption) -> Objective:
  two = block not in (0, tn.L)
  return Objective(
    corruption={
      "kind": "absorb",
      "blocks": {"size": block},
      "unit": "block" if block else "doc",
      **corruption,
    },
    layout={"kind": "streams", "streams": ("n", "c") if two else ("n",)},
    masks={"full": "bd3" if two else "full"},
    terms={"diffusion": {"stream": "n", "on": "hit", "weight": weight}},
    mask_id=tn.MASK,
  )


def estimates(obj, table, block) -> np.ndarray:
  """DRAWS independent one-draw estimates of the bound of X, float64[DRAWS]."""
  row = token_row(np.tile(X, (DRAWS, 1)))
  nets = Nets({"model": tn.net(table, block or tn.L)})

  @jax.jit
  def run(row):
    _, _, metrics = obj.run(nets, row, jax.random.key(0), 7)
    return metrics["per_token"]["diffusion"].sum(1)

  return np.asarray(run(row), np.float64)


@pytest.mark.parametrize("block", [0, 2, 1])
@pytest.mark.parametrize(
  "kind",
  [
    {"count": "exact", "schedule": "linear"},
    {"count": "exact", "schedule": "cosine"},
    {"count": "bernoulli", "schedule": "linear", "time": "uniform"},
    {"count": "bernoulli", "schedule": "loglinear", "eps": 1e-6},
    {"count": "bernoulli", "schedule": "cosine"},
  ],
  ids=lambda k: "-".join(str(v) for v in k.values()),
)
def test_loss_is_the_bound(kind, block):
  table = tn.random_table(1)
  got = estimates(objective(block, **kind), table, block)
  want = tn.closed_form(X, table, block or tn.L)
  assert abs(got.mean() - want) < 3.5 * got.std() / math.sqrt(DRAWS) + 1e-5


def test_rounded_counts_are_biased():
  """round(t·n) over-weights one masked token and halves the all-masked event: it must show."""
  table = tn.random_table(1)
  got = estimates(objective(count="round"), table, 0)
  want = tn.closed_form(X, table, tn.L)
  assert abs(got.mean() - want) > 6 * got.std() / math.sqrt(DRAWS)


def test_exact_counts_enumerated():
  """Masks are uniform given their size, sizes uniform, weights n/k; so the expectation is exact."""
  obj = objective()
  noise = obj.corruption.draw(token_row(np.tile(X, (DRAWS, 1))), jax.random.key(1), 0)
  hit, w = np.asarray(noise.hit[:, 0]), np.asarray(noise.nelbo[:, 0], np.float64)
  k = hit.sum(1)
  np.testing.assert_allclose(w, (tn.L / k)[:, None] * np.ones(tn.L), rtol=1e-6)
  np.testing.assert_allclose(np.asarray(noise.marginal[:, 0]), (k / tn.L)[:, None] * np.ones(tn.L), rtol=1e-6)
  pattern, count = np.unique(hit @ (1 << np.arange(tn.L)), return_counts=True)
  size = np.array([bin(p).count("1") for p in pattern])
  want = DRAWS / tn.L / np.array([math.comb(tn.L, s) for s in size])
  assert len(pattern) == 2**tn.L - 1
  chi = ((count - want) ** 2 / want).sum()
  assert chi < 36.1  # 14 degrees of freedom, p = 1e-3
  table = tn.random_table(2).astype(np.float64)
  enumerated = 0.0
  for m in range(1, tn.L + 1):
    for M in itertools.combinations(range(tn.L), m):
      ids = np.where(np.isin(np.arange(tn.L), M), tn.MASK, X)
      ce = -sum(table[tn.index(ids), i, X[i]] for i in M)
      enumerated += (1 / tn.L) / math.comb(tn.L, m) * (tn.L / m) * ce
  assert abs(enumerated - tn.closed_form(X, table, tn.L)) < 1e-9


@pytest.mark.parametrize("block", [1, 2, 4])
def test_oracle_denoiser_reaches_the_entropy(block):
  """With the true conditionals the bound is −log p(x) in expectation, whatever the block size (T2)."""
  joint = tn.random_joint(3)
  table = tn.oracle_table(joint)
  expected = sum(
    joint[x] * tn.closed_form(np.array(x), table, block) for x in itertools.product(range(tn.V), repeat=tn.L)
  )
  entropy = -(joint * np.log(np.maximum(joint, 1e-300))).sum()
  assert abs(expected - entropy) < 1e-9


@pytest.mark.parametrize("block", [1, 2, 4])
def test_bound_is_above_the_sampler(block):
  """NELBO ≥ −log E_σ Π p(x_σj | ·), equality at block size 1, where it is the AR likelihood (T3)."""
  table = tn.random_table(4).astype(np.float64)
  log_p = 0.0
  for start in range(0, tn.L, block):
    unit = list(range(start, start + block))
    paths = []
    for order in itertools.permutations(unit):
      ids = np.where(np.arange(tn.L) < start, X, tn.MASK)
      logp = 0.0
      for i in order:
        logp += table[tn.index(ids), i, X[i]]
        ids = np.where(np.arange(tn.L) == i, X, ids)
      paths.append(logp)
    log_p += np.log(np.mean(np.exp(paths)))
  bound = tn.closed_form(X, table, block)
  if block == 1:
    assert abs(bound + log_p) < 1e-9
  else:
    assert bound > -log_p + 1e-3


def test_bound_draws_average_to_the_closed_form():
  """`bound` stratifies the count over its R draws: with R = n each count appears once (per document)."""
  obj = objective(band=(0.4, 0.6), count="bernoulli")  # clipped in training: the bound must not be
  table = tn.random_table(5)
  row = token_row(np.tile(X, (4000, 1)))
  nets = Nets({"model": tn.net(table, tn.L)})
  one = jax.jit(lambda r: obj.bound(nets, row, jax.random.key(0), r, tn.L))
  draws = [one(jnp.int32(r)) for r in range(tn.L)]
  got = np.mean([np.asarray(d[0], np.float64)[:, 0] for d in draws], 0)
  assert abs(got.mean() - tn.closed_form(X, table, tn.L)) < 3.5 * got.std() / math.sqrt(4000)
  assert float(draws[0][1][0, 0]) == tn.L
  sizes = []
  for r in range(tn.L):
    noise = obj.corruption.draw(row, jax.random.key(0), 0, bound=(r, tn.L))
    sizes.append(np.asarray(noise.hit.sum((1, 2))))
  np.testing.assert_array_equal(np.sort(np.stack(sizes), 0), np.arange(1, 5)[:, None] * np.ones((1, 4000)))


def test_stratified_levels_cover_the_batch():
  """One level per bin of the global batch, uniform inside (T13); blocks of a document are equispaced."""
  row = token_row(np.zeros((64, 8)))
  noise = objective().corruption.draw(row, jax.random.key(2), 3)
  t = np.asarray(noise.level[:, 0, 0])
  np.testing.assert_array_equal(np.sort(np.floor(t * 64)), np.arange(64))
  noise = objective(2).corruption.draw(row, jax.random.key(2), 3)
  t = np.sort(np.asarray(noise.level[:, 0, ::2]), 1)
  np.testing.assert_allclose(np.diff(t, axis=1), 0.25, atol=1e-5)


def test_complement_covers_each_token_once():
  """A complementary pair is a partition of the maskable tokens (T14)."""
  role = np.ones((8, 16), np.int32)
  role[:, 0] = 0
  row = token_row(np.zeros((8, 16)), role=role)
  obj = objective(4, complement=True)
  hit = np.asarray(obj.corruption.draw(row, jax.random.key(2), 3).hit)
  np.testing.assert_array_equal(hit.sum(1), role)


def test_monotone_levels():
  from genmodels.corruption import MonotoneAbsorb

  c = MonotoneAbsorb(blocks=tn_blocks(4))
  row = token_row(np.zeros((32, 32)), doc=np.repeat([[0, 1]], 16, 1).repeat(32, 0), capacity=2)
  t = np.asarray(c.draw(row, jax.random.key(0), 0).level[:, 0])
  for half in (t[:, :16], t[:, 16:]):
    assert np.all(np.diff(half, axis=1) >= -1e-6) and np.any(np.diff(half, axis=1) > 0.01)
  assert t.min() >= 0.2 and t.max() <= 0.7 + 1e-6
  assert not np.allclose(t[:, 0], t[:, 16])  # each document starts anew


def tn_blocks(size):
  from genmodels.corruption import Blocks

  return Blocks(size=size)
