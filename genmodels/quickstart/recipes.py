"""The three runs of a quickstart: their configs, and how long the last one is.

All share one trunk, one tokenizer and one batch; they are the systems language/ar, language/nbdiff and
language/mdlm with other sizes, so whatever holds for them holds for those files.
"""

from __future__ import annotations

import os

import jax
import ml_collections
import numpy as np

from genmodels import config, metrics, objectives, optim, system
from genmodels import step as steps
from genmodels.contracts import Outputs

AR_STEPS, CONVERT_STEPS = 120, 40
BLOCKS = (4, 8, 16)
PARTS = ("ar", "convert", "scratch")
TITLES = {
  "ar": "AR pretraining",
  "convert": "conversion to block diffusion",
  "scratch": "masked diffusion from scratch",
}
TOKENIZER, FILES, HELD_OUT = "bpe:1024", 300, 0.02

MODEL = dict(
  width=128, layers=4, num_heads=4, num_kv_heads=4, head_dim=32, mlp=352, vocab_multiple=8, qk_norm="rms",
  dtype="float32",
)  # fmt: skip


def scaled(steps: int, scale: float) -> int:
  """Steps under --steps-scale, at least 10."""
  return max(10, round(steps * scale))


def recipe(part: str, root: str, *, scale: float = 1.0, steps: int = 0) -> ml_collections.ConfigDict:
  """The config of one run.

  Args:
    part: "ar", "convert" or "scratch".
    root: the quickstart's workdir; data in ROOT/data, runs in ROOT/<part>.
    scale: multiplies the lengths of "ar" and "convert".
    steps: length of "scratch", see `equal_steps`.
  """
  base = {"ar": "language/ar:tiny", "convert": "language/nbdiff:tiny", "scratch": "language/mdlm:tiny"}[part]
  cfg = config.load(base)
  cfg.batch_size = 16
  cfg.model.update(MODEL)
  cfg.data = {"kind": "text", "path": os.path.join(root, "data"), "seq_len": 256}
  cfg.eval = {"every": 0, "documents": 96, "draws": 8}
  cfg.optim = {"name": "muon", "lr": 6e-3, "weight_decay": 0.1, "b2": 0.95}
  if part == "ar":
    n = scaled(AR_STEPS, scale)
    cfg.optim.schedule = {"kind": "wsd", "warmup": max(n // 15, 1), "decay_steps": n // 3}
  elif part == "convert":
    n = scaled(CONVERT_STEPS, scale)
    cfg.optim.lr = 4e-3
    cfg.optim.schedule = {"kind": "linear", "warmup": max(n // 10, 1)}
    at = tuple(n * i // 8 for i in range(5))  # half of the run climbs, half stays at the largest block
    cfg.objective.corruption.blocks.size = {"kind": "steps", "values": (1, 2, 4, 8, 16), "at": at}
    cfg.objective.terms.diffusion.update(weight="nelbo", normaliser="all_valid")
    cfg.init = {"kind": "workdir", "path": os.path.join(root, "ar")}
  else:
    n = steps
    cfg.optim.schedule = {"kind": "wsd", "warmup": max(n // 15, 1), "decay_steps": n // 3}
  cfg.train = {"steps": n, "log_every": 1, "save_every": max(n // 3, 1), "tensorboard": False}
  cfg.checkpoint = {"keep_last": 2}
  cfg.sampler = {"top_p": 0.9, "length": 112}
  if part == "scratch":
    cfg.sampler.quota = {"kind": "ancestral", "steps": 64}
  return cfg


def step_flops(cfg: ml_collections.ConfigDict):
  """Yields the model FLOPs of each training step, counted from what the step's batch and masks ask for.

  The same count as the trainer's, without running the model: slots, allowed pairs and read positions
  are known once `prepare` has drawn the noise.
  """
  parts = system.build(cfg)
  model, objective = parts.model, parts.objective
  ocfg = config.build(optim.OptimConfig, cfg.optim, "optim")
  numbers = steps.flop_counts(parts, optim.trainable(ocfg, model.abstract_params()))["model"]

  @jax.jit
  def count(row, key, step):
    inputs, targets, _ = objective.prepare(row, key, step, parts.latent)
    pairs = {p: inputs.masks[p].pairs() for p in model.cfg.patterns}
    done = Outputs({}, work={"slots": (inputs.doc >= 0).sum(dtype=np.int32), "pairs": pairs})
    return objectives.base.work(done, targets)

  key = jax.random.key(int(cfg.seed))
  for step in range(1 << 20):
    row = system.row_of(parts.data.batch(step))
    work = jax.device_get(count(row, key, np.int32(step)))
    yield metrics.step_flops(numbers, steps.counted(work))["total"]


def total_flops(cfg: ml_collections.ConfigDict) -> float:
  """Model FLOPs of a whole run."""
  counts = step_flops(cfg)
  return float(sum(next(counts) for _ in range(int(cfg.train.steps))))


def equal_steps(root: str, budget: float) -> int:
  """The first number of from-scratch steps whose counted FLOPs reach `budget`."""
  done = 0.0
  for n, flops in enumerate(step_flops(recipe("scratch", root, steps=1)), 1):
    done += flops
    if done >= budget:
      return n
  raise AssertionError
