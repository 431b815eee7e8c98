"""`genmodels lm-eval`: tasks of the EleutherAI evaluation harness on a run or an imported checkpoint.

  genmodels lm-eval runs/qwen3 --tasks lambada_openai,hellaswag --limit 200
  genmodels lm-eval runs/sdar --tasks gsm8k --fewshot 4 --new 256 --out results.json sampler.quota.tau=0.9
  genmodels lm-eval runs/bd3lm --tasks mine --include-path tasks/ --draws 128 --block 16

Multiple choice and perplexity use the likelihood: exact for next-token models, the exact-count bound for
diffusion models, so their scores are lower bounds of log p and perplexities upper bounds. Generation uses
the run's sampler; a task that does not sample is decoded at temperature 0. Overrides are keys of the stored
config. The harness is an extra: pip install 'genmodels[eval]'.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import sys
from collections.abc import Mapping

EXTRA = "pip install 'genmodels[eval]'"


def sampling_of(settings: Mapping) -> dict:
  """Changes to the sampler section that a task's generation settings ask for (`do_sample`, `temperature`,
  `top_p`, `top_k`): without sampling, temperature 0."""
  out = {k: settings[k] for k in ("temperature", "top_p", "top_k") if settings.get(k) is not None}
  if not settings.get("do_sample", float(settings.get("temperature") or 0) > 0):
    return {"temperature": 0.0}
  return out | {"temperature": float(out.get("temperature", 1.0))}


@functools.cache
def adapter_class():
  """The harness's model class over a `texts.TextModel`.

  Raises:
    ConfigError: lm_eval is not installed.
  """
  try:
    from lm_eval.api.model import LM
  except ImportError as e:
    from genmodels.config import ConfigError

    raise ConfigError(f"the evaluation harness cannot be imported ({e})", key="lm_eval", fix=EXTRA) from None

  class GenmodelsLM(LM):
    """`lm_eval` requests answered by a TextModel."""

    def __init__(self, model, name: str = "genmodels"):
      super().__init__()
      self.model, self.name, self.cut = model, name, 0

    def loglikelihood(self, requests, disable_tqdm: bool = False):
      scores = self.model.score([r.args for r in requests])
      self.cut += sum(s.cut > 0 for s in scores)
      return [(s.nats, s.greedy) for s in scores]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False):
      return [s.nats for s in self.model.rolling([r.args[0] for r in requests])]

    def generate_until(self, requests, disable_tqdm: bool = False):
      groups: dict[str, list[int]] = {}
      for i, r in enumerate(requests):
        groups.setdefault(json.dumps(r.args[1], sort_keys=True), []).append(i)
      out: list = [None] * len(requests)
      for text, members in groups.items():
        settings = json.loads(text)
        until = settings.get("until") or []
        written = self.model.generate(
          [requests[i].args[0] for i in members], int(settings.get("max_gen_toks") or 0),
          [until] if isinstance(until, str) else until, sampling_of(settings),
        )  # fmt: skip
        for i, answer in zip(members, written):
          out[i] = answer
      return out

    @property
    def tokenizer_name(self) -> str:
      return self.name

  return GenmodelsLM


def main(argv: list[str] | None = None) -> int:
  """The verb `genmodels lm-eval`."""
  parser = argparse.ArgumentParser(
    prog="genmodels lm-eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("workdir", help="folder of a training run, or an import")
  parser.add_argument("--tasks", required=True, help="names of tasks, separated by commas")
  parser.add_argument("--include-path", help="folder of more task definitions (YAML)")
  parser.add_argument("--fewshot", type=int, help="examples in the prompt (default: the task's)")
  parser.add_argument("--limit", type=int, help="questions of each task at most")
  parser.add_argument("--step", type=int, help="checkpoint to take (default: the newest that verifies)")
  parser.add_argument("--batch-size", type=int, default=8, help="rows of a batch")
  parser.add_argument("--draws", type=int, default=32, help="draws of the likelihood bound")
  parser.add_argument("--block", type=int, default=0, help="block size (default: the trained one)")
  parser.add_argument("--length", type=int, default=0, help="tokens of a row (default: the context)")
  parser.add_argument("--new", type=int, default=256, help="tokens to generate where the task does not say")
  parser.add_argument(
    "--bos", choices=("auto", "always", "never"), default="auto", help="begin texts with BOS"
  )
  parser.add_argument(
    "--greedy", action="store_true", help="decode to say whether a bounded answer is greedy"
  )
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--out", help="write the results there as JSON")
  parser.add_argument("overrides", nargs="*", help="key.path=value on the stored config")
  args = parser.parse_intermixed_args(argv)
  adapter = adapter_class()  # before the model is loaded: it may be missing

  import jax
  import lm_eval
  from lm_eval.tasks import TaskManager

  from genmodels.evals.texts import TextConfig, TextModel
  from genmodels.sampling.run import load_run

  run = load_run(args.workdir, args.step, args.overrides)
  cfg = TextConfig(
    batch_size=args.batch_size, draws=args.draws, block=args.block, length=args.length, new=args.new,
    bos=args.bos, greedy=args.greedy, seed=args.seed,
  )  # fmt: skip
  lm = adapter(TextModel(run, cfg), str(args.workdir))
  found = lm_eval.simple_evaluate(
    lm, tasks=args.tasks.split(","), num_fewshot=args.fewshot, limit=args.limit,
    task_manager=TaskManager(include_path=args.include_path), log_samples=False, bootstrap_iters=1000,
  )  # fmt: skip
  if jax.process_index():
    return 0
  body = {
    "workdir": str(args.workdir), "step": run.step, "block": args.block,
    "likelihood": "exact" if lm.model.exact else f"bound of {args.draws} draws",
    "contexts_cut": lm.cut, "speed": lm.model.speed.report(), "notes": list(run.parts.notes),
    "results": found["results"], "versions": found["versions"], "n-samples": found["n-samples"],
  }  # fmt: skip
  if args.out:
    pathlib.Path(args.out).write_text(json.dumps(body, indent=1, default=str), encoding="utf-8")
  print(lm_eval.utils.make_table(found))
  print(f"likelihood: {body['likelihood']}" + (f"; {lm.cut} contexts cut" if lm.cut else ""))
  if lm.model.speed.tokens:
    rate = body["speed"]["tokens_per_second"]
    print(
      f"{lm.model.speed.tokens} tokens, {body['speed']['tokens_per_forward']:.2f} per forward"
      + (f", {rate:.1f} per second" if rate else "")
    )
  for text in body["notes"]:
    print(f"note: {text}", file=sys.stderr)
  return 0
