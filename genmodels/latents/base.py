"""The Latent: pixels → codes → pixels, and what the slots of a partly known image are shown.

A latent is handed to `Objective.prepare` and `Objective.view`; objectives never import one. Everything
here is a pure function of arrays, so the same code runs inside the training step and in the sampler.

Legend: B rows · D documents of a row · n codes of an image · F features of a code · H, W pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Latent:
  """Base. Images have one channel of integer grey levels 0 … levels − 1.

  Fields:
    side: height and width of an image.
    levels: grey levels.
    table: name of the side table that holds the images, [B, D, side, side] or [B, D, side²].
  """

  side: int = 8
  levels: int = 17
  table: str = "pixels"

  def __post_init__(self):
    if self.side < 1 or not 2 <= self.levels <= 256:
      raise ValueError(f"side is {self.side}, levels is {self.levels}; they must be ≥ 1 and in 2 … 256")

  # -- facts, static ---------------------------------------------------------------------------------

  @property
  def length(self) -> int:
    """n, codes of an image."""
    return self.side**2

  @property
  def vocab(self) -> int:
    """Number of codes; 0 where tokens are continuous."""
    return self.levels

  @property
  def features(self) -> int:
    """F of `next_input` and of continuous codes; 0 where there are none."""
    return 0

  @property
  def blocks(self) -> tuple[int, ...]:
    """Sizes of the groups of codes that are predicted together, in order."""
    return (1,) * self.length

  @property
  def positions(self) -> np.ndarray:
    """float32[n, 2], row and column of every code in the grid of its group."""
    return np.stack(np.divmod(np.arange(self.length), self.side), -1).astype(np.float32)

  @property
  def pixels(self) -> int:
    """Pixels of an image: likelihoods are reported per pixel."""
    return self.side**2

  @property
  def meta(self) -> dict[str, int]:
    """What the model section may leave open: {"vocab": codes} of a discrete latent."""
    return {"vocab": self.vocab} if self.vocab else {}

  # -- functions -------------------------------------------------------------------------------------

  def encode(self, pixels: Array) -> Array:
    """Integer images [..., H, W] → codes int32[..., n] (continuous latents: float32[..., n, F])."""
    raise NotImplementedError

  def decode(self, codes: Array) -> Array:
    """Codes → images uint8[..., H, W] of grey levels 0 … levels − 1."""
    raise NotImplementedError

  def snap(self, value: Array) -> Array:
    """The nearest code of predicted values (grey levels, residuals, features)."""
    raise NotImplementedError

  def next_input(self, codes: Array) -> Array | None:
    """What each slot is shown of an image of which earlier groups are known, float32[..., n, F].

    The features of a group depend on the codes of earlier groups only, so entries of `codes` that are
    not known yet may hold anything. None: the slots show tokens, there are no features.
    """
    return None

  def encode_side(self, side: Mapping[str, Array]) -> Array | None:
    """Codes [B, D, n] (continuous: [B, D, n, F]) of a row's side tables; None if its tokens are the codes.

    A table "codes" is taken as it is (encoded before, or being generated), else `table` is encoded.

    Raises:
      ValueError: the table has another number of pixels.
    """
    if "codes" in side:
      return side["codes"]
    if self.table not in side:
      return None
    x = side[self.table]
    if x.ndim < 3 or x[0, 0].size != self.pixels:
      raise ValueError(
        f"side table {self.table!r}: expected [B, D, {self.side}, {self.side}] or [B, D, {self.pixels}], "
        f"got {x.shape}; set latent.side to the size of the images"
      )
    return self.encode(x.reshape(*x.shape[:2], self.side, self.side))

  def _snap_levels(self, value: Array) -> Array:
    return jnp.clip(jnp.round(value), 0, self.levels - 1).astype(jnp.int32)
