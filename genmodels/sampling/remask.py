"""Remasking: which committed tokens of the unit being denoised are opened again.

It ends where a cache begins: tokens that an exact cache holds, or that anything in it has seen, stay. So
only the unit at the front is touched, and the front moves on when the unit's steps are over.

Legend: B rows · N tokens of a row · M tokens asked for.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from genmodels.config import ConfigError
from genmodels.contracts import Array
from genmodels.sampling.quota import Ancestral, Quota, Unit


@dataclasses.dataclass(frozen=True)
class Never:
  """What is committed stays."""

  active = False

  def check(self, quota: Quota) -> None:
    """Raises ConfigError where the rule does not fit the quota."""

  def busy(self, quota: Quota, k: Array) -> Array:
    """bool[B]: a unit that has taken k int32[B] steps goes on even when it is full."""
    return jnp.zeros_like(k, bool)

  def prepare(self, quota: Quota, unit: Unit) -> Unit:
    """The unit, with the probability `sigma` where quotas have to make up for it."""
    return unit

  def confidence(self, unit: Unit, held: Array, conf: Array) -> Array:
    """float32[B, M], what is remembered of each token: here its score when it was committed."""
    return jnp.where(held, conf, unit.score)

  def select(self, quota: Quota, unit: Unit, chosen: Array, held: Array, conf: Array, u: Array):
    """What is committed, and what is opened again.

    Args:
      chosen: bool[B, M], what would be committed. held: bool[B, M], committed tokens of the unit.
      conf: float32[B, M], `confidence` of this step. u: float32[B, M], fresh uniforms.

    Returns:
      (commit bool[B, M] ⊂ unit.can, open bool[B, M] ⊂ held).
    """
    return chosen, jnp.zeros_like(held)


@dataclasses.dataclass(frozen=True)
class ReMDM(Never):
  """Committed tokens are opened again with probability σ ≤ σ_max = min(1, (1−α_s)/α_t), masked ones revealed
  with (α_s − (1−σ)α_t)/(1−α_t), so that a token is clean at time s with probability α_s whatever σ is (ReMDM,
  2503.00307 eq. 6–8). eta = 0 is MDLM.

  Fields:
    rule: "cap" σ = min(eta, σ_max); "rescale" σ = eta·σ_max; "loop" σ = eta while the quota's `hold` lasts;
      "conf" σ_i = eta·σ_max·softmax(−p_i) over the tokens held, p_i their probability when they were
      committed: the share of clean tokens is then smaller than α_s, for masked tokens are revealed at MDLM's
      rate.
    eta: see the rule.
  """

  rule: Literal["cap", "rescale", "loop", "conf"] = "cap"
  eta: float = 0.02
  active = True

  def __post_init__(self):
    if not 0 <= self.eta <= 1:
      raise ValueError(f"eta is {self.eta}; it is a probability, or a part of one")

  def check(self, quota):
    if not isinstance(quota, Ancestral) or quota.counts:
      raise ConfigError(
        "ReMDM is a rule of ancestral sampling", key="sampler.remask.kind", value="remdm",
        fix="quota=dict(kind='ancestral', steps=…)",
      )  # fmt: skip
    if self.rule == "loop" and not quota.hold:
      raise ConfigError(
        "the loop needs times at which the share of clean tokens stays as it is", key="sampler.remask.rule",
        value="loop", fix="quota=dict(kind='ancestral', hold=(.55, .05, .9), …)",
      )  # fmt: skip

  def busy(self, quota, k):
    return k < quota.steps

  def sigma(self, quota: Ancestral, unit: Unit) -> Array:
    """σ float32[B] of this step ("conf": its largest sum)."""
    s, p_t, p_s = quota.times(unit)
    most = jnp.clip(p_s / jnp.maximum(1 - p_t, 1e-12), 0.0, 1.0)
    if self.rule == "cap":
      return jnp.minimum(self.eta, most)
    if self.rule == "loop":
      on, off, _ = quota.hold
      t = 1 - unit.k / quota.steps
      return jnp.where((t <= on) & (s >= off), jnp.minimum(self.eta, most), 0.0)
    return self.eta * most

  def prepare(self, quota, unit):
    return unit if self.rule == "conf" else unit.replace(sigma=self.sigma(quota, unit))

  def select(self, quota, unit, chosen, held, conf, u):
    sigma = self.sigma(quota, unit)[:, None]
    if self.rule == "conf":
      sigma = sigma * jax.nn.softmax(-conf, 1, where=held)
    return chosen, held & (u < sigma)


@dataclasses.dataclass(frozen=True)
class RCR(Never):
  """Running-confidence remasking (MDPO, 2508.13148 §4): the quota says how many tokens are clean after the
  step; they are the surest of all, committed or not, so that a token of low confidence can be revoked.

  Fields:
    carry: confidence of a masked token: the "max" of all steps at which it was masked, or the "last" one (the
      released code).
  """

  carry: Literal["max", "last"] = "max"
  active = True

  def check(self, quota):
    if not quota.counts or quota.timed:
      raise ConfigError(
        "running-confidence remasking needs to know how many tokens are clean after each step",
        key="sampler.remask.kind", value="rcr", fix="quota=dict(kind='linear', steps=…)",
      )  # fmt: skip

  def confidence(self, unit, held, conf):
    now = jnp.maximum(unit.score, conf) if self.carry == "max" else unit.score
    return jnp.where(held, conf, now)

  def select(self, quota, unit, chosen, held, conf, u):
    clean = held.sum(1) + chosen.sum(1)
    order = jnp.argsort(jnp.where(held | unit.can, -conf, jnp.inf), axis=1, stable=True)
    stay = jnp.argsort(order, axis=1) < clean[:, None]
    return unit.can & stay, held & ~stay


REGISTRY = {"never": Never, "remdm": ReMDM, "rcr": RCR}
