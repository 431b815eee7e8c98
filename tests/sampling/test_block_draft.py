"""DFlash's decoder: drafts change no id and no law, and are what the trained view says they are."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import config, models, objectives, sampling
from genmodels.config import ConfigError
from genmodels.contracts import Inputs, Target
from genmodels.masks import STREAM, AttnMask
from genmodels.sampling import block_draft, speculate
from tests.objectives.test_drafts import built, shaken
from tests.sampling import systems as S
from tests.sampling import test_speculate as T

KEY = jax.random.key(3)


@functools.cache
def target(temperature=0.0):
  """(Sampler of the trained model alone, parameters with a random drafter, what it generates)."""
  objective, model, params = built("dflash")
  params = shaken(params, only="drafter")
  sampler = sampling.build({"eos": -2, "temperature": temperature}, objective, model)
  return sampler, params, jax.tree.map(np.asarray, sampler(params, S.row(), KEY))


@pytest.mark.full
def test_any_drafter_keeps_the_greedy_ids():
  """T19, with random layers; and every draft is the one of a training row that ends at the anchor."""
  sampler, params, want = target()
  made = speculate.build(sampler, block_draft.Block())
  assert (made.drafter.size, made.drafter.term, made.rule.exact) == (7, "draft", True)
  objective, model, _ = built("dflash")
  row = S.row()

  @jax.jit
  def step(s):
    tokens, _, _, state = made.propose((params, None), row.replace(tokens=s.tokens), s, KEY)
    return made.advance((params, None), row, s, KEY), tokens[:, 0], state.cache.length

  @jax.jit
  def alone(tokens, n):
    """int32[7], the likeliest tokens of a block whose anchor is token n − 1 of one row; no cache."""
    at, inside = jnp.arange(S.N, dtype=jnp.int32), jnp.arange(8, dtype=jnp.int32)
    causal = AttnMask(at[None], jnp.zeros((1, 1, S.N), jnp.int32), at[None, None] + 1)
    own = jnp.where(n - 1 + inside < S.N, STREAM + inside, -1)
    lows = jnp.broadcast_to(jnp.array([0, STREAM], jnp.int32)[None, :, None], (1, 2, 8))
    highs = jnp.broadcast_to(jnp.stack([n - 1, STREAM + 8])[None, :, None], (1, 2, 8))
    given = {
      "ids": jnp.where(inside == 0, tokens[n - 1], objective.mask_id)[None],
      "pos": (n - 1 + inside).astype(jnp.float32)[None, :, None],
      "mask": AttnMask(jnp.concatenate([at, own])[None], lows, highs),
    }
    pos = at.astype(jnp.float32)[None, :, None]
    inputs = Inputs(tokens[None, :, None], pos, at[None] * 0, {"full": causal})
    read = Target("drafter", inside[None], inside[None] * 0, jnp.ones((1, 8)), given)
    return model.apply(params, inputs, {"x": read}).dists["x"].argmax_prob()[0][0, 1:]

  width, compared = made.prefill_width(row), set()
  s = jax.jit(lambda: made.begin((params, None), row, width))()
  for _ in range(12):
    n, tokens = np.asarray(s.length), np.asarray(s.tokens)
    after, drafted, held = step(s)
    for b in np.flatnonzero(~np.asarray(s.done)):
      there = S.N - n[b]
      assert int(held[b]) == n[b] - 1  # states of every token before the anchor, once
      np.testing.assert_array_equal(drafted[b, :there], alone(tokens[b], n[b])[:there])
      compared.add(int(after.accepted[b] - s.accepted[b]))
    s = after
    if bool(s.done.all()):
      break
  assert len(compared) > 1  # behind different numbers of accepted drafts
  T.assert_same(made.result(row, s), want)


@pytest.mark.full
def test_sampled_drafts_keep_the_law():
  """T20: the block's tokens are drawn independently of each other from what they say."""
  cfg = config.load("language/dflash:tiny").objective
  cfg.corruption.blocks.size = 4
  objective = objectives.build(cfg, {"mask_id": T.V})
  small, own, _ = T.toy()
  heads = {
    "text": {"forbid": (T.V,)},
    "drafter": {"kind": "block", "depth": 1, "taps": (0,), "forbid": (T.V,)},
  }
  model = models.build(dataclasses.replace(small.cfg, heads=heads))
  params = jax.jit(model.init)(jax.random.key(7))
  params = {**params, **own, "heads": {**params["heads"], **own.get("heads", {})}}  # the toy, and a drafter
  made = sampling.build({"eos": -2, "forbid": (T.V,)}, objective, model)
  p, result = T.judged(speculate.build(made, block_draft.Block(sample=True)), params, 1 << 15)
  rate = float(result.memory["accepted"].sum() / result.memory["drafted"].sum())
  assert p > 1e-3 and 0.1 < rate < 0.95


def test_what_does_not_fit_is_refused():
  objective, model, _ = built("dflash")
  sampler = sampling.build({"eos": -2}, objective, model)
  assert block_draft.Block(3).bind(sampler).size == 3
  with pytest.raises(ConfigError, match="an anchor and 7 masks"):
    block_draft.Block(8).bind(sampler)
  with pytest.raises(ConfigError, match="keeps a cache"):
    block_draft.Block().bind(sampling.build({"eos": -2, "cache": "none"}, objective, model))
  with pytest.raises(ConfigError, match="a term with a block head"):
    block_draft.Block().bind(S.sampler(S.ar()))
