"""Filling masks by two networks: the cache, the order, what given tokens cost and where a text may end."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import sampling
from genmodels.config import ConfigError
from genmodels.contracts import CONTEXT
from genmodels.models import joint
from genmodels.sampling import partial, prompt_row
from tests.objectives.test_infill import halves, objective, shapes, system, with_decoder
from tests.objectives.test_text import MASK, V

N = 14
KEY = jax.random.key(0)


@functools.cache
def sampler(eos=-2, **section):
  model, net, *_ = system()
  section = {"eos": eos, "active": {"kind": "runs", "size": 4}, **section}
  return sampling.build(section, objective(), model, nets={"mlm": net})


def holes():
  """Three rows: given tokens in the middle and behind, one hole behind a prompt, and a short row."""
  rng = np.random.default_rng(0)
  ids = rng.integers(0, MASK, (3, N))
  row = prompt_row([x[:1] for x in ids], N, N)
  given = np.zeros((3, N), bool)
  given[0, [0, 3, 4, 5, 9, 12, 13]] = True
  given[1, :6] = True
  given[2, [0, 2, 7]] = True
  doc = np.where(np.arange(N)[None] < np.array([N, N, 8])[:, None], 0, -1)
  return row.replace(
    tokens=jnp.asarray(np.where(given, ids, 0), jnp.int32),
    role=jnp.where(given, CONTEXT, row.role),
    doc=jnp.asarray(doc, jnp.int32),
  ), given


@functools.cache
def greedy():
  return sampler(temperature=0.0)(system()[2], holes()[0], KEY)


@functools.cache
def forced():
  """(trees, filled row, open bool[B, N]) → logits that training has at the masked tokens."""
  model, net, *_ = system()
  obj, fn = objective(), joint.function(model, {"mlm": net})

  @jax.jit
  def go(trees, row, given):
    inputs, targets, _ = obj.asked(row, obj.corruption.state(row, given))
    return fn(trees, inputs, targets).dists["infill"].map(lambda z: z)

  return go


@pytest.mark.slow
def test_greedy_fills_are_those_of_teacher_forcing():
  row, given = holes()
  got = greedy()
  tokens = np.asarray(got.tokens)
  is_open = ~given & (np.asarray(row.doc) >= 0)
  logits = np.array(forced()(system()[2], row.replace(tokens=got.tokens), ~jnp.asarray(is_open)))
  logits[..., MASK] = -np.inf
  np.testing.assert_array_equal(logits.argmax(-1)[is_open], tokens[is_open])
  np.testing.assert_array_equal(tokens[given], np.asarray(row.tokens)[given])
  at = np.asarray(got.committed_at)
  assert all((np.diff(at[b][is_open[b]]) > 0).all() for b in range(3))  # from left to right
  assert (at[~is_open] == -1).all() and np.asarray(got.done).all()
  assert list(np.asarray(got.lengths)) == [N, N, 8]


@pytest.mark.slow
def test_one_forward_for_each_open_token():
  """Given tokens are stored in the call that predicts the next open one."""
  row, given = holes()
  is_open = ~given & (np.asarray(row.doc) >= 0)
  got = greedy()
  assert int(got.steps) == is_open.sum(1).max() == 8
  np.testing.assert_array_equal(got.calls["write"], is_open.sum(1))
  assert int(got.forwards) == 8 + 2  # both networks once over the row


@pytest.mark.full
def test_given_tokens_one_by_one_are_the_same():
  """As any next-token sampler takes them, a call each."""
  row, _ = holes()
  single = sampler(temperature=0.0, active="units")(system()[2], row, KEY)
  np.testing.assert_array_equal(single.tokens, greedy().tokens)
  assert int(single.steps) > 8 and list(single.calls["write"]) == [11, 8, 6]


@functools.cache
def first():
  """(trees, row, shift) → logits of the first step, from a cache whose entries are moved by `shift`."""
  made = sampler(temperature=1.0)

  @jax.jit
  def go(trees, row, shift):
    s = made.start(trees, row, 8)
    moved = jax.tree.map(lambda x: jnp.roll(x, shift, axis=1), s.caches[0].layers)
    s = s.replace(caches=(dataclasses.replace(s.caches[0], layers=moved),))
    return made.logits(trees, row, s)[0][:, 0, :MASK]

  return go


@pytest.mark.full
def test_the_cache_is_exact():
  """Logits of every step with the cache and without; a cache of the wrong rows is not."""
  row, _ = holes()
  trees, made = system()[2], sampler(temperature=1.0)
  assert made.policy.name == "causal_exact"
  off, end = partial.drift(made, trees, row, KEY, 8)
  assert np.asarray(off).max() < 1e-4 and np.asarray(end.committed).all()
  assert np.abs(first()(trees, row, 0) - first()(trees, row, 1)).max() > 1e-3  # control


@pytest.mark.full
def test_what_is_behind_a_hole_counts():
  """A given token behind all holes moves the predictions, by the masked network alone."""
  row, _ = holes()
  trees = system()[2]
  other = row.replace(tokens=row.tokens.at[0, 12].set((row.tokens[0, 12] + 1) % MASK))
  moved = lambda trees: np.abs(first()(trees, row, 0) - first()(trees, other, 0))[0].max()
  assert moved(trees) > 1e-3 and moved(with_decoder(trees, halves(trees)[0])) == 0


@pytest.mark.full
def test_no_text_ends_inside_a_hole():
  """The token that a hole would be filled with is another one if it is EOS; at the end of a text it is not."""
  row, _ = holes()
  tokens = np.asarray(greedy().tokens)
  inner = {int(tokens[0, n]) for n in (1, 2, 6, 7, 8, 10, 11)}
  at = next(n for n in range(6, N) if int(tokens[1, n]) in inner)  # row 1 has nothing given behind its prompt
  eos = int(tokens[1, at])
  got = sampler(eos=eos, temperature=0.0)(system()[2], row, KEY)
  filled = np.asarray(got.tokens)
  assert int(got.lengths[1]) == at + 1 and filled[1, at] == eos
  assert eos not in filled[0, [1, 2, 6, 7, 8, 10, 11]] and int(got.lengths[0]) == N


def test_refusals():
  model, net = shapes()
  with pytest.raises(ConfigError, match="one by one"):
    sampling.build({"draft": "ngram"}, objective(), model, nets={"mlm": net})
  with pytest.raises(ConfigError, match="plain tokens"):
    sampling.build({"guidance": 2.0}, objective(), model, nets={"mlm": net})
  with pytest.raises(ConfigError, match="no second network"):
    sampling.build({}, objective(), model)
  assert V == MASK + 1
