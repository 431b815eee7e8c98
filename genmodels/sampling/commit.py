"""Commit rules: where in the unit the tokens that a quota commits are taken from.

Legend: B rows · M tokens asked for.
"""

from __future__ import annotations

import dataclasses

from genmodels.contracts import Array
from genmodels.sampling.quota import Unit


@dataclasses.dataclass(frozen=True)
class Anywhere:
  """The surest tokens first, wherever they are (MaskGIT, LLaDA)."""

  def rank(self, unit: Unit) -> Unit:
    """The unit with the `rank` by which quotas order its tokens."""
    return unit

  def select(self, unit: Unit, chosen: Array) -> Array:
    """bool[B, M]: what is committed of what the quota chose."""
    return chosen


REGISTRY = {"anywhere": Anywhere}
