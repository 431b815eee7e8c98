"""Consistency (CLLM, Jacobi Forcing): states, what counts, who sees whom, and the loss by separate forwards."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import config, objectives
from genmodels.config import ConfigError
from genmodels.contracts import CONTEXT, TEXT, token_row
from genmodels.corruption import Blocks, JacobiState
from genmodels.masks import CODE_HIDDEN, AttnMask
from genmodels.objectives import laws
from genmodels.objectives.consistency import TAUGHT
from tests.objectives.test_text import KEY, MASK, ar, logits, loss, nets, trunk

SPAN, WINDOW = 4, 2  # tokens of a span, spans of a window
LENGTHS, GIVEN = (18, 13), (3, 1)  # a window and a half behind a prompt; a ragged last span
N = sum(LENGTHS)


@pytest.fixture(autouse=True, scope="module")
def _parameters():
  trunk()


@functools.cache
def objective(name: str):
  section = config.plain(config.load(f"language/{name}:tiny").objective)
  section["corruption"] |= {"span": SPAN}
  section["corruption"]["blocks"]["size"] = SPAN * (WINDOW if name == "jacobi_forcing" else 1)
  return objectives.build(section)


def spans_of(given: int, length: int, start: int):
  """(first, end) of the spans of a document that begins at `start`."""
  return [(start + lo, start + min(lo + SPAN, length)) for lo in range(given, length, SPAN)]


def row(B=2, seed=0):
  """Packed documents with trajectories whose states get right from the left, as Jacobi's do."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, MASK, (B, N))
  codes = np.repeat(tokens[..., None], 1 + SPAN, -1)
  doc, role = np.full((B, N), -1), np.full((B, N), TEXT)
  start = 0
  for d, (n, given) in enumerate(zip(LENGTHS, GIVEN)):
    doc[:, start : start + n], role[:, start : start + given] = d, CONTEXT
    for b in range(B):
      for lo, hi in spans_of(given, n, start):
        for k in range(rng.integers(0, hi - lo + 1)):  # no state at all: the guess was right
          wrong = rng.integers(0, MASK, hi - lo)
          wrong[:k] = tokens[b, lo : lo + k]
          wrong[k] = (tokens[b, lo + k] + 1) % MASK
          codes[b, lo:hi, 1 + k] = wrong
    start += n
  made = token_row(tokens, doc, role=role, capacity=2)
  return made.replace(docs=dataclasses.replace(made.docs, side={"codes": jnp.asarray(codes, jnp.int32)}))


def all_spans():
  starts = np.cumsum((0, *LENGTHS[:-1]))
  return [(s, start) for start, n, g in zip(starts, LENGTHS, GIVEN) for s in spans_of(g, n, start)]


def windows_of(name):
  """(first, end, document start) of the windows of the mask."""
  size = SPAN * (WINDOW if name == "jacobi_forcing" else 1)
  return [
    (start + lo, start + min(lo + size, n), start)
    for start, n, g in zip(np.cumsum((0, *LENGTHS[:-1])), LENGTHS, GIVEN)
    for lo in range(g, n, size)
  ]


NAMES = ("cllm", "jacobi_forcing")
HEAVY = [pytest.param(n, marks=pytest.mark.full if n == "cllm" else pytest.mark.slow) for n in NAMES]


def shown(noise, row):
  return np.asarray(jnp.where(noise.hit[:, 0], noise.value[:, 0], row.tokens))


@functools.cache
def drawing(name):
  return jax.jit(lambda row, step: objective(name).corruption.draw(row, KEY, step))


# -- states ---------------------------------------------------------------------------------------------


def test_every_unsettled_state_is_drawn_and_no_other():
  r = row()
  codes = np.asarray(r.docs.side["codes"])
  seen = {}
  for step in range(60):
    got = shown(drawing("cllm")(r, step), r)
    for b in range(2):
      for (lo, hi), _ in all_spans():
        seen.setdefault((b, lo, hi), set()).add(got[b, lo:hi].tobytes())
  for (b, lo, hi), states in seen.items():
    part = codes[b, lo:hi].astype(got.dtype)
    want = {s.tobytes() for s in part.T[1:] if (s != part[:, 0]).any()}
    assert states == (want or {part[:, 0].tobytes()})
  assert max(map(len, seen.values())) == SPAN


def test_wrong_shares_rise_along_a_window():
  r = row(B=8)
  codes, got = np.asarray(r.docs.side["codes"]), shown(drawing("jacobi_forcing")(r, 0), r)
  found = [[], []]
  for (lo, hi), start in all_spans():
    given = GIVEN[int(start > 0)]
    place = (lo - start - given) // SPAN % WINDOW
    for b in range(8):
      part = codes[b, lo:hi]
      states = [*part.T[1:], part[:, 0]]
      share = [float((s != part[:, 0]).mean()) for s in states]
      want = states[int(np.argmin(np.abs(np.asarray(share) - place / (WINDOW - 1))))]
      np.testing.assert_array_equal(got[b, lo:hi], want)
      found[place].append((got[b, lo:hi] != part[:, 0]).mean())
  assert np.mean(found[0]) == 0 and np.mean(found[1]) > 0.5  # control: not all alike


def test_likelihoods_draw_nothing_and_need_no_trajectories():
  r = row()
  bare = r.replace(docs=dataclasses.replace(r.docs, side={}))
  for name in NAMES:
    draw = objective(name).corruption.draw
    assert not draw(bare, KEY, 0, bound=(0, 1)).hit.any()
    with pytest.raises(ConfigError, match="genmodels collect"):
      draw(bare, KEY, 0)
  short = {"size": 2, "anchor": "response"}
  with pytest.raises(ConfigError, match="trajectories of 4 tokens"):
    JacobiState(span=2, blocks=Blocks(**short)).draw(r, KEY, 0)
  with pytest.raises(ValueError, match="nothing rises"):
    JacobiState(span=2, blocks=Blocks(**short), law="progressive")


@functools.cache
def viewed(name):
  """(row, noise) → inputs, and `Slots.where` int32[B, streams, N]."""
  obj = objective(name)
  return jax.jit(lambda row, noise: (obj.view(row, noise)[0], obj.slots(row, noise).where))


# -- what counts ----------------------------------------------------------------------------------------


def kept_of(name, noise, row):
  """{(row, predicted token): span}, token by token."""
  hit, doc = np.asarray(noise.hit[:, 0]), np.asarray(row.doc)
  out = {}
  for b in range(len(hit)):
    for i, ((lo, hi), _) in enumerate(all_spans()):
      wrong = [n for n in range(lo, hi) if hit[b, n]]
      for n in range(wrong[0], hi) if wrong else ():
        n += name == "jacobi_forcing"  # the slot counts, and predicts the token behind it
        if n < N and doc[b, n] == doc[b, lo]:
          out[b, n] = i
  return out


@functools.cache
def preparing(name):
  return jax.jit(lambda row: objective(name).prepare(row, KEY, 5))


@pytest.mark.parametrize("name", ["cllm", pytest.param("jacobi_forcing", marks=pytest.mark.full)])
def test_first_divergence_and_weights(name):
  r = row()
  noise = drawing(name)(r, 5)
  _, targets, denominators = preparing(name)(r)
  kept = kept_of(name, noise, r)
  per_span = {}
  for (b, _), i in kept.items():
    per_span[b, i] = per_span.get((b, i), 0) + 1
  want = np.zeros((2, N))
  for (b, n), i in kept.items():
    want[b, n] = 1 / per_span[b, i] if name == "cllm" else 1
  np.testing.assert_allclose(targets["consistency"].weight, want, rtol=1e-6)
  count = len(per_span) if name == "cllm" else len(kept)
  np.testing.assert_allclose(denominators["consistency"], count, rtol=1e-6)
  # The student reads the noisy slot before the token, CLLM's a span's first token from the clean stream; the
  # teacher always the clean one.
  noisy, clean = np.asarray(viewed(name)(r, noise)[1]).transpose(1, 0, 2)
  firsts = [lo for (lo, _), _ in all_spans()]
  for b in range(2):
    for n in range(N):
      own = clean if name == "cllm" and n in firsts else noisy
      asked = (b, n) in kept
      assert targets["consistency"].slot[b, n] == (own[b, n - 1] if asked else -1)
      assert targets[TAUGHT].slot[b, n] == (clean[b, n - 1] if asked else -1)
  # The clean stream is asked for every token of the answers, ten times.
  np.testing.assert_array_equal(targets["ar"].weight, np.asarray(r.role) == TEXT)
  assert float(objective(name).terms["ar"].scale(0)) == 10


# -- who sees whom --------------------------------------------------------------------------------------


@functools.cache
def hidden():
  model, params = trunk()
  return jax.jit(lambda inputs: model.apply(params, inputs, {}).layers["hidden"])


def activations(name):
  """(row, noise) → hidden states of all slots; one program of the trunk for everything."""
  return lambda row, noise: hidden()(viewed(name)(row, noise)[0])


def moved(name, a, b):
  """(noisy, clean) bool[N] each: tokens whose slots differ between two (row, noise), one row."""
  x, y = (np.asarray(activations(name)(*pair)[0]) for pair in (a, b))
  where = np.asarray(viewed(name)(*a)[1][0])
  differs = (x != y).any(-1)
  return tuple(np.where(w >= 0, differs[np.maximum(w, 0)], False) for w in where)


@pytest.mark.parametrize("name", HEAVY)
def test_windows_see_their_own_noise_and_clean_text_before(name):
  """T8, T9: another state moves what is behind it in its window; a clean token, the windows behind its own."""
  r = row(B=1)
  noise = drawing(name)(r, 5)
  noise = noise.replace(value=jnp.where(noise.hit, noise.value, r.tokens[:, None]), hit=noise.hit | True)
  noise = noise.replace(hit=noise.hit & (r.role == TEXT)[:, None])
  n = np.arange(N)
  for at in (4, 9, 14, 20, 29):
    lo, hi, start = next(w for w in windows_of(name) if w[0] <= at < w[1])
    ends = start + LENGTHS[int(start > 0)]
    state = noise.replace(value=noise.value.at[0, 0, at].set((noise.value[0, 0, at] + 1) % MASK))
    noisy, clean = moved(name, (r, noise), (r, state))
    np.testing.assert_array_equal(noisy, (at <= n) & (n < hi))
    assert not clean.any()
    token = r.replace(tokens=r.tokens.at[0, at].set((r.tokens[0, at] + 1) % MASK))
    noisy, clean = moved(name, (r, noise), (token, noise))
    np.testing.assert_array_equal(noisy, (hi <= n) & (n < ends))
    np.testing.assert_array_equal(clean, (at <= n) & (n < ends))


@pytest.mark.full
def test_seeded_masks_are_found():
  """Negative controls: a noisy slot that sees its window's clean text, a clean one that sees noise, and noise
  of earlier windows, which is no leak, so that only the perturbation finds it."""
  obj = objective("jacobi_forcing")
  right = {"n>n": "BLK_EQ&POS_LE", "n>c": "BLK_LT", "c>c": "POS_LE"}
  assert not laws.check(obj)
  with pytest.raises(ConfigError, match="clean identity"):
    laws.check(dataclasses.replace(obj, masks={"full": right | {"n>c": "BLK_LE"}}))
  with pytest.raises(ConfigError, match="clean identity"):
    laws.check(dataclasses.replace(obj, masks={"full": right | {"n>n": "BLK_EQ", "c>c": "BLK_LE"}}))
  with pytest.raises(ConfigError, match="clean slot sees a noisy one"):
    laws.check(dataclasses.replace(obj, masks={"full": right | {"c>n": "BLK_LT"}}))
  wide = dataclasses.replace(obj, masks={"full": right | {"n>n": "BLK_LE&POS_LE"}})
  assert not laws.check(wide)
  r = row(B=1)
  noise = drawing("jacobi_forcing")(r, 5)
  code = np.asarray(wide.relations["full"].mask(wide.slots(r, noise)).to_dense()[0])
  assert (code != np.asarray(obj.relations["full"].mask(obj.slots(r, noise)).to_dense()[0])).any()


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_clean_stream_is_a_causal_model(name):
  """T25: the text's own states, to the bit, are those of plain causal attention, whatever the noisy stream."""
  r = row()
  noise, other = drawing(name)(r, 5), drawing(name)(r, 6)
  where = np.asarray(viewed(name)(r, noise)[1][:, 1])
  clean = lambda hidden: np.take_along_axis(np.asarray(hidden), where[..., None], 1).view(np.uint32)
  got = clean(activations(name)(r, noise))
  np.testing.assert_array_equal(got, clean(activations(name)(r, other)))
  # The same slots and positions under a causal mask written down here; noisy slots show nothing to nobody.
  inputs = viewed(name)(r, noise)[0]
  S, n = inputs.ids.shape[1], np.arange(N)
  code, lo, hi = np.full((2, S), CODE_HIDDEN), np.zeros((2, 1, S), int), np.zeros((2, 1, S), int)
  begin = np.repeat(np.cumsum((0, *LENGTHS[:-1])), LENGTHS)
  for b in range(2):
    code[b, where[b]], lo[b, 0, where[b]], hi[b, 0, where[b]] = n, begin, n + 1
  causal = AttnMask(*(jnp.asarray(x, jnp.int32) for x in (code, lo, hi)))
  blank = inputs.replace(ids=jnp.zeros_like(inputs.ids).at[jnp.arange(2)[:, None], where, 0].set(r.tokens))
  np.testing.assert_array_equal(got, clean(hidden()(blank.replace(masks={"full": causal}))))
  shifted = AttnMask(causal.code, causal.lo, jnp.maximum(causal.hi - 1, causal.lo))
  assert (got != clean(hidden()(blank.replace(masks={"full": shifted})))).mean() > 0.5  # control
  # In a program of its own, without the noisy slots, to rounding.
  np.testing.assert_allclose(loss(objective(name), r, term="ar")[1], loss(ar(), r)[1], atol=1e-5)


# -- the loss -------------------------------------------------------------------------------------------


def separate(ids, upto: int, start: int):
  """float32[V], log-probabilities behind ids[start … upto] alone, by a plain causal forward."""
  ids = np.concatenate([ids[start : upto + 1], np.zeros(N - (upto + 1 - start), int)])
  n = jnp.arange(N, dtype=jnp.int32)
  causal = AttnMask(n[None], jnp.zeros((1, 1, N), jnp.int32), (n + 1)[None, None])
  out = logits(jnp.asarray(ids, jnp.int32)[None], causal, n.astype(jnp.float32)[None, :, None])
  return np.asarray(jax.nn.log_softmax(out[0, upto - start]))


@pytest.mark.parametrize("name", HEAVY)
def test_loss_of_two_streams_equals_separate_forwards(name):
  """Each kept token: prompt and text before the window, then the states up to the slot, in a row of its own."""
  r = row(B=1)
  noise = drawing(name)(r, 3)
  clean, state = np.asarray(r.tokens[0]), shown(noise, r)[0]
  kept = kept_of(name, noise, r)
  want = np.zeros(N)
  spread = []
  for (_, n), i in kept.items():
    start = all_spans()[i][1]
    lo = next(w[0] for w in windows_of(name) if w[0] <= n - (name == "jacobi_forcing") < w[1])
    mixed = np.where(np.arange(N) < lo, clean, state)
    p, q = separate(mixed, n - 1, start), separate(clean, n - 1, start)
    some = np.exp(q) > 0
    want[n] = -(np.exp(q) * np.where(some, p, 0)).sum()
    spread.append(want[n] + (np.exp(q) * np.where(some, q, 0)).sum())
  value, per_token = loss(objective(name), r, term="consistency")
  _, targets, denominators = jax.jit(lambda row: objective(name).prepare(row, KEY, 3))(r)
  weight = np.asarray(targets["consistency"].weight[0])
  np.testing.assert_allclose(per_token[0], weight * want, atol=2e-5)
  np.testing.assert_allclose(value, (weight * want).sum() / denominators["consistency"], rtol=1e-4)
  assert max(spread) > 0.05  # control: the states matter
  # CLLM's first wrong token is predicted from the same text by both.
  assert name != "cllm" or min(spread) < 1e-5


@functools.cache
def gradient(name):
  def value(params, row):
    sums, den, aux = objective(name).run(nets(params), row, KEY, 3)
    return sums["consistency"] / jnp.maximum(den["consistency"], 1e-6), aux["ratios"]

  return jax.jit(jax.value_and_grad(value, has_aux=True))


def norm(tree):
  return float(sum(jnp.sum(x**2) for x in jax.tree.leaves(tree)) ** 0.5)


@pytest.mark.full
def test_fixed_points_teach_nothing():
  """Settled spans ask nothing; a span whose last token alone is wrong asks what the teacher already says."""
  r, (_, params) = row(B=1), trunk()
  codes = np.asarray(r.docs.side["codes"])
  same = np.repeat(codes[..., :1], 1 + SPAN, -1)
  of = lambda codes: r.replace(docs=dataclasses.replace(r.docs, side={"codes": jnp.asarray(codes)}))
  (value, ratios), g = gradient("cllm")(params, of(same))
  assert value == 0 and ratios["kl/consistency"][1] == 0 and norm(g) == 0
  for at, least, most in ((3, 0, 1e-4), (0, 1e-2, np.inf)):
    one = same.copy()
    for (lo, hi), _ in all_spans():
      if hi - lo == SPAN:
        one[0, lo + at, 1] = (one[0, lo + at, 1] + 1) % MASK
    (value, ratios), g = gradient("cllm")(params, of(one))
    kl, count = map(float, ratios["kl/consistency"])
    assert count > 0 and value > 0.1 and least <= norm(g) <= most and least * 1e-2 <= kl / count <= most


@pytest.mark.full
def test_the_teacher_gets_no_gradient():
  """The gradient is that of the cross-entropy against distributions that were written down before."""
  r, (_, params) = row(), trunk()
  _, g = gradient("cllm")(params, r)
  inputs, targets, den = jax.jit(lambda row: objective("cllm").prepare(row, KEY, 3))(r)
  # Where nothing is asked a Dist gives zeros: every probability is 1 there, times weight 0.
  probs = lambda dist: dist.map(lambda z: jax.nn.softmax(z, -1))
  taught = jax.jit(lambda p: probs(nets(p)["model"](inputs, targets).dists[TAUGHT]))(params)

  def value(params, through):
    out = nets(params)["model"](inputs, targets)
    q = probs(out.dists[TAUGHT]) if through else taught
    logp = out.dists["consistency"].map(lambda z: jnp.maximum(jax.nn.log_softmax(z, -1), -1e30))
    return -(targets["consistency"].weight[..., None] * q * logp).sum() / den["consistency"]

  want = jax.jit(jax.grad(lambda p: value(p, False)))(params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), g, want)
  open_ = jax.jit(jax.grad(lambda p: value(p, True)))(params)  # control: an open teacher has another one
  assert norm(jax.tree.map(lambda a, b: a - b, open_, want)) > 1e-2


@pytest.mark.full
def test_temperature_and_refusals():
  r = row(B=1)
  hot = dataclasses.replace(objective("jacobi_forcing"), temperature=1e3)
  cold, _ = loss(objective("jacobi_forcing"), r, term="consistency")
  # T → ∞: T² · the entropy of the uniform law over all classes but the mask.
  value, _ = loss(hot, r, term="consistency")
  assert value / 1e6 == pytest.approx(np.log(MASK), rel=1e-5) and abs(cold - value / 1e6) > 0.01
  # Labels: a share ε is spread over all classes, in training alone.
  smooth, (model, params) = dataclasses.replace(objective("cllm"), smoothing=0.1), trunk()
  inputs, targets, _ = jax.jit(lambda row: smooth.prepare(row, KEY, 3))(r)
  out = jax.jit(model.apply)(params, inputs, targets)
  logp = np.asarray(jax.nn.log_softmax(out.dists["ar"].map(lambda z: z)[..., :MASK], -1))
  label = np.take_along_axis(logp, np.asarray(targets["ar"].value)[..., None], -1)[..., 0]
  weight = np.asarray(targets["ar"].weight)
  want = weight * (-0.9 * label - 0.1 * logp.mean(-1))
  np.testing.assert_allclose(smooth.loss(out, targets)[1]["per_token"]["ar"], want, atol=1e-5)
  alone = {"ar": targets["ar"]}
  np.testing.assert_allclose(smooth.loss(out, alone)[1]["per_token"]["ar"], -weight * label, atol=1e-5)
  section = config.plain(config.load("language/cllm:tiny").objective)
  for wrong, words in (
    ({"since": "slot"}, "align='shift'"),
    ({"consistency": "soft"}, "the terms are"),
    ({"temperature": 0.0}, "positive"),
    ({"smoothing": 1.0}, "share below 1"),
    ({"corruption": {"kind": "absorb"}}, "jacobi_state"),
  ):
    with pytest.raises(ConfigError, match=words):
      objectives.build(section | wrong, {"mask_id": MASK})
