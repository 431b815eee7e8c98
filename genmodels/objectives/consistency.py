"""Consistency: from any state of its Jacobi trajectory a model is to predict as from the fixed point.

Consistency language models (Kou et al., arXiv:2403.00835, the global loss) and Jacobi Forcing (Hu et al.,
arXiv:2512.14681). The noisy stream shows states of trajectories, the clean one the text that they end in:

  loss = mean over kept tokens of H( p(· | text before), p(· | text before the window, states in it) )

in one forward of one network: the teacher is the clean stream's own prediction, without gradient, as in the
code of both papers. Kept are the tokens from a span's first wrong one on: before it both streams show the
same, and there is nothing to learn. The clean stream also keeps its next-token loss.

Legend: B rows · N clean tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from genmodels import rows
from genmodels.contracts import CLEAN, Array, Noise, Outputs, Row, Slots, Target
from genmodels.corruption.jacobi import JacobiState
from genmodels.objectives.base import Objective, Term

TAUGHT = "fixed_point"  # name of the second target: what the clean stream predicts for the same tokens


@dataclasses.dataclass(frozen=True)
class Consistency(Objective):
  """The composed objective with a term on a noisy stream that is compared with the clean stream's prediction.

  Fields:
    consistency: name of that term.
    since: where a span's tokens begin to count. "token": with its first wrong token (CLLM; its own
      prediction still sees what the teacher sees: no gradient, but it counts in the mean). "slot": with the
      first prediction that is made from a wrong token; the last one of a span predicts the next span's first
      token (Jacobi Forcing).
    mean: over "tokens" that are kept, or over the "spans" that have any, of the means in each.
    temperature: T of both distributions; the loss is multiplied by T² (Hinton et al. 1503.02531).
    smoothing: ε: the next-token loss in training is (1 − ε) · NLL + ε · the mean NLL of all classes (0.1 in
      the code of CLLM's authors).
  """

  consistency: str = "consistency"
  since: Literal["token", "slot"] = "token"
  mean: Literal["tokens", "spans"] = "spans"
  temperature: float = 1.0
  smoothing: float = 0.0

  def __post_init__(self):
    super().__post_init__()
    if not isinstance(self.corruption, JacobiState) or self.layout.streams != ("n", CLEAN):
      raise ValueError(
        "states of trajectories stand beside their text: corruption.kind='jacobi_state', "
        "layout.streams=('n', 'c')"
      )
    if self.consistency not in self.terms:
      raise ValueError(f"consistency is {self.consistency!r}; the terms are {', '.join(self.terms)}")
    term = self.terms[self.consistency]
    align = {"token": "shift_clean_boundary", "slot": "shift"}[self.since]
    if term.stream == CLEAN or term.align != align or self.likelihood == self.consistency:
      raise ValueError(
        f"terms.{self.consistency} is asked on the noisy stream with align={align!r} where "
        f"since={self.since!r}, and is no likelihood"
      )
    if self.temperature <= 0 or not 0 <= self.smoothing < 1:
      raise ValueError(
        f"temperature is {self.temperature}, smoothing {self.smoothing}; positive, and a share below 1"
      )

  def read(self, row: Row, noise: Noise, slots: Slots, term: Term) -> Array:
    """As Objective.read; the first token behind a prompt that is not copied is read from the clean stream."""
    read = super().read(row, noise, slots, term)
    if term.stream == CLEAN:
      return read
    clean = super().read(row, noise, slots, dataclasses.replace(term, stream=CLEAN, align="shift"))
    return jnp.where(read < 0, clean, read)

  def kept(self, row: Row, noise: Noise) -> tuple[Array, Array, Array]:
    """bool[B, N], the predicted tokens that count; and the span [lo, hi) that each one counts for."""
    lo, hi = self.corruption.spans(row)
    n = jnp.broadcast_to(rows.coordinates(row.doc), row.doc.shape)
    kept = rows.count_in(lo, n + 1, noise.hit[:, 0]) > 0
    if self.since == "token":
      return kept, lo, hi
    # Of the slot before, which lies in the span before where a span begins.
    before = lambda x: jnp.roll(x, 1, axis=1)
    inside = n > rows.doc_bounds(row.doc)[0]
    return inside & before(kept), before(lo) + 1, before(hi) + 1

  def asked(self, row: Row, noise: Noise, latent=None, bound: tuple | None = None):
    inputs, targets, denominators = super().asked(row, noise, latent, bound)
    name = self.consistency
    if name not in targets:
      return inputs, targets, denominators
    target = targets[name]
    kept, lo, hi = self.kept(row, noise)
    kept &= target.weight > 0
    weight = kept.astype(jnp.float32)
    if self.mean == "spans":
      _, end = rows.doc_bounds(row.doc)
      weight = weight / jnp.maximum(rows.count_in(lo, jnp.minimum(hi, end), kept), 1)
    taught = dataclasses.replace(self.terms[name], stream=CLEAN, align="shift")
    clean = self.read(row, noise, self.slots(row, noise), taught)
    only = lambda slot: jnp.where(kept, slot, -1)
    targets[name] = target.replace(slot=only(target.slot), weight=weight)
    targets[TAUGHT] = Target(target.head, only(clean), target.value, weight)
    denominators[name] = weight.sum()
    return inputs, targets, denominators

  def measured(self, outputs: Outputs, targets: dict[str, Target]) -> dict[str, Array]:
    name = self.consistency
    own = {n: t for n, t in targets.items() if n not in (name, TAUGHT)}
    values = super().measured(outputs, own)
    if name not in targets:  # a likelihood
      return values
    if self.smoothing:
      mean = outputs.dists[self.likelihood].map(_mean_nll)
      values[self.likelihood] = (1 - self.smoothing) * values[self.likelihood] + self.smoothing * mean
    taught = jax.lax.stop_gradient(outputs.dists[TAUGHT])
    cross = outputs.dists[name].cross_entropy(taught, self.temperature)
    return values | {name: self.temperature**2 * cross}

  def loss(self, outputs: Outputs, targets: dict[str, Target]) -> tuple[dict[str, Array], dict]:
    """As Objective.loss; "kl/…" in the ratios is the term less the teacher's entropy (no gradient)."""
    sums, aux = super().loss(outputs, targets)
    name = self.consistency
    if name in targets and self.temperature == 1:
      count, weight = aux["ratios"][f"ce/{name}"][1], targets[name].weight
      entropy = jax.lax.stop_gradient(outputs.dists[TAUGHT]).entropy()
      excess = aux["ratios"][f"ce/{name}"][0] - jnp.sum((weight > 0) * entropy)
      aux["ratios"][f"kl/{name}"] = (excess, count)
    return sums, aux


def _mean_nll(logits: Array) -> Array:
  """float32[c]: mean of −ln p over the classes that are allowed, of logits float32[c, V]."""
  some = logits > -jnp.inf
  return jax.nn.logsumexp(logits, -1) - jnp.where(some, logits, 0).sum(-1) / some.sum(-1)
