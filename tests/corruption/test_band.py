"""The band of masked shares: counts inside it, and the search that finds the one of least variance."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import config, corruption
from genmodels.contracts import token_row
from genmodels.corruption.base import eligible

KEY = jax.random.key(0)


def band(size, edges=(0.0, 1.0), **search):
  blocks = corruption.Blocks(size=size)
  return corruption.BandAbsorb(blocks=blocks, band=edges, search=corruption.Search(**search))


def row_of(length, B=64):
  return token_row(np.zeros((B, length), np.int32))


def shares(c, row, step):
  """Masked share of every block, and its weights."""
  noise = jax.jit(c.draw)(row, KEY, step)
  n = row.tokens.shape[1]
  size = int(c.blocks.size(0))
  hit = np.asarray(noise.hit[:, 0]).reshape(-1, n // size, size)
  return hit.mean(-1).reshape(-1), np.asarray(noise.nelbo[:, 0]), hit


@pytest.mark.parametrize(
  "size, edges, want", [(4, (0.45, 0.95), [0.5, 0.75]), (16, (0.3, 0.8), np.arange(5, 13) / 16)]
)
def test_counts_stay_inside_the_band(size, edges, want):
  share, nelbo, hit = shares(band(size, edges), row_of(64), 3)
  values, count = np.unique(share, return_counts=True)
  np.testing.assert_allclose(values, want)
  # Uniform over the counts inside; every place alike; the weight stays that of the bound, n/k.
  assert np.abs(count / count.sum() - 1 / len(want)).max() < 0.05
  assert np.abs(hit.mean((0, 1)) - np.mean(want)).max() < 0.06
  k = np.repeat(share, size).reshape(nelbo.shape) * size
  np.testing.assert_allclose(nelbo, size / k, rtol=1e-5)
  # Control: levels clipped by t alone reach beyond the band.
  plain = corruption.Absorb(unit="block", blocks=corruption.Blocks(size=size), band=edges)
  assert shares(plain, row_of(64), 3)[0].max() > edges[1]


def test_a_band_without_a_count_takes_the_nearest():
  share, _, _ = shares(band(4, (0.55, 0.7)), row_of(16), 0)
  assert set(share) == {0.5} or set(share) == {0.75}
  share, _, _ = shares(band(4, (1.0, 1.0)), row_of(16), 0)
  assert set(share) == {1.0}


def test_the_bound_ignores_the_band():
  row = row_of(16, B=4)
  clipped, plain = (
    band(4, (0.45, 0.95), every=5),
    corruption.Absorb(unit="block", blocks=corruption.Blocks(size=4)),
  )
  bound = clipped.bind({"band": jnp.asarray([0.7, 0.8])})
  for r in (0, 3):
    want = plain.draw(row, KEY, 0, bound=(r, 4))
    for c in (clipped, bound):
      jax.tree.map(np.testing.assert_array_equal, c.draw(row, KEY, 0, bound=(r, 4)), want)


def losses(noise, size, best):
  """Losses of tokens whose sum over a block varies least where the masked share lies in `best`."""
  share = noise.marginal[:, 0]
  inside = (share >= best[0]) & (share <= best[1])
  swing = jnp.where(inside, 0.1, 3.0) * jnp.where(jnp.arange(share.shape[1]) // size % 2 == 0, 1.0, -1.0)
  return jnp.where(noise.hit[:, 0], (5.0 + swing) * size / jnp.maximum(share * size, 1), 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("size, best", [(4, (0.45, 0.95)), (16, (0.3, 0.8))])
def test_planted_variance_is_found(size, best):
  c, row = band(size, every=100), row_of(64)
  stats = c.stats()
  np.testing.assert_array_equal(stats["band"], [0, 1])

  @jax.jit
  def search(planted):
    def one(r):
      noise = c.draw(row, KEY, 0, bound=(r, 8))
      return c.survey(row, noise, losses(noise, size, planted))

    sums = jax.tree.map(lambda x: x.sum(0), jax.lax.map(one, jnp.arange(8)))
    return c.update(stats, sums)["band"]

  found = np.asarray(search(jnp.asarray(best)))
  # Several intervals can hold the same counts; the planted counts are those that the found one holds.
  counts = np.arange(1, size + 1) / size
  holds = lambda edges: {k for k in counts if edges[0] - 1e-4 <= k <= edges[1] + 1e-4}
  assert holds(found) <= holds(best) and len(holds(found)) >= 2, found
  np.testing.assert_array_less(0.5 - 1e-6, found[1] - found[0])
  # Control: another plant, another band.
  other = np.asarray(search(jnp.asarray((0.05, 0.55))))
  assert holds(other) <= holds((0.05, 0.55)) and holds(other) != holds(found)
  # Training draws by what was found, and nothing was compiled for it.
  draw = jax.jit(lambda stats: c.bind(stats).draw(row, KEY, 1).marginal)
  for edges in (found, other):
    values = set(np.unique(np.asarray(draw({"band": jnp.asarray(edges)}))).round(4))
    assert values <= {round(k, 4) for k in holds(edges)}
  assert draw._cache_size() == 1


@pytest.mark.slow
def test_variances_are_those_of_the_blocks():
  """The sums against NumPy, with a prompt, padding and ragged blocks."""
  doc = np.repeat([0, 1, -1], (10, 7, 3))[None].repeat(3, 0)
  role = np.ones_like(doc)
  role[:, :3] = 0
  row = token_row(np.zeros_like(doc), doc, role=role, capacity=2)
  c = band(4, every=1)
  noise = c.draw(row, KEY, 0, bound=(1, 3))
  per_token = np.random.default_rng(0).normal(size=doc.shape).astype(np.float32)
  got = np.asarray(jax.jit(c.survey)(row, noise, per_token)["intervals"])
  ok, lo, hi, hit = (np.asarray(x) for x in (eligible(row), noise.blk_lo, noise.blk_hi, noise.hit[:, 0]))
  for (a, b), sums in zip(c.search.intervals(), got):
    want = np.zeros(3)
    for r in range(3):
      for start in np.unique(lo[r][doc[r] >= 0]):
        block = slice(start, hi[r, start])
        n = ok[r, block].sum()
        if n and a - 1e-4 <= (hit & ok)[r, block].sum() / n <= b + 1e-4:
          x = per_token[r, block].sum() / n
          want += 1, x, x * x
    np.testing.assert_allclose(sums, want, rtol=1e-4, atol=1e-5)
  # Nothing measured, nothing moved.
  stats = {"band": jnp.asarray([0.2, 0.9])}
  for sums in ({}, {"intervals": jnp.zeros((len(got), 3))}):
    np.testing.assert_array_equal(c.update(stats, sums)["band"], stats["band"])


def test_intervals_and_refusals():
  grid = corruption.Search(every=1).intervals()
  assert len(grid) == 11 + 9 + 7 + 5 + 3 and grid.min() == 0 and abs(grid.max() - 1) < 1e-6
  np.testing.assert_allclose(np.unique((grid[:, 1] - grid[:, 0]).round(4)), [0.5, 0.6, 0.7, 0.8, 0.9])
  with pytest.raises(ValueError, match="exact counts"):
    corruption.BandAbsorb(count="bernoulli")
  with pytest.raises(ValueError, match="one of them"):
    corruption.BandAbsorb(
      band=({"kind": "linear", "start": 0.0, "end": 0.4, "over": (0, 9)}, 1.0),
      search=corruption.Search(every=5),
    )
  found = config.load("language/bd3lm").objective.corruption
  built = config.build_kind(corruption.REGISTRY, found, "objective.corruption")
  assert built.search.every == 5000 and built.stats()["band"].tolist() == pytest.approx([0.45, 0.95])
  assert dataclasses.replace(built, search=corruption.Search()).stats() == {}
