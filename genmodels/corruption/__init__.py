"""Corruptions: what is drawn for the tokens of a row (levels, hits, orders), never where they sit."""

from genmodels.corruption.absorb import Absorb, MonotoneAbsorb
from genmodels.corruption.base import Blocks, Clean, Corruption
from genmodels.corruption.biased import PositionAbsorb
from genmodels.corruption.eos_unit import EosUnitAbsorb
from genmodels.corruption.inputs import InputMask
from genmodels.corruption.subset import Subset

REGISTRY = {
  "clean": Clean,
  "absorb": Absorb,
  "monotone_absorb": MonotoneAbsorb,
  "position_absorb": PositionAbsorb,
  "eos_unit_absorb": EosUnitAbsorb,
  "input_mask": InputMask,
  "subset": Subset,
}

__all__ = [
  "REGISTRY",
  "Absorb",
  "Blocks",
  "Clean",
  "Corruption",
  "EosUnitAbsorb",
  "InputMask",
  "MonotoneAbsorb",
  "PositionAbsorb",
  "Subset",
]
