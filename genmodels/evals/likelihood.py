"""Held-out likelihood: exact for autoregressive models, a bound with exact counts for diffusion.

One estimator for the periodic evaluation of a run and for `genmodels eval`: for every document R draws of
the bound, stratified over the number of masked tokens (draw r of R; language.md §0.3 of the specs, LLaDA
2502.09992 eq. 6), with noise keyed by (seed, example, r) and a fixed tag instead of the step. Two models
evaluated with the same seed and R see the same masks, so their difference has little variance.

Legend: B rows · D documents of a row.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Iterable

import jax
import numpy as np

from genmodels import system
from genmodels.parallel import multihost, rules
from genmodels.step import bind

METRIC = "nats_per_token"


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """Section `eval`.

  Fields:
    every: training steps between evaluations (and one at the end); 0 never evaluates.
    documents: held-out documents, rounded up to whole batches; 0 takes all.
    draws: R, draws of the bound per document. An autoregressive likelihood is exact and takes one.
    batch_size: rows of an evaluation batch; 0 takes the training batch.
  """

  every: int = 0
  documents: int = 256
  draws: int = 16
  batch_size: int = 0

  def __post_init__(self):
    if self.draws < 1:
      raise ValueError(f"draws is {self.draws}; it must be at least 1")


class Evaluator:
  """Evaluates trees on held-out data; compiled once.

  Args:
    cfg: see EvalConfig.
    parts: the system.
    mesh: batches are laid over it as in training.
    key: the key of the noise.
    batches: batch dicts instead of the held-out set (a user's file), all rows of each.
  """

  def __init__(self, cfg: EvalConfig, parts: system.System, mesh, key, batches: Iterable[dict] | None = None):
    self.cfg, self.parts, self.mesh, self.key = cfg, parts, mesh, key
    self.batch_size = cfg.batch_size or int(parts.cfg.batch_size)
    self._batches = batches
    self._bound = jax.jit(self._one)

  @property
  def exact(self) -> bool:
    """Whether the likelihood is exact and one draw is enough."""
    return not self.parts.objective.layout.noisy

  @property
  def draws(self) -> int:
    return 1 if self.exact else self.cfg.draws

  def _one(self, trees, row, key, r):
    nets = bind(self.parts.fns, trees, self.parts.latent, player="")
    return self.parts.objective.bound(nets, row, key, r, self.draws)

  def rows(self):
    """(batch dict of this process, bytes int64[b, D]) until enough documents are seen."""
    if self._batches is not None:
      for batch in self._batches:
        yield batch, self.parts.data.bytes_of(batch)
      return
    data = self.parts.data.heldout(self.batch_size)
    ranges = multihost.row_ranges(rules.row_sharding(self.mesh), self.batch_size)
    seen = 0
    for step in range(data.plan.steps):
      whole = data.batch(step)
      seen += _documents(whole)
      batch = data.batch(step, ranges) if jax.process_count() > 1 else whole
      yield batch, data.bytes_of(whole)
      if self.cfg.documents and seen >= self.cfg.documents:
        return

  def __call__(self, trees: dict) -> dict[str, Any]:
    """The likelihood of the trees.

    Returns:
      "nats_per_token", "bits_per_token", "bits_per_byte" (absent where data have no bytes), "stderr"
      (of nats_per_token, over documents), "documents", "tokens", "bytes", "draws", "exact".
    """
    nll, tokens, bytes_ = [], [], 0
    with rules.use_mesh(self.mesh):
      for batch, size in self.rows():
        b = size.shape[0]
        row = system.row_of(multihost.global_batch(batch, self.mesh, b))
        total = 0.0
        for r in range(self.draws):
          got, count = self._bound(trees, row, self.key, np.int32(r))
          total = total + got
        total, count = (np.asarray(multihost.fetch(x), np.float64) for x in (total, count))
        nll.append(total.ravel() / self.draws)
        tokens.append(count.ravel())
        bytes_ += int(size.sum())
    nll, tokens = np.concatenate(nll), np.concatenate(tokens)
    keep = tokens > 0
    nll, tokens = nll[keep], tokens[keep]
    mean = nll.sum() / tokens.sum()
    # Of a ratio of sums over documents (delta method).
    spread = nll - mean * tokens
    stderr = math.sqrt((spread**2).sum() / max(len(nll) - 1, 1) * len(nll)) / tokens.sum()
    out = {
      "nats_per_token": float(mean),
      "bits_per_token": float(mean / math.log(2)),
      "stderr": float(stderr),
      "documents": int(len(nll)),
      "tokens": int(tokens.sum()),
      "draws": self.draws,
      "exact": self.exact,
    }
    if bytes_:
      out |= {"bits_per_byte": float(nll.sum() / math.log(2) / bytes_), "bytes": bytes_}
    return out


def _documents(batch: dict) -> int:
  return int(sum(len(np.unique(d[d >= 0])) for d in batch["doc"]))
