"""Plain values: what a config holds once ConfigDicts and references are resolved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_collections


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


def is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)
