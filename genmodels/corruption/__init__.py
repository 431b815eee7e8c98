"""Corruptions: what is drawn for the tokens of a row (levels, hits, orders), never where they sit."""

from genmodels.corruption.absorb import Absorb, MonotoneAbsorb
from genmodels.corruption.base import Blocks, Clean, Corruption
from genmodels.corruption.biased import PositionAbsorb
from genmodels.corruption.groups import Groups
from genmodels.corruption.inputs import InputMask
from genmodels.corruption.subset import Subset

REGISTRY = {
  "clean": Clean,
  "absorb": Absorb,
  "monotone_absorb": MonotoneAbsorb,
  "position_absorb": PositionAbsorb,
  "input_mask": InputMask,
  "subset": Subset,
  "groups": Groups,
}

__all__ = [
  "REGISTRY",
  "Absorb",
  "Blocks",
  "Clean",
  "Corruption",
  "Groups",
  "InputMask",
  "MonotoneAbsorb",
  "PositionAbsorb",
  "Subset",
]
