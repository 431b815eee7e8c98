"""The likelihood estimator: closed forms, errors, common random numbers, what is refused."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels.config import ConfigError
from genmodels.contracts import CONTEXT, TEXT, token_row
from genmodels.evals import Likelihood, Tally, notes
from tests.objectives import table_net as tn
from tests.sampling import systems as S


def test_tally_arithmetic():
  tally = Tally()
  tally.add(np.array([[2.0, 9.0, 6.0], [4.0, 9.0, 6.0]]), np.array([2, 0, 4]), np.array([1, 5, 3]))
  tally.add(np.array([[1.0], [1.0]]), np.array([2]), np.array([4]))
  report = tally.report()
  assert (report["documents"], report["tokens"], report["bytes"]) == (3, 8, 8)  # the empty one is left out
  assert report["nats_per_token"] == pytest.approx((3 + 6 + 1) / 8)
  assert report["bits_per_byte"] == pytest.approx(10 / math.log(2) / 8)
  residual = np.array([3 - 1.25 * 2, 6 - 1.25 * 4, 1 - 1.25 * 2])
  assert report["stderr"] == pytest.approx(math.sqrt(1.5 * (residual**2).sum()) / 8 / math.log(2))
  assert report["stderr_draws"] == pytest.approx(math.sqrt(2 / 2) / 8 / math.log(2))
  one = Tally()
  one.add(np.ones((1, 1)), np.ones(1))
  assert not {"stderr", "bits_per_byte"} & set(one.report())
  with pytest.raises(ValueError, match="held-out"):
    Tally().report()


def masked(**kw):
  return dataclasses.replace(S.mdm(**kw), mask_id=tn.MASK)


def table_fns(table):
  net = tn.net(table, tn.L)
  return {"model": lambda trees, *a, **kw: net(*a, **kw)}


def test_the_bound_is_the_closed_form_within_its_error():
  """R stratified draws of exactly k masked tokens against the enumeration of every mask; and the error
  that is reported is the error that is made."""
  table, x = tn.random_table(1), np.array([2, 0, 1, 1])
  want = tn.closed_form(x, table, tn.L) / tn.L / math.log(2)
  row = token_row(np.tile(x, (4096, 1)))
  nll, tokens = Likelihood(masked(), table_fns(table), draws=4)({}, row, jax.random.key(0))
  assert nll.shape == (4, 4096) and (tokens == tn.L).all()
  miss = []
  for part in np.split(np.arange(4096), 64):
    tally = Tally()
    tally.add(nll[:, part], tokens[part])
    report = tally.report()
    miss.append((report["bits_per_token"] - want) / report["stderr_draws"])
  whole = Tally()
  whole.add(nll, tokens)
  assert abs(whole.report()["bits_per_token"] - want) < 4 * whole.report()["stderr_draws"]
  # Draws are stratified, so their spread over-states the error: conservative, and not by much.
  assert 0.3 < np.std(miss) < 1.3


def test_common_random_numbers():
  """The same document meets the same noise in any batch, and at any step; other documents do not."""
  objective = masked()
  x = np.random.default_rng(0).integers(0, tn.V, (8, tn.L))
  run = Likelihood(objective, table_fns(tn.random_table(2)), draws=3)
  row = token_row(x)
  nll, _ = run({}, row, jax.random.key(1))
  again, _ = run({}, jax.tree.map(lambda a: a[::-1], row), jax.random.key(1))
  np.testing.assert_array_equal(again[:, ::-1], nll)
  same = token_row(np.tile(x[:1], (8, 1)))
  other, _ = run({}, same, jax.random.key(1))
  assert len(set(other[0].tolist())) > 1


def test_next_token_likelihood_is_exact():
  """One draw, and the sum of −log p of the tokens with a predictor, document by document."""
  objective, model = S.ar(), S.model()
  rng = np.random.default_rng(3)
  doc = np.array([[0] * 5 + [1] * 4 + [-1] * 3])
  role = np.where(np.arange(12) < 2, CONTEXT, TEXT)[None]
  tokens = rng.integers(0, S.V, (1, 12))
  row = token_row(tokens, doc, role=role, capacity=3)
  fns = {"model": lambda trees, *a, **kw: model.apply(trees["model"], *a, **kw)}
  run = Likelihood(objective, fns, draws=16)
  assert run.exact and run.draws == 1
  nll, count = run({"model": S.params()}, row, jax.random.key(0))
  inputs, _ = objective.view(row, objective.corruption.state(row, row.doc < 9))
  hidden = model.apply(S.params(), inputs, {}).layers["hidden"][0]
  weight = S.params()["heads"]["text"]
  logits = np.asarray(jax.nn.log_softmax(hidden @ jax.tree.leaves(weight)[0]))
  want = [-sum(logits[n - 1, tokens[0, n]] for n in ns) for ns in ((2, 3, 4), (6, 7, 8))]
  np.testing.assert_allclose(nll[0], [*want, 0], rtol=2e-5)
  np.testing.assert_array_equal(count, [3, 3, 0])


def test_what_is_no_likelihood_is_refused_or_said():
  with pytest.raises(ConfigError, match="factorisation"):
    Likelihood(S.bd(4, "bd3", "shift"), {})
  assert not notes(S.mdm())
  assert "unclipped" in notes(S.mdm(band=(0.3, 0.8)))[0]
  assert "reproduction" in notes(dataclasses.replace(S.mdm(), reproduction=True))[0]


@pytest.mark.slow
def test_block_size_one_is_the_ar_likelihood():
  """Every level masks the one token of a block, whose context is the clean prefix: the bound is exact."""
  model = S.model()
  fns = {"model": lambda trees, *a, **kw: model.apply(trees["model"], *a, **kw)}
  tokens = np.random.default_rng(4).integers(0, S.V, (3, 9))
  row = token_row(tokens, role=np.broadcast_to(np.where(np.arange(9) < 1, CONTEXT, TEXT), (3, 9)))
  trees = {"model": S.params()}
  blocks = Likelihood(S.bd(1, "context_causal", "shift_clean_boundary"), fns, draws=3)
  one, count = blocks(trees, row, jax.random.key(0))
  exact, same = Likelihood(S.ar(), fns)(trees, row, jax.random.key(0))
  np.testing.assert_array_equal(count, same)
  np.testing.assert_allclose(one, np.broadcast_to(exact, one.shape), rtol=1e-5)
  assert jnp.isfinite(one).all()


def test_the_clean_term_of_a_block_model_is_the_ar_likelihood():
  """NBDiff's auxiliary term, reported instead of the bound: no weight of the noise may enter."""
  model = S.model()
  fns = {"model": lambda trees, *a, **kw: model.apply(trees["model"], *a, **kw)}
  tokens = np.random.default_rng(4).integers(0, S.V, (3, 9))
  row = token_row(tokens, role=np.broadcast_to(np.where(np.arange(9) < 1, CONTEXT, TEXT), (3, 9)))
  objective = S.bd(4, "context_causal", "shift_clean_boundary")
  terms = {**objective.terms, "ar": {"stream": "c", "align": "shift"}}
  both = Likelihood(dataclasses.replace(objective, terms=terms, likelihood="ar"), fns, draws=3)
  assert both.exact and both.draws == 1
  trees = {"model": S.params()}
  nll, count = both(trees, row, jax.random.key(0))
  exact, same = Likelihood(S.ar(), fns)(trees, row, jax.random.key(0))
  np.testing.assert_array_equal(count, same)
  np.testing.assert_allclose(nll, exact, rtol=1e-5)
