"""safetensors files through memory maps: headers checked before anything is read, no tensor held in memory.

A file is 8 bytes (length n of the header, little endian), n bytes of JSON {name: {dtype, shape,
data_offsets}}, and the data. Pickled checkpoints (.bin, .pt) are refused: reading one runs code from it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
MAX_HEADER = 100_000_000  # bytes; what other readers accept too

DTYPES: dict[str, np.dtype] = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "I16": np.dtype(np.int16),
  "I8": np.dtype(np.int8),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
NAMES = {v: k for k, v in DTYPES.items()}
FLOATS = ("F32", "F16", "BF16")  # what a weight may be stored in; F16 becomes F32, which holds all its values


class TensorError(ValueError):
  """A checkpoint file that is missing, damaged or not what its header says."""


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Where a tensor lies: file, safetensors dtype, shape, first byte in the file."""

  file: pathlib.Path
  dtype: str
  shape: tuple[int, ...]
  offset: int

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * DTYPES[self.dtype].itemsize

  def open(self, mode: str = "r") -> np.ndarray:
    """The tensor as a memory map; mode "r" or "r+"."""
    if not self.nbytes:
      return np.zeros(self.shape, DTYPES[self.dtype])
    raw = np.memmap(self.file, np.uint8, mode, self.offset, (self.nbytes,))
    return raw.view(DTYPES[self.dtype]).reshape(self.shape)


def header(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
  """The tensors of one file, and its metadata.

  Raises:
    TensorError: no safetensors file, an unknown dtype, offsets that contradict shapes or overlap, or fewer
      (or more) bytes than the header promises.
  """
  path = pathlib.Path(path)
  try:
    size = path.stat().st_size
    with path.open("rb") as f:
      first = f.read(8)
      n = int.from_bytes(first, "little")
      if len(first) < 8 or n > min(MAX_HEADER, size - 8):
        raise TensorError(
          f"{path}: no safetensors file, or cut inside its header ({size} bytes, header {n}); fetch it again"
        )
      fields = json.loads(f.read(n))
  except FileNotFoundError:
    raise TensorError(f"{path}: missing; fetch the whole checkpoint again") from None
  except (UnicodeDecodeError, json.JSONDecodeError) as e:
    raise TensorError(f"{path}: the header is no JSON ({e}): no safetensors file, or damaged") from None
  if not isinstance(fields, dict):
    raise TensorError(f"{path}: the header is a {type(fields).__name__}, expected an object")
  metadata = fields.pop("__metadata__", None) or {}
  out, spans = {}, []
  for name, d in fields.items():
    try:
      dtype, shape, (a, b) = d["dtype"], tuple(int(s) for s in d["shape"]), d["data_offsets"]
    except (KeyError, TypeError, ValueError):
      raise TensorError(f"{path}: the header's entry for {name} is malformed: {d}") from None
    if dtype not in DTYPES:
      raise TensorError(f"{path}: {name} has dtype {dtype}; known: {', '.join(DTYPES)}")
    out[name] = Tensor(path, dtype, shape, 8 + n + a)
    if min(shape, default=0) < 0 or b - a != out[name].nbytes:
      raise TensorError(f"{path}: {name} is {dtype}{list(shape)}, but the header gives it {b - a} bytes")
    spans.append((a, b, name))
  end = 0
  for a, b, name in sorted(spans):
    if a < end:
      raise TensorError(f"{path}: {name} overlaps the tensor before it: the header is damaged")
    end = b
  if size != 8 + n + end:
    what = "truncated" if size < 8 + n + end else "longer than its header says"
    raise TensorError(f"{path}: {what}: expected {8 + n + end} bytes, got {size}; fetch it again")
  return out, dict(metadata)


def folder(path: str | os.PathLike) -> dict[str, Tensor]:
  """All tensors of a checkpoint folder: the shards of its index, or its only safetensors file.

  Raises:
    TensorError: no weights, only pickled ones, a missing shard, or an index that contradicts the files.
  """
  path = pathlib.Path(path)
  index = path / INDEX
  if index.is_file():
    try:
      weights = json.loads(index.read_text())["weight_map"]
      assert all(isinstance(v, str) and "/" not in v for v in weights.values())
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
      raise TensorError(f"{index}: no index of safetensors shards (weight_map: tensor → file name)") from None
    files = sorted(set(weights.values()))
    missing = [f for f in files if not (path / f).is_file()]
    if missing:
      raise TensorError(
        f"{path}: missing shard{'s' * (len(missing) > 1)} {some(missing)} of the {len(files)} that {INDEX} "
        "names; fetch the whole checkpoint again"
      )
    out = {}
    for f in files:
      for name, t in header(path / f)[0].items():
        if name in out:
          raise TensorError(f"{path}: {name} is in {out[name].file.name} and in {f}")
        out[name] = t
    lost = [n for n, f in weights.items() if n not in out or out[n].file.name != f]
    if lost:
      raise TensorError(
        f"{path}: {INDEX} names {len(lost)} tensors that their shards do not hold: {some(lost)}"
      )
    return out
  found = sorted(p for p in path.glob("*.safetensors") if p.is_file())
  if (path / SINGLE).is_file():
    found = [path / SINGLE]
  if len(found) == 1:
    return header(found[0])[0]
  if found:
    raise TensorError(
      f"{path}: {len(found)} safetensors files and no {INDEX}, so which belong together is not said; "
      f"expected the index, or one file {SINGLE}"
    )
  pickles = sorted(p.name for p in path.glob("*") if p.suffix in PICKLES)
  if pickles:
    raise TensorError(
      f"{path}: only pickled weights ({some(pickles)}). Reading a pickle runs whatever code it holds, so it "
      "is refused; convert it where you trust it: AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)"
    )
  raise TensorError(f"{path}: no *.safetensors file")


def create(path: pathlib.Path, specs: Mapping[str, tuple[str, Sequence[int]]], metadata=None) -> None:
  """Writes a file of zeros for {name: (dtype, shape)}, its blocks reserved, to be filled through `header`.

  The header is padded so that data begin at a multiple of 64 bytes.

  Raises:
    OSError: no room on the disk (found here, not in the middle of a memory map).
  """
  head: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
  at = 0
  for name, (dtype, shape) in specs.items():
    n = math.prod(shape) * DTYPES[dtype].itemsize
    head[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + n]}
    at += n
  text = json.dumps(head, separators=(",", ":")).encode()
  text += b" " * (-(8 + len(text)) % 64)
  with path.open("wb") as f:
    f.write(len(text).to_bytes(8, "little") + text)
    f.flush()
    total = 8 + len(text) + at
    if hasattr(os, "posix_fallocate") and at:
      os.posix_fallocate(f.fileno(), 0, total)
    else:
      f.truncate(total)


def sync(path: pathlib.Path) -> None:
  """Makes a file (or a directory's entries) durable."""
  fd = os.open(path, os.O_RDONLY)
  try:
    os.fsync(fd)
  finally:
    os.close(fd)


def copy_into(dst: np.ndarray, src: np.ndarray) -> None:
  """dst[...] = src by blocks that fit a cache (a transposed memory map would else be read once per column);
  the dtype of dst, which must hold every value of src."""
  if dst.ndim < 2 or src.flags.c_contiguous:
    dst[...] = src
    return
  for i in range(0, dst.shape[0], 256):
    for j in range(0, dst.shape[1], 256):
      dst[i : i + 256, j : j + 256] = src[i : i + 256, j : j + 256]


def some(names, limit: int = 8) -> str:
  """The first few names, for a message."""
  names = list(names)
  return ", ".join(names[:limit]) + (f" … ({len(names)} in all)" if len(names) > limit else "")
