"""`genmodels eval`: bits per token and per byte of the model in a workdir, or of an imported checkpoint.

  genmodels eval runs/ar
  genmodels eval --workdir runs/bd3lm --block 8 --draws 64 --json
  genmodels eval runs/ar --file notes.txt
  genmodels eval runs/qwen3 --text notes.txt --length 2048 --json model.dtype=float32

Next-token models report their likelihood, diffusion models an upper bound of the negative log-likelihood.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import warnings

from genmodels import arguments


def main(argv: list[str] | None = None) -> int:
  """The verb `genmodels eval`."""
  parser = argparse.ArgumentParser(
    prog="genmodels eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  arguments.add_workdir(parser)
  parser.add_argument("--step", type=int, help="checkpoint to take (default: the newest that verifies)")
  parser.add_argument(
    "--file", action="append", default=[], help="a text instead of the held-out set; repeatable"
  )
  parser.add_argument(
    "--text", action="append", default=[],
    help="a text, encoded as its tokenizer's publisher does (BOS, no EOS) and cut at --length; repeatable",
  )  # fmt: skip
  parser.add_argument("--length", type=int, default=0, help="tokens of a --text (default: the context)")
  parser.add_argument("--draws", type=int, help="draws of the bound per document (default: eval.draws)")
  parser.add_argument("--documents", type=int, help="held-out documents, 0 all (default: eval.documents)")
  parser.add_argument("--block", type=int, default=0, help="block size (default: the trained one)")
  parser.add_argument("--json", action="store_true", help="print one JSON object")
  parser.add_argument("overrides", nargs="*", help="key.path=value on the stored config")
  args = arguments.parse(parser, argv)
  if args.text and args.file:
    parser.error("give --text or --file: they encode differently")

  import jax

  from genmodels import config
  from genmodels.evals import heldout
  from genmodels.sampling import at_step
  from genmodels.sampling.run import load_run

  run = load_run(args.workdir, args.step, args.overrides)
  section = config.plain(run.cfg.get("eval")) or {}
  section |= {k: v for k, v in (("draws", args.draws), ("documents", args.documents)) if v is not None}
  ecfg = config.build(heldout.EvalConfig, section, "eval")
  evaluator = heldout.Evaluator(ecfg, run.parts, run.mesh, jax.random.key(int(run.cfg.seed)))
  if not jax.process_index():
    print(f"attention {run.parts.attention}", file=sys.stderr)
  if args.text:
    texts = [pathlib.Path(f).read_text(encoding="utf-8") for f in args.text]
    result = evaluator.of_published(run.trees, texts, args.length, run.step, args.block)
  elif args.file:
    texts = [pathlib.Path(f).read_text(encoding="utf-8") for f in args.file]
    result = evaluator.of_texts(run.trees, texts, run.step, args.block)
  else:
    result = evaluator(run.trees, run.step, args.block)
  remarks = list(dict.fromkeys([*run.parts.notes, *result.pop("notes")]))
  trained = at_step(run.parts.objective, run.step)[1]
  if args.block and args.block != trained:
    remarks.append(f"evaluated with blocks of {args.block}; trained with {trained or 'whole documents'}")
    warnings.warn(remarks[-1], stacklevel=1)
  if jax.process_index():
    return 0
  body = {
    "workdir": str(args.workdir),
    "step": run.step,
    "block": args.block or trained,
    **result,
    "notes": remarks,
  }
  if args.json:
    json.dump(body, sys.stdout, ensure_ascii=False)
    print()
    return 0
  what = run.parts.objective.measures
  kind = (
    f"negative log-likelihood{' ' * bool(what)}{what}" if result["exact"] or what else "upper bound of it"
  )
  kind += "" if result["exact"] else f", {result['draws']} draws"
  byte = f" · {result['bits_per_byte']:.4f} bits per byte" if "bits_per_byte" in result else ""
  error = f" ± {result['stderr']:.4f}" if "stderr" in result else ""
  print(
    f"{result['bits_per_token']:.4f}{error} bits per token{byte} ({kind}; step {run.step}, "
    f"{result['documents']} documents, {result['tokens']} tokens)"
  )
  for text in remarks:
    print(f"note: {text}")
  return 0
