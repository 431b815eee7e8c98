"""Linear, Norm, Attention, Mlp and the transformer layer.

Legend: B rows · S slots · D width · H query heads · G key heads · K head dimension · F MLP width
· E conditions of a row · C condition width · R adapter rank. Einsum letters are the same, in lower case.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from genmodels.models import attend
from genmodels.models.config import LayerSpec, TrunkConfig
from genmodels.models.rope import rotate
from genmodels.parallel import constrain

ACTIVATIONS = {
  "silu": jax.nn.silu,
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
  "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def param_init(std: float, axes, value: float = 0.0):
  """Normal draws (std > 0) or a constant, boxed with logical axes."""
  init = nn.initializers.normal(std) if std > 0 else nn.initializers.constant(value)
  return nn.with_logical_partitioning(init, axes)


class Linear(nn.Module):
  """einsum(eqn, x, kernel) + bias: every matmul weight of a model is made here.

  Adapters are found, not declared: if "lora_a" and "lora_b" stand beside the kernel, their product is
  added; a tree without them is the model without adapters.

  Attributes:
    eqn: "bsd,dhk->bshk"; the kernel's contracted letters come first.
    shape, axes: of the kernel, sizes and logical axis names.
    bias: add one, of the kernel's output dimensions.
    std: of the kernel's normal draw; 0 starts at zero.
    dtype: to compute in, the configuration's by default.

  Letters that stand in x, kernel and result (experts) are a stack: one weight each.
  """

  cfg: TrunkConfig
  eqn: str
  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  bias: bool = False
  std: float | None = None
  dtype: str | None = None

  @nn.compact
  def __call__(self, x=None, route=None):
    """x @ kernel, in x's dtype; without x: (kernel with its adapter, bias or None) in compute dtype.

    Args:
      route: int32[B, S] or None; a slot with 0 gets the base's bits, whatever the adapter holds.

    Raises:
      ValueError: adapters without `model.lora`, or gated ones where no gate arrives.
    """
    cfg, dtype = self.cfg, jnp.dtype(self.dtype or self.cfg.dtype)
    ins, outs = self.eqn.split("->")
    ins, ker = ins.split(",")
    n_in = sum(c not in outs for c in ker)
    std = cfg.init_std if self.std is None else self.std
    kernel = self.param("kernel", param_init(std, self.axes), self.shape, jnp.dtype(cfg.param_dtype))
    bias = None
    if self.bias:
      init = param_init(0.0, self.axes[n_in:])
      bias = self.param("bias", init, self.shape[n_in:], jnp.dtype(cfg.param_dtype)).astype(dtype)
    kernel = kernel.astype(dtype)
    lora = None
    if self.has_variable("params", "lora_a"):
      lora = [self.get_variable("params", name).astype(dtype) for name in ("lora_a", "lora_b")]
      if cfg.lora is None:
        raise ValueError(
          "the parameters hold adapters, but model.lora is None: set it, or strip or merge them"
        )
      if cfg.lora.gated and (x is None or route is None):
        raise ValueError(
          f"{'/'.join(self.path)}: the adapter is gated (model.lora.gated) and no gate arrives: Inputs.route "
          "is None (objective.adapters='masked' makes it), or the site lies outside of the layers, where "
          "model.lora.targets must not reach"
        )
      scale = cfg.lora.alpha / cfg.lora.rank
    if x is None:
      if lora is not None:
        stack = "".join(c for c in ker if c in ins and c in outs)
        into, out = (c for c in ker if c not in outs), (c for c in ker if c not in ins)
        eqn = f"{stack}{''.join(into)}R,{stack}R{''.join(out)}->{ker}"
        kernel = kernel + scale * jnp.einsum(eqn, *lora)
      return kernel, bias
    y = jnp.einsum(self.eqn, x, kernel.astype(x.dtype))
    if lora is not None:
      down = jnp.einsum(f"{ins},{ker[:n_in]}R->{outs[: len(ins) - n_in]}R", x, lora[0])
      wide = y + scale * jnp.einsum(f"{outs[: len(ins) - n_in]}R,R{ker[n_in:]}->{outs}", down, lora[1])
      # Selected, not multiplied by the gate: y + 0 would turn −0 into 0.
      y = (
        wide if route is None else jnp.where((route > 0).reshape(route.shape + (1,) * (y.ndim - 2)), wide, y)
      )
    return y if bias is None else y + bias


class Norm(nn.Module):
  """RMSNorm or LayerNorm over the last axis, float32 inside.

  Attributes:
    kind: "rms" or "layer". affine: has a weight (offset: 1 + w), and a bias if `bias`.
  """

  cfg: TrunkConfig
  kind: str
  affine: bool = True
  bias: bool = False

  @nn.compact
  def __call__(self, x):
    cfg, D = self.cfg, x.shape[-1]
    y = x.astype(jnp.float32)
    if self.kind == "layer":
      y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + cfg.eps)
    if self.affine:
      offset = 1.0 if cfg.norm_offset else 0.0
      init = param_init(0.0, ("norm",), 1.0 - offset)
      y = y * (self.param("scale", init, (D,), jnp.dtype(cfg.param_dtype)) + offset)
    if self.affine and self.bias:
      y = y + self.param("bias", param_init(0.0, ("norm",)), (D,), jnp.dtype(cfg.param_dtype))
    return y.astype(x.dtype)


def trunk_norm(cfg: TrunkConfig, name: str) -> Norm:
  return Norm(cfg, cfg.norm, cfg.norm_affine, "norm" in cfg.bias, name=name)


def dropout(module: nn.Module, x):
  """Inverted dropout when the call carries a "dropout" key."""
  rate = module.cfg.dropout
  if rate == 0 or not module.has_rng("dropout"):
    return x
  keep = jax.random.bernoulli(module.make_rng("dropout"), 1 - rate, x.shape)
  return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def modulation(table, index, identity):
  """Each slot's modulation vectors, gathered from the row's short table: no per-slot product.

  Args:
    table: [B, E, n, D].
    index: int32[B, S], entry of each slot, −1 for `identity`; None: entry 0 for all (needs E = 1).
    identity: n constants: what leaves the layer as it is without AdaLN (gates 1, scales and shifts 0).

  Returns:
    n arrays [B, S, D] ([B, 1, D] where index is None).

  Raises:
    ValueError: several entries without an index.
  """
  B, E, n, _ = table.shape
  table = constrain(table, ("batch", None, None, "act_embed"))
  if index is None:
    if E != 1:
      raise ValueError(
        f"cond has {E} entries a row, so cond_index int32[B, S] must say which each slot takes"
      )
    return [table[:, :, i] for i in range(n)]
  if E == 1:
    rows = [table[:, :, i] for i in range(n)]  # broadcast, no gather
  else:
    rows = jax.vmap(lambda t, i: t[i])(table, jnp.maximum(index, 0))
    rows = [rows[:, :, i] for i in range(n)]
  on = (index >= 0)[..., None]
  return [jnp.where(on, r, jnp.asarray(c, r.dtype)) for r, c in zip(rows, identity)]


class Attention(nn.Module):
  """Grouped-query attention under one mask pattern, over the cache and this call's slots."""

  cfg: TrunkConfig
  spec: LayerSpec

  @nn.compact
  def __call__(self, x, cache, ctx):
    cfg, spec = self.cfg, self.spec
    D, H, G, K = cfg.width, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    route = ctx.get("route")

    # Keys of a second sequence ("memory") stand before those of the slots; it is the same in every layer.
    both = jnp.concatenate([ctx["memory"], x], 1) if "memory" in ctx else x

    def project(site, heads, axis, x):
      eqn, axes = "bsd,dhk->bshk", ("embed", axis, "head_dim")
      return Linear(cfg, eqn, (D, heads, K), axes, site in cfg.bias, name=site)(x, route)

    q, k, v = (
      project("q", H, "heads", x),
      project("k", G, "kv_heads", both),
      project("v", G, "kv_heads", both),
    )
    scale = K**-0.5 if cfg.attn_scale is None else cfg.attn_scale
    if cfg.qk_norm == "rms":
      q, k = Norm(cfg, "rms", name="q_norm")(q), Norm(cfg, "rms", name="k_norm")(k)
    elif cfg.qk_norm == "l2":
      init = param_init(0.0, ("heads",), math.log(4.0))
      log_scale = self.param("log_scale", init, (H,), jnp.dtype(cfg.param_dtype))
      unit = lambda y: y * jax.lax.rsqrt(jnp.square(y.astype(jnp.float32)).sum(-1, keepdims=True) + 1e-24)
      q = (unit(q) * jnp.exp(jnp.minimum(log_scale, math.log(100.0)))[:, None]).astype(x.dtype)
      k, scale = unit(k).astype(x.dtype), 1.0
    if cfg.rope is not None:
      cos, sin = ctx["rope"][rope_key(cfg, spec)]
      q = rotate(q, cos, sin, cfg.rope.pairing)
      k = rotate(k, *ctx.get("key_rope", ctx["rope"])[rope_key(cfg, spec)], cfg.rope.pairing)
    q = checkpoint_name(constrain(q, ("batch", "seq", "act_heads", None)), "q")
    k = checkpoint_name(constrain(k, ("batch", "seq", "act_kv_heads", None)), "k")
    v = checkpoint_name(constrain(v, ("batch", "seq", "act_kv_heads", None)), "v")
    if self.is_initializing():
      y = jnp.zeros_like(q)  # shapes only: parameters do not depend on it
    else:
      y = attend.attention(
        q,
        k,
        v,
        ctx["plans"][spec.mask],
        cache=cache and (cache["k"], cache["v"], ctx["cache_plans"][spec.mask]),
        scale=scale,
        soft_cap=cfg.attn_soft_cap,
        implementation=cfg.attention,
        deterministic=cfg.attention_deterministic,
      )
    # The kernels name their output "attn_out"; a second name here would be a second saved copy.
    axes = ("heads", "head_dim", "embed")
    std = out_std(cfg)
    y = Linear(cfg, "bshk,hkd->bsd", (H, K, D), axes, "o" in cfg.bias, std, name="o")(y, route)
    return checkpoint_name(y, "attn_proj"), None if cache is None else {"k": k, "v": v}


class Mlp(nn.Module):
  """down(act(gate x) · up x), or down(act(up x)); `size` hidden units, the configuration's by default."""

  cfg: TrunkConfig
  size: int | None = None

  @nn.compact
  def __call__(self, x, route):
    cfg = self.cfg
    D, F = cfg.width, self.size or cfg.mlp
    act = ACTIVATIONS[cfg.activation]

    def wide(site):
      y = Linear(cfg, "bsd,df->bsf", (D, F), ("embed", "mlp"), site in cfg.bias, name=site)(x, route)
      return checkpoint_name(constrain(y, ("batch", "seq", "act_mlp")), f"mlp_{site}")

    y = act(wide("gate")) * wide("up") if cfg.gated else act(wide("up"))
    down = Linear(cfg, "bsf,fd->bsd", (F, D), ("mlp", "embed"), "down" in cfg.bias, out_std(cfg), name="down")
    return checkpoint_name(down(y, route), "mlp_out")


class Layer(nn.Module):
  """Pre-norm attention and MLP, with post-norms and AdaLN-zero if configured.

  Returns (x, (new keys and values or None, statistics of the experts or None)).

  AdaLN-zero (VAR, DiT): x += g₁·attn(norm(x)(1 + s₁) + b₁), the MLP alike, with g, s, b linear in
  silu(condition), starting at 0. A slot with cond_index −1 has g = 1, s = b = 0.
  """

  cfg: TrunkConfig
  spec: LayerSpec

  @nn.compact
  def __call__(self, x, cache, ctx):
    cfg = self.cfg
    shift = lambda y, i: y
    gate = lambda y, i: y
    if cfg.adaln == "zero":
      axes = ("cond", None, "embed")
      mod = Linear(cfg, "bec,cnd->bend", (cfg.cond_width, 6, cfg.width), axes, True, 0.0, name="mod")(
        ctx["cond"]
      )
      m = modulation(checkpoint_name(mod, "mod"), ctx["cond_index"], (1, 1, 0, 0, 0, 0))
      shift = lambda y, i: y * (1 + m[2 + i]) + m[4 + i]
      gate = lambda y, i: y * m[i]
    post = (lambda y, name: trunk_norm(cfg, name)(y)) if cfg.post_norm else lambda y, name: y
    y, new = Attention(cfg, self.spec, name="attn")(shift(trunk_norm(cfg, "attn_norm")(x), 0), cache, ctx)
    y = post(y, "attn_post_norm")
    x = constrain(x + gate(dropout(self, y), 0), ("batch", "seq", "act_embed"))
    y, stats = shift(trunk_norm(cfg, "mlp_norm")(x), 1), None
    if self.spec.mlp == "moe":
      from genmodels.models.moe import MoeMlp  # here: it is made of this module's parts

      y, stats = MoeMlp(cfg, name="mlp")(y, ctx)
    else:
      y = Mlp(cfg, name="mlp")(y, ctx.get("route"))
    y = post(y, "mlp_post_norm")
    return constrain(x + gate(dropout(self, y), 1), ("batch", "seq", "act_embed")), (new, stats)


def out_std(cfg: TrunkConfig) -> float:
  """Standard deviation of the residual branches' output weights."""
  return cfg.init_std / math.sqrt(2 * cfg.layers) if cfg.init_out_scale else cfg.init_std


def rope_key(cfg: TrunkConfig, spec: LayerSpec) -> str:
  """Name of the cos and sin tables that a layer shares with those of equal base and scaling."""
  base = cfg.rope.base if spec.rope_base is None else spec.rope_base
  return f"{base!r}{'' if spec.rope_scaling else ' unscaled'}"
