"""The Hopper kernels as ptxas sees them: no product serialised, no more registers spilled than recorded.

Legend: D head size.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

from genmodels import kernels
from genmodels.kernels import pallas_gpu, pallas_gpu_bwd
from genmodels.kernels import pallas_gpu_lists as lists
from genmodels.masks import AttnMask
from tests.kernels import ptxas

if jax.__version_info__ < (0, 11):
  _why = f"jax {jax.__version__}: Mosaic GPU kernels need jax >= 0.11"
else:
  _why = ptxas.missing()
pytestmark = [pytest.mark.aot, pytest.mark.skipif(_why is not None, reason=str(_why))]


def _lowered(D: int, deterministic: bool, safe: bool = False):
  S = jax.ShapeDtypeStruct
  mask = AttnMask(S((2, 520), jnp.int32), *[S((2, 2, 304), jnp.int32)] * 2)
  q, kv, lse = S((2, 304, 4, D), jnp.bfloat16), S((2, 520, 2, D), jnp.bfloat16), S((2, 4, 304), jnp.float32)

  def run(mask, q, k, v, d_out, d_lse):
    made = lists.plan(mask, lists.Tiles(safe=safe))
    attend = functools.partial(
      pallas_gpu.attend, plan=made, scale=0.1, soft_cap=None, deterministic=deterministic
    )
    return jax.vjp(attend, q, k, v)[1]((d_out, d_lse))

  with kernels.building_for(kernels.Target("gpu", "NVIDIA H200")):
    return jax.jit(run).trace(mask, q, kv, kv, q, lse).lower(lowering_platforms=("cuda",))


# Bytes a thread spills, with ptxas of CUDA 13.5; a kernel that is not here spills none.
SPILLED = {
  (64, True): {},
  (64, False): {},
  (128, True): {"attention_dkv": 8},
  (128, False): {"attention_dkv": 116},
  (256, True): {"attention_dkv": 164},
}


@pytest.mark.parametrize("D, deterministic", SPILLED)
def test_registers_and_products(D, deterministic, tmp_path):
  reports = ptxas.compiled(_lowered(D, deterministic), tmp_path)
  names = ["attention_forward"] + ["attention_dq"] * deterministic + ["attention_dkv"]
  assert [r.name for r in reports] == names
  for report in reports:
    recorded = SPILLED[D, deterministic].get(report.name, 0)
    assert report.remarks == [] and report.spilled <= recorded + 8, report


def test_spills_are_seen(monkeypatch, tmp_path):
  # With the registers of a launch and none taken over from the producer, the accumulators do not fit.
  monkeypatch.setattr(pallas_gpu_bwd, "_set_registers", lambda *_: None)
  report = ptxas.compiled(_lowered(128, True), tmp_path)[-1]
  assert report.spilled > 1000 and report.remarks
