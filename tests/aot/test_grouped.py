"""The TPU kernels of grouped products compile for every chip, within its memories.

Legend: M rows · E groups · D inputs · F outputs.
"""

import pytest

from genmodels import kernels
from genmodels.aot import grouped, schedule, topology
from genmodels.kernels import pallas_tpu_grouped, pallas_tpu_lists
from tests.aot.bundles import TOPOLOGY

needs_libtpu = pytest.mark.skipif(topology.missing() is not None, reason=topology.missing() or "")

# DeepSeek-V3's widths; widths that are no whole lanes, and a last tile that sticks out; Mixtral's matrices, in
# float32 too; a decoding step; sizes below every tile.
SHAPES = {
  "wide": dict(rows=4096, groups=32, inputs=7168, outputs=2048),
  "odd": dict(rows=5000, groups=32, inputs=2880, outputs=2880),
  "few": dict(rows=4096, groups=8, inputs=4096, outputs=14336),
  "float32": dict(rows=4096, dtype="float32"),
  "decode": dict(rows=64),
  "small": dict(rows=9, groups=16, inputs=33, outputs=17, dtype="float32"),
}


def job(chip, **arguments):
  return schedule.Job(TOPOLOGY[chip], "genmodels.aot.grouped:program", arguments)


def _fits(made):
  assert made.error is None, made.error
  for name in grouped.KERNELS:
    assert made.kernel(name).bodies
  # The list of steps, and no second copy of an operand.
  assert made.temp_bytes < 2 * 2**20 + made.argument_bytes / 100


@pytest.mark.aot
@needs_libtpu
def test_the_products_of_qwen3_moe_on_every_chip():
  """16,384 rows, 128 groups, 2048 × 768: the body of a whole part fills the matrix units."""
  for made in schedule.compile_all([job(chip) for chip in TOPOLOGY]):
    _fits(made)
    chip = topology.chip(made.job.topology)
    with kernels.building_for(kernels.Target("tpu", chip.kind)):
      tiles = pallas_tpu_grouped.product_tiles(16384, 2048, 768, 2, pallas_tpu_lists.chip())
    (body,) = made.kernel("grouped_matmul").bodies
    assert body.occupancy() > 0.8, (chip.name, body.occupancy())
    # Instructions hide behind the arithmetic: cycles of a part if all units are busy, and a quarter more.
    assert body.bundles < 1.25 * tiles.part * 2048 * tiles.chunk / chip.macs_per_cycle, chip.name


@pytest.mark.aot
@needs_libtpu
@pytest.mark.full
@pytest.mark.parametrize("name", SHAPES)
def test_other_shapes_on_every_chip(name):
  for made in schedule.compile_all([job(chip, **SHAPES[name]) for chip in TOPOLOGY]):
    _fits(made)


@pytest.mark.aot
@needs_libtpu
@pytest.mark.full
def test_what_fits_no_memory_is_not_compiled():
  """The refusal is the planner's; the control hands Mosaic the tiles that the planner does not take."""
  (made,) = schedule.compile_all([schedule.Job(TOPOLOGY["tpu7x"], f"{__name__}:too_large", {})])
  assert "vmem" in made.error


def too_large():
  tiles = pallas_tpu_grouped.ProductTiles(rows=512, columns=4096, part=256, chunk=256)
  pallas_tpu_grouped.product_tiles = lambda *_: tiles  # in a process of its own
  return grouped.program(rows=1024, groups=4, inputs=4096, outputs=4096, backward=False)
