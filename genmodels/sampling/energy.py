"""Sampling with an energy over whole texts: of k drafts of a masked denoiser, one is taken by importance.

Inside a window of time, each step of masked diffusion draws k candidates x₀ for all that is masked, takes
candidate j with probability ∝ exp(−E_j), and reveals a part of it as the reverse process says (EDLM, Xu et
al. 2410.21357, algorithm 1). Two energies:

  ar    E = log μ(x₀ | x_t) − log p_AR(x₀), of an autoregressive model as it is: no training
  nce   E of a network that objective kind "energy_nce" has trained

This is self-normalised importance sampling: the error of a one-step draw is O(1/k). k = 1, or a step outside
of the window, is the denoiser's own, bit by bit.

Legend: B rows · N tokens of a row · M asked tokens · c tokens of a chunk · V vocabulary · k candidates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genmodels import config
from genmodels.config import ConfigError
from genmodels.contracts import CLEAN, TEXT, Array, Row
from genmodels.corruption import rng
from genmodels.objectives import Nets
from genmodels.sampling import draw
from genmodels.sampling.loop import Sampler
from genmodels.sampling.state import Ask, Result, State, put


@dataclasses.dataclass(frozen=True)
class Energy:
  """Base of energies: how many candidates, and when.

  Fields:
    path: workdir of the run that has the energy.
    size: k (the paper: 2 to 16).
    start, stop: the window, start ≥ t > stop; t falls from 1 (text all masked) to 0. The paper starts at 1 or
      0.6 and stops at 0.4 or 0.
  """

  path: str = ""
  size: int = 8
  start: float = 1.0
  stop: float = 0.4

  conditional = False  # the first token of a row has to be given

  def __post_init__(self):
    if self.size < 1:
      raise ValueError(f"size is {self.size}; at least 1 candidate")
    if not 0 <= self.stop <= self.start <= 1:
      raise ValueError(f"start is {self.start}, stop {self.stop}; expected 0 <= stop <= start <= 1")

  def load(self, load: Callable | None) -> tuple[Energy, Any]:
    """The energy with what its run holds, and the parameters.

    Raises:
      ConfigError: no run is named.
    """
    if not self.path or load is None:
      raise ConfigError(
        "the energy has no run", key="sampler.energy.path", value=self.path, fix="energy.path=<workdir>"
      )
    return self.of_run(load)

  def of_run(self, load: Callable) -> tuple[Energy, Any]:
    raise NotImplementedError

  def weight(self, own, a: Ask, row: Row, logq: Array) -> Array:
    """float32[B], −E of candidates up to a constant.

    Args:
      own: parameters. row: the candidates' rows. logq: float32[B], log μ(x₀ | x_t), of what is masked.
    """
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class AR(Energy):
  """−E = log p_AR(x₀) − log μ(x₀ | x_t).

  Fields:
    scorer: Sampler of the autoregressive run, filled in by `load`. It must have this run's tokenizer.
  """

  scorer: Any = None

  conditional = True

  def of_run(self, load):
    scorer, params = load(self.path)
    objective = scorer.objective
    if objective.terms[objective.likelihood].stream != CLEAN:
      raise ConfigError(
        "the likelihood of that run is a bound, not a probability", key="sampler.energy.path",
        value=self.path, fix="an autoregressive run (language/ar)",
      )  # fmt: skip
    return dataclasses.replace(self, scorer=scorer), params

  def weight(self, own, a, row, logq):
    # The prompt counts too: what stands behind a gap says something of what is in it.
    row = row.replace(role=jnp.where(row.doc >= 0, TEXT, row.role))
    model = lambda inputs, targets: self.scorer.model.apply(own, inputs, targets)
    nll, _ = self.scorer.objective.bound(Nets({"model": model}), row, jax.random.key(0), 0, 1)
    return -nll.sum(1) - logq


@dataclasses.dataclass(frozen=True)
class NCE(Energy):
  """−E of a trained network.

  Fields:
    name: of its tree in that run. network: filled in by `load`.
  """

  name: str = "energy"
  network: Any = None

  def of_run(self, load):
    network, params = load(self.path, self.name)
    return dataclasses.replace(self, network=network), params

  def weight(self, own, a, row, logq):
    at = a.only[..., 1]
    tokens = jnp.take_along_axis(row.tokens, jnp.maximum(at, 0), 1)
    energies, _ = self.network.apply(own, a.inputs, tokens, row.docs.occurrence.shape[1])
    return -energies[:, 0]  # a row to generate holds one document


REGISTRY = {"ar": AR, "nce": NCE}


@dataclasses.dataclass(frozen=True, eq=False)
class Energetic(Sampler):
  """A Sampler that takes one of k candidates by an energy; `energy.build` makes it.

  Fields:
    energy: with its network. own: its parameters.
  """

  energy: Energy = None
  own: Any = None

  def __call__(self, params, row: Row, key: Array, prefill: int | None = None) -> Result:
    """As Sampler; evaluations of the energy count as forwards."""
    return super().__call__((params, self.own), row, key, prefill)

  def check(self, row: Row) -> None:
    super().check(row)
    open_first = np.asarray((row.doc[:, 0] >= 0) & (row.role[:, 0] == TEXT))
    if self.energy.conditional and open_first.any():
      raise ValueError(
        f"row {int(open_first.argmax())} has no given token: an autoregressive model has no probability of a "
        "first token; start every prompt with BOS (role CONTEXT)"
      )

  def inside(self, s: State, a: Ask) -> Array:
    """bool[B]: rows whose step lies in the window and reveals something."""
    t = jnp.where(a.fresh, 1.0, s.level)
    return a.denoise & (t <= self.energy.start) & (t > self.energy.stop)

  def forward(self, params, row: Row, s: State, a: Ask, key: Array):
    picked, caches, forwards, kept = super().forward(params, row, s, a, key)
    more = self.energy.size if self.energy.size > 1 else 0
    return picked, caches, forwards + more * (self.inside(s, a).any() & (forwards > 0)), kept

  def predict(self, params, a: Ask, s: State, fn, xs):
    model, own = params
    if fn is not self.choice or self.energy.size == 1:
      return super().predict(model, a, s, fn, xs)
    (picked, tokens, logq, score), news = super().predict(model, a, s, self.candidates, xs)
    inside = self.inside(s, a)
    chosen = jax.lax.cond(
      inside.any(), lambda: self.choose(own, a, s, tokens, logq, xs), lambda: jnp.zeros_like(a.lo)
    )
    chosen = jnp.where(inside, chosen, 0)[:, None, None]
    of = lambda x: jnp.take_along_axis(x, jnp.broadcast_to(chosen, (*x.shape[:2], 1)), 2)[..., 0]
    return picked.replace(token=of(tokens), score=of(score)), news

  def candidates(self, logits: Array, k0: Array, k1: Array):
    """(Picked of the first, int32[c, k] candidates, float32[c, k] log μ, float32[c, k] scores); the first
    candidate is what the denoiser alone draws."""
    choice = self.choice
    first = choice(logits, k0, k1)
    raw = choice.logits(logits)
    z, logp = choice.filtered(raw), jax.nn.log_softmax(raw, -1)
    logq = jax.nn.log_softmax(z, -1)

    def another(j):  # one at a time: no [c, k, V]
      own = rng.threefry2x32(k0, k1, j, np.uint32(5))
      token = jnp.argmax(z + draw.gumbel(*own, z.shape[-1]), -1).astype(jnp.int32)
      return token, choice._score(token, logp, *own)

    token, score = jax.lax.map(another, jnp.arange(1, self.energy.size, dtype=jnp.uint32))
    tokens = jnp.concatenate([first.token[None], token]).T
    scores = jnp.concatenate([first.score[None], score]).T
    return first, tokens, jnp.take_along_axis(logq, tokens, 1), scores

  def choose(self, own, a: Ask, s: State, tokens: Array, logq: Array, xs) -> Array:
    """int32[B]: the candidate that each row takes, drawn ∝ exp(−E).

    Args:
      tokens: int32[B, M, k]. logq: float32[B, M, k].
    """

    def weigh(x):
      token, q = x
      row = a.row.replace(tokens=put(s.tokens, a.at, token, a.can))
      return self.energy.weight(own, a, row, jnp.where(a.can, q, 0.0).sum(1))

    weights = jax.lax.map(weigh, (jnp.moveaxis(tokens, -1, 0), jnp.moveaxis(logq, -1, 0)))
    keys = rng.threefry2x32(xs[0][:, 0], xs[1][:, 0], np.uint32(0), np.uint32(6))
    return jnp.argmax(weights.T + draw.gumbel(*keys, self.energy.size), 1).astype(jnp.int32)


def section(value) -> Energy:
  """The energy of a kind, of a section with one, or of an Energy.

  Raises:
    ConfigError: an unknown kind, a wrong key or value.
  """
  return config.build_kind(REGISTRY, {"kind": value} if isinstance(value, str) else value, "energy")


def build(sampler: Sampler, energy: Energy, load: Callable | None = None) -> Energetic:
  """The sampler with an energy.

  Args:
    load: workdir → (Sampler of that run, its parameters); (workdir, tree) → (network, its parameters).

  Raises:
    ConfigError: a sampler that does not draw whole texts, or not as the reverse process does.
  """

  def law(broken: bool, reason: str, key: str, value, fix: str):
    if broken:
      raise ConfigError(reason, key=f"sampler.{key}", value=value, fix=fix)

  kind = getattr(sampler.quota, "_config_kind", type(sampler.quota).__name__)
  law(
    not (sampler.whole and sampler.denoises), "a candidate is a whole text, this sampler decodes blocks",
    "energy", type(energy).__name__, "a run of language/mdlm or llada",
  )  # fmt: skip
  law(
    not sampler.quota.timed, "the window is one of the times of the reverse process", "quota", kind,
    "quota='ancestral'",
  )  # fmt: skip
  law(
    sampler.choice.temperature == 0, "at temperature 0 all candidates are the same", "temperature", 0,
    "temperature=1",
  )  # fmt: skip
  law(
    sampler.branches > 1 or bool(sampler.choice.extras) or sampler.policy.partial is not None,
    "importance weights are those of one plain distribution a step", "energy", type(energy).__name__,
    "no guidance, mixture, stop rule or partial cache beside it",
  )  # fmt: skip
  energy, own = energy.load(load)
  fields = {f.name: getattr(sampler, f.name) for f in dataclasses.fields(Sampler)}
  return Energetic(**fields, energy=energy, own=own)
