"""Text objectives on a real (tiny) trunk: limits, equivalences and what may not move (T4, T5, T8–T10, T25, T26)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import config, models, objectives
from genmodels.contracts import CONTEXT, TEXT, Documents, Inputs, Target, token_row
from genmodels.masks import AttnMask
from genmodels.objectives import Nets, Objective, laws

V, MASK = 11, 10
KEY = jax.random.key(0)


@functools.cache
def trunk():
  section = dict(
    width=32,
    layers=2,
    num_heads=4,
    num_kv_heads=2,
    mlp=48,
    vocab=V,
    heads={"text": {"forbid": (MASK,)}},
    init_std=0.3,
  )
  model = models.build(section)
  return model, jax.jit(model.init)(jax.random.key(1))


@pytest.fixture(autouse=True, scope="module")
def _parameters():
  """Made before any test traces: inside a trace the cache would keep tracers."""
  trunk()


def nets(params=None) -> Nets:
  model, p = trunk()
  return Nets({"model": lambda inputs, targets, **kw: model.apply(params or p, inputs, targets, **kw)})


def ar(**kw) -> Objective:
  return Objective(terms={"text": {"align": "shift"}}, **kw)


def diffusion(streams=("n",), mask="full", align="same", term=None, **corruption) -> Objective:
  return Objective(
    corruption={"kind": "absorb", **corruption},
    layout={"kind": "streams", "streams": streams},
    masks={"full": mask},
    terms={"diffusion": {"stream": "n", "on": "hit", "weight": "nelbo", "align": align, **(term or {})}},
    mask_id=MASK,
  )


def rows(lengths=(12,), B=3, N=None, seed=0):
  """B rows with the same document lengths; the first token of each document is context (BOS)."""
  N = N or sum(lengths)
  doc = np.full((B, N), -1)
  role = np.full((B, N), TEXT)
  at = 0
  for d, n in enumerate(lengths):
    doc[:, at : at + n] = d
    role[:, at] = CONTEXT
    at += n
  tokens = np.random.default_rng(seed).integers(0, MASK, (B, N))
  return token_row(tokens, doc, role=role, capacity=len(lengths))


_RUNS: dict = {}


def loss(obj, row, step=3, term=None):
  """(loss, per-token values) of a term; one program per objective and shape."""
  if id(obj) not in _RUNS:
    _RUNS[id(obj)] = obj, jax.jit(lambda row: obj.run(nets(), row, KEY, step))
  sums, den, aux = _RUNS[id(obj)][1](row)
  term = term or obj.likelihood
  return float(sums[term] / den[term]), aux["per_token"][term]


def logits(ids, mask: AttnMask, pos):
  """float32[B, S, V] of the tiny trunk on hand-made inputs."""
  B, S = ids.shape
  slot = jnp.broadcast_to(jnp.arange(S), (B, S))
  inputs = Inputs(ids[..., None], pos, jnp.zeros((B, S), jnp.int32), {"full": mask})
  return _logits(trunk()[1], inputs, {"x": Target("text", slot, slot, jnp.ones((B, S)))})


@jax.jit
def _logits(params, inputs, targets):
  return trunk()[0].apply(params, inputs, targets).dists["x"].map(lambda x: x)


def test_ar_is_next_token_cross_entropy():
  row = rows()
  N = row.tokens.shape[1]
  n = jnp.arange(N)
  bounds = jnp.stack([jnp.zeros(N, jnp.int32), n + 1])[:, None, None]
  mask = AttnMask(n[None].astype(jnp.int32), bounds[0].astype(jnp.int32), bounds[1].astype(jnp.int32))
  logp = jax.nn.log_softmax(logits(row.tokens, mask, row.pos))
  want = -np.mean([logp[b, i - 1, row.tokens[b, i]] for b in range(3) for i in range(1, N)])
  got, _ = loss(ar(), row)
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_block_limits():
  """Block = document: the two-stream loss is the one-stream loss, draw by draw (T4)."""
  row = rows()
  one = loss(diffusion(), row)[0]
  two = loss(diffusion(("n", "c"), "bd3"), row)[0]
  np.testing.assert_allclose(one, two, rtol=1e-5)
  assert abs(one - loss(diffusion(("n", "c"), "bd3", blocks={"size": 4}, unit="block"), row)[0]) > 1e-3


def test_block_one_is_the_ar_loss():
  """Block size 1, everything masked, boundary read-out: a converted checkpoint starts at its AR loss (T26)."""
  row = rows()
  obj = diffusion(
    ("n", "c"), "context_causal", "shift_clean_boundary", blocks={"size": 1}, unit="block", band=(1.0, 1.0)
  )
  np.testing.assert_allclose(loss(obj, row)[0], loss(ar(), row)[0], rtol=1e-5)
  # With the block read from the noisy stream the same configuration is another loss.
  noisy = diffusion(("n", "c"), "context_causal", "shift", blocks={"size": 1}, unit="block", band=(1.0, 1.0))
  assert abs(loss(noisy, row)[0] - loss(ar(), row)[0]) > 1e-3


@pytest.mark.parametrize("mask", ["bd3", "context_causal", "idlm"])
def test_two_streams_equal_blockwise_forwards(mask):
  """One 2L forward = one forward per block with its explicit clean prefix (T5), ragged last block included."""
  row = rows((11,))
  obj = diffusion(("n", "c"), mask, blocks={"size": 4}, unit="block")
  _, got = loss(obj, row)
  noise = jax.jit(lambda row: obj.corruption.draw(row, KEY, 3))(row)
  noisy = jnp.where(noise.hit[:, 0], MASK, row.tokens)
  want = np.zeros(got.shape)
  for lo in range(0, 11, 4):
    hi = min(lo + 4, 11)
    # Slots behind the block exist only to keep one shape: nobody before them sees them.
    ids = jnp.concatenate([row.tokens[:, :lo], noisy[:, lo:]], 1)
    q = np.arange(11)
    context_end = np.where(q < lo, (q // 4 + 1) * 4, lo) if mask == "bd3" else np.minimum(q + 1, lo)
    own_lo, own_hi = np.where(q < lo, 0, lo), np.where(q < lo, 0, q + 1 if mask == "idlm" else hi)
    bounds = lambda a, b: jnp.asarray(np.stack([a, b])[None], jnp.int32)
    m = AttnMask(jnp.arange(11, dtype=jnp.int32)[None], bounds(0 * q, own_lo), bounds(context_end, own_hi))
    logp = jax.nn.log_softmax(logits(ids, m, row.pos))
    for b in range(3):
      for i in range(lo, hi):
        if noise.hit[b, 0, i]:
          want[b, i] = -logp[b, i, row.tokens[b, i]] * noise.nelbo[b, 0, i]
  np.testing.assert_allclose(got, want, atol=2e-5)


def hidden(obj, row, key=KEY):
  _KEEP[id(obj)] = obj
  return np.asarray(_hidden(id(obj), row, key))


_KEEP: dict = {}


@functools.partial(jax.jit, static_argnums=0)
def _hidden(obj, row, key):
  inputs, _, _ = _KEEP[obj].prepare(row, key, 3)
  model, params = trunk()
  return model.apply(params, inputs, {}).layers["hidden"]


def test_noise_never_moves_the_clean_stream():
  """Purity: other noise, same clean activations, to the bit (T8)."""
  row = rows()
  obj = diffusion(("n", "c"), "bd3", blocks={"size": 4}, unit="block")
  N = row.tokens.shape[1]
  a, b = hidden(obj, row), hidden(obj, row, jax.random.key(9))
  np.testing.assert_array_equal(a[:, N:], b[:, N:])
  assert not np.array_equal(a[:, :N], b[:, :N])


def test_clean_tokens_of_own_and_later_blocks_never_move_a_noisy_slot():
  """Changing the clean identity of a masked token moves no noisy slot of its own or an earlier block (T9)."""
  row = rows(B=1)
  obj = diffusion(("n", "c"), "bd3", blocks={"size": 4}, unit="block")
  noise = obj.corruption.draw(row, KEY, 3)
  at = int(np.flatnonzero(np.asarray(noise.hit[0, 0, 4:8]))[0]) + 4
  other = dataclasses.replace(row, tokens=row.tokens.at[0, at].set((row.tokens[0, at] + 1) % MASK))
  a, b = hidden(obj, row)[0], hidden(obj, other)[0]
  np.testing.assert_array_equal(a[:8], b[:8])
  assert np.abs(a[8:12] - b[8:12]).max() > 1e-4  # later blocks see it


def test_causal_clean_stream_is_the_ar_model():
  """Under the context-causal mask the clean logits are those of plain causal attention (T25)."""
  row = rows()
  obj = Objective(
    corruption={"kind": "absorb", "blocks": {"size": 4}, "unit": "block"},
    layout={"kind": "streams", "streams": ("n", "c")},
    masks={"full": "context_causal"},
    terms={
      "diffusion": {"stream": "n", "align": "shift_clean_boundary", "on": "hit"},
      "ar": {"stream": "c", "align": "shift"},
    },
    likelihood="diffusion",
    mask_id=MASK,
  )
  np.testing.assert_allclose(
    np.asarray(loss(obj, row, term="ar")[1]), np.asarray(loss(ar(), row)[1]), atol=1e-5
  )
  # A block-bidirectional clean stream is another model, and the laws refuse an AR loss on it.
  with pytest.raises(config.ConfigError, match="reaches that token's clean identity"):
    laws.check(dataclasses.replace(obj, masks={"full": "bd3"}))


def _docs(ids):
  ids = jnp.asarray(ids, jnp.uint32)
  zero = jnp.zeros(ids.shape, jnp.int32)
  rank = jnp.stack([ids.astype(jnp.int32), zero + 8], -1)
  return Documents(jnp.stack([jnp.zeros_like(ids), ids], -1), zero, rank, zero, zero, {})


@pytest.mark.parametrize("kind", ["ar", "mdlm", "bd3"])
def test_packing_changes_nothing(kind):
  """A packed row's per-document losses are those of the documents alone, in any order (T10, vision 17)."""
  obj = {
    "ar": ar(),
    "mdlm": diffusion(),
    "bd3": diffusion(("n", "c"), "bd3", blocks={"size": 4}, unit="block"),
  }[kind]
  lengths = (7, 5)
  rng = np.random.default_rng(4)
  texts = [rng.integers(0, MASK, n) for n in lengths]

  def pack(order, N=16):
    tokens, doc, role = np.zeros((1, N), int), np.full((1, N), -1), np.full((1, N), TEXT)
    at = 0
    for d, k in enumerate(order):
      n = lengths[k]
      tokens[0, at : at + n], doc[0, at : at + n], role[0, at] = texts[k], d, CONTEXT
      at += n
    ids = np.array([list(order) + [7] * (2 - len(order))]) + 1
    return token_row(tokens, doc, role=role, docs=_docs(ids))

  def sums(order):
    row = pack(order)
    _, per_token = loss(obj, row)
    return [float(np.asarray(per_token)[0][np.asarray(row.doc)[0] == d].sum()) for d in range(len(order))]

  a, b = sums((0, 1)), sums((1, 0))
  alone = [sums((0,))[0], sums((1,))[0]]
  np.testing.assert_allclose(a, alone, rtol=1e-5)
  np.testing.assert_allclose(b, alone[::-1], rtol=1e-5)
  assert min(alone) > 0.1


def test_sdar_draws_one_level_per_document():
  cfg = config.load("language/sdar:tiny")
  obj = objectives.build(cfg.objective, {"mask_id": MASK})
  noise = obj.corruption.draw(rows((16, 16), B=8), KEY, 0)
  level = np.asarray(noise.level[:, 0])
  assert np.all(np.ptp(level[:, :16], axis=1) == 0) and np.all(np.ptp(level[:, 16:], axis=1) == 0)
  assert len(np.unique(level)) == 16
  assert np.asarray(noise.hit.reshape(8, 2, 16).sum(-1)).min() >= 1
  blocks = np.asarray(noise.blk_hi - noise.blk_lo)
  assert np.all(blocks == 4)


def test_mdlm_and_llada_settings():
  row = rows((64,), B=64)
  for name, law in (
    ("mdlm", lambda t: ((1 - 1e-3) * t, 1 / t)),
    ("llada", lambda t: ((1 - 1e-3) * t + 1e-3, 1 / ((1 - 1e-3) * t + 1e-3))),
  ):
    obj = objectives.build(config.load(f"language/{name}:tiny").objective, {"mask_id": MASK})
    noise = obj.corruption.draw(row, KEY, 0)
    _, targets, den = obj.prepare(row, KEY, 0)
    t = np.asarray(noise.level[:, 0])
    p, w = law(t)
    np.testing.assert_allclose(noise.marginal[:, 0], p, rtol=1e-5)
    hit = np.asarray(noise.hit[:, 0])
    np.testing.assert_allclose(np.asarray(targets["diffusion"].weight)[hit], w[hit], rtol=1e-4)
    assert float(den["diffusion"]) == 64 * 63  # every text token, masked or not
    assert abs(hit[:, 1:].mean() - p[:, 1:].mean()) < 0.03


@pytest.mark.parametrize("normaliser", ["all_valid", "masked", "answer_len", "weight_sum", "batch"])
def test_normalisers(normaliser):
  row = rows((7, 5), B=2)
  obj = diffusion(term={"normaliser": normaliser, "weight": "one"})
  _, targets, den = obj.prepare(row, KEY, 0)
  hit = np.asarray(obj.corruption.draw(row, KEY, 0).hit[:, 0])
  want = {
    "all_valid": 2 * (6 + 4),
    "masked": hit.sum(),
    "answer_len": 4,
    "weight_sum": hit.sum(),
    "batch": 4,
  }[normaliser]
  assert float(den["diffusion"]) == want
  w = np.asarray(targets["diffusion"].weight)
  share = np.where(np.asarray(row.doc) == 0, 1 / 6, 1 / 4) if normaliser == "answer_len" else 1.0
  np.testing.assert_allclose(w, hit * share, rtol=1e-6)
