"""Latents without a codebook: pixels as tokens in raster order, and square patches as vectors.

Legend: n codes of an image · F features of a code · H, W pixels.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from genmodels.latents.base import Latent

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Raster(Latent):
  """Pixels are tokens, row by row: the likelihood of the tokens is the likelihood of the image."""

  def encode(self, pixels: Array) -> Array:
    return pixels.astype(jnp.int32).reshape(*pixels.shape[:-2], self.length)

  def decode(self, codes: Array) -> Array:
    levels = jnp.clip(codes, 0, self.levels - 1).astype(jnp.uint8)
    return levels.reshape(*codes.shape[:-1], self.side, self.side)

  def snap(self, value: Array) -> Array:
    return self._snap_levels(value)


@dataclasses.dataclass(frozen=True)
class Patches(Latent):
  """Continuous tokens: patch × patch pixels, scaled to [−1, 1], row by row.

  Fields:
    patch: pixels of a patch's side.
  """

  patch: int = 2

  def __post_init__(self):
    super().__post_init__()
    if self.patch < 1 or self.side % self.patch:
      raise ValueError(f"patch is {self.patch}; it must divide side {self.side}")

  @property
  def grid(self) -> int:
    return self.side // self.patch

  @property
  def length(self) -> int:
    return self.grid**2

  @property
  def vocab(self) -> int:
    return 0

  @property
  def features(self) -> int:
    return self.patch**2

  @property
  def positions(self) -> np.ndarray:
    return np.stack(np.divmod(np.arange(self.length), self.grid), -1).astype(np.float32)

  def encode(self, pixels: Array) -> Array:
    g, p, lead = self.grid, self.patch, pixels.shape[:-2]
    x = pixels.astype(jnp.float32) * (2 / (self.levels - 1)) - 1
    x = jnp.swapaxes(x.reshape(*lead, g, p, g, p), -3, -2)
    return x.reshape(*lead, g * g, p * p)

  def decode(self, codes: Array) -> Array:
    g, p, lead = self.grid, self.patch, codes.shape[:-2]
    x = jnp.swapaxes(codes.reshape(*lead, g, g, p, p), -3, -2).reshape(*lead, self.side, self.side)
    return self._snap_levels((x + 1) * ((self.levels - 1) / 2)).astype(jnp.uint8)

  def snap(self, value: Array) -> Array:
    """Features of the nearest grey levels: what a decoded patch would be encoded as."""
    scale = (self.levels - 1) / 2
    return self._snap_levels((value + 1) * scale).astype(jnp.float32) / scale - 1
