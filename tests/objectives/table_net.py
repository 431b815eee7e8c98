"""A network that is a table: for every partly masked string, a distribution at every position.

It reads the very Inputs that a trunk would read, so an objective's view is under test with it. V real
tokens, id V is the mask. Shapes: P patterns = (V+1)^L, table float32[P, L, V] of log-probabilities.
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from genmodels.contracts import Outputs

V, L = 3, 4
MASK = V


@dataclasses.dataclass
class TableDist:
  logp: jax.Array  # [B, M, V]

  def nll(self, value):
    return -jnp.take_along_axis(self.logp, jnp.clip(value, 0, V - 1)[..., None], -1)[..., 0]


def index(ids):
  """Pattern number of strings int[..., L]."""
  return (ids * (V + 1) ** np.arange(L)).sum(-1)


def random_table(seed: int) -> np.ndarray:
  logits = np.random.default_rng(seed).normal(size=((V + 1) ** L, L, V)) * 1.5
  return (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float32)


def random_joint(seed: int) -> np.ndarray:
  p = np.random.default_rng(seed).dirichlet(np.full(V**L, 0.3))
  return p.reshape((V,) * L)


def oracle_table(joint: np.ndarray) -> np.ndarray:
  """True conditionals p(x_i | visible) of a joint [V]*L, in float64."""
  table = np.zeros(((V + 1) ** L, L, V))
  for pattern in itertools.product(range(V + 1), repeat=L):
    sub = joint[tuple(slice(None) if s == MASK else slice(s, s + 1) for s in pattern)]
    for i in range(L):
      p = sub.sum(tuple(a for a in range(L) if a != i))
      if p.size == 1:
        p = np.eye(V)[pattern[i]]
      table[index(np.array(pattern)), i] = np.log(np.maximum(p / p.sum(), 1e-300))
  return table


def net(table, block: int):
  """fn(inputs, targets) over streams ("n",) or ("n", "c") with blocks of `block`."""
  table = jnp.asarray(table)

  def context(ids):
    """What position i may see: [B, L, L] ids."""
    noisy = ids[:, :L]
    if ids.shape[1] == L:
      return jnp.broadcast_to(noisy[:, None], (ids.shape[0], L, L))
    clean = ids[:, L:]
    b = np.arange(L) // block
    own, before = b[:, None] == b[None], b[None] < b[:, None]
    return jnp.where(own, noisy[:, None], jnp.where(before, clean[:, None], MASK))

  def fn(inputs, targets):
    seen = context(inputs.ids[..., 0])
    row = jnp.take_along_axis(table[index_jnp(seen)], jnp.arange(L)[None, :, None, None], 2)[:, :, 0]
    dists = {}
    for name, t in targets.items():
      slot = jnp.clip(t.slot, 0, L - 1)
      dists[name] = TableDist(jnp.take_along_axis(row, slot[..., None], 1))
    return Outputs(dists=dists)

  return fn


def index_jnp(ids):
  return jnp.sum(ids * jnp.asarray((V + 1) ** np.arange(L)), -1)


def beta_weight(m: int, n: int) -> float:
  """Beta(m, n−m+1) = (m−1)!(n−m)!/n!."""
  return math.factorial(m - 1) * math.factorial(n - m) / math.factorial(n)


def closed_form(x, table, block: int) -> float:
  """The exact negative ELBO of one string in nats, by enumerating every mask of every block."""
  total = 0.0
  for start in range(0, L, block):
    unit = range(start, min(start + block, L))
    for m in range(1, len(unit) + 1):
      for M in itertools.combinations(unit, m):
        ids = np.array([MASK if i in M or i >= unit[-1] + 1 else x[i] for i in range(L)])
        ce = -sum(table[index(ids), i, x[i]] for i in M)
        total += beta_weight(m, len(unit)) * ce
  return total
