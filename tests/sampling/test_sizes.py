"""Blocks whose sizes a policy chooses while they are decoded (CtrlDiff)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import models, sampling
from genmodels.config import ConfigError
from genmodels.corruption import Blocks, SampledAbsorb
from genmodels.objectives import Nets
from genmodels.objectives.policy import BlockPolicy
from genmodels.sampling import partial
from tests.sampling import systems as S

SIZES = (2, 4, 5)
KEY = jax.random.key(8)


def objective(sizes=SIZES) -> BlockPolicy:
  term = {"stream": "n", "on": "hit", "weight": "nelbo"}
  return BlockPolicy(
    corruption=SampledAbsorb(sizes=sizes, blocks=Blocks(size=2)),
    layout={"kind": "streams", "streams": ("n", "c")},
    masks={"full": "bd3"},
    terms={"diffusion": {**term, "head": "text"}, "policy": term},
    likelihood="diffusion",
    mask_id=S.MASK,
  )


class Constant:
  """A policy that always takes size number 1."""

  def apply(self, params, hidden):
    return jnp.broadcast_to(jnp.log(jnp.array([0.0, 1.0, 0.0]) + 1e-30), (*hidden.shape[:2], 3))


@functools.cache
def learned(classes=3):
  net = models.NETS["choice"](classes=classes, width=16).network(S.model(1))
  with jax.ensure_compile_time_eval():
    params = jax.jit(net.init)(jax.random.key(1))
    params["out"]["kernel"] = 2 * jax.random.normal(jax.random.key(2), params["out"]["kernel"].shape)
  return net, params


def sized(net=None, **section):
  load = lambda path, name: learned() if net is None else (net, {})
  section = {"eos": -2, "quota": {"kind": "first_hitting"}, **section}
  return sampling.build(
    section | {"sizes": {"path": "run", **section.get("sizes", {})}}, objective(), S.model(1), load=load
  )


@pytest.mark.slow
def test_a_constant_policy_is_the_sampler_of_that_size():
  """Token by token, step by step and call by call, though its calls have room for more."""
  row = S.row()
  got = sized(Constant())(S.params(1), row, KEY)
  plain = sampling.build({"eos": -2, "quota": {"kind": "first_hitting"}}, S.bd(4), S.model(1))
  want = plain(S.params(1), row, KEY)
  np.testing.assert_array_equal(got.tokens, want.tokens)
  np.testing.assert_array_equal(got.committed_at, want.committed_at)
  jax.tree.map(np.testing.assert_array_equal, got.calls, want.calls)
  assert int(got.forwards) > int(want.forwards), "the policy's passes count"


@pytest.mark.slow
def test_generated_rows_have_the_blocks_of_training():
  """The finished rows, cut by the policy as training cuts them with the same draws, have the blocks they were
  generated in, prompts of every length included; the sizes differ."""
  made, row, (net, own) = sized(), S.row(), learned()
  result = made(S.params(1), row, KEY)
  assert np.asarray(result.done).all()

  def cut(tokens):
    o, filled = made.objective, row.replace(tokens=tokens)
    model = lambda i, t: S.model(1).apply(S.params(1), i, t)
    logp, _ = o.sizes(Nets({"model": model, "policy": lambda h: net.apply(own, h)}), filled, KEY, 0)
    return o.corruption.cut(filled, o.corruption.choose(filled, KEY, 0, logp)), jnp.exp(logp)

  noise = made.cut(row, row.doc >= 0, result.memory["sizes"])
  (lo, hi), p = jax.jit(cut)(result.tokens)
  np.testing.assert_array_equal(noise.blk_lo, lo)
  np.testing.assert_array_equal(noise.blk_hi, hi)
  lengths = {int(b - a) for a, b in zip(np.asarray(lo).ravel(), np.asarray(hi).ravel())}
  assert {2, 4, 5} <= lengths and np.ptp(np.asarray(p)[..., 0]) > 0.5, "the policy is no constant"


@pytest.mark.full
def test_cached_logits_are_those_without_a_cache():
  off, s = partial.drift(sized(), (S.params(1), learned()[1]), S.row(), KEY, 40)
  assert np.asarray(s.done).all() and np.asarray(off).max() < 1e-5


def test_refusals():
  with pytest.raises(ConfigError, match="has no run"):
    sampling.build({"sizes": {"path": ""}}, objective(), S.model(1))
  for section, match in (
    ({"cache": "dual", "sub_block": 1, "quota": {"kind": "linear", "steps": 2}}, "blocks of one size"),
    ({"guide": "ar"}, "one helper at a time"),
    ({"stop": "entropy_floor"}, "cut already"),
  ):
    with pytest.raises(ConfigError, match=match):
      sized(**section)
  with pytest.raises(ConfigError, match="no policy was trained"):
    S.sampler(S.bd(), sizes="run")
  with pytest.raises(ConfigError, match="chooses among 2 sizes"):
    load = lambda path, name: learned(2)
    sampling.build({"sizes": "run", "eos": -2, "quota": "first_hitting"}, objective(), S.model(1), load=load)
  assert dataclasses.replace(sized(), own=None).capacity == 5
