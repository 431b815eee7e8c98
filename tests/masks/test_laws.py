"""T7–T9: leaks and impurity are found, sound systems pass, and a real stack of attention layers agrees.

Legend: L clean tokens · S = 2L slots, stored [noisy | clean].
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import kernels
from genmodels.masks import Relations, builders, laws

L, BLOCK = 12, 4
DOC = jnp.zeros((1, L), jnp.int32)
NONE = np.full(L, -1)
TOKENS = np.arange(L)
SOUND = {("n", "n"): "BLK_EQ", ("n", "c"): "BLK_LT", ("c", "c"): "BLK_LE"}


def _dense(table, **slots):
  slots = builders.stack(DOC, 2, **({"block": BLOCK} | slots))
  return np.array(Relations(table, ("n", "c")).mask(slots).to_dense()[0])


def _carries(hit):
  """A hit noisy slot holds nothing, the others and the clean stream their own token."""
  return np.concatenate([np.where(hit, -1, TOKENS), TOKENS])


def _targets(hit, ar=False):
  """Hit noisy slots predict their token; with `ar`, clean slots the next one."""
  clean = np.concatenate([TOKENS[1:], [-1]]) if ar else NONE
  return np.concatenate([np.where(hit, TOKENS, -1), clean])


ALL_HIT = np.ones(L, bool)
SOME_HIT = TOKENS % 3 != 1


@pytest.mark.parametrize("hit", [ALL_HIT, SOME_HIT], ids=["all", "some"])
@pytest.mark.parametrize(
  "table, ar",
  [
    (SOUND, False),
    (SOUND | {("c", "c"): "POS_LE"}, True),  # NBDiff, TiDAR
    (SOUND | {("n", "n"): "BLK_EQ&POS_LE", ("c", "c"): "POS_LE"}, True),  # I-DLM
    ({("n", "n"): "SELF", ("n", "c"): "POS_LT", ("c", "c"): "POS_LE"}, True),  # Eso-LM (B)
  ],
)
def test_sound_systems_pass(table, ar, hit):
  dense = _dense(table)
  assert laws.leak_closure(dense, _carries(hit), _targets(hit, ar)) == []
  noisy = np.arange(2 * L) < L
  assert laws.purity(dense, noisy, ~noisy) == []


def test_shifted_alignments_are_leak_free():
  # shift_clean_boundary: a block's first token is predicted by the clean stream, the rest by the left
  # neighbour in the noisy block.
  slot = np.where(TOKENS % BLOCK == 0, L + TOKENS - 1, TOKENS - 1)
  pairs = np.stack([slot, TOKENS], 1)[1:]
  for clean in ("BLK_LE", "POS_LE"):
    assert laws.leak_closure(_dense(SOUND | {("c", "c"): clean}), _carries(ALL_HIT), pairs) == []


def test_seeded_bug_offset_block_causal_with_less_or_equal():
  dense = _dense(SOUND | {("n", "c"): "BLK_LE"})
  leaks = laws.leak_closure(dense, _carries(SOME_HIT), _targets(SOME_HIT))
  assert {(q, t) for q, _, t in leaks} == {(int(n), int(n)) for n in TOKENS[SOME_HIT]}


def test_seeded_bug_noisy_sees_all_clean():
  dense = _dense(SOUND | {("n", "c"): "ALL"})
  assert laws.leak_closure(dense, _carries(SOME_HIT), _targets(SOME_HIT))


def test_seeded_bug_ar_loss_on_a_block_bidirectional_clean_stream():
  # language §0.6: 9 of 11 positions leak at B = 4, L = 12; only block-final ones may carry the loss.
  leaks = laws.leak_closure(_dense(SOUND), _carries(ALL_HIT), _targets(ALL_HIT, ar=True))
  assert {q - L for q, _, _ in leaks} == {n for n in range(L - 1) if n % BLOCK != BLOCK - 1}
  assert len({q for q, _, _ in leaks}) == 9


def test_seeded_bug_straddling_block():
  # SFT with copies of the response alone (language §0.7): block 1 holds prompt tokens 4, 5 and response
  # tokens 6, 7. The noisy slots must read that prompt somewhere: in the clean stream, whose slots 4, 5
  # see clean 6, 7 under BLK_LE. One hop is clean, two hops leak.
  prompt = 6
  response = np.asarray(TOKENS >= prompt)
  dense = _dense(SOUND)
  dense[:L][~response] = False  # the prompt has no noisy copy
  dense[:, :L][:, ~response] = False
  dense[prompt : BLOCK * 2, L + BLOCK : L + prompt] = (
    True  # straddled prompt tokens, read in the clean stream
  )
  carries, targets = _carries(response), _targets(response)
  direct = dense & (carries[None] == targets[:, None]) & (targets[:, None] >= 0)
  assert not direct.any()
  leaks = laws.leak_closure(dense, carries, targets)
  assert {q for q, _, _ in leaks} == {6, 7}
  # Three cures, none flagged: a causal clean stream, blocks anchored at the response, a copied block.
  cured = _dense(SOUND | {("c", "c"): "POS_LE"})
  cured[:, :L] = dense[:, :L]
  cured[:L] = dense[:L]
  assert laws.leak_closure(cured, carries, targets) == []
  lo = jnp.where(TOKENS < prompt, TOKENS // BLOCK * BLOCK, prompt + (TOKENS - prompt) // BLOCK * BLOCK)
  hi = jnp.where(TOKENS < prompt, jnp.minimum(lo + BLOCK, prompt), jnp.minimum(lo + BLOCK, L))
  assert laws.leak_closure(_dense(SOUND, block=(lo[None], hi[None])), carries, targets) == []
  copied = response | (TOKENS >= BLOCK)
  assert laws.leak_closure(_dense(SOUND), _carries(response & copied), targets) == []


def test_impurity_is_flagged_although_it_is_no_leak():
  dense = _dense(SOUND | {("c", "n"): "BLK_LT"})
  noisy = np.arange(2 * L) < L
  assert laws.purity(dense, noisy, ~noisy)
  assert laws.leak_closure(dense, _carries(ALL_HIT), _targets(ALL_HIT)) == []


def test_reach_follows_several_layers():
  chain = np.eye(5, k=-1, dtype=bool)  # each slot sees the one before
  assert (laws.reach(chain) == np.tri(5, dtype=bool)).all()


def _stack_of_layers(table, streams=("n", "c"), present=None):
  """Three random attention layers over the embeddings [S, D] of the streams, stored in turn.

  Args:
    present: bool[S], the slots that take part; all by default.
  """
  S = L * len(streams)
  slots = builders.stack(DOC, len(streams), block=BLOCK)
  if present is not None:
    slots = slots.replace(doc=jnp.where(present, slots.doc, -1))
  mask = Relations(table, streams).mask(slots)
  weights = 0.5 * jax.random.normal(jax.random.key(0), (3, 4, 16, 16))

  @jax.jit
  def run(x):
    def layer(x, w):
      q, k, v = (jnp.einsum("bsd,de->bse", x, w[i]).reshape(1, S, 2, 8) for i in range(3))
      out = kernels.attention(q, k, v, mask, tiles=(4, 4, 1)).reshape(1, S, 16)
      return jnp.tanh(x + out @ w[3]), None

    return jax.lax.scan(layer, x[None], weights)[0][0]

  return run


def _embeddings(key=1):
  return jax.random.normal(jax.random.key(key), (2 * L, 16))


def test_two_streams_are_a_loop_over_blocks():
  # T5: each noisy block alone with its clean prefix gives what the joint forward gives.
  x = _embeddings()
  joint = _stack_of_layers(SOUND)(x)
  for b in range(L // BLOCK):
    mine = TOKENS // BLOCK == b
    present = np.concatenate([mine, TOKENS < b * BLOCK])
    alone = _stack_of_layers(SOUND, present=present)(jnp.where(present[:, None], x, 0))
    np.testing.assert_allclose(joint[:L][mine], alone[:L][mine], atol=1e-5)


@pytest.mark.strict
def test_new_noise_leaves_clean_activations_bit_equal():
  # T8, with its negative control.
  x = _embeddings()
  noised = x.at[:L].set(_embeddings(2)[:L])
  for clean in ("BLK_LE", "POS_LE"):
    run = _stack_of_layers(SOUND | {("c", "c"): clean})
    np.testing.assert_array_equal(run(x)[L:], run(noised)[L:])
  impure = _stack_of_layers(SOUND | {("c", "n"): "BLK_LT"})
  assert (impure(x)[L:] != impure(noised)[L:]).any()


@pytest.mark.strict
def test_a_clean_token_reaches_only_later_noisy_blocks():
  # T9, exactly as far as the closure says, with its negative control.
  x, token = _embeddings(), 5
  changed = x.at[L + token].add(1.0)
  run = _stack_of_layers(SOUND)
  moved = np.asarray((run(x) != run(changed)).any(-1))
  np.testing.assert_array_equal(moved, laws.reach(_dense(SOUND))[:, L + token])
  assert not moved[: 2 * BLOCK].any() and moved[2 * BLOCK : L].all()
  leaky = _stack_of_layers(SOUND | {("n", "c"): "BLK_LE"})
  assert (leaky(x) != leaky(changed))[BLOCK : 2 * BLOCK].any()


@pytest.mark.strict
def test_context_causal_clean_stream_is_the_ar_model():
  # T25 at the level of attention: bit-equal to causal attention over the clean row alone.
  x = _embeddings()
  ours = _stack_of_layers(SOUND | {("c", "c"): "POS_LE"})(x)
  alone = _stack_of_layers({("c", "c"): "POS_LE"}, ("c",))(x[L:])
  np.testing.assert_array_equal(ours[L:], alone)
