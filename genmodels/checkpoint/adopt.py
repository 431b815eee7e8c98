"""`genmodels train --from DST`: a system's config on the model of an imported checkpoint.

The config keeps what its paper decides (objective, optimizer, data, precision, remat); what a checkpoint
decides (architecture, vocabulary, window of local layers) comes from the import, and `init` points at it.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import ml_collections

from genmodels import config, data
from genmodels.checkpoint import folder, hf_config, hf_import
from genmodels.config import ConfigError
from genmodels.data import tokenizers
from genmodels.models import model as models

DRAFTS = ("draft", "block", "latent", "joint")  # kinds of heads that a config adds to a checkpoint's


@dataclasses.dataclass(frozen=True)
class Adopted:
  """What `adopt` decided, for people: one line each."""

  notes: tuple[str, ...]


def adopt(cfg: ml_collections.ConfigDict, path: str, workdir: str) -> Adopted:
  """Puts the model of the import at `path` into `cfg`, in place, and sets `init` to load it.

  The mask token of an AR checkpoint has no row of its own: the id that the data's tokenizer names (a reserved
  row of the table, or one behind it, for which the table grows) gets the mean row plus noise
  (surgery.set_mask_row). A published diffusion model keeps its own id and row.

  What the config adds to a model stays and is fresh: adapters and draft heads, an output weight of whose own
  starts as the checkpoint's.

  Raises:
    RestoreError: no finished import.
    ConfigError: data of another tokenizer, or a mask that cannot be narrowed to local layers.
  """
  source = folder.Folder.open(path)
  root = str(source.directory)
  imported = hf_import.tuples(json.loads((source.directory / folder.CONFIG).read_text()))
  theirs, hf = imported["model"], source.hf_config()
  mine = config.plain(cfg.model)
  model = {k: v for k, v in theirs.items() if k not in hf_config.RUN_FIELDS}
  model |= {k: v for k, v in mine.items() if k in hf_config.RUN_FIELDS}
  model["heads"], added = _with_drafts(theirs["heads"], mine.get("heads", {}))
  section = config.plain(cfg.data)
  if section.get("kind") == "python" and section.get("tokenizer", "byte") == "byte":
    cfg.data["tokenizer"] = root
  facts = data.meta(config.plain(cfg.data), workdir=workdir)
  _same_tokenizer(config.plain(cfg.data), facts, source, workdir)
  notes = []
  init: dict[str, Any] = {"kind": "workdir", "path": root}
  init |= {k: v for k, v in (config.plain(cfg.get("init")) or {}).items() if k == "beside"}
  objective = cfg.objective
  noisy = objective.get("corruption", {}).get("kind", "clean") != "clean"
  own = imported["objective"].get("mask_id", -1)
  if noisy and objective.get("mask_id", -1) < 0 and own >= 0:
    objective["mask_id"] = own
  elif noisy:
    mask = objective.get("mask_id", -1)
    mask = facts.specials["mask"] if mask < 0 else mask
    if mask >= model["vocab"]:
      notes.append(f"the vocabulary grows from {model['vocab']} to {mask + 1} rows, for the mask token")
      model["vocab"] = mask + 1
    if mask != own:
      init |= {"mask_row": "mean_noise", "mask_id": mask}
  window = hf_config.window(hf, theirs)
  rule = objective.get("masks", {}).get("full", "causal")
  if window and hf_config.LOCAL not in objective.get("masks", {}):
    if not isinstance(rule, str):
      raise ConfigError(
        f"the model has layers with a window of {window}, and the mask is a table of its own",
        key="objective.masks.local", value=None, fix="give the local layers' table too",
      )  # fmt: skip
    objective.masks = ml_collections.ConfigDict(hf_config.masks(rule, window))
    notes.append(f"local layers see {objective.masks[hf_config.LOCAL]}")
  cfg.model = ml_collections.ConfigDict(model)
  padded = models.build({**model, "heads": theirs["heads"], "prefix": 0}).cfg.vocab_padded
  fresh = [rf"heads/{name}/(?!out/).*" for name in added]
  fresh += [r".*/lora_[ab]"] if model.get("lora") else []
  fresh += [r"prefix/.*"] if model.get("prefix") else []
  init |= {"scratch": tuple(fresh)} if fresh else {}
  own = [name for name, head in added.items() if head["kind"] == "draft" and not head.get("shared")]
  if own:
    init["rename"] = tuple((f"heads/{name}/out/kernel", f"heads/{_like(added[name])}/kernel") for name in own)
  if added:
    notes.append(f"fresh draft heads: {', '.join(added)}")
  if padded != theirs["vocab"]:
    init["resize_vocab"] = True
  cfg.init = ml_collections.ConfigDict(init)
  notes.append(f"model and parameters of {root} ({source.manifest['layout']})")
  return Adopted(tuple(notes))


def networks(cfg: ml_collections.ConfigDict, workdir: str) -> None:
  """Gives networks beside the model (`trees.<name>` of kind "backbone") the shape of what they start from.

  Where `init.beside.<name>` names a run or an import and the config no shape, it is read there, in place, and
  a joint head that reads the network gets its width. A run that has begun keeps what it began with.
  """
  trees, stored = cfg.get("trees") or {}, pathlib.Path(workdir) / "config.json"
  for name, recipe in ((cfg.get("init") or {}).get("beside") or {}).items():
    tree = trees.get(name)
    if tree is None or tree.get("kind") != "backbone" or tree.get("model"):
      continue
    if stored.is_file():
      section = json.loads(stored.read_text())["trees"][name].get("model")
    else:
      section = shape_of(recipe["path"])
    if not section:
      continue
    section = hf_import.tuples(section)
    tree.model = ml_collections.ConfigDict(section)
    for head in cfg.model.get("heads", {}).values():
      if head.get("beside") == name and head.get("width") is None:
        head.width = section["width"]


def shape_of(path: str) -> dict:
  """The model section of a run or an import as far as it is the shape of a checkpoint; of its heads "text".

  Raises:
    FileNotFoundError: neither a run nor an import.
  """
  root = pathlib.Path(path).expanduser()
  if not (root / "config.json").is_file():
    raise FileNotFoundError(f"{root}/config.json does not exist: it is neither a run's workdir nor an import")
  file = next(f for f in (root / "resolved.json", root / "config.json") if f.is_file())
  model = json.loads(file.read_text())["model"]
  run = {*hf_config.RUN_FIELDS, "context"} - {"vocab_multiple"}
  kept = {k: v for k, v in model.items() if k not in run and not k.startswith("attention_")}
  return {"vocab_multiple": 1} | kept | {"heads": {"text": dict(model.get("heads") or {}).get("text", {})}}


def _like(head) -> str:
  return head.get("like", "text")


def _with_drafts(theirs, mine) -> tuple[dict, dict]:
  """The checkpoint's heads and the config's draft heads, and those alone that have parameters.

  Raises:
    ConfigError: an output weight to be copied from a head that is tied to the table and so has none.
  """
  drafts = {name: head for name, head in mine.items() if head.get("kind") in DRAFTS}
  for name, head in drafts.items():
    if head["kind"] == "draft" and not head.get("shared") and theirs[_like(head)].get("tied"):
      raise ConfigError(
        "the head starts as a copy of the checkpoint's output weight, which is tied to its token table",
        key=f"model.heads.{name}.shared", value=False, fix=f"model.heads.{name}.shared=True: use that weight",
      )  # fmt: skip
  return {**theirs, **drafts}, {name: head for name, head in drafts.items() if head["kind"] != "latent"}


def _same_tokenizer(section, facts, source: folder.Folder, workdir: str) -> None:
  """Ids must mean what they meant in pretraining."""
  path = source.directory / tokenizers.FILE
  if not path.is_file():
    return
  theirs = tokenizers.load(str(path)).vocabulary()
  built = data.tokenizer(section, workdir=workdir)
  if built is None:
    return
  if built.vocabulary().items() >= theirs.items():
    return
  raise ConfigError(
    "the data were tokenised by another tokenizer than the checkpoint's", key="data.path",
    value=section.get("path"), fix=f"genmodels prepare … --tokenizer {source.directory}",
  )  # fmt: skip
