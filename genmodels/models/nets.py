"""Networks beside the model, each with a tree of its own: critics, teachers, policies.

A config's `trees.<name>` names a kind and its fields; `network(model)` gives an object with the
functions of a Model: init, abstract_params, logical_axes, apply.

Legend: B rows · M positions · S slots · D width of the model · W hidden units · C classes · K documents of a
row.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from genmodels import rows
from genmodels.config import ConfigError
from genmodels.contracts import Inputs, Outputs, Target
from genmodels.models.config import Head, from_section


@dataclasses.dataclass(frozen=True)
class SecondTrunk:
  """The model's architecture once more, with parameters of its own: a teacher, a fake score, a critic.

  Fields:
    refresh: the tree begins as a copy of the model and becomes one at every so many-th step (of its average,
      where the run keeps one); nobody else moves it. 0: a tree of its own.
  """

  refresh: int = 0

  def __post_init__(self):
    if self.refresh < 0:
      raise ValueError(f"refresh is {self.refresh}; a number of steps, or 0")

  def network(self, model):
    return model


@dataclasses.dataclass(frozen=True)
class Backbone:
  """A trunk of a shape of its own, with its own head "text": a second language model.

  Fields:
    model: section of TrunkConfig; {}: the model's own shape. How it runs (attention, types where the section
      does not say) follows the model.
  """

  model: dict = dataclasses.field(default_factory=dict)

  def network(self, model):
    cfg = model.cfg
    if self.model:
      shared = ("vocab", "vocab_multiple", "dtype", "param_dtype", "remat")
      mine = from_section({name: getattr(cfg, name) for name in shared} | self.model)
    else:
      mine = dataclasses.replace(cfg, heads=(("text", cfg.head("text")),), lora=None, anchor=0)
    runs = ("attention", "attention_tiles", "attention_capacity", "attention_deterministic", "attention_safe")
    runs = {name: getattr(cfg, name) for name in (*runs, "context")}
    return type(model)(dataclasses.replace(mine, **runs))


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


@dataclasses.dataclass(frozen=True)
class Energy:
  """The model's trunk once more over pairs of texts, what is shown and a candidate for the whole, to one
  scalar a document (EDLM, Xu et al. 2410.21357)."""

  def network(self, model):
    cfg = model.cfg
    if cfg.channels != ("tokens",):
      raise ConfigError(
        "an energy is of token ids, shown and proposed", key="trees", value=cfg.channels,
        fix="a model whose only table is the vocabulary",
      )  # fmt: skip
    head = Head(size=1, bias=True, zero_init=True)
    pair = dataclasses.replace(
      cfg, tables=(("shown", cfg.vocab_padded),), heads=(("energy", head),), lora=None
    )
    return EnergyNet(type(model)(pair))


@dataclasses.dataclass(frozen=True)
class EnergyNet:
  """The functions of an Energy.

  A slot's input is E₁[candidate] + E₂[shown], which is a matrix on the concatenated embeddings; the energy of
  a document is the mean over its slots of an affine map of the final states, which is that map of their mean.
  The map starts at 0: a fresh energy prefers nothing.
  """

  model: Any

  def init(self, key: jax.Array) -> dict[str, Any]:
    return self.model.init(key)

  def abstract_params(self):
    return self.model.abstract_params()

  def logical_axes(self):
    return self.model.logical_axes()

  def apply(
    self, params, inputs: Inputs, candidate: jax.Array, documents: int, *, key=None
  ) -> tuple[jax.Array, Outputs]:
    """(float32[B, K] energies, 0 where there is no document; the trunk's Outputs).

    Args:
      inputs: of the denoiser: what is shown. candidate: int32[B, S], a token for each slot.
      documents: K, the most of a row.
    """
    B, S = inputs.doc.shape
    there = inputs.doc >= 0
    slot = jnp.where(there, jnp.arange(S, dtype=jnp.int32), -1)
    target = Target("energy", slot, jnp.zeros((B, S), jnp.int32), there.astype(jnp.float32))
    pair = jnp.concatenate([jnp.where(there, candidate, -1)[..., None], inputs.ids], -1)
    out = self.model.apply(params, inputs.replace(ids=pair), {"energy": target}, key=key)
    value = out.dists["energy"].map(lambda z: z[:, 0])
    count = rows.per_doc(inputs.doc, there.astype(jnp.float32), documents)
    return rows.per_doc(inputs.doc, value, documents) / jnp.maximum(count, 1), out


NETS = {"trunk": SecondTrunk, "backbone": Backbone, "choice": Choice, "energy": Energy}
