"""Insertion language models: the loss, packing, and the law over texts, from training views and from decoding."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import config, models, objectives
from genmodels.contracts import CONTEXT, TEXT, Target, token_row
from genmodels.objectives import Nets, laws
from genmodels.objectives.insertion import of_gaps
from tests.objectives.test_text import _docs

KEY = jax.random.key(0)
V, BOS = 3, 2  # two letters and BOS
_B, _N = 16, 7


@functools.cache
def objective():
  return objectives.build(config.load("language/ilm:tiny").objective, {})


@functools.cache
def model():
  heads = {"text": {"forbid": (BOS,)}, "stop": {"size": 2}}
  section = dict(width=16, layers=1, num_heads=2, mlp=32, vocab=V, heads=heads, init_std=0.6)
  made = models.build(section)
  return made, jax.jit(made.init)(jax.random.key(1))


@pytest.fixture(autouse=True, scope="module")
def _parameters():
  model()


@functools.cache
def _evaluate():
  obj, (m, params) = objective(), model()

  @jax.jit
  def run(row, hit):
    """What one training step computes when `hit` is dropped: every gap's logits, log Z, log p(stop)."""
    noise = obj.corruption.state(row, ~hit)
    noise = noise.replace(order=obj.corruption.ranks(row, None, noise.hit))
    inputs, read = obj.view(row, noise)
    on = jnp.ones(row.tokens.shape)
    targets = {n: Target(obj.terms[n].head, read[n], row.tokens, on) for n in obj.terms}
    dists = m.apply(params, inputs, targets).dists
    logits = dists["insert"].map(lambda z: z)
    gap = jnp.where(hit | (row.doc < 0), -1e30, jax.nn.logsumexp(logits, -1))
    stop = jax.nn.log_softmax(dists["stop"].map(lambda z: z)[:, 0], -1)
    return logits, of_gaps(gap, row.doc)[:, 0], stop

  return run


def evaluate(texts, hits):
  """The same for up to _B texts (without BOS) of up to _N − 1 tokens: one compiled program."""
  tokens, doc, drop = np.zeros((_B, _N), int), np.full((_B, _N), -1), np.zeros((_B, _N), bool)
  tokens[:, 0], doc[:, 0] = BOS, 0
  for b, (x, hit) in enumerate(zip(texts, hits, strict=True)):
    tokens[b, 1 : 1 + len(x)], doc[b, : 1 + len(x)], drop[b, 1 : 1 + len(x)] = x, 0, hit
  role = np.full((_B, _N), TEXT)
  role[:, 0] = CONTEXT
  return tuple(
    np.asarray(a, np.float64) for a in _evaluate()(token_row(tokens, doc, role=role), jnp.asarray(drop))
  )


def states(x):
  """{tokens left as a bool tuple: (log p(insert i) for every i left out, log p(go on), log p(stop))}."""
  kept = np.array(list(itertools.product([False, True], repeat=len(x))))
  logits, z, stop = evaluate([x] * len(kept), ~kept)
  # read[n] of a dropped token is the gap before it, so its own entry of `logits` is that gap's.
  each = [{i: logits[b, i + 1, x[i]] - z[b] for i in np.flatnonzero(~k)} for b, k in enumerate(kept)]
  return {tuple(k): (each[b], stop[b, 0], stop[b, 1]) for b, k in enumerate(kept)}


def log_probability(x):
  """log p(x): the sum over all orders of insertion."""
  table, n = states(x), len(x)
  total = []
  for order in itertools.permutations(range(n)):
    keep, path = [False] * n, 0.0
    for i in order:
      each, go, _ = table[tuple(keep)]
      path += go + each[i]
      keep[i] = True
    total.append(path + table[tuple(keep)][2])
  return np.logaddexp.reduce(total)


def enumerated(limit):
  """{text: probability} of texts of at most `limit` tokens, by running the process over its states."""
  texts, reach = {}, {(): 1.0}
  for n in range(limit + 1):
    grown = {}
    logits, z, stop = evaluate(list(reach), [np.zeros(n, bool)] * len(reach))
    for b, (x, p) in enumerate(reach.items()):
      texts[x] = p * np.exp(stop[b, 1])
      for j, v in itertools.product(range(n + 1), range(2)):
        y = x[:j] + (v,) + x[j:]
        grown[y] = grown.get(y, 0.0) + p * np.exp(stop[b, 0] + logits[b, j, v] - z[b])
    reach = grown
  return texts, sum(reach.values())


def test_orders_of_insertion_sum_to_the_probability():
  """Σ over orders of the path's probability, from training views with tokens dropped, is what the process that
  inserts one token after another assigns to the text; all texts together have mass one."""
  texts, rest = enumerated(3)
  assert abs(sum(texts.values()) + rest - 1) < 1e-5
  for x in [(0,), (1, 1), (0, 1, 0), (1, 0, 0)]:
    np.testing.assert_allclose(log_probability(np.array(x)), np.log(texts[x]), atol=2e-5)
  # Control: the paths are different ones, so one order times their number is not it.
  table = states(np.array((0, 1, 0)))
  keep, path = [False] * 3, 0.0
  for i in range(3):
    path += table[tuple(keep)][1] + table[tuple(keep)][0][i]
    keep[i] = True
  assert abs(path + table[tuple(keep)][2] + math.log(6) - np.log(texts[0, 1, 0])) > 1e-3


@pytest.mark.slow
def test_bound_is_above_and_its_draws_are_the_states():
  """(n + 1) E_m[loss − log m] by enumeration, against draws of `bound`; never below −log p."""
  obj, (m, params) = objective(), model()
  x = np.array([1, 0, 0])
  table, n = states(x), 3
  exact = 0.0
  for each, go, stop in table.values():
    left = len(each)
    mean = -sum(each.values()) / left - math.log(left) - go if left else -stop
    exact += mean / math.comb(n, left)
  assert exact > -log_probability(x) + 1e-4
  net = lambda inputs, targets: m.apply(params, inputs, targets)
  row = token_row(
    np.tile(np.concatenate([[BOS], x]), (4000, 1)), role=np.tile([CONTEXT, TEXT, TEXT, TEXT], (4000, 1))
  )
  draws = jax.jit(lambda r: obj.bound(Nets({"model": net}), row, KEY, r, n + 1))
  got = [draws(r) for r in range(n + 1)]
  nats = np.mean([np.asarray(g[0], np.float64)[:, 0] for g in got], 0)
  assert abs(nats.mean() - exact) < 3.5 * nats.std() / math.sqrt(4000) and float(got[0][1][0, 0]) == n


@pytest.mark.slow
def test_loss_by_hand_and_packing():
  """−1/m Σ log p(gap, token) and the stop head's loss, per document; a packed row is its documents alone (T10)."""
  obj, (m, params) = objective(), model()
  net = lambda inputs, targets: m.apply(params, inputs, targets)
  texts = [np.array([0, 1, 1, 0]), np.array([1, 0])]

  def pack(order, N=10):
    tokens, doc, role = np.zeros((1, N), int), np.full((1, N), -1), np.full((1, N), TEXT)
    at = 0
    for d, k in enumerate(order):
      n = len(texts[k]) + 1
      tokens[0, at : at + n], doc[0, at : at + n], role[0, at] = [BOS, *texts[k]], d, CONTEXT
      at += n
    # Ranks of 8: 5 for the longer text, which loses three tokens, 2 for the other, which loses one or none.
    ids = np.array([[(5, 2)[k] for k in order] + [7] * (2 - len(order))])
    return token_row(tokens, doc, role=role, docs=_docs(ids))

  run = jax.jit(
    lambda row, step: (obj.run(Nets({"model": net}), row, KEY, step), obj.corruption.draw(row, KEY, step))
  )
  seen = set()
  for step in range(8):
    (sums, den, aux), noise = run(pack((0, 1)), step)
    assert float(den["insert"]) == float(den["stop"]) == 2
    hit = np.asarray(noise.hit[0, 0])
    for d, (lo, hi) in enumerate(((0, 5), (5, 8))):
      table = states(texts[d])
      each, go, stop = table[tuple(~hit[lo + 1 : hi])]
      seen.add(len(each))
      want = -sum(each.values()) / len(each) if each else 0.0
      got = {k: float(np.asarray(v)[0, lo:hi].sum()) for k, v in aux["per_token"].items()}
      np.testing.assert_allclose(got["insert"], want, atol=2e-5)
      np.testing.assert_allclose(got["stop"], -(stop if not each else go), atol=2e-5)
    other = run(pack((1, 0)), step)[0][0]
    for k in sums:
      np.testing.assert_allclose(float(sums[k]), float(other[k]), rtol=1e-5)
  assert seen == {0, 1, 3}
  grad = jax.grad(
    lambda p: obj.run(Nets({"model": lambda i, t: m.apply(p, i, t)}), pack((0, 1)), KEY, 1)[0]["insert"]
  )
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grad(params)))
  assert laws.check(obj) == []


def test_counts_dropped_are_uniform():
  row = token_row(np.zeros((4000, 5)), role=np.tile([CONTEXT] + [TEXT] * 4, (4000, 1)))
  hit = np.asarray(jax.jit(lambda row: objective().corruption.draw(row, KEY, 0).hit[:, 0])(row))
  assert not hit[:, 0].any()
  pattern, count = np.unique(hit[:, 1:] @ (1 << np.arange(4)), return_counts=True)
  want = 4000 / 5 / np.array([math.comb(4, bin(p).count("1")) for p in pattern])
  assert len(pattern) == 16 and ((count - want) ** 2 / want).sum() < 37.7  # 15 degrees, p = 1e-3
