"""From `sampler.draft` and `sampler.verify` to a sampler that drafts and verifies."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from genmodels import config
from genmodels.config import ConfigError
from genmodels.sampling import (
  block_draft,
  diffuspec,
  draft_heads,
  drafters,
  early_exit,
  joint,
  speculate,
  stand,
  verify,
)
from genmodels.sampling.drafter import Drafter
from genmodels.sampling.loop import Sampler


@dataclasses.dataclass(frozen=True)
class Plain(Drafter):
  """No drafts: what a config says with `draft.kind=plain` where another one names a drafter."""


DRAFTERS = {
  "plain": Plain,
  "ngram": drafters.NGram,
  "stand": stand.Stand,
  "jacobi": drafters.Jacobi,
  "model": drafters.Small,
  "tidar": drafters.TiDAR,
  "heads": draft_heads.Heads,
  "masks": draft_heads.Masks,
  "block": block_draft.Block,
  "early_exit": early_exit.EarlyExit,
  "diffuspec": diffuspec.DiffuSpec,
  "marginals": joint.Marginals,
}


def drafter(section) -> Drafter:
  """The drafter of a kind, of a section with one, or of a Drafter.

  Raises:
    ConfigError: an unknown kind, a wrong key or value.
  """
  return config.build_kind(DRAFTERS, {"kind": section} if isinstance(section, str) else section, "draft")


def rule(section) -> verify.Rule:
  """The verification rule of a kind, of a section with one, or of a Rule; raises as `drafter`."""
  section = {"kind": section} if isinstance(section, str) else section
  return config.build_kind(verify.REGISTRY, section, "verify")


def attach(sampler: Sampler, draft: Drafter, rule, load: Callable | None = None) -> Sampler:
  """The sampler with a drafter.

  Args:
    rule: "auto", or a Rule.
    load: workdir → (Sampler, parameters), for drafters that are models of their own.

  Raises:
    ConfigError: they do not fit the model.
  """
  if isinstance(draft, Plain):
    return sampler
  if isinstance(draft, joint.Marginals):
    if rule != "auto":
      raise ConfigError(
        "an any-subset model verifies with its own joint", key="sampler.verify", value=rule, fix="auto"
      )
    return joint.build(sampler, draft)
  draft, own = draft.load(load)
  return speculate.build(sampler, draft, rule, own)
