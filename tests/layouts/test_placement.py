"""Placement over context shards: a permutation of the slots, whole blocks, balanced work (host only).

Legend: B rows · N tokens of a row · S slots · n context shards.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import config, objectives
from genmodels.contracts import token_row
from genmodels.corruption.base import Blocks, Clean
from genmodels.layouts import Streams, placement
from genmodels.objectives import relations

STREAMS = ("n", "c")
RULE = relations.table("bd3", STREAMS)
# Packed documents of ragged blocks, padding at the end; one document.
DOC = np.array([[0] * 13 + [1] * 34 + [-1] * 17, [0] * 64])
PLACED = [("zigzag", 2, 0), ("zigzag", 4, 4), ("balanced", 4, 0), ("balanced", 2, 4)]


@functools.partial(jax.jit, static_argnums=1)
def _arranged(doc, block):
  row = token_row(jnp.zeros_like(doc), doc, capacity=64)
  return Streams(STREAMS).arrange(row, Clean(blocks=Blocks(size=block)).draw(row, jax.random.key(0), 0))


def arranged(doc, block):
  """Slots of [noisy | clean], NumPy."""
  return jax.device_get(_arranged(jnp.asarray(doc, jnp.int32), block))


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _placed(slots, kind, shards, whole, pieces):
  return Streams(STREAMS, kind, pieces, whole).place(slots, shards, lambda: RULE.mask(slots).pairs())


def placed(slots, kind, shards, whole=0, pieces=4):
  return jax.device_get(_placed(slots, kind, shards, whole, pieces))


@pytest.mark.parametrize("kind, shards, whole", PLACED)
def test_placement_is_a_permutation(kind, shards, whole):
  # Every (stream, token) once, with all that its slot carried; `where` finds it.
  old = arranged(DOC, 4)
  new = placed(old, kind, shards, whole)
  streams, N = old.where.shape[1:]
  for b in range(DOC.shape[0]):
    for s in range(streams):
      for n in range(N):
        a, z = int(old.where[b, s, n]), int(new.where[b, s, n])
        assert (a < 0) == (z < 0) == (DOC[b, n] < 0)
        if a >= 0:
          for f in ("src", "stream", "doc", "pos", "order", "doc_lo", "doc_hi", "blk_lo", "blk_hi"):
            assert getattr(old, f)[b, a] == getattr(new, f)[b, z], (f, b, s, n)
  assert int((new.src >= 0).sum()) == int((old.src >= 0).sum())
  assert new.src.shape[1] % (shards * streams) == 0
  if not whole:
    assert new.src.shape == old.src.shape  # nothing is padded


@pytest.mark.parametrize("kind, shards, whole", PLACED)
def test_the_mask_is_permuted_with_the_slots(kind, shards, whole):
  old = arranged(DOC, 4)
  new = placed(old, kind, shards, whole)
  before, after = (np.asarray(RULE.mask(s).to_dense()) for s in (old, new))
  for b in range(DOC.shape[0]):
    used = np.asarray(old.where[b]).reshape(-1)
    moved = np.asarray(new.where[b]).reshape(-1)
    used, moved = used[used >= 0], moved[used >= 0]
    np.testing.assert_array_equal(after[b][np.ix_(moved, moved)], before[b][np.ix_(used, used)])
  assert after.sum() == before.sum()  # empty slots see nothing and are not seen


@pytest.mark.parametrize("kind, shards, whole", PLACED)
def test_shards_hold_every_stream_alike_and_whole_blocks(kind, shards, whole):
  slots = arranged(DOC, 4)
  new = placed(slots, kind, shards, whole)
  B, S = new.src.shape
  src, stream = (x.reshape(B, shards, len(STREAMS), -1) for x in (new.src, new.stream))
  np.testing.assert_array_equal(src[:, :, 0], src[:, :, 1])  # the same tokens of both streams
  for s in range(len(STREAMS)):
    assert (stream[:, :, s][src[:, :, s] >= 0] == s).all()
  cut = 0
  for b in range(B):
    home = {int(n): c for c in range(shards) for n in src[b, c, 0] if n >= 0}
    for n, c in home.items():
      at = int(slots.where[b, 0, n])
      cut += any(home[m] != c for m in range(int(slots.blk_lo[b, at]), int(slots.blk_hi[b, at])))
    for c in range(shards):
      inside = src[b, c, 0][src[b, c, 0] >= 0]
      assert (np.diff(inside) > 0).all()  # ascending: tiles stay narrow
  assert (cut == 0) == bool(whole), "blocks are whole, and cut by a border where that is not asked for"
  part = S // shards // len(STREAMS)
  assert RULE.mask(new).local == (((0, part),) if whole else ())


def test_local_keys_are_seen_on_their_own_shard_only():
  slots = arranged(DOC, 4)
  mask = RULE.mask(placed(slots, "zigzag", 4, 4))
  B, S = mask.code.shape
  seen = np.asarray(mask.to_dense()).reshape(B, 4, S // 4, 4, S // 4).any((0, 2))  # [shard, shard, key]
  (span,) = mask.local
  for c in range(4):
    assert seen[c, c, slice(*span)].any()
    for other in range(4):
      assert other == c or not seen[c, other, slice(*span)].any()
  assert seen[:, :, span[1] :].sum() > seen[[*range(4)], [*range(4)], span[1] :].sum()  # the clean ones are


def test_which_streams_are_local():
  table = lambda rule, streams: relations.table(rule, streams)
  assert [table("bd3", ("n", "n1", "c")).block_local(s) for s in ("n", "n1", "c")] == [True, True, False]
  assert not table("full", ("n",)).block_local("n")
  assert not table({"n>n": "BLK_EQ|BLK_LT", "c>c": "POS_LE"}, STREAMS).block_local("n")
  assert table({"n>n": "BLK_EQ&POS_LE", "n>c": "BLK_LT", "c>c": "POS_LE"}, STREAMS).block_local("n")
  # A mask without any key that travels keeps none at home: there is nothing else to attend to.
  slots = arranged(DOC, 4)
  within = table({"n>n": "BLK_EQ", "c>c": "BLK_EQ"}, STREAMS)
  assert within.mask(placed(slots, "zigzag", 4, 4)).local == ()


def test_load_of_a_long_row():
  # Max over mean of the shards' visible pairs, block diffusion with L = 32,768 and B = 32.
  slots = arranged(np.zeros((1, 32768), int), 32)
  mask = jax.jit(RULE.mask)
  for shards, contiguous in ((4, 1.50), (8, 1.75), (16, 1.87)):
    assert placement.imbalance(mask(slots), shards) == pytest.approx(contiguous, abs=0.005)
    assert placement.load(mask(slots), shards).sum() == 32768**2 + 32768 * 32
    for kind, whole, most in (("zigzag", 0, 1), ("zigzag", 32, 1.04), ("balanced", 32, 1.07)):
      if kind == "balanced" and shards != 8:
        continue  # compiles longest
      new = placed(slots, kind, shards, whole)
      assert placement.imbalance(mask(new), shards) == pytest.approx(1.0, abs=5e-4), (kind, whole)
      assert new.src.shape[1] <= most * slots.src.shape[1]


def test_packed_documents_need_the_balanced_placement():
  # A long document behind many short ones: work does not grow along the row.
  lengths = [256] * 8 + [2048]
  doc = np.concatenate([np.full(n, i) for i, n in enumerate(lengths)])[None]
  slots = arranged(doc, 16)
  load = lambda *args: placement.imbalance(RULE.mask(placed(slots, *args)), 8)
  assert load("zigzag", 8, 16) > 1.7
  assert load("balanced", 8, 16, 8) < 1.001


def test_greedy_assignment():
  work = jnp.asarray([[5.0, 1, 1, 1, 4, 4, 3, 1], [0, 0, 0, 0, 0, 0, 0, 9]])
  got = placement.assign(work, 2)
  np.testing.assert_array_equal(np.sort(np.asarray(got).reshape(2, -1), 1), [range(8)] * 2)
  assert (np.diff(np.asarray(got)) > 0).all()
  assert np.take_along_axis(np.asarray(work)[:1, None], np.asarray(got)[:1], 2).sum(2).tolist() == [[10, 10]]


def test_without_a_context_axis_nothing_moves():
  slots = arranged(DOC, 4)
  for kind, shards, whole in (("zigzag", 1, 4), ("none", 4, 0)):
    assert Streams(STREAMS, kind, whole_blocks=whole).place(slots, shards) is slots


def test_what_does_not_fit_is_named():
  with pytest.raises(ValueError, match="'spiral'; it must be one of none, zigzag, balanced"):
    Streams(STREAMS, "spiral")
  with pytest.raises(ValueError, match="set 'zigzag' or 'balanced'"):
    Streams(STREAMS, whole_blocks=4)
  slots = arranged(DOC, 4)
  with pytest.raises(ValueError, match="longer than a piece of 8 tokens"):
    placed(slots, "zigzag", 4, 16)
  section = {
    "corruption": {"kind": "absorb", "blocks": {"size": dict(kind="steps", values=(4, 8), at=(0, 10))}},
    "layout": {"kind": "streams", "streams": STREAMS, "placement": "zigzag", "whole_blocks": 4},
    "masks": {"full": "bd3"},
    "terms": {"text": {"stream": "n", "on": "hit"}},
  }
  build = lambda s: objectives.build({"kind": "tokens", **s}, {"vocab": 8, "mask_id": 7})
  with pytest.raises(config.ConfigError, match="8 tokens.*(?s:.)*whole_blocks=8"):
    build(section)
  build(section | {"layout": section["layout"] | {"whole_blocks": 8}})
  with pytest.raises(config.ConfigError, match="all tokens of a document"):
    build(section | {"corruption": {"kind": "absorb"}})
