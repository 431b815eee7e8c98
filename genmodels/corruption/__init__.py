"""Corruptions: what is drawn for the tokens of a row (levels, hits, orders), never where they sit."""

from genmodels.corruption.absorb import Absorb, MonotoneAbsorb
from genmodels.corruption.base import Blocks, Clean, Corruption

REGISTRY = {"clean": Clean, "absorb": Absorb, "monotone_absorb": MonotoneAbsorb}

__all__ = ["REGISTRY", "Absorb", "Blocks", "Clean", "Corruption", "MonotoneAbsorb"]
