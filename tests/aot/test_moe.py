"""A training step with experts compiles for a TPU, as the trainer would compile it there."""

import re

import pytest

from genmodels import aot, config
from genmodels.aot import topology
from tests.seams.systems import corpus

needs_libtpu = pytest.mark.skipif(topology.missing() is not None, reason=topology.missing() or "")


@pytest.mark.aot
@needs_libtpu
def test_experts_are_grouped_products_and_their_gradients_are_reduce_scattered():
  overrides = (
    "data.seq_len=512", "data.documents=40", f"data.path={corpus()}", "eval.every=0", "batch_size=2",
    "model.width=256", "model.num_heads=2", "model.num_kv_heads=2", "model.head_dim=128", "model.dtype=bfloat16",
    "model.remat={'preset': 'full'}", "model.moe.experts=16", "model.moe.top_k=4", "model.moe.mlp=256",
    "mesh={'data': -1, 'fsdp': 2, 'tensor': 2, 'context': 1}",
  )  # fmt: skip
  program = aot.program(config.load("language/llada_moe:tiny", list(overrides)), aot.devices("v5e:2x2"))
  compiled = program.lower().compile()
  text = compiled.as_text()
  calls = lambda name: len(re.findall(rf"%{name}[.\d]* = .*custom-call\(", text))
  # Forward 3 and recomputed 3 (the router's gradient wants the last), backward 3 for the rows, 3 for the kernels.
  assert [calls(f"grouped_matmul{part}") for part in ("", "_dx", "_dw")] == [6, 3, 3]
  # Nothing is expanded to a dense product per expert: a single one would be 16 products' worth.
  product = 2 * (512 * 4) * 256 * 128
  flops = compiled.cost_analysis()["flops"]
  assert 12 * product < flops < (12 + 16) * product, flops / product
  scattered = re.findall(r"= bf16\[8,\d+,\d+\]\S* reduce-scatter\(%grouped_matmul_dw", text)
  assert len(scattered) == 3, scattered
  # Slots stay where they are: nothing moves them to experts.
  assert "all-to-all" not in text
