"""Pictures of masks: a cell per query and key, coloured by the interval that shows the key.

  python -m genmodels.masks.draw docs/images/masks      draws the masks of `builders` for the documentation

Legend: S slots · T intervals of a query.
"""

from __future__ import annotations

import hashlib
import pathlib
import sys

import numpy as np

from genmodels.masks import builders
from genmodels.masks.core import CODE_HIDDEN, STREAM, AttnMask

_COLOURS = ((43, 92, 156), (222, 128, 42), (70, 150, 90), (160, 70, 150))  # of intervals 0 … 3
_SEEN_BY_NONE = (214, 214, 214)
_BACKGROUND = (250, 250, 250)

_DOC = np.array([[0] * 10 + [1] * 6], np.int32)
_ONE = np.zeros((1, 16), np.int32)
_ORDER = np.array([[3, 0, 7, 1, 9, 5, 2, 8, 4, 6, 12, 10, 15, 11, 14, 13]], np.int32)
_WITHIN = np.array([[1, 0, 3, 2, 6, 4, 7, 5, 9, 8, 10, 11, 13, 12, 15, 14]], np.int32)  # in blocks of 4
_CLEAN = np.array([[1, 0, 1, 1, 0, 0, 1, 0, 1, 0, 1, 1, 0, 1, 0, 0]], bool)

_ACTIVE = np.array([[8]]), np.array([[12]])
_FIVE = np.array([[5]])


def _clean_first():
  """Document start + a generation order in which clean tokens come first."""
  start = np.where(_DOC == 0, 0, 10)
  order = [np.argsort(np.argsort(~_CLEAN[0, _DOC[0] == d], kind="stable")) for d in (0, 1)]
  return start + np.concatenate(order)[None]


def _prompt():
  """Documents 1 and 2 are completions of document 0."""
  doc = np.array([[0] * 6 + [1] * 5 + [2] * 5], np.int32)
  return doc, np.zeros_like(doc), np.where(doc > 0, 6, 0)


def _spans():
  at = np.arange(16)
  lo = np.where((at >= 3) & (at < 8), 3, np.where((at >= 10) & (at < 13), 10, at))[None]
  hi = np.where((at >= 3) & (at < 8), 8, np.where((at >= 10) & (at < 13), 13, at + 1))[None]
  return lo, hi


# Builder -> (how it is called here, the mask).
GALLERY = {
  "causal": ("two documents", lambda: builders.causal(_DOC)),
  "full": ("two documents", lambda: builders.full(_DOC)),
  "window": ("the last 4 keys", lambda: builders.window(_ONE, 4)),
  "prefix_lm": ("a prefix of 6 tokens", lambda: builders.prefix_lm(_ONE, 6)),
  "spans": ("two images in text", lambda: builders.spans(_ONE, _spans())),
  "subset": ("some tokens are visible", lambda: builders.subset(_ONE, _CLEAN)),
  "block_causal": ("blocks of 4, two documents", lambda: builders.block_causal(_DOC, 4)),
  "scale_causal": ("scales of 1, 4, 9 tokens", lambda: builders.scale_causal(_ONE[:, :14], (1, 4, 9))),
  "frame_window": ("frames of 2, the last 2, 1 sink", lambda: builders.frame_window(_ONE, 2, 2, 1)),
  "any_order": ("stored in raster order", lambda: builders.any_order(_ONE, _ORDER)),
  "any_order_two_stream": ("content | queries", lambda: builders.any_order_two_stream(_ONE, _ORDER)),
  "bd3": ("noisy | clean, blocks of 4, two documents", lambda: builders.bd3(_DOC, 4)),
  "context_causal": ("noisy | clean, blocks of 4", lambda: builders.context_causal(_ONE, 4)),
  "idlm": ("noisy | clean, blocks of 4", lambda: builders.idlm(_ONE, 4)),
  "wedlm": ("noisy | clean, blocks of 4", lambda: builders.wedlm(_ONE, 4, _WITHIN)),
  "eso_mixed": ("from token 9 on all is seen", lambda: builders.eso_mixed(_ONE, 9)),
  "eso_diffusion": ("clean tokens first", lambda: builders.eso_diffusion(_DOC, _CLEAN, _clean_first())),
  "eso_sequential": ("noisy | clean, a prefix of 6", lambda: builders.eso_sequential(_ONE, 6)),
  "eso_ordered": ("noisy | clean, one random order", lambda: builders.eso_ordered(_ONE, _ORDER)),
  "nbdiff_decode": ("tokens 8 to 11 are generated", lambda: builders.nbdiff_decode(_ONE, *_ACTIVE)),
  "shared_prefix": ("two completions of one prompt", lambda: builders.shared_prefix(*_prompt())),
  "tidar_decode": ("3 drafts, 4 groups of masks", lambda: builders.tidar_decode(_FIVE, 3, 10)),
}


def cells(mask: AttnMask) -> np.ndarray:
  """uint8[S, S], row 0 of the mask: 0 not seen, 1 + t by interval t, 255 a key that nobody can see."""
  code, lo, hi = (np.asarray(x)[0] for x in (mask.code, mask.lo, mask.hi))
  out = np.zeros((lo.shape[1], len(code)), np.uint8)
  out[:, code == CODE_HIDDEN] = 255
  for t in range(len(lo)):
    out[(lo[t, :, None] <= code) & (code < hi[t, :, None])] = t + 1
  return out


def digest(mask: AttnMask) -> str:
  """What a picture shows, as a short name; it stands in the PNG's text, so that a stale one is noticed."""
  return hashlib.sha256(cells(mask).tobytes()).hexdigest()[:16]


def picture(mask: AttnMask, path, title: str = "") -> None:
  """Draws row 0 of a mask as a PNG: queries downwards, keys to the right, lines between streams.

  Args:
    mask: AttnMask; streams are read from the codes.
    path: of the file.
    title: above the picture.
  """
  import matplotlib.figure

  grid = cells(mask)
  palette = np.array([_BACKGROUND, *_COLOURS] + [_BACKGROUND] * 250 + [_SEEN_BY_NONE], np.uint8)
  figure = matplotlib.figure.Figure(figsize=(2.6, 2.75), dpi=100)
  axes = figure.add_axes((0.09, 0.07, 0.88, 0.79))
  axes.imshow(palette[grid], interpolation="nearest", aspect="auto")
  code = np.asarray(mask.code)[0]
  # Codes of streams ascend in the order of storage; a hidden key counts to the stream before it.
  stream = np.maximum.accumulate(np.where(code == CODE_HIDDEN, 0, code // STREAM))
  for n in np.flatnonzero(stream[1:] != stream[:-1]):
    axes.axvline(n + 0.5, color="black", linewidth=1)
    if grid.shape[0] == grid.shape[1]:
      axes.axhline(n + 0.5, color="black", linewidth=1)
  axes.set_xticks(np.arange(grid.shape[1] + 1) - 0.5, minor=True)
  axes.set_yticks(np.arange(grid.shape[0] + 1) - 0.5, minor=True)
  axes.grid(which="minor", color="white", linewidth=0.5)
  axes.tick_params(which="both", length=0, labelbottom=False, labelleft=False)
  axes.set_ylabel("query", fontsize=7, labelpad=2)
  axes.set_title(title, fontsize=7.5, pad=4)
  axes.text(0.5, -0.005, "key", transform=axes.transAxes, fontsize=7, ha="center", va="top")
  figure.savefig(path, metadata={"Software": None, "Mask": digest(mask)})


def main(folder: str) -> None:
  """Draws GALLERY into a folder."""
  where = pathlib.Path(folder)
  where.mkdir(parents=True, exist_ok=True)
  for name, (how, make) in GALLERY.items():
    picture(make(), where / f"{name}.png", f"{name}\n{how}")


if __name__ == "__main__":
  main(sys.argv[1])
