"""Schedules: a number, or a function of the step. The one file here that may import jax, in a traced call."""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Any

from genmodels.config.errors import ConfigError, did_you_mean, join
from genmodels.config.values import is_number, plain


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
    if is_number(value):
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
        key=join(where, "kind"),
        value=kind,
        fix=did_you_mean(str(kind), list(keys)),
      )
    given = {k: v for k, v in value.items() if k != "kind"}
    for key, entry in given.items():
      if key not in keys[kind]:
        raise ConfigError(
          f"unknown key of a {kind} schedule",
          key=join(where, key),
          value=entry,
          fix=did_you_mean(key, keys[kind]),
        )
    for key in keys[kind]:
      if key not in given:
        raise ConfigError(f"a {kind} schedule needs it", key=join(where, key), fix=_SCHEDULE_FIX)
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
      if not isinstance(values, tuple) or not all(map(is_number, values)):
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
