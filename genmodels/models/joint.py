"""A linear decoder over the hidden states of two networks (MARIA, Israel et al., arXiv:2502.06901).

  logits = [h; s] W,   W = [W₁/2; W₂/2] at first, of the two networks' own output weights W₁ and W₂

h is a state of the model, s one of a network beside it (section `trees`) with inputs of its own. The start is
the geometric mean of the two predictions, a product of experts.

Legend: B rows · S slots · M read positions · D width of the model · E width of the other network · V classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from genmodels.config import ConfigError
from genmodels.models.config import TrunkConfig
from genmodels.models.heads import at

Array = jax.Array


def names(cfg: TrunkConfig) -> tuple[str, ...]:
  """The networks whose states the model's heads read."""
  return tuple(sorted({head.beside for _, head in cfg.heads if head.kind == "joint"}))


def joined(h: Array, given: Any, width: int) -> Array:
  """[B, M, D + E], what a joint head reads: h [B, M, D] and given["states"] [B, M, E].

  Raises:
    ValueError: no states, or of another shape.
  """
  got = None if given is None or "states" not in given else given["states"].shape
  if got != (*h.shape[:2], width):
    raise ValueError(
      f"a joint head needs Target.given = {{'states': [{h.shape[0]}, {h.shape[1]}, {width}]}}, got {got}"
    )
  return jnp.concatenate([h, given["states"].astype(h.dtype)], -1)


def function(model, nets: Mapping[str, Any]) -> Callable:
  """fn(trees, inputs, targets, **kw) → Outputs of the model.

  Where it has joint heads, their targets say what the other network is to see: `given` is {"inputs": Inputs,
  "slot": int32[B, M], the slot of the other network whose state is read}. Each network runs once; what it
  executed is `Outputs.layers["beside"]` {name: work}.
  """
  if not names(model.cfg):
    return lambda trees, *a, **kw: model.apply(trees["model"], *a, **kw)

  def fn(trees, inputs, targets, **kw):
    outputs, told = {}, {}
    for term, target in targets.items():
      head = model.cfg.head(target.head)
      if head.kind == "joint":
        name, seen = head.beside, target.given
        if name not in outputs:
          outputs[name] = nets[name].apply(trees[name], seen["inputs"], {})
        target = target.replace(given={"states": at(outputs[name].layers["hidden"], seen["slot"])})
      told[term] = target
    out = model.apply(trees["model"], inputs, told, **kw)
    return out.replace(layers=out.layers | {"beside": {name: o.work for name, o in outputs.items()}})

  return fn


def check(cfg: TrunkConfig, nets: Mapping[str, Any]) -> None:
  """Laws between joint heads and the networks that they read.

  Raises:
    ConfigError: no such network, or one of another width, a smaller vocabulary or another kind of output.
  """
  for name, head in cfg.heads:
    if head.kind != "joint":
      continue
    other = getattr(nets.get(head.beside), "cfg", None)
    if other is None:
      raise ConfigError(
        "a joint head reads a network that is not there", key=f"model.heads.{name}.beside", value=head.beside,
        fix=f"trees.{head.beside}={{'kind': 'backbone'}}",
      )  # fmt: skip
    if (head.width or cfg.width) != other.width:
      raise ConfigError(
        f"the network {head.beside!r} has width {other.width}", key=f"model.heads.{name}.width",
        value=head.width, fix=f"model.heads.{name}.width={other.width}",
      )  # fmt: skip
    if cfg.vocab > other.vocab:  # rows beyond the model's are read by nobody
      raise ConfigError(
        f"both networks read the same tokens, of which the model knows {cfg.vocab}",
        key=f"trees.{head.beside}.model.vocab", value=other.vocab,
        fix=f"{cfg.vocab}, and init.beside.{head.beside}.resize_vocab=True if the tokenizers are the same",
      )  # fmt: skip
    for where, found in ((f"model.heads.{head.like}", cfg.head(head.like)), ("its head", other.head("text"))):
      if found.soft_cap is not None or found.bias:
        raise ConfigError(
          "the decoder starts as the sum of two linear heads, this one has a bias or a soft cap",
          key=f"model.heads.{name}", value=where, fix="another network",
        )  # fmt: skip


def start(cfg: TrunkConfig, nets: Mapping[str, Any], trees: Mapping[str, Any], fresh=None) -> dict[str, Any]:
  """`trees` with every fresh joint head at half of the two networks' output weights.

  Args:
    trees: {name: parameters}: "model", perhaps "ema", and the networks beside.
    fresh: {tree: names of leaves} that were loaded from nowhere; None: all.
  """
  trees = dict(trees)
  for name, head in cfg.heads:
    leaf = f"heads/{name}/kernel"
    for tree in ("model", "ema"):
      if head.kind != "joint" or tree not in trees or fresh is not None and leaf not in fresh.get(tree, ()):
        continue
      params, other = trees[tree], nets[head.beside].cfg
      old = params["heads"][name]["kernel"]
      parts = (cfg, head.like, params), (other, "text", trees[head.beside])
      halves = [output_weight(*p)[:, : cfg.vocab].astype(jnp.float32) / 2 for p in parts]
      kernel = jnp.pad(jnp.concatenate(halves), ((0, 0), (0, old.shape[1] - cfg.vocab))).astype(old.dtype)
      trees[tree] = params | {"heads": params["heads"] | {name: {"kernel": kernel}}}
  return trees


def output_weight(cfg: TrunkConfig, head: str, params) -> Array:
  """[D, V padded], the output weight of a categorical head over the vocabulary."""
  tied = cfg.head(head).tied
  return params["embed"]["tokens"]["embedding"].T if tied else params["heads"][head]["kernel"]
