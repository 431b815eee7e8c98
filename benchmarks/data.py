"""Data pipeline benchmark: planned packing read by grain against packing online in grain, same data, same
run.

  python benchmarks/data.py [--batches 100000] [--out data.json]

Prints a table and JSON: tokens/s through the grain iterator (rows of 4,096 with tokens, doc, pos, role,
modality and index; page cache warm), resident memory over many batches of 8 × 1,024, and the time to the
first batch at any step. The claims: at least 20 M tokens/s on 2 cores, flat memory, first batch within a
second.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time

import grain
import numpy as np
import psutil

from genmodels import data
from genmodels.data import records

CORPUS = {"short": (6.0, 1.0), "long": (8.0, 1.2)}  # log-normal lengths: means of about 660 and 6,100 tokens


def corpus(path: str, tokens: int, mu: float, sigma: float) -> None:
  """Writes a data set of random uint16 ids with log-normal lengths."""
  rng = np.random.default_rng(0)
  with records.Writer(path, vocab_size=50_000) as writer:
    total = 0
    while total < tokens:
      n = int(np.clip(rng.lognormal(mu, sigma), 2, 200_000))
      writer.write(records.Document(rng.integers(0, 50_000, n), context=1))
      total += n


def rate(iterator, seconds: float, tokens_of) -> float:
  """Tokens/s of an iterator, after one batch."""
  next(iterator)
  total, start = 0, time.perf_counter()
  while (spent := time.perf_counter() - start) < seconds:
    total += tokens_of(next(iterator))
  return total / spent


def planned(path: str, rows: int, seq_len: int, threads: int):
  d = data.build({"kind": "text", "path": path, "seq_len": seq_len}, batch_size=rows)
  return d, d.loader(threads=threads).at(0)


class _Documents:
  """Random-access documents for online packing, long ones cut to a row: read one by one, as grain reads
  ArrayRecord, or (the most that online packing could gain from reading) all held in memory."""

  def __init__(self, path: str, seq_len: int, memory: bool):
    self._data, self._seq_len = records.Dataset(path), seq_len
    self._all = [d.tokens for d in self._data.read(np.arange(len(self._data)))] if memory else None

  def __len__(self):
    return len(self._data)

  def __getitem__(self, i):
    tokens = self._all[i] if self._all else self._data.read([i])[0].tokens
    return {"tokens": tokens[: self._seq_len].astype(np.int32)}


def online(path: str, rows: int, seq_len: int, threads: int, memory: bool = False):
  """grain's own best-fit packing of the same documents (64 bins)."""
  from grain.experimental import BestFitPackIterDataset

  ds = grain.MapDataset.source(_Documents(path, seq_len, memory)).shuffle(seed=0).repeat()
  ds = ds.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=512 if threads else 0))
  ds = BestFitPackIterDataset(ds, length_struct={"tokens": seq_len}, num_packing_bins=64)
  return iter(ds.batch(rows, drop_remainder=True))


def main() -> int:
  p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  p.add_argument("--tokens", type=int, default=60_000_000, help="size of each corpus")
  p.add_argument("--seconds", type=float, default=4.0, help="of each rate")
  p.add_argument("--repeats", type=int, default=3)
  p.add_argument("--batches", type=int, default=100_000, help="of 8 × 1,024 for the memory test")
  p.add_argument("--dir", default="", help="keep the corpora here")
  p.add_argument("--out", default="", help="write the JSON here")
  args = p.parse_args()
  folder = args.dir or tempfile.mkdtemp(prefix="genmodels-data-")
  commit = subprocess.run(
    ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
  ).stdout.strip()
  result = {
    "commit": commit, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version(),
    "numpy": np.__version__, "grain": grain.__version__ if hasattr(grain, "__version__") else "",
    "load_at_start": os.getloadavg()[0],
  }  # fmt: skip
  try:
    for name, (mu, sigma) in CORPUS.items():
      path = os.path.join(folder, name)
      if not os.path.isdir(path):
        start = time.perf_counter()
        corpus(path, args.tokens, mu, sigma)
        result[f"write_{name}_Mtok_s"] = args.tokens / (time.perf_counter() - start) / 1e6
      result[name] = _rates(path, args)
    result["first_batch_s"] = _first(os.path.join(folder, "short"))
    result["memory"] = _memory(os.path.join(folder, "short"), args.batches)
  finally:
    if not args.dir:
      shutil.rmtree(folder)
  _table(result)
  print(json.dumps(result))
  if args.out:
    with open(args.out, "w") as f:
      json.dump(result, f, indent=1)
  return 0


def _rates(path, args):
  """Interleaved repeats, so that what else the machine does meets all alike."""
  out = {}
  for _ in range(args.repeats):
    for threads in (0, 1, 2):
      d, it = planned(path, 8, 4096, threads)
      value = rate(it, args.seconds, lambda b: int((b["doc"] >= 0).sum()))
      out.setdefault(f"planned, {threads} threads", []).append(value / 1e6)
      out["planned fill"] = float(np.mean([d.plan.fill(s)["tokens"] for s in range(200)]))
    for threads, memory in ((0, False), (16, False), (0, True)):
      it = online(path, 8, 4096, threads, memory)
      value = rate(it, args.seconds, lambda b: int((b["tokens_segment_ids"] > 0).sum()))
      name = "online, in memory" if memory else f"online, {threads} threads"
      out.setdefault(name, []).append(value / 1e6)
  it = online(path, 8, 4096, 0)
  out["online fill"] = float(np.mean([(next(it)["tokens_segment_ids"] > 0).mean() for _ in range(50)]))
  return {k: {"median": statistics.median(v), "all": v} if isinstance(v, list) else v for k, v in out.items()}


def _first(path):
  """Seconds from opened data (plan artefact present) to the first batch, at several steps."""
  work = tempfile.mkdtemp(prefix="genmodels-plan-")
  section = {"kind": "text", "path": path, "seq_len": 4096}
  try:
    data.build(section, batch_size=8, workdir=work).save_plan(steps=100_000)
    out = {}
    for step in (0, 10, 1_000, 50_000, 99_999):
      start = time.perf_counter()
      d = data.build(section, batch_size=8, workdir=work)
      opened = time.perf_counter()
      next(d.loader().at(step))
      out[str(step)] = {"open": opened - start, "batch": time.perf_counter() - opened}
    return out
  finally:
    shutil.rmtree(work)


def _memory(path, batches):
  """Resident MiB at ten points over the run; the growth after the first tenth is what counts."""
  d = data.build({"kind": "text", "path": path, "seq_len": 1024}, batch_size=8)
  it, process, rss, start = d.loader().at(0), psutil.Process(), [], time.perf_counter()
  tokens = 0
  for i in range(1, batches + 1):
    tokens += int((next(it)["doc"] >= 0).sum())
    if i % max(batches // 10, 1) == 0:
      rss.append(process.memory_info().rss / 2**20)
  spent = time.perf_counter() - start
  return {"batches": batches, "rss_MiB": rss, "growth_MiB": rss[-1] - rss[0], "Mtok_s": tokens / spent / 1e6}


def _table(r):
  print(
    f"commit {r['commit']}, {r['cores']} cores, load {r['load_at_start']:.1f} at the start, grain "
    f"{r['grain']}"
  )
  for name in CORPUS:
    for k, v in r[name].items():
      value = (
        f"{v['median']:8.1f} M tokens/s   {[round(x, 1) for x in v['all']]}"
        if isinstance(v, dict)
        else f"{v:8.4f}"
      )
      print(f"{name:6s} {k:20s} {value}")
  for step, v in r["first_batch_s"].items():
    print(f"first batch at step {step:>6s}: {v['batch']:.3f} s after opening ({v['open']:.3f} s)")
  m = r["memory"]
  print(
    f"memory over {m['batches']} batches: {[round(x) for x in m['rss_MiB']]} MiB, growth "
    f"{m['growth_MiB']:.1f} MiB, {m['Mtok_s']:.1f} M tokens/s"
  )


if __name__ == "__main__":
  raise SystemExit(main())
