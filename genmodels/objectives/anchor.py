"""Masked diffusion whose model first predicts the important tokens (ADLM).

  loss = Σ_masked w CE_i(denoiser) + γ Σ_masked, important w CE_i(anchor)

Rout et al., "Anchored Diffusion Language Model", 2505.18456: a first network predicts anchor tokens, its soft
output enters the denoiser. Here a token is important that occurs at most `rare` times in its document; the
details are unverified. The model has both networks (`model.anchor`), so that the bound, evaluation and
samplers are those of masked diffusion.

Legend: B rows · N clean tokens.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from genmodels import rows
from genmodels.contracts import Row
from genmodels.objectives.base import Objective


@dataclasses.dataclass(frozen=True)
class Anchored(Objective):
  """The composed objective with a term that asks the head "anchor" for important tokens only.

  Fields:
    anchor: name of the term; its scale is γ.
    rare: most occurrences of an important token in its document.
  """

  anchor: str = "anchor"
  rare: int = 5

  def __post_init__(self):
    super().__post_init__()
    if self.anchor not in self.terms or self.anchor == self.likelihood:
      raise ValueError(f"terms lack {self.anchor!r}, the anchor's own loss")
    if self.terms[self.anchor].head != "anchor" or self.terms[self.likelihood].head == "anchor":
      raise ValueError(f"terms.{self.anchor}.head must be 'anchor', and that of the likelihood another one")
    if self.rare < 1:
      raise ValueError(f"rare is {self.rare}; at least 1 occurrence, a token's own")

  def asked(self, row: Row, noise, latent=None, bound: tuple | None = None):
    inputs, targets, denominators = super().asked(row, noise, latent, bound)
    if self.anchor in targets:
      t = targets[self.anchor]
      important = rows.repeats(row.doc, row.tokens) <= self.rare
      slot, weight = jnp.where(important, t.slot, -1), jnp.where(important, t.weight, 0.0)
      targets[self.anchor] = t.replace(slot=slot, weight=weight)
    return inputs, targets, denominators
