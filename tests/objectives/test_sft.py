"""SFT variants, from their configs: answers only, the layout's capacity, LLaDA's normaliser."""

import functools

import jax
import numpy as np
import pytest

from genmodels import config, objectives
from genmodels.contracts import CONTEXT, FILLER, TEXT, token_row
from tests.objectives.test_text import KEY, MASK, loss, trunk

ROLE = [CONTEXT] * 10 + [TEXT] * 9 + [CONTEXT] * 5 + [TEXT] * 6 + [FILLER] * 2


@pytest.fixture(autouse=True, scope="module")
def _parameters():
  trunk()


def row(B=4):
  tokens = np.random.default_rng(0).integers(0, MASK, (B, 40))
  role = np.broadcast_to(np.r_[ROLE, [CONTEXT] * 8], (B, 40))
  doc = np.broadcast_to(np.r_[[0] * len(ROLE), [-1] * 8], (B, 40))
  return token_row(tokens, doc, role=role, capacity=1)


@functools.cache
def objective(ref):
  return objectives.build(config.load(f"language/{ref}").objective, {"mask_id": MASK, "eos": 0})


slow = pytest.mark.slow


@pytest.mark.parametrize(
  "ref",
  [
    "fast_dllm_v2:sft_tiny",
    *(pytest.param(r, marks=slow) for r in ("sdar:sft_tiny", "llada:sft_tiny", "dream_coder:tiny")),
  ],
)
def test_variants_learn_answers_only(ref):
  o, r = objective(ref), row()
  inputs, targets, _ = jax.jit(lambda r: o.prepare(r, KEY, 3))(r)
  asked = sum(np.asarray(t.weight > 0).astype(int) for t in targets.values())
  role = np.asarray(r.role)
  assert (asked[role != TEXT] == 0).all() and asked.sum() > 8
  if len(targets) == 2:  # every answer token once per pair, fillers never
    assert (asked[(role == TEXT) & (np.asarray(r.doc) >= 0)] == 1).all()
  if "c" in o.layout.streams:
    # The prompt's blocks stand once, in the clean stream.
    held = np.asarray((inputs.doc >= 0).sum(1))
    noisy, B = len(o.layout.noisy), o.layout.longest_block
    assert (held < 32 + noisy * 32).all() and (held <= 32 + noisy * (17 + 4 * B)).all()


@slow
def test_llada_divides_by_the_answer_with_its_padding():
  """Σ CE/p over masked tokens, per document over the length of its answer, then the mean over documents."""
  o = objective("llada:sft_tiny")
  tokens = np.random.default_rng(1).integers(1, MASK, (1, 24))
  tokens[0, [8, 9, 10, 11, 23]] = 0  # EOS: four pad the first answer to eight tokens
  role = np.r_[[CONTEXT] * 4, [TEXT] * 8, [CONTEXT] * 2, [TEXT] * 10][None]
  r = token_row(tokens, np.r_[[0] * 12, [1] * 12][None], role=role, capacity=2)
  draw = lambda r: (o.corruption.draw(r, KEY, 5), *o.prepare(r, KEY, 5)[1:])
  noise, targets, denominators = jax.jit(draw)(r)
  got, per_token = loss(o, r, step=5)
  hit, p = np.asarray(noise.hit[0, 0]), np.asarray(noise.marginal[0, 0])
  assert hit[4:12].any() and hit[14:].any() and not hit[~np.asarray(role[0] == TEXT)].any()
  length = np.r_[[8] * 12, [10] * 12]
  np.testing.assert_allclose(targets["diffusion"].weight[0], hit / p / length, rtol=1e-6)
  assert float(denominators["diffusion"]) == 2
  ce = np.asarray(per_token[0]) / np.where(hit, 1 / p / length, 1)
  want = np.mean([(ce * hit / p)[:12].sum() / 8, (ce * hit / p)[12:].sum() / 10])
  np.testing.assert_allclose(got, want, rtol=1e-5)
