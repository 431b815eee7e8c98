"""Speculative decoding against plain decoding: ids (language.md T19), laws (T20), caches (T17), stopping (T23)."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from genmodels import models, sampling
from genmodels.config import ConfigError
from genmodels.contracts import CONTEXT, Target, token_row
from genmodels.objectives import Objective
from genmodels.sampling import drafters, speculate, verify
from genmodels.sampling.drafter import Draft, Drafter
from tests.sampling import systems as S

KEY = jax.random.key(3)


@dataclasses.dataclass(frozen=True)
class Given(Drafter):
  """Drafts that the caller wrote down: own int32[N, B, …] by the row's length, shape [K] or [R, K] behind."""

  size: int = 3
  chains: int = 1

  def draft(self, params, own, context, state):
    return Draft(own[context.length, jnp.arange(len(context.length))]), state


def tidar(block=4, mask=S.MASK) -> Objective:
  return Objective(
    corruption={"kind": "absorb", "unit": "block", "blocks": {"size": block}, "band": (1.0, 1.0)},
    layout={"kind": "streams", "streams": ("n", "c")},
    masks={"full": "context_causal"},
    likelihood="ar",
    terms={
      "ar": {"stream": "c", "align": "shift"},
      "diffusion": {"stream": "n", "on": "hit", "normaliser": "masked"},
    },
    mask_id=mask,
  )


@functools.cache
def plain(objective="ar", **section):
  """A target and what it generates alone."""
  sampler = S.sampler({"ar": S.ar, "tidar": tidar}[objective](), **section)
  return sampler, jax.tree.map(np.asarray, sampler(S.params(), S.row(), KEY))


def assert_same(result, want):
  np.testing.assert_array_equal(result.tokens, want.tokens)
  np.testing.assert_array_equal(result.lengths, want.lengths)
  assert bool(result.done.all())
  generated = np.asarray(result.committed_at >= 0).sum(1)
  accepted, calls = np.asarray(result.memory["accepted"]), np.asarray(result.calls["verify"])
  # Every forward commits one token of the target's, but the last one may end with a draft at the row's end.
  assert ((generated - accepted <= calls) & (calls <= generated)).all()


# -- ids ------------------------------------------------------------------------------------------------


@functools.cache
def given(temperature):
  target, want = plain(temperature=temperature)
  return speculate.build(target, Given(3)), want


def tables(want, kind):
  """Drafts int32[N, B, K] for every length that a row can have."""
  N, B, K = S.N, 4, 3
  at = np.minimum(np.arange(N)[:, None] + np.arange(K), N - 1)  # [N, K]
  right = np.moveaxis(want.tokens[:, at], 0, 1)
  rng = np.random.default_rng(1)
  return {
    "random": rng.integers(0, S.V, right.shape),
    "right": right,
    "wrong": (right + 1) % S.V,
    "half": np.where(rng.uniform(size=right.shape) < 0.5, right, 0),
    "mask": np.full_like(right, S.MASK),
    "no ids": np.where(rng.uniform(size=right.shape) < 0.5, right, -7 + 10**6 * (right % 2)),
  }[kind].astype(np.int32)


@pytest.mark.parametrize("temperature", [0.0, pytest.param(1.0, marks=pytest.mark.slow)])
def test_any_drafts_give_the_targets_ids(temperature):
  """T19, at any temperature: drafts that are no draws change no id, whatever they are."""
  sampler, want = given(temperature)
  steps = {}
  for kind in ("random", "right", "wrong", "half", "mask", "no ids"):
    result = dataclasses.replace(sampler, own=jnp.asarray(tables(want, kind)))
    object.__setattr__(result, "_jitted", sampler._jitted)  # one compilation for all of them
    result = result(S.params(), S.row(), KEY)
    assert_same(result, want)
    steps[kind] = int(result.steps)
  most = (S.N - 1) - 1 + 1  # the shortest prompt has one token
  assert steps["wrong"] == steps["mask"] == most
  assert steps["right"] == -(-most // 4) and steps["right"] < steps["half"] < most


def test_rows_end_at_eos():
  """T23: a row stops at its first EOS, be it a draft or the token behind; nothing after it is kept."""
  _, want = plain(temperature=1.0)
  made = np.where(np.asarray(S.row().role) == CONTEXT, -1, want.tokens)
  eos = max(range(S.V), key=lambda v: sum((made[b] == v).any() for b in range(4)) - 0.01 * (made == v).sum())
  target, short = plain(temperature=1.0, eos=eos)
  sampler = speculate.build(target, Given(3), own=jnp.asarray(tables(want, "right")))
  result = sampler(S.params(), S.row(), KEY)
  np.testing.assert_array_equal(result.lengths, short.lengths)
  assert (np.asarray(short.lengths) < S.N).any()
  for b, n in enumerate(np.asarray(short.lengths)):
    np.testing.assert_array_equal(result.tokens[b, :n], short.tokens[b, :n])
    assert (np.asarray(result.committed_at)[b, n:] == -1).all()


DRAFTERS = {
  "ngram": ("ar", drafters.NGram(3)),
  "jacobi": ("ar", drafters.Jacobi(5)),
  "jacobi_zero": ("ar", drafters.Jacobi(13, guess=0)),
  "tidar": ("tidar", drafters.TiDAR()),
}


@pytest.mark.slow
@pytest.mark.parametrize("name, temperature", [(n, 0.0) for n in DRAFTERS] + [("jacobi", 1.0)])
def test_drafters_keep_the_targets_ids(name, temperature):
  objective, drafter = DRAFTERS[name]
  target, want = plain(objective, temperature=temperature)
  result = speculate.build(target, drafter)(S.params(), S.row(), KEY)
  assert_same(result, want)
  # CLLM's bound: each iteration fixes a token, so n tokens take at most n forwards from any first guess.
  assert int(result.steps) <= S.N - 1


def scaled(factor):
  return jax.tree.map(lambda x: x * factor, S.params())


@pytest.mark.slow
@pytest.mark.parametrize("chains", [1, 3])
def test_a_smaller_model_drafts(chains):
  """Its own cache is right: drafting with the target itself, every draft is accepted; greedy ids stay."""
  target, want = plain(temperature=0.0)
  small = drafters.Small(3, chains=chains, temperature=0.0 if chains == 1 else 0.3, target=target)
  sampler = speculate.build(target, small, own=S.params())
  result = sampler(S.params(), S.row(), KEY)
  assert_same(result, want)
  if chains == 1:
    np.testing.assert_array_equal(result.memory["accepted"], result.memory["drafted"])
    assert int(result.steps) == -(-(S.N - 1) // 4)
  worse = dataclasses.replace(sampler, own=scaled(0.8))
  object.__setattr__(worse, "_jitted", sampler._jitted)
  result = worse(S.params(), S.row(), KEY)
  assert_same(result, want)
  assert np.asarray(result.memory["accepted"] < result.memory["drafted"]).any()


# -- caches ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "chains", "tidar"])
def test_no_cache_gives_the_same_tokens(kind):
  """T17 through the sampler's own view: kept slots of drafts and chains are what a prefill computes."""
  objective = "tidar" if kind == "tidar" else "ar"
  results = []
  for cache in ("auto", "none"):
    target, want = plain(objective, temperature=0.0, cache=cache)
    drafter, own = drafters.TiDAR(), None
    if kind != "tidar":
      table = tables(want, "half")
      drafter = Given(3, 1 + (kind == "chains"))
      own = table if kind == "linear" else np.stack([table, tables(want, "right")], 2)
      own = jnp.asarray(own)
    results.append(speculate.build(target, drafter, own=own)(S.params(), S.row(), KEY))
    assert_same(results[-1], want)
  np.testing.assert_array_equal(results[0].committed_at, results[1].committed_at)
  if kind == "chains":  # the second chain is right: it is always followed
    assert int(results[0].steps) == -(-(S.N - 1) // 4)
