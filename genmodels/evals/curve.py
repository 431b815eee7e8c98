"""`genmodels curve`: error against parallelism, as a table, JSON and a plot.

  genmodels curve runs/sdar --judge runs/ar --vary quota.tau=0.5,0.7,0.9,1
  genmodels curve runs/llada runs/bd3lm --vary quota.kind=linear quota.steps=4,8,16,32 --out curve.png

Committing several tokens of one forward ignores what they say about each other. For every setting of the
sampler the models continue prompts of the held-out set; the judge says how likely it finds what was written,
in bits per byte, against tokens per forward. The judge is a next-token model where one is given, else the
first model itself, by its own likelihood. Low bits alone are no praise: text that repeats itself is likely.
So the entropy of the tokens and the share of repeated 4-grams are in the table, and so is what the judge
makes of the held-out texts themselves.

--vary takes words key=value of the sampler section; a comma makes a list, and every list is run through.
Each --vary is a curve of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import pathlib
import sys
import time
from collections import Counter
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Point:
  """One setting of one model.

  Fields:
    model, curve, setting: names; `setting` is the list's values, "" without a list.
    tokens_per_forward, tokens_per_second: None where it was not measured.
    bits_per_byte: the judge's, of what was written; stderr over texts.
    entropy: bits, of the tokens written; repeated: share of 4-grams seen before in their text.
    texts, tokens: written; empty: prompts behind which nothing was written.
  """

  model: str
  curve: str
  setting: str
  tokens_per_forward: float | None
  tokens_per_second: float | None
  bits_per_byte: float
  stderr: float
  entropy: float
  repeated: float
  texts: int
  tokens: int
  empty: int


def variations(words: Sequence[str]) -> list[tuple[str, dict]]:
  """(setting, sampler section) for every combination of the lists in "key=v1,v2" words.

  Raises:
    ConfigError: a word that is no assignment.
  """
  import ml_collections

  from genmodels import config
  from genmodels.config import ConfigError

  keys, lists = [], []
  for word in words:
    key, eq, values = word.partition("=")
    if not eq or not values:
      raise ConfigError("expected key=value", key="--vary", value=word, fix="--vary quota.tau=0.5,0.9")
    keys.append(key)
    lists.append(values.split(","))
  out = []
  for chosen in itertools.product(*lists):
    section = ml_collections.ConfigDict()
    for key, value in zip(keys, chosen):
      at = section
      for part in key.split(".")[:-1]:
        if part not in at:
          at[part] = ml_collections.ConfigDict()
        at = at[part]
      at[key.split(".")[-1]] = config.parse_value(value)
    varied = [f"{k}={v}" for k, v, all_ in zip(keys, chosen, lists) if len(all_) > 1]
    out.append((" ".join(varied), config.plain(section)))
  return out


def repetition(ids) -> tuple[int, int]:
  """(4-grams seen before in the text, 4-grams)."""
  grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
  return len(grams) - len(set(grams)), len(grams)


def judged(judge, model, prompts, written) -> list[tuple[float, int]]:
  """(bits, bytes) in the judge's eyes of each text (ids) written behind a prompt; empty ones are left out."""
  pairs = [(p, w) for p, w in zip(prompts, written) if len(w)]
  if judge.tokenizer.hash == model.tokenizer.hash:
    size = judge.tokenizer.token_bytes()
    scores = judge.score_ids(pairs)
    sizes = [int(size[w].sum()) for _, w in pairs]
  else:
    texts = [(model.tokenizer.decode(p), model.tokenizer.decode(w)) for p, w in pairs]
    texts = [t for t in texts if t[1]]
    scores, sizes = judge.score(texts), [len(w.encode()) for _, w in texts]
  return [(-s.nats / math.log(2), n) for s, n in zip(scores, sizes) if n]


def measure(judge, model, name: str, curve: str, setting: str, section, prompts, new: int) -> Point:
  """One point of a curve.

  Args:
    judge, model: TextModels. section: changes to the sampler section. prompts: ids of each.
    new: tokens to write behind each prompt at most.
  """
  from genmodels.evals.texts import Speed

  model.speed = Speed()
  written = model.write(prompts, [new] * len(prompts), section)
  speed = model.speed.report()
  scores = judged(judge, model, prompts, written)
  bits, size = (sum(x) for x in zip(*scores)) if scores else (0.0, 0)
  ratio = bits / size if size else math.nan
  n = len(scores)
  error = math.sqrt(n / (n - 1) * sum((b - ratio * s) ** 2 for b, s in scores)) / size if n > 1 else math.nan
  counts = Counter(int(t) for w in written for t in w)
  total = sum(counts.values())
  entropy = -sum(c / total * math.log2(c / total) for c in counts.values()) if total else 0.0
  again, grams = (sum(x) for x in zip(*(repetition(w.tolist()) for w in written)))
  return Point(
    name, curve, setting, speed["tokens_per_forward"], speed["tokens_per_second"], ratio, error, entropy,
    again / grams if grams else 0.0, n, total, len(written) - n,
  )  # fmt: skip


def held_out(model, count: int, given: int, new: int):
  """(prompts, what follows them) as ids: the beginnings of held-out documents long enough for both."""
  data = model.run.parts.data.heldout(model.rows)
  prompts, rest = [], []
  for i in range(data.plan.steps):
    batch = data.batch(i)
    for tokens, doc, occurrence in zip(batch["tokens"], batch["doc"], batch["occurrence"]):
      for d in sorted({int(x) for x in doc if x >= 0}):
        ids = tokens[doc == d]
        if occurrence[d] == 0 and len(ids) >= given + new and len(prompts) < count:
          prompts.append(ids[:given])
          rest.append(ids[given : given + new])
  return prompts, rest


def plot(points: Sequence[Point], judge: str, reference: float | None, path: pathlib.Path) -> None:
  """Bits per byte against tokens per forward, a line for every model and curve."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 4.5), layout="constrained")
  axes = figure.subplots()
  lines: dict[tuple[str, str], list[Point]] = {}
  for p in points:
    lines.setdefault((p.model, p.curve), []).append(p)
  for (model, curve), line in lines.items():
    line = sorted(line, key=lambda p: p.tokens_per_forward or 0)
    x, y = [p.tokens_per_forward for p in line], [p.bits_per_byte for p in line]
    axes.errorbar(x, y, [p.stderr for p in line], marker="o", capsize=2, label=f"{model} {curve}".strip())
    for p in line:
      if p.setting:
        label = p.setting.rpartition("=")[2]
        axes.annotate(
          label, (p.tokens_per_forward, p.bits_per_byte), (3, 4), textcoords="offset points", fontsize=7
        )
  if reference is not None:
    axes.axhline(reference, linestyle=":", color="grey", label="held-out text")
  axes.set_xscale("log", base=2)
  axes.xaxis.set_major_formatter("{x:g}")
  axes.set_xlabel("tokens per forward")
  axes.set_ylabel(f"bits per byte of what was written\n(judge: {judge})")
  axes.grid(alpha=0.3)
  axes.legend(fontsize=8)
  figure.savefig(path, dpi=150)


def table(points: Sequence[Point]) -> str:
  """The points as text."""
  number = lambda x, form: "–" if x is None else format(x, form)
  lines = [
    f"{'model':<24}{'setting':<28}{'tok/fwd':>8}{'tok/s':>8}{'bits/B':>8}{'±':>6}{'entropy':>8}{'repeat':>8}{'empty':>6}"
  ]
  for p in points:
    lines.append(
      f"{p.model:<24}{(p.setting or p.curve):<28}{number(p.tokens_per_forward, '.2f'):>8}"
      f"{number(p.tokens_per_second, '.0f'):>8}{p.bits_per_byte:>8.3f}{p.stderr:>6.3f}{p.entropy:>8.2f}"
      f"{p.repeated:>8.1%}{p.empty:>6}"
    )
  return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
  """The verb `genmodels curve`."""
  parser = argparse.ArgumentParser(
    prog="genmodels curve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("workdirs", nargs="+", help="folders of training runs, or imports")
  parser.add_argument("--judge", help="folder of the model that judges (default: the first one)")
  parser.add_argument(
    "--vary", nargs="+", action="append", help="key=value[,value…] of the sampler section; repeatable"
  )
  parser.add_argument(
    "--sampler", default="", help="a sampler file for all but the judge, see `genmodels systems`"
  )
  parser.add_argument("--prompts", type=int, default=64, help="held-out documents to continue")
  parser.add_argument("--given", type=int, default=32, help="tokens of each that are given")
  parser.add_argument("--new", type=int, default=64, help="tokens to write behind them")
  parser.add_argument("--batch-size", type=int, default=16, help="rows of a batch")
  parser.add_argument("--draws", type=int, default=32, help="draws of a judge's likelihood bound")
  parser.add_argument(
    "--block", type=int, default=0, help="block size to decode with (default: the trained one)"
  )
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--out", default="curve.png", help="the plot (.png, .svg, .pdf); JSON beside it")
  args = parser.parse_args(argv)

  import jax

  from genmodels.config import ConfigError
  from genmodels.evals.texts import TextConfig, TextModel
  from genmodels.sampling.run import load_run

  groups = [variations(words) for words in args.vary or [[]]]
  names = [" ".join(w for w in words if "," not in w) for words in args.vary or [[]]]
  length = args.given + args.new
  make = lambda folder, block, sampler="": TextModel(
    load_run(folder, sampler=sampler),
    TextConfig(batch_size=args.batch_size, draws=args.draws, block=block, length=length, seed=args.seed),
  )
  judge_at = args.judge or args.workdirs[0]
  judge = make(judge_at, 0 if args.judge else args.block)
  points, began, todo = [], time.monotonic(), len(args.workdirs) * sum(map(len, groups))
  reference = None
  for folder in args.workdirs:
    model = judge if folder == judge_at and not args.sampler else make(folder, args.block, args.sampler)
    prompts, rest = held_out(model, args.prompts, args.given, args.new)
    if not prompts:
      raise ConfigError(
        f"no held-out document of {folder} has {length} tokens", key="--new", value=args.new,
        fix="fewer --given and --new tokens",
      )  # fmt: skip
    if reference is None:
      scores = judged(judge, model, prompts, rest)
      reference = sum(b for b, _ in scores) / sum(n for _, n in scores)
    for name, group in zip(names, groups):
      for setting, section in group:
        point = measure(judge, model, pathlib.Path(folder).name, name, setting, section, prompts, args.new)
        points.append(point)
        left = (time.monotonic() - began) / len(points) * (todo - len(points))
        print(
          f"{len(points)}/{todo} {point.model} {setting or name}: {point.bits_per_byte:.3f} bits per byte at "
          f"{point.tokens_per_forward or math.nan:.2f} tokens per forward · about {left:.0f} s left",
          file=sys.stderr,
        )
  if jax.process_index():
    return 0
  path = pathlib.Path(args.out)
  path.parent.mkdir(parents=True, exist_ok=True)
  plot(points, pathlib.Path(judge_at).name, reference, path)
  body = {
    "judge": str(judge_at), "judge_exact": judge.exact, "held_out_bits_per_byte": reference,
    "given": args.given, "new": args.new, "points": [dataclasses.asdict(p) for p in points],
  }  # fmt: skip
  path.with_suffix(".json").write_text(json.dumps(body, indent=1), encoding="utf-8")
  print(table(points))
  print(f"held-out text: {reference:.3f} bits per byte; wrote {path} and {path.with_suffix('.json')}")
  return 0
