"""`genmodels sample`: draws from a workdir.

  genmodels sample runs/bd3lm --prompt "def main(" --n 4 quota.tau=0.8 temperature=0.7
  genmodels sample runs/next_scale_digits --labels 0,1,2 --n 4 --out digits.png guidance.scale=2

Overrides are keys of the sampler section. --json prints one object with the tokens, and the step at which
each one was committed.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time

from genmodels import arguments


def turns_of(line: str, parser) -> list[dict]:
  """The turns of a line of a prompts file: a JSON list, or an object with "messages"."""
  try:
    turns = json.loads(line)
    turns = turns["messages"] if isinstance(turns, dict) else turns
    if turns and all({"role", "content"} <= set(turn) for turn in turns):
      return list(turns)
  except (ValueError, KeyError, TypeError):
    pass
  parser.error(f"--chat: expected a JSON list of {{role, content}} a line, got {line[:60]!r}")


def main(argv: list[str] | None = None) -> int:
  """The verb `genmodels sample`."""
  parser = argparse.ArgumentParser(
    prog="genmodels sample", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  arguments.add_workdir(parser)
  parser.add_argument("--step", type=int, help="checkpoint to take (default: the newest that verifies)")
  parser.add_argument(
    "--prompt", action="append", default=[], help="text to continue; may be given several times"
  )
  parser.add_argument("--prompts-file", help="a prompt per line")
  parser.add_argument(
    "--chat", action="store_true",
    help="prompts are a user's words, lines of --prompts-file JSON lists of turns; rendered as in training",
  )  # fmt: skip
  parser.add_argument("--template", default="", help="with --chat: chat template, as of `genmodels prepare`")
  parser.add_argument("--suffix", default="", help="text given behind what is generated: infilling")
  parser.add_argument("--labels", default="", help="classes of images, separated by commas")
  parser.add_argument("--sampler", default="", help="a sampler file, such as samplers/fast_dllm")
  parser.add_argument("--n", type=int, default=1, help="samples of each prompt or label")
  parser.add_argument(
    "--length", type=int, default=0, help="tokens of a row, prompt included (default: as trained)"
  )
  parser.add_argument("--new", type=int, default=0, help="tokens to generate at most (default: what fits)")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--out", help="write the samples there: PNG for images, text otherwise")
  parser.add_argument("--json", action="store_true", help="print one JSON object")
  parser.add_argument(
    "overrides",
    nargs="*",
    help="key=value of the sampler section, or model.attention=value, model.extend.factor=value",
  )
  args = arguments.parse(parser, argv)

  import jax
  import numpy as np

  from genmodels import config
  from genmodels.parallel import rules
  from genmodels.sampling import run as runs

  overrides = [
    t if t.startswith(("sampler.", "model.attention", "model.extend")) else f"sampler.{t}"
    for t in args.overrides
  ]
  if args.length:
    overrides.append(f"sampler.length={args.length}")
  run = runs.load_run(args.workdir, args.step, overrides, args.sampler)
  parts = run.parts
  prompts, ids = list(args.prompt), None
  lines = (
    pathlib.Path(args.prompts_file).read_text(encoding="utf-8").splitlines() if args.prompts_file else []
  )
  if args.chat:
    talks = [[{"role": "user", "content": p}] for p in prompts] + [turns_of(line, parser) for line in lines]
    if not talks:
      parser.error("--chat answers somebody: give --prompt or --prompts-file")
    carried = pathlib.Path(args.workdir) / "hf"
    ids, stop = runs.chat_ids(parts, talks, args.template, str(carried) if carried.is_dir() else "")
    if config.plain(run.cfg.sampler).get("eos", -1) == -1:
      run.cfg.sampler.eos = stop
    ids = [x for x in ids for _ in range(args.n)]
  prompts += lines
  sampler = runs.sampler_of(parts, run.step)
  if not jax.process_index():
    print(f"attention {parts.attention}", file=sys.stderr)
  if runs.draws_images(parts):
    if prompts:
      parser.error("this run draws images; give --labels instead of prompts")
    asked = [int(x) for x in args.labels.split(",") if x] or list(range(parts.objective.classes))
    asked = [x for x in asked for _ in range(args.n)]
    row = runs.image_row(parts, asked)
  else:
    asked = [p for p in prompts or [""] for _ in range(args.n)]
    row = runs.text_row(parts, sampler, asked, args.new, suffix=args.suffix, ids=ids)
  with rules.use_mesh(run.mesh):
    start = time.perf_counter()
    result = jax.block_until_ready(sampler(runs.parameters(parts, run.trees), row, jax.random.key(args.seed)))
    seconds = time.perf_counter() - start
  items = runs.decode(parts, row, result)
  if jax.process_index():
    return 0
  file = None
  if args.out or runs.draws_images(parts):
    out = pathlib.Path(args.out) if args.out else pathlib.Path(args.workdir) / "samples" / "sample"
    file = runs.save(parts, items, out)
  generated = int((np.asarray(result.committed_at) >= 0).sum())
  if args.json:
    rows = []
    for i, item in enumerate(items):
      n = int(result.lengths[i])
      rows.append({
        "prompt": asked[i],
        "text": item if isinstance(item, str) else None,
        "tokens": np.asarray(result.tokens)[i, :n].tolist(),
        "committed_at": np.asarray(result.committed_at)[i, :n].tolist(),
        "done": bool(result.done[i]),
      })  # fmt: skip
    body = {
      "workdir": str(args.workdir), "step": run.step, "cache": sampler.policy.name,
      "steps": int(result.steps),
      "forwards": int(result.forwards), "tokens": generated, "seconds": seconds,
      "calls": {kind: int(n.sum()) for kind, n in result.calls.items()},
      "tokens_per_forward": float(np.asarray(result.tokens_per_forward).mean()),
      "file": str(file) if file else None,
      "samples": rows,
    }  # fmt: skip
    json.dump(body, sys.stdout, ensure_ascii=False)
    print()
    return 0
  for prompt, item in zip(asked, items):
    if isinstance(item, str):
      print(f"--- {prompt!r}\n{item}")
  if file:
    print(f"wrote {file}")
  print(
    f"{len(items)} samples of step {run.step}, {generated} tokens, {int(result.steps)} steps, "
    f"{int(result.forwards)} forwards, {float(np.asarray(result.tokens_per_forward).mean()):.2f} tokens per "
    f"forward of a row, cache {sampler.policy.name}, {seconds:.1f} s (compilation included)",
    file=sys.stderr,
  )
  return 0
