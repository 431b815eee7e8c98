"""A lossless integer residual pyramid: next-scale codes without a learned tokenizer.

Form of VAR's multi-scale residual quantiser (Tian et al., arXiv:2404.02905, algorithms 1 and 2): with
r = x, and for every scale k of n_k × n_k cells

  z_k = round(area(r, n_k))      h_k = up(z_k)      f̂_k = f̂_{k−1} + h_k      r = x − f̂_k

The codebook is fixed and one-dimensional, code c stands for the residual c − (levels − 1), area is the mean
over a cell rounded half up, ⌊(2·sum + w²) / 2w²⌋ for cells of w × w pixels, and up repeats a cell's value.
Each size divides the next, so f̂_{k−1} is constant on the cells of scale k and f̂_k is x's rounded cell mean:
residuals stay in ±(levels − 1), the first one is ≥ 0, and the last scale (one pixel a cell) leaves no
residual, whatever the rounding: decode(encode(x)) = x exactly.

The code is redundant (85 codes for 64 pixels): −log p(codes of x) is an upper bound of −log p(x).

Legend: n codes of an image, scale by scale, each in raster order · K scales · n_k side of scale k · H side.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from genmodels.latents.base import Latent

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Pyramid(Latent):
  """Residual codes of a sequence of scales.

  Fields:
    sizes: n_k, rising, each dividing the next, the last one equal to `side`.
  """

  sizes: tuple[int, ...] = (1, 2, 4, 8)

  def __post_init__(self):
    super().__post_init__()
    divides = all(a < b and b % a == 0 for a, b in zip(self.sizes, self.sizes[1:]))
    if not self.sizes or self.sizes[0] < 1 or self.sizes[-1] != self.side or not divides:
      raise ValueError(
        f"sizes is {self.sizes}; they must rise to side {self.side}, each dividing the next, as (1, 2, 4, 8) "
        "do: otherwise residuals are not bounded by the grey levels"
      )

  @property
  def blocks(self) -> tuple[int, ...]:
    return tuple(n * n for n in self.sizes)

  @property
  def length(self) -> int:
    return sum(self.blocks)

  @property
  def vocab(self) -> int:
    return 2 * self.levels - 1

  @property
  def features(self) -> int:
    return 1

  @property
  def positions(self) -> np.ndarray:
    grids = [np.stack(np.divmod(np.arange(n * n), n), -1) for n in self.sizes]
    return np.concatenate(grids).astype(np.float32)

  @property
  def scale_of(self) -> np.ndarray:
    """int32[n], the scale of every code."""
    return np.repeat(np.arange(len(self.sizes), dtype=np.int32), self.blocks)

  def split(self, codes: Array) -> list[Array]:
    """Codes [..., n] → per scale [..., n_k, n_k]."""
    edges = np.cumsum(self.blocks)[:-1].tolist()
    parts = jnp.split(codes, edges, axis=-1)
    return [p.reshape(*p.shape[:-1], n, n) for p, n in zip(parts, self.sizes)]

  # -- the chain -------------------------------------------------------------------------------------

  def start(self, lead: tuple[int, ...]) -> Array:
    """f̂ before the first scale, int32[*lead, H, H]."""
    return jnp.zeros((*lead, self.side, self.side), jnp.int32)

  def part(self, k: int, codes_k: Array) -> Array:
    """h_k int32[..., H, H], what the codes [..., n_k, n_k] of scale k add to the image."""
    w = self.side // self.sizes[k]
    z = codes_k.astype(jnp.int32) - (self.levels - 1)
    return jnp.repeat(jnp.repeat(z, w, -2), w, -1)

  def accumulate(self, state: Array, k: int, codes_k: Array) -> Array:
    """f̂_k = f̂_{k−1} + h_k."""
    return state + self.part(k, codes_k)

  def area(self, x: Array, k: int) -> Array:
    """Cell means of int32[..., H, H] at scale k, rounded half up, int32[..., n_k, n_k]."""
    n, w = self.sizes[k], self.side // self.sizes[k]
    total = x.reshape(*x.shape[:-2], n, w, n, w).sum((-3, -1))
    return jnp.floor_divide(2 * total + w * w, 2 * w * w)

  def shown(self, state: Array, k: int) -> Array:
    """The input of scale k: f̂_{k−1} at size n_k, scaled to [−1, 1] (0 at the first scale), [..., n_k², 1]."""
    n = self.sizes[k]
    x = self.area(state, k).astype(jnp.float32) * (2 / (self.levels - 1)) - 1
    return (x if k else jnp.zeros_like(x)).reshape(*x.shape[:-2], n * n, 1)

  # -- Latent ----------------------------------------------------------------------------------------

  def encode(self, pixels: Array) -> Array:
    x = pixels.astype(jnp.int32)
    lead, state, codes = x.shape[:-2], self.start(x.shape[:-2]), []
    for k in range(len(self.sizes)):
      code = self.area(x - state, k) + (self.levels - 1)
      state = self.accumulate(state, k, code)
      codes.append(code.reshape(*lead, -1))
    return jnp.concatenate(codes, -1)

  def reconstruct(self, codes: Array) -> Array:
    """f̂ = Σ_k h_k of all scales, int32[..., H, H]; sampled codes may leave the grey levels."""
    state = self.start(codes.shape[:-1])
    for k, codes_k in enumerate(self.split(codes)):
      state = self.accumulate(state, k, codes_k)
    return state

  def decode(self, codes: Array) -> Array:
    return jnp.clip(self.reconstruct(codes), 0, self.levels - 1).astype(jnp.uint8)

  def snap(self, value: Array) -> Array:
    """Nearest codes of residuals."""
    top = self.levels - 1
    return (jnp.clip(jnp.round(value), -top, top) + top).astype(jnp.int32)

  def next_input(self, codes: Array) -> Array:
    codes = jnp.clip(codes, 0, self.vocab - 1)
    state, out = self.start(codes.shape[:-1]), []
    for k, codes_k in enumerate(self.split(codes)):
      out.append(self.shown(state, k))
      state = self.accumulate(state, k, codes_k)
    return jnp.concatenate(out, -2)
