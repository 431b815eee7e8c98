"""Block sizes drawn one after another, and a policy that chooses them (CtrlDiff)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from genmodels import config, corruption, models, objectives
from genmodels import state as states
from genmodels import step as steps
from genmodels.config import ConfigError
from genmodels.contracts import Outputs, token_row
from genmodels.corruption.sampled import chain
from genmodels.objectives import laws
from genmodels.objectives.policy import BlockPolicy
from tests.objectives.test_text import KEY, MASK, V, diffusion, nets, rows, trunk

SIZES = (2, 4, 8)


@pytest.fixture(autouse=True, scope="module")
def _parameters():
  trunk()


def sampled(sizes=SIZES, **kw):
  return corruption.SampledAbsorb(sizes=sizes, blocks=corruption.Blocks(size=sizes[0]), **kw)


def policy(cls=BlockPolicy, sizes=SIZES, **kw):
  term = {"stream": "n", "on": "hit", "weight": "nelbo"}
  return cls(
    corruption=sampled(sizes),
    layout={"kind": "streams", "streams": ("n", "c")},
    masks={"full": "bd3"},
    terms={"diffusion": term, "policy": term},
    likelihood="diffusion",
    mask_id=MASK,
    **kw,
  )


def head(classes=3):
  return models.NETS["choice"](classes=classes, width=16).network(trunk()[0])


def with_policy(net):
  params = jax.jit(net.init)(jax.random.key(5))
  return dataclasses.replace(nets(), fns={**nets().fns, "policy": lambda h, **kw: net.apply(params, h)})


def test_blocks_follow_each_other():
  """Against a loop: packed documents, padding, sizes that reach beyond a document's end."""
  rng = np.random.default_rng(0)
  doc = np.stack([np.repeat([0, 1, 2, -1], n) for n in ((9, 1, 20, 3), (33, 0, 0, 0), (5, 5, 5, 18))])
  size = rng.integers(1, 9, doc.shape)
  lo, hi = (np.asarray(x) for x in jax.jit(chain)(doc, size))
  for b, d in enumerate(doc):
    at = 0
    while at < len(d):
      end = at + 1
      while end < min(at + size[b, at], len(d)) and d[end] == d[at]:
        end += 1
      assert (lo[b, at:end] == at).all() and (hi[b, at:end] == end).all(), (b, at, end)
      at = end
  one = np.zeros((1, 1), np.int32)
  assert [int(x[0, 0]) for x in chain(jnp.asarray(one), jnp.asarray(one + 3))] == [0, 1]


def test_sizes_have_their_law_and_know_no_row():
  c = sampled(probs=(0.2, 0.5, 0.3))
  row = rows((64,), B=256)
  draw = jax.jit(c.draw)
  noise = draw(row, KEY, 3)
  length = np.asarray(noise.blk_hi - noise.blk_lo)
  first = np.asarray(noise.blk_lo) == np.arange(64)
  taken = length[:, :56][first[:, :56]]  # blocks that no document's end cuts
  share = [(taken == s).mean() for s in SIZES]
  np.testing.assert_allclose(share, (0.2, 0.5, 0.3), atol=0.03)
  swap = jax.tree.map(lambda x: x[::-1], row)
  np.testing.assert_array_equal(draw(swap, KEY, 3).blk_lo[::-1], noise.blk_lo)
  # Likelihoods and samplers use equal blocks, whatever is drawn in training.
  bound = jax.jit(lambda row: c.draw(row, KEY, 3, bound=(0, 2)).blk_lo)(row)
  np.testing.assert_array_equal(bound[0], np.arange(64) // 2 * 2)
  assert c.longest == 8 and c.blocks.longest == 2
  with pytest.raises(ConfigError, match="8 tokens"):
    layout = {"kind": "streams", "streams": ("n", "c"), "placement": "zigzag", "whole_blocks": 4}
    dataclasses.replace(policy(), layout=layout)


@pytest.mark.slow
def test_one_size_is_block_diffusion_bit_by_bit():
  row = rows((13, 6), B=3)
  plain = diffusion(("n", "c"), "bd3", unit="block", blocks={"size": 4})
  want, same, other = (jax.jit(c.draw)(row, KEY, 3) for c in (plain.corruption, sampled((4,)), sampled((2,))))
  jax.tree.map(np.testing.assert_array_equal, same, want)
  assert (np.asarray(other.blk_lo) != np.asarray(want.blk_lo)).any()  # control
  constant = policy(sizes=(4,))
  both = with_policy(head(1))
  got, expected = (jax.jit(lambda obj=obj: obj.run(both, row, KEY, 3))() for obj in (constant, plain))
  np.testing.assert_array_equal(got[2]["per_token"]["diffusion"], expected[2]["per_token"]["diffusion"])
  assert float(got[1]["diffusion"]) == float(expected[1]["diffusion"])
  assert laws.check(constant) == []


class Planted(BlockPolicy):
  """The reward of a token depends on its block's size alone: 4 is the best, 8 next, 2 last."""

  def rewards(self, noise, loss):
    size = noise.blk_hi - noise.blk_lo
    return jnp.where(size == 4, -0.2, jnp.where(size == 8, -0.6, -1.0)) * size + 0 * loss


@functools.cache
def planted_step():
  """A step of both players over a network that predicts nothing: the policy alone learns."""
  net, obj = head(), Planted(**{f.name: getattr(policy(), f.name) for f in dataclasses.fields(BlockPolicy)})

  class Zero:
    def nll(self, value):
      return jnp.zeros(value.shape)

  def model(trees, inputs, targets, **kw):
    B, S = inputs.doc.shape
    hidden = trees["model"]["w"] + jnp.sin(inputs.pos * jnp.arange(1, 33))
    return Outputs({t: Zero() for t in targets}, layers={"hidden": hidden})

  fns = {"model": model, "policy": lambda trees, h, **kw: net.apply(trees["policy"], h)}
  players = (
    steps.Player("model", ("model",), ("diffusion",), ignores_step(optax.sgd(0.1))),
    steps.Player("policy", ("policy",), ("policy",), ignores_step(optax.adam(0.02)), 2),
  )
  cfg = steps.StepConfig(guard_window=0)
  txs = {p.name: p.tx for p in players}
  trees = {"model": {"w": jnp.zeros(32)}, "policy": net.init(jax.random.key(1))}
  state = states.create(trees, txs, steps.initial_stats(cfg, obj))
  return jax.jit(steps.make_train_step(obj, fns, None, cfg, players=players)), state, net


def ignores_step(tx):
  return optax.GradientTransformation(tx.init, lambda g, s, p, step=None: tx.update(g, s, p))


@pytest.mark.slow
def test_the_policy_finds_the_best_size():
  step, state, net = planted_step()
  row = token_row(np.zeros((16, 64), np.int32))
  history = []
  for n in range(120):
    state, m = step(state, row, KEY)
    if n % 2:
      history.append(float(m["policy/reward"]))
  hidden = jnp.sin(row.pos[:1] * jnp.arange(1, 33))
  chosen = np.exp(np.asarray(net.apply(state.trees["policy"], hidden)))[0]
  assert (chosen[:, 1] > 0.8).mean() > 0.95, chosen.mean(0)
  # The gain goes from that of equal chances towards that of the best size, −0.2 a token.
  assert history[0] < -0.4 and np.mean(history[-5:]) > -0.25
  assert abs(float(state.stats["objective"]["gain"]) + 0.2) < 0.15
  assert int(state.stats["objective"]["gain_count"]) == 60
  assert not np.asarray(state.trees["model"]["w"]).any()


@pytest.mark.slow
def test_a_player_moves_when_it_is_due():
  step, state, _ = planted_step()
  row = token_row(np.zeros((16, 64), np.int32))
  moved = []
  for _ in range(6):
    new, m = step(state, row, KEY)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), new.trees["policy"], state.trees["policy"])
    moved.append((not all(jax.tree.leaves(same)), float(m["policy/grad_norm"]) > 0))
    state = new
  assert moved == [(n % 2 == 0, n % 2 == 0) for n in range(1, 7)]
  assert int(state.stats["objective"]["gain_count"]) == 3 and int(state.step) == 6


@functools.cache
def trained():
  """(step, state, row) of both players over the tiny trunk."""
  (model, params), net, obj = trunk(), head(), policy(cost=0.5)
  fns = {
    "model": lambda trees, *a, **kw: model.apply(trees["model"], *a, **kw),
    "policy": lambda trees, h, **kw: net.apply(trees["policy"], h),
  }
  players = (
    steps.Player("model", ("model",), ("diffusion",), ignores_step(optax.sgd(0.1))),
    steps.Player("policy", ("policy",), ("policy",), ignores_step(optax.sgd(0.1))),
  )
  cfg = steps.StepConfig(guard_window=0)
  trees = {"model": params, "policy": net.init(jax.random.key(5))}
  state = states.create(trees, {p.name: p.tx for p in players}, steps.initial_stats(cfg, obj))
  return jax.jit(steps.make_train_step(obj, fns, None, cfg, players=players)), state, rows((16, 9), B=4)


@pytest.mark.slow
def test_the_model_does_not_know_the_policy():
  """What the policy is told changes its own update and not one bit of the model's."""
  step, state, row = trained()
  gain = lambda g: {
    "objective": {**state.stats["objective"], "gain": jnp.float32(g), "gain_count": jnp.int32(3)}
  }
  (a, ma), (b, mb) = (step(state.replace(stats=gain(g)), row, KEY) for g in (0.0, -40.0))
  jax.tree.map(np.testing.assert_array_equal, a.trees["model"], b.trees["model"])
  assert float(ma["loss"]) == float(mb["loss"]) and float(ma["grad_norm"]) > 0.1
  apart = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), a.trees["policy"], b.trees["policy"])
  assert apart["out"]["bias"] > 0.1
  # Control: what the model is told moves it.
  c, _ = step(state.replace(trees={**state.trees, "model": a.trees["model"]}), row, KEY)
  moved = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), a.trees["model"], c.trees["model"])
  assert max(jax.tree.leaves(moved)) > 1e-3


def test_refusals():
  with pytest.raises(ConfigError, match="before the sizes are chosen"):
    terms = {"diffusion": {"stream": "n", "normaliser": "masked"}, "policy": {"stream": "n"}}
    dataclasses.replace(policy(), terms=terms)
  with pytest.raises(ValueError, match="policy's own loss"):
    dataclasses.replace(policy(), terms={"diffusion": {"stream": "n"}})
  with pytest.raises(ValueError, match="sampled_absorb"):
    dataclasses.replace(policy(), corruption={"kind": "absorb"})
  with pytest.raises(ConfigError, match="chooses among 3 sizes"):
    jax.eval_shape(lambda: policy().run(with_policy(head(2)), rows((8,), B=1), KEY, 0))
  with pytest.raises(ValueError, match="sum is 1"):
    sampled(probs=(0.5, 0.4, 0.3))
  built = objectives.build(config.load("language/ctrldiff:tiny").objective, {"mask_id": V - 1})
  assert built.corruption.sizes == (4, 8, 16) and built.likelihood == "diffusion"
