"""The block-diffusion training step compiles for every TPU generation, as the trainer would compile it there.

Widths and lengths are real, depth and vocabulary small: what a compiler refuses (vector and scalar memory,
layouts, collectives) shows in one scanned layer.
"""

import math
import re

import pytest

from genmodels import aot, config
from genmodels.aot import topology
from genmodels.config import ConfigError
from tests.seams.systems import corpus

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def section(seq_len, *overrides):
  """A BD3-LM of 8 heads of 128, bf16, two layers, on fsdp=2 × tensor=2: a row of 2 · seq_len slots a device."""
  return config.load(
    "language/bd3lm:tiny",
    [
      f"data.seq_len={seq_len}", "data.documents=40", f"data.path={corpus()}", "eval.every=0",
      "model.width=1024", "model.num_heads=8", "model.num_kv_heads=4", "model.head_dim=128", "model.mlp=2048",
      "model.layers=2", "model.dtype=bfloat16", "model.remat={'preset': 'attn_out'}",
      "mesh={'data': -1, 'fsdp': 2, 'tensor': 2, 'context': 1}", *overrides,
    ],
  )  # fmt: skip


ARRAY = re.compile(r"tensor<((?:\d+x)+)[a-z]+\d*\w*>")


def largest(text):
  """Elements of the largest array in a lowered program's text, and its dimensions."""
  found = {tuple(map(int, dims.rstrip("x").split("x"))) for dims in ARRAY.findall(text)}
  return max((math.prod(dims), dims) for dims in found)


def test_the_largest_array_of_a_text_is_found():
  text = "%1:2 = f(%0) : (tensor<2x8xbf16>, tensor<i32>) -> (tensor<17xi1>, tensor<3x5xf8E4M3FN>)"
  assert largest(text) == (17, (17,))
  assert largest(text.replace("<17x", "<1x")) == (16, (2, 8))


needs_libtpu = pytest.mark.skipif(topology.missing() is not None, reason=topology.missing() or "")
more = pytest.mark.full  # a compile takes a minute of two idle cores: test-all takes each chip at one length


@pytest.mark.aot
@needs_libtpu
@pytest.mark.parametrize(
  "chip, slots",
  [
    ("v5e", 32), ("v5p", 32), ("v6e", 64), ("tpu7x", 32),
    *(pytest.param(*case, marks=more) for case in (("v5e", 64), ("v5p", 64), ("v6e", 32), ("tpu7x", 64))),
  ],
)  # fmt: skip
def test_the_training_step_compiles(chip, slots):
  """2L = 32k, and packed documents at 64k: within the chip's memory, and no array with an element for every pair."""
  devices = aot.devices(TOPOLOGIES[chip])
  program = aot.program(section(slots * 512, f"batch_size={len(devices) // 2}"), devices)
  assert program.parts.attention.startswith("pallas_tpu (auto: the kernel of TPU")
  lowered = program.lower()
  row = slots * 1024  # a row a device
  # Of the whole batch; jaxlib cannot read what libtpu 0.0.52 makes of it for every chip.
  elements, dims = largest(lowered.as_text())
  assert row * 2048 <= elements < row**2, dims  # activations of the MLP are seen
  memory = lowered.compile().memory_analysis()
  assert memory.temp_size_in_bytes < 2 * row**2, "room for the scores of one head in bfloat16"
  held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
  assert held < topology.chip(chip).hbm, f"{held / 2**30:.2f} GiB"
  # The state is donated: what goes in comes out in place.
  assert memory.alias_size_in_bytes > 0.9 * memory.output_size_in_bytes


@pytest.mark.aot
@needs_libtpu
def test_what_the_trainer_refuses_is_refused_here():
  devices = aot.devices("v5e:2x2")
  with pytest.raises(ConfigError, match="pallas_gpu"):
    aot.program(section(256, "model.attention=pallas_gpu"), devices)
  with pytest.raises(
    ValueError, match="multiples of 128"
  ):  # tiles that a chip cannot have, before compilation
    aot.program(section(256, "model.attention_tiles=(64, 64)"), devices).tiles()
  tiles = aot.program(section(256, "model.attention_tiles=(256, 256)"), devices).tiles()["full"]
  assert tuple(tiles[:2]) == (256, 256)
