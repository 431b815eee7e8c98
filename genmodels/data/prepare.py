"""`genmodels prepare`: text, JSONL and Parquet to a data set that training reads.

  genmodels prepare corpus/ more.jsonl --out data/corpus --tokenizer bpe:8192

writes OUT/train and OUT/heldout (records.py) and OUT/tokenizer.json. The same input gives the same bytes:
files are taken in sorted order, and a document goes to the held-out set by the hash of its key, so equal
documents never sit on both sides. Bad input is named, counted and kept in the manifest; too much of it is
refused.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import gzip
import itertools
import json
import os
import shutil
import sys
import sysconfig
import time
import tokenize
from collections.abc import Iterable, Iterator

import numpy as np
import xxhash

from genmodels.data import chat as chats
from genmodels.data import records, tokenizers

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".tex", ".html")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".jsonl.gz", ".txt.gz", ".parquet")


@dataclasses.dataclass(frozen=True)
class Text:
  """A text to prepare.

  Fields:
    text: what is learned.
    prompt: given text before it (CONTEXT), for instruction data.
    key: decides train or held-out; "" takes the text.
    label: class, −1 none.
  """

  text: str
  prompt: str = ""
  key: str = ""
  label: int = -1


@dataclasses.dataclass
class Progress:
  """Bytes done of a known total, and what could not be read."""

  total: int = 0
  done: int = 0
  bad: list[str] = dataclasses.field(default_factory=list)
  reasons: collections.Counter = dataclasses.field(default_factory=collections.Counter)

  def refuse(self, where: str, error: Exception) -> None:
    """Names and counts an input that is left out; a document that is too long is no bad input."""
    reason = getattr(error, "reason", "unreadable")
    self.reasons[reason] += 1
    if reason != "too long":
      self.bad.append(f"{where}: {type(error).__name__} {error}")


class _Line:
  """Progress for people: one line redrawn on a terminal, a line every ten seconds elsewhere."""

  def __init__(self, progress: Progress, quiet: bool):
    self._progress, self._quiet = progress, quiet
    self._start = self._last = time.monotonic()
    self._tty = sys.stderr.isatty()

  def show(self, documents: int, tokens: int, last: bool = False):
    now = time.monotonic()
    if self._quiet or (now - self._last < (0.5 if self._tty else 10) and not last):
      return
    self._last = now
    spent, p = max(now - self._start, 1e-9), self._progress
    eta = ""
    if p.total and p.done and not last:
      left = spent * (p.total - p.done) / p.done
      eta = f" · {100 * p.done / p.total:.0f} % · ETA {left:.0f} s"
    line = (
      f"prepare: {documents:,} documents · {tokens:,} tokens · {tokens / spent / 1e6:.2f} M tokens/s{eta}"
    )
    print(
      f"\r{line}\x1b[K" if self._tty else line, end="" if self._tty and not last else "\n", file=sys.stderr
    )


def prepare(
  docs: Iterable[Text | str | records.Document | chats.Conversation], out: str, *, tokenizer="byte",
  heldout: float = 0.01, bos: bool = True, eos: bool = True, vocab_size: int | None = None, depth: int = 1,
  shard_bytes: int = 256 << 20, compression: str = "", bpe_bytes: int = 64 << 20, max_bad: float = 0.01,
  progress: Progress | None = None, quiet: bool = True, meta: dict | None = None,
  chat: chats.Encoder | None = None,
) -> dict:  # fmt: skip
  """Writes OUT/train and OUT/heldout; OUT appears complete or not at all.

  Args:
    docs: texts, or records.Document that carry ids already (images, audio: give `vocab_size`).
    tokenizer: "byte", a path, "bpe:N" (trained on the first `bpe_bytes` of the training texts) or an object.
    heldout: share of documents held out, by hash of the key.
    chat: how conversations become documents; `bos` and `eos` are not for them, their template says.
    bos, eos: put BOS (CONTEXT) in front of, EOS (TEXT) behind every text.
    max_bad: share of unreadable inputs that is tolerated.
  Returns: {"train": manifest, "heldout": manifest, "empty": n, "bad": [names], "reasons": {reason: n}}.
  Raises: records.DataError if OUT exists, an id is out of range, or too much input is bad.
  """
  if os.path.exists(out):
    raise records.DataError(f"{out}: exists already; delete it or choose another --out")
  progress = progress or Progress()
  docs = iter(docs)
  if isinstance(tokenizer, str):
    if tokenizer.startswith("bpe:"):
      tokenizer, docs = _train(docs, int(tokenizer[4:]), bpe_bytes, heldout)
    else:
      tokenizer = tokenizers.load(tokenizer)
  tmp = records.partial_name(out)
  shutil.rmtree(tmp, ignore_errors=True)
  os.makedirs(tmp)
  meta = dict(meta or {}, bos=bos, eos=eos, heldout=heldout)
  if chat is not None:
    chat.template.save(tmp)
  if vocab_size is None:
    tokenizer.save(tmp)
    name = dict(hash=tokenizer.hash, kind=tokenizer.kind, specials=tokenizer.specials)
  else:
    tokenizer, name = None, dict(hash="", kind="codes", specials={})
  line, empty, n, tokens = _Line(progress, quiet), 0, 0, 0
  options = dict(
    vocab_size=vocab_size or tokenizer.vocab_size, tokenizer=name, shard_bytes=shard_bytes,
    compression=compression, depth=depth,
  )  # fmt: skip
  try:
    writers = {s: records.Writer(os.path.join(tmp, s), meta=meta, **options) for s in ("train", "heldout")}
    while chunk := list(itertools.islice(docs, 256)):
      for key, doc in _documents(chunk, tokenizer, bos, eos, chat, progress):
        if not len(doc.tokens) or (not doc.source_bytes and tokenizer):
          empty += 1
          continue
        writers["heldout" if _held_out(key, heldout) else "train"].write(doc)
        n, tokens = n + 1, tokens + len(doc.tokens)
      line.show(n, tokens)
    if len(progress.bad) > max_bad * (n + len(progress.bad)):
      raise records.DataError(
        f"{len(progress.bad)} of {n + len(progress.bad)} inputs are unreadable, more than "
        f"max_bad={max_bad}; the "
        f"first: {'; '.join(progress.bad[:3])}. Repair or remove them, or raise --max-bad"
      )
    meta |= dict(empty=empty, bad=progress.bad, reasons=dict(progress.reasons))
    result = {split: writer.close() for split, writer in writers.items()}
    if not result["train"]["documents"]:
      raise records.DataError(f"{out}: no training documents ({empty} empty, {len(progress.bad)} unreadable)")
    _publish(tmp, out)
  except BaseException:
    shutil.rmtree(tmp, ignore_errors=True)
    raise
  line.show(n, tokens, last=True)
  return dict(result, empty=empty, bad=progress.bad, reasons=dict(progress.reasons))


def _publish(tmp, out):
  try:
    os.rename(tmp, out)
  except OSError:
    if not os.path.isdir(out):
      raise
    shutil.rmtree(tmp)  # Another process prepared the same data first: the same bytes.


def _held_out(key: bytes, share: float) -> bool:
  return xxhash.xxh3_64_intdigest(key) < int(share * 2**64)


def _key(doc) -> bytes:
  if isinstance(doc, records.Document):
    return records.encode(doc, np.dtype("<u4"))
  if isinstance(doc, chats.Conversation):
    return doc.text.encode("utf-8", "replace")
  return (doc.key or doc.prompt + doc.text).encode("utf-8", "replace")


def _documents(chunk, tokenizer, bos, eos, chat, progress) -> Iterator[tuple[bytes, records.Document]]:
  chunk = [Text(d) if isinstance(d, str) else d for d in chunk]
  texts = [s for d in chunk if isinstance(d, Text) for s in (d.prompt, d.text)]
  ids = iter(tokenizer.encode_batch(texts) if texts else ())
  for doc in chunk:
    if isinstance(doc, records.Document):
      yield _key(doc), doc
      continue
    if isinstance(doc, chats.Conversation):
      for made in chat.documents(doc, tokenizer):
        if isinstance(made, records.Document):
          yield _key(doc), made
        else:
          progress.refuse(doc.where, made)
      continue
    prompt, body = next(ids), next(ids)
    special = tokenizer.specials
    head = np.asarray([special["bos"]] if bos else [], np.int32)
    tail = np.asarray([special["eos"]] if eos else [], np.int32)
    yield _key(doc), records.Document(
      np.concatenate([head, prompt, body, tail]), context=len(head) + len(prompt), label=doc.label,
      source_bytes=len(doc.text.encode("utf-8", "replace")),
    )  # fmt: skip


def _train(docs, vocab_size, limit, heldout):
  """BPE from the first `limit` bytes of the training texts; returns it and the documents, unconsumed."""
  head, texts, size = [], [], 0
  for doc in docs:
    doc = Text(doc) if isinstance(doc, str) else doc
    head.append(doc)
    if not _held_out(_key(doc), heldout):
      texts.append(doc.text if isinstance(doc, chats.Conversation) else doc.prompt + doc.text)
      size += len(texts[-1])
    if size >= limit:
      break
  return tokenizers.train_bpe(texts, vocab_size), itertools.chain(head, docs)


# ------------------------------------------------------------------------------------------- readers


def list_files(inputs: Iterable[str]) -> list[str]:
  """Files of inputs in a fixed order: files as given, directories walked in sorted order.

  Raises DataError for an input that does not exist or a directory without any known suffix.
  """
  out = []
  for name in inputs:
    if os.path.isfile(name):
      out.append(name)
      continue
    if not os.path.isdir(name):
      raise records.DataError(f"{name}: no such file or directory")
    found = []
    for folder, dirs, files in os.walk(name):
      dirs.sort()
      found += [os.path.join(folder, f) for f in sorted(files) if f.endswith(SUFFIXES)]
    if not found:
      raise records.DataError(
        f"{name}: no file ends in one of {', '.join(SUFFIXES)}; name the files themselves"
      )
    out += found
  return out


def read_files(
  files: list[str], progress: Progress, *, text: str = "text", prompt: str = "", split: str = "file",
  messages: str = "",
) -> Iterator[Text | chats.Conversation]:  # fmt: skip
  """Texts of files. `text`, `prompt`: fields of JSONL and Parquet; `messages`: the field of conversations.
  `split`: a text file is one document ("file"), or one a line ("line") or paragraph ("paragraph")."""
  columns = [messages] if messages else [c for c in (text, prompt) if c]

  def take(fields, where):
    if messages:
      return chats.Conversation.of(fields, messages, where)
    return _from_fields(fields, text, prompt)

  progress.total += sum(map(os.path.getsize, files))
  for path in files:
    before = progress.done
    if path.endswith((".jsonl", ".jsonl.gz")):
      yield from _read_jsonl(path, progress, take)
    elif path.endswith(".parquet"):
      yield from _read_parquet(path, progress, columns, take)
    elif messages:
      raise records.DataError(f"{path}: conversations (--messages) are read from JSONL and Parquet")
    else:
      yield from _read_text(path, progress, split)
    progress.done = before + os.path.getsize(path)


def _read_text(path, progress, split):
  opener = gzip.open if path.endswith(".gz") else open
  try:
    with opener(path, "rb") as f:
      if split == "line":
        for i, raw in enumerate(f):
          progress.done += 0 if path.endswith(".gz") else len(raw)
          try:
            yield Text(raw.decode().rstrip("\n"))
          except UnicodeDecodeError as e:
            progress.bad.append(f"{path}:{i + 1}: {e}")
        return
      body = f.read().decode()
  except (OSError, EOFError, UnicodeDecodeError) as e:
    progress.bad.append(f"{path}: {e}")
    return
  if split == "paragraph":
    yield from (Text(p.strip("\n")) for p in body.split("\n\n"))
  else:
    yield Text(body)


def _read_jsonl(path, progress, take):
  opener = gzip.open if path.endswith(".gz") else open
  with opener(path, "rb") as f:
    try:
      for i, raw in enumerate(f):
        progress.done += 0 if path.endswith(".gz") else len(raw)
        if raw.strip():
          try:
            yield take(json.loads(raw), f"{path}:{i + 1}")
          except (ValueError, KeyError, TypeError, AttributeError) as e:
            progress.refuse(f"{path}:{i + 1}", e)
    except (OSError, EOFError) as e:
      progress.bad.append(f"{path}: {e}")


def _read_parquet(path, progress, columns, take):
  import pyarrow
  from pyarrow import parquet

  try:
    file = parquet.ParquetFile(path)
  except (OSError, pyarrow.ArrowInvalid) as e:
    progress.bad.append(f"{path}: {e}")
    return
  if missing := set(columns) - set(file.schema_arrow.names):
    raise records.DataError(f"{path}: no column {sorted(missing)}; it has {file.schema_arrow.names}")
  row, size = 0, os.path.getsize(path) / max(file.metadata.num_rows, 1)
  try:
    for batch in file.iter_batches(256, columns=columns):
      for fields in batch.to_pylist():
        row += 1
        progress.done += int(size)
        try:
          yield take(fields, f"{path}, row {row}")
        except (ValueError, KeyError, TypeError) as e:
          progress.refuse(f"{path}, row {row}", e)
  except (OSError, pyarrow.ArrowInvalid) as e:
    progress.bad.append(f"{path}, after row {row}: {e}")


def _from_fields(fields, text, prompt):
  body, given = fields[text], fields[prompt] if prompt else ""
  if not isinstance(body, str) or not isinstance(given, str):
    raise TypeError(f"field {text!r} is no string")
  return Text(body, given)


def read_python(progress: Progress | None = None, documents: int = 0) -> Iterator[Text]:
  """The Python standard library: sources and docstrings that every machine has, one document a file.

  Files in sorted order, tests and bundled packages left out; `documents` takes the first so many (0: all).
  """
  progress = progress or Progress()
  root = sysconfig.get_paths()["stdlib"]
  leave = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "_bundled",
    "lib-dynload",
  }
  taken = 0
  for folder, dirs, files in os.walk(root):
    dirs[:] = sorted(d for d in dirs if d not in leave and not d.startswith("config-"))
    for name in sorted(f for f in files if f.endswith(".py") and not f.startswith("_sysconfigdata")):
      path = os.path.join(folder, name)
      try:
        with tokenize.open(path) as f:
          body = f.read()
      except (OSError, SyntaxError, UnicodeDecodeError) as e:
        progress.bad.append(f"{path}: {e}")
        continue
      yield Text(body, key=os.path.relpath(path, root))
      taken += 1
      if taken == documents:
        return


# ---------------------------------------------------------------------------------------------- verb


def main(argv: list[str] | None = None) -> int:
  """The verb `genmodels prepare`."""
  p = argparse.ArgumentParser(prog="genmodels prepare", description=__doc__.splitlines()[0])
  p.add_argument(
    "inputs", nargs="*", help="files or directories; 'python' is the Python standard library, 'python-docs' "
    "questions about its functions with their documentation as answers",
  )  # fmt: skip
  p.add_argument("--out", help="directory to write")
  p.add_argument(
    "--tokenizer", default="byte", help="byte (default), a tokenizer.json, or bpe:N to train one"
  )
  p.add_argument("--heldout", type=float, default=0.01, help="share of documents held out, by hash")
  p.add_argument("--text", default="text", help="field of JSONL and Parquet that holds the text")
  p.add_argument("--prompt", default="", help="field that holds a given prompt (instruction data)")
  p.add_argument(
    "--split", choices=("file", "line", "paragraph"), default="file", help="documents of a text file"
  )
  _chat_arguments(p.add_argument_group("conversations"))
  p.add_argument("--no-bos", action="store_true")
  p.add_argument("--no-eos", action="store_true")
  p.add_argument("--shard-mb", type=int, default=256)
  p.add_argument("--compression", default="", help="e.g. zstd:3; default uncompressed")
  p.add_argument("--max-bad", type=float, default=0.01, help="share of unreadable inputs tolerated")
  p.add_argument("--verify", metavar="DIR", help="check every shard of a data set against its manifest")
  args = p.parse_args(argv)
  try:
    if args.verify:
      return _verify(args.verify)
    if not args.inputs or not args.out:
      p.error("give inputs and --out, or --verify DIR")
    progress = Progress()
    talks = bool(args.messages) or args.inputs == ["python-docs"]
    if args.inputs == ["python"]:
      docs = read_python(progress)
    elif args.inputs == ["python-docs"]:
      docs = chats.read_python_docs()
    else:
      docs = read_files(
        list_files(args.inputs), progress, text=args.text, prompt=args.prompt, split=args.split,
        messages=args.messages,
      )  # fmt: skip
    result = prepare(
      docs, args.out, tokenizer=args.tokenizer, heldout=args.heldout, bos=not args.no_bos, eos=not
      args.no_eos, shard_bytes=args.shard_mb << 20, compression=args.compression, max_bad=args.max_bad,
      progress=progress, quiet=False, chat=_encoder(args) if talks else None,
    )  # fmt: skip
  except (records.DataError, ValueError) as e:
    print(f"genmodels prepare: {e}", file=sys.stderr)
    return 1
  for split in ("train", "heldout"):
    m = result[split]
    print(
      f"{args.out}/{split}: {m['documents']:,} documents, {m['tokens']:,} tokens, {m['source_bytes']:,} "
      f"source "
      f"bytes in {len(m['shards'])} shards, vocabulary {m['vocab_size']}, xxh3 {m['xxh3']}"
    )
  for what, names in (("empty", result["empty"]), ("unreadable", len(result["bad"]))):
    if names:
      print(
        f"{names} {what} inputs left out" + (f": {'; '.join(result['bad'][:5])}" if what != "empty" else "")
      )
  if result["reasons"]:
    print("left out: " + ", ".join(f"{n} {reason}" for reason, n in sorted(result["reasons"].items())))
  return 0


def _chat_arguments(p):
  p.add_argument("--messages", metavar="FIELD", default="", help="field with the turns: [{role, content}, …]")
  p.add_argument(
    "--template", default="", help="chat template: a Jinja file, a folder, 'chatml' or 'plain'; default: the "
    "one beside the tokenizer",
  )  # fmt: skip
  p.add_argument(
    "--template-arg", action="append", default=[], metavar="K=JSON", help="variable of the template"
  )
  p.add_argument("--learn", choices=chats.LEARN, default="all", help="answers that are learnt")
  p.add_argument("--max-length", type=int, default=0, help="tokens of a document; 0: any")
  p.add_argument("--too-long", choices=chats.TOO_LONG, default="drop", help="leave it out, or cut its end")
  p.add_argument("--block", type=int, default=0, help="pad documents to whole blocks of this length; 0: not")
  p.add_argument("--pad", choices=chats.PADS, default="mask", help="with what: MASK, ignored, or EOS, learnt")
  p.add_argument("--anchor", choices=chats.ANCHORS, default="response", help="what blocks are counted from")


def _encoder(args) -> chats.Encoder:
  options = {}
  for item in args.template_arg:
    key, _, value = item.partition("=")
    try:
      options[key] = json.loads(value)
    except json.JSONDecodeError:
      options[key] = value
  template = chats.load(args.template, args.tokenizer, options)
  return chats.Encoder(
    template, args.learn, args.max_length, args.too_long, args.block, args.pad, args.anchor
  )  # fmt: skip


def _verify(path):
  parts = (
    [os.path.join(path, s) for s in ("train", "heldout")]
    if os.path.isdir(os.path.join(path, "train"))
    else [path]
  )
  bad = 0
  for part in parts:
    data = records.Dataset(part, max_quarantined=1.0, verify=True)
    for entry in data.quarantine.entries:
      print(
        f"{part}/{entry['shard']}: {entry['reason']} ({entry['documents']} documents, {entry['tokens']} "
        f"tokens)"
      )
    bad += len(data.quarantine.entries)
    print(f"{part}: {len(data.manifest['shards'])} shards, {len(data.quarantine.entries)} bad")
  return 1 if bad else 0
