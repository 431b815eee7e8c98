"""`Model`: the pure functions of a trunk, over nested dicts of arrays.

Legend: B rows · S slots · M read positions of a term.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from genmodels.contracts import Inputs, Outputs, Target
from genmodels.masks import AttnMask
from genmodels.models import attend, drafts, lora, rope
from genmodels.models.cache import Cache, init_cache
from genmodels.models.config import TrunkConfig, from_section
from genmodels.models.layers import trunk_norm
from genmodels.models.trunk import Heads, Trunk, plans


@dataclasses.dataclass(frozen=True)
class Model:
  """A trunk as pure functions; parameters are nested dicts of arrays, no framework object inside."""

  cfg: TrunkConfig

  def init(self, key: jax.Array):
    """Parameters. Jit it with out_shardings to make them in place on a mesh: values do not depend on it.

    With `cfg.lora` the adapters are there too, drawn from a key of their own.
    """
    params = drafts.start(nn.meta.unbox(self._boxed(key)), self.cfg)
    return params if self.cfg.lora is None else lora.add(params, self.cfg, jax.random.fold_in(key, 1))

  def abstract_params(self):
    """ShapeDtypeStructs of the parameters."""
    return jax.eval_shape(self.init, jax.random.key(0))

  def logical_axes(self):
    """Tuples of logical axis names, in the structure of the parameters."""
    boxed = jax.eval_shape(self._boxed, jax.random.key(0))
    specs = nn.get_partition_spec(boxed)
    axes = jax.tree.map(lambda s, x: tuple(s) + (None,) * (x.ndim - len(s)), specs, nn.meta.unbox(boxed))
    return axes if self.cfg.lora is None else lora.axes(axes, self.cfg)

  def init_cache(self, batch: int, capacity: int, dtype=None) -> Cache:
    """An empty cache for `batch` rows of `capacity` slots."""
    return init_cache(self.cfg, batch, capacity, dtype)

  def embed(self, params: Any, ids: jax.Array) -> jax.Array:
    """[B, S, width]: what a slot that shows the tokens int32[B, S] adds to its input; −1 adds nothing.

    The one hook of embedding mixtures (`Inputs.add_embed`): x with `embed(b) − embed(a)` added is x with
    token b in place of a.
    """
    table = params["embed"]["tokens"]["embedding"]
    return attend.lookup(table, ids, True) * self.cfg.embed_scale

  def plans(self, inputs: Inputs) -> dict:
    """{mask pattern: tile lists} that `apply` makes of these inputs; their sizes under jax.eval_shape."""
    return plans(self.cfg, inputs)

  def apply(
    self,
    params: Any,
    inputs: Inputs,
    targets: dict[str, Target],
    *,
    cache: Cache | None = None,
    key: jax.Array | None = None,
    depth: jax.Array | None = None,
  ) -> Outputs:
    """One pass.

    Args:
      params: as `init` returns them; a tree without adapter leaves is the model without adapters.
      inputs: S slots of B rows; `masks` holds every pattern that the layers name.
      targets: {term: Target}, each read by the head it names.
      cache: committed slots, visible to this call's slots through their codes.
      key: for dropout; None turns it off.
      depth: int32 scalar, may be data: only the first `depth` layers are run, and the heads read their output
        (early exit). Nothing for `write_cache` comes back then.

    Returns:
      Outputs with a Dist for each target; `new` (with a cache) for `write_cache`; `work`
      {"slots": int32, "pairs": {pattern: int32[B, S]}} and, with `attention_capacity`, "overflow" {pattern:
      int32, tile lists that were too short: NaN}; `layers` {"hidden": [B, S, D]}, with
      `cfg.prefix` also "prefix", the states that draft heads read.

    Raises:
      ValueError: inputs that do not fit the configuration, by name and shape.
    """
    rngs = {} if key is None else {"dropout": key}
    return Trunk(self.cfg).apply({"params": params}, inputs, targets, cache, depth, rngs=rngs)

  def normed(self, params: Any, states: jax.Array) -> jax.Array:
    """The final norm of any layer's output [..., D]: what a head reads at an early exit."""
    own = {"params": params["final_norm"]} if "final_norm" in params else {}
    return trunk_norm(self.cfg, None).apply(own, states)

  def read(self, params: Any, head: str, hidden: jax.Array, valid: jax.Array, ids: jax.Array | None = None):
    """The Dist of a categorical or draft head over hidden states that a call returned, without another pass.

    Args:
      hidden: [B, M, D], final states. valid: bool[B, M].
      ids: int32[B, M, G], tokens that a draft head is fed.
    """
    B, M, _ = hidden.shape
    slot = jnp.where(valid, jnp.arange(M, dtype=jnp.int32), -1)
    given = None if ids is None else {"ids": ids}
    target = Target(head, slot, jnp.zeros((B, M), jnp.int32), valid.astype(jnp.float32), given)
    tables = {"tokens": params["embed"]["tokens"]["embedding"]} if self.cfg.vocab else {}
    return Heads(self.cfg).apply({"params": params["heads"]}, hidden, tables, {"x": target})["x"]

  def draft(self, params: Any, head: str, taps: jax.Array, pos: jax.Array, given: Any, cache: Cache):
    """A block head's draft from tapped states that a call returned (`Outputs.layers["taps"]`).

    Args:
      taps: [T, B, S, D], of text that `cache` does not hold; pos: float32[B, S, A].
      given: as of drafts.BlockDrafter; a slot with id −1 is empty.
      cache: of `drafts.drafting_cache`.

    Returns:
      A Dist at the N slots of the block, and keys and values for `write_cache`: S tapped slots, then N.
    """
    hidden, new = drafts.draft_block(self.cfg, params, head, taps, pos, given, cache)
    like = self.read(params, self.cfg.head(head).like, hidden, given["ids"] >= 0)
    return like.replace(head=drafts.reading(self.cfg, self.cfg.head(head))), new

  def _boxed(self, key):
    return Trunk(self.cfg).init({"params": key}, self._dummy(), {})["params"]

  def _dummy(self) -> Inputs:
    """One slot of one row: parameters depend on no input."""
    cfg, i32 = self.cfg, jnp.int32
    cond = None
    if cfg.cond:
      shapes = {"class": ((1, 1), i32), "time": ((1, 1), jnp.float32)}
      cond = {n: jnp.zeros(*shapes.get(c.kind, ((1, 1, c.size), jnp.float32))) for n, c in cfg.cond}
    axes = 1 if cfg.rope is None else len(cfg.rope_axes)
    mask = AttnMask(jnp.zeros((1, 1), i32), jnp.zeros((1, 1, 1), i32), jnp.ones((1, 1, 1), i32))
    return Inputs(
      ids=jnp.zeros((1, 1, len(cfg.channels)), i32) if cfg.channels else None,
      pos=jnp.zeros((1, 1, axes)),
      doc=jnp.zeros((1, 1), i32),
      masks={p: mask for p in cfg.patterns},
      features=jnp.zeros((1, 1, cfg.features)) if cfg.features else None,
      cond=cond,
    )


def build(section: Any, latent: Any = None) -> Model:
  """The model of a config section (or of a TrunkConfig).

  Args:
    section: fields of TrunkConfig; `preset` names one of `presets.PRESETS`, whose fields the other keys
      override; `extend` lengthens the context, see rope.Context.
    latent: what the tokens carry, or None. Its `meta` {field: value} fills fields that the section
      leaves out.

  Raises:
    ConfigError: unknown key, wrong type or broken law.
  """
  if isinstance(section, TrunkConfig):
    return Model(section)
  from genmodels.config import build as build_section
  from genmodels.config import plain
  from genmodels.models.presets import preset

  section = dict(plain(section))
  if "preset" in section:
    section = {**preset(section.pop("preset")), **section}
  context = build_section(rope.Context, section.pop("extend", None), "model.extend")
  return Model(rope.extend(from_section({**getattr(latent, "meta", {}), **section}), context))


def count(tree: Any) -> int:
  """Number of parameters in a tree of arrays or ShapeDtypeStructs."""
  return sum(int(x.size) for x in jax.tree.leaves(tree))
