"""Esoteric language models: masks, limits, the bound in closed form, and one pass against decoding."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import config, objectives
from genmodels.contracts import CONTEXT, TEXT, Outputs, Target, token_row
from genmodels.models import write_cache
from genmodels.objectives import Nets, laws
from tests.objectives import table_net as tn
from tests.objectives.test_text import KEY, MASK, rows, trunk


@pytest.fixture(autouse=True, scope="module")
def _parameters():
  trunk()


def objective(ref="eso_lm:tiny", mask_id=MASK, **corruption):
  obj = objectives.build(config.load(f"language/{ref}").objective, {"mask_id": mask_id})
  return dataclasses.replace(obj, corruption=dataclasses.replace(obj.corruption, **corruption))


def table_net(table):
  """A table of conditionals behind any mask: position i sees what its slot's mask lets it see."""
  table = jnp.asarray(table)

  def fn(inputs, targets):
    ids, at = inputs.ids[..., 0], inputs.pos[..., 0].astype(jnp.int32)
    dense = jax.vmap(lambda c, lo, hi: ((lo[:, :, None] <= c) & (c < hi[:, :, None])).any(0))
    mask = inputs.masks["full"]
    sees = dense(mask.code, mask.lo, mask.hi) & (ids >= 0)[:, None] & (ids != tn.MASK)[:, None]
    here = at[:, None, :, None] == jnp.arange(tn.L)  # [B, 1, S, L]
    shown = jnp.where(sees[..., None] & here, ids[:, None, :, None], -1).max(2)  # [B, S, L]
    row = table[tn.index_jnp(jnp.where(shown < 0, tn.MASK, shown))]  # [B, S, L, V]
    row = jnp.take_along_axis(row, at[..., None, None], 2)[:, :, 0]
    dists = {}
    for name, t in targets.items():
      dists[name] = tn.TableDist(jnp.take_along_axis(row, jnp.maximum(t.slot, 0)[..., None], 1))
    return Outputs(dists=dists)

  return fn


X = np.array([2, 0, 1, 1])
DRAWS = 30000


def estimates(obj, table) -> np.ndarray:
  """float64[DRAWS] one-draw estimates of the bound of X."""
  nets = Nets({"model": table_net(table)})
  row = token_row(np.tile(X, (DRAWS, 1)))
  return np.asarray(jax.jit(lambda r: obj.bound(nets, row, KEY, r, 1)[0])(0), np.float64)[:, 0]


def ce(table, seen, i) -> float:
  ids = np.where(np.isin(np.arange(tn.L), list(seen)), X, tn.MASK)
  return -float(table[tn.index(ids), i, X[i]])


def diffusion_sum(table, m) -> float:
  """E over sets of m masked tokens of 1/m Σ CE: the step that reveals one of m."""
  sets = list(itertools.combinations(range(tn.L), m))
  return float(np.mean([sum(ce(table, set(range(tn.L)) - set(M), i) for i in M) / m for M in sets]))


def sequential_sum(table, k) -> float:
  """E over sets of k masked tokens of their cross-entropies left to right."""
  out = []
  for M in itertools.combinations(range(tn.L), k):
    seen, total = set(range(tn.L)) - set(M), 0.0
    for i in M:
      total += ce(table, seen, i)
      seen.add(i)
    out.append(total)
  return float(np.mean(out))


def closed_form(table, alpha, count) -> float:
  k = np.arange(tn.L + 1)
  law = np.array([math.comb(tn.L, j) * (1 - alpha) ** j * alpha ** (tn.L - j) for j in k])
  if count == "exact":
    law = (k == math.ceil((1 - alpha) * tn.L)).astype(float)
  each = [sequential_sum(table, j) + sum(diffusion_sum(table, m) for m in range(j + 1, tn.L + 1)) for j in k]
  return float(law @ each)


@pytest.mark.slow
@pytest.mark.parametrize("count", ["exact", "bernoulli"])
def test_bound_is_the_closed_form(count):
  """Both sums: E_K [Σ_{m>K} E_M 1/m Σ CE + left to right over K]. Binomial K (the paper) or a fixed one."""
  table = tn.random_table(1)
  got = estimates(objective(mask_id=tn.MASK, alpha=0.6, count=count), table)
  want = closed_form(table, 0.6, count)
  assert abs(got.mean() - want) < 3.5 * got.std() / math.sqrt(DRAWS)
  other = closed_form(table, 0.6, {"exact": "bernoulli", "bernoulli": "exact"}[count])
  assert abs(want - other) > 3.5 * got.std() / math.sqrt(
    DRAWS
  )  # the control: the other law of K is another sum


@pytest.mark.slow
@pytest.mark.parametrize("count", ["exact", "bernoulli"])
def test_training_estimates_the_same_bound(count):
  """The two terms of a training step, over the documents of their modes, add up to the bound."""
  table = tn.random_table(2)
  obj = objective(mask_id=tn.MASK, alpha=0.5, count=count, time="uniform")
  nets = Nets({"model": table_net(table)})
  row = token_row(np.tile(X, (2 * DRAWS, 1)))
  sums, denominators, aux = jax.jit(lambda row: obj.run(nets, row, KEY, 5))(row)
  assert float(denominators["diffusion"]) == float(denominators["sequential"]) == DRAWS * tn.L
  got = sum(float(sums[t] / denominators[t]) for t in sums) * tn.L
  spread = sum(np.asarray(aux["per_token"][t], np.float64).sum(1).var() * 2 for t in sums)
  assert abs(got - closed_form(table, 0.5, count)) < 3.5 * math.sqrt(spread / DRAWS)


@pytest.mark.slow
def test_limits_are_masked_diffusion_and_autoregression():
  table = tn.random_table(3).astype(np.float64)
  got = estimates(objective(mask_id=tn.MASK, alpha=1.0), table)
  assert abs(got.mean() - tn.closed_form(X, table, tn.L)) < 3.5 * got.std() / math.sqrt(DRAWS)
  got = estimates(objective(mask_id=tn.MASK, alpha=0.0), table)
  np.testing.assert_allclose(got, sequential_sum(table, tn.L), rtol=1e-5)  # no noise: the exact likelihood
  # Levels and weights in training: those of MDLM at α₀ = 1, all documents in one sum at either end.
  row = rows((9, 7), B=4)
  noise = jax.jit(lambda row: objective(alpha=1.0).corruption.draw(row, KEY, 1))(row)
  np.testing.assert_allclose(noise.marginal, noise.level, rtol=1e-5)
  np.testing.assert_allclose(noise.nelbo * noise.level, 1.0, rtol=1e-5)
  for alpha, empty in ((1.0, "sequential"), (0.0, "diffusion")):
    denominators = jax.jit(lambda row, a=alpha: objective(alpha=a).prepare(row, KEY, 1)[2])(row)
    assert {t for t, d in denominators.items() if float(d) == 0} == {empty}


def papers_mask(name, doc, hit, order, sequential):
  """bool[2N, 2N] from the definition, streams (n, c), of what anybody reads: masked n and, unless diffusion
  has them masked, c."""
  N = len(doc)
  out = np.zeros((2 * N, 2 * N), bool)
  for i, j in itertools.product(range(N), repeat=2):
    if doc[i] != doc[j] or doc[i] < 0:
      continue
    if hit[i]:
      out[i, j] = hit[j] and (i == j if sequential[i] else order[j] <= order[i])
      out[i, N + j] = not hit[j] or (sequential[i] and order[j] < order[i])
    causal = order[j] <= order[i]
    out[N + i, N + j] = causal or (name == "eso_a" and not hit[i] and not hit[j])
  return out


@pytest.mark.parametrize("ref", ["eso_lm:tiny", "eso_lm:a"])
def test_masks_are_the_papers(ref):
  obj = objective(ref)
  row = rows((7, 5, 6), B=3, N=20)
  noise = jax.jit(lambda row: obj.corruption.draw(row, KEY, 3))(row)
  (relation,) = obj.relations.values()
  mask = jax.jit(lambda row, noise: relation.mask(obj.layout.arrange(row, noise)).to_dense())
  dense = np.asarray(mask(row, noise))
  sequential = np.asarray(obj.corruption.sequential(row))
  assert sequential[row.doc >= 0].any() and not sequential.all()
  for b in range(3):
    hit = np.asarray(noise.hit[b, 0])
    args = np.asarray(row.doc[b]), hit, np.asarray(noise.order[b]), sequential[b]
    want = papers_mask(obj.masks["full"], *args)
    read = np.concatenate([hit, (args[0] >= 0) & (~hit | sequential[b])])
    np.testing.assert_array_equal(dense[b][read], want[read])
    for d in range(3):  # given, shown, masked; masked tokens in text order where they are sequential
      mine = args[0] == d
      where = np.flatnonzero(mine)[np.argsort(args[2][mine])]
      assert sorted(args[2][mine]) == list(range(mine.sum())) and where[0] == np.flatnonzero(mine)[0]
      assert not np.any(np.diff(hit[where].astype(int)) < 0)
      if sequential[b][mine].all():
        assert np.all(np.diff(where[hit[where]]) > 0)
  assert laws.check(obj) == []
  streams = {"n>n": "BLK_EQ&ORD_LE", "n>c": "ORD_LE", "c>c": "ORD_LE"}
  with pytest.raises(config.ConfigError, match="clean identity"):
    laws.check(dataclasses.replace(obj, masks={"full": streams}))


def test_modes_come_from_the_batch_or_from_the_documents():
  row = rows((4, 4), B=8)
  of = lambda **kw: np.asarray(jax.jit(objective(**kw).corruption.sequential)(row))[:, ::4]
  assert of().mean() == 0.5 and of(split=0.25).mean() == 0.75 and of(split=1.0).mean() == 0
  mode = jnp.asarray(np.random.default_rng(0).integers(0, 2, (8, 2)))
  row = row.replace(docs=row.docs.replace(mode=mode))
  np.testing.assert_array_equal(of(modes="document"), mode == 1)
  assert (of() != (mode == 1)).any()


def _call(obj, row, committed, only, cache=None):
  """(nll of every token at its slot, Outputs.new) of one call on `only`."""
  model, params = trunk()
  inputs, read = obj.view(row, obj.corruption.state(row, committed), only)
  target = Target("text", read["diffusion"], row.tokens, jnp.ones(row.tokens.shape))
  out = model.apply(params, inputs, {"x": target}, cache=cache)
  return out.dists["x"].nll(row.tokens), out.new


@functools.cache
def _decode():
  """The two calls of a decoder, jitted: everything that is committed again, or only what is new, and a cache."""
  obj = objective(alpha=0.5, count="exact")
  pair = lambda stream, at, on: jnp.where(on[..., None], jnp.stack([jnp.full_like(at, stream), at], -1), -1)

  @jax.jit
  def uncached(row, committed, now):
    at = jnp.broadcast_to(jnp.arange(row.tokens.shape[1]), row.tokens.shape)
    only = jnp.concatenate([pair(1, at, committed & (row.doc >= 0)), pair(0, at, now)], 1)
    return _call(obj, row, committed, only)[0]

  @jax.jit
  def cached(row, committed, fresh, now, cache):
    at = jnp.broadcast_to(jnp.arange(row.tokens.shape[1]), row.tokens.shape)
    only = jnp.concatenate([pair(1, at, fresh), pair(0, at, now)], 1)
    nll, new = _call(obj, row, committed, only, cache)
    return nll, write_cache(cache, new, jnp.concatenate([fresh, jnp.zeros_like(now)], 1))

  return obj, uncached, cached


@pytest.mark.slow
def test_one_pass_is_step_by_step_decoding_with_a_cache():
  """A batch of unequal prompts is decoded in the order of `state`: at every step the cached call gives what the
  uncached one gives, a token's keys are written once, and the training views give the same conditionals."""
  obj, uncached, cached = _decode()
  model, params = trunk()
  base = rows((14,), B=3)
  given = np.arange(14) < np.array([[1], [4], [6]])
  row = base.replace(role=jnp.where(given, CONTEXT, TEXT))
  committed, fresh = jnp.asarray(given), jnp.asarray(given)
  cache = model.init_cache(3, 14)
  order = np.asarray(obj.corruption.state(row, committed).order)
  assert (order[0] != np.arange(14)).any()
  steps = np.zeros((3, 14))
  while not np.asarray(committed).all():
    state = obj.corruption.state(row, committed)
    np.testing.assert_array_equal(state.order, order)  # what is committed never moves
    open_, n = ~np.asarray(committed), np.asarray((~given).sum(1))
    left = -(-n // 2)
    # Two tokens a step while diffusion lasts, then one.
    take = np.where(open_.sum(1) > left, np.minimum(2, open_.sum(1) - left), np.minimum(open_.sum(1), 1))
    rank = np.where(open_, order, 99).argsort(1).argsort(1)
    now = jnp.asarray(open_ & (rank < take[:, None]))
    want = uncached(row, committed, now)
    got, cache = cached(row, committed, fresh, now, cache)
    np.testing.assert_allclose(np.where(now, got, 0), np.where(now, want, 0), atol=2e-5)
    steps = np.where(now, want, steps)
    fresh, committed = now, committed | now

  # The sequential part of that generation in one training pass: the same tokens masked, single-token blocks.
  K = -(-(~given).sum(1, keepdims=True) // 2)
  late = order >= 14 - K
  ones = jnp.ones((3, 14))
  target = Target("text", jnp.broadcast_to(jnp.arange(14), (3, 14)), row.tokens, ones)

  @jax.jit
  def one_pass(order):
    noise = obj.corruption.assemble(row, jnp.asarray(late), ones > 0, order, ones, ones, ones)
    return model.apply(params, obj.view(row, noise)[0], {"x": target}).dists["x"].nll(row.tokens)

  one = one_pass(jnp.asarray(order))
  np.testing.assert_allclose(np.where(late, one, 0), np.where(late, steps, 0), atol=2e-5)
  # Control: in another order it were another factorisation.
  back = one_pass(jnp.asarray(np.where(late, 27 - K - order, order)))
  assert np.abs(np.where(late, back - one, 0)).max() > 1e-3
