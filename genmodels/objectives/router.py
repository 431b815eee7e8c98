"""Losses, bias updates and metrics of routers: what a mixture of experts adds to an objective.

  balance  E · Σ_e f_e·P_e     f_e choices of expert e per slot, P_e its mean score: top_k where routing is
           uniform, more where slots agree on their experts (Switch Transformer, arXiv:2101.03961, eq. 4–6).
           No strict bound: it is top_k whatever f is if P is uniform, and below where a few sure slots face
           many unsure ones
  z        mean of (log Σ_e exp logit_e)²   keeps logits small (ST-MoE, arXiv:2202.08906, eq. 5)

  bias     b_e ← b_e + u·sign(mean load − load of e) after each step: no term and no gradient, the bias is
           added to the scores that experts are chosen by, not to their weights (loss-free balancing,
           arXiv:2408.15664; DeepSeek-V3, arXiv:2412.19437: u = 0.001)

A product of two means is no ratio of sums: both terms are taken over each *global micro-batch* (all devices,
all valid slots of every stream), and averaged over the micro-batches of a step. `train.accumulate` therefore
changes the balance term, as it must: smaller batches are asked to be balanced.

Legend: L layers with experts · E experts.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from genmodels.config import Schedule
from genmodels.contracts import Outputs

Array = jax.Array

PREFIX = "router_"  # of the terms' names
LOADS = "router_loads"  # among the sums of a step


@dataclasses.dataclass(frozen=True)
class Router:
  """Weights of the router's losses; 0 leaves a term out.

  Fields:
    balance, z: λ of the term, a number or a schedule; reports stay unscaled.
    bias: u, the rate of the experts' bias (`model.moe.bias`); 0 leaves it as it is. Loads are those of the
      step's global batch, all micro-batches together.
    scope: "layer" takes f and P in each layer and averages the layers' losses; "model" takes them over all
      layers at once, as transformers' load_balancing_loss_func does: one layer may make up for another.
  """

  balance: Schedule = 0.0
  z: Schedule = 0.0
  bias: float = 0.0
  scope: str = "layer"

  def __post_init__(self):
    for name in ("balance", "z"):
      object.__setattr__(self, name, Schedule.of(getattr(self, name)))
    if self.bias < 0:
      raise ValueError(f"bias is {self.bias}; the rate of an update is at least 0")
    if self.scope not in ("layer", "model"):
      raise ValueError(f"scope is {self.scope!r}; it must be 'layer' or 'model'")

  @property
  def scales(self) -> dict[str, Schedule]:
    """{term: λ} of the terms that are on."""
    found = {PREFIX + name: getattr(self, name) for name in ("balance", "z")}
    return {name: s for name, s in found.items() if any(s.table)}

  def denominators(self) -> dict[str, Array]:
    """{term: 1}: a step's sum counts its micro-batches."""
    return {name: jnp.float32(1) for name in self.scales}

  def sums(self, outputs: Outputs) -> dict[str, Array]:
    """{term: float32} of one global micro-batch, for the terms that are on."""
    on = self.scales
    if not on:
      return {}
    stats = outputs.layers["router"]
    values = {PREFIX + "balance": lambda: balance(stats, self.scope), PREFIX + "z": lambda: z_loss(stats)}
    return {name: values[name]() for name in on}

  def stats(self, outputs: Outputs) -> dict:
    """{LOADS: choices of each expert, a sum over micro-batches} for the bias, or {}."""
    return {LOADS: outputs.layers["loads"]} if self.bias else {}


def balance(stats: dict[str, Array], scope: str = "layer") -> Array:
  """The balance loss, float32, of statistics {"load", "score": [L, E], "slots": [L]}; see `models.moe`."""
  load, score, slots = stats["load"], stats["score"], stats["slots"]
  if scope == "model":
    load, score, slots = load.sum(0, keepdims=True), score.sum(0, keepdims=True), slots.sum(keepdims=True)
  slots = jnp.maximum(slots, 1)[:, None]
  return (load.shape[1] * (load / slots * (score / slots)).sum(1)).mean()


def z_loss(stats: dict[str, Array]) -> Array:
  """Mean over layers and slots of the squared log-sum-exp of the logits, float32."""
  return (stats["z"] / jnp.maximum(stats["slots"], 1)).mean()


def ratios(outputs: Outputs) -> dict[str, tuple[Array, Array]]:
  """Metrics as (sum, count), means over layers and micro-batches; {} for a model without experts.

  "router/load_max": the fullest expert's load over the mean load (1 balanced, E/top_k at worst);
  "router/load_entropy": of the load, over log E (1 balanced); "router/idle": share of experts without a slot.
  """
  stats = (outputs.layers or {}).get("router")
  if stats is None:
    return {}
  load = stats["load"]
  L, E = load.shape
  share = load / jnp.maximum(load.sum(1, keepdims=True), 1)
  entropy = -jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1)), 0).sum(1)
  layers = jnp.float32(L)
  return {
    "router/load_max": (E * share.max(1).sum(), layers),
    "router/load_entropy": (entropy.sum() / jnp.log(jnp.float32(max(E, 2))), layers),
    "router/idle": ((load == 0).mean(1).sum(), layers),
  }
