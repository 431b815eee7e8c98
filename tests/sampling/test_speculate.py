"""Speculative decoding against plain decoding: ids (language.md T19), laws (T20), caches (T17), stopping
(T23)."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from genmodels import models, sampling
from genmodels.config import ConfigError
from genmodels.contracts import CONTEXT, Target, token_row
from genmodels.objectives import Objective
from genmodels.parallel import mesh as meshes
from genmodels.parallel import rules
from genmodels.sampling import drafters, speculate, verify
from genmodels.sampling.drafter import Draft, Drafter
from tests.sampling import systems as S

KEY = jax.random.key(3)


@dataclasses.dataclass(frozen=True)
class Given(Drafter):
  """Drafts that the caller wrote down: own int32[N, B, …] by the row's length, shape [K] or [R, K] behind."""

  size: int = 3
  chains: int = 1

  def draft(self, params, own, context, state):
    return Draft(own[context.length, jnp.arange(len(context.length))]), state


def tidar(block=4, mask=S.MASK) -> Objective:
  return Objective(
    corruption={"kind": "absorb", "unit": "block", "blocks": {"size": block}, "band": (1.0, 1.0)},
    layout={"kind": "streams", "streams": ("n", "c")},
    masks={"full": "context_causal"},
    likelihood="ar",
    terms={
      "ar": {"stream": "c", "align": "shift"},
      "diffusion": {"stream": "n", "on": "hit", "normaliser": "masked"},
    },
    mask_id=mask,
  )


@functools.cache
def plain(objective="ar", **section):
  """A target and what it generates alone."""
  sampler = S.sampler({"ar": S.ar, "tidar": tidar}[objective](), **section)
  return sampler, jax.tree.map(np.asarray, sampler(S.params(), S.row(), KEY))


def assert_same(result, want):
  np.testing.assert_array_equal(result.tokens, want.tokens)
  np.testing.assert_array_equal(result.lengths, want.lengths)
  assert bool(result.done.all())
  generated = np.asarray(result.committed_at >= 0).sum(1)
  accepted, calls = np.asarray(result.memory["accepted"]), np.asarray(result.calls["verify"])
  # Every forward commits one token of the target's, but the last one may end with a draft at the row's end.
  assert ((generated - accepted <= calls) & (calls <= generated)).all()


# -- ids ------------------------------------------------------------------------------------------------


@functools.cache
def given(temperature):
  target, want = plain(temperature=temperature)
  return speculate.build(target, Given(3)), want


def tables(want, kind):
  """Drafts int32[N, B, K] for every length that a row can have."""
  N, K = S.N, 3
  at = np.minimum(np.arange(N)[:, None] + np.arange(K), N - 1)  # [N, K]
  right = np.moveaxis(want.tokens[:, at], 0, 1)
  rng = np.random.default_rng(1)
  return {
    "random": rng.integers(0, S.V, right.shape),
    "right": right,
    "wrong": (right + 1) % S.V,
    "half": np.where(rng.uniform(size=right.shape) < 0.5, right, 0),
    "mask": np.full_like(right, S.MASK),
    "no ids": np.where(rng.uniform(size=right.shape) < 0.5, right, -7 + 10**6 * (right % 2)),
  }[kind].astype(np.int32)


@pytest.mark.parametrize("temperature", [0.0, pytest.param(1.0, marks=pytest.mark.full)])
def test_any_drafts_give_the_targets_ids(temperature):
  """T19, at any temperature: drafts that are no draws change no id, whatever they are."""
  sampler, want = given(temperature)
  steps = {}
  for kind in ("random", "right", "wrong", "half", "mask", "no ids"):
    result = dataclasses.replace(sampler, own=jnp.asarray(tables(want, kind)))
    object.__setattr__(result, "_jitted", sampler._jitted)  # one compilation for all of them
    result = result(S.params(), S.row(), KEY)
    assert_same(result, want)
    steps[kind] = int(result.steps)
  most = S.N - 1  # the shortest prompt has one token
  assert steps["wrong"] == most
  assert steps["right"] == -(-most // 4) and steps["right"] < steps["half"] < most


@pytest.mark.slow
def test_rows_end_at_eos():
  """T23: a row stops at its first EOS, be it a draft or the token behind; nothing after it is kept."""
  _, want = plain(temperature=1.0)
  made = np.where(np.asarray(S.row().role) == CONTEXT, -1, want.tokens)
  eos = max(range(S.V), key=lambda v: sum((made[b] == v).any() for b in range(4)) - 0.01 * (made == v).sum())
  target, short = plain(temperature=1.0, eos=eos)
  sampler = speculate.build(target, Given(3), own=jnp.asarray(tables(want, "right")))
  result = sampler(S.params(), S.row(), KEY)
  np.testing.assert_array_equal(result.lengths, short.lengths)
  assert (np.asarray(short.lengths) < S.N).any()
  for b, n in enumerate(np.asarray(short.lengths)):
    np.testing.assert_array_equal(result.tokens[b, :n], short.tokens[b, :n])
    assert (np.asarray(result.committed_at)[b, n:] == -1).all()


@pytest.mark.full
def test_a_row_knows_no_batch():
  """Other rows, their order and the devices change nothing."""
  lengths = (1, 3, 6, 9, 2, 5, 7, 8)
  target, row = S.sampler(S.ar(), temperature=1.0), S.row(lengths)
  sampler = speculate.build(target, drafters.Jacobi(4))
  whole = np.asarray(sampler(S.params(), row, KEY, prefill=8).tokens)
  order = np.random.default_rng(0).permutation(8)
  shuffled = jax.tree.map(lambda x: x[order], row)
  np.testing.assert_array_equal(
    np.asarray(sampler(S.params(), shuffled, KEY, prefill=8).tokens), whole[order]
  )
  mesh = meshes.make_mesh(meshes.MeshConfig(data=4, fsdp=2), jax.devices()[:8])
  with rules.use_mesh(mesh):
    np.testing.assert_array_equal(np.asarray(sampler(S.params(), row, KEY, prefill=8).tokens), whole)


def both_caches(objective, drafter, own=None):
  """What a drafter gives with the cache and without (T17 through the sampler's own view), greedily (T19)."""
  results = []
  for cache in ("auto", "none"):
    target, want = plain(objective, temperature=0.0)
    target = dataclasses.replace(target, policy=sampling.POLICIES["none"]) if cache == "none" else target
    results.append(speculate.build(target, drafter, own=own)(S.params(), S.row(), KEY))
    assert_same(results[-1], want)
  np.testing.assert_array_equal(results[0].committed_at, results[1].committed_at)
  np.testing.assert_array_equal(results[0].memory["accepted"], results[1].memory["accepted"])
  return results[0]


@pytest.mark.full
def test_chains_are_cached_as_the_clean_stream():
  """Kept slots of the second chain are what a prefill computes; being right, it is always followed."""
  _, want = plain(temperature=0.0)
  own = np.stack([tables(want, "half"), tables(want, "right")], 2)
  assert int(both_caches("ar", Given(3, 2), jnp.asarray(own)).steps) == -(-(S.N - 1) // 4)


@pytest.mark.full
def test_tidar_keeps_the_targets_ids():
  result = both_caches("tidar", drafters.TiDAR())
  # One forward a step: what was drafted came out of the verifying forwards themselves.
  assert int(result.forwards) == int(result.steps) + 1 and (np.asarray(result.memory["drafted"]) > 0).all()


@pytest.mark.full
@pytest.mark.parametrize("drafter", [drafters.NGram(3), drafters.Jacobi(13, guess=0)])
def test_drafters_keep_the_targets_ids(drafter):
  target, want = plain(temperature=0.0)
  result = speculate.build(target, drafter)(S.params(), S.row(), KEY)
  assert_same(result, want)
  # CLLM's bound: each iteration fixes a token, so n tokens take at most n forwards from any first guess.
  assert (np.asarray(result.calls["verify"]) <= S.N - np.array([1, 3, 6, 9])).all()


def test_ngrams_continue_the_longest_match():
  """What followed the longest, then the latest, earlier occurrence; only tokens that are there."""
  text = [[1, 2, 3, 4, 9, 3, 4, 5, 1, 2, 3, 4], [5, 6, 7, 8], [7, 7, 7], [4, 1, 4, 2, 4]]
  row = sampling.prompt_row(text, 16, 16)
  n = jnp.array([len(t) for t in text])
  context = drafter_context(row, n)
  drafted, _ = drafters.NGram(4, longest=3).draft(None, None, context, ())
  got = [np.asarray(t)[:c].tolist() for t, c in zip(drafted.tokens, drafted.count)]
  assert got == [[9, 3, 4, 5], [], [7], [2, 4]]


def drafter_context(row, n):
  zero = jnp.zeros((len(n),), jnp.uint32)
  return speculate.Context(row, n, n < 0, n < 0, jnp.zeros((len(n), 1)), (zero, zero), None)


@pytest.mark.full
@pytest.mark.parametrize("chains", [1, 3])
def test_a_smaller_model_drafts(chains):
  """Its own cache is right: drafting with the target itself, every draft is accepted; greedy ids stay."""
  target, want = plain(temperature=0.0)
  small = drafters.Small(3, chains=chains, temperature=0.0 if chains == 1 else 0.3, target=target)
  sampler = speculate.build(target, small, own=S.params())
  result = sampler(S.params(), S.row(), KEY)
  assert_same(result, want)
  if chains == 1:
    np.testing.assert_array_equal(result.memory["accepted"], result.memory["drafted"])
    assert int(result.steps) == -(-(S.N - 1) // 4)
  worse = dataclasses.replace(sampler, own=jax.tree.map(lambda x: x * 0.8, S.params()))
  object.__setattr__(worse, "_jitted", sampler._jitted)
  result = worse(S.params(), S.row(), KEY)
  assert_same(result, want)
  assert np.asarray(result.memory["accepted"] < result.memory["drafted"]).any()


@pytest.mark.slow
def test_the_chosen_group_is_the_committed_prefix():
  """TiDAR's next drafts, from the group behind the accepted ones, are those of the training view over the
  committed prefix with a block that begins at its end (F3)."""
  target, want = plain("tidar", temperature=0.0)

  @dataclasses.dataclass(frozen=True)
  class Half(drafters.TiDAR):
    """Shows its own drafts' states, and proposes something that is partly accepted."""

    def start(self, params, own, row, length):
      return super().start(params, own, row, length), jnp.zeros((4, self.ahead, 32))

    def draft(self, params, own, context, state):
      return Draft(own[context.length, jnp.arange(4)]), state

    def observe(self, params, own, seen, state):
      return super().observe(params, own, seen, state[0]), seen.ahead

  own = jnp.asarray(tables(want, "half"))
  sampler = speculate.build(target, Half(), own=own)
  both, row = (S.params(), own), S.row()

  @jax.jit
  def after(steps):
    s = sampler.begin(both, row, 16)
    return jax.lax.fori_loop(0, steps, lambda _, s: sampler.advance(both, row, s, KEY), s)

  objective = tidar()
  blocks = dataclasses.replace(objective.corruption.blocks, anchor="response")
  objective = dataclasses.replace(
    objective, corruption=dataclasses.replace(objective.corruption, blocks=blocks)
  )

  @jax.jit
  def reference(tokens, origin):
    """States of the masks of the block at `origin` in a training row that is given up to there."""
    at = jnp.arange(S.N)[None]
    given = row.replace(tokens=tokens, role=(at >= origin[:, None]).astype(jnp.int32))
    inputs, read = objective.view(given, objective.corruption.state(given, at < origin[:, None]))
    hidden = S.model().apply(S.params(), inputs, {}).layers["hidden"]
    slot = jnp.take_along_axis(read["diffusion"], jnp.minimum(origin[:, None] + np.arange(4), S.N - 1), 1)
    return jnp.take_along_axis(hidden, slot[..., None], 1)

  compared = set()
  for steps in (1, 2, 3):
    s = after(steps)
    drafted, ahead = s.draft
    want_states = np.asarray(reference(s.tokens, s.length - 1))
    for b in range(4):
      n = int(s.length[b])
      there = min(4, S.N - (n - 1))
      if bool(s.done[b]):
        continue
      np.testing.assert_allclose(np.asarray(ahead)[b, :there], want_states[b, :there], rtol=0, atol=1e-4)
      compared.add(int(s.accepted[b]))
  assert len(compared) > 2  # behind several numbers of accepted drafts


def test_what_cannot_be_verified_is_refused():
  with pytest.raises(ConfigError, match="sampler.term"):
    S.sampler(S.bd(), draft="ngram")
  with pytest.raises(ConfigError, match="any-subset"):
    S.sampler(S.ar(), draft="marginals")
  with pytest.raises(ConfigError, match="noisy stream"):
    S.sampler(S.ar(), draft="tidar")
  with pytest.raises(ConfigError, match="path"):
    S.sampler(S.ar(), draft="model")
  with pytest.raises(ConfigError, match="guidance"):
    S.sampler(S.ar(), draft="ngram", guidance=2.0)
  with pytest.raises(ConfigError, match="sampler.stop"):
    S.sampler(S.ar(), draft="ngram", stop="gap")
  with pytest.raises(ConfigError, match="kind"):
    S.sampler(S.ar(), draft="oracle")
  with pytest.raises(
    ConfigError, match="no draws"
  ):  # Jacobi's guesses are the target's draws at these places
    S.sampler(S.ar(), draft="jacobi", verify="rejection")
  assert type(S.sampler(S.ar(), draft="plain")) is sampling.Sampler
  made = S.sampler(tidar(), draft={"kind": "tidar", "sample": True}, verify="rejection")
  assert made.drafter.size == 3 and made.drafter.stream == "n" and made.rule == verify.Rejection()
  gap = S.row((4, 4))
  gap = gap.replace(role=gap.role.at[0, 6].set(CONTEXT))
  with pytest.raises(ValueError, match="behind open ones"):
    S.sampler(S.ar(), draft="ngram")(S.params(), gap, KEY)
  with pytest.raises(ValueError, match="prefill"):
    S.sampler(S.ar(), draft="ngram")(S.params(), S.row(), KEY, prefill=2)


# -- laws -----------------------------------------------------------------------------------------------

V, LENGTH = 3, 4


@functools.cache
def toy():
  """A model of three ids and a mask, and one that drafts badly for it."""
  model = models.build(
    {
      "width": 8, "layers": 1, "num_heads": 2, "num_kv_heads": 1, "mlp": 8, "vocab": V + 1, "init_std": 0.9,
      "heads": {"text": {"forbid": (V,)}},
    }
  )  # fmt: skip
  init = jax.jit(model.init)
  return model, init(jax.random.key(1)), init(jax.random.key(5))


@functools.cache
def law(temperature=1.0):
  """p float64[V^(LENGTH−1)] of the rows that begin with token 0."""
  model, params, _ = toy()
  text = np.array([(0, *x) for x in itertools.product(range(V), repeat=LENGTH - 1)])
  row, objective = token_row(text), S.ar()
  inputs, read = objective.view(row, objective.corruption.state(row, row.doc >= 0))
  target = Target("text", read["text"], row.tokens, (read["text"] >= 0).astype(jnp.float32))
  logits = model.apply(params, inputs, {"t": target}).dists["t"].map(lambda z: z[:, :V])
  logp = np.asarray(jax.nn.log_softmax(logits[:, 1:] / temperature, -1), np.float64)
  return np.exp(np.take_along_axis(logp, text[:, 1:, None], 2).sum((1, 2)))


def chi_square(kind, drafter, rule="auto", rows=1 << 13, temperature=1.0, own=None):
  """p-value of what a drafter's samples say about the target's law, and the Result."""
  model, params, _ = toy()
  objective = {"ar": S.ar, "tidar": lambda: tidar(3, V)}[kind]()
  target = sampling.build({"eos": -2, "temperature": temperature, "forbid": (V,)}, objective, model)
  if isinstance(drafter, drafters.Small):
    drafter, own = dataclasses.replace(drafter, target=target), toy()[2]
  return judged(speculate.build(target, drafter, rule, own=own), params, rows, temperature)


def judged(sampler, params, rows, temperature=1.0):
  """p-value of what `rows` samples of a toy's sampler say about its law, and the Result."""
  result = sampler(params, sampling.prompt_row([[0]] * rows, LENGTH, LENGTH), KEY)
  index = np.asarray(result.tokens)[:, 1:] @ V ** np.arange(LENGTH - 1)[::-1]
  expected = law(temperature) / law(temperature).sum() * rows
  seen = np.bincount(index, minlength=len(expected))
  few = expected < 8  # joined into one cell
  group = lambda x: np.append(x[~few], x[few].sum() + 1e-9)
  return stats.chisquare(group(seen), group(expected), sum_check=False).pvalue, result


@dataclasses.dataclass(frozen=True)
class Inverted(verify.Rejection):
  """Broken: accepts with min(1, q/p)."""

  def __call__(self, choice, logits, candidates, q, k0, k1):
    found = super().__call__(choice, logits, candidates, q, k0, k1)
    p, q = choice.law(logits), jax.nn.softmax(q, -1)
    wrong = verify.accept_probability(q, p, candidates)
    return found.replace(accept=jnp.broadcast_to(wrong[:, None], found.accept.shape))


@dataclasses.dataclass(frozen=True)
class NoResidual(verify.Rejection):
  """Broken: draws from the target again after a rejection."""

  def __call__(self, *args):
    found = super().__call__(*args)
    return found.replace(token=jnp.broadcast_to(found.token[:, :1], found.token.shape))


@pytest.mark.slow
def test_rejection_keeps_the_law():
  """T20, through the loop and the drafter's cache."""
  p, result = chi_square("ar", drafters.Small(2))
  rate = float(result.memory["accepted"].sum() / result.memory["drafted"].sum())
  assert p > 1e-3 and 0.2 < rate < 0.9
  assert float(result.tokens_per_forward.mean()) > 1.2


@pytest.mark.full
@pytest.mark.parametrize("rule", [Inverted(), NoResidual(), verify.Typical(epsilon=0.1)])
def test_broken_rules_are_noticed(rule):
  """Negative controls of T20; typical acceptance says itself that it is not exact."""
  assert chi_square("ar", drafters.Small(2), rule)[0] < 1e-6


@pytest.mark.full
@pytest.mark.parametrize(
  "kind, drafter, rule, temperature",
  [
    ("ar", drafters.Small(2), "rejection", 0.7),
    ("ar", drafters.Small(2, chains=2), "auto", 1.0),
    ("ar", drafters.Small(2, chains=4), "auto", 1.0),
    ("ar", drafters.Small(2, temperature=0.5), "match", 1.0),
    ("ar", drafters.Jacobi(3), "match", 1.0),
    ("tidar", drafters.TiDAR(sample=True), "auto", 1.0),
  ],
)
def test_laws_with_many_draws(kind, drafter, rule, temperature):
  p, _ = chi_square(kind, drafter, rule, 1 << 16, temperature)
  assert p > 1e-3


@pytest.mark.full
def test_more_chains_accept_more():
  # A flat draft: where the draft knows what it knows, a second one of the same law adds little.
  flat = lambda k: drafters.Small(1, chains=k, temperature=3.0)
  rates = [chi_square("ar", flat(k))[1].memory["accepted"].mean() for k in (1, 2, 4)]
  assert rates[0] + 0.1 < rates[1] and rates[1] + 0.1 < rates[2]
