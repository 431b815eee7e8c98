"""`genmodels <verb>`: finds the verb's room, hands it the arguments, and shows errors to people.

Each verb is a `main(argv) -> int | None` in its own room, imported only when it is called, so that
`genmodels --help` answers at once and loads no jax.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import genmodels

# verb: (room with `main(argv)`, what it does)
VERBS = {
  "quickstart": (
    "genmodels.quickstart",
    "train, convert, evaluate and sample a small model here; write a report",
  ),
  "prepare": ("genmodels.data.prepare", "turn text, JSONL or Parquet into training shards"),
  "import": ("genmodels.checkpoint.hf_import", "take a Hugging Face checkpoint over"),
  "export": ("genmodels.checkpoint.hf_export", "hand a model back in Hugging Face form"),
  "train": ("genmodels.train", "train a config in a workdir, or continue it"),
  "sample": ("genmodels.sampling.main", "draw samples from a workdir or an import"),
  "collect": (
    "genmodels.sampling.collect",
    "decode texts and keep the Jacobi trajectories that lead to them",
  ),
  "eval": ("genmodels.evals.main", "evaluate a workdir or an import: bits per token and per byte"),
  "lm-eval": (
    "genmodels.evals.harness",
    "tasks of the EleutherAI evaluation harness on a workdir or an import",
  ),
  "curve": ("genmodels.evals.curve", "error against parallelism: a table and a plot"),
  "systems": ("genmodels.systems", "list the systems: paper, variants, tests"),
}

USAGE = """usage: genmodels [--version] [--traceback] VERB [ARGUMENTS]

{verbs}

genmodels VERB --help shows a verb's arguments. --traceback, anywhere, shows where an error was raised.
"""


def usage() -> str:
  width = max(map(len, VERBS))
  return USAGE.format(verbs="\n".join(f"  {verb:<{width}}  {text}" for verb, (_, text) in VERBS.items()))


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a verb. Returns the exit status: 0, 2 for an error the user can mend, 130 when interrupted."""
  argv = list(sys.argv[1:] if argv is None else argv)
  traceback = "--traceback" in argv
  argv = [a for a in argv if a != "--traceback"]
  if not argv or argv[0] in ("-h", "--help", "help"):
    print(usage(), end="")
    return 0 if argv else 2
  if argv[0] == "--version":
    print(genmodels.__version__)
    return 0
  verb = argv[0]
  if verb not in VERBS:
    from genmodels.config import did_you_mean

    print(f"genmodels: unknown verb {verb!r}; {did_you_mean(verb, list(VERBS))}", file=sys.stderr)
    return 2
  try:
    return importlib.import_module(VERBS[verb][0]).main(argv[1:]) or 0
  except KeyboardInterrupt:
    return 130
  except (ValueError, FileNotFoundError) as error:  # ConfigError is a ValueError
    if traceback:
      raise
    from genmodels.config import ConfigError

    print(f"genmodels {verb}: {error}", file=sys.stderr)
    if not isinstance(error, ConfigError):
      print("(where it was raised: add --traceback)", file=sys.stderr)
    return 2


if __name__ == "__main__":
  sys.exit(main())
