"""Tiny models and hand-made inputs, shared by the tests of this folder."""

import jax
import jax.numpy as jnp
import numpy as np

from genmodels import models
from genmodels.contracts import Inputs, Target
from genmodels.masks import AttnMask, Relations, plain_slots

BASE = dict(width=16, num_heads=4, num_kv_heads=2, mlp=24, vocab=19, layers=2)
BD3 = Relations({("n", "n"): "BLK_EQ", ("n", "c"): "BLK_LT", ("c", "c"): "BLK_LE"}, ("n", "c"))


def build(**fields):
  """(model, params) with every leaf random: no norm at one, no bias or gate at zero."""
  model = models.build({**BASE, **fields})
  return model, draw(model.abstract_params())


def draw(shapes, seed=1):
  """Normal draws of deviation 0.3, scales around one; made on the host, so that nothing compiles."""
  rng = np.random.default_rng(seed)

  def leaf(path, s):
    x = 0.3 * rng.standard_normal(s.shape).astype(np.float32)
    return jnp.asarray(x + (path[-1].key == "scale"), s.dtype)

  return jax.tree_util.tree_map_with_path(leaf, shapes)


def causal(S, window=None):
  at = jnp.arange(S, dtype=jnp.int32)[None]
  lo = jnp.zeros_like(at) if window is None else jnp.maximum(at - window + 1, 0)
  return AttnMask(at, lo[:, None], at[:, None] + 1)


def tokens(B, S, vocab=19, seed=0, channels=1):
  return jnp.asarray(np.random.default_rng(seed).integers(0, vocab, (B, S, channels)), jnp.int32)


def inputs(ids, masks=None, pos=None, **more):
  B, S, _ = ids.shape
  if pos is None:
    pos = jnp.broadcast_to(jnp.arange(S, dtype=jnp.float32)[None, :, None], (B, S, 1))
  masks = {"full": causal(S), "local": causal(S, 3)} if masks is None else masks
  return Inputs(ids=ids, pos=pos, doc=jnp.zeros((B, S), jnp.int32), masks=masks, **more)


def everywhere(ids, head="text"):
  """A target at every slot: its own token."""
  B, S, _ = ids.shape
  slot = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
  return {"t": Target(head, slot, ids[..., 0], jnp.ones((B, S)))}


def logits(dist):
  """[B, M, V] of a categorical Dist: for tests."""
  return dist.map(lambda z: z)


def run(model, params, x, targets=None):
  """Logits [B, S, V] at every slot."""
  targets = everywhere(x.ids) if targets is None else targets
  return jax.jit(lambda p, x: logits(model.apply(p, x, targets).dists["t"]))(params, x)


def two_streams(B, N, block):
  """Slots of the rows [noisy | clean] in blocks, int32[B, 2N] each."""
  at = np.broadcast_to(np.arange(N), (B, N))
  both = lambda x: jnp.asarray(np.concatenate([x, x], 1), jnp.int32)
  lo = at // block * block
  stream = jnp.asarray(np.repeat([[0, 1]], N, 1).repeat(B, 0).reshape(B, 2 * N), jnp.int32)
  return plain_slots(
    both(at),
    both(0 * at),
    both(0 * at + N),
    blk_lo=both(lo),
    blk_hi=both(np.minimum(lo + block, N)),
    stream=stream,
  )


def some(tree, index):
  """Arrays [B, S, …] of a pytree at slots `index` (a slice)."""
  return jax.tree.map(lambda x: x[:, index], tree)
