"""Corruptions: what is drawn for the tokens of a row (levels, hits, orders), never where they sit."""

from genmodels.corruption.absorb import Absorb, MonotoneAbsorb
from genmodels.corruption.anneal import AnnealAbsorb
from genmodels.corruption.band import BandAbsorb, Search
from genmodels.corruption.base import Blocks, Clean, Corruption
from genmodels.corruption.biased import PositionAbsorb
from genmodels.corruption.delete import Delete
from genmodels.corruption.eos_unit import EosUnitAbsorb
from genmodels.corruption.groups import Groups
from genmodels.corruption.hybrid import Hybrid
from genmodels.corruption.inputs import InputMask
from genmodels.corruption.jacobi import JacobiState
from genmodels.corruption.sampled import SampledAbsorb
from genmodels.corruption.step import Step
from genmodels.corruption.subset import Subset
from genmodels.corruption.uniform import Uniform

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
  "hybrid": Hybrid,
  "delete": Delete,
  "order_step": Step,
  "uniform": Uniform,
  "groups": Groups,
  "jacobi_state": JacobiState,
}

__all__ = [
  "REGISTRY",
  "Absorb",
  "AnnealAbsorb",
  "BandAbsorb",
  "Blocks",
  "Clean",
  "Corruption",
  "Delete",
  "EosUnitAbsorb",
  "Hybrid",
  "Groups",
  "InputMask",
  "JacobiState",
  "MonotoneAbsorb",
  "PositionAbsorb",
  "SampledAbsorb",
  "Search",
  "Step",
  "Subset",
  "Uniform",
]
