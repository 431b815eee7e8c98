"""Configs: load a system file, apply overrides, build typed components, resolve, write.

A system is one file `configs/<group>/<name>.py` with `get_config(variant="") -> ConfigDict`. Its
sections are plain values; each component is a frozen dataclass in the room that owns it, and the
dataclass says which keys exist, of which type, with which default and under which laws:

  cfg = load("language/bd3lm:tiny", ["optim.lr=1e-3"])
  optim = build_kind(optim.REGISTRY, cfg.optim, "optim")

so a key exists in one place only and a wrong one is refused, by name, before anything compiles.
A file may state `VARIANTS = ("tiny",)`: the variants it knows besides the default one.

Loading it imports neither jax nor any other room.

errors.py     ConfigError                        files.py       system files, variants, overrides
values.py     plain values                       building.py    section → dataclass
schedule.py   numbers that depend on the step    resolving.py   dataclass → JSON, differences
"""

from genmodels.config.building import build, build_kind
from genmodels.config.errors import ConfigError, did_you_mean
from genmodels.config.files import (
  SAMPLERS,
  SECTIONS,
  configs_root,
  find,
  load,
  load_module,
  merged,
  names,
  override,
  parse_value,
  variants,
)
from genmodels.config.resolving import differences, resolved, write_json
from genmodels.config.schedule import Schedule
from genmodels.config.values import plain

__all__ = [
  "ConfigError",
  "SAMPLERS",
  "SECTIONS",
  "Schedule",
  "build",
  "build_kind",
  "configs_root",
  "did_you_mean",
  "differences",
  "find",
  "load",
  "load_module",
  "merged",
  "names",
  "override",
  "parse_value",
  "plain",
  "resolved",
  "variants",
  "write_json",
]
