"""The pipeline: config section → sources, plan, batches, and the grain iterator that reads them ahead.

A batch is a pure function of (plan, step, rows). Grain is given a source indexed by the step whose element is
this process's rows of that step: it adds threads, prefetch and seek, and never touches the order.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from genmodels import config
from genmodels.data import chat, prepare, records, sources, tokenizers
from genmodels.data import plan as plans

Batch = dict[str, np.ndarray]
Ranges = Sequence[tuple[int, int]]
PLAN_FILE = "data_plan.json"
SAVE_EVERY = 16  # windows; a resumed run packs at most so many again, half a second


@dataclasses.dataclass(frozen=True)
class Meta:
  """What a model must know about the tokens.

  Fields:
    vocab_size: ids are below it. specials: {"bos", "eos", "mask", "pad"} → id (−1: none).
    values: data are ids below it, specials the others (vocab_size where specials stand in between).
    seq_len: N. axes: A. sources: names by the batch's `source` index. classes: of side/label, 0 none.
  """

  vocab_size: int
  specials: Mapping[str, int]
  values: int
  seq_len: int
  axes: int = 1
  sources: tuple[str, ...] = ("data",)
  classes: int = 0


class Data:
  """A plan, the sources it orders, and the batches they make.

  Args:
    readers: one for each component of the plan.
    held: Data of the held-out documents for a batch size; None where there are none.
    plan_file: where the plan artefact lies, "" keeps none.
    folder: of prepared data, "" for others.
  Attributes: plan, readers, meta, folder, tokenizer (None where ids stand for no text).
  """

  def __init__(
    self, plan: plans.Plan, readers: list, meta: Meta, *, tokenizer=None, token_bytes=None,
    held: Callable[[int], Data] | None = None, plan_file: str = "", document_bytes: int = 0, folder: str = "",
  ):  # fmt: skip
    self.plan, self.readers, self.meta, self.tokenizer = plan, readers, meta, tokenizer
    self.folder = folder
    self._token_bytes, self._held, self._plan_file = token_bytes, held, plan_file
    self._document_bytes = document_bytes  # of data whose tokens stand for no bytes of their own
    self._lock = threading.Lock()
    if plan_file and os.path.exists(plan_file):
      plan.load(plan_file)
    else:
      self.save_plan()
    self._saved = plan.windows

  def batch(self, step: int, ranges: Ranges | None = None) -> Batch:
    """Rows of a step's global batch: those of `ranges` [(start, stop), …] in that order; None: all.

    Returns: the arrays `sources.assemble` lists. Pure: the same arguments give the same bytes anywhere.
    """
    rows = self.plan.rows(0) if ranges is None else np.concatenate([np.arange(a, b) for a, b in ranges])
    taken = self.plan.take(step, rows)
    if self.plan.windows >= self._saved + SAVE_EVERY:
      self.save_plan()
    pad = max(self.meta.specials["pad"], 0)
    return sources.assemble(self.plan, self.readers, taken, pad=pad, axes=self.meta.axes)

  def loader(self, ranges: Ranges | None = None, *, threads: int = 1, prefetch: int = 8) -> Loader:
    """Batches read ahead by grain: `.loader(ranges).at(step)`."""
    return Loader(self, ranges, threads=threads, prefetch=prefetch)

  def heldout(self, batch_size: int = 0) -> Data:
    """The held-out documents: fixed order, one pass, `.plan.steps` batches (the last may have empty rows).

    Raises DataError if the data have no held-out part.
    """
    if self._held is None:
      raise records.DataError(
        "no held-out documents: prepare the data with --heldout 0.01, or name a directory in "
        "data.heldout_path"
      )
    return self._held(batch_size or self.plan.batch_size)

  def bytes_of(self, batch: Batch) -> np.ndarray:
    """Bytes of source data (pixels of an image) behind the predicted tokens of each document, int64[b, D].

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
    """What could not be read so far: {path, shard, record, documents, tokens, reason}."""
    files = {id(r): r for r in self.readers if isinstance(r, sources.RecordSource)}
    return [{"path": r.path, **entry} for r in files.values() for entry in r.data.quarantine.entries]

  def save_plan(self, steps: int = 0) -> None:
    """Writes the plan artefact to the workdir, reaching at least `steps`; `batch` does it as it grows."""
    self.plan.extend(steps)
    if self._plan_file:
      with self._lock:
        self._saved = self.plan.windows
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

  def __init__(self, data: Data, ranges: Ranges | None = None, *, threads: int = 1, prefetch: int = 8):
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
    seq_len: N tokens a row. pack: several documents a row. capacity: D, documents a row may hold, 0 chooses.
    piece_len: longest piece of a document, 0: seq_len. window: pieces packed together.
    budgets: {budget of Layout.cost: capacity}, by default what a row of one whole document costs.
    axes: position axes. seed: of the order; None takes the run's.
  """

  seq_len: int = 1024
  pack: bool = True
  capacity: int = 0
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
    if self.window < 1 or self.capacity < 0:
      raise ValueError("window must be positive, capacity not negative")


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

  def _entries(self):
    return [{"path": self.path}] if self.path else [dict(s) for s in self.sources]

  def find_tokenizer(self, workdir: str):
    return self._tokenizer(sources.directory_pair(self._entries()[0]["path"])[0])

  def facts(self, workdir: str) -> Meta:
    path, _ = sources.directory_pair(self._entries()[0]["path"])
    return _facts(self, self._tokenizer(path), records.read_manifest(path)["vocab_size"])

  def build(self, cost, batch_size, seed, workdir) -> Data:
    entries = self._entries()
    pairs = [sources.directory_pair(e["path"]) for e in entries]
    tokenizer = self._tokenizer(pairs[0][0])
    # All sources of a mixture speak the first one's language.
    wanted = tokenizer.hash if tokenizer and (self.tokenizer or len(entries) > 1) else ""
    options = {"corrupt": self.corrupt, "max_quarantined": self.max_quarantined, "verify": self.verify}
    opener = functools.partial(sources.RecordSource, axes=self.axes, tokenizer=wanted, **options)
    opened = {p: opener(p) for p in dict.fromkeys(train for train, _ in pairs)}
    readers = [opened[train] for train, _ in pairs]
    for path, r in opened.items():
      longest, room = int(r.lengths.max(initial=0)), self.piece_len or self.seq_len
      if r.data.manifest["meta"].get("whole") and longest > room:
        raise config.ConfigError(
          f"documents of {path} cannot be cut, and have up to {longest} tokens", key="seq_len", value=room,
          fix=f"{longest} or more, or collect shorter ones",
        )  # fmt: skip
    index, names = {}, []
    for e in entries:
      if e["path"] not in index:
        index[e["path"]] = len(names)
        names.append(e.get("name") or os.path.basename(os.path.normpath(e["path"])))
    components = [
      _component(names[index[e["path"]]], r, mode=e.get("mode", 0), source=index[e["path"]])
      for r, e in zip(readers, entries)
    ]
    stages = [(s, tuple(w)) for s, w in self.stages] or None
    if stages is None and "weight" in entries[0]:
      stages = [(0, tuple(e["weight"] for e in entries))]
    vocab = max(r.data.manifest["vocab_size"] for r in readers)
    facts = dataclasses.replace(
      _facts(self, tokenizer, vocab),
      sources=tuple(names),
      classes=max(r.data.manifest["features"]["classes"] for r in readers),
    )
    table = tokenizer.token_bytes() if tokenizer else np.ones(vocab, np.int64)
    shared = {"tokenizer": tokenizer, "token_bytes": table}
    folder = os.path.dirname(os.path.normpath(pairs[0][0]))
    held_paths = [self.heldout_path] if self.heldout_path else [h for _, h in pairs if h]

    def heldout(size):
      held = [s for s in map(opener, dict.fromkeys(held_paths)) if len(s.lengths)]
      if not held:
        raise records.DataError(f"{held_paths}: the held-out part is empty; prepare with a larger --heldout")
      parts = [_component(r.path, r, source=i) for i, r in enumerate(held)]
      plan = _plan(self, parts, cost, size, seed, shuffle=False, epochs=1)
      return Data(plan, held, dataclasses.replace(facts, sources=tuple(r.path for r in held)), **shared)

    return Data(
      _plan(self, components, cost, batch_size, seed, stages=stages, unit=self.unit), readers, facts,
      held=heldout if held_paths else None, plan_file=_plan_file(workdir), folder=folder, **shared,
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
    content: "sources", or "documentation": questions about its functions, answered by their documentation,
      which become documents as `chat` says (fields of chat.Encoder).
    path: where the prepared data lie; "" is a directory in the workdir.
    tokenizer: "byte", "bpe:N", or a folder with a tokenizer.json. heldout: share of files held out.
    documents: files to take, 0 all.
  """

  seq_len: int = 256
  path: str = ""
  tokenizer: str = "byte"
  heldout: float = 0.05
  documents: int = 0
  content: Literal["sources", "documentation"] = "sources"
  chat: dict = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    super().__post_init__()
    if not 0 < self.heldout < 1:
      raise ValueError("heldout must lie between 0 and 1")
    known = re.fullmatch(r"byte|bpe:\d+", self.tokenizer)
    if not known and not os.path.isfile(os.path.join(self.tokenizer, tokenizers.FILE)):
      raise ValueError("tokenizer must be 'byte', 'bpe:N', or a folder with a tokenizer.json")

  def find_tokenizer(self, workdir: str):
    return (
      tokenizers.ByteTokenizer() if self.tokenizer == "byte" else self._prepared(workdir).find_tokenizer("")
    )

  def facts(self, workdir: str) -> Meta:
    if self.tokenizer == "byte":
      return _facts(self, tokenizers.ByteTokenizer())
    return self._prepared(workdir).facts(workdir)

  def build(self, cost, batch_size, seed, workdir) -> Data:
    return self._prepared(workdir).build(cost, batch_size, seed, workdir)

  def _prepared(self, workdir) -> Text:
    if not self.path and not workdir:
      raise config.ConfigError(
        "kind 'python' prepares its data on first use",
        key="path",
        fix="give a workdir, or a path to keep them in",
      )
    tokenizer = self.tokenizer.replace(":", "")
    if os.path.isdir(self.tokenizer):
      tokenizer = (
        f"{os.path.basename(os.path.normpath(self.tokenizer))}-{tokenizers.load(self.tokenizer).hash}"
      )
    talks = self.content == "documentation"
    kind = "python"
    if talks:
      options = {"max_length": self.seq_len} | self.chat
      kind = f"python-docs-{records.json_digest(options)[:8]}"
    name = f"{kind}-{tokenizer}-{self.heldout:g}-{self.documents or 'all'}"
    path = self.path or os.path.join(workdir, "data", name)
    if not os.path.isdir(path):
      os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
      progress = prepare.Progress()
      docs = chat.read_python_docs(self.documents) if talks else prepare.read_python(progress, self.documents)
      encoder = chat.Encoder(chat.load("", self.tokenizer), **options) if talks else None
      shared = {"heldout": self.heldout, "progress": progress, "chat": encoder}
      try:
        prepare.prepare(docs, path, tokenizer=self.tokenizer, **shared)
      except records.DataError:
        if not os.path.isdir(path):  # otherwise another process was faster
          raise
    return Text(path=path, **{f.name: getattr(self, f.name) for f in dataclasses.fields(_Planned)})


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

  def facts(self, workdir: str) -> Meta:
    return self._shape(self._parts())[1]

  def _parts(self):
    return sources.digits(self.tokens, bos=self.bos, length=self.length, axes=self.axes, heldout=self.heldout)

  def _shape(self, parts):
    L = parts["train"].tokens.shape[1]
    if self.seq_len and self.seq_len < L:
      raise config.ConfigError(f"an image is {L} tokens", key="seq_len", value=self.seq_len, fix=f"{L}, or 0")
    options = dataclasses.replace(self, seq_len=self.seq_len or L)
    caption = self.tokens == "caption"
    facts = _facts(options, tokenizers.ByteTokenizer() if caption else None, sources.DIGIT_VOCAB)
    if not caption:
      facts = dataclasses.replace(facts, specials=sources.DIGIT_SPECIALS, values=sources.DIGIT_LEVELS)
    return options, dataclasses.replace(facts, sources=("digits",), classes=10)

  def build(self, cost, batch_size, seed, workdir) -> Data:
    parts = self._parts()
    options, facts = self._shape(parts)
    text = tokenizers.ByteTokenizer() if self.tokens == "caption" else None
    table = text.token_bytes() if text else (np.arange(facts.vocab_size) < facts.values).astype(np.int64)

    def make(split, size, file="", held=None, **kw):
      plan = _plan(options, [_component("digits", parts[split])], cost, size, seed, **kw)
      whole = 64 if self.tokens == "none" else 0
      shared = {"tokenizer": text, "token_bytes": table, "document_bytes": whole}
      return Data(plan, [parts[split]], facts, held=held, plan_file=file, **shared)

    heldout = lambda size: make("heldout", size, shuffle=False, epochs=1)
    return make("train", batch_size, _plan_file(workdir), heldout)


@dataclasses.dataclass(frozen=True)
class Tokenizer(_Planned):
  """A tokenizer and no documents: what an imported checkpoint brings. Texts can be evaluated and prompts be
  continued; there is nothing to train on.

  Fields:
    path: folder of the tokenizer.json; "" is the workdir. vocab: rows of the model's table; specials whose
      ids lie beyond it do not exist for the model. specials: names of its specials.
    mask: id of the mask token where it has no name of its own, −1: by name.
  """

  path: str = ""
  vocab: int = 0
  specials: dict = dataclasses.field(default_factory=dict)
  mask: int = -1

  def facts(self, workdir: str) -> Meta:
    return self._open(workdir)[0]

  def build(self, cost, batch_size, seed, workdir) -> Data:
    return _Texts(*self._open(workdir))

  def _open(self, workdir):
    path = os.path.join(self.path or workdir, tokenizers.FILE)
    if not os.path.isfile(path):  # ids can still be fed and sampled
      return _facts(self, None, self.vocab), None
    tokenizer = tokenizers.load(path, self.specials or None)
    facts = _facts(self, tokenizer)
    vocab = self.vocab or facts.vocab_size
    special = {k: i if i < vocab else -1 for k, i in facts.specials.items()}
    special["mask"] = self.mask if self.mask >= 0 else special["mask"]
    # BOS stands in front of a text where the published tokenizer puts it there.
    opening = tokenizer.encode_published("")[:1]
    special["bos"] = int(opening[0]) if len(opening) and opening[0] != special["eos"] else -1
    return dataclasses.replace(
      facts, vocab_size=vocab, values=min(facts.values, vocab), specials=special
    ), tokenizer


class _Texts(Data):
  """Data without documents."""

  def __init__(self, facts: Meta, tokenizer):
    table = np.zeros(facts.vocab_size, np.int64)
    if tokenizer is not None:
      known = tokenizer.token_bytes()[: facts.vocab_size]
      table[: len(known)] = known
    self.meta, self.tokenizer, self.readers = facts, tokenizer, []
    self._token_bytes, self._document_bytes = table, 0

  @property
  def plan(self):
    raise records.DataError(
      "these data are a tokenizer without documents (an imported checkpoint). To train or to evaluate a "
      "held-out set, prepare documents (genmodels prepare … --tokenizer THIS_FOLDER) and set data.path; to "
      "evaluate a text, give --text FILE"
    )

  def heldout(self, batch_size: int = 0) -> Data:
    return self


REGISTRY: dict[str, Any] = {"text": Text, "python": Python, "digits": Digits, "tokenizer": Tokenizer}


def meta(section, *, workdir: str = "", where: str = "data") -> Meta:
  """Facts that the other sections need, without opening the shards (of a mixture: the first source's).

  Raises: ConfigError, or DataError if prepared data are missing.
  """
  return _built(section, where, lambda c: c.facts(workdir or ""))


def tokenizer(section, *, workdir: str = "", where: str = "data"):
  """The tokenizer of a section without opening the shards; None where ids stand for no text."""
  find = lambda c: c.find_tokenizer(workdir or "") if hasattr(c, "find_tokenizer") else None
  return _built(section, where, find)


def build(
  section, cost: plans.Cost | None = None, *, batch_size: int, seed: int = 0, workdir: str | None = "",
  where: str = "data",
) -> Data:  # fmt: skip
  """The data of a config section.

  Args:
    section: `dict(kind="text" | "python" | "digits" | "tokenizer", …)`, or a built component of REGISTRY.
    cost: `Layout.cost` of the objective's layout: {"context": int[P], "text": int[P], "runs": int[P]}, mode →
      {budget: int[P]}.
    batch_size: rows of the global batch. seed: the run's.
    workdir: keeps the plan artefact (data_plan.json), checked when the run continues, and prepared data.
  Raises: ConfigError for the section, DataError for what it finds on disk.
  """
  workdir = str(workdir or "")
  if workdir:
    os.makedirs(workdir, exist_ok=True)
  pick = lambda c: c.build(cost, batch_size, seed if c.seed is None else c.seed, workdir)
  return _built(section, where, pick)


def _built(section, where, use):
  component = config.build_kind(REGISTRY, section, where)
  try:
    return use(component)
  except config.ConfigError as e:
    raise e.under(where) from None


def _facts(options: _Planned, tokenizer, vocab: int = 0) -> Meta:
  specials = dict.fromkeys(tokenizers.SPECIALS, -1) | (tokenizer.specials if tokenizer else {})
  vocab = max(vocab, tokenizer.vocab_size if tokenizer else 0)
  first = min((v for v in specials.values() if v >= 0), default=vocab)
  values = first if first >= vocab - len(tokenizers.SPECIALS) else vocab
  return Meta(vocab, specials, values, options.seq_len, options.axes)


def _plan_file(workdir) -> str:
  return os.path.join(workdir, PLAN_FILE) if workdir else ""


def _component(name, part, *, mode=0, source=0) -> plans.Component:
  return plans.Component(name, part.lengths, part.context, part.prefix, part.runs, part.digest, mode, source)


def _plan(options: _Planned, components, cost, batch_size, seed, **kw) -> plans.Plan:
  return plans.Plan(
    components, seq_len=options.seq_len, batch_size=batch_size, seed=seed, packed=options.pack,
    documents=options.capacity, window=options.window, cost=cost, budgets=options.budgets,
    piece_len=options.piece_len, **kw,
  )  # fmt: skip
