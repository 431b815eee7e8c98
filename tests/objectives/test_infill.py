"""Two frozen networks and one linear decoder that fills masks (MARIA)."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import models, optim
from genmodels import state as states
from genmodels import step as steps
from genmodels.config import ConfigError
from genmodels.contracts import CONTEXT, TEXT, token_row
from genmodels.models import joint
from genmodels.objectives import laws
from genmodels.objectives.infill import Infill
from tests.objectives.test_text import KEY, MASK, V, ar, diffusion, rows

TERMS = {"infill": {"head": "infill", "align": "shift", "on": "hit", "normaliser": "masked"}}


def objective(**kw) -> Infill:
  return Infill(corruption={"kind": "absorb"}, terms=TERMS, mask_id=MASK, **kw)


@functools.cache
def shapes():
  """(model, network beside it), which differ in width, depth and positions."""
  section = dict(width=32, layers=2, num_heads=4, num_kv_heads=2, mlp=48, vocab=V, init_std=0.3)
  text = {"forbid": (MASK,)}
  head = {"kind": "joint", "beside": "mlm", "width": 24, "forbid": (MASK,)}
  model = models.build(section | {"heads": {"text": text, "infill": head}})
  other = {"width": 24, "layers": 1, "heads": {"text": text}, "rope": {"base": 500.0}, "vocab_multiple": 8}
  return model, models.NETS["backbone"](section | other).network(model)


@functools.cache
def system():
  """(model, network, {"model", "mlm"} with the decoder as it starts, the same without that start)."""
  model, net = shapes()
  raw = {"model": jax.jit(model.init)(jax.random.key(1)), "mlm": jax.jit(net.init)(jax.random.key(2))}
  joint.check(model.cfg, {"mlm": net})
  return model, net, joint.start(model.cfg, {"mlm": net}, raw), raw


def with_decoder(trees, kernel):
  heads = trees["model"]["heads"] | {"infill": {"kernel": kernel}}
  return trees | {"model": trees["model"] | {"heads": heads}}


def halves(trees):
  """The decoder's two halves as zeros beside the output weights of the two networks."""
  first = trees["model"]["heads"]["text"]["kernel"]
  second = trees["mlm"]["heads"]["text"]["kernel"][:, :V]
  none = lambda x: jnp.zeros_like(x)
  return jnp.concatenate([first, none(second)]), jnp.concatenate([none(first), second])


@functools.cache
def program(full: bool = False):
  """(trees, row, noise's key step) → float32[B, N, V] logits at the masked tokens, hits; one program."""
  model, net, *_ = system()
  obj = objective()
  if full:  # nothing hides the tokens from themselves: what the law refuses
    obj = objective(masks={"full": {"n>n": "ALL", "c>c": "ALL"}})
  fn = joint.function(model, {"mlm": net})

  @jax.jit
  def go(trees, row, hit):
    noise = dataclasses.replace(obj.corruption.draw(row, KEY, 3), hit=hit[:, None])
    inputs, targets, _ = obj.asked(row, noise)
    return fn(trees, inputs, targets).dists["infill"].map(lambda z: z)

  return go


def hits(row, seed=0):
  """About half of what may be masked, never the first token behind a document's start alone."""
  u = np.random.default_rng(seed).random(row.tokens.shape)
  return jnp.asarray((u < 0.5) & (np.asarray(row.role) == TEXT) & (np.asarray(row.doc) >= 0))


@functools.cache
def alone():
  """(trees, row, hit) → the logits of each network by itself, through objectives that know of no other."""
  model, net, *_ = system()
  next_token, masked = ar(), diffusion()

  @jax.jit
  def go(trees, row, hit):
    inputs, targets, _ = next_token.prepare(row, KEY, 3)
    first = model.apply(trees["model"], inputs, targets).dists["text"].map(lambda z: z)
    noise = dataclasses.replace(masked.corruption.draw(row, KEY, 3), hit=hit[:, None])
    inputs, targets, _ = masked.asked(row, noise)
    return first, net.apply(trees["mlm"], inputs, targets).dists["diffusion"].map(lambda z: z)

  return go


def shown(x):
  """Without the mask id, of probability 0."""
  return np.asarray(x)[..., :MASK]


@pytest.mark.slow
def test_half_a_decoder_is_one_of_the_models():
  """With one half zero and the other a network's own output weight, that network's logits, packed documents
  included; with both, their sum."""
  row = rows((9, 6), B=2, N=17)
  hit, trees = hits(row), system()[2]
  want = alone()(trees, row, hit)
  at = np.asarray(hit)
  first, second = halves(trees)
  for kernel, logits in ((first, want[0]), (second, want[1]), (first + second, want[0] + want[1])):
    got = program()(with_decoder(trees, kernel), row, hit)
    np.testing.assert_allclose(shown(got)[at], shown(logits)[at], atol=1e-5)
    assert not np.asarray(got)[~at].any()
  assert np.abs(shown(want[0] - want[1])[at]).max() > 0.1  # control: the networks differ


def test_a_fresh_decoder_is_a_product_of_experts():
  model, net, trees, raw = system()
  row = rows((9, 6), B=2, N=17)
  hit = hits(row)
  first, second = alone()(trees, row, hit)
  at = np.asarray(hit)
  want = jax.nn.log_softmax((first + second)[at][:, :MASK] / 2)
  got = jax.nn.log_softmax(program()(trees, row, hit)[at][:, :MASK])
  np.testing.assert_allclose(got, want, atol=1e-5)
  control = jax.nn.log_softmax(program()(raw, row, hit)[at][:, :MASK])
  assert np.abs(control - want).max() > 0.1
  # A decoder that was loaded stays as it is, in every tree.
  both = {"model": raw["model"], "ema": raw["model"], "mlm": raw["mlm"]}
  start = lambda fresh: joint.start(model.cfg, {"mlm": net}, both, fresh)
  kernel = lambda t: t["heads"]["infill"]["kernel"]
  kept, new = start({"mlm": {"heads/text/kernel"}}), start({"ema": {"heads/infill/kernel"}})
  assert kernel(kept["model"]) is kernel(raw["model"]) and kernel(new["model"]) is kernel(raw["model"])
  np.testing.assert_array_equal(kernel(new["ema"]), kernel(trees["model"]))


@pytest.mark.slow
def test_no_token_sees_itself_or_a_later_fill():
  """A masked token moves the predictions behind it, nothing else; a shown one moves those on both sides."""
  row = rows((14,), B=1)
  trees, hit = system()[2], np.zeros((1, 14), bool)
  hit[0, [3, 4, 7, 11]] = True
  change = lambda n: row.replace(tokens=row.tokens.at[0, n].set((row.tokens[0, n] + 1) % MASK))
  base = {f: shown(program(f)(trees, row, jnp.asarray(hit))) for f in (False, True)}

  def moved(n, full=False):
    new = shown(program(full)(trees, change(n), jnp.asarray(hit)))
    return {i for i in np.flatnonzero(hit[0]) if np.abs(new - base[full])[0, i].max() > 1e-5}

  assert moved(4) == {7, 11} and moved(7) == {11} and moved(11) == set()
  assert moved(9) == {3, 4, 7, 11}
  assert moved(4, full=True) == {3, 4, 7, 11}  # control: without the causal mask it sees itself and the past
  assert laws.check(objective()) == []
  with pytest.raises(ConfigError, match="clean identity"):
    laws.check(objective(masks={"full": {"n>n": "ALL", "c>c": "ALL"}}))


@pytest.mark.slow
def test_the_loss_is_the_cross_entropy_of_masked_tokens():
  model, net, trees, _ = system()
  obj, row = objective(), rows((9, 6), B=2, N=17)
  fn = joint.function(model, {"mlm": net})
  nets = steps.bind({"model": fn}, trees)

  @jax.jit
  def go(row):
    sums, den, aux = obj.run(nets, row, KEY, 3)
    return sums, den, aux["per_token"]["infill"], aux["work"], obj.corruption.draw(row, KEY, 3).hit[:, 0]

  sums, den, per_token, work, hit = go(row)
  logp = jax.nn.log_softmax(program()(trees, row, hit)[..., :MASK], -1)
  want = -np.take_along_axis(np.asarray(logp), np.asarray(row.tokens)[..., None], -1)[..., 0]
  at = np.asarray(hit)
  np.testing.assert_allclose(np.asarray(per_token)[at], want[at], rtol=1e-5)
  assert not np.asarray(per_token)[~at].any() and 0 < at.sum() == float(den["infill"]) < 26
  np.testing.assert_allclose(float(sums["infill"]), want[at].sum(), rtol=1e-5)
  assert int(work["model"]["slots"]) == int(work["mlm"]["slots"]) == 30
  assert {k: int(v) for k, v in work["model"]["reads"].items()} == {"infill": at.sum()}


@functools.cache
def bound(reported: str):
  model, net, trees, _ = system()
  obj = objective(reported=reported)
  nets = steps.bind({"model": joint.function(model, {"mlm": net})}, trees)
  return obj, jax.jit(lambda row, r, R: obj.bound(nets, row, KEY, r, R))


@pytest.mark.full
def test_a_text_has_a_probability():
  """With every token masked, probabilities of all fillings of two holes between given tokens sum to one."""
  tokens = np.array([(0, a, 4, b, 7) for a, b in itertools.product(range(MASK), repeat=2)])
  role = np.full(tokens.shape, TEXT)
  role[:, [0, 2, 4]] = CONTEXT
  obj, go = bound("text")
  nll, count = go(token_row(tokens, role=role), 0, 1)
  np.testing.assert_allclose(np.exp(-np.asarray(nll)).sum(), 1, rtol=1e-5)
  assert (np.asarray(count) == 2).all() and obj.exact and not obj.measures
  other = objective()
  assert not other.exact and "masked" in other.measures and other.of_texts().exact


@pytest.mark.full
def test_masked_tokens_are_reported_by_their_count():
  """A draw is n/k of the cross-entropy of the k tokens that it masks."""
  other, go = bound("masked")
  rng = np.random.default_rng(0)
  row = token_row(rng.integers(0, MASK, (8, 5)), role=np.tile([0, 1, 0, 1, 0], (8, 1)))
  masked = jax.jit(lambda row: other.corruption.draw(row, KEY, 0, None, (1, 4)).hit[:, 0])(row)
  got, count = go(row, 1, 4)
  logp = jax.nn.log_softmax(program()(system()[2], row, masked)[..., :MASK], -1)
  ce = -np.take_along_axis(np.asarray(logp), np.asarray(row.tokens)[..., None], -1)[..., 0]
  want = np.where(masked, ce, 0).sum(1) * 2 / np.asarray(masked).sum(1)
  np.testing.assert_allclose(np.asarray(got)[:, 0], want, rtol=1e-5)
  assert set(np.asarray(masked).sum(1)) <= {1, 2} and (np.asarray(count) == 2).all()


@pytest.mark.slow
@pytest.mark.strict
def test_only_the_decoder_is_trained():
  """Two steps leave every bit of both networks; the decoder moves and the loss of the batch falls."""
  model, net, trees, _ = system()
  ocfg = optim.OptimConfig(lr=1e-2, weight_decay=0.0, freeze=("^(?!heads/infill/)",))
  shapes = model.abstract_params()
  tx, _ = optim.build(ocfg, shapes, model.logical_axes(), 10)
  moving = optim.trainable(ocfg, shapes)
  assert {n for n, x in states.param_paths(moving).items() if x} == {"heads/infill/kernel"}
  fns = {
    "model": joint.function(model, {"mlm": net}),
    "mlm": lambda t, *a, **kw: net.apply(t["mlm"], *a, **kw),
  }
  step = jax.jit(steps.make_train_step(objective(), fns, tx, trainable=moving))
  state, losses = states.create(trees, {"model": tx}, steps.initial_stats(steps.StepConfig())), []
  row = rows((9, 6), B=2, N=17)
  for _ in range(2):
    state, m = step(state.replace(step=jnp.int32(0)), row, KEY)
    losses.append(float(m["loss"]))
  before, after = states.param_paths(trees), states.param_paths(state.trees)
  changed = {n for n in before if not np.array_equal(before[n], after[n])}
  assert changed == {"model/heads/infill/kernel"} and losses[1] < losses[0]


def test_refusals():
  model, net = shapes()
  with pytest.raises(ValueError, match="clean stream"):
    Infill(corruption={"kind": "absorb"}, terms={"infill": TERMS["infill"] | {"on": "all"}}, mask_id=MASK)
  with pytest.raises(ValueError, match="whole stream"):
    objective(layout={"kind": "streams", "streams": ("c",)})
  with pytest.raises(ConfigError, match="not there"):
    joint.check(model.cfg, {})
  cfg = lambda **kw: {"mlm": models.Model(dataclasses.replace(net.cfg, **kw))}
  with pytest.raises(ConfigError, match="width=40"):
    joint.check(model.cfg, cfg(width=40, num_heads=4, head_dim=8))
  with pytest.raises(ConfigError, match="the same tokens"):
    joint.check(dataclasses.replace(model.cfg, vocab=V + 1), {"mlm": net})
  with pytest.raises(ConfigError, match="soft cap"):
    joint.check(model.cfg, cfg(heads=(("text", models.Head(soft_cap=30.0)),)))
  with pytest.raises(ValueError, match="joint head names"):
    models.Head(kind="joint")
  with pytest.raises(ValueError, match="states"):
    joint.joined(jnp.zeros((1, 2, 3)), None, 4)
