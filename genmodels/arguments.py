"""What the verbs' command lines have in common."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def add_workdir(parser: argparse.ArgumentParser) -> None:
  """Declares --workdir, for `parse`."""
  parser.add_argument("--workdir", help="folder of a training run, or an import; may stand without its flag")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
  """Arguments in any order; without --workdir the folder is the first that is no flag and no key=value.

  The parser declares --workdir and the positional list `overrides`.
  """
  args = parser.parse_intermixed_args(argv)
  if args.workdir is None:
    if not args.overrides or "=" in args.overrides[0]:
      parser.error("name the folder of a training run, or an import")
    args.workdir = args.overrides.pop(0)
  return args
