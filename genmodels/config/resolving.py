"""Resolving: what was built, as JSON with every default; what differs between two configs."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_collections

from genmodels.config.building import fields_of
from genmodels.config.errors import NOTHING, ConfigError, join, short
from genmodels.config.schedule import Schedule
from genmodels.config.values import plain


def differences(old: Any, new: Any, where: str = "") -> list[str]:
  """What differs between two plain sections, one "key old → new" a leaf, by key; tuples equal lists."""
  if isinstance(old, Mapping) and isinstance(new, Mapping):
    keys = sorted({*old, *new}, key=str)
    return [
      text
      for k in keys
      for text in differences(old.get(k, NOTHING), new.get(k, NOTHING), join(where, str(k)))
    ]
  if old is not NOTHING and new is not NOTHING and _json(old, where) == _json(new, where):
    return []
  shown = ("unset" if x is NOTHING else short(_json(x, where), 60) for x in (old, new))
  return [f"{where} {' → '.join(shown)}"]


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
    return out | {k: _json(getattr(value, k), join(where, k)) for k in fields_of(type(value))}
  if isinstance(value, ml_collections.ConfigDict):
    value = plain(value)
  if isinstance(value, Mapping):
    return {str(k): _json(v, join(where, str(k))) for k, v in value.items()}
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
