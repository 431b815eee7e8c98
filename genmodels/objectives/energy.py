"""An energy beside a masked denoiser, by noise contrastive estimation (EDLM).

  p(x₀ | x_t) ∝ μ(x₀ | x_t) · exp(−E(x₀, x_t))
  loss = −log σ(−E(x₀, x_t)) − log σ(E(x̃₀, x_t)),      x₀ the text, x̃₀ ~ μ(· | x_t) one negative

Xu et al., "Energy-Based Diffusion Language Models for Text Generation", 2410.21357. A masked denoiser μ
predicts each token by itself; the energy is of the whole text, and at the optimum E = log μ − log p.

Legend: B rows · N clean tokens · S slots · D documents.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from genmodels import rows
from genmodels.contracts import Array, Noise, Row
from genmodels.corruption import rng
from genmodels.corruption.base import eligible
from genmodels.objectives.base import Nets, Objective, work


@dataclasses.dataclass(frozen=True)
class EnergyNCE(Objective):
  """The composed objective with an energy as a second player.

  The term of the energy's name is its loss, a mean over the documents with a masked token; it has a scale and
  nothing else that counts. None of its gradient reaches the denoiser, none of the denoiser's the energy.

  Fields:
    energy: name of the network (section `trees`, kind "energy"), of its player and of its term.
  """

  energy: str = "energy"

  def __post_init__(self):
    super().__post_init__()
    if self.layout.streams != ("n",):
      raise ValueError(f"layout.streams is {self.layout.streams}; an energy is of one noisy copy, ('n',)")
    if self.energy not in self.terms or self.energy == self.likelihood:
      raise ValueError(f"terms lack {self.energy!r}, the energy's own loss")

  def asked(self, row: Row, noise: Noise, latent=None, bound: tuple | None = None):
    inputs, targets, denominators = super().asked(row, noise, latent, bound)
    targets.pop(self.energy, None)
    if bound is None:
      denominators[self.energy] = jnp.sum(self.contrasted(row, noise))
    return inputs, targets, denominators

  def contrasted(self, row: Row, noise: Noise) -> Array:
    """float32[B, D]: 1 for documents with a masked token. Without one, text and negative are the same."""
    hit = (noise.hit[:, 0] & eligible(row)).astype(jnp.float32)
    return (rows.per_doc(row.doc, hit, row.docs.occurrence.shape[1]) > 0).astype(jnp.float32)

  def run(self, nets: Nets, row: Row, key: Array, step):
    if nets.player != self.energy:
      return super().run(nets, row, key, step)
    row = self.corruption.trimmed(row, key, step, None)
    noise = self.corruption.draw(row, key, step, nets.latent)
    inputs, targets, denominators = self.asked(row, noise, nets.latent)
    name = self.likelihood
    outputs = nets["model"](inputs, {name: targets[name]})
    negative = self.negative(outputs.dists[name], targets[name].weight > 0, row, key, step)
    slots, D = self.slots(row, noise), row.docs.occurrence.shape[1]
    at = lambda tokens: jnp.take_along_axis(tokens, jnp.maximum(slots.src, 0), 1)
    real, out = nets[self.energy](inputs, at(row.tokens), D)
    drawn, again = nets[self.energy](inputs, at(negative), D)
    counts = self.contrasted(row, noise)
    loss, right = nce(real, drawn), (real < drawn) + 0.5 * (real == drawn)
    mean = lambda x: (jnp.sum(counts * x), jnp.sum(counts))
    ratios = {"nce": mean(loss), "real": mean(real), "drawn": mean(drawn), "right": mean(right)}
    counted = {
      "model": work(outputs, {name: targets[name]}),
      "real": work(out, {}),
      "drawn": work(again, {}),
    }
    aux = {"per_token": {}, "ratios": ratios, "work": counted}
    return {self.energy: jnp.sum(counts * loss)}, denominators, aux

  def negative(self, dist, masked: Array, row: Row, key: Array, step) -> Array:
    """int32[B, N]: the text with every masked token drawn anew from the denoiser."""
    return jnp.where(masked, dist.sample(rng.token_keys(row, key, step, 0, rng.VALUE)), row.tokens)


def nce(real: Array, drawn: Array) -> Array:
  """−log σ(−real) − log σ(drawn) of energies of texts and of negatives."""
  return jax.nn.softplus(real) + jax.nn.softplus(-drawn)
