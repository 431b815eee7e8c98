"""Heads that draft: they read the trunk's hidden states and leave its own predictions as they are.

  Medusa   residual blocks on h_t, an output weight of its own     (Cai et al., arXiv:2401.10774 §2.1.1)
  Hydra    the same on [h_t; e(x_{t+1}); … e(x_{t+i})]             (Ankner et al., arXiv:2402.05109 §3)
  sampler  an MLP on [h; e(previous token)], the trunk's output    (Samragh et al., arXiv:2507.11851 §3.2)
  DFlash   layers of its own over a block of masks and an anchor, which attend to hidden states of some of the
           trunk's layers as to a second sequence                  (z-lab, arXiv:2602.06036)

Legend: B rows · M read positions · S slots of the trunk · N slots of the drafter · D width · G tokens fed
· T tapped layers · V classes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from genmodels.contracts import pytree
from genmodels.masks import AttnMask
from genmodels.models import attend, rope
from genmodels.models.cache import Cache, init_cache
from genmodels.models.config import Head, LayerSpec, Segment, TrunkConfig
from genmodels.models.layers import Linear, Norm, rope_key, trunk_norm

Array = jax.Array


class Draft(nn.Module):
  """(transformed hidden state [B, M, D], its output weight or None where it shares the trunk's).

  Only the first block sees the tokens. A residual block is the identity at first: h alone is carried along.
  """

  cfg: TrunkConfig
  head: Head

  @nn.compact
  def __call__(self, h: Array, fed: Array):
    """h [B, M, D], and fed [B, M, G·D], the embeddings of the tokens."""
    cfg, head, D = self.cfg, self.head, self.cfg.width
    for i in range(head.depth):
      x = jnp.concatenate([h, fed], -1) if head.given and i == 0 else h
      std = 0.0 if head.block == "residual" else None
      shape, axes = (x.shape[-1], D), ("embed", "mlp")
      y = jax.nn.silu(Linear(cfg, "bmi,io->bmo", shape, axes, True, std, name=f"block{i}")(x))
      h = h + y if head.block == "residual" else Norm(cfg, "layer", True, True, name=f"norm{i}")(y)
    if head.shared:
      return h, None
    weight, _ = Linear(cfg, "bmd,dv->bmv", (D, cfg.vocab_padded), ("embed", "vocab"), name="out")()
    return h, weight


class BlockDrafter(nn.Module):
  """Hidden states [B, N, D] of blocks that are drafted in one call.

  The tapped states are joined by one matrix and a norm; every layer makes keys and values of them (of the
  same vectors: they do not pass through the layers) beside those of its own slots. Embeddings and output
  weight are the trunk's. What passes through no layer never changes: keys and values of earlier text may come
  from a cache.
  """

  cfg: TrunkConfig
  head: Head

  @nn.compact
  def __call__(self, taps: Array, pos: Array, given: Any, tables, cache: Cache | None = None):
    """States of the drafter's slots; with a cache also {"code", "layers"} of all S + N keys of this call.

    Args:
      taps: [len(cfg.taps), B, S, D]; pos: float32[B, S, A] of the trunk's slots. given: {"ids": int32[B, N],
        "pos": float32[B, N, A], "mask": AttnMask of N queries over S + N keys, those of the trunk's slots
        first}.
      cache: of `drafting_cache`, keys and values of text that is not in this call.
    """
    from genmodels.models.trunk import Stack  # here: it is made of these heads

    cfg, head, D = self.cfg, self.head, self.cfg.width
    own = block_config(cfg, head)
    taps = jnp.stack([taps[cfg.taps.index(i)] for i in head.taps])
    shape = len(head.taps), D, D
    memory = Linear(cfg, "tbsd,tde->bse", shape, (None, "embed", "mlp"), name="join")(taps)
    memory = Norm(cfg, "rms", name="join_norm")(memory)
    x = attend.lookup(tables["tokens"], given["ids"], True) * cfg.embed_scale
    where = jnp.concatenate([pos, given["pos"]], 1)
    at = lambda p: rope.angles(cfg.rope, cfg.rope_axes, p, cfg.rope.base, cfg.rope.scaling)
    key = rope_key(own, LayerSpec())
    ctx = {"rope": {key: at(given["pos"])}, "key_rope": {key: at(where)}, "memory": memory}
    mask = given["mask"]
    if cache is not None:
      heads = cfg.num_heads, cfg.num_kv_heads, cfg.attention_safe
      past = AttnMask(cache.code["full"], mask.lo, mask.hi)
      of = lambda m: attend.plans({"full": m}, len(x), cfg.attention, decode=heads)
      ctx["plans"], ctx["cache_plans"] = of(mask), of(past)
    elif not self.is_initializing():
      tiles = cfg.attention_tiles
      ctx["plans"] = attend.plans({"full": mask}, len(x), cfg.attention, tiles=tiles)
    layers = None if cache is None else cache.layers
    (x, _), new, _ = Stack(own, name="stack")((x.astype(memory.dtype), None), layers, ctx)
    x = trunk_norm(own, "final_norm")(x)
    return x if cache is None else (x, {"code": {"full": mask.code}, "layers": new})


def block_config(cfg: TrunkConfig, head: Head) -> TrunkConfig:
  """The layers of a block head, as a trunk of their own."""
  layers = (Segment((LayerSpec(),), head.depth),)
  return dataclasses.replace(cfg, segments=layers, heads=(), lora=None, moe=None, adaln="none", cond=())


def reading(cfg: TrunkConfig, head: Head) -> Head:
  """How a block head's states are read: by the head that it is like."""
  return dataclasses.replace(cfg.head(head.like), forbid=head.forbid, chunk=head.chunk)


def drafting_cache(cfg: TrunkConfig, name: str, batch: int, capacity: int) -> Cache:
  """An empty cache of the block head `name`, for keys and values of tapped states."""
  return init_cache(block_config(cfg, cfg.head(name)), batch, capacity)


def draft_block(cfg: TrunkConfig, params, name: str, taps: Array, pos: Array, given: Any, cache: Cache):
  """Hidden states [B, N, D] of one block a row, and keys and values for `write_cache`.

  Args:
    params: of the whole model. name: of the block head; the others as of BlockDrafter.
  """
  tables = {"tokens": params["embed"]["tokens"]["embedding"]}
  module = BlockDrafter(cfg, cfg.head(name))
  return module.apply({"params": params["heads"][name]}, taps, pos, given, tables, cache)


def empty_block() -> dict:
  """What a BlockDrafter is initialised with: one slot."""
  return {"ids": jnp.zeros((1, 1), jnp.int32), "pos": jnp.zeros((1, 1, 1)), "mask": None}


@pytree()
class Latent:
  """How far a hidden state is from another one, which gets no gradient.

  Fields:
    hidden, other: [B, M, D]; valid: bool[B, M].
  """

  hidden: Array
  other: Array
  valid: Array

  def nll(self, value: Array) -> Array:
    """float32[B, M], mean over the features of the squared difference; `value` is not looked at."""
    del value
    other = jax.lax.stop_gradient(self.other).astype(jnp.float32)
    error = jnp.square(self.hidden.astype(jnp.float32) - other).mean(-1)
    return jnp.where(self.valid, error, 0)


def embedded(cfg: TrunkConfig, table: Array, given: Any, count: int, like: Array) -> Array:
  """Embeddings of the tokens that a draft head is fed, [B, M, G·D] in the type of `like` [B, M, D].

  Args:
    given: {"ids": int32[B, M, G]}; None for a head that is fed none.

  Raises:
    ValueError: another number of tokens than the head takes.
  """
  B, M, D = like.shape
  if not count:
    return jnp.zeros((B, M, 0), like.dtype)
  got = None if given is None else given["ids"].shape
  if got != (B, M, count):
    raise ValueError(f"a draft head needs Target.given = {{'ids': int32[{B}, {M}, {count}]}}, got {got}")
  fed = attend.lookup(table, given["ids"].reshape(B, M * count)) * cfg.embed_scale
  return fed.reshape(B, M, count * D).astype(like.dtype)


def start(params, cfg: TrunkConfig):
  """`params` with every draft head's own output weight a copy of that of the head it is like."""
  own = [(name, head) for name, head in cfg.heads if head.kind == "draft" and not head.shared]
  if not own:
    return params
  heads = dict(params["heads"])
  for name, head in own:
    tied = cfg.head(head.like).tied
    kernel = params["embed"]["tokens"]["embedding"].T if tied else heads[head.like]["kernel"]
    heads[name] = {**heads[name], "out": {**heads[name]["out"], "kernel": kernel}}
  return {**params, "heads": heads}
