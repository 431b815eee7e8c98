"""From hidden states to lazy distributions.

A Dist is made inside `apply` and holds what is needed to compute logits, never the logits: `map` makes
them chunk by chunk, in float32, and again in the backward pass.

Legend: B rows · M read positions · D width · V classes · R draws · F features of a continuous token.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from genmodels.contracts import Target, pytree
from genmodels.kernels.cross_entropy import chunked_map, project
from genmodels.models import attend
from genmodels.models.config import Head, TrunkConfig
from genmodels.models.layers import Linear
from genmodels.parallel.rules import BATCH_AXES

Array = jax.Array


@pytree("head", "vocab")
class Categorical:
  """Softmax over `vocab` classes; classes in `head.forbid` have probability 0.

  Fields:
    hidden: [B, M, D]; weight: [D, Vp], or [Vp, D] of a tied head; bias: [Vp] or None; Vp ≥ vocab,
      classes beyond are padding.
    valid: bool[B, M]; everything is 0 elsewhere, and chunks without a valid position are skipped.
  """

  hidden: Array
  weight: Array
  bias: Array | None
  valid: Array
  head: Head
  vocab: int

  def map(self, fn, *xs):
    """fn(logits float32[c, V], *chunks of xs) on every valid position.

    On a mesh it runs inside a shard_map: rows over data × fsdp, positions over context × tensor, the
    output weight gathered, no collective inside. `fn` works on rows independently; arrays that it
    needs per position come through `xs`.

    Args:
      xs: pytrees of arrays [B, M, …].

    Returns:
      fn's pytree with leaves [B, M, …], zero where invalid.
    """
    return self._map(lambda _, logits, *xs: fn(logits, *xs), xs)

  def cross_entropy(self, other: Categorical, temperature: float = 1.0) -> Array:
    """float32[B, M]: −Σ_v q(v) ln p(v) of this p against another q over the same classes (a teacher's).

    Both logits exist one chunk at a time; gradients flow to both unless one is stopped.

    Args:
      temperature: of both.
    """

    def fn(weight, logits, hidden):
      taught = other._logits(project(weight[0], hidden, other.head.tied), weight[1])
      q = jax.nn.softmax(taught / temperature, -1)
      logp = jax.nn.log_softmax(logits / temperature, -1)
      return -jnp.where(q > 0, q * jnp.where(q > 0, logp, 0), 0).sum(-1)

    return self._map(fn, (other.hidden,), (other.weight, other.bias))

  def _map(self, fn, xs, replicated=()):
    """`map` of fn(replicated, logits, *xs): `replicated` arrays are gathered whole beside the weight."""
    B, M = self.valid.shape
    xs, tree = jax.tree.flatten(xs)

    def logits_of(weight, hidden):
      return self._logits(project(weight[0], hidden, self.head.tied), weight[1])

    def local(hidden, weight, replicated, valid, xs):
      b, m = valid.shape
      flat = lambda x: x.reshape(b * m, *x.shape[2:])
      out = chunked_map(
        flat(hidden),
        weight,
        flat(valid),
        lambda logits, *xs: fn(replicated, logits, *jax.tree.unflatten(tree, xs)),
        [flat(x) for x in xs],
        chunk=self.head.chunk,
        logits_fn=logits_of,
      )
      return jax.tree.map(lambda x: x.reshape(b, m, *x.shape[1:]), out)

    local = jax.named_scope("head")(local)
    args = self.hidden, (self.weight, self.bias), replicated, self.valid, xs
    mesh = attend.active_mesh()
    if mesh is None:
      return local(*args)
    rows = P(attend.split(mesh, BATCH_AXES, B), attend.split(mesh, ("context", "tensor"), M))
    # Unchecked: with varying types, the gradient of what fn closes over (or of `replicated`) would be
    # summed over devices inside the loop over chunks, whose length differs from device to device. This
    # way it is summed once, outside.
    specs = (rows, P(), P(), rows, rows)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)(*args)

  def _logits(self, raw, bias):
    """Bias, soft cap, forbidden classes; the vocabulary's padding is cut off."""
    raw = raw[:, : self.vocab]
    if bias is not None:
      raw = raw + bias[: self.vocab].astype(jnp.float32)
    if self.head.soft_cap is not None:
      raw = self.head.soft_cap * jnp.tanh(raw / self.head.soft_cap)
    if self.head.forbid:
      dead = np.zeros((self.vocab,), bool)
      dead[list(self.head.forbid)] = True
      raw = jnp.where(dead, -jnp.inf, raw)
    return raw

  def nll(self, value: Array) -> Array:
    """float32[B, M], −ln p(value), value int32[B, M]; inf at a class of probability 0."""

    def fn(logits, v):
      at = jnp.take_along_axis(logits, v[:, None], 1)[:, 0]
      return jax.nn.logsumexp(logits, -1) - at

    return self.map(fn, jnp.clip(value, 0, self.vocab - 1))

  def entropy(self) -> Array:
    """float32[B, M], nats."""

    def fn(logits):
      p = jax.nn.softmax(logits, -1)
      logp = jax.nn.log_softmax(logits, -1)
      return -jnp.where(p > 0, p * jnp.where(p > 0, logp, 0), 0).sum(-1)

    return self.map(fn)

  def expected(self, table: Array) -> Array:
    """float32[B, M, W]: Σ_v p(v) table[v] of a table [≥ vocab, W]: the mean embedding predicted."""

    def fn(replicated, logits):
      return jax.nn.softmax(logits, -1) @ replicated[0][: self.vocab].astype(jnp.float32)

    return self._map(fn, (), (table,))

  def argmax_prob(self) -> tuple[Array, Array]:
    """Most probable class int32[B, M] and its probability float32[B, M]."""

    def fn(logits):
      best = logits.argmax(-1).astype(jnp.int32)
      return best, jnp.exp(logits.max(-1) - jax.nn.logsumexp(logits, -1))

    return self.map(fn)

  def sample(self, key: Array, temperature=1.0, top_k: int = 0, top_p: float = 1.0, with_prob: bool = False):
    """int32[B, M]; draws by Gumbel-max with 52 random bits (a 23-bit Gumbel truncates the tail, which
    lowers the temperature: max ≈ 15.9), filters in the order temperature, top-k, top-p.

    Args:
      key: one key, or keys [B, M]: the draw at a position depends on its key and logits only.
      temperature: number or float[B, M]; 0 is argmax.
      top_k: 0 keeps all. top_p: the smallest set of classes with this mass is kept.
      with_prob: also return the probability float32[B, M] of the drawn class, before the filters
        and at temperature 1 (the confidence of diffusion samplers).
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
      key = jax.random.wrap_key_data(key)
    impl = jax.random.key_impl(key)
    keys = key if key.shape == self.valid.shape else jax.random.split(key, self.valid.shape)
    temperature = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), self.valid.shape)

    def fn(logits, data, temp):
      kept = _filter(logits / jnp.where(temp > 0, temp, 1)[:, None], top_k, top_p)
      draw = lambda d, z: jax.random.categorical(jax.random.wrap_key_data(d, impl=impl), z, mode="high")
      ids = jnp.where(temp > 0, jax.vmap(draw)(data, kept), logits.argmax(-1)).astype(jnp.int32)
      at = jnp.take_along_axis(logits, ids[:, None], 1)[:, 0]
      return ids, jnp.exp(at - jax.nn.logsumexp(logits, -1))

    ids, prob = self.map(fn, jax.random.key_data(keys), temperature)
    return (ids, prob) if with_prob else ids

  def guide(self, uncond: Categorical, scale) -> Categorical:
    """Classifier-free guidance: logits u + scale·(c − u), up to a constant of the softmax.

    Logits are linear in the hidden state, so the guided Dist is one of the same kind, at the price of
    one: scale 1 is the conditional Dist, 0 the unconditional one.

    Args:
      uncond: Dist of the same head without the condition. scale: number or float[B, M].

    Raises:
      ValueError: the head has a soft cap, which is not linear.
    """
    if self.head.soft_cap is not None:
      raise ValueError(
        f"guide: head {self.head} has a soft cap, so logits are not linear in the hidden state"
      )
    s = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), self.valid.shape)[..., None]
    c, u = self.hidden.astype(jnp.float32), uncond.hidden.astype(jnp.float32)
    return self.replace(hidden=u + s * (c - u), valid=self.valid & uncond.valid)


def _filter(logits, top_k: int, top_p: float):
  """−inf outside of the top-k classes, then outside of the top-p ones."""
  V = logits.shape[-1]
  if 0 < top_k < V:
    logits = jnp.where(logits < jax.lax.top_k(logits, top_k)[0][:, -1:], -jnp.inf, logits)
  if top_p < 1:
    ordered = jnp.flip(jnp.sort(logits, -1), -1)
    p = jax.nn.softmax(ordered, -1)
    kept = jnp.cumsum(p, -1) - p < top_p  # the class that crosses top_p is kept
    logits = jnp.where(logits < jnp.where(kept, ordered, jnp.inf).min(-1, keepdims=True), -jnp.inf, logits)
  return logits


class FlowField(nn.Module):
  """v(z, t | h): residual MLP, every block modulated by time and hidden state (MAR, arXiv:2406.11838)."""

  cfg: TrunkConfig
  head: Head

  @nn.compact
  def __call__(self, z, t, hidden):
    """float32[n, F] from z [n, F], levels t [n] and hidden [n, D]."""
    cfg, F, D = self.cfg, self.head.size, self.cfg.width
    W = self.head.width or D

    def linear(name, n_in, n_out, axes=(None, "mlp"), std=None):
      return Linear(cfg, "ni,io->no", (n_in, n_out), axes, True, std, name=name)

    def norm(y, scale, shift):
      y = y.astype(jnp.float32)
      y = y - y.mean(-1, keepdims=True)
      y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-6)
      return (y * (1 + scale) + shift).astype(hidden.dtype)

    time = sinusoids(t * self.head.time_scale, 256).astype(hidden.dtype)
    time = linear("time_out", W, W, ("embed", "mlp"))(jax.nn.silu(linear("time_in", 256, W)(time)))
    c = jax.nn.silu(time + linear("hidden", D, W, ("embed", "mlp"))(hidden))
    x = linear("in", F, W)(z.astype(hidden.dtype))
    for i in range(self.head.depth):
      m = linear(f"mod{i}", W, 3 * W, ("embed", "mlp"), 0.0)(c)
      scale, shift, gate = jnp.split(m, 3, -1)
      y = jax.nn.silu(linear(f"up{i}", W, W, ("embed", "mlp"))(norm(x, scale, shift)))
      x = x + gate * linear(f"down{i}", W, W, ("mlp", "embed"))(y)
    scale, shift = jnp.split(linear("mod_out", W, 2 * W, ("embed", "mlp"), 0.0)(c), 2, -1)
    return linear("out", W, F, ("embed", None), 0.0)(norm(x, scale, shift)).astype(jnp.float32)


def sinusoids(t, size: int):
  """cos and sin float32[…, size] of t at size/2 frequencies 10000^(−i/(size/2)) (DDPM, DiT)."""
  freq = jnp.exp(-math.log(10000.0) * jnp.arange(size // 2) / (size // 2))
  angle = t.astype(jnp.float32)[..., None] * freq
  return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)


@pytree("head", "cfg")
class Flow:
  """A velocity field on the straight path z = (1 − t)·x + t·ε from data x (t = 0) to noise ε (t = 1).

  Fields:
    hidden: [B, M, D]; params: of the FlowField; valid: bool[B, M].
    given: {"z": float[B, M, R, F], "t": float[B, M, R]}, R noised draws, or None when sampling.
  """

  hidden: Array
  params: Any
  valid: Array
  given: Any
  head: Head
  cfg: TrunkConfig

  def velocity(self, x: Array, t) -> Array:
    """dz/dt, float32 of x's shape: x [B, M, F] or [B, M, R, F], t of the shape x[…, 0] or a number."""
    t = jnp.broadcast_to(jnp.asarray(t, jnp.float32), x.shape[:-1])
    hidden = self.hidden if x.ndim == 3 else self.hidden[:, :, None]
    hidden = jnp.broadcast_to(hidden, (*x.shape[:-1], self.hidden.shape[-1]))
    flat = lambda y, n: y.reshape(-1, *y.shape[n:])
    n = x.ndim - 1
    field = FlowField(self.cfg, self.head)
    return field.apply({"params": self.params}, flat(x, n), flat(t, n), flat(hidden, n)).reshape(x.shape)

  def nll(self, value: Array) -> Array:
    """float32[B, M]: mean over draws and features of |v(z, t) − (ε − x)|², the flow-matching bound up
    to scale and constant.

    Args:
      value: float[B, M, F], the clean token x; ε − x = (z − x)/t.

    Raises:
      ValueError: the Target gave no draws.
    """
    if self.given is None:
      raise ValueError(
        "a flow head's loss needs Target.given = {'z': [B, M, R, F], 't': [B, M, R]}, got None"
      )
    z, t = self.given["z"].astype(jnp.float32), self.given["t"].astype(jnp.float32)
    want = (z - value[:, :, None].astype(jnp.float32)) / jnp.maximum(t, 1e-4)[..., None]
    error = jnp.square(self.velocity(z, t) - want).mean((-2, -1))
    return jnp.where(self.valid, error, 0)

  def sample(self, key: Array, steps: int = 32, temperature: float = 1.0) -> Array:
    """float32[B, M, F]: Euler steps from noise of standard deviation `temperature`, t = 1 … 0."""
    shape = (*self.valid.shape, self.head.size)
    z = jax.random.normal(key, shape) * temperature

    def body(i, z):
      return z - self.velocity(z, 1 - i / steps) / steps

    return jnp.where(self.valid[..., None], jax.lax.fori_loop(0, steps, body, z), 0)


def read(hidden: Array, target: Target) -> tuple[Array, Array]:
  """Hidden states [B, M, D] at the target's slots, and bool[B, M]: a slot and a weight are there."""
  return at(hidden, target.slot), (target.slot >= 0) & (target.weight != 0)


def at(hidden: Array, slot: Array) -> Array:
  """hidden [B, S, D] at slots int32[B, M], clipped into the row: [B, M, D]."""
  return jax.vmap(lambda h, i: h[i])(hidden, jnp.clip(slot, 0, hidden.shape[1] - 1))
