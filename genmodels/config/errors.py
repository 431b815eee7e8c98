"""The error of a config that cannot be run, and the words that its messages share."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

NOTHING = object()


class ConfigError(ValueError):
  """A config that cannot be run. Names the key, the value, the reason and the fix.

  Raise it from a component's `__post_init__` with `key` relative to the component: `build` puts the
  section's path in front.
  """

  def __init__(self, reason: str, *, key: str = "", value: Any = NOTHING, fix: str = ""):
    self.reason, self.key, self.value, self.fix = reason, key, value, fix
    head = key
    if key and value is not NOTHING:
      head = f"{key} = {short(value)}"
    text = f"{head}: {reason}" if head else reason
    super().__init__(f"{text}\n  fix: {fix}" if fix else text)

  def under(self, where: str) -> ConfigError:
    """The same error with `where` put in front of its key."""
    return ConfigError(self.reason, key=join(where, self.key), value=self.value, fix=self.fix)


def short(value: Any, limit: int = 200) -> str:
  text = repr(value)
  return text if len(text) <= limit else text[: limit - 1] + "…"


def join(where: str, key: str) -> str:
  return f"{where}.{key}" if where and key else where or key


def did_you_mean(key: str, known: Sequence[str]) -> str:
  """ "did you mean 'lr'? Known: …" for an error message."""
  close = difflib.get_close_matches(str(key), [str(k) for k in known], n=1, cutoff=0.6)
  hint = f"did you mean {close[0]!r}? " if close else ""
  return f"{hint}known: {', '.join(sorted(map(str, known))) or 'none'}"
