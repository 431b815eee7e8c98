"""Attention that grows from causal to full by a random matrix, one a step (DiffuGPT, DiffuLLaMA).

Legend: N clean tokens of a row.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from genmodels.config import Schedule
from genmodels.corruption import rng
from genmodels.corruption.absorb import Absorb

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class AnnealAbsorb(Absorb):
  """Masking as of `Absorb`, under a mask that shows each later token with probability ρ(step).

  Gong et al., "Scaling Diffusion Language Models via Adaptation from Autoregressive Models", 2410.17891 §3.2:
  allowed = POS_LE ∨ R, R Bernoulli(ρ), one matrix for all rows, heads and layers of a step, drawn from (seed,
  step), so every data shard draws the same. Such a mask is no union of intervals: it takes the dense path.
  Likelihoods and samplers see what the annealing ends with, everything.

  Fields:
    share: ρ, a number or a schedule; 0 is causal, 1 shows all.
  """

  share: Schedule = 1.0

  dense = True

  def __post_init__(self):
    super().__post_init__()
    object.__setattr__(self, "share", Schedule.of(self.share))
    if self.share.min() < 0 or self.share.max() > 1:
      raise ValueError(f"share is {self.share.to_json()}; it is a probability")

  def draw(self, row, key, step, latent=None, bound=None):
    noise = super().draw(row, key, step, latent, bound)
    return noise if bound is not None else noise.replace(pairs=self.pairs(key, step, row.doc.shape[1]))

  def pairs(self, key: Array, step, length: int) -> Array:
    """bool[N, N]: R of a step; a function of (seed, step, query, key position) and of nothing else."""
    k = rng.step_key(key, step, rng.PAIR)
    n = jnp.arange(length, dtype=jnp.uint32)
    return rng.uniform(rng.threefry2x32(*k, n[:, None], n[None])[0]) < self.share(step)
