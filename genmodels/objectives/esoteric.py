"""Two sums over one geometry: diffusion, then left to right (Esoteric language models).

Sahoo et al., "Esoteric Language Models", 2506.01928. The corruption (`corruption.hybrid`) decides which of
the sums a document takes part in; each one is averaged over the tokens of its own documents, so that their
sum is the bound per token whatever the split.

Legend: B rows · N clean tokens · D documents.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from genmodels.contracts import CONTEXT, Row
from genmodels.corruption.hybrid import DIFFUSION, SEQUENTIAL, Hybrid
from genmodels.objectives.base import Objective

Array = jax.Array


def _terms() -> dict:
  asked = {"stream": "n", "on": "hit"}
  return {"diffusion": {**asked, "weight": "nelbo"}, "sequential": dict(asked)}


@dataclasses.dataclass(frozen=True)
class Esoteric(Objective):
  """The composed objective, each term over the documents of its mode.

  Fields:
    diffusion, sequential: names of the two terms.
  """

  corruption: dict = dataclasses.field(default_factory=lambda: {"kind": "hybrid"})
  layout: dict = dataclasses.field(default_factory=lambda: {"kind": "streams", "streams": ("n", "c")})
  masks: dict = dataclasses.field(default_factory=lambda: {"full": "eso_b"})
  terms: dict = dataclasses.field(default_factory=_terms)
  likelihood: str = "diffusion"
  diffusion: str = "diffusion"
  sequential: str = "sequential"

  def __post_init__(self):
    super().__post_init__()
    if not isinstance(self.corruption, Hybrid):
      raise ValueError("an esoteric model draws two modes: corruption.kind='hybrid'")
    if set(self.terms) != {self.diffusion, self.sequential}:
      raise ValueError(
        f"terms has {sorted(self.terms)}; it must have the names diffusion={self.diffusion!r}, "
        f"sequential={self.sequential!r}"
      )

  def of_term(self, row: Row, name: str) -> Row:
    mine = self.corruption.sequential(row) == (name == self.sequential)
    return row.replace(role=jnp.where(mine, row.role, CONTEXT))

  def bound(self, nets, row: Row, key: Array, r, R) -> tuple[Array, Array]:
    """Draw r of R of the bound: both sums of every document, one pass each."""
    by_mode = dataclasses.replace(self.corruption, modes="document")
    total = 0.0
    for mode, name in ((DIFFUSION, self.diffusion), (SEQUENTIAL, self.sequential)):
      alike = row.replace(docs=row.docs.replace(mode=jnp.full_like(row.docs.mode, mode)))
      part = dataclasses.replace(self, corruption=by_mode, likelihood=name)
      nll, tokens = super(Esoteric, part).bound(nets, alike, key, r, R)
      total = total + nll
    return total, tokens
