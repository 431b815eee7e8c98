"""Marginalisation models: one pass gives the log-marginal of any part of a text.

Liu, Ramadge & Adams, "Generative Marginalization Models", 2310.12920. Beside the any-order conditionals φ, a
scalar f(x_S) is to be log p(x_S). Along any order the two agree, so f is fitted to

  f(x_S) + log p_φ(x_d | x_S) − f(x_{S ∪ d}) = 0        squared, over random S and d ∉ S,

with f(∅) = 0 by definition and no gradient to φ, which has its own likelihood bound.

Legend: B rows · N clean tokens.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from genmodels import rows
from genmodels.contracts import Noise, Row, Slots, Target
from genmodels.corruption.base import eligible
from genmodels.corruption.step import Step
from genmodels.objectives.base import Objective, Term

Array = jax.Array


def _terms() -> dict:
  return {
    "conditional": {"stream": "n", "on": "hit", "weight": "nelbo"},
    "consistency": {"head": "marginal", "stream": "n", "normaliser": "batch"},
  }


@dataclasses.dataclass(frozen=True)
class Marginal(Objective):
  """Two noisy streams, before and after one token of a path; f is read at each document's first slot.

  Fields:
    conditional, consistency: names of the two terms; the head of the second has one class, whose logit is f.
  """

  corruption: dict = dataclasses.field(default_factory=lambda: {"kind": "order_step"})
  layout: dict = dataclasses.field(default_factory=lambda: {"kind": "streams", "streams": ("n", "n1")})
  masks: dict = dataclasses.field(default_factory=lambda: {"full": "full"})
  terms: dict = dataclasses.field(default_factory=_terms)
  likelihood: str = "conditional"
  conditional: str = "conditional"
  consistency: str = "consistency"

  def __post_init__(self):
    super().__post_init__()
    if not isinstance(self.corruption, Step) or self.layout.streams != ("n", "n1"):
      raise ValueError(
        "marginals are fitted on two states of a path: corruption.kind='step', layout.streams=('n', 'n1')"
      )
    if set(self.terms) != {self.conditional, self.consistency} or self.likelihood != self.conditional:
      raise ValueError(
        f"terms has {sorted(self.terms)}, likelihood {self.likelihood!r}; the terms are "
        f"conditional={self.conditional!r}, which has the likelihood, and consistency={self.consistency!r}"
      )

  def read(self, row: Row, noise: Noise, slots: Slots, term: Term) -> Array:
    own = super().read(row, noise, slots, term)
    if term.head != self.terms[self.consistency].head:
      return own
    return jnp.where(rows.coordinates(row.doc) == rows.doc_bounds(row.doc)[0], own, -1)

  def prepare(self, row: Row, key: Array, step, latent=None, bound: tuple | None = None):
    if bound is not None:
      return super().prepare(row, key, step, latent, bound)
    noise = self.corruption.draw(row, key, step, latent)
    slots = self.slots(row, noise)
    term = self.terms[self.conditional]
    asked = self.read(row, noise, slots, term)
    conditional, tokens = self.target(row, noise, asked, term)
    before = self.read(row, noise, slots, self.terms[self.consistency])
    first = before >= 0
    after = jnp.where(first, slots.where[:, 1], -1)
    lo, hi = rows.doc_bounds(row.doc)
    hit = noise.hit[:, 0]
    pair = lambda a, b: jnp.concatenate([a, b], 1)
    weight = (first & (rows.count_in(lo, hi, hit) > 0)).astype(jnp.float32)
    consistency = Target(
      head=self.terms[self.consistency].head,
      slot=pair(before, after),
      value=jnp.zeros((row.doc.shape[0], 2 * row.doc.shape[1]), jnp.int32),
      weight=pair(weight, weight),
      given={
        "doc": row.doc,
        "next": hit & ~noise.hit[:, 1],
        "nothing": rows.count_in(lo, hi, hit) == rows.count_in(lo, hi, eligible(row)),
      },
    )
    inputs, _ = self.view(row, noise, latent=latent)
    targets = {self.conditional: conditional, self.consistency: consistency}
    return inputs, targets, {self.conditional: tokens, self.consistency: weight.sum()}

  def loss(self, outputs, targets):
    if self.consistency not in targets:
      return super().loss(outputs, targets)
    sums, aux = super().loss(outputs, {self.conditional: targets[self.conditional]})
    t, c = targets[self.consistency], targets[self.conditional]
    f = outputs.dists[self.consistency].map(lambda z: z[:, 0])
    before, after = jnp.split(f, 2, axis=1)
    before = jnp.where(t.given["nothing"], 0.0, before)
    logp = -jax.lax.stop_gradient(aux["per_token"][self.conditional] / jnp.where(c.weight > 0, c.weight, 1.0))
    lo, hi = rows.doc_bounds(t.given["doc"])
    step = rows.sum_in(lo, hi, jnp.where(t.given["next"], logp, 0.0))
    weight = t.weight[:, : before.shape[1]]
    error = weight * jnp.square(before + step - after)
    aux["per_token"][self.consistency] = error
    aux["ratios"][f"error/{self.consistency}"] = (error.sum(), weight.sum())
    return sums | {self.consistency: error.sum()}, aux
