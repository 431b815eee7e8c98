"""Named rules within a window: what sliding-window layers see."""

import jax.numpy as jnp
import numpy as np
import pytest

from genmodels.masks import plain_slots
from genmodels.objectives import relations


def dense(rule, streams, N=12, block=4):
  """bool[S, S] of one document in blocks, streams one after another."""
  n = len(streams)
  at = np.tile(np.arange(N), n)[None]
  stream = np.repeat(np.arange(n), N)[None]
  lo = at // block * block
  i32 = lambda x: jnp.asarray(x, jnp.int32)
  slots = plain_slots(
    i32(at), i32(0 * at), i32(0 * at + N), blk_lo=i32(lo), blk_hi=i32(lo + block), stream=i32(stream)
  )
  return np.asarray(relations.table(rule, streams).mask(slots).to_dense())[0]


@pytest.mark.parametrize("rule, streams", [("causal", ("c",)), ("bd3", ("n", "c")), ("full", ("n",))])
def test_a_window_narrows_every_relation(rule, streams):
  at = np.tile(np.arange(12), len(streams))
  near = np.abs(at[:, None] - at[None]) <= 2
  whole, narrow = dense(rule, streams), dense(f"{rule}&NEAR(2)", streams)
  np.testing.assert_array_equal(narrow, whole & near)
  assert (narrow != whole).any()


def test_a_causal_window_is_that_of_the_checkpoints():
  """`sliding_window` counts the query itself: 3 keys are i − 2, i − 1 and i."""
  at = np.arange(12)
  want = (at[None] <= at[:, None]) & (at[None] > at[:, None] - 3)
  np.testing.assert_array_equal(dense("causal&NEAR(2)", ("c",)), want)


def test_unknown_names_are_still_refused():
  with pytest.raises(ValueError, match="mask is 'casual'"):
    relations.table("casual&NEAR(2)", ("c",))
