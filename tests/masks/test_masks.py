"""Encodings against oracles, relation tables against their laws, counts against brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import masks
from genmodels.masks import AttnMask, Relations, builders
from tests.masks import oracles


@pytest.mark.compat
@pytest.mark.parametrize("name", oracles.CASES)
def test_builder_is_the_papers_mask(name):
  # T6, T32: visibility and pair counts of random packed rows, ragged blocks, padding.
  for seed in range(4):
    r = oracles.rows(seed)
    mask, expected = oracles.CASES[name][0](r), oracles.dense(name, r)
    np.testing.assert_array_equal(np.asarray(mask.to_dense()), expected)
    np.testing.assert_array_equal(np.asarray(mask.pairs()), expected.sum(-1))
    assert mask.lo.shape[1] <= 2
    _assert_disjoint(mask)


def _assert_disjoint(mask: AttnMask):
  lo, hi = np.asarray(mask.lo), np.asarray(mask.hi)
  some = lo < hi
  for s in range(lo.shape[1]):
    for t in range(s):
      apart = (hi[:, t] < lo[:, s]) | (hi[:, s] < lo[:, t])  # not even touching
      assert (apart | ~(some[:, s] & some[:, t])).all()


def test_oracle_comparison_can_fail():
  r = oracles.rows(0)
  wrong = builders.dual(r.doc, (r.blk_lo, r.blk_hi), "BLK_EQ", "POS_LE")
  assert (np.asarray(wrong.to_dense()) != oracles.dense("bd3", r)).any()


def _pick(slots, at):
  shape = oracles.B, 2 * oracles.N
  return jax.tree.map(lambda x: jnp.broadcast_to(x, shape)[:, at], slots.replace(where=slots.src))


def test_permuted_slots_keep_their_mask():
  r = oracles.rows(1)
  slots = builders.stack(r.doc, 2, block=(r.blk_lo, r.blk_hi))
  perm = np.random.default_rng(0).permutation(2 * oracles.N)
  moved = _pick(slots, perm)
  table = Relations({("n", "n"): "BLK_EQ", ("n", "c"): "BLK_LT", ("c", "c"): "BLK_LE"}, ("n", "c"))
  np.testing.assert_array_equal(
    np.asarray(table.mask(moved).to_dense()), oracles.dense("bd3", r)[:, perm][:, :, perm]
  )


def test_codes_and_bounds_read_one_slot():
  # A KV cache stores codes; a decode step makes bounds of its own slots: both must not see neighbours.
  r = oracles.rows(2)
  table = Relations({("n", "n"): "BLK_EQ", ("n", "c"): "BLK_LT", ("c", "c"): "POS_LE"}, ("n", "c"))
  slots = builders.stack(r.doc, 2, block=(r.blk_lo, r.blk_hi))
  lo, hi = table.bounds(slots)
  for s in (0, 5, 30, 47):
    one = _pick(slots, slice(s, s + 1))
    np.testing.assert_array_equal(table.codes(one)[:, 0], table.codes(slots)[:, s])
    np.testing.assert_array_equal(table.bounds(one)[0][..., 0], lo[..., s])
    np.testing.assert_array_equal(table.bounds(one)[1][..., 0], hi[..., s])


def test_empty_slots_see_nothing_and_are_hidden():
  table = Relations({("c", "c"): "ALL"}, ("c",))
  mask = table.mask(builders.stack(jnp.asarray([[0, 0, -1, -1]])))
  assert (mask.code[0, 2:] == masks.CODE_HIDDEN).all()
  np.testing.assert_array_equal(np.asarray(mask.to_dense())[0], np.pad(np.ones((2, 2), bool), (0, 2)))


def test_three_and_four_intervals():
  # Window and sink on the clean row of two streams: three intervals for a noisy query.
  r = oracles.rows(3)
  table = Relations(
    {
      ("n", "n"): "BLK_EQ",
      ("n", "c"): "BLK_LT&WIN(5)|BLK_LT&SINK(2)|SELF",
      ("c", "c"): "POS_LE&SINK(2)|WIN(5)",
    },
    ("n", "c"),
  )
  assert table.terms == 4
  mask = table.mask(builders.stack(r.doc, 2, block=(r.blk_lo, r.blk_hi)))
  _assert_disjoint(mask)
  N, dense = oracles.N, np.asarray(mask.to_dense())
  for b in range(oracles.B):
    for i in range(N):
      for j in range(N):
        same = r.doc[b, i] >= 0 and r.doc[b, i] == r.doc[b, j]
        near, sink = i - 5 < j <= i, r.local[b, j] < 2
        older = r.blk[b, j] < r.blk[b, i]
        assert dense[b, N + i, N + j] == (same and j <= i and (near or sink))
        assert dense[b, i, N + j] == (same and ((older and (near or sink)) or i == j))
        assert dense[b, i, j] == (same and r.blk[b, i] == r.blk[b, j])
        assert not dense[b, N + i, j]
  np.testing.assert_array_equal(np.asarray(mask.pairs()), dense.sum(-1))


def test_other_atoms():
  doc = jnp.asarray([[0, 0, 0, 0, 0, 1, 1, 1]])
  local = [0, 1, 2, 3, 4, 0, 1, 2]
  for relation, rule in {
    "NEAR(1)": lambda i, j: abs(i - j) <= 1,
    "POS_LT": lambda i, j: j < i,
    "NONE": lambda i, j: False,
    "NONE|SELF": lambda i, j: i == j,
    "BLK_EQ&POS_LT": lambda i, j: j < i and local[i] // 2 == local[j] // 2,
  }.items():
    got = Relations({("c", "c"): relation}, ("c",)).mask(builders.stack(doc, block=2)).to_dense()[0]
    want = [[bool(doc[0, i] == doc[0, j]) and rule(i, j) for j in range(8)] for i in range(8)]
    np.testing.assert_array_equal(np.asarray(got), want, err_msg=relation)


@pytest.mark.parametrize(
  "table, streams, coord, message",
  [
    ({("n", "c"): "ALL"}, ("c",), {}, "'n' is not in"),
    ({("c", "c"): "BEFORE"}, ("c",), {}, "unknown atom 'BEFORE'; known atoms"),
    ({("c", "c"): "WIN"}, ("c",), {}, r"takes a length, as in WIN\(128\)"),
    ({("c", "c"): "ALL(3)"}, ("c",), {}, "takes no argument"),
    ({("c", "c"): "ORD_LE"}, ("c",), {}, "coded by 'order', got 'pos'"),
    ({("c", "c"): "POS_LE"}, ("c",), {"c": "order"}, "coded by 'pos', got 'order'"),
    ({("c", "c"): "ALL"}, ("c",), {"c": "rank"}, "must be 'pos' or 'order', got 'rank'"),
    ({("c", "c"): "|".join(f"WIN({i})" for i in range(1, 6))}, ("c",), {}, "5 intervals, at most 4"),
  ],
)
def test_tables_that_cannot_work_are_refused(table, streams, coord, message):
  with pytest.raises(ValueError, match=message):
    Relations(table, streams, coord)


def test_a_table_is_static_for_jit():
  a = Relations({("n", "n"): "BLK_EQ", ("n", "c"): "BLK_LT"}, ("n", "c"))
  b = Relations({("n", "c"): "BLK_LT", ("n", "n"): "BLK_EQ"}, ["n", "c"])
  assert a == b and hash(a) == hash(b)


def test_a_new_block_size_does_not_recompile():
  traces = []

  @jax.jit
  def density(doc, block):
    traces.append(1)
    return builders.bd3(doc, block).pairs().sum()

  doc = jnp.zeros((1, 32), jnp.int32)
  assert [int(density(doc, b)) for b in (1, 4, 8)] == [32 * 32 + 32 * b for b in (1, 4, 8)]
  assert len(traces) == 1


def test_pair_counts_of_the_closed_forms():
  # T32: kernels §3.5, language §0.6.
  L, block, P, W = 96, 8, 20, 16
  var = (1, 4, 9, 16, 25, 36, 64, 100, 169, 256)

  @jax.jit
  def counts():
    doc = jnp.zeros((1, L), jnp.int32)
    masks = {
      "causal": builders.causal(doc),
      "full": builders.full(doc),
      "block_causal": builders.block_causal(doc, block),
      "prefix_lm": builders.prefix_lm(doc, P),
      "bd3": builders.bd3(doc, block),
      "context_causal": builders.context_causal(doc, block),
      "wedlm": builders.wedlm(doc, block, jnp.arange(L)[None]),
      "copies": builders.bd3(doc, block, copies=2),
      "window": builders.window(doc, W),
      "var": builders.scale_causal(jnp.zeros((1, 680), jnp.int32), var),
    }
    return {name: mask.pairs().sum() for name, mask in masks.items()}

  assert {k: int(v) for k, v in counts().items()} == {
    "causal": L * (L + 1) // 2,
    "full": L * L,
    "block_causal": L * (L + block) // 2,
    "prefix_lm": L * (L + 1) // 2 + P * (P - 1) // 2,
    "bd3": L * L + L * block,
    "context_causal": L * L + L * (block + 1) // 2,
    "wedlm": L * L + L,
    "copies": (3 * L * L + 3 * L * block) // 2,
    "window": L * W - W * (W - 1) // 2,
    "var": 286434,
  }


def test_pairs_of_long_rows_stay_exact():
  # 2L = 128k: the total exceeds int32, the counts per query do not.
  L, block = 65536, 32
  mask = builders.bd3(jnp.zeros((1, L), jnp.int32), block)
  assert int(np.asarray(jax.jit(AttnMask.pairs)(mask), np.int64).sum()) == L * L + L * block > 2**31


def test_normalise_merges_and_sorts():
  rng = np.random.default_rng(0)
  lo = rng.integers(0, 12, (3, 4, 200))
  hi = lo + rng.integers(-2, 6, lo.shape)
  code = jnp.broadcast_to(jnp.arange(20), (3, 20))
  a, b = masks.normalise(jnp.asarray(lo), jnp.asarray(hi))
  mask = AttnMask(code, a, b)
  _assert_disjoint(mask)
  np.testing.assert_array_equal(mask.to_dense(), AttnMask(code, jnp.asarray(lo), jnp.asarray(hi)).to_dense())
