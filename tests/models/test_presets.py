"""Published parameter counts, exactly, from abstract parameters."""

import pytest

from genmodels import models
from genmodels.models.presets import PRESETS

LLAMAGEN = {  # width, layers, MLP, and the count the paper's table rounds (specs: vision §2.1)
  "b": (768, 12, 2048, "110.9"),
  "l": (1024, 24, 2816, "342.9"),
  "xl": (1280, 36, 3584, "774.7"),
  "xxl": (1536, 48, 4096, "1411.0"),
  "xxxl": (2560, 48, 6912, "3893.0"),
  "1b": (2048, 22, 5632, "1199.6"),
  "3b": (3200, 24, 8704, "3096.7"),
  "7b": (4096, 32, 11008, "6614.6"),
}


@pytest.mark.parametrize("name", LLAMAGEN)
def test_llamagen_counts(name):
  D, L, F, millions = LLAMAGEN[name]
  model = models.build(dict(preset=f"llamagen-{name}"))
  count = models.count(model.abstract_params())
  assert count == L * (4 * D * D + 3 * D * F + 2 * D) + D + 1001 * D + 2 * 16384 * D
  assert f"{count / 1e6:.1f}" == millions


# Checkpoints' own totals (tied tables counted once).
COUNTS = {
  "llama2-7b": 6_738_415_616,
  "llama3-8b": 8_030_261_248,
  "llama3.1-70b": 70_553_706_496,
  "llama3.2-1b": 1_235_814_400,
  "qwen2.5-0.5b": 494_032_768,
  "qwen2.5-7b": 7_615_616_512,
  "qwen3-0.6b": 596_049_920,
  "qwen3-8b": 8_190_735_360,
  "qwen3-30b-a3b": 30_532_122_624,
  "qwen3-235b-a22b": 235_093_634_560,
  "gpt2": 124_439_808,
  "gpt2-xl": 1_557_611_200,
}


@pytest.mark.parametrize("name", COUNTS)
def test_language_model_counts(name):
  assert models.count(models.build(dict(preset=name)).abstract_params()) == COUNTS[name]


@pytest.mark.parametrize("name,millions", [("var-d16", "310.28"), ("var-d20", "600.9"), ("var-d30", "2010")])
def test_var_counts(name, millions):
  count = models.count(models.build(dict(preset=name)).abstract_params()) / 1e6
  digits = len(millions.partition(".")[2])
  assert f"{count:.{digits}f}" == millions


def test_every_preset_builds_and_overrides_apply():
  for name in PRESETS:
    one = {"segments": (), "pattern": ({"mlp": "moe"},)} if "segments" in PRESETS[name] else {}
    model = models.build(dict(preset=name, layers=1, dtype="bfloat16", **one))
    assert model.cfg.layers == 1 and model.cfg.dtype == "bfloat16"
