"""Filling masks from left to right by two networks (MARIA, Israel et al. 2502.06901).

The network beside the model sees the row once, with every open token masked; its states are kept. The model
decodes the open tokens in their order as any next-token model does: its cache holds the tokens before the
front, given and filled ones alike, so it is exact, and the head reads both states.

Legend: B rows · N tokens of a row · M asked tokens · V vocabulary · E width of the network beside.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from genmodels import rows
from genmodels.config import ConfigError
from genmodels.contracts import Array, Row, Target
from genmodels.corruption.base import eligible
from genmodels.sampling.loop import Sampler
from genmodels.sampling.state import Ask, Result, State

KEPT = "beside"  # name of the states in State.memory


@dataclasses.dataclass(frozen=True, eq=False)
class Infilling(Sampler):
  """A Sampler whose head also reads a second network; `build` makes it.

  Parameters are {"model": …, network: …}. A hole that has given tokens behind it is filled whole: it never
  draws EOS.

  Fields:
    network: name of the network beside. beside: its model.
  """

  network: str = ""
  beside: Any = None

  def start(self, params, row: Row, prefill: int, key: Array | None = None) -> State:
    s = super().start(params["model"], row, prefill, key)
    noise = self.objective.corruption.state(row, s.committed)
    inputs = self.objective.shown_masked(row, noise, self.latent)
    states = self.beside.apply(params[self.network], inputs, {}).layers["hidden"]
    calls = s.calls | {"prefill": s.calls["prefill"] + 1}
    return s.replace(memory=s.memory | {KEPT: states}, forwards=s.forwards + 1, calls=calls)

  def predict(self, params, a: Ask, s: State, fn, xs):
    head = self.objective.terms[self.term].head
    at = jnp.clip(a.at, 0, s.tokens.shape[1] - 1)
    given = {"states": jnp.take_along_axis(s.memory[KEPT], at[..., None], 1)}
    zero = jnp.zeros(a.at.shape, jnp.int32)
    target = Target(head, a.slot, zero, a.can.astype(jnp.float32), given)
    cache = s.caches[0] if s.caches else None
    out = self.model.apply(params["model"], a.inputs, {self.term: target}, cache=cache)
    inner = a.at < self.behind(a.row)[:, None]

    def whole(logits, inner, *xs):
      never = inner[:, None] & (jnp.arange(logits.shape[-1]) == self.cfg.eos)
      return fn(jnp.where(never, -jnp.inf, logits), *xs)

    return out.dists[self.term].map(whole, inner, *xs), [out.new]

  def behind(self, row: Row) -> Array:
    """int32[B]: coordinate of the last given token."""
    given = (row.doc >= 0) & ~eligible(row)
    return jnp.where(given, rows.coordinates(row.doc), -1).max(1).astype(jnp.int32)

  def result(self, row: Row, s: State) -> Result:
    out = super().result(row, s)
    return out.replace(memory={k: v for k, v in out.memory.items() if k != KEPT})


def build(sampler: Sampler, nets) -> Infilling:
  """The sampler of an objective of kind "infill".

  Args:
    nets: {name: network beside the model}.

  Raises:
    ConfigError: a sampler with guidance or mixtures, which two networks do not share.
  """
  if sampler.branches > 1 or sampler.mix.active or sampler.choice.extras:
    raise ConfigError(
      "two networks decode together from plain tokens", key="sampler.guidance", value=sampler.cfg.guidance,
      fix="no guidance, mixture or rule that reads more than the drawn token",
    )  # fmt: skip
  name = sampler.model.cfg.head(sampler.objective.terms[sampler.term].head).beside
  if not name or name not in (nets or {}):
    raise ConfigError(
      "the term's head reads no second network", key=f"objective.terms.{sampler.term}.head", value=name,
      fix="a head of kind 'joint', and its network in the section `trees`",
    )  # fmt: skip
  fields = {f.name: getattr(sampler, f.name) for f in dataclasses.fields(Sampler)}
  return Infilling(**fields, network=name, beside=nets[name])
