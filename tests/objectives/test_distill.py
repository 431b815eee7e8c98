"""Block distillation (D2F): the teacher is the base, gets no gradient, and agreement costs nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import config, models, objectives
from genmodels.contracts import token_row
from genmodels.models import lora
from genmodels.step import bind

V, MASK = 11, 10


@functools.cache
def setup(masks="full"):
  cfg = config.load("language/d2f:tiny")
  section = config.plain(cfg.objective) | {"masks": {"full": masks}}
  section["corruption"]["blocks"]["size"] = 4
  objective = objectives.build(section, {"mask_id": MASK})
  model = models.build(
    dict(
      width=32, layers=2, num_heads=4, mlp=48, vocab=V, init_std=0.3, heads={"text": {"forbid": (MASK,)}},
      lora={"rank": 2, "targets": "stack/.*/(q|k|v|o)"},
    )
  )  # fmt: skip
  fns = {
    "model": lambda trees, *a, **kw: model.apply(trees["model"], *a, **kw),
    "teacher": lambda trees, *a, **kw: model.apply(lora.strip(trees["model"]), *a, **kw),
  }
  row = token_row(np.random.default_rng(0).integers(0, MASK, (4, 12)))

  def loss(params):
    sums, den, aux = objective.run(bind(fns, {"model": params}), row, jax.random.key(0), 1)
    return sums["distill"] / den["distill"], aux

  return model.init(jax.random.key(1)), jax.jit(jax.value_and_grad(loss, has_aux=True))


def norm(tree, wanted):
  flat = jax.tree_util.tree_flatten_with_path(tree)[0]
  return float(
    sum(jnp.sum(x**2) for path, x in flat if ("lora_" in jax.tree_util.keystr(path)) == wanted) ** 0.5
  )


@pytest.mark.slow
def test_equal_masks_and_weights_give_no_gradient():
  """A fresh adapter under the teacher's own mask: cross-entropy = entropy, gradient of the KL zero."""
  params, grad = setup("full")
  (_, aux), g = grad(params)
  kl, count = aux["ratios"]["kl/distill"]
  assert abs(float(kl / count)) < 1e-5
  assert norm(g, True) < 1e-5 and norm(g, False) < 1e-5
  params, grad = setup("block_causal")  # another mask: now there is something to learn
  (_, aux), g = grad(params)
  kl, count = aux["ratios"]["kl/distill"]
  assert float(kl / count) > 1e-2 and norm(g, True) > 1e-3


def test_teacher_is_the_base_and_gets_no_gradient():
  """Moving the adapter moves the student alone; the teacher's entropy stays."""
  params, grad = setup("block_causal")
  (_, a), _ = grad(params)
  moved = jax.tree_util.tree_map_with_path(
    lambda path, x: x + 0.3 if "lora_b" in jax.tree_util.keystr(path) else x, params
  )
  (_, b), _ = grad(moved)
  cross = lambda aux: np.asarray(aux["per_token"]["distill"])
  entropy = lambda aux: cross(aux).sum() - _weighted_kl(aux)
  assert np.abs(cross(a) - cross(b)).max() > 1e-3
  np.testing.assert_allclose(entropy(a), entropy(b), rtol=1e-4)


def _weighted_kl(aux):
  return float(aux["weighted_kl"]["distill"])


def test_laws_name_the_missing_teacher():
  params, _ = setup("block_causal")
  cfg = config.load("language/d2f:tiny")
  objective = objectives.build(config.plain(cfg.objective), {"mask_id": MASK})
  objective = dataclasses.replace(objective, teacher="absent")
  fns = {"model": lambda *a, **kw: None}
  with pytest.raises(KeyError, match="no network 'absent'"):
    objective.run(bind(fns, {"model": params}), token_row(np.zeros((1, 8))), jax.random.key(0), 0)
