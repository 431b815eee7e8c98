"""Reading schedules: exact counts on a written example, refusal of other formats, and a real kernel."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from genmodels.aot import schedule, topology

USE = """== CAPACTIY:
MATMUL, MATPUSH, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    4     4     3     4     2     1     3     3     1     1     2
== UTILIZATION:
0 0 0 0 0 0 0 0 0 0 1
0 0 0 0 0 0 0 0 0 0 1
4 0 0 1 0 0 0 0 0 0 0
2 0 0 2 0 0 0 0 1 1 0
0 0 0 0 0 0 0 0 0 0 1
1 0 0 3 0 0 1 1 0 0 0
0 0 0 0 0 0 0 0 0 0 1
"""
# A loop (1) around two branches with products (2, 3), and a branch (5) without; 7 of another region
# closes nothing that was opened.
BUNDLES = """= control target key start
PB: predicated region body
= control target key end

     0   :  { %s = smov.u32 0 }
   0x1 LB: > { %s = sld [smem:[#a]] } /* Start region 1 */
   0x2   : > { %v = vmatmul } /* Start region 2 */
   0x3   : > { %v = vmatmul /* a
comment over lines */ } /* End region 2 :: End region 7 */
   0x4 PF: > { %s = sld } /* Start/End empty region 4 :: Start region 5 :: End region 5 */
   0x5   : > { %v = vmatmul } /* Start region 3 :: End region 3 */
   0x6   :  { %s = sbr.rel } /* End region 1 */
"""


def test_parse():
  made = schedule.parse("kernel", USE, BUNDLES)
  assert (made.name, made.bundles, made.spills, made.fills) == ("kernel", 7, 1, 1)
  first, second = made.bodies
  assert (first.bundles, first.used["MATMUL"], first.used["VALU"]) == (2, 6, 3)
  assert (second.bundles, second.used["MATMUL"], second.used["VALU"]) == (1, 1, 3)
  assert first.occupancy() == 6 / (4 * 2) and second.occupancy("VALU") == 3 / 4


def test_straight_line_is_one_body():
  bundles = BUNDLES.replace("region", "zone").replace("sbr.rel", "sadd")
  assert [b.bundles for b in schedule.parse("kernel", USE, bundles).bodies] == [7]


@pytest.mark.parametrize(
  "use, bundles, message",
  [
    (USE.replace("MATMUL,", "MXU,"), BUNDLES, "another format"),
    (USE.replace(" VSTORE:SPILL,", " VSTORE:X,"), BUNDLES, "other columns"),
    (USE + "0 0 0 0 0 0 0 0 0 0 0\n", BUNDLES, "7 bundles are listed, 8"),
    (USE, BUNDLES.replace("region", "zone"), "no region markers"),
    (USE, BUNDLES.replace("= control target key start", ""), "no region markers"),
  ],
)
def test_other_formats_are_refused(use, bundles, message):
  with pytest.raises(schedule.ScheduleError, match=message):
    schedule.parse("kernel", use, bundles)


def _double_kernel(x, y):
  y[...] = jnp.dot(x[...], x[...], preferred_element_type=jnp.float32)


def product(edge: int, limit: int | None = None):
  """A Pallas product and an XLA one; the kernel keeps three edge × edge blocks in vector memory."""
  from jax.experimental.pallas import tpu as pltpu

  shape = jax.ShapeDtypeStruct((edge, edge), jnp.bfloat16)
  call = pl.pallas_call(
    _double_kernel,
    out_shape=jax.ShapeDtypeStruct((edge, edge), jnp.float32),
    compiler_params=pltpu.CompilerParams(vmem_limit_bytes=limit),
    name="squared",
  )
  return (lambda x: call(x @ x)), (shape,)


def impossible():
  raise ArithmeticError("no such program")


@pytest.mark.aot
@pytest.mark.skipif(topology.missing() is not None, reason=topology.missing() or "")
class TestCompile:
  job = functools.partial(schedule.Job, "v5e:2x2", f"{__name__}:product")

  def test_kernel_and_refusal(self):
    seen = []
    good, bad = schedule.compile_all(
      [self.job({"edge": 256}), self.job({"edge": 1024, "limit": 2**20})], progress=seen.append
    )
    assert seen == [good, bad]
    assert good.error is None and [k.name for k in good.kernels] == ["squared"]
    kernel = good.kernel("squared")
    (body,) = kernel.bodies
    # 256³ multiply-accumulates at 4 × 128 × 128 a cycle: no schedule is shorter.
    chip = topology.chip("v5e")
    assert 256**3 / chip.macs_per_cycle <= body.bundles <= kernel.bundles
    assert 0 < body.occupancy() <= 1
    assert (good.argument_bytes, good.output_bytes) == (2 * 256**2, 4 * 256**2)
    assert "vmem" in bad.error and not bad.kernels
    with pytest.raises(ValueError, match="did not compile"):
      bad.kernel("squared")
    with pytest.raises(KeyError, match="squared"):
      good.kernel("other")

  def test_death_of_the_child_is_told(self):
    with pytest.raises(RuntimeError, match=r"(?s)ended with 1.*no such program"):
      schedule.compile_all([schedule.Job("v5e:2x2", f"{__name__}:impossible")])
