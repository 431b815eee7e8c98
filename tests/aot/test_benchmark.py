"""benchmarks/attention_tpu.py: what it counts is what the masks and the kernels have. No TPU, no libtpu."""

import dataclasses

import numpy as np
import pytest

from benchmarks import attention_tpu
from benchmarks.contenders.cases import Case
from genmodels.aot import attention, topology

# Tiles of 128 keys and more on short rows: partial, skipped and full tiles all occur.
CASES = [
  Case("bd3", "bd3", 2, 2048, 4, 2, block=32),
  Case("causal", "causal", 1, 2048, 4, 4),
  Case("packed", "bd3", 2, 1024, 4, 4, block=32, documents=256),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_counts_are_those_of_the_dense_mask(case):
  w = attention_tpu.work(case, "v5e")
  slots, tables = case.slots, case.tables()
  at = np.arange(slots)
  dense = np.stack([
    np.broadcast_to(case.visible(tables, b, at[:, None], at[None, :]), (slots, slots))
    for b in range(case.mask_rows)
  ])  # fmt: skip
  shared = case.rows // case.mask_rows
  assert w.pairs == dense.sum() * shared
  for name, (q, k, part) in w.tiles.items():
    e = w.entries[name]
    tiles = dense.reshape(case.mask_rows, slots // q, q, slots // part, part)
    seen = tiles.any((2, 4))  # [B, lines, parts of all key tiles]
    # A tile that two intervals meet has two entries, so entries are at least the tiles that are met.
    met = seen.reshape(*seen.shape[:2], -1, k // part)
    whole = int(tiles.all((2, 4)).reshape(met.shape).all(-1).sum()) * shared
    assert e.full + e.partial + e.skipped >= int(met.any(-1).sum()) * shared
    assert e.full <= whole and (e.full > 0) == (case.documents == 0)
    computed = e.full + e.partial + sum(e.parts) / (k // part)
    assert computed >= seen.sum() * shared / (k // part)
    lines = slots // (k if name == "dkv" else q)
    assert (e.lines, e.empty) == (lines * case.rows, 0)


def test_splash_tiles_are_those_of_splash():
  masks = pytest.importorskip("jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask")
  info = pytest.importorskip("jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info")
  case = CASES[1]
  w = attention_tpu.work(case, "v5e")
  mask = masks.MultiHeadMask([masks.CausalMask((case.slots, case.slots))])
  for name, process in (("fwd", info.process_mask), ("dkv", info.process_mask_dkv)):
    q, k, _ = w.tiles[name]
    made, _ = process(mask, (q, k))
    block = np.asarray(made.block_mask)
    lines = case.slots // (k if name == "dkv" else q)
    assert w.splash[name] == ((block > 0).sum(), block[0].size, lines)


def test_prediction():
  case = dataclasses.replace(CASES[0])
  tile = attention.Tile(1000, 1500, (), 200, 0, (0.9, 0.8))
  halves = dataclasses.replace(tile, parts=(700, 700))
  w = attention_tpu.work(case, "v5p")
  tiles = {n: halves if k > part else tile for n, (_, k, part) in w.tiles.items()}
  made = attention_tpu.predict(w, tiles)
  e, chip = w.entries["fwd"], topology.chip("v5p")
  bundles = 1000 * e.full + 1500 * e.partial + 700 * sum(e.parts) + 200 * e.lines
  bare = case.heads * bundles / chip.clock / 2  # two cores
  steps = case.heads * e.steps * attention_tpu.STEP / 2
  np.testing.assert_allclose(made["fwd"]["ms"], [1e3 * bare, 1e3 * (bare + steps)], rtol=1e-6)
  np.testing.assert_allclose(
    made["fwd"]["mfu"][0], 4 * 128 * w.pairs * case.heads / bare / (2 * chip.flops), rtol=1e-6
  )
  # Where the memory is slower than the bundles, it decides.
  idle = {
    n: dataclasses.replace(t, full=0, partial=0, parts=(0,) * len(t.parts), rest=0) for n, t in tiles.items()
  }
  for found in attention_tpu.predict(w, idle).values():
    assert found["ms"][0] == found["memory_ms"] > 0
