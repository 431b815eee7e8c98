"""Building: a section's plain values become the frozen dataclass that owns them, or an error by name."""

from __future__ import annotations

import dataclasses
import enum
import functools
import numbers
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from genmodels.config.errors import ConfigError, did_you_mean, join, short
from genmodels.config.schedule import Schedule
from genmodels.config.values import is_number, plain


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
      fix=f"dict({', '.join(fields_of(cls))})",
    )
  fields, hints = fields_of(cls), _hints(cls)
  for key in section:
    if key not in fields:
      raise ConfigError(
        f"unknown key of {cls.__name__}",
        key=join(where, str(key)),
        value=section[key],
        fix=did_you_mean(key, list(fields)),
      )
  values = {}
  for key, field in fields.items():
    path = join(where, key)
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
      "unknown kind", key=join(where, "kind"), value=kind, fix=did_you_mean(str(kind), list(registry))
    )
  built = build(registry[kind], section, where)
  object.__setattr__(built, "_config_kind", kind)  # read by `resolved`; not a field, so equality ignores it
  return built


@functools.cache
def fields_of(cls: type) -> dict[str, dataclasses.Field]:
  return {f.name: f for f in dataclasses.fields(cls) if f.init and not f.name.startswith("_")}


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
  return typing.get_type_hints(cls)


def _law(cls: type, values: dict, where: str, error: ValueError) -> ConfigError:
  """A ValueError of a component's constructor as a ConfigError about the keys that it mentions."""
  reason = str(error).rstrip(".")
  full = {k: values.get(k, f.default) for k, f in fields_of(cls).items()}
  keys = [k for k in full if re.search(rf"(?<![\w.]){re.escape(k)}(?!\w)", reason)]
  keys.sort(key=lambda k: reason.index(k))
  if not keys:
    given = ", ".join(f"{k}={short(v, 60)}" for k, v in values.items()) or "all defaults"
    return ConfigError(f"{reason} (given: {given})", key=where, fix=f"change {where} so that this holds")
  others = ", ".join(f"{join(where, k)}={short(full[k], 60)}" for k in keys[1:])
  reason = f"{reason} (with {others})" if others else reason
  paths = " or ".join(join(where, k) for k in keys)
  return ConfigError(
    reason, key=join(where, keys[0]), value=full[keys[0]], fix=f"change {paths} so that this holds"
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
    return {k: _convert(v, args[1], join(where, str(k))) for k, v in value.items()} if args else value
  if dataclasses.is_dataclass(hint):
    if isinstance(value, hint):
      return value
    if isinstance(value, dict) and "kind" in value and "kind" not in fields_of(hint):
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
  if is_number(value) and Schedule in members and float in members:
    return float(value)
  for member in members:
    try:
      return _convert(value, member, where)
    except ConfigError:
      continue
  raise wrong()
