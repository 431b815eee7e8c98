"""Where the tokens of planned pieces come from: records on disk or arrays in memory.

Legend: P pieces asked for · T their tokens, one piece after another · A position axes · K codes per position.

A source has `lengths`, `context`, `prefix`, `runs`, `digest` (what the plan needs), `side` {name: (shape,
dtype, fill)} (tables per document, the same in every batch) and `fetch(document, start, length)`.
"""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import xxhash

from genmodels.data import packing, records, tokenizers
from genmodels.data import plan as plans


@dataclasses.dataclass(frozen=True)
class Fetched:
  """Content of P pieces. None means the usual: roles from the context, modality 0, no index, plain positions.

  Fields:
    tokens: ids [T] or [T, K]. good: bool[P], False where quarantined (their tokens are zeros).
    side: {name: [P, …]}.
    role, modality, index: int32[T]. pos: float32[T, A].
  """

  tokens: np.ndarray
  good: np.ndarray
  side: dict[str, np.ndarray]
  role: np.ndarray | None = None
  modality: np.ndarray | None = None
  index: np.ndarray | None = None
  pos: np.ndarray | None = None


class RecordSource:
  """A data set directory (records.Dataset). `axes` > 1: documents with as many dims have grid positions."""

  def __init__(self, path: str, *, axes: int = 1, **options):
    self.data = data = records.Dataset(path, **options)
    self.path, self.axes, self.digest = path, axes, data.digest
    self.lengths, self.context, self.prefix = data.lengths, data.context, not data.spans
    self.runs = data.manifest["features"].get("runs", 1)
    self.depth = data.depth
    features = data.manifest["features"]
    self.side = {"label": ((), np.int32, -1)} if features["classes"] else {}
    if features["conditions"]:
      self.side["conditions"] = ((features["conditions"],), np.float32, 0)
    self._modality, self._shape = features["modality"], features["shape"] and axes > 1

  def fetch(self, document: np.ndarray, start: np.ndarray, length: np.ndarray) -> Fetched:
    """Reads pieces: one batched read per shard."""
    raw, heads = self.data.read_records(document)
    width = self.data.dtype.itemsize * self.depth
    extras = records.extras_size(heads)
    first = records.HEADER.itemsize + extras + start * width
    good = np.fromiter((r is not None for r in raw), bool, len(raw))
    chunks = [
      bytes(b - a) if r is None else r[a:b]
      for r, a, b in zip(raw, first.tolist(), (first + length * width).tolist())
    ]
    tokens = np.frombuffer(b"".join(chunks), self.data.dtype)
    side, role, modality, pos = {}, None, None, None
    if "label" in self.side:
      side["label"] = heads["label"]
    if "conditions" in self.side:
      size = self.side["conditions"][0][0]
      side["conditions"] = np.zeros((len(raw), size), np.float32)
      for i in np.flatnonzero(heads["conds"]):
        at = records.HEADER.itemsize + int(extras[i]) - 4 * int(heads["conds"][i])
        side["conditions"][i, : heads["conds"][i]] = np.frombuffer(raw[i], "<f4", int(heads["conds"][i]), at)
    if self._modality:
      modality = np.repeat(heads["modality"].astype(np.int32), length)
    if not self.prefix:
      role = np.concatenate([self._roles(*x) for x in zip(raw, start, length)])
    if self._shape:
      pos = np.concatenate([self._grid(*x) for x in zip(raw, start, length)])
    return Fetched(
      tokens.reshape(-1, self.depth) if self.depth > 1 else tokens, good, side, role, modality, None, pos
    )

  def _roles(self, raw, start, length):
    if raw is None:
      return np.zeros(length, np.int32)
    doc = records.decode(raw)
    role = records.document_roles(len(doc.tokens), doc.context, doc.spans)[start : start + length]
    if start:
      role[0] = records.CONTEXT
    return role

  def _grid(self, raw, start, length):
    """Positions of a grid behind its context: context counts on all axes, the grid goes on from there."""
    doc = raw and records.decode(raw)
    if not doc or len(doc.shape) != self.axes:
      return np.repeat(np.arange(length, dtype=np.float32)[:, None], self.axes, 1)
    n = np.arange(start, start + length)
    cells = np.stack(np.unravel_index(np.maximum(n - doc.context, 0) % np.prod(doc.shape), doc.shape), -1)
    return np.where(n[:, None] < doc.context, n[:, None], cells + doc.context).astype(np.float32)


class ArraySource:
  """Documents of one length in memory.

  Args:
    tokens: int32[n, L]. side: {name: [n, …]}. context: length of the context prefix.
    modality, index: int32[L], the same for every document, or None. pos: float32[L, A] or None.
  """

  depth, prefix, runs = 1, True, 1

  def __init__(self, tokens, side, *, context=0, modality=None, index=None, pos=None):
    self.tokens, self._side, self.context = tokens, side, context
    self.lengths = np.full(len(tokens), tokens.shape[1], np.uint32)
    self.side = {k: (v.shape[1:], v.dtype, 0) for k, v in side.items()}
    self._modality, self._index, self._pos = modality, index, pos
    h = xxhash.xxh3_64()
    for array in (tokens, *(side[k] for k in sorted(side))):
      h.update(np.ascontiguousarray(array).tobytes())
    self.digest = h.hexdigest()

  def fetch(self, document, start, length) -> Fetched:
    if not (length == self.tokens.shape[1]).all():
      raise ValueError(f"documents of {self.tokens.shape[1]} tokens are not cut; raise seq_len")
    P = len(document)
    tile = lambda x: None if x is None else np.tile(x, (P,) + (1,) * (x.ndim - 1))
    return Fetched(
      self.tokens[document].reshape(-1), np.ones(P, bool), {k: v[document] for k, v in self._side.items()},
      None, tile(self._modality), tile(self._index), tile(self._pos),
    )  # fmt: skip


def assemble(
  plan: plans.Plan, sources: list, rows: plans.Rows, *, pad: int, axes: int
) -> dict[str, np.ndarray]:
  """The arrays of a batch for planned rows (b of them), as the batch contract states.

  Args:
    sources: one for each component of the plan. pad: id that stands in padding.
  Returns: tokens, doc, role, modality, index int32[b, N], pos float32[b, N, A], example_id uint32[b, D, 2],
    occurrence, mode, source int32[b, D], rank int32[b, D, 2], side/<name> [b, D, …], and side/codes
    int32[b, N, K] (with index = n) where positions carry several codes. Documents stand in a row one after
    another, padding behind them has doc −1; quarantined documents are padding in their place.
  """
  b, N, D = len(rows.row_ptr) - 1, plan.seq_len, plan.documents
  ptr, length = rows.row_ptr, rows.length.astype(np.int64)
  P, counts = int(ptr[-1]), np.diff(rows.row_ptr)
  row = np.repeat(np.arange(b), counts)
  slot = np.arange(P) - ptr[row]
  tokens_ptr = np.concatenate([[0], np.cumsum(length)])
  used = tokens_ptr[ptr[1:]] - tokens_ptr[ptr[:-1]]
  got = _fetch(sources, rows, length, tokens_ptr, axes)

  # Segments: the documents of a row and one of padding behind them, so that a repeat makes whole rows.
  at = np.arange(P) + row
  size = np.zeros(P + b, np.int64)
  size[at], size[ptr[1:] + np.arange(b)] = length, N - used
  doc = np.full(P + b, -1, np.int32)
  doc[at] = np.where(got.good, slot, -1)
  given = np.full(P + b, N, np.int32)
  given[at] = np.where(got.good, rows.context, N)
  begin = (np.cumsum(size) - size).astype(np.int32)
  out = {"doc": np.repeat(doc, size).reshape(b, N)}
  place = np.arange(b * N, dtype=np.int32) - np.repeat(begin, size)
  out["role"] = (place >= np.repeat(given, size)).astype(np.int32).reshape(b, N)
  pos = place.astype(np.float32).reshape(b, N, 1)
  out["pos"] = pos if axes == 1 else np.repeat(pos, axes, 2)
  out["modality"], out["index"] = np.zeros((b, N), np.int32), np.full((b, N), -1, np.int32)

  flat = got.tokens if got.tokens.ndim == 1 else got.tokens[:, 0]
  out["tokens"] = np.full((b, N), pad, np.int32)
  for r, (lo, hi) in enumerate(zip(tokens_ptr[ptr[:-1]].tolist(), tokens_ptr[ptr[1:]].tolist())):
    out["tokens"][r, : hi - lo] = flat[lo:hi]
  valid = None
  for name in ("role", "modality", "index", "pos"):
    if (value := getattr(got, name)) is not None:
      valid = np.arange(N) < used[:, None] if valid is None else valid
      out[name][valid] = value
  if got.tokens.ndim == 2:
    valid = np.arange(N) < used[:, None]
    out["side/codes"] = np.zeros((b, N, got.tokens.shape[1]), np.int32)
    out["side/codes"][valid] = got.tokens
    out["index"] = np.where(valid, np.arange(N, dtype=np.int32), -1)
  if not got.good.all():
    lost = out["doc"] < 0
    for name, value in (("tokens", pad), ("role", records.CONTEXT), ("modality", 0), ("index", -1)):
      out[name][lost] = value

  keep = got.good
  where = (row[keep], slot[keep])
  tables = {
    "example_id": (plan.example_id(rows), np.uint32), "occurrence": (rows.occurrence, np.int32),
    "rank": (rows.rank, np.int32),
    "mode": (np.asarray([c.mode for c in plan.components])[rows.component], np.int32),
    "source": (np.asarray([c.source for c in plan.components])[rows.component], np.int32),
  }  # fmt: skip
  for name, (value, dtype) in tables.items():
    out[name] = np.zeros((b, D, *value.shape[1:]), dtype)
    out[name][where] = value[keep]
  for name, value in got.side.items():
    shape, dtype, fill = next(s.side[name] for s in sources if name in s.side)
    out[f"side/{name}"] = np.full((b, D, *shape), fill, dtype)
    out[f"side/{name}"][where] = value[keep]
  return out


def _fetch(sources, rows, length, tokens_ptr, axes) -> Fetched:
  """Content of all pieces, in order, whatever component each comes from."""
  if len(sources) == 1:
    return sources[0].fetch(rows.document, rows.start, length)
  P, T = len(length), int(tokens_ptr[-1])
  depth = max(s.depth for s in sources)
  tokens = np.zeros(T if depth == 1 else (T, depth), np.int32)
  good, side, extra = np.ones(P, bool), {}, {}
  for s in sources:
    for name, (shape, dtype, fill) in s.side.items():
      side.setdefault(name, np.full((P, *shape), fill, dtype))
  for c in np.unique(rows.component):
    at = np.flatnonzero(rows.component == c)
    got = sources[c].fetch(rows.document[at], rows.start[at], length[at])
    dest = np.repeat(tokens_ptr[at] - (np.cumsum(length[at]) - length[at]), length[at])
    dest += np.arange(len(dest))
    if depth == 1 or got.tokens.ndim == 2:
      tokens[dest] = got.tokens
    else:
      tokens[dest, 0] = got.tokens
    good[at] = got.good
    for name, value in got.side.items():
      side[name][at] = value
    for name in ("role", "modality", "index", "pos"):
      if (value := getattr(got, name)) is not None:
        if name not in extra:
          extra[name] = _usual(name, rows, length, axes)
        extra[name][dest] = value
  return Fetched(tokens, good, side, **extra)


def _usual(name, rows, length, axes):
  place = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
  if name == "role":
    return (place >= np.repeat(rows.context, length)).astype(np.int32)
  if name == "pos":
    return np.repeat(place.astype(np.float32)[:, None], axes, 1)
  return np.full(len(place), 0 if name == "modality" else -1, np.int32)


# --------------------------------------------------------------------------------------------- digits

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def digits(form: str, *, bos: bool, length: int, axes: int, heldout: float) -> dict[str, ArraySource]:
  """scikit-learn's 8 × 8 digits (1,797 images, 17 grey levels), split by a fixed hash of the index.

  Args:
    form: "raster": the 64 pixels as tokens, row by row; "none": `length` empty tokens, the image only in
      side/pixels (latents that tokenize inside `prepare`); "caption": bytes of "a handwritten seven" and 16
      image positions (modality 1) whose index points into side/features float32[16, 4], 2 × 2 patches in
      [−1, 1].
    bos: put BOS in front ("raster", "caption").
  Returns: {"train": …, "heldout": …} with side/pixels int32[8, 8] and side/label.
  """
  from sklearn.datasets import load_digits

  raw = load_digits()
  pixels, label = raw.images.astype(np.int32), raw.target.astype(np.int32)
  side, options = {"pixels": pixels, "label": label}, {}
  n = len(pixels)
  grid = np.stack(np.divmod(np.arange(64), 8), -1).astype(np.float32)
  if form == "raster":
    head = np.full((n, 1 if bos else 0), DIGIT_SPECIALS["bos"], np.int32)
    tokens = np.concatenate([head, pixels.reshape(n, 64)], 1)
    options["context"] = int(bos)
    if axes == 2:
      options["pos"] = np.concatenate([np.zeros((int(bos), 2), np.float32), grid + int(bos)])
  elif form == "none":
    tokens = np.zeros((n, length), np.int32)
  else:
    text = tokenizers.ByteTokenizer()
    captions = [text.encode(f"a handwritten {DIGIT_NAMES[k]}").astype(np.int32) for k in label]
    # One length for all: names are padded by spaces in front, which cost the model nothing.
    width = max(map(len, captions))
    body = np.full((n, width), ord(" "), np.int32)
    for i, c in enumerate(captions):
      body[i, width - len(c) :] = c
    ends = [np.full((n, 1), text.specials[k], np.int32) for k in ("bos", "eos")]
    tokens = np.concatenate([*ends[: int(bos)], body, ends[1], np.zeros((n, 16), np.int32)], 1)
    options["context"] = int(bos)
    L = tokens.shape[1]
    options["modality"] = (np.arange(L) >= L - 16).astype(np.int32)
    options["index"] = np.where(np.arange(L) >= L - 16, np.arange(L) - (L - 16), -1).astype(np.int32)
    if axes == 2:
      cells = np.stack(np.divmod(np.arange(16), 4), -1) + (L - 16)
      options["pos"] = np.concatenate([np.repeat(np.arange(L - 16)[:, None], 2, 1), cells]).astype(np.float32)
    patches = pixels.reshape(n, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(n, 16, 4)
    side["features"] = (patches / 8 - 1).astype(np.float32)
  out = {}
  held = packing.hash64(np.arange(n), 0x64696769) < np.uint64(int(heldout * 2**64))
  for name, keep in (("train", ~held), ("heldout", held)):
    out[name] = ArraySource(tokens[keep], {k: v[keep] for k, v in side.items()}, **options)
  return out


DIGIT_LEVELS = 17
DIGIT_SPECIALS = {"bos": 17, "eos": 18, "mask": 19, "pad": 20}
DIGIT_VOCAB = 21


def directory_pair(path: str) -> tuple[str, str]:
  """(train, heldout) directories of a prepared path; heldout "" if the path is one bare data set."""
  if os.path.isdir(os.path.join(path, "train")):
    return os.path.join(path, "train"), os.path.join(path, "heldout")
  return path, ""
