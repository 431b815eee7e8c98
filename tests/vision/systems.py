"""A digits system, built from its config as the trainer builds it, small enough for tests."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from genmodels import config, latents, models, objectives
from genmodels.contracts import token_row
from genmodels.objectives import Nets


@dataclasses.dataclass(frozen=True, eq=False)
class Digits:
  latent: object
  objective: object
  model: models.Model
  params: dict

  @property
  def nets(self) -> Nets:
    return Nets({"model": functools.partial(self.model.apply, self.params)}, latent=self.latent)

  def row(self, count=2, seed=0):
    """`count` images of random grey levels, as the data room would yield them (codes not filled in)."""
    rng = np.random.default_rng(seed)
    N = self.objective.prefix + self.latent.length
    role = np.ones((count, N), np.int32)
    role[:, : self.objective.prefix] = 0
    row = token_row(np.zeros((count, N)), role=role)
    side = {
      "pixels": jnp.asarray(rng.integers(0, 17, (count, 1, 8, 8)), jnp.int32),
      "label": jnp.asarray(rng.integers(0, 10, (count, 1)), jnp.int32),
    }
    return row.replace(docs=row.docs.replace(side=side))


@functools.cache
def build(name: str, *overrides: str, seed=0) -> Digits:
  """The system of a config file, narrowed; every parameter drawn away from 0 and 1."""
  size = (
    "model.width=32",
    "model.layers=1" if "multimodal" in name else "model.layers=2",
    "model.num_heads=2",
    "model.mlp=48",
  )
  cfg = config.load(name, [*size, *overrides])
  latent = latents.build(cfg.latent)
  objective = objectives.build(cfg.objective, latent.meta)
  model = models.build(cfg.model)
  return Digits(latent, objective, model, shake(jax.jit(model.init)(jax.random.key(seed)), seed))


def shake(params, seed=0, scale=0.3):
  """Parameters plus noise: zero-initialised gates and heads would make every test pass trivially."""
  leaves, tree = jax.tree.flatten(params)
  rng = np.random.default_rng(seed)
  return jax.tree.unflatten(
    tree,
    [x + scale * rng.normal(size=x.shape).astype(x.dtype) / np.sqrt(max(x.shape[-1], 1)) for x in leaves],
  )


def logits(dist):
  """float32[B, M, V] of a categorical Dist."""
  return dist.map(lambda x: x)
