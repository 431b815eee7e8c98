"""`genmodels collect`: a model's own greedy texts, with the Jacobi trajectories that lead to them.

  genmodels collect runs/ar --out data/jacobi --span 16

Prompts are what the documents of a data set give (their context), or, of documents that give nothing, the
first --prompt tokens of every piece of a row's length; default: the run's own training set. Each is continued
greedily, span by span (sampling/jacobi.py). OUT/train and OUT/heldout are data sets as `genmodels prepare`
writes them: a document is a prompt (CONTEXT) and its continuation, and each position has 1 + span codes: the
token, then the distinct states that it went through, in order, and the token again where there were fewer.

The same command again goes on where it was interrupted: finished parts lie in OUT.parts-<digest of what was
asked>, and go when OUT is complete. OUT appears complete or not at all. Processes of one run share its disk.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator

import jax
import numpy as np
import xxhash

from genmodels import arguments
from genmodels import state as states
from genmodels.checkpoint import verify
from genmodels.config import ConfigError
from genmodels.data import prepare, records, sources
from genmodels.parallel import rules
from genmodels.sampling import jacobi
from genmodels.sampling import run as runs
from genmodels.sampling.state import prompt_row

COUNTS = (
  "prompts", "too_long", "unsettled", "empty", "cut", "documents", "spans", "forwards", "tokens", "differ",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
  """What is asked for.

  Fields:
    span: n. length: tokens of a row, prompt included. new: tokens to generate at most, 0: what fits.
    prompt: tokens of a prompt where documents give none.
    most: prompts at most, 0: all.
    repeats: a text is cut before the span in which one token stands so often in a row (10 in the code of
      CLLM's authors), 0: never.
    seed: of the guesses. batch: rows of a call. part: calls of a part.
  """

  span: int = 16
  length: int = 0
  new: int = 0
  prompt: int = 16
  most: int = 0
  repeats: int = 10
  seed: int = 0
  batch: int = 32
  part: int = 32

  def __post_init__(self):
    if self.span < 2 or self.prompt < 1 or self.batch < 1 or self.part < 1:
      raise ValueError("--span is at least 2, --prompt, --batch and --part are at least 1")
    if min(self.length, self.new, self.most, self.repeats) < 0 or self.repeats == 1:
      raise ValueError("--length, --new and --most are at least 0, --repeats is 0 or at least 2")


def prompts(data: records.Dataset, options: Options, bos: int) -> Iterator[np.ndarray | None]:
  """Prompts of a data set's documents, in order; None for one that leaves no room for a span.

  Args:
    data: of depth 1. bos: id that a document may begin with, which alone is no prompt (−1: none).
  """
  for lo in range(0, len(data), 256):
    for doc in data.read(np.arange(lo, min(lo + 256, len(data)))):
      if doc is None:
        continue
      asked = records.document_roles(len(doc.tokens), doc.context, doc.spans) != records.CONTEXT
      given = int(np.argmax(asked)) if asked.any() else len(asked)
      own = given > int(len(doc.tokens) > 0 and int(doc.tokens[0]) == bos)
      starts = (0,) if own else range(0, len(doc.tokens), options.length)
      for start in starts:
        prompt = doc.tokens[start : start + (given if own else options.prompt)].astype(np.int32)
        if not own and len(prompt) < options.prompt:
          continue
        yield prompt if len(prompt) + options.span <= options.length else None


def distinct(states: np.ndarray, tokens: np.ndarray) -> np.ndarray:
  """The distinct states of a span before its fixed point, in order: int32[k, m] of states int32[n, m].

  Args:
    states: rows of −1 where there was none. tokens: int32[m], the fixed point.
  """
  kept, seen = [], {tokens.tobytes()}
  for state in states:
    if (state >= 0).all() and state.tobytes() not in seen:
      seen.add(state.tobytes())
      kept.append(state)
  return np.asarray(kept, np.int32).reshape(-1, len(tokens))


def document(
  tokens: np.ndarray, states: np.ndarray, given: int, span: int, repeats: int, sizes: np.ndarray
) -> tuple[records.Document | None, bool]:
  """The record of a row, None where nothing is left of it; and whether it was cut for its repeats.

  Args:
    tokens: int32[m], the prompt's `given` and its continuation. states: int32[m, span], −1 where none.
    sizes: bytes of each id.
  """
  end, whole = len(tokens), len(tokens)
  if repeats:
    run = 1
    for i in range(given + 1, len(tokens)):
      run = run + 1 if tokens[i] == tokens[i - 1] else 1
      if run == repeats:
        end = given + (i - given) // span * span
        break
  if end <= given:
    return None, True
  codes = np.repeat(tokens[:end, None], 1 + span, 1)
  for lo in range(given, end, span):
    part = slice(lo, min(lo + span, end))
    found = distinct(states[part].T, tokens[part])
    codes[part, 1 : 1 + len(found)] = found.T
  size = max(int(sizes[tokens[given:end]].sum()), 1)
  return records.Document(codes, context=given, source_bytes=size), end < whole


class Collector:
  """Runs a model over prompts.

  Args:
    run: sampling.run.Run of a model with a next-token term. options: with `length` filled in.
  """

  def __init__(self, run, options: Options):
    self.run, self.options = run, options
    section = {"temperature": 0.0, "length": options.length}
    self.iteration = jacobi.build(runs.sampler_of(run.parts, run.step, section), options.span)
    self.sizes = run.parts.data.tokenizer.token_bytes()
    # One width for the first call of all batches: one program.
    self.prefill = 1 << max(options.length - options.span - 1, 1).bit_length()

  def batch(self, batch: list[np.ndarray], counts: collections.Counter) -> list[records.Document]:
    """Documents of up to `options.batch` prompts; counts what happened."""
    o, data = self.options, self.run.parts.data.meta
    filled = batch + batch[:1] * (o.batch - len(batch))
    # Equal prompts draw equal guesses, so that equal documents cannot lie on both sides of the split.
    ids = [divmod(xxhash.xxh3_64_intdigest(p.astype("<u4").tobytes()), 1 << 32) for p in filled]
    row = prompt_row(
      filled, o.length, o.new or o.length, example_ids=np.asarray(ids, np.uint32),
      pad=max(data.specials["pad"], 0), axes=data.axes,
    )  # fmt: skip
    with rules.use_mesh(self.run.mesh):
      key = jax.random.key(o.seed)
      got = jax.device_get(self.iteration(self.run.trees["model"], row, key, self.prefill))
    out = []
    for i, prompt in enumerate(batch):
      given, end = len(prompt), int(got.lengths[i])
      counts["prompts"] += 1
      if not got.done[i]:
        counts["unsettled"] += 1
        continue
      counts["tokens"] += end - given
      counts["differ"] += end - given - int(got.greedy[i, given:end].sum())
      counts["spans"] += -(-(end - given) // o.span)
      counts["forwards"] += int(got.calls["verify"][i])
      doc, cut = document(got.tokens[i, :end], got.states[i, :end], given, o.span, o.repeats, self.sizes)
      counts["cut"] += cut
      if doc is None:
        counts["empty"] += 1
        continue
      counts["documents"] += 1
      out.append(doc)
    return out


def collect(
  run, data: records.Dataset, out: str, options: Options, *, heldout: float = 0.05, tolerance: float = 0.01,
  quiet: bool = True,
) -> dict:  # fmt: skip
  """Writes OUT/train and OUT/heldout.

  Args:
    run: sampling.run.Run. data: documents of the run's tokenizer.
    heldout: share of documents held out, by their hash.
    tolerance: share of generated tokens that plain greedy decoding may see otherwise (rounding of ties).
  Returns: {"train": manifest, "heldout": manifest, COUNTS…, "forwards_per_span", "tokens_per_forward"}.
  Raises: records.DataError if OUT exists, nothing is left, or more tokens differ. ConfigError for data that
    do not fit the run.
  """
  tokenizer = run.parts.data.tokenizer
  if tokenizer is None:
    raise ConfigError("the run's data have no tokenizer", key="data", fix="a run on text")
  if data.depth != 1 or data.manifest["tokenizer"]["hash"] not in ("", tokenizer.hash):
    raise ConfigError(
      f"the prompts' ids are of tokenizer {data.manifest['tokenizer']['hash']!r} with {data.depth} codes a "
      f"position, the run's of {tokenizer.hash!r}", key="data", value=data.path,
      fix="--data=<documents prepared with --tokenizer RUN>",
    )  # fmt: skip
  if os.path.exists(out):
    raise records.DataError(f"{out}: exists already; delete it or choose another --out")
  options = dataclasses.replace(options, length=options.length or run.parts.data.meta.seq_len)
  if options.prompt + options.span > options.length:
    raise ConfigError(
      f"a row of {options.length} tokens has no room for a prompt of {options.prompt} and a span of "
      f"{options.span}", key="--length", value=options.length, fix=f"{options.prompt + options.span} or more",
    )  # fmt: skip
  asked = {
    "options": dataclasses.asdict(options), "data": data.digest, "step": run.step,
    "tokenizer": tokenizer.hash, "model": _digest(run),
  }  # fmt: skip
  lead = jax.process_index() == 0
  folder = f"{out}.parts-{records.json_digest(asked)[:12]}"
  counts = _parts(run, data, folder, options, lead, quiet)
  share = counts["differ"] / max(counts["tokens"], 1)
  if share > tolerance:
    raise records.DataError(
      f"{out}: plain greedy decoding gives {counts['differ']} of {counts['tokens']} tokens otherwise, more "
      f"than ties explain (--tolerance {tolerance:g}); the parts stay in {folder}"
    )
  found = {name: counts[name] for name in COUNTS}
  found["forwards_per_span"] = counts["forwards"] / max(counts["spans"], 1)
  found["tokens_per_forward"] = counts["tokens"] / max(counts["forwards"], 1)
  if not lead:
    return found
  meta = {"whole": True, "trajectories": {**asked, **found}}
  made = prepare.prepare(
    _stored(folder), out, tokenizer=tokenizer, depth=1 + options.span, heldout=heldout, meta=meta,
    max_bad=0.0, quiet=quiet,
  )  # fmt: skip
  shutil.rmtree(folder)
  return {"train": made["train"], "heldout": made["heldout"], **found}


def _digest(run) -> str:
  """Digest of a run's parameters, whatever folder they lie in."""
  found = verify.digest(states.param_paths(run.trees["model"]))
  return records.json_digest({name: list(map(int, words)) for name, words in found.items()})


def _parts(run, data, folder: str, options: Options, lead: bool, quiet: bool) -> collections.Counter:
  """Decodes what is missing in `folder`; the counts of all parts."""
  collector, counts, start = None, collections.Counter(), time.monotonic()
  bos = run.parts.data.meta.specials["bos"]
  asked = itertools.islice(prompts(data, options, bos), options.most or None)
  total, decoded = options.most or int(np.ceil(data.lengths / options.length).sum()), 0
  for number in itertools.count():
    chunk = list(itertools.islice(asked, options.batch * options.part))
    if not chunk:
      break
    path = os.path.join(folder, f"part-{number:05d}")
    if os.path.isdir(path):
      counts.update(records.read_manifest(path)["meta"]["counts"])
      continue
    collector = collector or Collector(run, options)
    mine = collections.Counter({"too_long": sum(p is None for p in chunk)})
    usable, docs = [p for p in chunk if p is not None], []
    for lo in range(0, len(usable), options.batch):
      docs += collector.batch(usable[lo : lo + options.batch], mine)
      decoded += min(options.batch, len(usable) - lo)
      if not quiet and lead:
        _show(counts + mine, total, decoded, time.monotonic() - start)
    counts.update(mine)
    if lead:
      os.makedirs(folder, exist_ok=True)
      vocab = run.parts.data.tokenizer.vocab_size
      with records.Writer(
        path, vocab_size=vocab, depth=1 + options.span, meta={"counts": {n: mine[n] for n in COUNTS}}
      ) as writer:
        for doc in docs:
          writer.write(doc)
  if not quiet and lead:
    _show(counts, total, decoded, time.monotonic() - start, last=True)
  return counts


def _show(counts, total: int, decoded: int, seconds: float, last: bool = False) -> None:
  tty = sys.stderr.isatty()
  left = (
    "" if last or not decoded else f" · ETA {max(total - counts['prompts'], 0) * seconds / decoded:.0f} s"
  )
  line = (
    f"collect: {counts['prompts']:,} of {total:,} prompts · {counts['tokens']:,} tokens · "
    f"{counts['forwards'] / max(counts['spans'], 1):.2f} forwards a span{left}"
  )
  print(f"\r{line}\x1b[K" if tty else line, end="" if tty and not last else "\n", file=sys.stderr, flush=True)


def _stored(folder: str) -> Iterator[records.Document]:
  for name in sorted(os.listdir(folder)):
    part = records.Dataset(os.path.join(folder, name), corrupt="refuse")
    for lo in range(0, len(part), 256):
      yield from part.read(np.arange(lo, min(lo + 256, len(part))))


def _training_set(run) -> records.Dataset:
  """The first data set that a run was trained on."""
  readers = getattr(run.parts.data, "readers", [])
  found = next((r.data for r in readers if hasattr(r, "data")), None)
  if found is None:
    raise ConfigError("the run brings no documents for prompts", key="data", fix="--data=<prepared data set>")
  return found


def main(argv: list[str] | None = None) -> int:
  """The verb `genmodels collect`."""
  default = Options()
  p = argparse.ArgumentParser(
    prog="genmodels collect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  arguments.add_workdir(p)
  p.add_argument("--step", type=int, help="checkpoint to take (default: the newest that verifies)")
  p.add_argument("--out", required=True, help="directory to write")
  p.add_argument("--data", default="", help="data set with the prompts (default: the run's training set)")
  p.add_argument("--span", type=int, default=default.span, help="tokens that are iterated together")
  p.add_argument(
    "--length", type=int, default=0, help="tokens of a row, prompt included (default: as trained)"
  )
  p.add_argument("--new", type=int, default=0, help="tokens to generate at most (default: what fits)")
  p.add_argument("--prompt", type=int, default=default.prompt, help="tokens of a prompt where none is given")
  p.add_argument("--most", type=int, default=0, help="prompts at most (default: all)")
  p.add_argument(
    "--repeats",
    type=int,
    default=default.repeats,
    help="cut a text where one token repeats so often; 0: never",
  )
  p.add_argument("--heldout", type=float, default=0.05, help="share of documents held out, by hash")
  p.add_argument("--tolerance", type=float, default=0.01, help="share of tokens that ties may change")
  p.add_argument("--batch-size", type=int, default=default.batch, help="rows of a call")
  p.add_argument("--part", type=int, default=default.part, help="calls between savings")
  p.add_argument("--seed", type=int, default=0, help="of the first guesses")
  p.add_argument("overrides", nargs="*", help="key.path=value on the stored config")
  args = arguments.parse(p, argv)
  options = Options(
    args.span,
    args.length,
    args.new,
    args.prompt,
    args.most,
    args.repeats,
    args.seed,
    args.batch_size,
    args.part,
  )

  run = runs.load_run(args.workdir, args.step, args.overrides)
  data = records.Dataset(sources.directory_pair(args.data)[0]) if args.data else _training_set(run)
  made = collect(
    run, data, args.out, options, heldout=args.heldout, tolerance=args.tolerance, quiet=False
  )  # fmt: skip
  if jax.process_index() == 0:
    json.dump({k: v for k, v in made.items() if k not in ("train", "heldout")}, sys.stdout)
    print()
    for split in ("train", "heldout"):
      m = made[split]
      print(f"{args.out}/{split}: {m['documents']:,} documents, {m['tokens']:,} tokens, xxh3 {m['xxh3']}")
  return 0
