"""Sampled images as one PNG."""

from __future__ import annotations

import os

import numpy as np


def grid(images, levels: int = 256, columns: int = 0, zoom: int = 4, gap: int = 1) -> np.ndarray:
  """Images in rows of `columns`, uint8[H', W'], separated by mid-grey lines.

  Args:
    images: integers [n, H, W] of grey levels 0 … levels − 1.
    columns: 0 makes the grid about square. zoom: pixels per pixel. gap: width of the lines.

  Raises:
    ValueError: not [n, H, W] with n ≥ 1.
  """
  x = np.asarray(images)
  if x.ndim != 3 or not len(x):
    raise ValueError(f"images: expected [n, H, W] with n ≥ 1, got shape {x.shape}")
  x = np.round(np.clip(x, 0, levels - 1) * (255.0 / (levels - 1))).astype(np.uint8)
  x = x.repeat(zoom, 1).repeat(zoom, 2)
  n, H, W = x.shape
  columns = columns or int(np.ceil(np.sqrt(n)))
  rows = -(-n // columns)
  out = np.full((rows * (H + gap) + gap, columns * (W + gap) + gap), 128, np.uint8)
  for i, image in enumerate(x):
    top, left = (i // columns) * (H + gap) + gap, (i % columns) * (W + gap) + gap
    out[top : top + H, left : left + W] = image
  return out


def save_grid(path: str | os.PathLike, images, levels: int = 256, **options) -> None:
  """Writes `grid` of the images as a PNG file."""
  from PIL import Image  # here: only this function needs pillow

  Image.fromarray(grid(images, levels, **options)).save(path, format="PNG")
