"""Decoding with the target's own drafts: heads and masks change no id, and draft what training asks of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import models, sampling
from genmodels.config import ConfigError
from genmodels.contracts import Inputs
from genmodels.masks import AttnMask
from genmodels.sampling import draft_heads, speculate
from genmodels.sampling.drafter import Context
from tests.objectives.test_drafts import built, shaken
from tests.sampling import systems as S
from tests.sampling.test_speculate import assert_same

KEY = jax.random.key(3)
DRAFTER = {"medusa": draft_heads.Heads(), "hydra": draft_heads.Heads(), "mtp": draft_heads.Masks()}
MOVED = {"medusa": "medusa", "hydra": "hydra", "mtp": "lora_"}


@functools.cache
def target(name, temperature=0.0):
  """(Sampler of the trained model alone, parameters with random drafts, what it generates)."""
  objective, model, params = built(name)
  params = shaken(params, only=MOVED[name])
  sampler = sampling.build({"eos": -2, "temperature": temperature}, objective, model)
  return sampler, params, jax.tree.map(np.asarray, sampler(params, S.row(), KEY))


@pytest.mark.parametrize(
  "name",
  [pytest.param("medusa", marks=pytest.mark.full)]
  + [pytest.param(n, marks=pytest.mark.slow) for n in ("hydra", "mtp")],
)
def test_untrained_drafts_keep_the_greedy_ids(name):
  sampler, params, want = target(name)
  result = speculate.build(sampler, DRAFTER[name])(params, S.row(), KEY)
  assert_same(result, want)


@pytest.mark.full
def test_sampled_drafts_are_drawn_from_what_they_say():
  """Rejection needs honest logits: drafted tokens have the law of `Draft.logits`, head by head."""
  sampler, params, _ = target("hydra", 1.0)
  drafter = draft_heads.Heads(sample=True).bind(sampler)
  B = 2048
  hidden = jnp.broadcast_to(jax.random.normal(KEY, (1, 32)), (B, 32))
  tokens = jnp.broadcast_to(jnp.arange(S.N, dtype=jnp.int32) % 9, (B, S.N))
  row = S.row().replace(tokens=tokens)
  n = jnp.full((B,), 6, jnp.int32)
  keys = tuple(jax.random.bits(k, (B,)) for k in jax.random.split(KEY))

  @jax.jit
  def run(params):
    none = jnp.zeros((B,), bool)
    context = Context(row, n, none, none, hidden, keys, None)
    return drafter.draft(params, None, context, ())[0]

  out = run(params)
  first = np.asarray(jax.nn.softmax(out.logits[0, 0], -1))
  seen = np.bincount(np.asarray(out.tokens[:, 0]), minlength=len(first)) / B
  assert 0.5 * np.abs(seen - first).sum() < 0.05 and first.max() < 0.95
  # The second head's law follows from the first head's token, and from nothing else that was drawn.
  for token in np.unique(np.asarray(out.tokens[:, 0])):
    same = np.asarray(out.logits[:, 1])[np.asarray(out.tokens[:, 0]) == token]
    np.testing.assert_allclose(same, np.broadcast_to(same[0], same.shape), atol=1e-5)
  assert np.abs(np.asarray(out.logits[:, 1] - out.logits[:1, 1]))[:, :10].max() > 1e-3


@pytest.mark.slow
def test_masks_draft_what_training_asks_of_them():
  """The drafts of a step are the likeliest tokens of the packed training view: same prefix, same masks."""
  objective, model, _ = built("mtp")
  sampler, params, _ = target("mtp")
  drafter = draft_heads.Masks().bind(sampler)
  assert (drafter.size, drafter.ahead, drafter.term) == (4, 4, "sampler")
  made = speculate.build(sampler, draft_heads.Masks())
  row = S.row(lengths=(3, 6))
  state = made.begin((params, None), row, made.prefill_width(row))
  step = jax.jit(lambda s: made.advance((params, None), row, s, KEY))
  state = step(step(state))
  L = S.N + 4
  at = jnp.arange(L, dtype=jnp.int32)
  causal = AttnMask(at[None], jnp.zeros((1, 1, L), jnp.int32), at[None, None] + 1)

  @jax.jit
  def ask(tokens, n, i, told):
    """The sampler head's choice at the i-th mask behind tokens 0 … n − 2; what stands behind it is not seen."""
    masks = at >= n - 1
    ids = jnp.where(masks, objective.mask_id, jnp.pad(tokens, (0, 4)))
    inputs = Inputs(
      ids[None, :, None], at[None, :, None].astype(jnp.float32), at[None] * 0, {"full": causal},
      route=masks.astype(jnp.int32)[None],
    )  # fmt: skip
    hidden = model.apply(params, inputs, {}).layers["hidden"][:, n - 1 + i][:, None]
    dist = model.read(params, "sampler", hidden, jnp.ones((1, 1), bool), told.reshape(1, 1, 1))
    return dist.argmax_prob()[0][0, 0]

  for b in range(2):
    n, told = state.length[b], state.tokens[b, state.length[b] - 1]
    for i in range(4):
      told = ask(state.tokens[b], n, jnp.int32(i), told)
      assert int(state.draft.tokens[b, i]) == int(told)


def test_heads_that_do_not_fit_are_refused():
  objective, model, _ = built("medusa")
  sampler = sampling.build({"eos": -2}, objective, model)
  assert draft_heads.Heads(3).bind(sampler).terms == ("medusa1", "medusa2", "medusa3")
  with pytest.raises(ConfigError, match="the model has 5 heads in a row"):
    draft_heads.Heads(6).bind(sampler)
  with pytest.raises(ConfigError, match="nothing is drawn at temperature 0"):
    draft_heads.Heads(sample=True).bind(sampling.build({"eos": -2, "temperature": 0.0}, objective, model))
  with pytest.raises(ConfigError, match="shifted term on a noisy stream"):
    draft_heads.Masks().bind(sampler)
  alone = sampling.build(
    {"eos": -2}, S.ar(), models.build(dataclasses.replace(model.cfg, heads={"text": {}}))
  )
  with pytest.raises(ConfigError, match="no head drafts"):
    draft_heads.Heads().bind(alone)
