"""`genmodels systems`: every system and sampler, its paper, its variants and the tests that pin it.

The list is read from the configs: each file under configs/ states `paper` (title, arXiv id, row in the
triage table of published systems, -1 where the system is none of them) and `tests` (pytest node ids).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence

from genmodels import config


@dataclasses.dataclass(frozen=True)
class Paper:
  """title; arxiv: id without version, "" if there is none; row: number in the triage table, or -1."""

  title: str
  arxiv: str = ""
  row: int = -1

  def __post_init__(self):
    if not self.title.strip():
      raise ValueError("title is empty")
    if not -1 <= self.row < 274:
      raise ValueError("row must be a row of the triage table, 0 to 273, or -1")


@dataclasses.dataclass(frozen=True)
class System:
  """One system file: what it reproduces, in which variants, pinned by which tests."""

  name: str
  paper: Paper
  variants: tuple[str, ...]
  tests: tuple[str, ...]

  def __post_init__(self):
    if not self.tests:
      raise ValueError("tests is empty: a system is pinned by at least one test")
    for test in self.tests:
      if "::" not in test:
        raise ValueError(f"tests holds {test!r}, which is no node id (tests/room/test_x.py::test_name)")
      if self.tests.count(test) > 1:
        raise ValueError(f"tests holds {test!r} twice")


def system(name: str) -> System:
  """The system of the config file `name`; ConfigError if it does not say which paper or tests."""
  cfg = config.load(name)
  section = {k: config.plain(cfg[k]) for k in ("paper", "tests") if k in cfg}
  section["variants"] = config.variants(config.load_module(config.find(name)[0]))[1:]
  return config.build(System, section | {"name": name}, name)


def all_systems() -> list[System]:
  """Every system under configs/, by name; then every sampler."""
  return [system(name) for name in config.names() + config.names(samplers=True)]


def parser() -> argparse.ArgumentParser:
  p = argparse.ArgumentParser("genmodels systems", description="List the systems from the configs.")
  p.add_argument("--json", action="store_true", help="a list of objects, with the tests of each system")
  p.add_argument("--markdown", action="store_true", help="the table as the README shows it")
  return p


def markdown(systems: Sequence[System]) -> str:
  """The table in Markdown: name, paper, arXiv link."""
  lines = ["| system | paper | arXiv |", "|---|---|---|"]
  for s in systems:
    link = f"[{s.paper.arxiv}](https://arxiv.org/abs/{s.paper.arxiv})" if s.paper.arxiv else ""
    lines.append(f"| `{s.name}` | {s.paper.title} | {link} |")
  return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
  args = parser().parse_args(argv)
  systems = all_systems()
  if args.json:
    print(
      json.dumps([config.resolved({"system": s})["system"] for s in systems], indent=2, ensure_ascii=False)
    )
    return
  if args.markdown:
    print(markdown(systems))
    return
  table = [("system", "variants", "row", "arXiv", "tests", "paper")]
  for s in systems:
    row = "-" if s.paper.row < 0 else str(s.paper.row)
    table.append((s.name, ",".join(s.variants), row, s.paper.arxiv or "-", str(len(s.tests)), s.paper.title))
  widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
  for line in table:
    print("  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths)).rstrip())
