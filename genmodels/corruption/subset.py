"""A random part of a document is given, the rest is predicted one after another (any-subset models).

Legend: B rows · N clean tokens.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from genmodels.corruption.absorb import Absorb
from genmodels.corruption.base import eligible


@dataclasses.dataclass(frozen=True)
class Subset(Absorb):
  """k of a document's n tokens, k uniform, are asked for; generation ranks put the given ones first.

  Guo & Ermon, "Reviving Any-Subset Autoregressive Models with Principled Parallel Sampling and Speculative
  Decoding", 2504.20456: inside the given part and inside the rest the order is that of the text, so every
  conditional of the rest given the part has one factorisation. Likelihoods ask for every token: with nothing
  given that order is left to right and the sum is the exact negative log-likelihood.
  """

  order: str = "observed_first"

  def __post_init__(self):
    super().__post_init__()
    if (self.unit, self.count, self.order) != ("doc", "exact", "observed_first"):
      raise ValueError(
        "any-subset models draw exact counts per document and put the given tokens first: unit='doc', "
        "count='exact', order='observed_first'"
      )

  def levels(self, row, lo, hi, key, at, step, bound):
    if bound is not None:
      return jnp.ones(row.doc.shape, jnp.float32)
    return super().levels(row, lo, hi, key, at, step, bound)

  def draw(self, row, key, step, latent=None, bound=None):
    noise = super().draw(row, key, step, latent, bound)
    return noise.replace(nelbo=jnp.ones_like(noise.nelbo))  # a chain rule: every factor counts once

  def plan(self, row):
    """Ranks int32[B, N] of a row to be generated, and how many tokens come several at a time: none, [B]."""
    lo, _ = self.blocks.bounds(row, 0)
    return self.ranks(row, lo, eligible(row)[:, None]), jnp.zeros(row.doc.shape[:1], jnp.int32)

  def state(self, row, committed, step=0):
    noise = super().state(row, committed, step)
    # The given part is the prompt, whatever has been generated since: its tokens keep their ranks, and so
    # their keys and values.
    lo, _ = self.blocks.bounds(row, step)
    return noise.replace(order=self.ranks(row, lo, eligible(row)[:, None]))
