"""Objectives whose model drafts what it then verifies itself: by masks, or by layers beside it.

Multi-token prediction by masks (Samragh et al., "Your LLM Knows the Future", arXiv:2507.11851).

Groups of k masks stand behind prefixes of the text; the mask in place of token j predicts token j + 1, from
the prefix and the masks before it. Adapters act at masks only, so the model's own next-token predictions keep
their bits. Three losses on the masks: cross-entropy of the model's head, cross-entropy of a small head that
is told token j (the sampler head), and the distance of the hidden state to the one from which the model
itself predicts token j + 1.

Block drafting (DFlash, arXiv:2602.06036): a clean anchor and masks behind it, drafted at once by a few layers
that read hidden states of a frozen model for the text before the anchor.

Legend: B rows · N clean tokens · S slots.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from genmodels.contracts import CLEAN, Noise, Row, Slots, Target
from genmodels.masks import AttnMask
from genmodels.objectives.base import Objective, Term

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class MultiToken(Objective):
  """The composed objective, asked at masks alone; `consistency` compares hidden states.

  Fields:
    consistency: term of a latent head, which is given the clean slot of the same token; "" for none.
  """

  adapters: str = "masked"
  consistency: str = ""

  def __post_init__(self):
    super().__post_init__()
    if self.consistency and self.consistency not in self.terms:
      raise ValueError(f"consistency is {self.consistency!r}; the terms are {', '.join(self.terms)}")
    if CLEAN not in self.layout.streams:
      raise ValueError(f"layout.streams is {self.layout.streams}; the prefixes are the clean stream 'c'")

  def read(self, row: Row, noise: Noise, slots: Slots, term: Term) -> Array:
    """As Objective.read; a noisy slot that shows its token (it belongs to no group) predicts nothing."""
    read = super().read(row, noise, slots, term)
    if term.stream == CLEAN:
      return read
    masked = noise.hit[:, int(self.layout.copy_of()[self.layout.streams.index(term.stream)])]
    if term.align == "shift":
      masked = jnp.roll(masked, 1 + term.ahead, axis=1)
    return jnp.where(masked, read, -1)

  def prepare(self, row: Row, key: Array, step, latent=None, bound: tuple | None = None):
    inputs, targets, denominators = super().prepare(row, key, step, latent, bound)
    if self.consistency in targets:
      term = self.terms[self.consistency]
      slots = self.slots(row, self.corruption.draw(row, key, step, latent, bound))
      own = slots.where[:, self.layout.streams.index(CLEAN)]
      own = jnp.roll(own, 1 + term.ahead, axis=1) if term.align == "shift" else own
      targets[self.consistency] = targets[self.consistency].replace(given={"slot": own})
    return inputs, targets, denominators


@dataclasses.dataclass(frozen=True)
class Taught(Objective):
  """The composed objective; heads that draft ahead learn the model's own distribution of their token, not the
  text's (Hydra++, Ankner et al. 2402.05109 §4): −Σ_v q(v) ln p(v), q of the likelihood's term, no gradient.
  """

  def measured(self, outputs, targets):
    own = self.likelihood
    learn = {n for n in targets if self.terms[n].ahead and own in targets}
    values = super().measured(outputs, {n: t for n, t in targets.items() if n not in learn})
    for name in learn:
      teacher = jax.lax.stop_gradient(outputs.dists[own])  # of the same token: both are asked token by token
      values[name] = outputs.dists[name].cross_entropy(teacher)
    return {name: values[name] for name in targets}


@dataclasses.dataclass(frozen=True)
class BlockDraft(Objective):
  """The composed objective of two streams: the trunk gets the clean one, a block head the noisy one.

  One table of relations says what both see. The noisy slots are queries over the keys of the trunk's slots
  (its tapped states) and over their own.
  """

  def __post_init__(self):
    super().__post_init__()
    if self.layout.streams != ("n", CLEAN) or self.layout.placement != "none":
      raise ValueError(
        f"layout has streams {self.layout.streams}, placement {self.layout.placement!r}; a block head takes "
        "the first half of the slots: streams=('n', 'c'), placement='none'"
      )

  def prepare(self, row: Row, key: Array, step, latent=None, bound: tuple | None = None):
    inputs, targets, denominators = super().prepare(row, key, step, latent, bound)
    N = row.tokens.shape[1]
    noisy, clean = (lambda x: x[..., :N]), (lambda x: x[..., N:])
    trunk = {p: AttnMask(clean(m.code), clean(m.lo), clean(m.hi)) for p, m in inputs.masks.items()}
    m = inputs.masks["full"]
    keys = jnp.concatenate([clean(m.code), noisy(m.code)], -1)
    given = {
      "ids": inputs.ids[:, :N, 0],
      "pos": inputs.pos[:, :N],
      "mask": AttnMask(keys, noisy(m.lo), noisy(m.hi)),
    }

    def split(target: Target, stream: str) -> Target:
      if stream == CLEAN:
        return target.replace(slot=jnp.where(target.slot >= 0, target.slot - N, -1))
      return target.replace(given=given)

    targets = {name: split(t, self.terms[name].stream) for name, t in targets.items()}
    inputs = inputs.replace(ids=inputs.ids[:, N:], pos=inputs.pos[:, N:], doc=inputs.doc[:, N:], masks=trunk)
    return inputs, targets, denominators
