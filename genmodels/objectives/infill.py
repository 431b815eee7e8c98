"""Infilling by an autoregressive model that is told what a masked one makes of the whole text (MARIA).

  p(x_i | x_{<i}, x_{¬M}) = softmax([h_AR(x_{≤i−1}); h_MLM(x_{¬M})_i] W),      i ∈ M, left to right
  loss = Σ_{i∈M} −log p(x_i | x_{<i}, x_{¬M}) / |M|

Israel et al., "Enabling Autoregressive Models to Fill In Masked Tokens", 2502.06901. The masked model sees
the text with the tokens of M masked, the autoregressive one the clean text, of which slot i − 1 reaches no
token from i on: training is teacher forcing of the decoder that fills the masks from left to right. By the
chain rule the product over M is a probability of x_M given the rest, whatever M is.

Legend: B rows · N clean tokens · V classes.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp

from genmodels import rows
from genmodels.contracts import CLEAN, Array, Noise, Outputs, Row
from genmodels.corruption.base import eligible
from genmodels.objectives.base import Objective, work


@dataclasses.dataclass(frozen=True)
class Infill(Objective):
  """The composed objective of two streams, one for each network: the model sees the clean one, the network
  beside it the noisy one.

  The only term has a head of kind "joint" and is read from the clean stream, shifted.

  Fields:
    reported: what the reported likelihood is of. "masked": tokens given all that is not masked, the mean of
      their negative log-likelihood over exact counts of masked tokens, uniform in 1 … n: no likelihood of a
      text, which it would overstate. "text": of texts, every token masked: exact.
  """

  masks: dict = dataclasses.field(default_factory=lambda: {"full": "infill"})
  layout: dict = dataclasses.field(default_factory=lambda: {"kind": "streams", "streams": ("n", CLEAN)})
  reported: Literal["masked", "text"] = "masked"

  def __post_init__(self):
    super().__post_init__()
    layout = set(self.layout.streams), self.layout.copy, self.layout.placement
    if layout != ({"n", CLEAN}, "all", "none"):
      raise ValueError(
        f"layout has streams {self.layout.streams}, copy {self.layout.copy!r}, placement "
        f"{self.layout.placement!r}; each network sees a whole stream: streams=('n', 'c'), the rest as it is"
      )
    term = self.terms[self.likelihood]
    if len(self.terms) > 1 or (term.stream, term.align, term.on) != (CLEAN, "shift", "hit"):
      raise ValueError(
        f"terms are {list(self.terms)}, stream {term.stream!r}, align {term.align!r}, on {term.on!r}; one "
        "term is read from the clean stream: stream='c', align='shift', on='hit'"
      )

  @property
  def exact(self) -> bool:
    return self.reported == "text"

  @property
  def measures(self) -> str:
    return "" if self.exact else "of masked tokens given all others, over all counts of masked ones"

  def of_texts(self) -> Infill:
    return dataclasses.replace(self, reported="text")

  # -- what the two networks see --------------------------------------------------------------------

  def view(self, row: Row, noise: Noise, only: Array | None = None, latent=None):
    """As Objective.view; the slots of the clean stream where nothing else is said."""
    return super().view(row, noise, self.every(row, CLEAN) if only is None else only, latent)

  def shown_masked(self, row: Row, noise: Noise, latent=None):
    """Inputs of the network beside the model: token n in slot n, masked where it was hit."""
    return super().view(row, noise, self.every(row, "n"), latent)[0]

  def every(self, row: Row, stream: str) -> Array:
    """int32[B, N, 2]: all slots of a stream, in the order of the tokens."""
    n = jnp.broadcast_to(rows.coordinates(row.doc), row.doc.shape)
    at = jnp.stack([jnp.full_like(n, self.layout.streams.index(stream)), n], -1)
    return jnp.where((row.doc >= 0)[..., None], at, -1)

  # -- training and evaluation ----------------------------------------------------------------------

  def asked(self, row: Row, noise: Noise, latent=None, bound: tuple | None = None):
    if bound is not None and self.exact:
      noise = self.corruption.state(row, ~eligible(row))  # every token masked: the chain rule over the text
    inputs, targets, denominators = super().asked(row, noise, latent, bound)
    target = targets[self.likelihood]
    if bound is not None and not self.exact:
      target = target.replace(weight=target.weight * noise.nelbo[:, 0])
    slot = jnp.where(target.slot >= 0, rows.coordinates(row.doc), -1)
    given = {"inputs": self.shown_masked(row, noise, latent), "slot": slot}
    return inputs, targets | {self.likelihood: target.replace(given=given)}, denominators

  def routed(self, outputs: Outputs, sums: dict, denominators: dict, aux: dict):
    beside = (outputs.layers or {}).get("beside", {})
    counted = {name: work(Outputs({}, work=x), {}) for name, x in beside.items()}
    return super().routed(outputs, sums, denominators, aux | {"work": aux["work"] | counted})
