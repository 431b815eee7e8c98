"""Uniform-state diffusion: every token of a canvas is predicted, noised or not; its likelihood bound.

With N states and α = 1 − t the chance that a token was not drawn anew, q_t(z|x) = x̄_z/N for
x̄ = N α x + (1 − α) 1. The reverse process that predicts x̂ jumps from z to j at rate (β/N) x̄̂_j/x̄̂_z,
β = −α'/α, and the path measures' divergence is (Schiff et al., 2412.10193, eq. 18, with its sign)

  −log p(x) ≤ E_t E_z β/N Σ_i [ N/x̄̂_z − N/x̄_z + Σ_j (x̄_j/x̄_z) log (x̄_j x̄̂_z / (x̄_z x̄̂_j)) ].

Legend: B rows · N clean tokens · S slots · V vocabulary · c positions of a chunk · D width.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from genmodels import rows
from genmodels.contracts import CLEAN, Noise, Row, Slots
from genmodels.corruption import rng
from genmodels.corruption.base import eligible
from genmodels.corruption.uniform import Uniform
from genmodels.objectives.base import Objective, work

Array = jax.Array


def path_divergence(logits: Array, x: Array, z: Array, t: Array, states: int) -> Array:
  """float32[c], the integrand of the bound.

  Args:
    logits: float32[c, V], −inf at ids that are no state. x, z: int32[c], clean and shown.
    t: float32[c], in (0, 1).
  """
  n, alpha = jnp.float32(states), 1 - t
  logp = jax.nn.log_softmax(logits, -1)
  some = logp > -jnp.inf
  a, rest = n * alpha, t
  bar = a[:, None] * jnp.exp(logp) + rest[:, None]  # x̄̂
  log_bar = jnp.log(jnp.where(some, bar, 1.0))
  at = lambda m, i: jnp.take_along_axis(m, i[:, None], 1)[:, 0]
  own = a + rest  # x̄_x
  here = jnp.where(x == z, own, rest)  # x̄_z
  # Σ_j x̄_j log x̄_j and Σ_j x̄_j log x̄̂_j: x̄ takes two values.
  entropy = (n - 1) * rest * jnp.log(rest) + own * jnp.log(own)
  cross = rest * log_bar.sum(-1) + a * at(log_bar, x)
  jumps = (entropy - cross + n * (at(log_bar, z) - jnp.log(here))) / here
  return (jumps + n / at(bar, z) - n / here) / (alpha * n)


@dataclasses.dataclass(frozen=True)
class UniformDiffusion(Objective):
  """The composed objective on uniform-state noise: flat cross-entropies, the bound above as likelihood.

  A noisy slot shows an observation of its token, not its identity, so that it may be asked for it whether it
  was drawn anew or not (`on="all"`).
  """

  def __post_init__(self):
    super().__post_init__()
    if not isinstance(self.corruption, Uniform):
      raise ValueError("uniform-state diffusion draws random tokens: corruption.kind='uniform'")
    for name, term in self.terms.items():
      if term.weight != "one" or (term.stream != CLEAN and term.align != "same"):
        raise ValueError(
          f"terms.{name} has weight {term.weight!r}, align {term.align!r}; on random tokens only 'one' and "
          "'same' have a meaning; likelihoods have weights of their own"
        )

  def prepare(self, row: Row, key: Array, step, latent=None, bound: tuple | None = None):
    """As Objective.prepare; `bound` draws of a noisy term hand the observation to the loss."""
    row = row if bound is not None else self.corruption.given(row, key, step)
    if bound is None or self.terms[self.likelihood].stream == CLEAN:
      return super().prepare(row, key, step, latent, bound)
    everything = {n: dataclasses.replace(t, on="all") for n, t in self.terms.items()}
    whole = dataclasses.replace(self, terms=everything)  # tokens that were not drawn anew count too
    inputs, targets, denominators = super(UniformDiffusion, whole).prepare(row, key, step, latent, bound)
    noise = self.corruption.draw(row, key, step, latent, bound)
    shown = jnp.where(noise.hit[:, 0], noise.value[:, 0], row.tokens)
    given = {"shown": shown, "t": noise.level[:, 0]}
    name = self.likelihood
    return inputs, {name: targets[name].replace(given=given)}, denominators

  def loss(self, outputs, targets):
    """As Objective.loss; a target with an observation is scored by the bound's integrand."""
    if not any(t.given for t in targets.values()):
      return super().loss(outputs, targets)
    ((name, t),) = targets.items()
    c = self.corruption
    state = np.ones((c.vocab,), bool)
    state[list(c.exclude)] = False

    def fn(logits, x, z, level):
      logits = jnp.where(state, logits[:, : c.vocab], -jnp.inf)
      return path_divergence(logits, x, z, level, c.states)

    nats = outputs.dists[name].map(fn, t.value, t.given["shown"], t.given["t"])
    per_token = t.weight * nats
    return {name: per_token.sum()}, {"per_token": {name: per_token}, "ratios": {}}

  def carries(self, row: Row, noise: Noise, slots: Slots) -> Array:
    clean = jnp.asarray(self.layout.copy_of())[slots.stream] < 0
    return super().carries(row, noise, slots) & clean[..., None]

  def drawn(self, row: Row, noise: Noise, latent=None):
    """(inputs, targets, denominators) of noise that is given: one pass of several."""
    inputs, read = self.view(row, noise, latent=latent)
    out = {n: self.target(self.of_term(row, n), noise, read[n], t) for n, t in self.terms.items()}
    return inputs, {n: t for n, (t, _) in out.items()}, {n: d for n, (_, d) in out.items()}


@dataclasses.dataclass(frozen=True)
class Unrolled(UniformDiffusion):
  """Denoising that learns from its own output: mean loss over a noised canvas and what the model makes of it.

  Savinov et al., "Step-unrolled Denoising Autoencoders for Text Generation", 2112.06749 (SUNDAE), eq. 5: x₁
  is drawn from the prediction at x₀ without gradient, and predicts the text in turn.

  Fields:
    unroll: further passes; 0 is plain denoising.
  """

  unroll: int = 1

  def __post_init__(self):
    super().__post_init__()
    if self.unroll < 0 or len(self.terms) != 1:
      raise ValueError(f"unroll is {self.unroll}, terms {sorted(self.terms)}; at least 0, and one term")

  def run(self, nets, row, key, step):
    row = self.corruption.given(row, key, step)
    noise = self.corruption.draw(row, key, step, nets.latent)
    name, passes = self.likelihood, []
    for i in range(self.unroll + 1):
      inputs, targets, denominators = self.drawn(row, noise, nets.latent)
      outputs = nets["model"](inputs, targets)
      sums, aux = self.loss(outputs, targets)
      passes.append((sums, aux | {"work": {"model": work(outputs, targets)}}))
      if i < self.unroll:
        keys = rng.token_keys(row, key, step, 1 + i, rng.VALUE)
        value = jax.lax.stop_gradient(outputs.dists[name].sample(keys))
        asked = targets[name].weight > 0  # the rest keeps what it shows
        shown = jnp.where(asked, value, jnp.where(noise.hit[:, 0], noise.value[:, 0], row.tokens))
        noise = noise.replace(hit=eligible(row)[:, None], value=shown[:, None])
    mean = lambda x: sum(x) / len(passes)
    sums = {name: mean([s[name] for s, _ in passes])}
    metrics = {
      "per_token": {name: mean([aux["per_token"][name] for _, aux in passes])},
      "ratios": {f"{k}/{i}": v for i, (_, aux) in enumerate(passes) for k, v in aux["ratios"].items()},
      "work": jax.tree.map(lambda *x: sum(x), *(aux["work"] for _, aux in passes)),
    }
    return sums, denominators, metrics


@dataclasses.dataclass(frozen=True)
class Canvas(UniformDiffusion):
  """Blocks of random tokens denoised behind a causal context, with self-conditioning.

  For some documents of a batch a first pass without gradient predicts the canvas; the mean embedding under
  that prediction is added to the canvas tokens' embeddings of the second one (Chen et al., "Analog Bits",
  2208.04202; Strudel et al., 2211.04236).

  Fields:
    self_condition: probability that a document is conditioned; 0 saves the first pass.
    embed_scale: factor of the mean embedding, that of the model's own embeddings (`model.embed_scale`).
  """

  self_condition: float = 0.5
  embed_scale: float = 1.0

  def __post_init__(self):
    super().__post_init__()
    if not 0 <= self.self_condition <= 1:
      raise ValueError(f"self_condition is {self.self_condition}; it is a probability")

  def run(self, nets, row, key, step):
    if not self.self_condition:
      return super().run(nets, row, key, step)
    row = self.corruption.given(row, key, step)
    noise = self.corruption.draw(row, key, step, nets.latent)
    inputs, targets, denominators = self.drawn(row, noise, nets.latent)
    name = self.likelihood
    first = jax.lax.stop_gradient(nets["model"](inputs, {name: targets[name]}))
    chosen = rng.doc_uniform(row, key, step, 0, rng.DROP) < self.self_condition
    guess = self.mixture(nets, first.dists[name], self.slots(row, noise), row, chosen, name)
    outputs = nets["model"](inputs.replace(add_embed=guess), targets)
    sums, aux = self.loss(outputs, targets)
    counts = {"model": work(outputs, targets), "first": work(first, {name: targets[name]})}
    return sums, denominators, aux | {"work": counts}

  def mixture(self, nets, dist, slots: Slots, row: Row, chosen: Array, name: str) -> Array:
    """float[B, S, D]: Σ_v p_v E_v at the term's slots of chosen documents, 0 elsewhere."""
    table = nets.trees["model"]["embed"]["tokens"]["embedding"]
    mean = self.embed_scale * dist.expected(jax.lax.stop_gradient(table))
    mean = jnp.where(rows.of_doc(row.doc, chosen)[..., None], mean, 0.0)
    mine = (slots.stream == self.layout.streams.index(self.terms[name].stream)) & (slots.src >= 0)
    at = jnp.maximum(slots.src, 0)[..., None]
    return jnp.where(mine[..., None], jnp.take_along_axis(mean, at, 1), 0.0)
