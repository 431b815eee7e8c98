"""`genmodels import`: a Hugging Face folder into one that training, evaluation and sampling read.

  genmodels import ~/checkpoints/Qwen3-0.6B runs/qwen3

Tensors go from memory map to memory map, one at a time, so a model of any size needs little memory. The
import is built in DST.importing and renamed at the end: DST is whole or not there. Killed, it goes on where
it was when it is started again. Weights are read from safetensors only.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import json
import os
import pathlib
import shutil
import sys
import threading
import time
from collections.abc import Mapping

import jax
import numpy as np
import xxhash

from genmodels import config
from genmodels.checkpoint import folder, hf_config, hf_names, tensors, verify
from genmodels.checkpoint.tensors import Tensor, TensorError
from genmodels.config import ConfigError
from genmodels.models import TrunkConfig
from genmodels.models import config as trunk_config

JOURNAL = "journal.jsonl"
IDENTITY = "identity.json"


def import_folder(src: str, dst: str, *, threads: int = 0, say=lambda text: None) -> folder.Folder:
  """Imports the Hugging Face folder `src` as `dst`.

  Args:
    threads: tensors copied at one time; 0 takes the cores, 8 at most.
    say: called with lines for people.

  Returns:
    The finished folder; at once, if `dst` is an import of these very files.

  Raises:
    ConfigError: config.json asks for what the trunk does not compute, or does not fit the tokenizer.
    TensorError: weights that are missing, damaged, pickled, of a wrong dtype, or too large for the disk.
    ValueError: tensors that are missing, superfluous or of another shape than config.json says; a `dst`
      that exists and is something else. Nothing is written then.
  """
  source, target = pathlib.Path(src).expanduser(), pathlib.Path(dst).expanduser()
  hf = read_config(source)
  found = tensors.folder(source)
  kind = hf_config.layout(hf, found)
  section = hf_config.section(hf)
  for name, t in found.items():
    if t.dtype not in tensors.FLOATS and not hf_names.BUFFERS.fullmatch(name):
      raise TensorError(
        f"{t.file}: {name} is {t.dtype}; weights are read as {', '.join(tensors.FLOATS)}; cast it first"
      )
  cfg = trunk_config.from_section(section)
  entries = hf_names.check(cfg, kind, {n: t.shape for n, t in found.items()})
  duplicates = _duplicates(cfg, kind, found)
  vocabulary = _tokenizer(source, hf, cfg)
  leaves = _leaves(cfg, entries, found)
  ours = system_config(kind, hf, section, vocabulary, leaves)
  fingerprint = _fingerprint(source, found)
  if target.exists():
    return _existing(target, fingerprint)
  work = target.with_name(target.name + ".importing")
  _begin(work, fingerprint, source, leaves, say)
  digests = _fill(work, cfg, entries, found, threads or min(8, os.cpu_count() or 1), say)
  manifest = {
    "format": folder.FORMAT,
    "layout": kind,
    "source": str(source.absolute()),
    "fingerprint": fingerprint,
    "hf_dtypes": {e.name: found[e.name].dtype for e in entries},
    "duplicates": duplicates,
    "dropped": sorted(n for n in found if hf_names.BUFFERS.fullmatch(n)),
    "leaves": {
      name: {"shape": list(shape), "dtype": str(tensors.DTYPES[dtype]), "digest": digests[name]}
      for name, (dtype, shape) in leaves.items()
    },
  }
  _finish(work, target, source, ours, manifest)
  return folder.Folder.open(target)


def read_config(source: pathlib.Path) -> dict:
  """config.json of a Hugging Face folder.

  Raises:
    ConfigError: no folder, no config.json, or no JSON object in it.
  """
  path = source / "config.json"
  if not source.is_dir():
    raise ConfigError(
      "no such folder",
      key="SRC",
      value=str(source),
      fix="download the checkpoint first; nothing is fetched here",
    )
  try:
    hf = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise ConfigError(
      "the folder has no config.json", key="SRC", value=str(source), fix="a Hugging Face folder"
    ) from None
  except (json.JSONDecodeError, UnicodeDecodeError) as e:
    raise ConfigError(
      f"config.json is no JSON: {e}", key="SRC", value=str(path), fix="fetch it again"
    ) from None
  if not isinstance(hf, dict):
    raise ConfigError("config.json is no JSON object", key="SRC", value=str(path), fix="fetch it again")
  return hf


def tuples(x):
  """JSON has no tuples, config sections have no lists."""
  if isinstance(x, Mapping):
    return {k: tuples(v) for k, v in x.items()}
  return tuple(map(tuples, x)) if isinstance(x, list) else x


def _duplicates(cfg: TrunkConfig, kind: str, found: Mapping[str, Tensor]) -> list[str]:
  """Tensors that repeat the tied table; they must equal it, bit for bit."""
  name = hf_names.tied_name(kind)
  if not cfg.head("text").tied or name not in found:
    return []
  table = found[f"{hf_names.LAYOUTS[kind].table}.weight"]
  head = found[name]
  same = head.shape == table.shape and head.dtype == table.dtype
  if same:
    a, b = (t.open().reshape(-1).view(np.uint8) for t in (head, table))
    same = all(np.array_equal(a[i : i + (1 << 24)], b[i : i + (1 << 24)]) for i in range(0, a.size, 1 << 24))
  if not same:
    raise ConfigError(
      f"the weights are said to be tied, but {name} differs from {hf_names.LAYOUTS[kind].table}.weight",
      key="tie_word_embeddings", value=True, fix="set it to false in config.json, if so it was trained",
    )  # fmt: skip
  return [name]


def _tokenizer(source: pathlib.Path, hf: Mapping, cfg: TrunkConfig) -> dict[str, str]:
  """Names of the tokenizer's special tokens that config.json gives by id; checks that its ids fit."""
  path = source / "tokenizer.json"
  if not path.is_file():
    return {}
  import tokenizers

  try:
    t = tokenizers.Tokenizer.from_file(str(path))
  except Exception as e:  # the library raises bare Exceptions
    raise ConfigError(
      f"tokenizer.json cannot be read: {e}", key="SRC", value=str(path), fix="fetch it again"
    ) from None
  largest = max(t.get_vocab(with_added_tokens=True).values(), default=-1)
  if largest >= cfg.vocab:
    raise ConfigError(
      f"the tokenizer has ids up to {largest}, the weights {cfg.vocab} rows: they do not belong together",
      key="vocab_size", value=cfg.vocab, fix="the tokenizer of this checkpoint",
    )  # fmt: skip
  out = {}
  for key in ("bos", "eos", "pad", "mask"):
    i = hf.get(f"{key}_token_id")
    i = i[0] if isinstance(i, list) and i else i
    if isinstance(i, int) and t.id_to_token(i) is not None:
      out[key] = t.id_to_token(i)
  return out


def _leaves(cfg: TrunkConfig, entries, found) -> dict[str, tuple[str, tuple[int, ...]]]:
  """{leaf: (safetensors dtype, shape)}: the widest of its layers' dtypes, float16 as float32."""
  dtypes = collections.defaultdict(set)
  for e in entries:
    dtypes[e.leaf].add(found[e.name].dtype)
  # Every float16 and every bfloat16 number is a float32 one, so a mixture is stored without loss.
  pick = lambda kinds: "BF16" if kinds == {"BF16"} else "F32"
  return {name: (pick(dtypes[name]), shape) for name, shape in hf_names.leaf_shapes(cfg).items()}


def _fingerprint(source: pathlib.Path, found: Mapping[str, Tensor]) -> str:
  """Identity of a source: config, and name, size, time and header of each weight file."""
  h = xxhash.xxh3_64((source / "config.json").read_bytes())
  for path in sorted({t.file for t in found.values()}):
    stat = path.stat()
    with path.open("rb") as f:
      n = int.from_bytes(f.read(8), "little")
      h.update(json.dumps([path.name, stat.st_size, stat.st_mtime_ns]).encode() + f.read(n))
  return h.hexdigest()


def _existing(target: pathlib.Path, fingerprint: str) -> folder.Folder:
  if folder.is_imported(target):
    done = folder.Folder.open(target)
    if done.manifest["fingerprint"] == fingerprint:
      return done
    what = f"an import of {done.manifest['source']} as it was then"
  else:
    what = "something else"
  raise ValueError(f"{target} exists and is {what}; nothing was written. Choose another DST, or remove it")


def _begin(work: pathlib.Path, fingerprint: str, source: pathlib.Path, leaves, say) -> None:
  """A work folder with every leaf's file in place; or the one that a killed import left."""
  identity = {"fingerprint": fingerprint, "source": str(source.absolute())}
  if work.exists():
    try:
      same = json.loads((work / IDENTITY).read_text()) == identity
    except (FileNotFoundError, json.JSONDecodeError):
      same = False
    if not same:
      raise ValueError(
        f"{work} is the rest of another import; nothing was written. Remove it and start again"
      )
    say(f"going on with {work}")
  need = sum(int(np.prod(shape)) * tensors.DTYPES[dtype].itemsize for dtype, shape in leaves.values())
  have = sum(f.stat().st_blocks * 512 for f in (work / folder.LEAVES).glob("*")) if work.exists() else 0
  parent = work.parent
  parent.mkdir(parents=True, exist_ok=True)
  free = shutil.disk_usage(parent).free
  if need - have > free:
    raise TensorError(f"{parent}: expected {need - have:,} bytes of free disk for the import, got {free:,}")
  (work / folder.LEAVES).mkdir(parents=True, exist_ok=True)
  config.write_json(work / IDENTITY, identity)
  for name, (dtype, shape) in leaves.items():
    path = folder.leaf_file(work, name)
    if not _sound(path, name, dtype, shape):
      tensors.create(path, {name: (dtype, shape)})


def _sound(path: pathlib.Path, name: str, dtype: str, shape) -> bool:
  """The file is there with its whole length (a kill may fall between two files, or inside one's creation)."""
  try:
    t = tensors.header(path)[0].get(name)
  except TensorError:
    return False
  return t is not None and (t.dtype, t.shape) == (dtype, tuple(shape))


def _fill(work, cfg, entries, found, threads: int, say) -> dict[str, list[int]]:
  """Copies every tensor into its place. {leaf: digest}."""
  done = _journal(work / JOURNAL)
  sums: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
  total = sum(found[e.name].nbytes * e.share for e in entries)
  size, start, last = 0, time.monotonic(), time.monotonic()
  leaves = {n: tensors.header(folder.leaf_file(work, n))[0][n] for n in {e.leaf for e in entries}}
  lock = threading.Lock()

  def fill(e) -> tuple[int, int]:
    """One entry; NumPy lets other threads run meanwhile, and memory maps hold no copy."""
    out = leaves[e.leaf].open("r+")
    row, first = e.place(out)
    key = f"{e.leaf}:{e.row}" + ("" if e.expert is None else f":{e.expert}")
    # What a journal promises may have been lost with the machine's memory: it is read again.
    if key in done and verify.host_digest(row, out.shape, first) == done[key]:
      return done[key]
    tensors.copy_into(*hf_names.views(cfg, e, out, found[e.name].open()))
    got = verify.host_digest(row, out.shape, first)
    with lock:
      journal.write(json.dumps([key, list(got)]) + "\n")
      journal.flush()
    return got

  with (work / JOURNAL).open("a") as journal, concurrent.futures.ThreadPoolExecutor(threads) as pool:
    try:
      for e, got in zip(entries, pool.map(fill, entries)):
        sums[e.leaf] = [(x + y) % 2**32 for x, y in zip(sums[e.leaf], got)]
        size += found[e.name].nbytes * e.share
        now = time.monotonic()
        if now - last > 10:
          last = now
          left = (now - start) * (total - size) / max(size, 1)
          say(f"import: {size / 1e9:.1f} of {total / 1e9:.1f} GB · ETA {left:.0f} s")
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise
  return dict(sums)


def _journal(path: pathlib.Path) -> dict[str, tuple[int, int]]:
  """{leaf:row: digest} of what was copied before; a line cut by a kill ends it."""
  out: dict[str, tuple[int, int]] = {}
  if path.is_file():
    for line in path.read_text().splitlines():
      try:
        key, (a, b) = json.loads(line)
      except (json.JSONDecodeError, ValueError):
        break
      out[key] = (a, b)
  return out


def _finish(work, target, source, ours, manifest) -> None:
  """Config, tokenizer, manifest; then the name that says it is whole."""
  for name in folder.CARRIED:
    if (source / name).is_file():
      shutil.copyfile(source / name, work / name)
  if (source / folder.TEMPLATES).is_dir():
    shutil.copytree(source / folder.TEMPLATES, work / folder.TEMPLATES, dirs_exist_ok=True)
  shutil.copyfile(source / "config.json", work / folder.HF_CONFIG)
  config.write_json(work / folder.CONFIG, ours)
  for name in (JOURNAL, IDENTITY):
    (work / name).unlink(missing_ok=True)
  config.write_json(work / folder.MANIFEST, verify.seal(manifest))
  for path in work.rglob("*"):
    tensors.sync(path)
  tensors.sync(work)
  if target.exists():
    raise ValueError(f"{target} appeared while the import ran; it is left alone, the import is in {work}")
  os.rename(work, target)
  tensors.sync(target.parent)


def system_config(kind: str, hf: Mapping, section: Mapping, vocabulary: Mapping, leaves: Mapping) -> dict:
  """Our config.json: the system under which the folder is evaluated and sampled.

  The master type is that of the most elements; computing is in bfloat16 if they are, else in float32.
  """
  sizes: collections.Counter = collections.Counter()
  for dtype, shape in leaves.values():
    sizes[str(tensors.DTYPES[dtype])] += int(np.prod(shape))
  stored = sizes.most_common(1)[0][0]
  length = hf.get("max_position_embeddings") or hf.get("n_positions") or hf.get("max_sequence_length") or 2048
  window = hf_config.window(hf, section)
  facts = hf_config.diffusion(kind, hf)
  sampler: dict = {"temperature": 1.0, "length": min(int(length), 256)}
  if facts:
    sampler |= {"temperature": 0.0, "score": "prob"}
  return {
    "name": f"imported/{kind}",
    "seed": 0,
    "batch_size": 1,
    "model": {**section, "dtype": stored, "param_dtype": stored},
    "objective": hf_config.objective(kind, hf, window),
    "data": {
      "kind": "tokenizer", "seq_len": int(length), "vocab": int(section["vocab"]),
      "specials": dict(vocabulary), "mask": facts.get("mask_id", -1),
    },
    "optim": {}, "train": {}, "eval": {}, "sampler": sampler, "mesh": {}, "checkpoint": {}, "init": {},
  }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
  """The verb `genmodels import`."""
  parser = argparse.ArgumentParser(
    prog="genmodels import", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("src", metavar="SRC", help="Hugging Face folder: config.json, safetensors, tokenizer")
  parser.add_argument("dst", metavar="DST", help="folder to make")
  args = parser.parse_args(argv)
  jax.config.update("jax_platforms", "cpu")  # shapes are asked for, nothing is computed
  start = time.monotonic()
  done = import_folder(args.src, args.dst, say=lambda text: print(text, file=sys.stderr))
  leaves = done.manifest["leaves"]
  count = sum(int(np.prod(d["shape"])) for d in leaves.values())
  dropped = done.manifest["dropped"]
  if dropped:
    print(f"left behind {len(dropped)} buffers that no parameter corresponds to: {tensors.some(dropped, 2)}")
  print(
    f"imported {done.manifest['layout']}: {count:,} parameters, {len(leaves)} leaves, "
    f"{time.monotonic() - start:.1f} s, {args.dst}"
  )
  return 0
