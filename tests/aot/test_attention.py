"""The TPU attention kernels compile for every chip, within memory, and their schedules do not get worse.

One fixture compiles everything in two child processes: about 100 s on two idle cores.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from genmodels import kernels
from genmodels.aot import attention, schedule, topology
from tests.aot import bundles
from tests.aot.bundles import CASES, SWEEP

needs_libtpu = pytest.mark.skipif(topology.missing() is not None, reason=topology.missing() or "")
IDS = [f"{c.chip}-{c.fwd[0]}x{c.fwd[1]}-D{c.head_dim}-{c.length}" for c in CASES]
SWEEP_IDS = [f"{c.chip}-{c.fwd[0]}x{c.fwd[1]}-{c.bwd[0]}x{c.bwd[1]}-D{c.head_dim}" for c in SWEEP]

# A list as long as scalar memory holds: 342 x 342 tiles, two intervals. Small tiles compile fast.
MOST = bundles.Case("v5e", (512, 512), (512, 512), length=512 * 342)
# Controls: more vector work in each body; a quadratic array.
CAPPED = bundles.Case("v6e", *bundles.SMALL, arguments=(("soft_cap", 30.0),))


def dense(length: int):
  """The reference path, which has the scores of a head in memory."""
  q = jax.ShapeDtypeStruct((1, length, 1, 128), jnp.bfloat16)
  _, (*_, mask) = attention.program(lengths=(length, length), terms=1, plan_inside=True, backward=False)
  return lambda q, m: kernels.attention(q, q, q, m, implementation="reference"), (q, mask)


DENSE = schedule.Job("v5e:2x2", f"{__name__}:dense", {"length": 16384})
CONTROLS = {"most": MOST.job, "capped": CAPPED.job, "dense": DENSE}


@pytest.fixture(scope="module")
def compiled():
  jobs = [c.job for c in CASES] + list(CONTROLS.values())
  made = schedule.compile_all(jobs, workers=2)
  return dict(zip([*IDS, *CONTROLS], made, strict=True))


@pytest.fixture(scope="module")
def swept():
  return dict(zip(SWEEP_IDS, schedule.compile_all([c.job for c in SWEEP], workers=2), strict=True))


def _records():
  found = bundles.recorded().get(bundles.pair())
  if found is None:
    pytest.skip(
      f"no schedules are recorded for {bundles.pair()}; `python -m tests.aot.bundles` writes them "
      f"(there are: {'; '.join(bundles.recorded())})"
    )
  return found


def _judge(case, made):
  records = _records()
  lost = {}
  for key, tile in case.tiles(made).items():
    if found := bundles.exceeded(records[key], bundles.record(tile)):
      lost[key] = found
  return lost


def _linear_bound(made: schedule.Compiled, case: bundles.Case) -> int:
  """Bytes that temporaries may take: twice the arguments and outputs, which are O(L·D), and the lists.

  Head-major copies of q, k, v, out and their gradients are what there is; an array of one byte a pair
  would take 128 times what a head of q does at 32k tokens.
  """
  tiles = case.length // case.bwd[0] * (case.length // case.bwd[1])
  return 2 * (made.argument_bytes + made.output_bytes) + 64 * tiles


@pytest.mark.aot
@needs_libtpu
class TestChips:
  @pytest.mark.parametrize("name, case", list(zip(IDS, CASES)), ids=IDS)
  def test_compiles_within_linear_memory(self, compiled, name, case):
    made = compiled[name]
    # Vector memory, scalar memory and HBM that do not suffice are errors of the compiler.
    assert made.error is None
    assert [k.name for k in made.kernels if "interval_attention" in k.name] == [k.name for k in made.kernels]
    assert made.temp_bytes <= _linear_bound(made, case), made

  def test_a_quadratic_array_would_exceed_the_bound(self, compiled):
    made = compiled["dense"]
    case = dataclasses.replace(MOST, length=DENSE.arguments["length"])
    assert made.error is None and made.temp_bytes > 10 * _linear_bound(made, case)

  def test_longest_list_fits_scalar_memory(self, compiled):
    made = compiled["most"]
    assert made.error is None
    _, (_, _, _, plan, *_) = _built(MOST)
    from genmodels.kernels.pallas_tpu_lists import MAX_ENTRIES

    lists = {n: getattr(plan, n) for n in bundles.SHORT}
    assert all(len(x) == 1 for x in lists.values()), "one call each, or another list is longer"
    assert all(0.97 * MAX_ENTRIES < x[0].entry.shape[1] <= MAX_ENTRIES for x in lists.values())

  @pytest.mark.parametrize("name, case", list(zip(IDS, CASES)), ids=IDS)
  def test_bundles_are_as_recorded(self, compiled, name, case):
    assert not _judge(case, compiled[name])

  @pytest.mark.parametrize("name, case", list(zip(IDS, CASES)), ids=IDS)
  def test_bundles_are_as_designed(self, compiled, name, case):
    _as_designed(case, compiled[name])

  def test_gate_sees_more_work(self, compiled):
    lost = _judge(CAPPED, compiled["capped"])
    assert set(lost) == {CAPPED.key(k) for k in bundles.SHORT}
    assert all(any(x.startswith("full") for x in found) for found in lost.values())


@pytest.mark.aot
@pytest.mark.full
@needs_libtpu
class TestSweep:
  @pytest.mark.parametrize("name, case", list(zip(SWEEP_IDS, SWEEP)), ids=SWEEP_IDS)
  def test_bundles(self, swept, name, case):
    assert not _judge(case, swept[name])
    _as_designed(case, swept[name])


def _built(case):
  with kernels.building_for(kernels.Target("tpu", topology.chip(case.chip).kind)):
    return attention.program(**case.job.arguments)


def _as_designed(case, made):
  """At most 5 % above the prototype of the design, both counted alike."""
  for key, tile in case.tiles(made).items():
    if key in bundles.DESIGN:
      full, partial = bundles.DESIGN[key][1]
      assert tile.full <= 1.05 * full and tile.partial <= 1.05 * partial, (key, tile)


def test_gate():
  record = {"full": 2000, "partial": 2200, "parts": [1000, 1000], "spills": 10}
  assert not bundles.exceeded(record, record)
  assert not bundles.exceeded(record, record | {"full": 2060, "spills": 0})
  for worse in ({"full": 2061}, {"partial": 2267}, {"parts": [1000, 1031]}, {"spills": 11}):
    assert len(bundles.exceeded(record, record | worse)) == 1


def test_bodies_are_named_or_refused():
  capacity = {"MATMUL": 4, "VALU": 4}
  body = lambda bundles, valu: schedule.Body(bundles, {"MATMUL": bundles, "VALU": valu}, capacity)
  bodies = (body(20, 5), body(22, 9), body(11, 4), body(12, 4))
  kernel = schedule.Kernel("k", 100, 3, 4, bodies)
  tile = attention.tile(kernel, 2)
  assert tile == attention.Tile(20, 22, (11, 12), 35, 3, (0.25, 0.25))
  assert attention.tile(dataclasses.replace(kernel, bodies=bodies[:2]), 1).parts == ()
  with pytest.raises(ValueError, match="2 bodies expected of tiles in 1 parts"):
    attention.tile(kernel, 1)
  with pytest.raises(ValueError, match="does not do more vector work"):
    attention.tile(dataclasses.replace(kernel, bodies=(bodies[1], bodies[0])), 1)


def test_every_row_of_the_design_is_compiled():
  keys = {c.key(k) for c in (*CASES, *SWEEP) for k in bundles.SHORT}
  assert set(bundles.DESIGN) <= keys
  assert {c.chip for c in CASES} == set(bundles.TOPOLOGY)
  for pair, records in bundles.recorded().items():
    assert set(records) == keys, f"{pair}: `python -m tests.aot.bundles` rewrites the records"
