"""LLaDA2: block sizes that warm up, stay and decay; the confidence-aware loss; the stable phase in one stream."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import config, models, objectives, optim, step, system
from genmodels.config import ConfigError
from genmodels.contracts import Target
from genmodels.sampling import at_step
from tests.objectives.test_text import KEY, MASK, loss, nets, rows, trunk


@pytest.fixture(autouse=True, scope="module")
def _parameters():
  trunk()


@functools.cache
def objective(variant: str = ""):
  return objectives.build(config.load(f"language/llada2:{variant}").objective, {"mask_id": MASK})


def test_blocks_warm_up_stay_and_decay():
  obj, row = objective(), rows((300, 40), B=2)
  draw = jax.jit(lambda step: obj.corruption.draw(row, KEY, step))
  size = obj.corruption.blocks.size
  assert size.table == (1, 4, 32, 64, 0, 2048, 256, 32) and list(size.at) == sorted(size.at)
  for value, at in zip(size.table, size.at):
    noise = draw(jnp.int32(at))
    length = np.asarray(noise.blk_hi - noise.blk_lo)
    for lo, n in ((0, 300), (300, 40)):
      assert length[:, lo].max() == min(value or n, n)  # 0: a document is one block
    level = np.unique(np.asarray(noise.level))
    assert len(level) == 4 and 0.3 <= level.min() and level.max() <= 0.8  # one per document, in the band
    # What is trained with a schedule is decoded and evaluated at the size it has reached.
    frozen, trained = at_step(obj, at)
    assert trained == value and frozen.corruption.blocks.whole == (value == 0)
  assert draw._cache_size() == 1
  assert obj.corruption.blocks.longest is None  # context shards cannot keep such blocks whole
  with pytest.raises(ConfigError, match="all tokens of a document"):
    layout = {"kind": "streams", "streams": ("n", "c"), "placement": "zigzag", "whole_blocks": 64}
    dataclasses.replace(obj, layout=layout)


@pytest.mark.slow
def test_confidence_loss_by_hand():
  obj, row = objective("cap"), rows((24,), B=8)
  inputs, targets, denominators = obj.prepare(row, KEY, 3)
  every = {t: Target("text", targets[t].slot, row.tokens, jnp.ones(row.tokens.shape)) for t in targets}
  dists = jax.jit(lambda: {t: nets()["model"](inputs, every).dists[t].map(lambda x: x) for t in ("a", "b")})()
  right = 0
  for copy in ("a", "b"):
    logits = np.asarray(dists[copy], np.float64)[..., :MASK]
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    asked = np.asarray(targets[copy].weight > 0)
    correct = asked & (p.argmax(-1) == np.asarray(row.tokens))
    entropy = -(p * np.log(p)).sum(-1)
    right += correct.sum()
    got = loss(obj, row, term=f"confidence_{copy}")[1]
    np.testing.assert_allclose(got, np.where(correct, entropy, 0), atol=1e-5)
    # The cross-entropy shares the pass over the logits and is what it would be alone.
    want = -np.log(np.take_along_axis(p, np.asarray(row.tokens)[..., None], 2)[..., 0])
    np.testing.assert_allclose(loss(obj, row, term=copy)[1], np.where(asked, want, 0), atol=1e-5)
    assert np.abs(np.where(asked, entropy, 0) - np.asarray(got)).max() > 0.1  # control: not of the wrong ones
    assert float(denominators[f"confidence_{copy}"]) == float(denominators[copy]) == 8 * 23
  assert 5 < right < 8 * 23
  assert float(obj.terms["confidence_a"].scale(0)) == 2.0
  with pytest.raises(ValueError, match="no likelihood"):
    dataclasses.replace(obj, likelihood="confidence_a")


def test_confidence_makes_right_predictions_sharper():
  """Its gradient moves no wrong prediction: at a wrong slot the hidden state gets none."""
  logits = jnp.asarray([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
  total = lambda x: objectives.base._nll_and_confidence(x, jnp.asarray([0, 1]))["entropy_correct"].sum()
  grad = np.asarray(jax.grad(total)(logits))
  assert grad[0, 0] < 0 < grad[0, 2] and not grad[1].any()


@pytest.mark.slow
def test_whole_documents_need_no_second_stream():
  """The stable phase as a run of its own: the same loss token by token, with half the slots."""
  row = rows((17, 9), B=3)
  two, one = objective(), objective("stable")
  at = two.corruption.blocks.size.at[two.corruption.blocks.size.table.index(0)]
  per_token = jax.jit(lambda step: two.run(nets(), row, KEY, step)[2]["per_token"]["diffusion"])
  want = loss(one, row, step=at)[1]
  np.testing.assert_allclose(per_token(jnp.int32(at)), want, atol=1e-5)
  assert np.abs(np.asarray(per_token(jnp.int32(0)) - want)).max() > 0.1  # control: blocks of one token
  slots = [jax.eval_shape(lambda o=o: o.prepare(row, KEY, at)[0]).ids.shape[1] for o in (two, one)]
  assert slots == [52, 26]


def test_the_experts_bias_is_all_that_balances():
  """`:moe`: the published shape, its biases moved at a rate and no term of the router; a model without biases, or
  an optimiser that makes parameters of its own, is refused."""
  full, tiny = (config.load(f"language/llada2:{v}") for v in ("moe", "moe_tiny"))
  trunk = models.build({**config.plain(full.model)}).cfg
  assert [s.repeats for s in trunk.segments] == [1, 19] and trunk.segments[1].pattern[0].mlp == "moe"
  assert (trunk.moe.experts, trunk.moe.top_k, trunk.moe.mlp, trunk.moe.shared) == (256, 8, 512, 512)
  assert (
    trunk.moe.bias and trunk.moe.score == "sigmoid" and (trunk.moe.groups, trunk.moe.top_groups) == (8, 4)
  )
  for cfg, rate in ((full, 0.001), (tiny, 0.01)):
    made = objectives.build(config.plain(cfg.objective), {"mask_id": MASK})
    assert made.router.bias == rate and made.router.scales == {}
  small = config.plain(tiny.model) | {"vocab": 264}
  system._agree(made, models.build(small))
  small["moe"] = small["moe"] | {"bias": False}
  with pytest.raises(ConfigError, match="no expert of the model has a bias"):
    system._agree(made, models.build(small))
  parts = types.SimpleNamespace(model=models.build(config.plain(tiny.model) | {"vocab": 264}), objective=made)
  free = config.build(optim.OptimConfig, {"name": "schedule_free", "schedule": {"kind": "constant"}}, "optim")
  with pytest.raises(ConfigError, match="undo the experts' bias"):
    step.program(parts, step.StepConfig(), free, 10, None)


def test_a_measure_of_classes_needs_a_head_that_has_some():
  trunk = lambda kind: types.SimpleNamespace(
    heads=(("text", models.Head(kind=kind, size=4)),), patterns=("full",), vocab=0, moe=None, lora=None
  )
  heads = lambda kind: types.SimpleNamespace(cfg=trunk(kind))
  system._agree(objective("cap"), heads("categorical"))
  with pytest.raises(ConfigError, match="confidence_a.measure = 'entropy_correct': its head has no classes"):
    system._agree(objective("cap"), heads("flow"))
  with pytest.raises(ValueError, match="measure is 'entropy'"):
    objectives.base.Term(measure="entropy")
