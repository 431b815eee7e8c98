"""Hydra++: a layer behind the trunk for the heads alone, and the model itself as their teacher."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import config, models, objectives, sampling
from genmodels import state as states
from genmodels.sampling import draft_heads, speculate
from tests.objectives.test_drafts import SMALL, all_slots, logits, shaken
from tests.objectives.test_text import KEY, MASK, V, rows
from tests.sampling import systems as S
from tests.sampling.test_speculate import assert_same

ROW = rows((13, 9), B=2)


@pytest.fixture(scope="module")
def plus():
  """(objective, model, parameters with moved heads) of the tiny variant, smaller: two heads of one block."""
  cfg = config.load("language/hydra:plus_tiny")
  for k in (3, 4):
    del cfg.objective.terms[f"hydra{k}"], cfg.model.heads[f"hydra{k}"]
  section = config.plain(cfg.model) | SMALL | {"vocab": V, "head_dim": 8}
  for head in section["heads"].values():
    head |= {"forbid": (MASK,)} | ({"depth": 1} if head.get("kind") == "draft" else {})
  model = models.build(section)
  params = jax.jit(model.init)(jax.random.key(1))
  return objectives.build(cfg.objective, {"mask_id": MASK}), model, shaken(params, only="hydra")


@pytest.mark.full
def test_heads_learn_the_models_own_distribution(plus):
  """Σ −q ln p of the token that both predict; the text's tokens do not matter, q gets no gradient."""
  objective, model, params = plus
  inputs, targets, _ = objective.prepare(ROW, KEY, 3)

  @jax.jit
  def run(params):
    out = model.apply(params, inputs, targets)
    sums, aux = objective.loss(out, targets)
    return aux["per_token"], {n: out.dists[n].map(lambda z: z) for n in targets}, sums

  per_token, z, _ = run(params)
  for name in ("hydra1", "hydra2"):
    q = np.asarray(jax.nn.softmax(z["ar"], -1))
    logp = np.asarray(jax.nn.log_softmax(z[name], -1))
    want = -np.where(q > 0, q * np.where(q > 0, logp, 0), 0).sum(-1) * np.asarray(targets[name].weight)
    np.testing.assert_allclose(per_token[name], want, atol=2e-5)
    assert np.asarray(targets[name].weight).sum() > 10
  text = -np.take_along_axis(
    np.asarray(jax.nn.log_softmax(z["ar"], -1)), np.asarray(ROW.tokens)[..., None], 2
  )
  np.testing.assert_allclose(per_token["ar"], text[..., 0] * np.asarray(targets["ar"].weight), atol=2e-5)

  grads = jax.jit(jax.grad(lambda p: sum(v for n, v in run(p)[2].items() if n != "ar")))(params)
  moved = {p for p, g in states.param_paths(grads).items() if float(jnp.abs(g).max()) > 0}
  # The trunk is frozen by the optimiser; what the teacher alone would move, its output weight, gets nothing.
  assert "heads/text/kernel" not in moved and any(p.startswith("prefix/") for p in moved)


@pytest.mark.slow
def test_prefix_layers_change_nothing_of_the_model(plus):
  """The model's own logits have their bits with the layers and without; the heads' have not."""
  objective, model, params = plus
  inputs, _, _ = objective.prepare(ROW, KEY, 3)
  bare = models.build(dataclasses.replace(model.cfg, prefix=0))
  less = {k: v for k, v in params.items() if k != "prefix"}
  given = {"ids": jnp.ones((*ROW.tokens.shape, 1), jnp.int32)}
  run = lambda m: jax.jit(lambda p: (logits(m, p, inputs), logits(m, p, inputs, "hydra1", given)))
  own, head = run(model)(params)
  own_less, head_less = run(bare)(less)
  np.testing.assert_array_equal(own, own_less)
  assert np.abs(np.asarray(head - head_less))[..., :MASK].max() > 0.05
  assert (
    "prefix" not in model.apply(params, inputs, all_slots(inputs)).layers
  )  # not computed where no head asks


@pytest.mark.full
def test_prefix_states_are_cached(plus):
  """T19; and what the heads read behind accepted drafts is what one uncached call over the text computes."""
  objective, model, params = plus
  target = sampling.build({"eos": -2, "temperature": 0.0}, objective, model)
  want = jax.tree.map(np.asarray, target(params, S.row(), KEY))
  made = speculate.build(target, draft_heads.Heads())
  row, both = S.row(), (params, None)
  width = made.prefill_width(row)
  s = jax.jit(lambda: made.begin(both, row, width))()
  step = jax.jit(lambda s: made.advance(both, row, s, KEY))

  @jax.jit
  def uncached(tokens):
    inputs, _ = objective.view(row.replace(tokens=tokens), objective.corruption.state(row, row.doc >= 0))
    given = {"ids": jnp.zeros((*tokens.shape, 1), jnp.int32)}
    return model.apply(params, inputs, all_slots(inputs, "hydra1", given)).layers["prefix"]

  for _ in range(S.N):
    s = step(s)
    whole = np.asarray(uncached(s.tokens))
    for b in np.flatnonzero(~np.asarray(s.done)):
      np.testing.assert_allclose(s.hidden[b], whole[b, int(s.length[b]) - 2], atol=1e-4)
    if bool(s.done.all()):
      break
  assert_same(made.result(row, s), want)
