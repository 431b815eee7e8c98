"""Row geometry against loops."""

import jax.numpy as jnp
import numpy as np

from genmodels import rows

DOC = np.array([[0, 0, 0, 1, 1, 1, 1, 1, 2, -1, -1], [0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1]])


def test_doc_bounds():
  lo, hi = rows.doc_bounds(jnp.asarray(DOC))
  for b in range(2):
    for n in range(DOC.shape[1]):
      same = np.flatnonzero(DOC[b] == DOC[b, n])
      assert (lo[b, n], hi[b, n]) == (same[0], same[-1] + 1)


def test_block_bounds_restart_in_every_document_and_may_be_anchored():
  lo, hi = rows.doc_bounds(jnp.asarray(DOC))
  blo, bhi = rows.block_bounds(lo, hi, 2)
  assert blo[0].tolist() == [0, 0, 2, 3, 3, 5, 5, 7, 8, 9, 9]
  assert bhi[0].tolist() == [2, 2, 3, 5, 5, 7, 7, 8, 9, 11, 11]
  origin = lo + 1  # one prompt token: blocks are counted from the second token
  blo, bhi = rows.block_bounds(lo, hi, 2, origin)
  assert blo[0, :8].tolist() == [0, 1, 1, 3, 4, 4, 6, 6]


def test_counts_and_ranks_match_loops():
  rng = np.random.default_rng(0)
  flag = rng.random(DOC.shape) < 0.6
  score = rng.integers(0, 5, DOC.shape).astype(np.uint32)  # with ties
  lo, hi = rows.doc_bounds(jnp.asarray(DOC))
  count = rows.count_in(lo, hi, jnp.asarray(flag))
  total = rows.sum_in(lo, hi, jnp.asarray(score, jnp.float32))
  rank = rows.rank_in_unit(lo, jnp.asarray(score), jnp.asarray(flag))
  for b in range(2):
    for n in range(DOC.shape[1]):
      unit = range(int(lo[b, n]), int(hi[b, n]))
      assert count[b, n] == sum(flag[b, m] for m in unit)
      assert total[b, n] == sum(score[b, m] for m in unit)
      key = lambda m: (not flag[b, m], score[b, m], m)
      assert rank[b, n] == sum(key(m) < key(n) for m in unit)


def test_per_doc_and_of_doc_round_trip():
  value = jnp.asarray(np.random.default_rng(1).random(DOC.shape), jnp.float32)
  table = rows.per_doc(jnp.asarray(DOC), value, 4)
  assert table.shape == (2, 4) and float(table[1, 3]) == 0
  np.testing.assert_allclose(table[0, 1], value[0, 3:8].sum(), rtol=1e-6)
  back = rows.of_doc(jnp.asarray(DOC), table)
  np.testing.assert_allclose(back[0, 4], table[0, 1])
  assert float(jnp.sum(table[0])) < float(jnp.sum(value[0]))  # padding is left out
