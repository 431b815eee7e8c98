"""Likelihood: exact for next-token and next-scale models, an unbiased bound for diffusion.

One estimator for the evaluations of a training run, for `genmodels eval` and for sweeps:
`objective.bound` masks exactly k tokens of a unit and weights them by n/k, with k stratified over the R
draws of a document. The draws are keyed by the document and a fixed tag in place of the step, so two
models, or two steps of one run, meet the same noise: common random numbers.

Legend: B rows · D documents of a row.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from genmodels.config import ConfigError
from genmodels.contracts import CLEAN, Row
from genmodels.parallel import rules
from genmodels.parallel.rules import current_mesh
from genmodels.step import bind


@dataclasses.dataclass
class Tally:
  """Sums per document, in float64 on the host.

  `add` one batch after the other, `report` the ratios.
  """

  nll: list = dataclasses.field(default_factory=list)  # mean over draws, nats
  spread: list = dataclasses.field(default_factory=list)  # variance of that mean, nats²
  tokens: list = dataclasses.field(default_factory=list)
  size: list = dataclasses.field(default_factory=list)  # bytes

  def add(self, draws: np.ndarray, tokens: np.ndarray, size: np.ndarray | None = None) -> None:
    """Adds documents.

    Args:
      draws: [R, n] nats. tokens: [n] predicted tokens; documents without any are left out.
      size: [n] bytes of the predicted tokens, or None.
    """
    keep = tokens > 0
    draws = np.asarray(draws, np.float64)[:, keep]
    self.nll.append(draws.mean(0))
    R = len(draws)
    self.spread.append(draws.var(0, ddof=1) / R if R > 1 else np.zeros(draws.shape[1]))
    self.tokens.append(np.asarray(tokens, np.float64)[keep])
    self.size.append(np.asarray(np.zeros_like(tokens) if size is None else size, np.float64)[keep])

  @property
  def documents(self) -> int:
    return sum(map(len, self.nll))

  def report(self) -> dict:
    """The result.

    Returns:
      nats_per_token, bits_per_token, perplexity; bits_per_byte, where there are bytes; stderr: of
      bits_per_token over documents, as a sample of all documents, where there are several; stderr_draws: what
      the finite number of draws contributes, 0 for an exact likelihood; documents, tokens, bytes.

    Raises:
      ValueError: no document has a predicted token.
    """
    nll, spread, n, size = (
      np.concatenate(x) if x else np.zeros(0) for x in (self.nll, self.spread, self.tokens, self.size)
    )
    total, tokens, count = nll.sum(), n.sum(), len(nll)
    if not tokens:
      raise ValueError("no document has a predicted token: is the held-out set empty?")
    ratio = total / tokens
    bits = 1 / math.log(2)
    out = {"nats_per_token": ratio, "bits_per_token": ratio * bits, "perplexity": math.exp(min(ratio, 700.0))}
    if size.sum():
      out["bits_per_byte"] = total * bits / size.sum()
    if count > 1:
      out["stderr"] = math.sqrt(count / (count - 1) * np.sum((nll - ratio * n) ** 2)) / tokens * bits
    out["stderr_draws"] = math.sqrt(spread.sum()) / tokens * bits
    return out | {"documents": count, "tokens": int(tokens), "bytes": int(size.sum())}


class Likelihood:
  """likelihood(trees, row, key) → (nats float64[R, B·D], tokens float64[B·D]); one compiled program.

  Args:
    objective: at the block size to evaluate (sampling.at_step).
    fns: {name: fn(trees, inputs, targets, **kw) -> Outputs}, as the training step takes them.
    latent: the bound latent or None.
    draws: R.
  """

  def __init__(self, objective, fns: Mapping[str, Callable], latent: Any = None, draws: int = 16):
    check(objective)
    self.objective, self.fns, self.latent = objective, fns, latent
    self.draws = 1 if self.exact else draws
    mesh = current_mesh()
    out = rules.replicated(mesh) if mesh is not None else None
    self._one = jax.jit(self._bound, out_shardings=out)
    # Several programs with collectives in flight deadlock host devices on few cores.
    blocked = mesh is not None and mesh.size > 1 and jax.default_backend() == "cpu"
    self._ready = jax.block_until_ready if blocked else lambda x: x

  @property
  def exact(self) -> bool:
    """Every draw is the likelihood itself."""
    return self.objective.exact

  def _bound(self, trees, row, key, r):
    nets = bind(self.fns, trees, self.latent, player="")
    return self.objective.bound(nets, row, key, r, self.draws)

  def __call__(self, trees, row: Row, key) -> tuple[np.ndarray, np.ndarray]:
    # All draws are dispatched before the first is fetched.
    out = [self._ready(self._one(trees, row, key, np.int32(r))) for r in range(self.draws)]
    out = jax.device_get(out)
    nll = np.stack([np.asarray(n, np.float64).reshape(-1) for n, _ in out])
    return nll, np.asarray(out[0][1], np.float64).reshape(-1)


def check(objective) -> None:
  """Raises ConfigError if the sum is no likelihood bound."""
  term = objective.terms[objective.likelihood]
  if term.stream != CLEAN and term.align == "shift" and not objective.corruption.blocks.whole:
    raise ConfigError(
      "no likelihood: the first token of a block is read from a noisy slot of the block before, which no "
      "factorisation allows", key=f"objective.terms.{objective.likelihood}.align", value="shift",
      fix="align='shift_clean_boundary', or objective.likelihood=<another term>",
    )  # fmt: skip


def notes(objective) -> list[str]:
  """What a reader of the number must know."""
  out = [f"no likelihood of texts: {objective.measures}"] if objective.measures else []
  corruption = objective.corruption
  band = getattr(corruption, "band", None)
  if band is not None and (band[0].max(), band[1].min()) != (0.0, 1.0):
    lo, hi = (b.to_json() for b in band)
    first = "at first " if corruption.search is not None and corruption.search.every else ""
    out.append(
      f"trained on clipped noise levels, {first}[{lo}, {hi}]; the bound here is unclipped, so it is a bound"
    )
  if objective.reproduction:
    out.append(  # as objectives.laws words it
      "reproduction: the training loss is not a likelihood bound; reported likelihoods use the exact one"
    )
  return out
