"""The trunk: embeddings, one scan over segments of repeating layers, heads.

Legend: B rows · S slots · K id channels · D width · E conditions of a row · C condition width.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from genmodels import kernels
from genmodels.contracts import Inputs, Outputs, Target
from genmodels.masks import AttnMask
from genmodels.models import attend, drafts, heads, joint, rope
from genmodels.models.cache import Cache
from genmodels.models.config import LayerSpec, Remat, TrunkConfig
from genmodels.models.layers import Layer, Linear, dropout, modulation, param_init, rope_key, trunk_norm
from genmodels.models.moe import loads, per_layer
from genmodels.parallel import constrain


class Table(nn.Module):
  """An embedding table [n, D]; calling it returns the array."""

  cfg: TrunkConfig
  shape: tuple[int, int]
  axes: tuple[str | None, str | None]

  @nn.compact
  def __call__(self):
    init = param_init(self.cfg.init_std, self.axes)
    return self.param("embedding", init, self.shape, jnp.dtype(self.cfg.param_dtype))


class Tables(nn.Module):
  """All id tables, {channel name: [n, D]}; the vocabulary's first."""

  cfg: TrunkConfig

  @nn.compact
  def __call__(self):
    cfg = self.cfg
    out = {}
    if cfg.vocab:
      out["tokens"] = Table(cfg, (cfg.vocab_padded, cfg.width), ("vocab", "embed"), name="tokens")()
    for name, size in cfg.tables:
      out[name] = Table(cfg, (size, cfg.width), ("pos", "embed"), name=name)()
    if cfg.learned_pos:
      out["pos"] = Table(cfg, (cfg.learned_pos, cfg.width), ("pos", "embed"), name="learned_pos")()
    return out


class Conditions(nn.Module):
  """silu(sum of the embedded condition tables), [B, E, C]."""

  cfg: TrunkConfig

  @nn.compact
  def __call__(self, cond, tables):
    cfg, dtype, C = self.cfg, jnp.dtype(self.cfg.dtype), self.cfg.cond_width
    known = dict(cfg.cond)
    if sorted(cond) != sorted(known):
      raise ValueError(f"inputs.cond has tables {sorted(cond)}, the model is conditioned on {sorted(known)}")
    total = 0
    for name, spec in cfg.cond:
      x = cond[name]
      if spec.kind == "class":
        table = tables.get(name)
        if table is None:
          table = Table(cfg, (spec.size, C), ("pos", "cond"), name=name)()
        y = attend.lookup(table, x)
      elif spec.kind == "time":
        y = heads.sinusoids(x * spec.time_scale, spec.size).astype(dtype)
        y = Linear(cfg, "bef,fc->bec", (spec.size, C), (None, "cond"), True, name=f"{name}_in")(y)
        y = Linear(cfg, "bec,cd->bed", (C, C), ("cond", None), True, name=f"{name}_out")(jax.nn.silu(y))
      else:
        y = Linear(cfg, "bef,fc->bec", (spec.size, C), (None, "cond"), True, name=name)(x.astype(dtype))
      total = total + y.astype(dtype)
    return constrain(jax.nn.silu(total), ("batch", None, None))


def policy(remat: Remat, preset: str):
  """(whether to checkpoint, jax.checkpoint policy) of a preset with its overrides by tensor name."""
  cp = jax.checkpoint_policies
  if preset == "none" and not remat.offload:
    return False, None
  names = remat.save + (("attn_out", "attn_lse") if preset == "attn_out" else ())
  parts = [cp.everything_saveable] if preset == "none" else []
  if preset == "dots":
    parts.append(cp.checkpoint_dots_with_no_batch_dims)
  if remat.offload:
    parts.append(
      cp.save_and_offload_only_these_names(
        names_which_can_be_saved=names,
        names_which_can_be_offloaded=remat.offload,
        offload_src="device",
        offload_dst="pinned_host",
      )
    )
  elif names:
    parts.append(cp.save_only_these_names(*names))
  if not parts:
    return True, cp.nothing_saveable
  return True, functools.reduce(cp.save_from_both_policies, parts)


class Pattern(nn.Module):
  """The layers of one pattern, each with its mask, RoPE base and remat: the body of the scan."""

  cfg: TrunkConfig
  specs: tuple[LayerSpec, ...]

  @nn.compact
  def __call__(self, x, cache, ctx):
    new, stats, (x, tapped) = {}, {}, x
    if "depth" in ctx:
      return self.shallow(x, tapped, cache, ctx)
    for i, spec in enumerate(self.specs):
      on, keep = policy(self.cfg.remat, spec.remat or self.cfg.remat.preset)
      layer = nn.remat(Layer, policy=keep, prevent_cse=False) if on else Layer
      x, (new[f"l{i}"], stats[f"l{i}"]) = layer(self.cfg, spec, name=f"l{i}")(
        x, cache and cache[f"l{i}"], ctx
      )
      tapped = tap(self.cfg, tapped, x)
    return (x, tapped), (None if cache is None else new, stats)

  def shallow(self, x, passed, cache, ctx):
    """As the call, but layers from number `ctx["depth"]` on pass x on and are not run; `passed` counts them.
    New keys and values are not returned: the layers behind have none."""
    for i, spec in enumerate(self.specs):
      run = lambda layer, x, i=i: layer(x, cache and cache[f"l{i}"], ctx)[0]
      layer = Layer(self.cfg, spec, name=f"l{i}")
      x = nn.cond(passed < ctx["depth"], run, lambda layer, x: x, layer, x)
      passed = passed + 1
    return (x, passed), (None, None)


def tap(cfg: TrunkConfig, tapped, x):
  """(layers passed, states [T, B, S, D] of those in cfg.taps), one layer further; None stays None.

  The states get no gradient: what reads them leaves the trunk as it is.
  """
  if tapped is None:
    return None
  passed, kept = tapped
  place = [cfg.taps.index(i) if i in cfg.taps else len(cfg.taps) for i in range(cfg.layers)]
  at = jnp.asarray(place, jnp.int32)[passed]
  return passed + 1, kept.at[at].set(jax.lax.stop_gradient(x), mode="drop")


class Stack(nn.Module):
  """The only scan over layers: each segment's pattern, over its repeats. Takes and returns (x, tapped)."""

  cfg: TrunkConfig

  @nn.compact
  def __call__(self, x, cache, ctx):
    new, stats = {}, {}
    for i, segment in enumerate(self.cfg.segments):
      scan = nn.scan(
        Pattern,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, nn.broadcast),
        out_axes=0,
        length=segment.repeats,
        metadata_params={nn.PARTITION_NAME: "layers"},
      )
      body = scan(self.cfg, segment.pattern, name=f"s{i}")
      x, (new[f"s{i}"], stats[f"s{i}"]) = body(x, cache and cache[f"s{i}"], ctx)
    return x, None if cache is None else new, stats


class Heads(nn.Module):
  """Output heads: {term: Dist} for the targets of a call."""

  cfg: TrunkConfig

  @nn.compact
  def __call__(
    self, hidden, tables, targets: dict[str, Target], taps=None, pos=None, anchor=None, prefix=None
  ):
    cfg = self.cfg
    made = {}
    for name, head in cfg.heads:
      if head.kind == "flow":
        field = heads.FlowField(cfg, head, name=name)
        if self.is_initializing():
          field(jnp.zeros((1, head.size)), jnp.zeros((1,)), hidden[0, :1])
          made[name] = None
        else:
          made[name] = self.variables["params"][name]
        continue
      if head.kind == "latent":
        continue
      if head.kind == "block":
        made[name] = drafts.BlockDrafter(cfg, head, name=name)
        if self.is_initializing():
          made[name](taps, pos, drafts.empty_block(), tables)
        continue
      if head.kind == "draft":
        made[name] = drafts.Draft(cfg, head, name=name)
        if self.is_initializing():
          made[name](hidden[:, :1], jnp.zeros((1, 1, head.given * cfg.width), hidden.dtype))
        continue
      size = cfg.vocab_padded if head.size is None else head.size
      bias = None
      if head.tied:
        weight = tables["tokens"].astype(jnp.dtype(cfg.dtype))
        if head.bias:
          bias = self.param(f"{name}_bias", param_init(0.0, ("vocab",)), (size,), jnp.dtype(cfg.param_dtype))
      else:
        std = 0.0 if head.zero_init else None
        axes = ("embed", "vocab" if head.size is None else None)
        width = cfg.width + ((head.width or cfg.width) if head.kind == "joint" else 0)
        weight, bias = Linear(cfg, "bsd,dv->bsv", (width, size), axes, head.bias, std, name=name)()
      made[name] = weight, bias
    dists = {}
    for term, target in targets.items():
      head = cfg.head(target.head)
      states = made[target.head](taps, pos, target.given, tables) if head.kind == "block" else hidden
      states = anchor if target.head == "anchor" and anchor is not None else states
      states = prefix if head.kind == "draft" and prefix is not None else states
      h, valid = heads.read(states, target)
      if head.kind == "flow":
        dists[term] = heads.Flow(h, made[target.head], valid, target.given, head, cfg)
      elif head.kind == "latent":
        dists[term] = drafts.Latent(h, heads.at(hidden, target.given["slot"]), valid)
      elif head.kind == "block":
        read = drafts.reading(cfg, head)
        dists[term] = heads.Categorical(h, made[head.like][0], None, valid, read, cfg.vocab)
      elif head.kind == "draft":
        fed = drafts.embedded(cfg, tables["tokens"], target.given, head.given, h)
        h, weight = made[target.head](h, fed)
        trunk = cfg.head(head.like)
        weight = made[head.like][0] if weight is None else weight
        read = dataclasses.replace(
          trunk, forbid=head.forbid, tied=trunk.tied and head.shared, chunk=head.chunk
        )
        dists[term] = heads.Categorical(h, weight, None, valid, read, cfg.vocab)
      else:
        weight, bias = made[target.head]
        h = joint.joined(h, target.given, head.width or cfg.width) if head.kind == "joint" else h
        size = cfg.vocab if head.size is None else head.size
        dists[term] = heads.Categorical(h, weight, bias, valid, head, size)
    return dists


def plans(cfg: TrunkConfig, inputs: Inputs) -> dict:
  """Tile lists of a call without a cache, by mask pattern."""
  masks = {p: inputs.masks[p] for p in cfg.patterns}
  tiles = cfg.attention_tiles
  tiles = kernels.safe_tiles(kernels.resolve(cfg.attention), tiles) if cfg.attention_safe else tiles
  options = dict(tiles=tiles, capacity=cfg.attention_capacity)
  return attend.plans(masks, inputs.doc.shape[0], cfg.attention, cfg.context, **options)


def drafted(cfg: TrunkConfig, targets: dict[str, Target]) -> bool:
  """A draft head is asked."""
  return any(cfg.head(t.head).kind == "draft" for t in targets.values())


class Trunk(nn.Module):
  """Inputs → Outputs; see `Model.apply`."""

  cfg: TrunkConfig

  @nn.compact
  def __call__(
    self, inputs: Inputs, targets: dict[str, Target], cache: Cache | None = None, depth=None
  ) -> Outputs:
    cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
    B, S = inputs.doc.shape
    tables = Tables(cfg, name="embed")()
    x = constrain(self._embed(inputs, tables).astype(dtype), ("batch", "seq", "act_embed"))
    ctx, work = self._context(inputs, tables, cache)
    x = dropout(self, x)
    out, anchor = Heads(cfg, name="heads"), None
    if cfg.anchor:
      x, anchor = self._anchor(inputs, x, tables, ctx, out, cache)
    tapped = None
    if depth is not None:
      ctx, tapped = ctx | {"depth": depth}, jnp.int32(0)
    elif (
      self.is_initializing()
      or cache is not None
      or any(cfg.head(t.head).kind == "block" for t in targets.values())
    ):
      tapped = (jnp.int32(0), jnp.zeros((len(cfg.taps), *x.shape), dtype)) if cfg.taps else None
    x, new, stats = Stack(cfg, name="stack")((x, tapped), None if cache is None else cache.layers, ctx)
    x, tapped = x
    taps = None if tapped is None or depth is not None else tapped[1]
    norm, prefix = trunk_norm(cfg, "final_norm"), None
    if (
      cfg.prefix and depth is None and (self.is_initializing() or cache is not None or drafted(cfg, targets))
    ):
      past = None if cache is None else cache.layers["prefix"]
      (y, _), later, _ = Stack(cfg.prefixed, name="prefix")((x, None), past, ctx)
      prefix, new = norm(y), None if cache is None else new | {"prefix": later}
    x = norm(x)
    if cfg.adaln == "zero":
      shape, axes = (cfg.cond_width, 2, cfg.width), ("cond", None, "embed")
      mod = Linear(cfg, "bec,cnd->bend", shape, axes, True, 0.0, name="final_mod")(ctx["cond"])
      scale, shift = modulation(mod, ctx["cond_index"], (0, 0))
      x = x * (1 + scale) + shift
    dists = out(x, tables, targets, taps, inputs.pos, anchor, prefix)
    if cache is not None:
      code = {p: jnp.broadcast_to(inputs.masks[p].code, (B, S)) for p in cfg.patterns}
      new = None if depth is not None else {"code": code, "layers": new}
    layers = {"hidden": x}
    if cfg.moe is not None and depth is None:
      layers |= {"router": per_layer(stats, cfg), "loads": loads(stats)}
    layers |= {} if taps is None else {"taps": taps}
    layers |= {} if prefix is None else {"prefix": prefix}
    return Outputs(dists, new, work, layers)

  def _anchor(self, inputs: Inputs, x, tables, ctx, out, cache):
    """x with the anchor's mean embeddings added, and the anchor's final states."""
    cfg, (B, S, D) = self.cfg, x.shape
    if cache is not None:
      raise ValueError("a model with an anchor has no cache: both its networks see the whole text")
    (y, _), _, _ = Stack(cfg.anchored, name="anchor")((x, None), None, ctx)
    y = trunk_norm(cfg, "anchor_norm")(y)
    add = Linear(cfg, "bsi,io->bso", (D, D), ("embed", "mlp"), False, 0.0, name="anchor_in")
    if self.is_initializing():
      return x + add(jnp.zeros_like(x)), y
    there = inputs.doc >= 0
    slot = jnp.where(there, jnp.arange(S, dtype=jnp.int32), -1)
    every = Target("anchor", slot, jnp.zeros((B, S), jnp.int32), there.astype(jnp.float32))
    mean = out(y, tables, {"anchor": every})["anchor"].expected(tables["tokens"]) * cfg.embed_scale
    return x + add(mean.astype(x.dtype)), y

  def _embed(self, inputs: Inputs, tables):
    cfg = self.cfg
    B, S = inputs.doc.shape
    x = jnp.zeros((B, S, cfg.width), jnp.dtype(cfg.param_dtype))
    if inputs.ids is not None:
      if inputs.ids.shape != (B, S, len(cfg.channels)):
        raise ValueError(
          f"inputs.ids: expected int32[{B}, {S}, {len(cfg.channels)}], a channel for each of {cfg.channels}; "
          f"got {inputs.ids.shape}"
        )
      for i, name in enumerate(cfg.channels):
        x = x + attend.lookup(tables[name], inputs.ids[..., i], name == "tokens")
    if cfg.features:
      shape, bias = (cfg.features, cfg.width), "features" in cfg.bias
      project = Linear(cfg, "bsf,fd->bsd", shape, (None, "embed"), bias, name="features")
      if inputs.features is not None:
        x = x + project(inputs.features.astype(jnp.dtype(cfg.dtype)))
    elif inputs.features is not None:
      raise ValueError(f"inputs.features of shape {inputs.features.shape}, but the model has features=0")
    x = x * cfg.embed_scale
    if cfg.learned_pos:
      at = jnp.clip(inputs.pos[..., 0].astype(jnp.int32), -1, cfg.learned_pos - 1)
      x = x + attend.lookup(tables["pos"], at)
    return x if inputs.add_embed is None else x + inputs.add_embed

  def _context(self, inputs: Inputs, tables, cache: Cache | None):
    """What every layer of the scan reads, and the work of the call."""
    cfg = self.cfg
    B = inputs.doc.shape[0]
    ctx = {"route": inputs.route, "valid": inputs.doc >= 0}
    missing = [p for p in cfg.patterns if p not in inputs.masks]
    if missing:
      raise ValueError(f"layers attend under patterns {list(cfg.patterns)}, inputs.masks lacks {missing}")
    if cfg.rope is not None:
      for spec in {s for segment in cfg.segments for s in segment.pattern}:
        base = cfg.rope.base if spec.rope_base is None else spec.rope_base
        scaling = cfg.rope.scaling if spec.rope_scaling else None
        tables_at = ctx.setdefault("rope", {})
        tables_at[rope_key(cfg, spec)] = rope.angles(cfg.rope, cfg.rope_axes, inputs.pos, base, scaling)
    if cfg.cond:
      if inputs.cond is None:
        raise ValueError(f"the model is conditioned on {[n for n, _ in cfg.cond]}, inputs.cond is None")
      ctx["cond"] = Conditions(cfg, name="cond")(inputs.cond, tables)
      ctx["cond_index"] = inputs.cond_index
    if self.is_initializing():
      return ctx, None
    masks = {p: inputs.masks[p] for p in cfg.patterns}
    pairs = {p: jnp.broadcast_to(m.pairs(), inputs.doc.shape) for p, m in masks.items()}
    if cache is None:
      ctx["plans"] = plans(cfg, inputs)
    else:
      of = (cfg.num_heads, cfg.num_kv_heads, cfg.attention_safe)
      wide = lambda x: jnp.broadcast_to(x, (B, *x.shape[1:]))
      past = {p: AttnMask(cache.code[p], wide(m.lo), wide(m.hi)) for p, m in masks.items()}
      ctx["plans"] = attend.plans(masks, B, cfg.attention, decode=of)
      ctx["cache_plans"] = attend.plans(past, B, cfg.attention, decode=of)
      pairs = {p: n + past[p].pairs() for p, n in pairs.items()}
    work = {"slots": (inputs.doc >= 0).sum(dtype=jnp.int32), "pairs": pairs}
    if cfg.attention_capacity is not None and cache is None:
      flags = {p: getattr(plan, "overflow", None) for p, plan in ctx["plans"].items()}
      work["overflow"] = {p: x.sum(dtype=jnp.int32) for p, x in flags.items() if x is not None}
    return ctx, work
