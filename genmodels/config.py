"""Configs: load a system file, apply overrides, build typed components, resolve, write.

A system is one file `configs/<group>/<name>.py` with `get_config(variant="") -> ConfigDict`. Its
sections are plain values; each component is a frozen dataclass in the room that owns it, and the
dataclass says which keys exist, of which type, with which default and under which laws:

  cfg = load("language/bd3lm:tiny", ["optim.lr=1e-3"])
  optim = build_kind(optim.REGISTRY, cfg.optim, "optim")

so a key exists in one place only and a wrong one is refused, by name, before anything compiles.
A file may state `VARIANTS = ("tiny",)`: the variants it knows besides the default one.

This module imports neither jax nor any other room.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import enum
import functools
import importlib.util
import json
import math
import numbers
import os
import pathlib
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

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

_NOTHING = object()


class ConfigError(ValueError):
  """A config that cannot be run. Names the key, the value, the reason and the fix.

  Raise it from a component's `__post_init__` with `key` relative to the component: `build` puts the
  section's path in front.
  """

  def __init__(self, reason: str, *, key: str = "", value: Any = _NOTHING, fix: str = ""):
    self.reason, self.key, self.value, self.fix = reason, key, value, fix
    head = key
    if key and value is not _NOTHING:
      head = f"{key} = {_short(value)}"
    text = f"{head}: {reason}" if head else reason
    super().__init__(f"{text}\n  fix: {fix}" if fix else text)

  def under(self, where: str) -> ConfigError:
    """The same error with `where` put in front of its key."""
    return ConfigError(self.reason, key=_join(where, self.key), value=self.value, fix=self.fix)


def _short(value: Any, limit: int = 200) -> str:
  text = repr(value)
  return text if len(text) <= limit else text[: limit - 1] + "…"


def _join(where: str, key: str) -> str:
  return f"{where}.{key}" if where and key else where or key


def did_you_mean(key: str, known: Sequence[str]) -> str:
  """ "did you mean 'lr'? Known: …" for an error message."""
  close = difflib.get_close_matches(str(key), [str(k) for k in known], n=1, cutoff=0.6)
  hint = f"did you mean {close[0]!r}? " if close else ""
  return f"{hint}known: {', '.join(sorted(map(str, known))) or 'none'}"


def plain(section: Any) -> Any:
  """ConfigDicts, references and lists as plain dicts and tuples, recursively."""
  if section is None:
    return None
  if isinstance(section, ml_collections.FieldReference):
    return plain(section.get())
  if isinstance(section, ml_collections.ConfigDict):
    section = section.to_dict()
  if isinstance(section, Mapping):
    return {k: plain(v) for k, v in section.items()}
  if isinstance(section, (list, tuple)):
    return tuple(plain(v) for v in section)
  return section


def differences(old: Any, new: Any, where: str = "") -> list[str]:
  """What differs between two plain sections, one "key old → new" a leaf, by key; tuples equal lists."""
  if isinstance(old, Mapping) and isinstance(new, Mapping):
    keys = sorted({*old, *new}, key=str)
    return [
      text
      for k in keys
      for text in differences(old.get(k, _NOTHING), new.get(k, _NOTHING), _join(where, str(k)))
    ]
  if old is not _NOTHING and new is not _NOTHING and _json(old, where) == _json(new, where):
    return []
  shown = ("unset" if x is _NOTHING else _short(_json(x, where), 60) for x in (old, new))
  return [f"{where} {' → '.join(shown)}"]


# ---------------------------------------------------------------------------------------- schedules


@dataclasses.dataclass(frozen=True)
class Schedule:
  """A number, or a function of the step, as written in a config.

  Forms (`Schedule.of`):
    3e-4                                                  constant
    dict(kind="steps", values=(1, 4, 8), at=(0, 100, 200))  values[i] from step at[i] on
    dict(kind="linear", start=0., end=1., over=(100, 200))  constant outside `over`
    dict(kind="cosine", start=1., end=0.1, over=(0, 1000))  half a cosine, constant outside `over`

  Calling it with a Python int gives a Python number; with a jax value (traced or not) a jax scalar,
  int32 when all values are ints, float32 otherwise. A constant knows no step.
  """

  kind: str = "constant"
  table: tuple = (0,)  # constant: (v,) · steps: values · linear, cosine: (start, end)
  at: tuple = ()  # steps: first step of each value · linear, cosine: (first, last)

  @classmethod
  def of(cls, value: Any, where: str = "schedule") -> Schedule:
    """The schedule that `value` (number, dict or Schedule) describes; ConfigError otherwise."""
    if isinstance(value, cls):
      return value
    value = plain(value)
    if _is_number(value):
      return cls("constant", (value,))
    if not isinstance(value, dict):
      raise ConfigError("expected a number or a schedule", key=where, value=value, fix=_SCHEDULE_FIX)
    keys = {
      "constant": ("value",),
      "steps": ("values", "at"),
      "linear": ("start", "end", "over"),
      "cosine": ("start", "end", "over"),
    }
    kind = value.get("kind")
    if kind not in keys:
      raise ConfigError(
        "unknown kind of schedule",
        key=_join(where, "kind"),
        value=kind,
        fix=did_you_mean(str(kind), list(keys)),
      )
    given = {k: v for k, v in value.items() if k != "kind"}
    for key, entry in given.items():
      if key not in keys[kind]:
        raise ConfigError(
          f"unknown key of a {kind} schedule",
          key=_join(where, key),
          value=entry,
          fix=did_you_mean(key, keys[kind]),
        )
    for key in keys[kind]:
      if key not in given:
        raise ConfigError(f"a {kind} schedule needs it", key=_join(where, key), fix=_SCHEDULE_FIX)
    if kind == "constant":
      table, at = (given["value"],), ()
    elif kind == "steps":
      table, at = given["values"], given["at"]
    else:
      table, at = (given["start"], given["end"]), given["over"]
    try:
      return cls(kind, table, at)
    except ConfigError as e:
      raise e.under(where) from None

  def __post_init__(self):
    for name in ("table", "at"):
      values = getattr(self, name)
      if not isinstance(values, tuple) or not all(map(_is_number, values)):
        key = {"steps": {"table": "values", "at": "at"}}.get(self.kind, {"table": "value", "at": "over"})[
          name
        ]
        raise ConfigError("expected numbers", key=key, value=values, fix=_SCHEDULE_FIX)
    if self.kind == "steps":
      rising = all(a < b for a, b in zip(self.at, self.at[1:]))
      if not self.table or len(self.table) != len(self.at) or self.at[0] != 0 or not rising:
        raise ConfigError(
          f"steps start at 0, rise, and are as many as the values (got {len(self.table)} values)",
          key="at",
          value=self.at,
          fix="e.g. values=(1, 4, 8), at=(0, 100, 200)",
        )
    elif self.kind != "constant" and (len(self.at) != 2 or self.at[0] >= self.at[1]):
      raise ConfigError(
        "needs (first, last) with first < last", key="over", value=self.at, fix="over=(0, 1000)"
      )

  @property
  def is_constant(self) -> bool:
    return self.kind == "constant"

  def values(self) -> tuple:
    """Every value it can take; ValueError for a continuous one."""
    if self.kind in ("linear", "cosine"):
      raise ValueError(f"a {self.kind} schedule takes infinitely many values; use kind='steps' here")
    return self.table

  def max(self):
    return max(self.table)

  def min(self):
    return min(self.table)

  def __call__(self, step):
    if isinstance(step, numbers.Integral):
      return self._host(int(step))
    import jax.numpy as jnp  # only where a traced step proves that jax is loaded already

    whole = self.kind in ("constant", "steps") and all(isinstance(v, int) for v in self.table)
    table = jnp.asarray(self.table, jnp.int32 if whole else jnp.float32)
    if self.is_constant:
      return table[0]
    if self.kind == "steps":
      return table[jnp.sum(step >= jnp.asarray(self.at)) - 1]
    (a, b), (start, end) = self.at, table
    x = jnp.clip((step - a) / (b - a), 0.0, 1.0).astype(jnp.float32)
    if self.kind == "cosine":
      x = 0.5 - 0.5 * jnp.cos(jnp.pi * x)
    return start * (1 - x) + end * x

  def _host(self, step: int):
    if self.is_constant:
      return self.table[0]
    if self.kind == "steps":
      return self.table[max(sum(step >= a for a in self.at) - 1, 0)]
    (a, b), (start, end) = self.at, self.table
    x = min(max((step - a) / (b - a), 0.0), 1.0)
    if self.kind == "cosine":
      x = 0.5 - 0.5 * math.cos(math.pi * x)
    return start * (1 - x) + end * x

  def to_json(self) -> Any:
    if self.is_constant:
      return self.table[0]
    if self.kind == "steps":
      return {"kind": "steps", "values": list(self.table), "at": list(self.at)}
    return {"kind": self.kind, "start": self.table[0], "end": self.table[1], "over": list(self.at)}


_SCHEDULE_FIX = (
  "a number, dict(kind='steps', values=(1, 4), at=(0, 100)), "
  "dict(kind='linear', start=0., end=1., over=(0, 100)), or kind='cosine' with the same keys"
)


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)


# ----------------------------------------------------------------------------------------- building


def build(cls: type, section: Any, where: str) -> Any:
  """Instantiate the frozen dataclass `cls` from a config section.

  Annotations are the schema: int, float (ints accepted), bool, str, Literal, tuple[…] (lists
  accepted), dict, Optional, unions, Schedule, nested dataclasses. A nested section with a `kind`, and
  whatever is annotated as any other class, stays a plain dict: its owner builds it.

  Args:
    section: ConfigDict, dict, None (all defaults), or an instance of `cls`, which is returned.
    where: path of the section in the config, for messages.

  Raises:
    ConfigError: unknown key (with the nearest known one), missing key, wrong type, or a law of the
      class's `__post_init__` (a ValueError there) broken.
  """
  if isinstance(section, cls):
    return section
  if not dataclasses.is_dataclass(cls):
    raise TypeError(f"{where}: {cls!r} is no dataclass; a config component is a frozen dataclass")
  section = {} if section is None else plain(section)
  if not isinstance(section, dict):
    raise ConfigError(
      f"expected a section with the keys of {cls.__name__}",
      key=where,
      value=section,
      fix=f"dict({', '.join(_fields(cls))})",
    )
  fields, hints = _fields(cls), _hints(cls)
  for key in section:
    if key not in fields:
      raise ConfigError(
        f"unknown key of {cls.__name__}",
        key=_join(where, str(key)),
        value=section[key],
        fix=did_you_mean(key, list(fields)),
      )
  values = {}
  for key, field in fields.items():
    path = _join(where, key)
    if key in section:
      values[key] = _convert(section[key], hints[key], path)
    elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
      raise ConfigError(
        f"missing; {cls.__name__} has no default for it", key=path, fix=f"set {path}={_name(hints[key])}"
      )
    elif hints[key] is Schedule and not isinstance(field.default, Schedule):
      values[key] = Schedule.of(field.default, path)
  try:
    return cls(**values)
  except ConfigError as e:
    raise e.under(where) from None
  except ValueError as e:
    raise _law(cls, values, where, e) from e


def build_kind(registry: Mapping[str, type], section: Any, where: str) -> Any:
  """`build` of the class that `section["kind"]` names in `registry`.

  Raises:
    ConfigError: as `build`, and for a missing or unknown kind.
  """
  if any(isinstance(section, cls) for cls in registry.values() if isinstance(cls, type)):
    return section
  section = plain(section)
  if not isinstance(section, dict) or "kind" not in section:
    raise ConfigError(
      "expected a section with a kind",
      key=where,
      value=section,
      fix=f"{where}=dict(kind=…); {did_you_mean('', list(registry))}",
    )
  kind = section.pop("kind")
  if kind not in registry:
    raise ConfigError(
      "unknown kind", key=_join(where, "kind"), value=kind, fix=did_you_mean(str(kind), list(registry))
    )
  built = build(registry[kind], section, where)
  object.__setattr__(built, "_config_kind", kind)  # read by `resolved`; not a field, so equality ignores it
  return built


@functools.cache
def _fields(cls: type) -> dict[str, dataclasses.Field]:
  return {f.name: f for f in dataclasses.fields(cls) if f.init and not f.name.startswith("_")}


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
  return typing.get_type_hints(cls)


def _law(cls: type, values: dict, where: str, error: ValueError) -> ConfigError:
  """A ValueError of a component's constructor as a ConfigError about the keys that it mentions."""
  reason = str(error).rstrip(".")
  full = {k: values.get(k, f.default) for k, f in _fields(cls).items()}
  keys = [k for k in full if re.search(rf"(?<![\w.]){re.escape(k)}(?!\w)", reason)]
  keys.sort(key=lambda k: reason.index(k))
  if not keys:
    given = ", ".join(f"{k}={_short(v, 60)}" for k, v in values.items()) or "all defaults"
    return ConfigError(f"{reason} (given: {given})", key=where, fix=f"change {where} so that this holds")
  others = ", ".join(f"{_join(where, k)}={_short(full[k], 60)}" for k in keys[1:])
  reason = f"{reason} (with {others})" if others else reason
  paths = " or ".join(_join(where, k) for k in keys)
  return ConfigError(
    reason, key=_join(where, keys[0]), value=full[keys[0]], fix=f"change {paths} so that this holds"
  )


def _name(hint: Any) -> str:
  if hint is type(None):
    return "None"
  if typing.get_origin(hint) in (types.UnionType, typing.Union):
    return " | ".join(_name(a) for a in typing.get_args(hint))
  return (
    hint.__name__
    if isinstance(hint, type) and not typing.get_args(hint)
    else str(hint).replace("typing.", "")
  )


def _convert(value: Any, hint: Any, where: str) -> Any:
  """`value` as the annotation `hint` wants it, or ConfigError."""

  def wrong(fix: str = "") -> ConfigError:
    got = type(value).__name__
    return ConfigError(
      f"expected {_name(hint)}, got {got}", key=where, value=value, fix=fix or f"write a {_name(hint)}"
    )

  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if hint is Any or isinstance(hint, typing.TypeVar):
    return value
  if hint is type(None):
    if value is None:
      return None
    raise wrong()
  if origin in (types.UnionType, typing.Union):
    return _convert_union(value, args, where, wrong)
  if origin is typing.Literal:
    if value in args and type(value) in {type(a) for a in args}:
      return value
    raise ConfigError(
      "unknown choice", key=where, value=value, fix=did_you_mean(str(value), [str(a) for a in args])
    )
  if hint is bool:
    if isinstance(value, bool):
      return value
    raise wrong("True or False")
  if hint is int:
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
      return int(value)
    whole = isinstance(value, float) and value.is_integer()
    raise wrong(f"write {int(value)}" if whole else "write a whole number")
  if hint is float:
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
      return float(value)
    raise wrong(
      "write a number" if not isinstance(value, dict) else "a schedule is not supported for this key"
    )
  if hint is str:
    if isinstance(value, str):
      return value
    raise wrong("quote it")
  if hint is Schedule:
    return Schedule.of(value, where)
  if hint is tuple or origin is tuple:
    if not isinstance(value, (list, tuple)):
      raise wrong("write a tuple, e.g. (1, 2)")
    if not args:
      return tuple(value)
    if len(args) == 2 and args[1] is Ellipsis:
      return tuple(_convert(v, args[0], f"{where}[{i}]") for i, v in enumerate(value))
    if len(value) != len(args):
      raise wrong(f"write {len(args)} entries")
    return tuple(_convert(v, a, f"{where}[{i}]") for i, (v, a) in enumerate(zip(value, args)))
  if hint is dict or origin in (dict, Mapping):
    if not isinstance(value, dict):
      raise wrong("write a dict")
    return {k: _convert(v, args[1], _join(where, str(k))) for k, v in value.items()} if args else value
  if dataclasses.is_dataclass(hint):
    if isinstance(value, hint):
      return value
    if isinstance(value, dict) and "kind" in value and "kind" not in _fields(hint):
      return value
    return build(hint, value, where)
  if isinstance(hint, type) and issubclass(hint, enum.Enum):
    try:
      return value if isinstance(value, hint) else hint(value)
    except ValueError:
      choices = did_you_mean(value, [e.value for e in hint])
      raise ConfigError("unknown choice", key=where, value=value, fix=choices) from None
  return value  # an object, or a section that its owner builds


def _convert_union(value: Any, args: tuple, where: str, wrong) -> Any:
  """The member of a union that fits; a section prefers the member that takes sections."""
  if value is None and type(None) in args:
    return None
  exact = [a for a in args if isinstance(a, type) and type(value) is a]
  if exact and exact[0] not in (dict,):
    return value
  members = [a for a in args if a is not type(None)]
  if isinstance(value, dict):  # the error of the one member that takes a section says more than "wrong type"
    takers = [a for a in members if a in (Schedule, dict) or dataclasses.is_dataclass(a)]
    if len(takers) == 1:
      return _convert(value, takers[0], where)
  if len(members) == 1:
    return _convert(value, members[0], where)
  if _is_number(value) and Schedule in members and float in members:
    return float(value)
  for member in members:
    try:
      return _convert(value, member, where)
    except ConfigError:
      continue
  raise wrong()


# ------------------------------------------------------------------------------------------ loading


def configs_root() -> pathlib.Path:
  """Folder of the system files: `genmodels/configs` when installed, `../configs` in a checkout."""
  package = pathlib.Path(__file__).resolve().parent
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
      f"the config has a {type(old).__name__} here ({_short(old)}), got {type(new).__name__}",
      key=path.strip(),
      value=new,
      fix=f"write a {type(old).__name__}",
    )
  if _is_number(new) and isinstance(old, float):
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
  if all(_is_number(v) or (isinstance(v, dict) and v.get("kind") in _SCHEDULES) for v in (old, new)):
    return True
  if isinstance(old, (tuple, list)):
    return isinstance(new, (tuple, list))
  return type(old) is type(new)


_SCHEDULES = ("constant", "steps", "linear", "cosine")

# ---------------------------------------------------------------------------------------- resolving


def resolved(built: Mapping[str, Any]) -> dict:
  """Everything that decided a run, as JSON: every knob of every component, defaults included.

  Args:
    built: {section: dataclass, number, dict …}.
  """
  return {str(k): _json(v, str(k)) for k, v in built.items()}


def _json(value: Any, where: str) -> Any:
  if value is None or isinstance(value, (bool, int, str)):
    return value
  if isinstance(value, float):
    return value if math.isfinite(value) else repr(value)
  if isinstance(value, Schedule):
    return value.to_json()
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    kind = getattr(value, "_config_kind", None)
    out = {} if kind is None else {"kind": kind}
    return out | {k: _json(getattr(value, k), _join(where, k)) for k in _fields(type(value))}
  if isinstance(value, ml_collections.ConfigDict):
    value = plain(value)
  if isinstance(value, Mapping):
    return {str(k): _json(v, _join(where, str(k))) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_json(v, f"{where}[{i}]") for i, v in enumerate(value)]
  if isinstance(value, enum.Enum):
    return _json(value.value, where)
  if isinstance(value, os.PathLike):
    return os.fspath(value)
  if hasattr(value, "tolist"):  # NumPy scalars and small arrays
    return _json(value.tolist(), where)
  if hasattr(value, "__qualname__"):  # functions and classes
    return f"{value.__module__}.{value.__qualname__}"
  raise ConfigError(
    f"a {type(value).__name__} cannot be written to JSON", key=where, value=value, fix="keep configs plain"
  )


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Write `value` (already plain) as indented JSON, atomically: readers see the old or the new file."""
  path = pathlib.Path(path)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  temporary.write_text(
    json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
  )
  os.replace(temporary, path)
