"""Files: find and load a system file, apply overrides."""

from __future__ import annotations

import ast
import importlib.util
import pathlib
import re
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from genmodels.config.errors import ConfigError, did_you_mean, short
from genmodels.config.values import is_number, plain

# Top-level keys of a system file.
SECTIONS = (
  "name",
  "paper",
  "tests",
  "seed",
  "batch_size",
  "model",
  "latent",
  "objective",
  "data",
  "optim",
  "train",
  "eval",
  "sampler",
  "mesh",
  "checkpoint",
  "init",
  "trees",
  "players",
)


def configs_root() -> pathlib.Path:
  """Folder of the system files: `genmodels/configs` when installed, `../configs` in a checkout."""
  package = pathlib.Path(__file__).resolve().parents[1]
  for root in (package / "configs", package.parent / "configs"):
    if root.is_dir():
      return root
  raise ConfigError(
    f"no configs folder beside or in {package}", fix="reinstall genmodels, or pass a path to --config"
  )


SAMPLERS = "samplers"  # the group of files that say how to decode, and nothing of a model


def names(samplers: bool = False) -> list[str]:
  """Every system file under `configs_root()`, as `group/name`, sorted; or every sampler file."""
  root = configs_root()
  found = (p.relative_to(root).with_suffix("").as_posix() for p in root.rglob("*.py"))
  return sorted(
    n
    for n in found
    if "/" in n
    and not any(part.startswith(("_", ".")) for part in n.split("/"))
    and n.startswith(f"{SAMPLERS}/") == samplers
  )


def find(ref: str) -> tuple[pathlib.Path, str]:
  """(file, variant) of `path.py`, `path.py:variant`, `group/name` or `group/name:variant`.

  Raises:
    ConfigError: neither a file nor a known name.
  """
  base, _, variant = ref.rpartition(":") if ":" in ref else (ref, "", "")
  path = pathlib.Path(base)
  if path.suffix == ".py":
    if path.is_file():
      return path, variant
    inside = base.removeprefix("./").removeprefix("configs/")  # configs/x/y.py, run from anywhere
    if (configs_root() / inside).is_file():
      return configs_root() / inside, variant
  elif (configs_root() / f"{base}.py").is_file():
    return configs_root() / f"{base}.py", variant
  raise ConfigError(
    "no such config",
    key="config",
    value=ref,
    fix=did_you_mean(base, names() + names(samplers=True)) + "; or a path to a .py file",
  )


def load_module(path: pathlib.Path) -> types.ModuleType:
  """The config file as a module of its own (not cached: a config is read once)."""
  name = "genmodels_config_" + re.sub(r"\W", "_", str(path.resolve()))
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module  # dataclasses and pickling in a config look their module up
  spec.loader.exec_module(module)
  if not callable(getattr(module, "get_config", None)):
    raise ConfigError(
      f"{path} has no get_config(variant='')", fix="define get_config(variant='') -> ConfigDict"
    )
  return module


def variants(module: types.ModuleType) -> tuple[str, ...]:
  """The variants a config file knows, the default one ("") first."""
  known = tuple(getattr(module, "VARIANTS", ("tiny",)))
  return ("",) + tuple(v for v in known if v)


def load(ref: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
  """The config that `ref` names, with `overrides` ("key.path=value") applied in order.

  An override may set a key that the file leaves out (the component's dataclass decides whether the key
  exists); for a key that the file sets, the new value must be of the same type. Values are Python
  literals (`3e-4`, `(1, 4)`, `{'kind': 'linear', …}`), `true`, `false`, `none`, or bare text.

  Raises:
    ConfigError: unknown file, variant or section; malformed or ill-typed override.
  """
  path, variant = find(ref)
  module = load_module(path)
  if variant not in variants(module):
    raise ConfigError(
      "unknown variant", key="config", value=ref, fix=did_you_mean(variant, variants(module)[1:])
    )
  cfg = module.get_config(variant)
  if not isinstance(cfg, ml_collections.ConfigDict):
    cfg = ml_collections.ConfigDict(cfg)
  cfg = ml_collections.ConfigDict(plain(cfg))  # unlocked, references resolved
  for text in overrides:
    override(cfg, text)
  for key in cfg:
    if key not in SECTIONS:
      raise ConfigError(
        f"unknown section of {path.name}", key=key, value=plain(cfg[key]), fix=did_you_mean(key, SECTIONS)
      )
  return cfg


def merged(base: Mapping, changes: Mapping) -> dict:
  """A section with changes: sections inside it are merged too, unless their kind changes."""
  out = dict(base)
  for key, value in changes.items():
    old = out.get(key)
    if isinstance(old, Mapping) and isinstance(value, Mapping):
      if value.get("kind", old.get("kind")) == old.get("kind"):
        value = merged(old, value)
    out[key] = value
  return out


def parse_value(text: str) -> Any:
  """An override's right-hand side: Python literal, true/false/none, or the text itself."""
  named = {"true": True, "false": False, "none": None}
  if text.strip().lower() in named:
    return named[text.strip().lower()]
  try:
    return ast.literal_eval(text.strip())
  except (ValueError, SyntaxError):
    return text


def override(cfg: ml_collections.ConfigDict, text: str) -> None:
  """Apply one "key.path=value" to `cfg` in place; ConfigError if malformed or of another type."""
  path, equals, raw = text.partition("=")
  keys = path.strip().split(".")
  if not equals or not all(keys):
    raise ConfigError(f"malformed override {text!r}", fix="write key.path=value, e.g. optim.lr=1e-3")
  section = cfg
  for i, key in enumerate(keys[:-1]):
    if section.get(key) is None:
      section[key] = ml_collections.ConfigDict()
    section = section[key]
    if not isinstance(section, ml_collections.ConfigDict):
      where = ".".join(keys[: i + 1])
      raise ConfigError(
        f"cannot set {path}: {where} is a value, not a section",
        key=where,
        value=section,
        fix=f"set {where}=…",
      )
  new, old = parse_value(raw), plain(section.get(keys[-1]))
  if isinstance(old, str) and new is not None and not isinstance(new, (str, dict)):
    new = raw  # name=123 is a name
  if not _compatible(old, new):
    raise ConfigError(
      f"the config has a {type(old).__name__} here ({short(old)}), got {type(new).__name__}",
      key=path.strip(),
      value=new,
      fix=f"write a {type(old).__name__}",
    )
  if is_number(new) and isinstance(old, float):
    new = float(new)
  with section.ignore_type():
    if isinstance(new, dict):
      section[keys[-1]] = ml_collections.ConfigDict(new)
    else:
      section[keys[-1]] = plain(new)


def _compatible(old: Any, new: Any) -> bool:
  """Whether an override may replace `old` by `new`; int and float mix, the dataclass decides."""
  if old is None or new is None:
    return True
  if all(is_number(v) or (isinstance(v, dict) and v.get("kind") in _SCHEDULES) for v in (old, new)):
    return True
  if isinstance(old, (tuple, list)):
    return isinstance(new, (tuple, list))
  return type(old) is type(new)


_SCHEDULES = ("constant", "steps", "linear", "cosine")
