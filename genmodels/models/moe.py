"""Mixture of experts: routing without capacity, rows sorted by expert, one grouped product per site.

  logits = x · router          s = softmax or sigmoid (logits), float32
  chosen = top_k(s + bias)     within the best groups, where groups are configured
  y      = scale · Σ_chosen w_e · MLP_e(x) + MLP_shared(x),   w = s, or s over the sum of the chosen

Every slot goes to its top_k experts, whatever the others chose: nothing is dropped, so a slot's output
depends on no other slot. Empty slots (doc < 0) go to no expert and count in no statistic. (Qwen3:
arXiv:2505.09388; DeepSeek-V3: arXiv:2412.19437; no capacity: MegaBlocks, arXiv:2211.15841.)

On a mesh everything after the router's product runs inside shard_map: slots stay where they are (rows over
data × fsdp, slots over context), each device sorts its own. Expert kernels are stored split over fsdp by
expert and over tensor by hidden unit; each layer gathers them over fsdp before use and forgets them after it,
the backward pass gathers them again and reduce-scatters their gradients (ZeRO-3). Over tensor every device
computes its hidden units, and the outputs are summed once per slot, not once per choice.

Legend: B rows · S slots · T slots of a device · D width · E experts · K experts of a slot · N = T·K
· F hidden units of an expert · G groups · n devices that hold different slots.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from genmodels import kernels
from genmodels.kernels.varying import vary
from genmodels.models import attend
from genmodels.models.config import Moe, TrunkConfig, layer_path
from genmodels.models.layers import ACTIVATIONS, Linear, Mlp, out_std, param_init
from genmodels.parallel.rules import BATCH_AXES

Array = jax.Array


def route(logits: Array, moe: Moe, bias: Array | None = None) -> tuple[Array, Array, Array]:
  """Which experts each slot takes, and how much of each.

  Args:
    logits: float32[T, E]. bias: float32[E] or None, added to the scores that the choice is made with.

  Returns:
    (experts int32[T, K], best first; weights float32[T, K]; scores float32[T, E]).
  """
  T, E = logits.shape
  scores = jax.nn.softmax(logits, -1) if moe.score == "softmax" else jax.nn.sigmoid(logits)
  choice = jax.lax.stop_gradient(scores if bias is None else scores + bias)
  if moe.groups > 1:
    by_group = choice.reshape(T, moe.groups, E // moe.groups)
    rank = jax.lax.top_k(by_group, 2)[0].sum(-1)
    best = jax.lax.top_k(rank, moe.top_groups)[1]
    kept = (best[:, None] == jnp.arange(moe.groups)[:, None]).any(-1)
    choice = jnp.where(kept[..., None], by_group, -jnp.inf).reshape(T, E)
  experts = jax.lax.top_k(choice, moe.top_k)[1].astype(jnp.int32)
  weights = jnp.take_along_axis(scores, experts, 1)
  if moe.normalise:
    weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
  return experts, weights * moe.scale, scores


def order_by_expert(experts: Array, count: int) -> tuple[Array, Array, Array]:
  """The sort that brings the choices of each expert together.

  Args:
    experts: int32[N], `count` for a choice that goes nowhere.

  Returns:
    order int32[N] (sorted position → choice), inverse int32[N] (choice → sorted position), sizes int32[E].
  """
  at = jnp.arange(experts.shape[0], dtype=jnp.int32)
  ordered, order = jax.lax.sort((experts, at), num_keys=1, is_stable=True)
  inverse = jax.lax.sort((order, at), num_keys=1)[1]
  ends = jnp.searchsorted(ordered, jnp.arange(count, dtype=jnp.int32), side="right").astype(jnp.int32)
  return order, inverse, jnp.diff(ends, prepend=0)


# A permutation's gradient is the inverse permutation. Autodiff does not know that the indices are one, and
# would scatter-add: slow on TPU, of no fixed order on GPU.


@jax.custom_vjp
def _dispatch(x: Array, order: Array, inverse: Array) -> Array:
  """[N, D], the slot of each sorted choice, from x [T, D]."""
  return _take(x, order // (order.shape[0] // x.shape[0]))


def _dispatch_forward(x, order, inverse):
  return _dispatch(x, order, inverse), (x.shape[0], inverse)


def _dispatch_backward(residuals, g):
  T, inverse = residuals
  g = _take(g, inverse).reshape(T, -1, g.shape[-1])
  return g.astype(jnp.float32).sum(1).astype(g.dtype), None, None


_dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def _collect(y: Array, order: Array, inverse: Array) -> Array:
  """[N, D], choice by choice again, from y [N, D] sorted by expert."""
  return _take(y, inverse)


_collect.defvjp(
  lambda y, order, inverse: (_collect(y, order, inverse), order),
  lambda order, g: (_take(g, order), None, None),
)


def _take(x: Array, index: Array) -> Array:
  return x.at[index].get(mode="promise_in_bounds")


def mixture(
  x: Array, experts: Array, weights: Array, valid: Array, hidden, count: int
) -> tuple[Array, Array]:
  """Σ over the chosen experts of weight · MLP(x), on one device.

  Args:
    x: [T, D]. experts, weights: [T, K]. valid: bool[T].
    hidden: (rows [N, D] sorted by expert, sizes int32[E]) -> [N, D].
    count: E.

  Returns:
    ([T, D] in x's dtype, zero where not valid; sizes int32[E], choices of each expert).
  """
  T, K = experts.shape
  order, inverse, sizes = order_by_expert(jnp.where(valid[:, None], experts, count).reshape(-1), count)
  out = hidden(_dispatch(x, order, inverse), sizes)
  out = _collect(out, order, inverse).reshape(T, K, -1)
  return jnp.einsum("tkd,tk->td", out.astype(jnp.float32), weights).astype(x.dtype), sizes


class MoeMlp(nn.Module):
  """The experts of a layer, and those that all slots share. (output [B, S, D], statistics).

  Statistics, sums over the valid slots of each device: "load" float32[n, E] choices, "score" float32[n, E]
  scores (sigmoid ones over their sum), "z" float32[n] squares of the logits' log-sum-exp, "slots" float32[n].
  """

  cfg: TrunkConfig

  @nn.compact
  def __call__(self, x, ctx):
    cfg, moe = self.cfg, self.cfg.moe
    D, E = cfg.width, moe.experts
    route_ = ctx.get("route")
    router = Linear(cfg, "bsd,de->bse", (D, E), ("embed", None), dtype="float32", name="router")
    logits = router(x.astype(jnp.float32), route_)
    bias = None
    if moe.bias:
      bias = self.param("expert_bias", param_init(0.0, ("norm",)), (E,), jnp.float32)
    stacks = Experts(cfg, name="experts")(route_)
    shared = Mlp(cfg, moe.shared, name="shared")(x, route_) if moe.shared else 0
    if self.is_initializing():
      one = jnp.zeros((1,), jnp.float32)
      each = jnp.zeros((1, E), jnp.float32)
      return x + shared, {"load": each, "score": each, "z": one, "slots": one}
    y, stats = _sharded(cfg, x, logits, ctx["valid"], bias, stacks)
    return checkpoint_name(y + shared, "mlp_out"), stats


class Experts(nn.Module):
  """The stacked kernels in compute dtype, adapters merged in: gate [E, D, F] or None, up, down [E, F, D]."""

  cfg: TrunkConfig

  @nn.compact
  def __call__(self, route_):
    cfg = self.cfg
    D, E, F = cfg.width, cfg.moe.experts, cfg.moe.mlp
    adapted = any("lora_a" in site for site in self.variables.get("params", {}).values())
    if route_ is not None and adapted:
      raise ValueError(
        "adapters of experts act on every slot, but inputs.route switches them slot by slot: leave the "
        "experts out of model.lora.targets"
      )

    def wide(name):
      axes = ("expert", "expert_embed", "mlp")
      return Linear(cfg, "end,edf->enf", (E, D, F), axes, name=name)()[0]

    axes = ("expert", "mlp", "expert_embed")
    down = Linear(cfg, "enf,efd->end", (E, F, D), axes, std=out_std(cfg), name="down")()[0]
    return wide("gate") if cfg.gated else None, wide("up"), down


def _sharded(cfg: TrunkConfig, x, logits, valid, bias, stacks):
  """The mixture and its statistics, each device on its own slots; see the module."""
  moe, act = cfg.moe, ACTIVATIONS[cfg.activation]
  B, S, D = x.shape
  E = moe.experts
  mesh = attend.active_mesh()
  b = c = t = e = ()
  if mesh is not None:
    b, c = attend.split(mesh, BATCH_AXES, B), attend.split(mesh, ("context",), S)
    t = attend.split(mesh, ("tensor",), moe.mlp)
    # Slots that are the same on all of fsdp (a batch of one) need no gradient: the partitioner gathers.
    e = attend.split(mesh, ("fsdp",), E) if "fsdp" in b else ()

  def hidden(rows, sizes, stacks):
    gate, up, down = stacks
    if e:
      gathered = lambda w: None if w is None else jax.lax.all_gather(w, e, axis=0, tiled=True)
      gate, up, down = gathered(gate), gathered(up), gathered(down)
    product = lambda x, w: kernels.grouped_matmul(x, w, sizes, cfg.expert_matmul)
    y = checkpoint_name(product(rows, up), "mlp_up")
    y = act(y) if gate is None else act(checkpoint_name(product(rows, gate), "mlp_gate")) * y
    return product(y, down)

  if e:  # gathered kernels are no activation to keep, whatever the layer's remat says
    keep = jax.checkpoint_policies.save_only_these_names("mlp_gate", "mlp_up")
    hidden = jax.checkpoint(hidden, policy=keep, prevent_cse=False)

  def local(x, logits, valid, bias, stacks):
    flat = lambda a: a.reshape(-1, *a.shape[2:])
    logits, valid = flat(logits), flat(valid)
    experts, weights, scores = route(logits, moe, bias)
    # Its gradient is summed over tensor here, per slot; in the product it would be per choice.
    rows = vary(flat(x), frozenset(t))
    y, sizes = mixture(rows, experts, weights, valid, lambda r, s: hidden(r, s, stacks), E)
    y = jax.lax.psum(y, t) if t else y
    if moe.score == "sigmoid":
      scores = scores / (scores.sum(-1, keepdims=True) + 1e-20)
    stats = {
      "load": sizes.astype(jnp.float32)[None],
      "score": jnp.where(valid[:, None], scores, 0).sum(0)[None],
      "z": jnp.where(valid, jnp.square(jax.nn.logsumexp(logits, -1)), 0).sum()[None],
      "slots": valid.sum(dtype=jnp.float32)[None],
    }
    return y.reshape(x.shape), stats

  if mesh is None:
    return local(x, logits, valid, bias, stacks)
  here = P(b, c)
  wide, narrow = P(e, None, t), P(e, t)
  kernel_specs = (None if stacks[0] is None else wide, wide, narrow)
  specs = (here, here, here, None if bias is None else P(), kernel_specs)
  out = (here, P(b + c))
  return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out)(x, logits, valid, bias, stacks)


def loads(stats) -> dict:
  """Choices of each expert in a call, summed over devices, where the layers' parameters stand.

  Args:
    stats: as of `per_layer`.

  Returns:
    {"s<segment>": {"l<position>": float32[R, E]}} of the layers with experts, R repeats.
  """
  found = {s: {l: x["load"].sum(1) for l, x in layers.items() if x} for s, layers in stats.items()}
  return {s: layers for s, layers in found.items() if layers}


def balanced(params, load: dict, rate: float):
  """A model's parameters with every `expert_bias` moved by rate·sign(mean load − load): experts that were
  chosen more often than the mean become less attractive (loss-free balancing, Wang et al. 2408.15664,
  algorithm 1).

  Args:
    load: of `loads`, over a step's global batch.
  """
  stack = dict(params["stack"])
  for s, layers in load.items():
    stack[s] = dict(stack[s])
    for l, x in layers.items():
      mlp = stack[s][l]["mlp"]
      move = rate * jnp.sign(x.mean(-1, keepdims=True) - x)
      bias = mlp["expert_bias"] + move.astype(mlp["expert_bias"].dtype)
      stack[s][l] = stack[s][l] | {"mlp": mlp | {"expert_bias": bias}}
  return params | {"stack": stack}


def per_layer(stats, cfg: TrunkConfig) -> dict[str, Array]:
  """The statistics of a call, summed over devices, in the order of the layers.

  Args:
    stats: {"s<segment>": {"l<position>": statistics with a leading axis of repeats}}.

  Returns:
    {"load", "score": float32[L, E], "z", "slots": float32[L]} of the L layers with experts.
  """
  rows: dict[str, list] = {}
  for i in range(cfg.layers):
    segment, repeat, position = layer_path(cfg, i)
    for name, x in (stats[f"s{segment}"][f"l{position}"] or {}).items():
      rows.setdefault(name, []).append(x[repeat])
  return {name: jnp.stack(x).sum(1) for name, x in rows.items()}
