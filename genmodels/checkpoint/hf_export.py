"""`genmodels export`: a workdir or an import as a Hugging Face folder.

  genmodels export runs/sdar out/sdar
  genmodels export runs/sdar out/sdar --layout sdar --dtype bfloat16
  genmodels export runs/ar out/llama --layout llama --like ~/checkpoints/Llama-3.2-1B

Writes config.json, safetensors (in shards with an index where they are large), the tokenizer as it was
imported and, for diffusion models, how they decode. An untouched import gives every tensor back bit for bit.
Adapters are merged into the weights, or written as a PEFT folder (--adapters peft); draft heads, which no
layout has tensors for, stay behind and are named. A decoder over two networks is a file beside the model,
decoder.safetensors; --tree exports the second network. The folder is built beside DST and renamed at the end.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from genmodels import config
from genmodels.checkpoint import folder, hf_adapters, hf_config, hf_import, hf_names, init, tensors
from genmodels.config import ConfigError
from genmodels.models import NETS, TrunkConfig
from genmodels.models import model as models

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
DECODER = "decoder.safetensors"  # heads over the states of two networks
CARRY = "hf"  # folder of a workdir: what its import brought along (train copies it there)


@dataclasses.dataclass(frozen=True)
class Source:
  """What is exported.

  Fields:
    cfg: the trunk, without draft heads. values: leaf name → array, read when asked for; names: leaves of the
      tree, without adapters; adapted: sites that have them.
    config: our config.json; resolved: resolved.json or {}.
    carried: folder with hf_config.json and the tokenizer, None without.
    layout: of the import it came from, "" without; hf_dtypes: {tensor: dtype} of it.
    duplicates: tensors that the import had twice.
    step: of the checkpoint.
    notes: what stays behind, for people.
    joint: heads over the states of this model and of another network.
  """

  cfg: TrunkConfig
  names: tuple[str, ...]
  values: Any
  config: dict
  resolved: dict
  carried: pathlib.Path | None
  layout: str
  hf_dtypes: dict
  duplicates: list
  step: int
  adapted: tuple[str, ...] = ()
  notes: tuple[str, ...] = ()
  joint: tuple[str, ...] = ()


def export_folder(
  src: str, dst: str, *, layout: str = "", dtype: str = "source", like: str = "", tree: str = "",
  step: int | None = None, shard_bytes: int = 5 << 30, adapters: str = "merge", say=lambda text: None,
) -> dict:  # fmt: skip
  """Exports a workdir or an import.

  Args:
    layout: one of hf_names.LAYOUTS; "": the one it was imported from.
    dtype: "source": each tensor as the import had it (the model's master type where there was none);
      or "float32", "bfloat16", "float16".
    like: Hugging Face folder or import to take config.json and tokenizer from, where the run has none.
    tree: "model", "ema" or a network beside the model; "": the average, where the run keeps one.
    step: −1 or None the newest that verifies.
    shard_bytes: largest file.
    adapters: "merge" them into the weights, "drop" them (the base model), or "peft": the adapters alone.

  Returns:
    {"layout", "tensors", "bytes", "files", "step", "metadata", "notes"}.

  Raises:
    ConfigError: a layout that cannot say what the model computes; nothing to take a config from; adapters
      that cannot be merged or written.
    RestoreError: no checkpoint that verifies.
    ValueError: `dst` exists. Nothing is written then.
  """
  target = pathlib.Path(dst).expanduser()
  if target.exists():
    raise ValueError(f"{target} exists; nothing was written. Choose another DST, or remove it")
  source = open_source(src, tree, step)
  template, carried = _template(source, like)
  kind = layout or source.layout or (hf_config.layout(template) if template else "")
  if not kind:
    raise ConfigError(
      "the run did not start from an import, so nothing says which layout it should have", key="--layout",
      value="", fix=f"one of {', '.join(hf_names.LAYOUTS)}",
    )  # fmt: skip
  if kind not in hf_names.LAYOUTS:
    raise ConfigError(
      "unknown layout", key="--layout", value=kind, fix=config.did_you_mean(kind, list(hf_names.LAYOUTS))
    )
  hf_adapters.check(adapters, source.cfg, source.adapted)
  window = _window(source, template)
  hf = hf_config.write(source.cfg, kind, template, window)
  entries = hf_names.cover(source.cfg, kind, source.names)
  specs = _specs(source, kind, entries, dtype)
  metadata = serving(source.config, source.resolved)
  hf |= metadata
  _set_dtype(hf, specs)
  files = _shards(specs, shard_bytes)
  sizes = {"tensors": len(specs), "bytes": sum(t.nbytes for t in specs.values()), "files": len(files)}
  value = source.values
  if adapters == "merge" and source.adapted:
    value = hf_adapters.merged(value, source.adapted, source.cfg.lora)
  work = target.with_name(f"{target.name}.exporting-{os.getpid()}")
  work.mkdir(parents=True)
  try:
    if adapters == "peft":
      stored = DTYPES[source.cfg.param_dtype if dtype == "source" else dtype]
      sizes = hf_adapters.write(work, source.cfg, kind, value, source.adapted, stored, metadata)
    else:
      _write(work, value, source, kind, entries, specs, files, say)
      _write_decoders(work, value, source, dtype)
      config.write_json(work / "config.json", hf)
    if carried is not None:
      for name in folder.CARRIED:
        if (carried / name).is_file():
          shutil.copyfile(carried / name, work / name)
      if (carried / folder.TEMPLATES).is_dir():
        shutil.copytree(carried / folder.TEMPLATES, work / folder.TEMPLATES)
    for path in work.rglob("*"):
      tensors.sync(path)
    if target.exists():
      raise ValueError(f"{target} appeared while the export ran; it is left alone")
    os.rename(work, target)
  except BaseException:
    shutil.rmtree(work, ignore_errors=True)
    raise
  return {"layout": kind, **sizes, "step": source.step, "metadata": metadata, "notes": source.notes}


# ----------------------------------------------------------------------------------------- source


def open_source(src: str, tree: str = "", step: int | None = None) -> Source:
  """Opens a workdir or an import for export; reads no array yet."""
  root = pathlib.Path(src).expanduser()
  if not (root / "config.json").is_file():
    raise FileNotFoundError(f"{root}/config.json does not exist: SRC is a workdir of `train`, or an import")
  if not folder.is_imported(root) and not (root / init.CHECKPOINTS).is_dir():
    raise ConfigError(
      "neither an import nor a workdir with checkpoints", key="SRC", value=str(root),
      fix="`genmodels import` it first, or train",
    )  # fmt: skip
  ours = hf_import.tuples(json.loads((root / "config.json").read_text()))
  checkpoint = init.open_folder(str(root))
  step = checkpoint.latest() if step is None or step < 0 else step
  ema = bool(ours.get("train", {}).get("ema"))
  tree = tree or ("ema" if ema else "model")
  if (
    ours.get("optim", {}).get("name") == "schedule_free" and tree == "model" and not folder.is_imported(root)
  ):
    raise ConfigError(
      "schedule-free evaluates an average that lies in the optimizer's state, which is not exported",
      key="optim.name", value="schedule_free", fix="train.ema, and --tree ema",
    )  # fmt: skip
  prefix = f"trees/{tree}/"
  recorded = {n.removeprefix(prefix): d for n, d in checkpoint.recorded(step).items() if n.startswith(prefix)}
  if not recorded:
    raise ConfigError(
      f"step {step} of {root} has no such tree", key="--tree", value=tree, fix="model, or ema"
    )
  resolved = _json(root / "resolved.json")
  section = dict(resolved.get("model") or ours["model"])
  whole = models.build(hf_import.tuples(section))
  net = ours.get("trees", {}).get(tree, {})
  if isinstance(net, Mapping) and net.get("kind") == "backbone":
    whole = NETS["backbone"](net.get("model", {})).network(whole)
  cfg, kept, notes, joint = _without_drafts(whole.cfg, list(recorded))
  adapted = hf_adapters.sites(kept)
  kept = [n for n in kept if not n.endswith((hf_adapters.A, hf_adapters.B))]
  host = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])

  def value(name: str) -> np.ndarray:
    if isinstance(checkpoint, folder.Folder):
      return checkpoint.leaf(name)
    wanted = prefix + name
    return np.asarray(checkpoint.read(step, lambda n, _: host if n == wanted else None)[0][wanted])

  facts = checkpoint.manifest if isinstance(checkpoint, folder.Folder) else _json(root / CARRY / "facts.json")
  carried = root if isinstance(checkpoint, folder.Folder) else root / CARRY
  return Source(
    cfg, tuple(kept), value, ours, resolved, carried if carried.is_dir() else None, facts.get("layout", ""),
    facts.get("hf_dtypes", {}), facts.get("duplicates", []), step, tuple(adapted), notes, joint,
  )  # fmt: skip


def _without_drafts(cfg: TrunkConfig, names: list[str]):
  """The trunk and its leaves without the heads that are no layout's, what to say of them, and the joint
  ones."""
  joint = tuple(name for name, head in cfg.heads if head.kind == "joint")
  gone = [name for name, head in cfg.heads if head.added]
  cfg = dataclasses.replace(cfg, heads=tuple((n, h) for n, h in cfg.heads if n not in gone), prefix=0)
  kept = [n for n in names if not n.startswith(("prefix/", *(f"heads/{name}/" for name in gone)))]
  drafts = [name for name in gone if name not in joint]
  notes = (f"draft heads stay in the run: {', '.join(drafts)}",) if drafts and len(kept) < len(names) else ()
  notes += (f"{DECODER} holds {', '.join(joint)}, over the states of two networks",) if joint else ()
  return cfg, kept, notes, joint


def carry(origin: str, workdir: pathlib.Path) -> None:
  """Copies what an export needs into a workdir that starts from `origin`: configs and tokenizer of an import,
  or those that another workdir carries. Does nothing for other workdirs, or where it is done."""
  target = workdir / CARRY
  before = pathlib.Path(origin).expanduser() / CARRY
  if target.exists() or not (folder.is_imported(origin) or before.is_dir()):
    return
  if before.is_dir():
    shutil.copytree(before, target)
    return
  source = folder.Folder.open(origin)
  target.mkdir(parents=True, exist_ok=True)
  for name in (*folder.CARRIED, folder.HF_CONFIG):
    if (source.directory / name).is_file():
      shutil.copyfile(source.directory / name, target / name)
  if (source.directory / folder.TEMPLATES).is_dir():
    shutil.copytree(source.directory / folder.TEMPLATES, target / folder.TEMPLATES)
  facts = {k: source.manifest[k] for k in ("layout", "hf_dtypes", "duplicates", "source")}
  config.write_json(target / "facts.json", facts)


def _json(path: pathlib.Path) -> dict:
  return json.loads(path.read_text()) if path.is_file() else {}


def _template(source: Source, like: str) -> tuple[dict, pathlib.Path | None]:
  """config.json to start from, and the folder with the tokenizer."""
  if like:
    root = pathlib.Path(like).expanduser()
    return _json(root / folder.HF_CONFIG) or hf_import.read_config(root), root
  if source.carried is None:
    return {}, None
  return _json(source.carried / folder.HF_CONFIG), source.carried


def _window(source: Source, template: Mapping) -> int:
  if template.get("sliding_window"):
    return int(template["sliding_window"])
  rule = source.config.get("objective", {}).get("masks", {}).get(hf_config.LOCAL, "")
  return int(str(rule).rpartition("NEAR(")[2].rstrip(")")) + 1 if "NEAR(" in str(rule) else 0


# --------------------------------------------------------------------------------------- metadata


def serving(ours: Mapping, resolved: Mapping) -> dict[str, Any]:
  """What a serving engine must know of a diffusion model; {} for an AR one.

  `block_size`, `bd_size`, `mask_token_id`, `mask_id` and `sub_block_size` are keys that engines read; the
  words of "diffusion" are those of tpu-inference and MaxText (logit alignment, canvas, next block, prompt
  remainder).
  """
  objective = ours.get("objective", {})
  corruption = objective.get("corruption", {})
  terms = objective.get("terms", {})
  noisy = [t for t in terms.values() if t.get("stream", "c") != "c"]
  if not noisy or corruption.get("kind", "clean") == "clean":
    return {}
  term = terms.get(objective.get("likelihood") or "", noisy[0])
  term = term if term in noisy else noisy[0]
  mask = int(resolved.get("objective", {}).get("mask_id", objective.get("mask_id", -1)))
  block = _last(
    corruption.get("blocks", {}).get("size", 0) if isinstance(corruption.get("blocks"), Mapping) else 0
  )
  shifted = term.get("align", "same") != "same"
  clean = "c" in objective.get("layout", {}).get("streams", ("c",))
  rule = str(objective.get("masks", {}).get("full", ""))
  out: dict[str, Any] = {"mask_token_id": mask, "mask_id": mask}
  if block:
    out |= {
      "block_size": block,
      "bd_size": block,
      "sub_block_size": _last(ours.get("sampler", {}).get("sub_block", 0)) or block,
    }
  seeded = term.get("align") == "shift_clean_boundary"
  out["diffusion"] = {
    "strategy": "block_diffusion" if block else "masked_diffusion",
    "attention_policy": "full"
    if not clean
    else "causal"
    if rule.startswith(("context", "idlm"))
    else "block_causal",
    "logit_alignment": "shifted" if shifted else "same_position",
    "canvas_policy": "seed_and_mask" if seeded else "all_masked",
    "next_block_policy": "last_logit_anchor" if seeded else "all_masked",
    "prompt_remainder_policy": "include_in_first_canvas",
  }
  return out


def _last(size) -> int:
  """A block size, or what its schedule ends at."""
  if isinstance(size, Mapping):
    from genmodels.config import Schedule

    values = Schedule.of(size).values()
    return int(values[-1])
  return int(size or 0)


def _set_dtype(hf: dict, specs: Mapping[str, tensors.Tensor]) -> None:
  """The config's dtype is that of the most elements; the key keeps the name it had."""
  sizes: collections.Counter = collections.Counter()
  for t in specs.values():
    sizes[t.dtype] += t.nbytes
  name = {v: k for k, v in DTYPES.items()}[sizes.most_common(1)[0][0]]
  hf["dtype" if "dtype" in hf else "torch_dtype"] = name


# ---------------------------------------------------------------------------------------- writing


def _specs(source: Source, kind: str, entries, dtype: str) -> dict[str, tensors.Tensor]:
  """{tensor: dtype and shape} in the layout's order, duplicates included."""
  if dtype != "source" and dtype not in DTYPES:
    raise ConfigError("unknown dtype", key="--dtype", value=dtype, fix=f"source, {', '.join(DTYPES)}")
  shapes = hf_names.leaf_shapes(source.cfg)
  default = DTYPES.get(source.cfg.param_dtype, "F32")
  common = collections.Counter(source.hf_dtypes.values()).most_common(1)
  out: dict[str, tensors.Tensor] = {}
  for e in entries:
    stored = source.hf_dtypes.get(e.name) or (common[0][0] if common else default)
    kept = stored if dtype == "source" else DTYPES[dtype]
    out[e.name] = tensors.Tensor(
      pathlib.Path(), kept, hf_names.tensor_shape(source.cfg, e, shapes[e.leaf]), 0
    )
  if source.layout == kind and source.cfg.head("text").tied:
    table = out[f"{hf_names.LAYOUTS[kind].table}.weight"]
    out |= {name: table for name in source.duplicates}
  return out


def _shards(specs: Mapping[str, tensors.Tensor], limit: int) -> dict[str, list[str]]:
  """{file name: tensors}, none above `limit` bytes but one with a single larger tensor."""
  groups: list[list[str]] = [[]]
  size = 0
  for name, t in specs.items():
    if groups[-1] and size + t.nbytes > limit:
      groups.append([])
      size = 0
    groups[-1].append(name)
    size += t.nbytes
  if len(groups) == 1:
    return {tensors.SINGLE: groups[0]}
  n = len(groups)
  return {f"model-{i + 1:05d}-of-{n:05d}.safetensors": g for i, g in enumerate(groups)}


def _write(work, value, source: Source, kind: str, entries, specs, files, say) -> None:
  where: dict[str, tensors.Tensor] = {}
  for file, names in files.items():
    tensors.create(work / file, {n: (specs[n].dtype, specs[n].shape) for n in names}, {"format": "pt"})
    where |= tensors.header(work / file)[0]
  last = time.monotonic()
  for leaf, mine in _by_leaf(entries):
    array = np.ascontiguousarray(value(leaf))  # a memory map stays one
    for e in mine:
      a, b = hf_names.views(source.cfg, e, array, where[e.name].open("r+"))
      tensors.copy_into(b, a)
    del array
    if time.monotonic() - last > 10:
      last = time.monotonic()
      say(f"export: {leaf}")
  table = f"{hf_names.LAYOUTS[kind].table}.weight"
  for name in source.duplicates:
    if name in where:
      where[name].open("r+")[...] = where[table].open()
  if len(files) > 1:
    index = {n: f for f, names in files.items() for n in names}
    total = sum(t.nbytes for t in specs.values())
    config.write_json(work / tensors.INDEX, {"metadata": {"total_size": total}, "weight_map": index})


def _write_decoders(work, value, source: Source, dtype: str) -> None:
  """DECODER: "<head>.weight" [V, D + E] of every joint head, a linear layer on [state of the model before the
  token; state of the other network at the token]."""
  stored = DTYPES[source.cfg.param_dtype if dtype == "source" else dtype]
  kernels = {f"{name}.weight": value(f"heads/{name}/kernel")[:, : source.cfg.vocab] for name in source.joint}
  if not kernels:
    return
  tensors.create(work / DECODER, {n: (stored, k.shape[::-1]) for n, k in kernels.items()}, {"format": "pt"})
  for name, tensor in tensors.header(work / DECODER)[0].items():
    tensors.copy_into(tensor.open("r+"), kernels[name].T)


def _by_leaf(entries) -> Iterator[tuple[str, list]]:
  groups = collections.defaultdict(list)
  for e in entries:
    groups[e.leaf].append(e)
  yield from groups.items()


def main(argv: list[str] | None = None) -> int:
  """The verb `genmodels export`."""
  parser = argparse.ArgumentParser(
    prog="genmodels export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("src", metavar="SRC", help="workdir of a run, or an import")
  parser.add_argument("dst", metavar="DST", help="folder to make")
  parser.add_argument("--layout", default="", help="names and config of: " + ", ".join(hf_names.LAYOUTS))
  parser.add_argument("--dtype", default="source", help="source (default), float32, bfloat16 or float16")
  parser.add_argument("--like", default="", help="folder to take config.json and tokenizer from")
  parser.add_argument(
    "--tree", default="", help="model, ema or a second network (default: the average, where there is one)"
  )
  parser.add_argument("--step", type=int, help="checkpoint to take (default: the newest)")
  parser.add_argument(
    "--adapters",
    choices=hf_adapters.CHOICES,
    default="merge",
    help="merge, drop, or a PEFT folder of their own",
  )
  parser.add_argument("--shard-gb", type=float, default=5.0, help="largest file")
  args = parser.parse_args(argv)
  jax.config.update("jax_platforms", "cpu")
  made = export_folder(
    args.src, args.dst, layout=args.layout, dtype=args.dtype, like=args.like, tree=args.tree, step=args.step,
    shard_bytes=int(args.shard_gb * 2**30), adapters=args.adapters,
    say=lambda text: print(text, file=sys.stderr),
  )  # fmt: skip
  for note in made["notes"]:
    print(note)
  print(
    f"exported step {made['step']} as {made['layout']}: {made['tensors']} tensors, {made['bytes']:,} bytes "
    f"in {made['files']} file{'s' * (made['files'] != 1)}, {args.dst}"
  )
  return 0
