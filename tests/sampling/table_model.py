"""A model that is a table, behind the Model interface: p(x_i | visible tokens) of every masked string.

It reads the Inputs of the objective's view, so the whole sampler runs on it; V tokens, id V is the mask.
"""

import dataclasses
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from genmodels.contracts import Outputs

V, L = 2, 3


@dataclasses.dataclass(frozen=True, eq=False)
class TableModel:
  table: np.ndarray  # [(V+1)^L, L, V] log-probabilities
  cfg = SimpleNamespace(patterns=("full",), head=lambda name: SimpleNamespace(kind="categorical"))

  def apply(self, params, inputs, targets, *, cache=None, key=None):
    weights = jnp.asarray((V + 1) ** np.arange(L))
    rows = jnp.asarray(self.table, jnp.float32)[(inputs.ids[..., 0] * weights).sum(-1)]  # [B, L, V]
    dists = {}
    for name, t in targets.items():
      logits = jnp.take_along_axis(rows, jnp.maximum(t.slot, 0)[..., None], 1)
      dists[name] = SimpleNamespace(map=lambda fn, *xs, z=logits: _map(fn, z, xs))
    return Outputs(dists=dists)


def _map(fn, logits, xs):
  B, M, n = logits.shape
  flat = jnp.concatenate([logits, jnp.full((B, M, 1), -jnp.inf)], -1).reshape(B * M, n + 1)
  out = fn(flat, *(x.reshape(B * M, *x.shape[2:]) for x in xs))
  return jax.tree.map(lambda y: y.reshape(B, M, *y.shape[1:]), out)


def random_table(seed=0):
  logits = np.random.default_rng(seed).normal(size=((V + 1) ** L, L, V)) * 1.5
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def uniform_order_law(table):
  """p(x) float64[V**L] of revealing one token at a time, in uniformly random order."""
  p = np.zeros((V,) * L)
  for x in itertools.product(range(V), repeat=L):
    for order in itertools.permutations(range(L)):
      seen, logp = [V] * L, 0.0
      for i in order:
        logp += table[sum(s * (V + 1) ** j for j, s in enumerate(seen)), i, x[i]]
        seen[i] = x[i]
      p[x] += np.exp(logp) / 6
  return p
