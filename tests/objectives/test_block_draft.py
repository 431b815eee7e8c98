"""DFlash: what a block of masks sees, what is asked of it, and that the trunk does not move."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import config, models
from genmodels import state as states
from genmodels.contracts import Inputs, Target
from genmodels.masks import STREAM, AttnMask
from genmodels.objectives import laws
from tests.objectives.test_drafts import built, shaken
from tests.objectives.test_text import KEY, MASK, rows

ROW = rows((13, 9), B=2)
N = 22


@pytest.fixture(scope="module")
def drafted():
  """(objective, model, parameters, jitted tokens → (logits of the draft term [B, N, V], taps, targets))."""
  objective, model, params = built("dflash")
  params = shaken(params, only="drafter")

  @jax.jit
  def run(tokens):
    inputs, targets, denominators = objective.prepare(ROW.replace(tokens=tokens), KEY, 3)
    every = targets["draft"].replace(slot=jnp.broadcast_to(jnp.arange(N), (2, N)), weight=jnp.ones((2, N)))
    out = model.apply(params, inputs, {"draft": every})
    return out.dists["draft"].map(lambda z: z), out.layers["taps"], targets, denominators

  return objective, model, params, run


@pytest.mark.slow
def test_blocks_of_one_row_equal_separate_forwards(drafted):
  """A block in the packed row = its context, its anchor and its masks alone."""
  objective, model, params, run = drafted
  noise = objective.corruption.draw(ROW, KEY, 3)
  packed = np.asarray(run(ROW.tokens)[0])
  lo, hi, hit = np.asarray(noise.blk_lo), np.asarray(noise.blk_hi), np.asarray(noise.hit[:, 0])
  blocks = sorted({(b, lo[b, n], hi[b, n]) for b, n in np.argwhere(hit)})
  assert len(blocks) >= 5 and all(not hit[b, a] and hit[b, a + 1 : z].all() for b, a, z in blocks)
  size = 8

  @jax.jit
  def alone(b, begin, anchor, end):
    """A row that begins with the block's document; slots behind the block are empty."""
    at = jnp.arange(N, dtype=jnp.int32)
    causal = AttnMask(at[None], jnp.full((1, 1, N), begin, jnp.int32), at[None, None] + 1)
    slot = anchor + jnp.arange(size, dtype=jnp.int32)
    own = jnp.where(slot < end, STREAM + jnp.arange(size), -1)
    lows = jnp.broadcast_to(jnp.stack([begin, jnp.int32(STREAM)])[None, :, None], (1, 2, size))
    highs = jnp.broadcast_to(jnp.stack([anchor, STREAM + end - anchor])[None, :, None], (1, 2, size))
    token = ROW.tokens[b]
    given = {
      "ids": jnp.where(jnp.arange(size) == 0, token[anchor], MASK)[None],
      "pos": (slot - begin).astype(jnp.float32)[None, :, None],
      "mask": AttnMask(jnp.concatenate([at, own])[None], lows, highs),
    }
    pos = (at - begin).astype(jnp.float32)[None, :, None]
    inputs = Inputs(token[None, :, None], pos, jnp.zeros((1, N), jnp.int32), {"full": causal})
    read = Target(
      "drafter", jnp.arange(size)[None], jnp.zeros((1, size), jnp.int32), jnp.ones((1, size)), given
    )
    return model.apply(params, inputs, {"x": read}).dists["x"].map(lambda z: z)[0]

  for b, anchor, end in blocks:
    begin = 13 * int(anchor >= 13)
    got = alone(b, jnp.int32(begin), jnp.int32(anchor), jnp.int32(end))
    np.testing.assert_allclose(packed[b, anchor:end], got[: end - anchor], atol=2e-5)
  assert laws.check(objective) == []


def test_a_block_sees_its_context_and_itself(drafted):
  """A mask moves with every token up to its anchor, with none behind it and none of another document."""
  objective, _, _, run = drafted
  noise = objective.corruption.draw(ROW, KEY, 3)
  lo, hit, doc = np.asarray(noise.blk_lo[0]), np.asarray(noise.hit[0, 0]), np.asarray(ROW.doc[0])
  want = run(ROW.tokens)[0]
  for j in range(N):
    got = run(ROW.tokens.at[0, j].set((ROW.tokens[0, j] + 1) % MASK))[0]
    moved = np.abs(np.asarray(got - want))[0, :, :MASK].max(-1) > 1e-6
    np.testing.assert_array_equal(moved[hit], ((j <= lo) & (doc == doc[j]))[hit])
  wrong = dataclasses.replace(objective, masks={"full": {"n>n": "BLK_EQ", "n>c": "BLK_LE", "c>c": "POS_LE"}})
  with pytest.raises(config.ConfigError, match="clean identity"):
    laws.check(wrong)


@pytest.mark.slow
def test_weights_fall_behind_the_anchor(drafted):
  objective, _, _, run = drafted
  noise = objective.corruption.draw(ROW, KEY, 3)
  _, _, targets, denominators = run(ROW.tokens)
  t, hit = targets["draft"], np.asarray(noise.hit[:, 0] & (ROW.role == 1))
  place = np.arange(N) - np.asarray(noise.blk_lo)
  np.testing.assert_allclose(t.weight, np.where(hit, np.exp(-(place - 1) / 4.0), 0), rtol=1e-6)
  assert float(denominators["draft"]) == pytest.approx(float(np.asarray(t.weight).sum()), rel=1e-6)
  assert np.asarray(t.weight).max() == 1 and 1 <= place[hit].min() and place[hit].max() == 7
  np.testing.assert_array_equal(t.slot, np.where(hit, np.arange(N), -1))  # the mask in place of the token
  default = config.load("language/dflash").objective
  assert (default.corruption.blocks.size, default.terms.draft.decay) == (16, 7.0)


@pytest.mark.slow
def test_taps_are_outputs_of_layers(drafted):
  """What the drafter reads is the state behind the named layers, and no gradient of it moves the trunk."""
  objective, model, params, run = drafted
  taps = run(ROW.tokens)[1]
  inputs, targets, _ = objective.prepare(ROW, KEY, 3)
  one = models.build(
    dataclasses.replace(model.cfg, segments=(), layers=1, pattern=model.cfg.segments[0].pattern, heads=())
  )
  first = {**params, "stack": jax.tree.map(lambda x: x[:1], params["stack"])}
  hidden = jax.jit(lambda p: one.apply(p, inputs, {}).layers["hidden"])(first)
  norm = lambda x: x / np.sqrt(np.square(x).mean(-1, keepdims=True) + model.cfg.eps)
  np.testing.assert_allclose(norm(np.asarray(taps[0])), hidden / params["final_norm"]["scale"], atol=1e-5)
  assert np.abs(taps[1] - taps[0]).max() > 0.1

  @jax.jit
  def grads(params):
    return jax.grad(
      lambda p: model.apply(p, inputs, targets).dists["draft"].nll(targets["draft"].value).sum()
    )(params)

  for path, g in states.param_paths(grads(params)).items():
    still = path.startswith(("stack/", "final_norm/"))
    assert (float(jnp.abs(g).max()) == 0) == still, path


def test_the_trunk_gets_clean_slots_alone(drafted):
  """A noisy slot costs it nothing: the trunk's inputs are the row's."""
  objective, _, _, _ = drafted
  inputs, _, _ = objective.prepare(ROW, KEY, 3)
  assert inputs.ids.shape == (2, N, 1) and inputs.masks["full"].code.shape == (2, N)
  np.testing.assert_array_equal(inputs.ids[..., 0], ROW.tokens)
  with pytest.raises(ValueError, match="streams="):
    dataclasses.replace(objective, layout={"kind": "streams", "streams": ("c", "n")})
