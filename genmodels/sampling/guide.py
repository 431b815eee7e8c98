"""Guided diffusion: a small autoregressive model decides which of the denoiser's proposals are committed.

In each step the denoiser proposes a token for everything that is masked in its window, and the guide reads
the row with these proposals once. A proposal *agrees* if it is the guide's likeliest token behind all that
stands before it, proposals included (Hu et al., 2505.21467, "Accelerating Diffusion Language Model Inference
via Efficient KV Caching and Guided Diffusion"; details are unverified). The guide writes no token: it raises
the score of those that agree above every other score, so that

  quota threshold, tau 1, commit leftmost    commits the run of agreeing tokens at the left end
  quota threshold, tau 1, commit anywhere    commits every token that agrees

and at least one token, the first or the surest. A lower tau also commits what the denoiser alone is sure of.

Legend: B rows · N tokens of a row · M asked tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from genmodels import config, rows
from genmodels.config import ConfigError
from genmodels.contracts import CLEAN, Array, Row, Target
from genmodels.sampling import active
from genmodels.sampling.commit import Leftmost
from genmodels.sampling.loop import Sampler
from genmodels.sampling.state import Ask, Result, State, at_coordinate, put

SCORES = ("prob", "margin", "random")  # in [0, 1]
ABOVE = 2.0  # added to the score of a token that agrees


@dataclasses.dataclass(frozen=True)
class Guide:
  """Section `sampler.guide`.

  Fields:
    path: workdir of an autoregressive run with the same tokenizer.
    scorer: its Sampler, filled in by `load`.
  """

  path: str = ""
  scorer: Any = None

  def load(self, load: Callable | None) -> tuple[Guide, Any]:
    """The guide with its run's sampler, and the parameters.

    Raises:
      ConfigError: no run is named, or one that is not autoregressive.
    """
    if not self.path or load is None:
      raise ConfigError(
        "the guide has no run", key="sampler.guide.path", value=self.path, fix="guide.path=<workdir>"
      )
    scorer, params = load(self.path)
    if not scorer.single or scorer.objective.terms[scorer.term].stream != CLEAN:
      raise ConfigError(
        "a guide predicts each token from those before it", key="sampler.guide.path", value=self.path,
        fix="an autoregressive run (language/ar)",
      )  # fmt: skip
    return dataclasses.replace(self, scorer=scorer), params

  def tokens(self, own, row: Row, at: Array, ask: Array) -> Array:
    """int32[B, M]: the likeliest tokens of a row, each behind all before it; −1 where none is asked for, or
    where it has no predictor.

    Args:
      own: the guide's parameters. at: int32[B, M], coordinates. ask: bool[B, M], those asked for.
    """
    s = self.scorer
    n = jnp.broadcast_to(rows.coordinates(row.doc), row.doc.shape)
    only = active.pairs(jnp.full((n.shape[0], 1), s.stream), n, row.doc >= 0)
    inputs, read = s.view(row, s.objective.corruption.state(row, row.doc >= 0), only, 0)
    slot = jnp.where(ask, at_coordinate(read[s.term], at), -1)
    known = slot >= 0
    target = Target(s.objective.terms[s.term].head, slot, jnp.zeros_like(slot), known.astype(jnp.float32))
    dist = s.model.apply(own, inputs, {s.term: target}).dists[s.term]
    best = dist.map(lambda z: jnp.argmax(s.choice.logits(z), -1).astype(jnp.int32))
    return jnp.where(known, best, -1)


@dataclasses.dataclass(frozen=True, eq=False)
class Guided(Sampler):
  """A Sampler with a guide; `guide.build` makes it.

  Fields:
    guide: with its run's sampler. own: its parameters.
  """

  guide: Guide = None
  own: Any = None

  def __call__(self, params, row: Row, key: Array, prefill: int | None = None) -> Result:
    """As Sampler; evaluations of the guide count as forwards, not among `calls`."""
    return super().__call__((params, self.own), row, key, prefill)

  def start(self, params, row: Row, prefill: int, key: Array | None = None) -> State:
    return super().start(params[0], row, prefill, key)

  def logits(self, params, row: Row, s: State, key: Array | None = None):
    return super().logits(params[0], row, s, key)

  def forward(self, params, row: Row, s: State, a: Ask, key: Array):
    params, own = params
    picked, caches, forwards, kept = super().forward(params, row, s, a, key)
    asks = a.can & a.under

    def agreeing():
      proposed = a.row.replace(tokens=put(s.tokens, a.at, picked.token, a.can))
      return asks & (self.guide.tokens(own, proposed, a.at, asks) == picked.token)

    some = asks.any()
    agrees = jax.lax.cond(some, agreeing, lambda: jnp.zeros_like(asks))
    if isinstance(self.commit, Leftmost):  # behind a token that is not the guide's own its opinion is void
      agrees &= jnp.cumprod(agrees | ~asks, 1).astype(bool)
    picked = picked.replace(score=picked.score + ABOVE * agrees)
    return picked, caches, forwards + some, kept


def section(value) -> Guide:
  """The Guide of a section, a path or a Guide.

  Raises:
    ConfigError: a wrong key or value.
  """
  return config.build(Guide, {"path": value} if isinstance(value, str) else value, "guide")


def build(sampler: Sampler, guide: Guide, load: Callable | None = None) -> Guided:
  """The sampler with a guide.

  Args:
    load: workdir → (Sampler of that run, its parameters).

  Raises:
    ConfigError: a sampler whose commits a guide cannot decide.
  """

  def law(broken: bool, reason: str, key: str, value, fix: str):
    if broken:
      raise ConfigError(reason, key=f"sampler.{key}", value=value, fix=fix)

  cfg, quota = sampler.cfg, sampler.quota
  kind = getattr(quota, "_config_kind", type(quota).__name__)
  law(
    not sampler.denoises, "each token is predicted once and stored: there is nothing to choose among",
    "guide", guide.path, "a masked or block diffusion run",
  )  # fmt: skip
  law(
    quota.timed or bool(quota.scores), "the quota knows of no agreement", "quota", kind,
    "quota={'kind': 'threshold', 'tau': 1.0}",
  )  # fmt: skip
  law(
    cfg.score.kind not in SCORES, "agreement is ranked above scores of at most 1 and at least 0", "score",
    cfg.score.kind, "score='prob'",
  )  # fmt: skip
  law(
    cfg.score.eos != 1 or cfg.score.distance != 0, "these would lower the score of tokens that agree",
    "score", "eos, distance", "score={'eos': 1, 'distance': 0}",
  )  # fmt: skip
  law(
    sampler.remask.active, "what is opened again is chosen by its score when it was committed", "remask",
    type(sampler.remask).__name__, "remask='never'",
  )  # fmt: skip
  law(
    sampler.policy.partial is not None and sampler.policy.partial.foresees,
    "the cache knows what a step commits before its predictions", "cache", sampler.policy.name,
    "cache='free'",
  )  # fmt: skip
  guide, own = guide.load(load)
  fields = {f.name: getattr(sampler, f.name) for f in dataclasses.fields(Sampler)}
  return Guided(**fields, guide=guide, own=own)
