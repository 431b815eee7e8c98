"""Networks beside the model, each with a tree of its own: critics, teachers, policies.

A config's `trees.<name>` names a kind and its fields; `network(model)` gives an object with the
functions of a Model: init, abstract_params, logical_axes, apply.

Legend: B rows · M positions · D width of the model · W hidden units · C classes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class SecondTrunk:
  """The model's architecture once more, with parameters of its own: a teacher, a fake score, a critic."""

  def network(self, model):
    return model


@dataclasses.dataclass(frozen=True)
class Choice:
  """A policy over C actions from a hidden state: RMS norm, one hidden layer, logits that start equal.

  Fields:
    classes: C. width: W.
  """

  classes: int
  width: int = 256

  def __post_init__(self):
    if self.classes < 1 or self.width < 1:
      raise ValueError(f"classes is {self.classes} and width {self.width}; both are at least 1")

  def network(self, model):
    return ChoiceNet(self, model.cfg.width)


@dataclasses.dataclass(frozen=True)
class ChoiceNet:
  """The functions of a Choice over hidden states of width D."""

  cfg: Choice
  features: int

  def init(self, key: jax.Array) -> dict[str, Any]:
    """Parameters: float32, the output layer zero, so that the first policy is uniform."""
    D, W, C = self.features, self.cfg.width, self.cfg.classes
    return {
      "in": {"kernel": jax.random.normal(key, (D, W)) * D**-0.5, "bias": jnp.zeros((W,))},
      "out": {"kernel": jnp.zeros((W, C)), "bias": jnp.zeros((C,))},
    }

  def abstract_params(self):
    return jax.eval_shape(self.init, jax.random.key(0))

  def logical_axes(self):
    return {
      "in": {"kernel": ("embed", "mlp"), "bias": ("mlp",)},
      "out": {"kernel": ("mlp", None), "bias": (None,)},
    }

  def apply(self, params, hidden: jax.Array, *, key=None) -> jax.Array:
    """float32[B, M, C], log-probabilities of the actions from hidden states [B, M, D]."""
    del key
    x = hidden.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)
    x = jax.nn.gelu(x @ params["in"]["kernel"] + params["in"]["bias"])
    return jax.nn.log_softmax(x @ params["out"]["kernel"] + params["out"]["bias"], -1)


NETS = {"trunk": SecondTrunk, "choice": Choice}
