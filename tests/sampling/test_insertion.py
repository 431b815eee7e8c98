"""Decoding by insertion: places, the law of what is drawn, prompts and stopping."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import config, sampling
from genmodels.contracts import CONTEXT, TEXT
from genmodels.sampling import insertion, prompt_row
from tests.objectives import test_insertion as toy

KEY = jax.random.key(0)


@pytest.fixture(autouse=True, scope="module")
def _parameters():
  toy.model()


def sampler(**kw):
  made = sampling.build(kw, toy.objective(), toy.model()[0], meta={"forbid": (toy.BOS,)})
  assert isinstance(made, insertion.InsertionSampler)
  return made


@pytest.mark.slow
def test_places_are_the_text_in_order():
  """After every step the physical order with its explicit places gives the scores of the text written anew."""
  s = dataclasses.replace(sampler(), threshold=2.0)  # never complete
  params = toy.model()[1]
  row = prompt_row([[toy.BOS], [toy.BOS, 1, 0]], 7, 7)
  run = jax.jit(lambda row, st: s.scores(params, row, st, lambda z: z))
  step = jax.jit(lambda row, st, key: s.step(params, row, st, key))
  there = np.asarray(row.role == CONTEXT) & np.asarray(row.doc >= 0)
  state = insertion.State(
    row.tokens, jnp.asarray(there), jnp.full((2, 7), -1), jnp.asarray(np.where(there, there.cumsum(1) - 1, 0)),
    jnp.zeros(2, bool), jnp.int32(0),
  )  # fmt: skip
  moved = False
  for i in range(4):
    logits, gap, stop = run(row, state)
    there, place = np.asarray(state.there), np.asarray(state.place)
    for b in range(2):
      assert sorted(place[b][there[b]]) == list(range(there[b].sum()))
      by = np.flatnonzero(there[b])[np.argsort(place[b][there[b]])]
      moved |= bool((by != np.arange(len(by))).any())
      text = np.asarray(state.tokens[b])[by]
      want, _, wanted = toy.evaluate([text[1:]], [np.zeros(len(text) - 1, bool)])
      on = np.asarray(gap[b])[by]
      assert on[-1] and on.sum() == len(text) - (0 if b == 0 else 2)  # the prompt is closed
      np.testing.assert_allclose(np.asarray(logits[b])[by][on], want[0, : len(text)][on], atol=2e-5)
      np.testing.assert_allclose(stop[b], wanted[0, 1], atol=2e-5)
    state = step(row, state, jax.random.key(i))
  assert moved


@pytest.mark.slow
def test_generation_fills_a_gap_before_a_suffix():
  s = sampler()
  row = prompt_row([[toy.BOS, 1]] * 64, 8, 8)
  suffix = jnp.arange(8) == 7
  row = row.replace(role=jnp.where(suffix, CONTEXT, row.role), tokens=jnp.where(suffix, 0, row.tokens))
  out = s(toy.model()[1], row, KEY)
  lengths, tokens = np.asarray(out.lengths), np.asarray(out.tokens)
  assert (tokens[:, :2] == [toy.BOS, 1]).all() and lengths.min() >= 3 and len(set(lengths)) > 2
  given = np.asarray(out.committed_at) < 0
  for b in range(64):
    assert given[b, : lengths[b]].sum() == 3 and (tokens[b, 2 : lengths[b]] != toy.BOS).all()
  with pytest.raises(ValueError, match="BOS"):
    s(toy.model()[1], row.replace(role=jnp.full_like(row.role, TEXT)), KEY)
  for bad in ({"top_p": 0.9}, {"cache": "causal_exact"}, {"sub_block": 2}):
    with pytest.raises(config.ConfigError):
      sampler(**bad)


@pytest.mark.full
def test_draws_follow_the_law():
  """Chi-square of texts of up to two tokens against the enumerated law; a sampler without noise fails it."""
  law, _ = toy.enumerated(2)
  B = 20000
  row = prompt_row([[toy.BOS]] * B, 6, 6)

  def chi(temperature):
    out = sampler(temperature=temperature)(toy.model()[1], row, KEY)
    lengths, tokens = np.asarray(out.lengths), np.asarray(out.tokens)
    seen = collections.Counter(tuple(t[1:n]) for t, n in zip(tokens, lengths) if n <= 3)
    seen["longer"] = B - sum(seen.values())
    want = {x: B * p for x, p in law.items()}
    want["longer"] = B - sum(want.values())
    return sum((seen[x] - w) ** 2 / w for x, w in want.items())

  assert len(law) == 7 and chi(1.0) < 24.3  # 7 degrees of freedom, p = 1e-3
  assert chi(0.0) > 100
