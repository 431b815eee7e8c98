"""Corruptions: what is drawn for the tokens of a row (levels, hits, orders), never where they sit."""

from genmodels.corruption.absorb import Absorb, MonotoneAbsorb
from genmodels.corruption.anneal import AnnealAbsorb
from genmodels.corruption.band import BandAbsorb, Search
from genmodels.corruption.base import Blocks, Clean, Corruption
from genmodels.corruption.biased import PositionAbsorb
from genmodels.corruption.eos_unit import EosUnitAbsorb
from genmodels.corruption.groups import Groups
from genmodels.corruption.inputs import InputMask
from genmodels.corruption.sampled import SampledAbsorb
from genmodels.corruption.subset import Subset

REGISTRY = {
  "clean": Clean,
  "absorb": Absorb,
  "anneal_absorb": AnnealAbsorb,
  "band_absorb": BandAbsorb,
  "monotone_absorb": MonotoneAbsorb,
  "position_absorb": PositionAbsorb,
  "eos_unit_absorb": EosUnitAbsorb,
  "input_mask": InputMask,
  "sampled_absorb": SampledAbsorb,
  "subset": Subset,
  "groups": Groups,
}

__all__ = [
  "REGISTRY",
  "Absorb",
  "AnnealAbsorb",
  "BandAbsorb",
  "Blocks",
  "Clean",
  "Corruption",
  "EosUnitAbsorb",
  "Groups",
  "InputMask",
  "MonotoneAbsorb",
  "PositionAbsorb",
  "SampledAbsorb",
  "Search",
  "Subset",
]
