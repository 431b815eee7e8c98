"""Rotary position embedding in one to three axes, both pairings, with frequency scaling.

Legend: B rows · S slots · A position axes · H heads · D head dimension · P rotated pairs.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np

from genmodels.config import ConfigError
from genmodels.models.config import Rope, Scaling, TrunkConfig


@dataclasses.dataclass(frozen=True)
class Context:
  """Section `model.extend`: a longer context for parameters as they are, without training.

  Layers that take no scaling (`LayerSpec.rope_scaling`: local layers) keep their frequencies.

  Fields:
    kind: "theta" multiplies the base by `factor` (LongLLaDA, 2506.14429); the others are those of `Scaling`.
    factor: λ; 1 leaves the model as it is, bit by bit. 0 (kind "theta"): `critical_factor` of the lengths.
    original_len: context length of pretraining ("yarn", and factor 0). length: wanted (factor 0).
  """

  kind: Literal["theta", "ntk", "yarn", "linear"] = "theta"
  factor: float = 1.0
  original_len: int = 0
  length: int = 0

  def __post_init__(self):
    if self.factor < 0 or (self.factor == 0 and self.kind != "theta"):
      raise ValueError(f"factor is {self.factor}; it is positive, or 0 with kind='theta'")
    if self.factor == 0 and not 0 < self.original_len <= self.length:
      raise ValueError(f"factor 0 needs 0 < original_len <= length, got {self.original_len}, {self.length}")


def critical_factor(base: float, dim: int, original_len: int, length: int) -> float:
  """λ = b⁻¹·(t/2π)^(d/d_c), under which the slowest dimension that turned once in training, d_c = 2⌈(d/2)·
  log_b(T/2π)⌉, turns once in t tokens (LongLLaDA §4; the form is unverified).

  Args:
    base: b. dim: d, rotated dimensions. original_len: T. length: t.
  """
  critical = min(2 * math.ceil(dim / 2 * math.log(original_len / (2 * math.pi), base)), dim)
  return max((length / (2 * math.pi)) ** (dim / critical) / base, 1.0)


def extend(cfg: TrunkConfig, context: Context) -> TrunkConfig:
  """The trunk with a longer context.

  Raises:
    ConfigError: no rotary positions, or frequencies that are scaled already.
  """
  if context.factor == 1:
    return cfg
  wrong = None
  if cfg.rope is None:
    wrong = "the model has no rotary positions whose frequencies could be scaled"
  elif context.kind != "theta" and cfg.rope.scaling is not None:
    wrong = f"the frequencies are scaled already ({cfg.rope.scaling.kind!r} by {cfg.rope.scaling.factor})"
  if wrong:
    raise ConfigError(wrong, key="model.extend.kind", value=context.kind, fix="leave model.extend out")
  if context.kind != "theta":
    scaling = Scaling(context.kind, context.factor, original_len=context.original_len)
    return dataclasses.replace(cfg, rope=dataclasses.replace(cfg.rope, scaling=scaling))
  factor = context.factor or critical_factor(
    cfg.rope.base, cfg.rope_axes[0], context.original_len, context.length
  )

  def layer(spec):
    base = cfg.rope.base if spec.rope_base is None else spec.rope_base
    return dataclasses.replace(spec, rope_base=base * factor if spec.rope_scaling else base)

  segments = tuple(dataclasses.replace(s, pattern=tuple(map(layer, s.pattern))) for s in cfg.segments)
  return dataclasses.replace(cfg, segments=segments)


def inv_freq(dim: int, base: float, scaling: Scaling | None = None) -> tuple[np.ndarray, float]:
  """Frequencies float32[dim/2] of `dim` rotated dimensions, and the factor on cos and sin.

  Formulas: linear (position interpolation, arXiv:2306.15595); NTK-aware base; YaRN NTK-by-parts
  (arXiv:2309.00071, eq. 17–23); Llama-3's three bands.
  """
  i = np.arange(0, dim, 2, dtype=np.float64)
  if scaling is not None and scaling.kind == "ntk":
    base = base * scaling.factor ** (dim / (dim - 2)) if dim > 2 else base
  freq = base ** (-i / dim)
  if scaling is None or scaling.kind == "ntk":
    return freq.astype(np.float32), 1.0
  if scaling.kind == "linear":
    return (freq / scaling.factor).astype(np.float32), 1.0
  if scaling.kind == "llama3":
    turns = scaling.original_len * freq / (2 * math.pi)  # rotations in the original context
    lo, hi = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((turns - lo) / (hi - lo), 0, 1)  # 1: leave as is, 0: interpolate
    return (keep * freq + (1 - keep) * freq / scaling.factor).astype(np.float32), 1.0

  def dimension(rotations):
    return dim * math.log(scaling.original_len / (rotations * 2 * math.pi)) / (2 * math.log(base))

  low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
  if scaling.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, dim - 1)
  ramp = np.clip((np.arange(dim // 2) - low) / (max(high - low, 0) or 0.001), 0, 1)
  freq = freq * (1 - ramp) + freq / scaling.factor * ramp
  factor = scaling.attention_factor
  if factor is None:
    factor = 0.1 * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0
  return freq.astype(np.float32), factor


def angles(rope: Rope, axes: tuple[int, ...], pos, base: float, scaling: Scaling | None):
  """cos, sin float32[B, S, P] of positions float32[B, S, A].

  Args:
    axes: dimensions rotated by each position axis; pairs of axis 0 come first.

  Raises:
    ValueError: fewer position axes than `axes`.
  """
  if pos.shape[-1] < len(axes):
    raise ValueError(f"rope has {len(axes)} axes {axes}, but pos has {pos.shape[-1]}: shape {pos.shape}")
  parts, factor = [], 1.0
  for a, dim in enumerate(axes):
    freq, factor = inv_freq(dim, base, scaling)
    parts.append(pos[..., a, None].astype(jnp.float32) * freq)
  theta_BSP = jnp.concatenate(parts, -1)
  cos, sin = jnp.cos(theta_BSP) * factor, jnp.sin(theta_BSP) * factor
  if rope.zero_prefix:
    prefix = pos[..., :1] < 0
    cos, sin = jnp.where(prefix, 0.0, cos), jnp.where(prefix, 0.0, sin)
  return cos, sin


def rotate(x_BSHD, cos_BSP, sin_BSP, pairing: str):
  """Rotates the first 2·P dimensions of each head; float32 inside, the dtype of x outside."""
  P = cos_BSP.shape[-1]
  cos, sin = cos_BSP[:, :, None], sin_BSP[:, :, None]
  x, rest = x_BSHD[..., : 2 * P].astype(jnp.float32), x_BSHD[..., 2 * P :]
  if pairing == "half":
    a, b = x[..., :P], x[..., P:]
    y = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
  else:
    a, b = x[..., 0::2], x[..., 1::2]
    y = jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)
  y = y.astype(x_BSHD.dtype)
  return y if not rest.shape[-1] else jnp.concatenate([y, rest], -1)
