"""Masks that nobody designed: random codes, up to four random intervals a query, hidden keys, empty queries.

Legend: B rows · T intervals · I query tiles · J key tiles · g groups of rows.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import kernels
from genmodels.kernels import tiles as tile_lists
from genmodels.masks import CODE_HIDDEN, AttnMask
from tests.kernels import table
from tests.kernels.test_attention import _pulled

B, T, LQ, LK = 2, 4, 72, 88


def random_mask(seed, lq=LQ, lk=LK) -> tuple[AttnMask, np.ndarray]:
  """(encoding, bool[B, Lq, Lk] by a loop over intervals); rows of long and of short intervals."""
  rng = np.random.default_rng(seed)
  top = int(rng.choice([6, 40, 4 * lk]))  # few codes, each of many keys, or many
  code = rng.integers(0, top, (B, lk))
  if seed % 2:
    code = np.sort(code, 1)  # as in rows whose tokens are stored in order: tiles are full or empty
  code = np.where(rng.random((B, lk)) < rng.choice([0.0, 0.1]), CODE_HIDDEN, code)
  run = int(rng.choice([1, 24]))  # neighbours with the same intervals, as in blocks: tiles can be full
  edges = np.sort(rng.integers(0, top + 2, (B, 2 * T, -(-lq // run))), axis=1)
  keep = rng.random((B, T, edges.shape[2])) < rng.choice([0.3, 0.9])
  # Disjoint; equal edges are an empty interval, or two that touch.
  lo, hi = (np.repeat(np.where(keep, x, 0), run, 2)[..., :lq] for x in (edges[:, ::2], edges[:, 1::2]))
  seen = np.zeros((B, lq, lk), bool)
  for t in range(T):
    seen |= (code[:, None] >= lo[:, t, :, None]) & (code[:, None] < hi[:, t, :, None])
  return AttnMask(*(x.astype(np.int32) for x in (code, lo, hi))), seen


@functools.partial(jax.jit, static_argnums=1)
def _plan(mask, tiles):
  return kernels.plan(mask, tiles, "xla")


@pytest.mark.parametrize("tiles", [(8, 16, 1), (24, 8, 2)])
def test_lists_of_random_masks(tiles):
  kinds = np.zeros(3, int)  # empty, partial, full
  for seed in range(30):
    mask, _ = random_mask(seed)
    made = jax.tree.map(np.asarray, _plan(mask, tiles))
    q, k, rows = tiles
    code, lo, hi = made.code[:, None, None, :], made.lo[..., None], made.hi[..., None]
    inside = ((lo <= code) & (code < hi)).reshape(B // rows, rows, T, -1, q, made.code.shape[1] // k, k)
    some, every = inside.any((1, 4, 6)), inside.all((1, 4, 6))  # [g, T, I, J]
    by_query, by_key = _entries(made.by_query, False), _entries(made.by_key, True)
    assert sorted(by_query) == sorted(by_key) and len(set(by_query)) == len(by_query)
    listed = {e[:4]: e[4] for e in by_query}
    assert set(listed) >= {tuple(map(int, x)) for x in np.argwhere(some)}, "a visible tile is missed"
    assert {e for e, full in listed.items() if full} == {tuple(map(int, x)) for x in np.argwhere(every)}
    kinds += some.size - len(listed), len(listed) - sum(listed.values()), sum(listed.values())
  # Masks of all kinds, or this proves nothing. A tile of two rows is rarely full in both.
  assert (kinds[:2] > 20).all() and kinds[2] > (20 if tiles[2] == 1 else 0)


def _entries(lists, by_key):
  """(group, interval, query tile, key tile, full) of all entries in use."""
  out = []
  for g, (start, entry) in enumerate(zip(lists.start, lists.entry)):
    for line in range(len(start) - 1):
      for e in entry[start[line] : start[line + 1]]:
        at = (int(tile_lists.column(e)), line) if by_key else (line, int(tile_lists.column(e)))
        out.append((g, int(tile_lists.term(e)), *at, bool(tile_lists.is_full(e))))
  return out


def _compare(implementation, target, tiles, seeds, lengths=(LQ, LK), dtype=jnp.float32, heads=(4, 2), D=16):
  tensors = table.tensors((*lengths, *heads, D), dtype)
  traces = []

  @jax.jit
  def ours(tensors, mask):
    traces.append(1)
    attend = functools.partial(
      kernels.attention, mask=mask, return_lse=True, scale=0.3, implementation=implementation, tiles=tiles
    )
    return _pulled(attend, *tensors)

  for seed in seeds:
    mask, seen = random_mask(seed, *lengths)
    with kernels.building_for(target) if target else contextlib.nullcontext():
      found = table.errors(ours(tensors, mask), table.oracle(0.3, None)(tensors, seen))
    for name, limit in table.limits(dtype).items():
      assert found[name] <= limit, (seed, found)
  assert len(traces) == 1


def test_xla_on_random_masks():
  _compare("xla", None, (8, 16, 2), range(8))


@pytest.mark.slow
def test_tpu_on_random_masks():
  _compare("pallas_tpu", kernels.Target("tpu", "TPU v5p", interpret=True), (24, 32, 16), range(8))


@pytest.mark.slow
@pytest.mark.compat
def test_hopper_on_random_masks():
  _compare("pallas_gpu", table.hopper(), (128, 64), range(2), (136, 136), jnp.bfloat16, (4, 2), 64)
