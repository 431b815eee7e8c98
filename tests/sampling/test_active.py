"""Pipelines and sliding windows: exact caches, the tokens of sequential decoding (language.md §2.10, §2.11, T24)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import models
from genmodels.config import ConfigError
from genmodels.corruption.absorb import Absorb
from genmodels.models import write_cache
from tests.sampling import systems as S
from tests.sampling.test_cache import assert_same, follow

NB = ("context_causal", "shift_clean_boundary")
PIPELINE = {"kind": "pipeline", "blocks": 3, "add": 0.25, "act": 0.75}


def wedlm(block=4):
  """A noisy block is causal, its observed tokens first, beside a causal clean stream."""
  return dataclasses.replace(S.bd(block, "wedlm"), corruption=corruption(block))


def corruption(block):
  return Absorb(blocks=S.bd(block).corruption.blocks, unit="block", order="observed_first")


SYSTEMS = {
  "pipeline": (S.single_stream, {"active": PIPELINE, "quota": {"kind": "threshold", "tau": 0.3}}),
  "pipeline_shifted": (
    lambda: S.single_stream(4, "shift"),
    {"active": PIPELINE, "quota": {"kind": "threshold", "tau": 0.3}},
  ),
  "window": (
    wedlm,
    {
      "active": {"kind": "window", "size": 5},
      "quota": {"kind": "threshold", "tau": -1.2},
      "score": {"kind": "neg_entropy", "distance": 0.05},
    },
  ),
  "window_shifted": (
    lambda: S.bd(4, *NB),
    {"active": {"kind": "window", "size": 5}, "quota": {"kind": "threshold", "tau": 0.4}},
  ),
}


def block_of_window(row, committed, a):
  """The noise of a window, made anew: one block from the first open token to the window's end."""
  n = np.arange(S.N)[None]
  lo = jnp.argmax(~committed, 1)[:, None]
  inside = (n >= lo) & (n < a.hi[:, None])
  blk_lo, blk_hi = jnp.where(inside, lo, n), jnp.where(inside, a.hi[:, None], n + 1)
  hit = ~committed & (row.doc >= 0)
  # Shown tokens of the block first, then the masked ones, each in logical order.
  early = jnp.stack([(inside & ~hit)[:, :k].sum(1) for k in range(S.N)], 1)
  late = jnp.stack([(inside & hit)[:, :k].sum(1) for k in range(S.N)], 1)
  order = lo + jnp.where(hit, (inside & ~hit).sum(1, keepdims=True) + late, early)
  logical = jnp.broadcast_to(n, order.shape)
  return a.noise.replace(
    hit=hit[:, None], blk_lo=blk_lo, blk_hi=blk_hi, order=jnp.where(inside, order, logical)
  )


@functools.cache
def followed(name):
  make, section = SYSTEMS[name]
  objective = make()
  sampler = S.sampler(objective, **section)
  noise = None
  if "window" in name:
    logical = isinstance(objective.corruption, Absorb) and objective.corruption.order == "logical"
    noise = block_of_window
    if logical:
      noise = lambda row, c, a: block_of_window(row, c, a).replace(order=a.noise.order)
  return sampler, *follow(sampler, S.row(), 18, noise)


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(n, marks=pytest.mark.slow if n in ("window", "pipeline_shifted") else pytest.mark.full)
    for n in SYSTEMS
  ],
)
def test_logits_are_the_training_logits(name):
  """At every step, for unequal prompts: what the cached call predicts is the training forward over all slots."""
  sampler, logits, reference, can, at, state = followed(name)
  assert sampler.policy.exact and sampler.policy.stores and np.asarray(state.done).all()
  seen = {(b, at[t, b, m]) for t, b, m in zip(*np.nonzero(can))}
  assert seen == {(b, n) for b, n in zip(*np.nonzero(np.asarray(S.row().role) == 1))}
  assert_same(logits, reference, can)


@pytest.mark.slow
def test_a_window_leaves_an_ar_cache():
  """T24: the committed keys and values are an AR prefill of the tokens, under the clean stream's codes."""
  sampler, *_, state = followed("window")
  cache, ar, row = state.caches[0], S.ar(), S.row()

  @jax.jit
  def prefill(tokens):
    filled = row.replace(tokens=tokens)
    inputs, _ = ar.view(filled, ar.corruption.state(filled, tokens >= 0))
    empty = models.init_cache(sampler.model.cfg, 4, S.N)
    new = sampler.model.apply(S.params(), inputs, {}, cache=empty).new
    return write_cache(empty, new, jnp.ones(tokens.shape, bool))

  plain, n = prefill(state.tokens), np.asarray(cache.length)
  assert n.min() >= 8
  for a, b in zip(jax.tree.leaves(cache.layers), jax.tree.leaves(plain.layers)):
    for i in range(4):
      np.testing.assert_allclose(np.asarray(a)[:, i, : n[i]], np.asarray(b)[:, i, : n[i]], rtol=0, atol=2e-5)


@pytest.mark.full
def test_windows_and_no_cache_agree():
  make, section = SYSTEMS["window"]
  row, key = S.row(), jax.random.key(2)
  cached = S.sampler(make(), **section)(S.params(), row, key)
  plain = S.sampler(make(), cache="none", **section)(S.params(), row, key)
  np.testing.assert_array_equal(cached.tokens, plain.tokens)
  np.testing.assert_array_equal(cached.committed_at, plain.committed_at)
  # A window of one token goes from left to right, a token a call.
  one = S.sampler(make(), **{**section, "active": {"kind": "window", "size": 1}})(S.params(), row, key)
  at = np.asarray(one.committed_at)
  for b in range(4):
    steps = at[b][at[b] >= 0]
    assert (np.diff(steps) > 0).all()


@pytest.mark.slow
def test_a_pipeline_of_complete_blocks_is_sequential():
  """D2F: add = 1 gives the tokens of one block after another and their order; add < 1 needs fewer calls."""
  row, key, quota = S.row(), jax.random.key(2), {"kind": "threshold", "tau": 0.3}
  run = lambda active: S.sampler(S.single_stream(), active=active, quota=quota)(S.params(), row, key)
  units, pipe = run("units"), run({"kind": "pipeline", "blocks": 2, "add": 1.0, "act": 1.0})
  np.testing.assert_array_equal(units.tokens, pipe.tokens)
  a, b = np.asarray(units.committed_at), np.asarray(pipe.committed_at)
  for i in range(4):
    rank = lambda x: np.unique(x[i][x[i] >= 0], return_inverse=True)[1]
    np.testing.assert_array_equal(rank(a), rank(b))
  assert int(pipe.forwards) < int(units.forwards)  # a complete block is stored beside the next one
  early = run(PIPELINE)
  assert bool(early.done.all()) and (np.asarray(early.tokens) != np.asarray(pipe.tokens)).any()


@pytest.mark.parametrize(
  "objective, section",
  [
    (S.bd(), {"active": "pipeline"}),
    (S.mdm(), {"active": "pipeline"}),
    (S.bd(), {"active": "window"}),
    (S.single_stream(), {"active": "window"}),
    (S.single_stream(), {"active": "pipeline", "sub_block": 2}),
    (wedlm(), {"active": "window", "quota": "linear"}),
  ],
)
def test_active_sets_that_do_not_fit_are_refused(objective, section):
  with pytest.raises(ConfigError, match="sampler") as e:
    S.sampler(objective, **section)
  assert e.value.fix
