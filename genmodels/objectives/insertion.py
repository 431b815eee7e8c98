"""Insertion language models: one softmax over (gap × vocabulary), and a head that says when to stop.

Patel et al., "Insertion Language Models: Sequence Generation with Arbitrary-Position Insertions",
2505.05755. m tokens of a text are left out. From the rest, the model gives the logit l(j, v) of inserting v
behind token j; the target is uniform over the m tokens left out, each in the gap where it belongs:

  loss = −1/m Σ_i [ l(gap(i), x_i) − log Σ_{j,v} e^{l(j,v)} ]  +  CE(stop, m = 0).

A text of n tokens is reached along n! paths, one for each order of insertion, and m is uniform in 0 … n, so

  −log p(x) ≤ (n + 1) E_m [ loss − log m ]      (log m = 0 for m = 0),

which is what likelihoods report.

Legend: B rows · N tokens · S slots · D documents · V vocabulary.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from genmodels import rows
from genmodels.contracts import Inputs, Noise, Row, Slots, Target
from genmodels.corruption.delete import Delete
from genmodels.objectives.base import Objective, Term

Array = jax.Array

_NONE = -1e30  # the logit of what is no gap; finite, so that its gradient is


def _terms() -> dict:
  asked = {"stream": "n", "normaliser": "batch"}
  return {"insert": {"head": "text", "on": "hit", **asked}, "stop": {"head": "stop", **asked}}


@dataclasses.dataclass(frozen=True)
class Insertion(Objective):
  """A noisy stream whose dropped tokens have no slot; two terms, both per document.

  A term is weighted by its `scale` alone. Positions are places among the tokens that are there
  (`Noise.order`), whatever the physical order.

  Fields:
    insert, stop: names of the two terms; stop's head has two classes (1: complete).
  """

  corruption: dict = dataclasses.field(default_factory=lambda: {"kind": "delete"})
  layout: dict = dataclasses.field(default_factory=lambda: {"kind": "streams", "streams": ("n",)})
  masks: dict = dataclasses.field(default_factory=lambda: {"full": "full"})
  terms: dict = dataclasses.field(default_factory=_terms)
  likelihood: str = "insert"
  insert: str = "insert"
  stop: str = "stop"

  def __post_init__(self):
    super().__post_init__()
    if not isinstance(self.corruption, Delete):
      raise ValueError("insertion models fill what was left out: corruption.kind='delete'")
    if set(self.terms) != {self.insert, self.stop} or self.likelihood != self.insert:
      raise ValueError(
        f"terms has {sorted(self.terms)}, likelihood {self.likelihood!r}; the terms are "
        f"insert={self.insert!r}, which decodes, and stop={self.stop!r}"
      )
    if self.layout.streams != ("n",):
      raise ValueError(f"layout.streams is {self.layout.streams}; insertion models have one stream, ('n',)")

  def slots(self, row: Row, noise: Noise, only: Array | None = None) -> Slots:
    slots = super().slots(row, noise, only)
    gone = jnp.take_along_axis(noise.hit[:, 0], jnp.maximum(slots.src, 0), 1)
    return slots.replace(src=jnp.where(gone, -1, slots.src), doc=jnp.where(gone, -1, slots.doc))

  def inputs(self, row: Row, noise: Noise, slots: Slots, latent=None) -> Inputs:
    place = jnp.take_along_axis(noise.order, jnp.maximum(slots.src, 0), 1)
    return super().inputs(row, noise, slots, latent).replace(pos=place[..., None].astype(jnp.float32))

  def read(self, row: Row, noise: Noise, slots: Slots, term: Term) -> Array:
    """Slots of the gaps: of the last token left at or before token n; for `stop` the document's first."""
    own = super().read(row, noise, slots, term)
    lo, _ = rows.doc_bounds(row.doc)
    n = rows.coordinates(row.doc)
    if term.head == self.terms[self.stop].head:
      return jnp.where(n == lo, own, -1)
    left = jax.lax.cummax(jnp.where(noise.hit[:, 0], lo, n), axis=1)
    return jnp.where(row.doc >= 0, jnp.take_along_axis(own, left, 1), -1)

  def prepare(self, row: Row, key: Array, step, latent=None, bound: tuple | None = None):
    noise = self.corruption.draw(row, key, step, latent, bound)
    inputs, read = self.view(row, noise, latent=latent)
    lo, hi = rows.doc_bounds(row.doc)
    hit = noise.hit[:, 0]
    m = rows.count_in(lo, hi, hit)
    first = (rows.coordinates(row.doc) == lo) & (row.doc >= 0)
    # A likelihood counts the n + 1 states of a path, and the m tokens that may come next as one event.
    scale = noise.nelbo[:, 0] if bound is not None else jnp.ones(hit.shape, jnp.float32)
    choices = jnp.log(jnp.maximum(m, 1)) if bound is not None else jnp.zeros(hit.shape, jnp.float32)
    share = jnp.where(hit, scale / jnp.maximum(m, 1), 0.0)
    insert = Target(
      head=self.terms[self.insert].head,
      slot=read[self.insert],
      value=row.tokens,
      weight=(row.doc >= 0).astype(jnp.float32),  # every gap is needed for the sum over gaps
      given={"doc": row.doc, "hit": hit, "share": share, "choices": choices},
    )
    stop = Target(
      head=self.terms[self.stop].head,
      slot=read[self.stop],
      value=(m == 0).astype(jnp.int32),
      weight=jnp.where(first, scale, 0.0),
    )
    documents = first.astype(jnp.float32).sum()
    return inputs, {self.insert: insert, self.stop: stop}, {self.insert: documents, self.stop: documents}

  def loss(self, outputs, targets):
    t, given = targets[self.insert], targets[self.insert].given

    def fn(logits, value):
      at = jnp.take_along_axis(logits, value[:, None], 1)[:, 0]
      return jax.nn.logsumexp(logits, -1), at

    gap, at = outputs.dists[self.insert].map(fn, t.value)
    left = (given["doc"] >= 0) & ~given["hit"]
    nll = of_gaps(jnp.where(left, gap, _NONE), given["doc"]) - at
    per_token = {self.insert: jnp.where(given["hit"], given["share"] * (nll - given["choices"]), 0.0)}
    stop = targets[self.stop]
    ce = outputs.dists[self.stop].nll(stop.value)
    per_token[self.stop] = stop.weight * ce
    asked = (stop.weight > 0).astype(jnp.float32)
    ratios = {
      f"ce/{self.insert}": (jnp.where(given["hit"], nll, 0.0).sum(), given["hit"].astype(jnp.float32).sum()),
      f"ce/{self.stop}": ((asked * ce).sum(), asked.sum()),
    }
    return {n: x.sum() for n, x in per_token.items()}, {"per_token": per_token, "ratios": ratios}

  def bound(self, nets, row: Row, key: Array, r, R) -> tuple[Array, Array]:
    """Draw r of R of the bound, stopping included, and tokens but each document's first."""
    inputs, targets, _ = self.prepare(row, key, 0, nets.latent, bound=(r, R))
    per_token = self.loss(nets["model"](inputs, targets), targets)[1]["per_token"]
    D = row.docs.occurrence.shape[1]
    tokens = self.corruption.droppable(row).astype(jnp.float32)
    return rows.per_doc(row.doc, sum(per_token.values()), D), rows.per_doc(row.doc, tokens, D)


def of_gaps(gap: Array, doc: Array) -> Array:
  """log Σ_j e^gap(j) over each token's document, float32[B, N].

  Args:
    gap: float32[B, N], _NONE where there is no gap; doc: int32[B, N].
  """
  _, hi = rows.doc_bounds(doc)
  start = jnp.pad(doc[:, 1:] != doc[:, :-1], ((0, 0), (1, 0)), constant_values=True)

  def join(a, b):
    """Running sums that begin anew with each document; sums of differences would lose the small ones."""
    return a[0] | b[0], jnp.where(b[0], b[1], jnp.logaddexp(a[1], b[1]))

  total = jax.lax.associative_scan(join, (start, gap), axis=1)[1]
  return jnp.take_along_axis(total, hi - 1, 1)
