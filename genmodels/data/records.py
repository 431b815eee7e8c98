"""Records on disk: ArrayRecord shards, a manifest that is checked, and bad input that is counted.

One schema serves text, image and audio tokens. A record is one document:

  header (32 bytes, HEADER) · shape u32[dims] · spans u32[spans, 3] · conditions f32[conds] · tokens[n, depth]

`shape` is the grid or the scale table of an image, (start, end, role) spans are roles that are no prefix
(several turns), `depth` is the number of codes per position (residual or parallel codebooks). Ids are stored
at the narrowest width that holds the vocabulary. Shards have group_size 1: every record is its own checked
chunk.

A truncated ArrayRecord file opens as an empty one, so the manifest's counts and sizes are compared at open.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import logging
import os
import shutil
import socket
import threading

import numpy as np
import xxhash
from array_record.python import array_record_module

FORMAT = "genmodels-records-1"
MAGIC = 0x4D47  # "GM"
MANIFEST = "manifest.json"
CONTEXT, TEXT, FILLER = range(3)  # roles, as in genmodels.contracts (not imported here: it needs jax)

HEADER = np.dtype([
  ("magic", "<u2"), ("version", "u1"), ("width", "u1"), ("tokens", "<u4"), ("context", "<u4"),
  ("source_bytes", "<u4"), ("label", "<i4"), ("modality", "<u2"), ("depth", "<u2"), ("dims", "u1"),
  ("unused", "u1"), ("spans", "<u2"), ("conds", "<u2"), ("unused2", "<u2"),
])  # fmt: skip
assert HEADER.itemsize == 32

_LOG = logging.getLogger(__name__)


class DataError(ValueError):
  """Data on disk is not what its manifest says, or a plan does not fit it."""


def id_dtype(vocab_size: int) -> np.dtype:
  """The narrowest unsigned type that holds ids below `vocab_size`."""
  return np.dtype("u1" if vocab_size <= 1 << 8 else "<u2" if vocab_size <= 1 << 16 else "<u4")


def file_digest(path: str) -> str:
  """xxh3 (64 bit, hex) of a file."""
  digest = xxhash.xxh3_64()
  with open(path, "rb") as f:
    while chunk := f.read(1 << 22):
      digest.update(chunk)
  return digest.hexdigest()


def json_digest(tree) -> str:
  """xxh3 (64 bit, hex) of a JSON tree in canonical form; the key "xxh3" at the top is left out."""
  tree = {k: v for k, v in tree.items() if k != "xxh3"}
  return xxhash.xxh3_64_hexdigest(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode())


def partial_name(path: str) -> str:
  """Where to write what is renamed to `path` when it is complete; hosts that share a disk do not collide."""
  return f"{path}.partial-{socket.gethostname()}-{os.getpid()}"


@dataclasses.dataclass(frozen=True)
class Document:
  """One document to write, or read back.

  Fields:
    tokens: ids [n] or [n, depth].
    context: the first `context` positions are given, never predicted (BOS, a prompt).
    label: class, −1 none.
    modality: stream id.
    shape: grid or scale table.
    spans: (start, end, role) where roles are no prefix; positions outside are TEXT.
    conditions: float conditions.
    source_bytes: size of the raw data (UTF-8 text), for bits per byte.
  """

  tokens: np.ndarray
  context: int = 0
  label: int = -1
  modality: int = 0
  shape: tuple[int, ...] = ()
  spans: tuple[tuple[int, int, int], ...] = ()
  conditions: tuple[float, ...] = ()
  source_bytes: int = 0

  def context_tokens(self) -> int:
    """How many positions are CONTEXT."""
    if not self.spans:
      return min(self.context, len(self.tokens))
    return int((document_roles(len(self.tokens), self.context, self.spans) == CONTEXT).sum())


def document_roles(length: int, context: int, spans) -> np.ndarray:
  """Role of each position, int32[length], from the prefix and the spans (spans win)."""
  role = np.full(length, TEXT, np.int32)
  role[:context] = CONTEXT
  for start, end, value in spans:
    role[start:end] = value
  return role


def encode(doc: Document, dtype: np.dtype) -> bytes:
  """The record of a document."""
  tokens = np.asarray(doc.tokens)
  head = np.zeros((), HEADER)
  head["magic"], head["version"], head["width"] = MAGIC, 1, dtype.itemsize
  head["tokens"], head["context"] = len(tokens), min(doc.context, len(tokens))
  head["source_bytes"], head["label"], head["modality"] = doc.source_bytes, doc.label, doc.modality
  head["depth"] = tokens.shape[1] if tokens.ndim == 2 else 1
  head["dims"], head["spans"], head["conds"] = len(doc.shape), len(doc.spans), len(doc.conditions)
  return b"".join([
    head.tobytes(), np.asarray(doc.shape, "<u4").tobytes(), np.asarray(doc.spans, "<u4").tobytes(),
    np.asarray(doc.conditions, "<f4").tobytes(), tokens.astype(dtype).tobytes(),
  ])  # fmt: skip


def extras_size(head: np.ndarray) -> np.ndarray:
  """Bytes between header and tokens, for headers of any shape."""
  return 4 * (head["dims"].astype(np.int64) + 3 * head["spans"].astype(np.int64) + head["conds"])


def decode(record: bytes) -> Document:
  """The document of a record."""
  head = np.frombuffer(record, HEADER, 1)[0]
  at = HEADER.itemsize
  shape = np.frombuffer(record, "<u4", int(head["dims"]), at)
  at += shape.nbytes
  spans = np.frombuffer(record, "<u4", 3 * int(head["spans"]), at)
  at += spans.nbytes
  conditions = np.frombuffer(record, "<f4", int(head["conds"]), at)
  at += conditions.nbytes
  tokens = np.frombuffer(record, f"<u{head['width']}", int(head["tokens"]) * int(head["depth"]), at)
  if head["depth"] > 1:
    tokens = tokens.reshape(-1, int(head["depth"]))
  return Document(
    tokens, int(head["context"]), int(head["label"]), int(head["modality"]), tuple(shape.tolist()),
    tuple(tuple(s) for s in spans.reshape(-1, 3).tolist()), tuple(conditions.tolist()),
    int(head["source_bytes"]),
  )  # fmt: skip


class Writer:
  """Writes a data set directory; it appears under its name, complete, only at `close`.

  Args:
    path: directory to create.
    vocab_size: ids are below it.
    tokenizer: {"hash": …, …}, stored in the manifest and compared when the data are opened.
    shard_bytes: a shard is closed when its payload reaches this.
    compression: "" (uncompressed) or an ArrayRecord option such as "zstd:3".
    depth: codes per position.
    meta: further JSON for the manifest.
  """

  def __init__(
    self, path: str, *, vocab_size: int, tokenizer: dict | None = None, shard_bytes: int = 256 << 20,
    compression: str = "", depth: int = 1, meta: dict | None = None,
  ):  # fmt: skip
    if os.path.exists(path):
      raise DataError(f"data set {path}: exists already; delete it or choose another directory")
    self.path = path
    self.dtype = id_dtype(vocab_size)
    self._tmp = partial_name(path)
    shutil.rmtree(self._tmp, ignore_errors=True)
    os.makedirs(self._tmp)
    self._shard_bytes = shard_bytes
    self._options = f"group_size:1,{compression or 'uncompressed'}"
    self._manifest = dict(
      format=FORMAT, vocab_size=vocab_size, width=self.dtype.itemsize, depth=depth,
      tokenizer=tokenizer or {"hash": ""}, compression=compression or "none", meta=meta or {},
    )  # fmt: skip
    self._shards, self._lengths, self._contexts = [], [], []
    self._writer = None
    self._spans = False
    self._features = dict(classes=0, modality=False, shape=False, conditions=0)
    self._source_bytes = 0

  def write(self, doc: Document) -> None:
    """Appends a document. Raises DataError for an empty one, an id out of range or a wrong depth."""
    tokens, m = np.asarray(doc.tokens), self._manifest
    where = f"data set {self.path}, document {len(self._lengths)}"
    if not len(tokens):
      raise DataError(f"{where}: has no tokens; leave empty documents out")
    if (tokens.shape[1] if tokens.ndim == 2 else 1) != m["depth"]:
      raise DataError(f"{where}: tokens of shape {tokens.shape}, expected depth {m['depth']}")
    if tokens.min() < 0 or tokens.max() >= m["vocab_size"]:
      raise DataError(
        f"{where}: ids {tokens.min()} … {tokens.max()}, expected 0 … {m['vocab_size'] - 1}; "
        "the vocabulary size does not belong to this tokenizer"
      )
    if self._writer is None:
      name = f"shard-{len(self._shards):05d}.array_record"
      self._writer = array_record_module.ArrayRecordWriter(os.path.join(self._tmp, name), self._options)
      self._shards.append(dict(file=name, documents=0, tokens=0, payload=0))
    record = encode(doc, self.dtype)
    self._writer.write(record)
    shard = self._shards[-1]
    shard["documents"] += 1
    shard["tokens"] += len(tokens)
    shard["payload"] += len(record)
    self._lengths.append(len(tokens))
    self._contexts.append(doc.context_tokens())
    f = self._features
    if doc.spans:
      self._spans = True
      given = document_roles(len(tokens), doc.context, doc.spans) == CONTEXT
      runs = int((np.diff(given.astype(np.int8), prepend=1) == -1).sum())
      f["runs"] = max(f.get("runs", 1), runs)
    f["classes"] = max(f["classes"], doc.label + 1)
    f["modality"] |= doc.modality > 0
    f["shape"] |= bool(doc.shape)
    f["conditions"] = max(f["conditions"], len(doc.conditions))
    self._source_bytes += doc.source_bytes
    if shard["payload"] >= self._shard_bytes:
      self._close_shard()

  def _close_shard(self):
    if self._writer is not None:
      self._writer.close()
      self._writer = None
      shard = self._shards[-1]
      path = os.path.join(self._tmp, shard["file"])
      shard["bytes"], shard["xxh3"] = os.path.getsize(path), file_digest(path)
      del shard["payload"]

  def _array(self, name, values):
    path = os.path.join(self._tmp, name)
    np.save(path, np.asarray(values, "<u4"))
    return dict(file=name, xxh3=file_digest(path))

  def close(self) -> dict:
    """Finishes the directory and returns the manifest."""
    self._close_shard()
    contexts = set(self._contexts)
    manifest = self._manifest | dict(
      documents=len(self._lengths), tokens=sum(self._lengths), source_bytes=self._source_bytes,
      spans=self._spans, features=self._features, lengths=self._array("lengths.npy", self._lengths),
      shards=self._shards,
      # Almost always every document has the same context (BOS): then no array is stored.
      context=contexts.pop() if len(contexts) == 1 else self._array("context.npy", self._contexts),
    )  # fmt: skip
    manifest["xxh3"] = json_digest(manifest)
    with open(os.path.join(self._tmp, MANIFEST), "w") as f:
      json.dump(manifest, f, indent=1)
    os.rename(self._tmp, self.path)
    return manifest

  def __enter__(self):
    return self

  def __exit__(self, kind, *_):
    if kind is None:
      self.close()
    else:
      self._writer = None
      shutil.rmtree(self._tmp, ignore_errors=True)


class Quarantine:
  """What could not be read: named, counted, and limited to a share of all tokens."""

  def __init__(self, total_tokens: int, limit: float, where: str):
    self.entries: list[dict] = []  # {shard, record or None, documents, tokens, reason}
    self._seen: set[tuple] = set()
    self._total, self._limit, self._where = total_tokens, limit, where
    self._lock = threading.Lock()

  @property
  def documents(self) -> int:
    return sum(e["documents"] for e in self.entries)

  @property
  def tokens(self) -> int:
    return sum(e["tokens"] for e in self.entries)

  def add(self, shard: str, record: int | None, documents: int, tokens: int, reason: str) -> None:
    """Counts a record or a shard once. Raises DataError when the share of lost tokens exceeds the limit."""
    with self._lock:
      if (shard, record) in self._seen:
        return
      self._seen.add((shard, record))
      self.entries.append(dict(shard=shard, record=record, documents=documents, tokens=tokens, reason=reason))
    what = f"{self._where}/{shard}" + ("" if record is None else f", record {record}")
    _LOG.warning("quarantined: %s (%d documents, %d tokens): %s", what, documents, tokens, reason)
    if self.tokens > self._limit * self._total:
      raise DataError(
        f"{what}: {reason}. {self.tokens} of {self._total} tokens are unreadable, more than "
        f"max_quarantined={self._limit} of them; restore the file, or raise data.max_quarantined to go on "
        f"without"
      )


class Dataset:
  """A data set directory, opened and checked. Documents are numbered over the shards in manifest order.

  Args:
    path: the directory.
    tokenizer: hash that the data must carry ("" accepts any).
    corrupt: "quarantine" counts unreadable shards and records and goes on (their documents become
      padding, nothing else moves) or "refuse" raises at the first.
    max_quarantined: share of the tokens that may be lost before it raises after all.
    verify: compare the xxh3 of every shard (reads everything once).
  Attributes: lengths uint32[documents], context (int, or uint32[documents]), manifest, quarantine.
  Raises: DataError naming the file, what was expected and what was found.
  """

  def __init__(
    self, path: str, *, tokenizer: str = "", corrupt: str = "quarantine", max_quarantined: float = 0.01,
    verify: bool = False,
  ):  # fmt: skip
    if corrupt not in ("quarantine", "refuse"):
      raise ValueError(f"corrupt={corrupt!r}: expected 'quarantine' or 'refuse'")
    self.path = path
    self.manifest = m = read_manifest(path)
    if tokenizer and m["tokenizer"]["hash"] != tokenizer:
      raise DataError(
        f"data set {path}: its ids were made by tokenizer {m['tokenizer']['hash']}, the config's tokenizer "
        f"is {tokenizer}; name the tokenizer stored with the data, or prepare the data again"
      )
    self.digest = m["xxh3"]
    self.dtype = np.dtype(f"<u{m['width']}") if m["width"] > 1 else np.dtype("u1")
    self.depth, self.spans = m["depth"], m["spans"]
    self.lengths = self._load_array(m["lengths"])
    self.context = m["context"] if isinstance(m["context"], int) else self._load_array(m["context"])
    self.ends = np.cumsum([s["documents"] for s in m["shards"]], dtype=np.int64)
    if len(self.lengths) != m["documents"] or (len(self.ends) and self.ends[-1] != m["documents"]):
      raise DataError(
        f"data set {path}: manifest states {m['documents']} documents, the lengths file holds "
        f"{len(self.lengths)}, its shards {int(self.ends[-1]) if len(self.ends) else 0}; prepare it again"
      )
    limit = 0.0 if corrupt == "refuse" else max_quarantined
    self.quarantine = Quarantine(m["tokens"], limit, path)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
      opened = list(pool.map(lambda s: self._open(s, verify), m["shards"]))
    self._readers = [reader for reader, _ in opened]
    for shard, (reader, reason) in zip(m["shards"], opened):
      if reader is None:
        self.quarantine.add(shard["file"], None, shard["documents"], shard["tokens"], reason)

  def __len__(self):
    return len(self.lengths)

  def _load_array(self, entry):
    path = os.path.join(self.path, entry["file"])
    if not os.path.exists(path):
      raise DataError(f"{path}: missing; the manifest lists it")
    if (got := file_digest(path)) != entry["xxh3"]:
      raise DataError(f"{path}: xxh3 {got}, expected {entry['xxh3']} by the manifest; restore the file")
    return np.load(path, mmap_mode="r")

  def _open(self, shard, verify):
    path = os.path.join(self.path, shard["file"])
    if not os.path.exists(path):
      return None, "the file is missing"
    if (size := os.path.getsize(path)) != shard["bytes"]:
      return None, f"{size} bytes, expected {shard['bytes']} by the manifest"
    if verify and (got := file_digest(path)) != shard["xxh3"]:
      return None, f"xxh3 {got}, expected {shard['xxh3']} by the manifest"
    try:
      reader = array_record_module.ArrayRecordReader(path, "readahead_buffer_size:0")
      count = reader.num_records()
    except (RuntimeError, ValueError, IndexError) as e:
      return None, f"cannot be opened: {e}"
    if count != shard["documents"]:
      return None, f"{count} records, expected {shard['documents']} by the manifest"
    return reader, ""

  def read_records(self, docs: np.ndarray) -> tuple[list[bytes | None], np.ndarray]:
    """Raw records of documents, one batched read per shard.

    Returns: records in the order asked (None: quarantined), headers HEADER[len(docs)] (zero where None).
    """
    docs = np.asarray(docs, np.int64)
    out: list[bytes | None] = [None] * len(docs)
    shard_of = np.searchsorted(self.ends, docs, side="right")
    for s in np.unique(shard_of):
      if self._readers[s] is None:
        continue
      at = np.flatnonzero(shard_of == s)
      local = docs[at] - (self.ends[s - 1] if s else 0)
      # Equal indices are read once: a document in several pieces of one step, or drawn twice.
      unique, back = np.unique(local, return_inverse=True)
      records = self._read_shard(int(s), unique.tolist())
      for i, j in zip(at.tolist(), back.tolist()):
        out[i] = records[j]
    blank = bytes(HEADER.itemsize)
    heads = np.frombuffer(
      b"".join([blank if r is None else r[: HEADER.itemsize] for r in out]), HEADER
    ).copy()
    good = np.fromiter((r is not None for r in out), bool, len(out))
    wrong = good & ((heads["magic"] != MAGIC) | (heads["tokens"] != self.lengths[docs]))
    for i in np.flatnonzero(wrong):
      self._drop(
        int(shard_of[i]), int(docs[i]), f"{heads['tokens'][i]} tokens, expected {self.lengths[docs[i]]}"
      )
      out[i] = None
      heads[i] = 0
    return out, heads

  def _drop(self, s, doc, reason):
    local = doc - (int(self.ends[s - 1]) if s else 0)
    self.quarantine.add(self.manifest["shards"][s]["file"], local, 1, int(self.lengths[doc]), reason)

  def _read_shard(self, s, local):
    reader = self._readers[s]
    try:
      return reader.read(local)
    except (RuntimeError, ValueError, IndexError):
      pass  # Some record is bad: find out which, one by one.
    out = []
    for i in local:
      try:
        out += reader.read([i])
      except (RuntimeError, ValueError, IndexError) as e:
        self._drop(s, i + (int(self.ends[s - 1]) if s else 0), f"unreadable: {e}")
        out.append(None)
    return out

  def read(self, docs) -> list[Document | None]:
    """Decoded documents, in the order asked; None where quarantined."""
    return [None if r is None else decode(r) for r in self.read_records(docs)[0]]


def read_manifest(path: str) -> dict:
  """The manifest of a data set directory, its own digest verified."""
  name = os.path.join(path, MANIFEST)
  if not os.path.exists(name):
    raise DataError(f"{name}: not found; `genmodels prepare --out {path} …` makes a data set")
  with open(name) as f:
    try:
      manifest = json.load(f)
    except json.JSONDecodeError as e:
      raise DataError(f"{name}: not JSON ({e}); restore the file or prepare the data again") from e
  if manifest.get("format") != FORMAT:
    raise DataError(f"{name}: format {manifest.get('format')!r}, expected {FORMAT!r}; prepare the data again")
  if (got := json_digest(manifest)) != manifest.get("xxh3"):
    raise DataError(
      f"{name}: xxh3 {got}, expected {manifest.get('xxh3')}: the manifest was edited; restore it"
    )
  return manifest
