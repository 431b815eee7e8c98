"""Topologies, chips and their facts."""

import importlib.util

import numpy as np
import pytest

from genmodels import aot, metrics
from genmodels.aot import topology

needs_libtpu = pytest.mark.skipif(topology.missing() is not None, reason=topology.missing() or "")


@pytest.mark.aot
@needs_libtpu
@pytest.mark.parametrize(
  "name, count",
  [("v5e:2x2", 4), ("v5p:2x2x1", 4), ("v6e:2x2", 4), ("tpu7x:2x2x1", 8), ("v5p:4x4x8", 128)],
)
def test_devices(name, count):
  found = aot.devices(name)
  chip = aot.chip(name)
  assert len(found) == count and len(set(found)) == count
  assert {d.device_kind for d in found} == {chip.kind}
  assert {d.num_cores for d in found} == {chip.cores}
  assert aot.target(name).platform == "tpu" and aot.target(name).kind == chip.kind


@pytest.mark.aot
@needs_libtpu
def test_unknown_bounds_carry_the_compilers_words():
  with pytest.raises(ValueError, match="v5e:3x7.*divisible"):
    aot.devices("v5e:3x7")


def test_chips():
  # Data-sheet clocks: peak and geometry agree only if both are right.
  clocks = {"v5e": 1.5, "v5p": 1.75, "v6e": 1.75, "tpu7x": 2.2}
  for name, ghz in clocks.items():
    chip = aot.chip(name)
    np.testing.assert_allclose(chip.clock, ghz * 1e9, rtol=5e-3)
    assert metrics.peak(chip.kind).flops == chip.flops * chip.cores
  assert aot.chip("v5p:2x2x1") is aot.chip("TPU v5p") is aot.chip("TPU v5")
  with pytest.raises(ValueError, match="known are v5e"):
    aot.chip("v9:2x2")


def test_missing_libtpu_names_the_fix(monkeypatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "libtpu" else find(n, *a))
  with pytest.raises(ModuleNotFoundError, match=r"genmodels\[tpu\]|Linux x86_64 only"):
    aot.devices("v5e:2x2")


@pytest.mark.parametrize("name", ["v5p", "v5p:", "2x2", "v5p:2,2"])
def test_malformed(name):
  if topology.missing():
    pytest.skip(topology.missing())
  with pytest.raises(ValueError, match="chip:bounds"):
    aot.devices(name)
