"""The data plan: which documents stand in which row of which step, from lengths alone.

Legend: P pieces · R rows of a window · D documents a row may hold · N tokens of a row · W pieces of a window.

A document longer than N is cut into pieces; the first token of a later piece repeats the last one of the
piece before, as CONTEXT, so every token is predicted exactly once. Each component (a source with a mode) is
an endless sequence of its pieces: position p is piece cipher(p mod size) of epoch p div size, under a key of
its own per epoch, so `occurrence` is the epoch and a piece never comes twice in one. Window w takes W pieces,
shared among the components by the weights of its stage, packs them, and shuffles the packed rows by another
cipher. Hence any window is rebuilt anywhere from lengths in a fraction of a second, and the artefact holds
only the rows per window (prefix sums) and digests. Nothing depends on hosts: the state is the step.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import xxhash

from genmodels.data.packing import U64, hash64, pack, permute
from genmodels.data.records import DataError, json_digest, partial_name

VERSION = 1
MIN_ROWS = 64  # a window of a tiny source spans epochs, so that its last, half-empty row is one of many
# ------------------------------------------------------------------------------------------ documents


@dataclasses.dataclass(frozen=True)
class Component:
  """A source in a mixture, as the plan sees it.

  Fields:
    name: for messages and metrics.
    lengths: int[documents], tokens of each document.
    context: CONTEXT tokens of each document, int or int[documents].
    prefix: the context is a prefix (False: roles are spans, and a cut document is costed as all TEXT).
    runs: at most so many stretches of other tokens has a document between its context ones.
    digest: of the data, so that a plan is never applied to other data.
    mode: component of an objective mixture.
    source: index of the data source (several components may share one).
  """

  name: str
  lengths: np.ndarray
  context: Any = 0
  prefix: bool = True
  runs: int = 1
  digest: str = ""
  mode: int = 0
  source: int = 0


class _Pieces:
  """Pieces of a component's documents: [0, documents) are the first pieces, the others follow by document."""

  def __init__(self, component: Component, piece_len: int):
    self.component, self.piece_len = component, piece_len
    lengths = component.lengths
    self.documents = len(lengths)
    self._long = np.flatnonzero(lengths > piece_len)
    stride = max(piece_len - 1, 1)
    extra = -(-(lengths[self._long].astype(np.int64) - 1) // stride) - 1
    self._ends = np.cumsum(extra)
    self._starts = None
    more = int(self._ends[-1]) if len(extra) else 0
    self.size = self.documents + more
    self.tokens = int(np.asarray(lengths).sum(dtype=np.int64)) + more  # overlaps counted

  def locate(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """document int64[P], piece int32[P] of piece numbers."""
    document, piece = index.astype(np.int64), np.zeros(len(index), np.int32)
    far = np.flatnonzero(index >= self.documents)
    if len(far):
      at = index[far] - self.documents
      j = np.searchsorted(self._ends, at, side="right")
      document[far] = self._long[j]
      piece[far] = at - np.where(j > 0, self._ends[j - 1], 0) + 1
    return document, piece

  def in_order(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `locate`, pieces numbered document by document (needs a table of all documents: held-out sets)."""
    if self._starts is None:
      count = np.ones(self.documents, np.int64)
      count[self._long] += np.diff(self._ends, prepend=0)
      self._starts = np.cumsum(count) - count
    document = np.searchsorted(self._starts, index, side="right") - 1
    return document, (index - self._starts[document]).astype(np.int32)

  def measure(self, document, piece):
    """start int64[P], length int32[P], context int32[P] of pieces."""
    whole = self.component.lengths[document].astype(np.int64)
    start = piece.astype(np.int64) * (self.piece_len - 1)
    length = np.minimum(whole - start, self.piece_len)
    given = self.component.context
    given = np.asarray(given if isinstance(given, int) else given[document], np.int64)
    if not self.component.prefix:
      given = np.where(whole > self.piece_len, 0, given)
    context = np.clip(given - start, (piece > 0).astype(np.int64), length)
    return start, length.astype(np.int32), context.astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Rows:
  """Packed rows: row r holds pieces row_ptr[r] … row_ptr[r + 1], in this order. All arrays [P] but row_ptr.

  Fields: row_ptr int64[R + 1]; component int32; document int64; piece int32; start int64 (first token in the
  document); length, context, occurrence int32; position int64 in the component's sequence; rank int32[P, 2]
  (index, count) in the global batch, None in a window.
  """

  row_ptr: np.ndarray
  component: np.ndarray
  document: np.ndarray
  piece: np.ndarray
  start: np.ndarray
  length: np.ndarray
  context: np.ndarray
  occurrence: np.ndarray
  position: np.ndarray
  rank: np.ndarray | None = None

  _PER_PIECE = ("component", "document", "piece", "start", "length", "context", "occurrence", "position")

  def take(self, rows: np.ndarray) -> Rows:
    """These rows, in this order."""
    counts = np.diff(self.row_ptr)[rows]
    ptr = np.concatenate([[0], np.cumsum(counts)])
    at = np.arange(ptr[-1]) + np.repeat(self.row_ptr[rows] - ptr[:-1], counts)
    return Rows(ptr, *(getattr(self, n)[at] for n in self._PER_PIECE))

  @classmethod
  def concatenate(cls, parts: Sequence[Rows]) -> Rows:
    if len(parts) == 1:
      return parts[0]
    offsets = np.cumsum([0] + [p.row_ptr[-1] for p in parts])
    ptr = np.concatenate([[0]] + [p.row_ptr[1:] + o for p, o in zip(parts, offsets)])
    return cls(ptr, *(np.concatenate([getattr(p, n) for p in parts]) for n in cls._PER_PIECE))

  def digest(self) -> str:
    h = xxhash.xxh3_64()
    for name in ("row_ptr", *self._PER_PIECE):
      h.update(np.ascontiguousarray(getattr(self, name).astype("<i8")).tobytes())
    return h.hexdigest()


# ----------------------------------------------------------------------------------------------- plan


@dataclasses.dataclass
class _Stage:
  """Windows under one set of weights. `left`: positions dealt but not used when the stage before ended."""

  row: int
  weights: tuple[float, ...] | None
  window: int = 0
  base: tuple[int, ...] = ()
  left: tuple[tuple[int, ...], ...] = ()
  end: int | None = None  # row where the next stage begins


# Layout.cost: ({"context": int[P], "text": int[P], "runs": int[P]}, mode) -> {budget: int[P]}.
Cost = Callable[[Mapping[str, np.ndarray], int], Mapping[str, np.ndarray]]


def _roles(context, text, runs=1):
  return {"context": context, "text": text, "runs": np.broadcast_to(runs, np.shape(text))}


class Plan:
  """A data plan; `rows(step)` and `take(step, rows)` are pure functions of its arguments.

  Args:
    components: the sources.
    seq_len: N. batch_size: rows of the global batch.
    stages: ((step, weights), …), rising from 0; a change at step k moves nothing before step k. None: every
      component by its size, so that all end their epochs together.
    unit: what weights are shares of, "tokens" or "pieces".
    packed: False puts one piece in a row.
    documents: D; 0 chooses one that costs at most half a percent of the rows.
    cost: `Layout.cost`, called with {"context": int[P], "text": int[P], "runs": int[P]} and a mode,
      returning {budget: int[P]}.
    budgets: {budget: capacity of a row}; by default what one document of N TEXT tokens costs.
    piece_len: longest piece, default N.
    shuffle: False keeps the order of the documents. epochs: 1 ends after one pass (0: endless).
  Raises: DataError for data that cannot be planned, ValueError for arguments that make no sense.
  """

  def __init__(
    self, components: Sequence[Component], *, seq_len: int, batch_size: int, seed: int = 0,
    stages: Sequence[tuple[int, Sequence[float]]] | None = None, unit: str = "tokens", packed: bool = True,
    documents: int = 0, window: int = 1 << 16, cost: Cost | None = None,
    budgets: Mapping[str, int] | None = None, piece_len: int = 0, shuffle: bool = True, epochs: int = 0,
  ):  # fmt: skip
    if seq_len < 2 or batch_size < 1 or window < 1 or not components:
      raise ValueError("a plan needs components, seq_len >= 2, batch_size >= 1 and window >= 1")
    if epochs not in (0, 1) or unit not in ("tokens", "pieces"):
      raise ValueError(f"epochs={epochs}: 0 or 1; unit={unit!r}: 'tokens' or 'pieces'")
    self.components, self.seq_len, self.batch_size, self.seed = tuple(components), seq_len, batch_size, seed
    self.packed, self.shuffle, self.epochs, self.cost = packed, shuffle, epochs, cost
    self.piece_len = piece_len or seq_len
    if not 2 <= self.piece_len <= seq_len:
      raise ValueError(f"piece_len={piece_len}: expected 2 … seq_len={seq_len}")
    self._pieces = [_Pieces(c, self.piece_len) for c in self.components]
    for c, p in zip(self.components, self._pieces):
      if not p.size:
        raise DataError(f"data source {c.name!r} has no documents")
      if c.lengths.min() < 1:
        raise DataError(f"data source {c.name!r} has a document without tokens")
    self.size = sum(p.size for p in self._pieces)
    self.window = min(window, self.size)
    self.documents = documents if packed else 1
    # A number for each document over all sources; a source used twice (two modes) counts twice, so that the
    # same document in two modes of one step has two noises.
    self._offsets = np.cumsum([0] + [p.documents for p in self._pieces])
    self.budgets = {"tokens": seq_len}
    if cost is not None:
      full = [cost(_roles(np.zeros(1, np.int64), np.full(1, seq_len)), m) for m in self._modes()]
      self.budgets |= {n: int(max(np.max(f[n]) for f in full if n in f)) for f in full for n in f}
      if unknown := set(budgets or {}) - set(self.budgets):
        raise ValueError(f"budgets {sorted(unknown)}: the layout's cost knows {sorted(self.budgets)}")
    self.budgets |= dict(budgets or {})
    self._set_stages(stages, unit)
    self._prefix, self._digests = [0], []  # rows before each window; digest of each window's rows
    self._cache: collections.OrderedDict[int, Rows] = collections.OrderedDict()
    self._lock = threading.RLock()
    self._key = hash64(seed % (1 << 64), 0x706C616E)
    if not self.documents:
      self.documents = self._capacity()

  def _capacity(self) -> int:
    """The least of a few capacities that costs no more than half a percent of rows, tried on a sample."""
    pieces = self._deal(0)
    sizes = self._sizes(pieces.take(np.arange(min(len(pieces.length), 1 << 14))))
    best = pack(sizes, self.budgets, self.seq_len)[1]
    tries = (d << e for e in range(31) for d in (8, 12))
    return next(d for d in tries if d >= self.seq_len or pack(sizes, self.budgets, d)[1] <= 1.005 * best)

  def _modes(self):
    return sorted({c.mode for c in self.components})

  def _set_stages(self, stages, unit):
    n = len(self.components)
    stages = [(0, None)] if stages is None else [(int(s), tuple(map(float, w))) for s, w in stages]
    steps = [s for s, _ in stages]
    if steps[:1] != [0] or any(a >= b for a, b in zip(steps, steps[1:])):
      raise ValueError(f"stages at steps {steps}: expected to rise from 0")
    for step, w in stages:
      if w is not None and (len(w) != n or min(w) < 0 or not sum(w) > 0):
        raise ValueError(f"weights {w} at step {step}: expected {n} numbers >= 0, not all 0")
    if self.epochs and stages != [(0, None)]:
      raise ValueError("a plan of one pass takes no weights")
    self._unit = unit
    self._stages = [_Stage(s * self.batch_size, w) for s, w in stages]
    for a, b in zip(self._stages, self._stages[1:]):
      a.end = b.row
    self._stages[0].base, self._stages[0].left = (0,) * n, ((),) * n
    self._open = 1  # stages whose first window is known

  # ---- windows

  def _epochs_per_window(self):
    tokens = sum(p.tokens for p in self._pieces)
    small = self.packed and not self.epochs and tokens < MIN_ROWS * self.seq_len
    return -(-MIN_ROWS * self.seq_len // tokens) if small else 1

  def _windows_per_epoch(self):
    return -(-self.size // self.window)

  def _cursor(self, stage: _Stage, c: int, v: int) -> int:
    """How many pieces of component c the first v windows of a stage take."""
    size = self._pieces[c].size
    if stage.weights is None:
      if (k := self._epochs_per_window()) > 1:
        return v * k * size
      epoch, j = divmod(v, m := self._windows_per_epoch())
      return epoch * size + size * j // m
    pieces = [p.size / p.tokens if self._unit == "tokens" else 1.0 for p in self._pieces]
    share = [w * p for w, p in zip(stage.weights, pieces)]
    window = self.window
    if self.packed:
      window = max(window, MIN_ROWS * self.seq_len * self.size // sum(p.tokens for p in self._pieces))
    return v * round(window * share[c] / sum(share) * (1 << 32)) >> 32

  def _positions(self, stage: _Stage, c: int, v: int) -> np.ndarray:
    """Positions in component c's endless sequence that window v of a stage packs."""
    lo, hi, left = self._cursor(stage, c, v), self._cursor(stage, c, v + 1), stage.left[c]
    fresh = np.arange(max(lo - len(left), 0), max(hi - len(left), 0), dtype=np.int64) + stage.base[c]
    return np.concatenate([np.asarray(left[lo:hi], np.int64), fresh])

  def _stage_of(self, w: int) -> _Stage:
    return self._stages[bisect.bisect_right([s.window for s in self._stages[: self._open]], w) - 1]

  def _deal(self, w: int) -> Rows:
    """The pieces of window w, not packed: one row each."""
    stage, parts = self._stage_of(w), []
    for c, pieces in enumerate(self._pieces):
      p = self._positions(stage, c, w - stage.window)
      if not len(p):
        continue
      epoch, index = np.divmod(p, pieces.size)
      if self.shuffle:
        index = permute(index, pieces.size, hash64(self._key, c, epoch.astype(U64)))
        document, piece = pieces.locate(index)
      else:
        document, piece = pieces.in_order(index)
      start, length, context = pieces.measure(document, piece)
      full = np.full(len(p), c, np.int32)
      ptr = np.arange(len(p) + 1)
      parts.append(Rows(ptr, full, document, piece, start, length, context, epoch.astype(np.int32), p))
    return Rows.concatenate(parts)

  def _sizes(self, pieces: Rows) -> dict[str, np.ndarray]:
    sizes = {"tokens": pieces.length.astype(np.int64)}
    if self.cost is None:
      return sizes
    runs = np.asarray([c.runs for c in self.components])[pieces.component]
    roles = _roles(pieces.context.astype(np.int64), (pieces.length - pieces.context).astype(np.int64), runs)
    mode = np.asarray([c.mode for c in self.components])[pieces.component]
    for m in self._modes():
      at = np.flatnonzero(mode == m)
      for name, value in self.cost({r: n[at] for r, n in roles.items()}, m).items():
        sizes.setdefault(name, np.zeros(len(mode), np.int64))[at] = value
    return sizes

  def _build(self, w: int) -> Rows:
    """Window w, packed and shuffled, before a stage's end cuts it."""
    pieces = self._deal(w)
    sizes = self._sizes(pieces)
    if self.packed:
      row, count = pack(sizes, self.budgets, self.documents)
      order = np.argsort(row, kind="stable")
      packed = pieces.take(order)
      ptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=count))])
      packed = dataclasses.replace(packed, row_ptr=ptr)
    else:
      count, packed = len(pieces.length), pieces
      for name, size in sizes.items():
        if size.max() > self.budgets[name]:
          raise DataError(f"a piece costs {size.max()} of budget {name!r}, a row has {self.budgets[name]}")
    if self.shuffle:
      packed = packed.take(permute(np.arange(count), count, hash64(self._key, 0x726F7773, w)))
    return packed

  def _window(self, w: int) -> Rows:
    with self._lock:
      if w in self._cache:
        self._cache.move_to_end(w)
        return self._cache[w]
      rows = self._build(w)
      want = self._digests[w] if w < len(self._digests) else ""
      if want and (got := rows.digest()) != want:
        raise DataError(
          f"data plan, window {w}: digest {got}, expected {want} by the artefact; the lengths "
          f"or the "
          "layout's cost are not those it was made with. Restore them, or delete the artefact for a new order"
        )
      self._cache[w] = rows
      while len(self._cache) > 3:
        self._cache.popitem(last=False)
      return rows

  def _grow(self) -> bool:
    """Adds a window; False at the end of a plan of one pass."""
    w = len(self._digests)
    if self.epochs and w == self._windows_per_epoch():
      return False
    stage = self._stage_of(w)
    if not self.packed:
      # A piece is a row: the count needs no packing (a window that a stage cuts is dealt all the same).
      v = w - stage.window
      count = sum(self._cursor(stage, c, v + 1) - self._cursor(stage, c, v) for c in range(len(self._pieces)))
      if stage.end is None or self._prefix[-1] + count < stage.end:
        self._digests.append("")
        self._prefix.append(self._prefix[-1] + count)
        return True
    rows = self._window(w)
    count = len(rows.row_ptr) - 1
    if stage.end is not None and self._prefix[-1] + count >= stage.end:
      keep = stage.end - self._prefix[-1]
      self._open_next(stage, w, rows, keep)
      count = keep
    self._digests.append(rows.digest())
    self._prefix.append(self._prefix[-1] + count)
    return True

  def _open_next(self, stage, w, rows, keep):
    """The next stage begins inside window w: its unused pieces are dealt first, nothing is lost."""
    unused = rows.take(np.arange(keep, len(rows.row_ptr) - 1))
    nxt, base, left = self._stages[self._open], [], []
    for c in range(len(self.components)):
      dealt = self._cursor(stage, c, w - stage.window + 1)
      old = stage.left[c]
      base.append(stage.base[c] + max(dealt - len(old), 0))
      dropped = np.sort(unused.position[unused.component == c])
      left.append((*dropped.tolist(), *old[dealt:]))
    nxt.window, nxt.base, nxt.left = w + 1, tuple(base), tuple(left)
    self._open += 1

  def extend(self, steps: int) -> None:
    """Makes the prefix sums reach `steps` steps."""
    with self._lock:
      while self._prefix[-1] < steps * self.batch_size and self._grow():
        pass

  # ---- reading

  @property
  def steps(self) -> int:
    """Steps of a plan of one pass (the last may hold empty rows)."""
    if not self.epochs:
      raise ValueError("an endless plan has no number of steps")
    with self._lock:
      while self._grow():
        pass
    return -(-self._prefix[-1] // self.batch_size)

  @property
  def windows(self) -> int:
    """Windows whose rows are known."""
    return len(self._digests)

  def rows(self, step: int) -> np.ndarray:
    """Row numbers int64[batch_size] of a step."""
    return np.arange(step * self.batch_size, (step + 1) * self.batch_size)

  def _lookup(self, rows: np.ndarray) -> Rows:
    """Packed rows by rising row number; rows behind the end of a plan of one pass are empty."""
    with self._lock:
      while self._prefix[-1] <= rows[-1] and self._grow():
        pass
      first, last = (bisect.bisect_right(self._prefix, int(r)) - 1 for r in (rows[0], rows[-1]))
      parts = []
      for w in range(first, last + 1):
        end = self._prefix[w + 1] if w < len(self._digests) else rows[-1] + 1
        at = rows[(rows >= self._prefix[w]) & (rows < end)]
        if w == len(self._digests):
          none = [np.zeros(0, np.int64)] * len(Rows._PER_PIECE)
          parts.append(Rows(np.zeros(len(at) + 1, np.int64), *none))
        else:
          parts.append(self._window(w).take(at - self._prefix[w]))
    return Rows.concatenate(parts)

  def batch(self, step: int) -> Rows:
    """The global batch of a step, with ranks."""
    batch = self._lookup(self.rows(step))
    count = int(batch.row_ptr[-1])
    index = np.arange(count)
    if self.shuffle and count:
      # Ranks in row order would give the first device the smallest stratified times at every step.
      index = permute(index, count, hash64(self._key, 0x72616E6B, step))
    rank = np.stack([index, np.full(count, count)], 1).astype(np.int32).reshape(count, 2)
    return dataclasses.replace(batch, rank=rank)

  def take(self, step: int, rows: np.ndarray) -> Rows:
    """Rows of a step by their number in the global batch, in the order asked."""
    batch = self.batch(step)
    rows = np.asarray(rows, np.int64)
    if len(rows) and (rows.min() < 0 or rows.max() >= self.batch_size):
      raise ValueError(f"rows {rows.min()} … {rows.max()} of a batch of {self.batch_size}")
    out = batch.take(rows)
    counts = np.diff(batch.row_ptr)[rows]
    at = np.arange(out.row_ptr[-1]) + np.repeat(batch.row_ptr[rows] - out.row_ptr[:-1], counts)
    return dataclasses.replace(out, rank=batch.rank[at])

  def example_id(self, rows: Rows) -> np.ndarray:
    """uint32[P, 2]: low bits of the document's number over all components; its high bits and the piece."""
    number = self._offsets[rows.component] + rows.document
    low = number & 0xFFFFFFFF
    return np.stack([low, ((number >> 32) << 20) | rows.piece], 1).astype(np.uint32)

  def fill(self, step: int) -> dict[str, float]:
    """Share of each budget that a global batch uses, and of the document capacity."""
    batch = self.batch(step)
    sizes = self._sizes(batch)
    out = {n: float(s.sum() / (self.budgets[n] * self.batch_size)) for n, s in sizes.items()}
    return out | {"documents": float(batch.row_ptr[-1] / (self.documents * self.batch_size))}

  # ---- artefact

  def header(self) -> dict:
    """What determines the plan, as JSON."""
    probe = np.unique(np.clip([1, 2, 3, 7, 64, 100, self.piece_len // 2, self.piece_len], 1, self.piece_len))
    cost = {}
    if self.cost is not None:
      for m in self._modes():
        values = self.cost(_roles(np.ones_like(probe), probe - 1), m)
        cost[str(m)] = {n: np.asarray(v).tolist() for n, v in values.items()}
    return {
      "version": VERSION, "seed": self.seed, "seq_len": self.seq_len, "piece_len": self.piece_len,
      "batch_size": self.batch_size, "packed": self.packed, "documents": self.documents, "window":
      self.window, "shuffle": self.shuffle, "epochs": self.epochs, "unit": self._unit, "budgets":
      self.budgets, "cost": cost, "components": [
        {"name": c.name, "digest": c.digest, "mode": c.mode, "documents": p.documents, "pieces": p.size}
        for c, p in zip(self.components, self._pieces)
      ],
      "stages": [[s.row // self.batch_size, s.weights and list(s.weights)] for s in self._stages],
    }  # fmt: skip

  def chain(self) -> list[str]:
    """Digest chain: entry w covers the header's data and the windows 0 … w."""
    out, last = [], json_digest(self.header() | {"stages": []})
    for d in self._digests:
      last = xxhash.xxh3_64_hexdigest((last + d).encode())
      out.append(last)
    return out

  def save(self, path: str) -> None:
    """Writes the artefact (JSON with its own xxh3), atomically."""
    with self._lock:
      opened = self._stages[: self._open]
      tree = {
        "header": self.header(), "rows": self._prefix, "digests": self._digests, "chain": self.chain()[-1:],
        "stages": [{"window": s.window, "base": s.base, "left": s.left} for s in opened],
      }  # fmt: skip
    tree = json.loads(json.dumps(tree))
    tree["xxh3"] = json_digest(tree)
    tmp = partial_name(path)
    with open(tmp, "w") as f:
      json.dump(tree, f)
    os.replace(tmp, path)

  def load(self, path: str) -> None:
    """Takes prefix sums and digests from an artefact made for the same header.

    Stages may differ: what lies before the first differing step is kept. Raises DataError naming the keys
    that differ, or a damaged file.
    """
    with open(path) as f:
      try:
        tree = json.load(f)
      except json.JSONDecodeError as e:
        raise DataError(f"data plan {path}: not JSON ({e}); delete it, it is made again from the data") from e
    if json_digest(tree) != tree.get("xxh3"):
      raise DataError(
        f"data plan {path}: does not match its own xxh3; delete it, it is made again from the data"
      )
    mine, theirs = json.loads(json.dumps(self.header())), tree["header"]
    if differ := [k for k in mine if k != "stages" and mine[k] != theirs.get(k)]:
      what = "; ".join(f"{k}: {theirs.get(k)} in the artefact, {mine[k]} now" for k in differ)
      raise DataError(
        f"data plan {path} was made for other data or options ({what[:500]}). Restore them, or delete the "
        f"file to "
        "begin a new order of the data"
      )
    same = [a == b for a, b in zip(mine["stages"], theirs["stages"])]
    shared = same.index(False) if False in same else len(same)
    limits = [s[shared][0] * self.batch_size for s in (mine["stages"], theirs["stages"]) if len(s) > shared]
    if shared == 0:
      return
    windows = len(tree["digests"])
    if limits:
      # Keep whole windows that end before the first difference: a cut window would differ.
      windows = max(bisect.bisect_left(tree["rows"], min(limits)) - 1, 0)
    with self._lock:
      self._prefix, self._digests = tree["rows"][: windows + 1], tree["digests"][:windows]
      self._cache.clear()
      self._open = 1
      for stage, saved in zip(self._stages[:shared], tree["stages"]):
        if saved["window"] <= windows:
          stage.window, stage.base = saved["window"], tuple(saved["base"])
          stage.left = tuple(map(tuple, saved["left"]))
          self._open = self._stages.index(stage) + 1
