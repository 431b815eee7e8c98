"""EOS padding as one unit: masked all or none, counted once, cut at random; from the Dream-Coder config."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import config, objectives
from genmodels.config import ConfigError
from genmodels.contracts import CONTEXT, TEXT, token_row

EOS, MASK, B = 9, 10, 2048
KEY = jax.random.key(0)
# An answer with an EOS inside of it and five behind, one with a single EOS, one with none.
TOKENS = [1, 2, 3, 9, 4, 5, 9, 9, 9, 9, 9, 1, 2, 3, 9, 1, 2, 3, 4, 0]
DOC = [0] * 11 + [1] * 4 + [2] * 4 + [-1]
RUN = [0] * 6 + [1] * 5 + [0] * 3 + [1] + [0] * 5


def row():
  role = np.full(20, TEXT)
  role[[0, 11, 15, 19]] = CONTEXT
  wide = lambda x: np.broadcast_to(np.asarray(x), (B, 20))
  return token_row(wide(TOKENS), wide(DOC), role=wide(role), capacity=3)


def objective(**corruption):
  section = config.plain(config.load("language/dream_coder:tiny").objective)
  section["corruption"] |= corruption
  return objectives.build(section, {"mask_id": MASK, "eos": EOS})


@pytest.fixture(scope="module")
def drawn():
  o = objective(cut=0.0)
  return jax.jit(lambda r: o.corruption.draw(r, KEY, 3))(row())


def test_the_run_is_masked_all_or_none_with_the_probability_of_a_token(drawn):
  hit, level = np.asarray(drawn.hit[:, 0]), np.asarray(drawn.level[:, 0])
  run = hit[:, 6:11]
  assert (run.all(1) | ~run.any(1)).all()
  assert (hit[:, 3] != hit[:, 6]).any()  # an EOS inside of the answer is a token of its own
  assert not hit[:, [0, 11, 15, 19]].any()
  # Given its level the run is masked as often as any token: by tercile of the level, within 4σ.
  for lo in (0, 1 / 3, 2 / 3):
    some = (level[:, 6] >= lo) & (level[:, 6] < lo + 1 / 3)
    for token in (1, 6):
      p = level[some, token]
      assert abs(hit[some, token].mean() - p.mean()) < 4 * np.sqrt((p * (1 - p)).mean() / some.sum())
  # Control: token by token a run of five would nearly never be masked whole at low levels.
  assert run[level[:, 6] < 0.5].all(1).mean() > 0.15


def test_the_run_counts_once(drawn):
  np.testing.assert_allclose(drawn.share[0], np.where(np.r_[RUN], [0.2] * 11 + [1] * 9, 1))
  for normaliser, want in (("masked", None), ("all_valid", 6 + 3 + 3), ("answer_len", 3)):
    o = objective(cut=0.0)
    term = dataclasses.replace(o.terms["diffusion"], weight="one", normaliser=normaliser, align="same")
    one = jax.tree.map(lambda x: x[:1], (row(), drawn))
    read = jnp.arange(20)[None]
    target, denominator = o.target(*one, read, term)
    hit = np.asarray(drawn.hit[0, 0])
    if want is None:
      units = [hit[n] for n in range(20) if n not in range(7, 11)]
      want = sum(units)
    assert float(denominator) == pytest.approx(want)
    if normaliser == "answer_len":  # of the first document: five tokens and the run
      per = np.asarray(target.weight[0, :11])
      np.testing.assert_allclose(per, hit[:11] * np.where(RUN[:11], 0.2, 1) / 6, rtol=1e-6)


def test_the_run_is_cut_to_a_uniform_length():
  o = objective(cut=1.0)
  cut = jax.jit(lambda r, step: o.corruption.trimmed(r, KEY, step))
  kept = np.asarray((cut(row(), 3).doc == 0).sum(1)) - 6
  assert set(kept) == {1, 2, 3, 4, 5}
  counts = np.bincount(kept)[1:]
  assert ((counts - B / 5) ** 2 / (B / 5)).sum() < 18.5  # chi-square, 4 degrees, p = .001
  after = cut(row(), 4)
  assert (np.asarray((after.doc == 0).sum(1)) - 6 != kept).mean() > 0.5
  gone = np.asarray(after.doc == -1)[:, :19]
  assert (np.asarray(after.role)[:, :19][gone] == CONTEXT).all() and gone[:, 6:11].any()
  assert not gone[:, :7].any() and not gone[:, 11:].any()
  # Likelihoods are of all that is there; half the draws keep the run whole.
  assert o.corruption.trimmed(row(), KEY, 3, bound=(0, 1)).doc is not None
  np.testing.assert_array_equal(o.corruption.trimmed(row(), KEY, 3, bound=(0, 1)).doc, row().doc)
  half = objective(cut=0.5).corruption.trimmed(row(), KEY, 3)
  assert 0.5 < np.asarray((half.doc == 0).sum(1) == 11).mean() < 0.7


def test_options_are_checked():
  with pytest.raises(ConfigError, match="eos_id"):
    objectives.build(config.load("language/dream_coder:tiny").objective, {"mask_id": MASK})
  for wrong in ({"count": "exact"}, {"complement": True}, {"cut": 2.0}):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
      objective(**wrong)
