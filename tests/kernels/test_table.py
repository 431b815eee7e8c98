"""Every implementation against the papers' masks, over the covering table of `table.py`.

pytest -s prints the table. A program is compiled once and run on all its cases.
"""

import contextlib
import dataclasses
import os

import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import kernels
from tests.kernels import pairwise, table

SIDES = {
  "xla": table.Side(
    lengths={"aligned": (192, 64), "ragged": (184, 72)},
    dtypes={"wide": jnp.float32, "narrow": jnp.bfloat16},
    tiles={"square": (64, 64, 1), "oblong": (32, 64, 2)},
  ),
  "pallas_tpu": table.Side(
    lengths={"aligned": (256, 128), "ragged": (232, 104)},
    dtypes={"wide": jnp.float32, "narrow": jnp.bfloat16},
    tiles={"square": (128, 128), "oblong": (64, 256, 128)},
    target=kernels.Target("tpu", "TPU v5p", interpret=True),
  ),
}
HOPPER = table.Side(  # the interpreter takes a second for a few tiles
  lengths={"aligned": (128, 64), "ragged": (200, 72)},
  dtypes={"wide": jnp.bfloat16, "narrow": jnp.float16},
  tiles={"square": (128, 128), "oblong": (128, 64)},
)

# Shorter rows: the product has 432 programs of 26 rows.
PRODUCT = {
  "xla": dataclasses.replace(
    SIDES["xla"],
    lengths={"aligned": (96, 32), "ragged": (88, 40)},
    tiles={"square": (32, 32, 1), "oblong": (16, 32, 2)},
  ),
  "pallas_tpu": dataclasses.replace(
    SIDES["pallas_tpu"],
    lengths={"aligned": (64, 32), "ragged": (88, 40)},
    tiles={"square": (32, 32), "oblong": (16, 64, 32)},
  ),
}


def test_the_table_covers_what_it_must():
  cases, goals = table.cases(), pairwise.required(table.FACTORS)
  print(f"\n{len(cases)} cases of {len(table.programs())} programs:")
  for i, case in enumerate(cases):
    print(f"{i:3} {table.label(case)}")
  met = frozenset().union(*map(pairwise.pairs, cases))
  assert goals <= met and len(cases) <= 65
  everything = len(pairwise.product(table.FACTORS))
  assert everything == 3 * 3 * 2 * 2 * 3 * 2 * 2 * 3 * 25


def test_no_case_of_the_table_is_superfluous():
  # Negative control of the coverage: without any one case, some pair never meets.
  reached, goals = [pairwise.pairs(c) for c in table.cases()], pairwise.required(table.FACTORS)
  for i in range(len(reached)):
    assert not goals <= frozenset().union(*reached[:i], *reached[i + 1 :])


def test_the_short_table_has_every_program_and_mask():
  cases = table.short_cases()
  assert {m for c in cases for m in c["mask"]} == set(table.DATA["mask"])
  assert {c["hidden"] for c in cases} == set(table.DATA["hidden"])
  goals = pairwise.required(table.PROGRAM)
  assert goals <= frozenset().union(*map(pairwise.pairs, cases)) and len(cases) <= 18


def test_cover_is_small_and_says_what_it_cannot_reach():
  four = {name: range(3) for name in "abcd"}
  assert 9 <= len(pairwise.cover(pairwise.product(four), pairwise.required(four))) <= 12
  some = [c for c in pairwise.product(four) if c["a"] or c["b"]]
  with pytest.raises(ValueError, match=r"no candidate reaches .*\('a', 0\), \('b', 0\)"):
    pairwise.cover(some, pairwise.required(four))


def test_pairs_of_a_case_with_several_values():
  case = {"a": 1, "mask": ("x", "y")}
  assert pairwise.pairs(case) == {(("a", 1), ("mask", "x")), (("a", 1), ("mask", "y"))}


def test_the_oracle_comparison_can_fail():
  # One key that one query should see, or all keys of one query.
  side = SIDES["xla"]
  case = {**table.cases()[0], "head_dim": 64, "dtype": "wide", "ratio": "Lq=Lk", "group": 1}
  shape = side.shape(case)
  _, seen = table.data_of(("bd3", "causal"), "padding", *shape[:2], seed=0)
  tensors, dense = table.tensors(shape, jnp.float32), table.oracle(*table.settings(case))
  right = dense(tensors, seen)
  for what in ("key", "row"):
    wrong = seen.copy()
    if what == "key":
      query = int(np.argmax(seen[1].sum(-1)))
      wrong[1, query, int(np.argmax(seen[1, query]))] = False
    else:
      wrong[1, int(np.argmax(seen[1].any(-1)))] = False
    found = table.errors(dense(tensors, wrong), right)
    assert any(found[k] > limit for k, limit in table.limits(jnp.float32).items()), (what, found)


def _run(implementation, program, runs, side=None):
  """Runs (names, hidden) with one compilation. Prints a line each, returns the lines that fail."""
  side = side or SIDES[implementation]
  dtype, shape = side.dtypes[program["dtype"]], side.shape(program)
  ours, traces = table.kernel(implementation, side, program)
  dense = table.oracle(*table.settings(program))
  print(f"\n{implementation}: {table.label(program)}, (Lq, Lk, H, Hk, D) = {shape}")
  failed = []
  for seed, (names, hidden) in enumerate(runs):
    mask, seen = table.data_of(names, hidden, *shape[:2], seed)
    tensors = table.tensors(shape, dtype, len(names))
    with kernels.building_for(side.target) if side.target else contextlib.nullcontext():
      found = table.errors(ours(tensors, mask), dense(tensors, seen))
    bad = [name for name, limit in table.limits(dtype).items() if not found[name] <= limit]
    what = " + ".join(names) if len(names) < 3 else f"{len(names)} rows of all masks"
    numbers = " ".join(f"{name} {error:.1e}" for name, error in found.items())
    line = f"  {hidden:<7} {what:<44} {numbers}" + (f"  FAILED: {', '.join(bad)}" if bad else "")
    print(line)
    failed += [line] if bad else []
  assert len(traces) == 1, f"{len(traces)} traces for {len(runs)} masks: a new mask must not recompile"
  return failed


def _runs(cases, program):
  """(names, hidden) of the cases of a program; the row that sees nothing has a mask too."""
  mine = [c for c in cases if all(c[k] == v for k, v in program.items())]
  return [(c["mask"] if len(c["mask"]) > 1 else c["mask"] * 2, c["hidden"]) for c in mine]


def _ids(program):
  text = "-".join(table.label(program).split())
  return text.replace("=", "").replace("<", "lt").replace(">", "gt")


@pytest.mark.slow
@pytest.mark.parametrize("program", table.programs(), ids=_ids)
@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
def test_table(implementation, program):
  failed = _run(implementation, program, _runs(table.cases(), program))
  assert not failed, "\n".join(failed)


@pytest.mark.full
@pytest.mark.parametrize("program", pairwise.product(table.PROGRAM), ids=_ids)
@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
def test_product(implementation, program):
  """Every mask with every value of every factor: all 25 masks are rows of one batch.

  With TABLE_LOG=file, programs that passed are written there and skipped by the next run.
  """
  log, line = os.environ.get("TABLE_LOG"), f"{implementation} {_ids(program)}"
  if log and os.path.exists(log) and line in open(log).read().splitlines():
    pytest.skip("passed before")
  names = (*table.DATA["mask"], "bd3")
  failed = _run(implementation, program, [(names, h) for h in table.DATA["hidden"]], PRODUCT[implementation])
  assert not failed, "\n".join(failed)
  if log:
    with open(log, "a") as f:
      f.write(line + "\n")


def _hopper():
  return dataclasses.replace(HOPPER, target=table.hopper())


@pytest.mark.slow
@pytest.mark.compat
@pytest.mark.parametrize("program", table.programs(), ids=_ids)
def test_short_table_on_hopper(program):
  side = dataclasses.replace(_hopper(), heads={1: (2, 2), 4: (4, 1), 8: (8, 1)})
  failed = _run("pallas_gpu", program, _runs(table.short_cases(), program), side)
  assert not failed, "\n".join(failed)


@pytest.mark.full
@pytest.mark.compat
@pytest.mark.parametrize("program", table.programs(), ids=_ids)
def test_table_on_hopper(program):
  failed = _run("pallas_gpu", program, _runs(table.cases(), program), _hopper())
  assert not failed, "\n".join(failed)
