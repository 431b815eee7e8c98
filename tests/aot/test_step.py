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


ARRAY = re.compile(r"\b(?:pred|[a-z]+\d+\w*)\[([\d,]+)\]")


def largest(text):
  """Elements of the largest array in a compiled program's text, and its dimensions."""
  return max((math.prod(dims), dims) for dims in {tuple(map(int, d.split(","))) for d in ARRAY.findall(text)})


def test_the_largest_array_of_a_text_is_found():
  text = "%a.1 = (bf16[2,8]{1,0:T(8,128)(2,1)}, f8e4m3fn[3,5]) f(pred[17], s32[])\n  ROOT %b = f32[4,4]{1,0} g(%a.1)"
  assert largest(text) == (17, (17,))
  assert largest(text.replace("[17]", "[1]")) == (16, (4, 4))


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
  compiled = program.lower().compile()
  memory = compiled.memory_analysis()
  row = slots * 1024  # a row a device
  elements, dims = largest(compiled.as_text())
  # Activations are seen: a row times half of the MLP's 2,048 hidden units (tensor=2), or more.
  assert row * 1024 <= elements < row**2, dims
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
