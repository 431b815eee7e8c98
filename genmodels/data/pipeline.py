"""The pipeline: config section → sources, plan, batches, and the grain iterator that reads them ahead.

A batch is a pure function of (plan, step, rows). Grain is given a source indexed by the step whose element is this
process's rows of that step: it adds threads, prefetch and seek, and never touches the order.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from genmodels import config
from genmodels.data import plan as plans
from genmodels.data import prepare, records, sources, tokenizers

Batch = dict[str, np.ndarray]
Ranges = Sequence[tuple[int, int]]
PLAN_FILE = "data_plan.json"


@dataclasses.dataclass(frozen=True)
class Meta:
  """What a model must know about the tokens.

  Fields:
    vocab_size: ids are below it. specials: {"bos", "eos", "mask", "pad"} → id (−1: none).
    values: ids 0 … values − 1 are data, the rest specials.
    seq_len: N. documents: D. axes: A. sources: names by `source` index. classes: of side/label, 0 none.
  """

  vocab_size: int
  specials: Mapping[str, int]
  values: int
  seq_len: int
  documents: int
  axes: int
  sources: tuple[str, ...]
  classes: int = 0


class Data:
  """A plan, its sources and the batches they make.

  Attributes: plan, sources, tokenizer (None for pure codes), meta.
  """

  def __init__(
    self, plan: plans.Plan, parts: list, meta: Meta, *, tokenizer=None, token_bytes=None, held=None,
    plan_file: str = "", document_bytes: int = 0,
  ):  # fmt: skip
    self.plan, self.sources, self.meta, self.tokenizer = plan, parts, meta, tokenizer
    self._token_bytes, self._held, self._plan_file = token_bytes, held, plan_file
    self._document_bytes = document_bytes  # of data whose tokens stand for no bytes of their own

  def batch(self, step: int, ranges: Ranges | None = None) -> Batch:
    """Rows of a step's global batch: those of `ranges` [(start, stop), …] in that order; None: all.

    Returns: the arrays `sources.assemble` lists. Pure: the same arguments give the same bytes anywhere.
    """
    rows = self.plan.rows(0) if ranges is None else np.concatenate([np.arange(a, b) for a, b in ranges])
    taken = self.plan.take(step, rows)
    return sources.assemble(
      self.plan, self.sources, taken, pad=max(self.meta.specials["pad"], 0), axes=self.meta.axes
    )

  def loader(self, ranges: Ranges | None = None, *, threads: int = 1, prefetch: int = 8) -> Loader:
    """Batches read ahead by grain; see Loader."""
    return Loader(self, ranges, threads, prefetch)

  def heldout(self, batch_size: int | None = None) -> Data:
    """The held-out documents: fixed order, one pass, `.plan.steps` batches (the last may have empty rows).

    Raises DataError if the data have no held-out part.
    """
    if self._held is None:
      raise records.DataError(
        "no held-out documents: prepare the data with --heldout 0.01, or name a directory in data.heldout_path"
      )
    return self._held(batch_size or self.plan.batch_size)

  def bytes_of(self, batch: Batch) -> np.ndarray:
    """Bytes of source data (pixels of an image) that the predicted tokens of each document stand for, int64[b, D].

    Exact for byte and byte-level tokenizers; the size of the pieces' text for others. Specials, and tokens of
    another modality among text, count 0.
    """
    b, D = batch["occurrence"].shape
    if self._document_bytes:
      return self._document_bytes * (batch["doc"][:, None] == np.arange(D)[:, None]).any(-1).astype(np.int64)
    text = (batch["role"] == records.TEXT) & (batch["modality"] == 0) & (batch["doc"] >= 0)
    per_token = self._token_bytes[batch["tokens"]] * text
    cell = np.arange(b)[:, None] * D + np.maximum(batch["doc"], 0)
    out = np.bincount(cell.ravel(), weights=per_token.ravel().astype(np.float64), minlength=b * D)
    return out.astype(np.int64).reshape(b, D)

  @property
  def quarantine(self) -> list[dict]:
    """What could not be read so far: {source, shard, record, documents, tokens, reason}."""
    return [
      {"source": c.name, **entry}
      for c, s in zip(self.plan.components, self.sources)
      if isinstance(s, sources.RecordSource)
      for entry in s.data.quarantine.entries
    ]

  def save_plan(self) -> None:
    """Writes the plan artefact to the workdir, if there is one."""
    if self._plan_file:
      self.plan.save(self._plan_file)


class _Steps:
  """Random access by step, for grain."""

  def __init__(self, data: Data, ranges: Ranges | None):
    self._data, self._ranges = data, ranges

  def __len__(self):
    return self._data.plan.steps if self._data.plan.epochs else 1 << 40

  def __getitem__(self, step: int) -> Batch:
    return self._data.batch(int(step), self._ranges)


class Loader:
  """Iterators over the batches of this process.

  Args:
    ranges: rows of the global batch that this process holds (parallel.row_ranges); None: all.
    threads, prefetch: of grain; 0 threads reads in the caller's thread.
  """

  def __init__(self, data: Data, ranges: Ranges | None = None, threads: int = 1, prefetch: int = 8):
    import grain  # here: it imports jax where it finds it, and preparing or planning data need none of that

    self._steps = grain.MapDataset.source(_Steps(data, ranges))
    self._options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch if threads else 0)

  def at(self, step: int = 0) -> Iterator[Batch]:
    """Batches from `step` on. Starting anywhere costs the same."""
    return iter(self._steps[step:].to_iter_dataset(self._options))


# -------------------------------------------------------------------------------------------- config


@dataclasses.dataclass(frozen=True)
class _Planned:
  """Options that every kind of data shares.

  Fields:
    seq_len: N tokens a row. pack: several documents a row. documents: capacity D of a row, 0 chooses.
    piece_len: longest piece of a document, 0: seq_len. window: pieces packed together.
    budgets: {budget of Layout.cost: capacity}, by default what a row of one whole document costs.
    axes: position axes. seed: of the order; None takes the run's.
  """

  seq_len: int = 1024
  pack: bool = True
  documents: int = 0
  piece_len: int = 0
  window: int = 1 << 16
  budgets: dict = dataclasses.field(default_factory=dict)
  axes: int = 1
  seed: int | None = None

  def __post_init__(self):
    if self.seq_len < 2:
      raise ValueError("seq_len must be at least 2")
    if self.axes not in (1, 2, 3):
      raise ValueError("axes must be 1, 2 or 3")
    if self.window < 1 or self.documents < 0:
      raise ValueError("window must be positive, documents not negative")


@dataclasses.dataclass(frozen=True)
class Text(_Planned):
  """Prepared data sets (`genmodels prepare`): text, or ids of any modality.

  Fields:
    path: the directory, when there is one source.
    sources: (dict(path=…, name=…, weight=…, mode=…), …) for a mixture.
    stages: ((step, (weight of each source, …)), …): weights from a step on.
    unit: weights are shares of "tokens" or of "pieces".
    tokenizer: checked against the data; "" takes the one stored with them. specials: names of its specials.
    heldout_path: held-out data set; "" takes PATH/heldout of each source.
    corrupt: "quarantine" counts unreadable shards and records, "refuse" raises at the first.
    max_quarantined: share of tokens that may be lost. verify: hash every shard at the start.
  """

  path: str = ""
  sources: tuple = ()
  stages: tuple = ()
  unit: Literal["tokens", "pieces"] = "tokens"
  tokenizer: str = ""
  specials: dict = dataclasses.field(default_factory=dict)
  heldout_path: str = ""
  corrupt: Literal["quarantine", "refuse"] = "quarantine"
  max_quarantined: float = 0.01
  verify: bool = False

  def __post_init__(self):
    super().__post_init__()
    if bool(self.path) == bool(self.sources):
      raise ValueError("give either path (one data set) or sources (a mixture)")
    for i, s in enumerate(self.sources):
      if not isinstance(s, Mapping) or "path" not in s or set(s) - {"path", "name", "weight", "mode"}:
        raise ValueError(f"sources[{i}] is {s!r}: expected dict(path=…, name=…, weight=…, mode=…)")
    if 0 < sum("weight" in s for s in self.sources) < len(self.sources):
      raise ValueError("sources: give every one a weight, or none")

  def build(self, cost, batch_size, seed, workdir, steps) -> Data:
    entries = [{"path": self.path}] if self.path else [dict(s) for s in self.sources]
    pairs = [sources.directory_pair(e["path"]) for e in entries]
    tokenizer = self._tokenizer(pairs[0][0])
    wanted = tokenizer.hash if self.tokenizer else ""
    if tokenizer and not wanted and len(entries) > 1:
      wanted = tokenizer.hash  # all sources of a mixture speak the first one's language
    options = {"corrupt": self.corrupt, "max_quarantined": self.max_quarantined, "verify": self.verify}
    opener = functools.partial(sources.RecordSource, axes=self.axes, tokenizer=wanted, **options)
    paths = list(dict.fromkeys(train for train, _ in pairs))
    opened = {p: opener(p) for p in paths}
    parts = [opened[train] for train, _ in pairs]
    names = [e.get("name") or os.path.basename(os.path.normpath(e["path"])) for e in entries]
    index = {p: i for i, p in enumerate(paths)}
    components = [
      _component(n, s, mode=e.get("mode", 0), source=index[t])
      for n, s, e, (t, _) in zip(names, parts, entries, pairs)
    ]
    stages = [(s, tuple(w)) for s, w in self.stages] or None
    if stages is None and "weight" in entries[0]:
      stages = [(0, tuple(e["weight"] for e in entries))]
    plan = _plan(self, components, cost, batch_size, seed, stages=stages, unit=self.unit)
    head = parts[0].data.manifest
    table = tokenizer.token_bytes() if tokenizer else np.ones(head["vocab_size"], np.int64)
    specials = dict.fromkeys(tokenizers.SPECIALS, -1) | (tokenizer.specials if tokenizer else {})
    meta = Meta(
      max(s.data.manifest["vocab_size"] for s in parts), specials,
      min([v for v in specials.values() if v >= 0], default=head["vocab_size"]),
      self.seq_len, plan.documents, self.axes, tuple(dict.fromkeys(names)), max(s.data.manifest["features"]["classes"] for s in parts),
    )  # fmt: skip
    held_paths = [self.heldout_path] if self.heldout_path else [h for _, h in pairs if h]

    def heldout(size):
      held = [s for s in map(opener, dict.fromkeys(held_paths)) if len(s.lengths)]
      if not held:
        raise records.DataError(f"{held_paths}: the held-out part is empty; prepare with a larger --heldout")
      parts = [_component(s.path, s, source=i) for i, s in enumerate(held)]
      fixed = _plan(self, parts, cost, size, seed, shuffle=False, epochs=1)
      return Data(
        fixed, held, dataclasses.replace(meta, documents=fixed.documents), tokenizer=tokenizer, token_bytes=table
      )

    return _finish(
      Data(
        plan, parts, meta, tokenizer=tokenizer, token_bytes=table, held=heldout if held_paths else None,
        plan_file=os.path.join(workdir, PLAN_FILE) if workdir else "",
      ), steps,
    )  # fmt: skip

  def _tokenizer(self, path):
    if self.tokenizer:
      return tokenizers.load(self.tokenizer, self.specials or None)
    for folder in (path, os.path.dirname(os.path.normpath(path))):
      if os.path.isfile(os.path.join(folder, tokenizers.FILE)):
        return tokenizers.load(folder, self.specials or None)
    return None


@dataclasses.dataclass(frozen=True)
class Python(_Planned):
  """Text that every machine has: the Python standard library, prepared on first use.

  Fields:
    path: where the prepared data lie; "" is a directory in the workdir.
    tokenizer: "byte" or "bpe:N". heldout: share of files held out. limit: bytes of source to take, 0 all.
  """

  seq_len: int = 256
  path: str = ""
  tokenizer: str = "byte"
  heldout: float = 0.05
  limit: int = 0

  def __post_init__(self):
    super().__post_init__()
    if not 0 < self.heldout < 1:
      raise ValueError("heldout must lie between 0 and 1")

  def build(self, cost, batch_size, seed, workdir, steps) -> Data:
    if not self.path and not workdir:
      raise config.ConfigError("kind 'python' prepares its data on first use", key="path", fix="give a workdir, or path")
    name = f"python-{self.tokenizer.replace(':', '')}-{self.heldout:g}" + (f"-{self.limit}" if self.limit else "")
    path = self.path or os.path.join(workdir, "data", name)
    if not os.path.isdir(path):
      os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
      progress = prepare.Progress()
      docs = prepare.read_python(progress, self.limit)
      try:
        prepare.prepare(docs, path, tokenizer=self.tokenizer, heldout=self.heldout, progress=progress)
      except records.DataError:
        if not os.path.isdir(path):  # otherwise another process was faster
          raise
    shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(_Planned)}
    return Text(path=path, **shared).build(cost, batch_size, seed, workdir, steps)


@dataclasses.dataclass(frozen=True)
class Digits(_Planned):
  """scikit-learn's 8 × 8 digits in memory, one image a row (sources.digits).

  Fields:
    tokens: "raster" (64 grey levels), "none" (empty tokens for latents; `length` of them) or "caption".
    bos: BOS in front. length: tokens of a row for "none". heldout: share of images held out.
    seq_len: 0 takes the length of the documents.
  """

  seq_len: int = 0
  pack: bool = False
  tokens: Literal["raster", "none", "caption"] = "raster"
  bos: bool = True
  length: int = 85
  heldout: float = 0.1

  def __post_init__(self):
    if self.pack:
      raise ValueError("pack must be False: images are one a row")
    if not 0 < self.heldout < 1:
      raise ValueError("heldout must lie between 0 and 1")

  def build(self, cost, batch_size, seed, workdir, steps) -> Data:
    parts = sources.digits(
      self.tokens, bos=self.bos, length=self.length, axes=self.axes, heldout=self.heldout
    )
    L = parts["train"].tokens.shape[1]
    if self.seq_len and self.seq_len < L:
      raise config.ConfigError(f"an image is {L} tokens", key="seq_len", value=self.seq_len, fix=f"seq_len={L}, or 0")
    options = dataclasses.replace(self, seq_len=self.seq_len or L)
    caption = self.tokens == "caption"
    text = tokenizers.ByteTokenizer() if caption else None
    specials = text.specials if caption else sources.DIGIT_SPECIALS
    vocab, values = (text.vocab_size, 256) if caption else (sources.DIGIT_VOCAB, sources.DIGIT_LEVELS)
    table = text.token_bytes() if caption else (np.arange(vocab) < values).astype(np.int64)

    def make(split, size, **kw):
      plan = _plan(options, [_component(f"digits-{split}", parts[split])], cost, size, seed, **kw)
      meta = Meta(vocab, specials, values, options.seq_len, plan.documents, self.axes, ("digits",), 10)
      held = None if kw else lambda n: make("heldout", n, shuffle=False, epochs=1)
      file = os.path.join(workdir, PLAN_FILE) if workdir and not kw else ""
      return Data(plan, [parts[split]], meta, tokenizer=text, token_bytes=table, held=held, plan_file=file,
                  document_bytes=64 if self.tokens == "none" else 0)  # fmt: skip

    return _finish(make("train", batch_size), steps)


REGISTRY: dict[str, Any] = {"text": Text, "python": Python, "digits": Digits}


def build(
  section, cost: plans.Cost | None = None, *, batch_size: int, seed: int = 0, workdir: str = "", steps: int = 0,
  where: str = "data",
) -> Data:  # fmt: skip
  """The data of a config section.

  Args:
    section: `dict(kind="text" | "python" | "digits", …)`, or a built component of REGISTRY.
    cost: `Layout.cost` of the objective's layout: {"context": int[P], "text": int[P]}, mode → {budget: int[P]}.
    batch_size: rows of the global batch. seed: the run's.
    workdir: keeps the plan artefact (data_plan.json), checked when the run continues, and prepared data.
    steps: plan at least so far now (0: as the run goes).
  Raises: ConfigError for the section, DataError for what it finds on disk.
  """
  component = config.build_kind(REGISTRY, section, where)
  if workdir:
    os.makedirs(workdir, exist_ok=True)
  try:
    return component.build(cost, batch_size, seed if component.seed is None else component.seed, workdir, steps)
  except config.ConfigError as e:
    raise e.under(where) from None


def _component(name, part, *, mode=0, source=0) -> plans.Component:
  return plans.Component(name, part.lengths, part.context, part.prefix, part.digest, mode, source)


def _plan(options: _Planned, components, cost, batch_size, seed, **kw) -> plans.Plan:
  return plans.Plan(
    components, seq_len=options.seq_len, batch_size=batch_size, seed=seed, packed=options.pack,
    documents=options.documents, window=options.window, cost=cost, budgets=options.budgets,
    piece_len=options.piece_len, **kw,
  )  # fmt: skip


def _finish(data: Data, steps: int) -> Data:
  if data._plan_file and os.path.exists(data._plan_file):
    data.plan.load(data._plan_file)
  if steps:
    data.plan.extend(steps)
  data.save_plan()
  return data
