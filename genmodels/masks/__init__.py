"""Attention masks as intervals: key codes, query bounds, relation tables, builders, laws.

See docs/masks.md. `AttnMask` is what `genmodels.kernels.attention` takes.
"""

from genmodels.masks import builders, laws
from genmodels.masks.core import CODE_HIDDEN, MAX_TERMS, STREAM, AttnMask, DenseMask, normalise, plain_slots
from genmodels.masks.relations import Relations

__all__ = [
  "CODE_HIDDEN",
  "MAX_TERMS",
  "STREAM",
  "AttnMask",
  "DenseMask",
  "Relations",
  "builders",
  "laws",
  "normalise",
  "plain_slots",
]
