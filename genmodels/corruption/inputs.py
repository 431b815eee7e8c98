"""Corruption of what an autoregressive model reads, not of what it is asked (MEAP).

Legend: B rows · N clean tokens.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from genmodels.corruption import rng
from genmodels.corruption.base import Corruption, eligible


@dataclasses.dataclass(frozen=True)
class InputMask(Corruption):
  """Replaces a fixed share of the input tokens by the mask id; every token stays a target.

  Zhuang et al., "Mask-Enhanced Autoregressive Prediction", 2502.07490. The authors' loop masks the same
  positions in every row of a micro-batch; here each document has its own draw. Likelihoods see clean inputs.

  Fields:
    ratio: probability that an input token is masked.
  """

  ratio: float = 0.15

  def __post_init__(self):
    super().__post_init__()
    if not 0 <= self.ratio <= 1:
      raise ValueError(f"ratio is {self.ratio}; it is a probability")

  def draw(self, row, key, step, latent=None, bound=None):
    lo, hi = self.blocks.bounds(row, step)
    at = jnp.uint32(rng.EVAL_STEP) if bound is not None else step
    ratio = 0.0 if bound is not None else self.ratio
    hit = eligible(row) & (rng.token_uniform(row, key, at, 0, rng.WHICH) < ratio)
    level = jnp.full(hit.shape, ratio, jnp.float32)[:, None]
    return self.noise(row, lo, hi, hit[:, None], level, drop=self.dropped(row, key, at, bound))
