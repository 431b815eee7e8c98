"""Cache policies of one system: slots computed, drift from no cache, time per step. One table.

  python benchmarks/caches.py --workdir runs/llada                       a trained run
  python benchmarks/caches.py --config configs/language/llada.py:tiny    fresh parameters
  python benchmarks/caches.py --workdir runs/fast_dllm_v2 --policies none,block_exact,dual sampler.sub_block=4

Rows have prompts of unequal lengths, of random ids, and are generated to the end. Slots are those executed:
the padding of rows and calls too. Drift is the largest |Δ logit| between the cache's logits and those of the
same state without any cache, over the tokens predicted: the largest of all steps, and the mean over steps.
Seconds are the median of generations after one that compiles; those of a CPU say little about an accelerator.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
import numpy as np

from genmodels import config, sampling, system
from genmodels.sampling import partial


def main(argv=None) -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workdir", default="")
  parser.add_argument("--config", default="")
  parser.add_argument("--policies", default="none,prefix,dual,vicinity,free,delayed,logit_selective")
  parser.add_argument("--refresh", type=int, default=-1, help="of every partial policy; −1: its default")
  parser.add_argument("--prompts", default="4,9,15,26", help="tokens of each row's prompt")
  parser.add_argument("--repeats", type=int, default=0, help="timed generations; 0: not timed")
  args, overrides = parser.parse_known_args(argv)
  if args.workdir:
    run = sampling.load_run(args.workdir, overrides=overrides)
    parts, params, step = run.parts, run.trees["model"], run.step
  else:
    with tempfile.TemporaryDirectory() as folder:
      parts, step = system.build(config.load(args.config, overrides), workdir=folder), 0
    params = jax.jit(parts.model.init)(jax.random.key(0))
  length = parts.data.meta.seq_len
  rng = np.random.default_rng(0)
  prompts = [rng.integers(0, 100, int(n)) for n in args.prompts.split(",")]
  row = sampling.prompt_row(prompts, length, length, axes=parts.data.meta.axes)
  print(f"{parts.cfg.name} · {len(prompts)} rows of {length} tokens, prompts of {args.prompts}")
  print("| policy | exact | steps | slots/step | slots/token | largest drift | mean drift | seconds |")
  print("|---|---|---|---|---|---|---|---|")
  for name in args.policies.split(","):
    section = dict(config.plain(parts.cfg.sampler)) | {"cache": name, "eos": -2}
    if name in partial.REGISTRY:
      fields = {} if args.refresh < 0 else {"refresh": args.refresh}
      section["cache"] = {"kind": name} | fields
    sampler = sampling.sampler_of(parts, step, section)
    result = sampler(params, row, jax.random.key(1))
    off, s = partial.drift(sampler, params, row, jax.random.key(1), int(result.steps))
    off = np.asarray(off).max(1)
    seconds = []
    for _ in range(args.repeats):
      start = time.perf_counter()
      jax.block_until_ready(sampler(params, row, jax.random.key(1)))
      seconds.append(time.perf_counter() - start)
    slots = int(result.memory["cache"]["slots"])
    spent = f"{statistics.median(seconds):.3f}" if seconds else "–"
    print(
      f"| {name} | {'yes' if sampler.policy.exact else 'no'} | {int(result.steps)} "
      f"| {slots / int(result.steps):.1f} | {float(result.slots_per_token):.1f} "
      f"| {off.max():.2g} | {off.mean():.2g} | {spent} |",
      flush=True,
    )
  return 0


if __name__ == "__main__":
  sys.exit(main())
