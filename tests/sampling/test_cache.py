"""Cached decoding is the training forward, for unequal prompts (language.md T16, T17, T25)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import models, sampling
from genmodels.config import ConfigError
from genmodels.contracts import Target
from genmodels.masks import STREAM
from genmodels.models import write_cache
from tests.sampling import systems as S

NB = ("context_causal", "shift_clean_boundary")
SYSTEMS = {
  "ar": (S.ar, {}, "causal_exact"),
  "bd3": (S.bd, {"quota": {"kind": "threshold", "tau": 0.4}}, "block_exact"),
  "nbdiff": (lambda: S.bd(4, *NB), {"quota": {"kind": "linear", "steps": 2}}, "causal_exact"),
  "bd3_shifted": (lambda: S.bd(4, "bd3", NB[1]), {"quota": "first_hitting"}, "block_exact"),
  "bd3_response": (lambda: S.bd(4, anchor="response"), {"quota": "all"}, "block_exact"),
  "one_stream": (S.single_stream, {"quota": {"kind": "linear", "steps": 3}}, "block_exact"),
  "sub_blocks": (lambda: S.bd(6), {"quota": {"kind": "cosine", "steps": 2}, "sub_block": 3}, "block_exact"),
}
SYSTEMS["prefix_dlm"] = (
  lambda: dataclasses.replace(
    S.single_stream(), corruption={"kind": "absorb", "blocks": {"anchor": "prompt"}}
  ),
  {"quota": {"kind": "threshold", "tau": 0.4}},
  "block_exact",
)
FAST = ("ar", "bd3", "nbdiff")


def follow(sampler, row, steps, noise=None):
  """Scans the loop; at each step the sampler's logits beside those of one training forward over the row.

  Args:
    noise: (row, committed, Ask) → Noise of the whole row; default: the corruption's state.

  Returns:
    logits, reference float32[T, B, M, V], can bool[T, B, M], at int32[T, B, M]; the last state.
  """
  params, key = S.params(), jax.random.key(5)
  objective = sampler.objective
  term = objective.terms[sampler.term]

  def whole(s, a):
    """Every slot of every stream at once, as in training: no `only`, no cache."""
    filled = row.replace(tokens=s.tokens)
    of = noise or (lambda row, committed, a: objective.corruption.state(row, committed))
    inputs, read = objective.view(filled, of(filled, s.committed, a))
    slot = jnp.take_along_axis(read[sampler.term], jnp.clip(a.at, 0, S.N - 1), 1)
    target = Target(term.head, jnp.where(a.can, slot, -1), a.at, a.can.astype(jnp.float32))
    return sampler.model.apply(params, inputs, {"t": target}).dists["t"].map(sampler.choice.logits)

  def body(s, _):
    logits, a = sampler.logits(params, row, s)
    return sampler.step(params, row, s, key), (logits, whole(s, a), a.can, a.at)

  prefill = sampler.prefill_width(row)

  def run():
    s = sampler.start(params, row, prefill)
    return jax.lax.scan(body, s, length=steps)

  state, out = jax.jit(run)()
  return *map(np.asarray, out), state


@functools.cache
def followed(name):
  """`follow` of a system of the table: (sampler, logits, reference, can, at, last state)."""
  make, section, _ = SYSTEMS[name]
  sampler = S.sampler(make(), **section)
  return sampler, *follow(sampler, S.row(), 18)


def assert_same(logits, reference, can, tolerance=1e-5):
  use = np.broadcast_to(can[..., None], logits.shape) & np.isfinite(reference)
  np.testing.assert_array_equal(
    np.isfinite(logits) | ~can[..., None], np.isfinite(reference) | ~can[..., None]
  )
  scale = max(1.0, np.abs(reference[use]).max())
  np.testing.assert_allclose(logits[use], reference[use], rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize(
  "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in SYSTEMS]
)
def test_cached_logits_are_the_training_logits(name):
  sampler, logits, reference, can, at, state = followed(name)
  assert sampler.policy.name == SYSTEMS[name][2] and sampler.policy.exact
  assert np.asarray(state.done).all(), "the generation did not finish"
  # Every open token was committed by exactly one of the compared predictions, or was compared while open.
  seen = {(b, n) for t, b, m in zip(*np.nonzero(can)) for n in [at[t, b, m]]}
  assert seen == {(b, n) for b, n in zip(*np.nonzero(np.asarray(S.row().role) == 1))}
  assert_same(logits, reference, can)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bd3", "nbdiff"])
def test_no_cache_gives_the_same_tokens(name):
  make, section, _ = SYSTEMS[name]
  row, key = S.row(), jax.random.key(2)
  cached = S.sampler(make(), **section)(S.params(), row, key)
  plain = S.sampler(make(), cache="none", **section)(S.params(), row, key)
  np.testing.assert_array_equal(cached.tokens, plain.tokens)
  np.testing.assert_array_equal(cached.committed_at, plain.committed_at)


@dataclasses.dataclass(frozen=True)
class _Relabelled:
  """A model whose noisy slots enter the cache under the codes of clean ones."""

  inner: object
  shift: int

  def __getattr__(self, name):
    return getattr(self.inner, name)

  def apply(self, *args, **kw):
    out = self.inner.apply(*args, **kw)
    if out.new is None:
      return out
    code = {p: jnp.where(c < STREAM, c + self.shift, c) for p, c in out.new["code"].items()}
    return out.replace(new={**out.new, "code": code})


class _AppendsNoise(sampling.Sampler):
  """Keeps each block's keys and values from the first noisy pass over it, as prefix caches do."""

  def ask(self, row, s):
    a = super().ask(row, s)
    return a.replace(keep=(a.only[..., 1] >= 0) & (a.denoise & a.fresh)[:, None])


def test_a_wrong_cache_is_detected():
  """Negative control of the comparison above."""
  right = S.sampler(S.bd(), quota={"kind": "threshold", "tau": 0.4})
  fields = {f.name: getattr(right, f.name) for f in dataclasses.fields(right)}
  wrong = _AppendsNoise(**{**fields, "model": _Relabelled(right.model, STREAM)})  # "n" is stream 0, "c" is 1
  logits, reference, can, _, _ = follow(wrong, S.row((1, 3, 6, 9)), 14)
  assert np.isfinite(logits[can][:, : S.V]).all()
  assert np.abs(logits[..., : S.V] - reference[..., : S.V])[can].max() > 1e-2


def test_block_start_logits_are_the_clean_ones():
  """T16: the token that opens a block is committed by the pass that writes the block before it."""
  _, logits, reference, can, at, _ = followed("nbdiff")
  opens = can & (at % 4 == 0) & (at > 0)
  assert opens.sum() > 6
  # It is asked alone, at the last place, and not while its own block is being denoised.
  assert opens[..., -1].sum() == opens.sum()
  assert_same(logits, reference, opens)


def test_conversion_cache_is_the_ar_cache():
  """T25: what NBDiff's write passes leave in the cache is a plain causal prefill of the model it was
  converted from, entry by entry, under the clean stream's codes."""
  sampler, *_, state = followed("nbdiff")
  cache, ar, row = state.caches[0], S.ar(), S.row()

  @jax.jit
  def prefill(tokens):
    filled = row.replace(tokens=tokens)
    inputs, _ = ar.view(filled, ar.corruption.state(filled, tokens >= 0))
    empty = models.init_cache(sampler.model.cfg, 4, S.N)
    new = sampler.model.apply(S.params(), inputs, {}, cache=empty).new
    return write_cache(empty, new, jnp.ones(tokens.shape, bool))

  plain = prefill(state.tokens)
  n = np.asarray(cache.length)
  assert n.min() >= 8
  for a, b in zip(jax.tree.leaves(cache.layers), jax.tree.leaves(plain.layers)):
    for i in range(4):
      np.testing.assert_allclose(np.asarray(a)[:, i, : n[i]], np.asarray(b)[:, i, : n[i]], rtol=0, atol=2e-5)
  for i in range(4):  # the clean stream of two is stream 1, of one it is stream 0
    np.testing.assert_array_equal(cache.code["full"][i, : n[i]] - STREAM, plain.code["full"][i, : n[i]])


@pytest.mark.slow
def test_block_size_one_is_the_ar_decoder():
  row, key = S.row(), jax.random.key(4)
  blocks = S.sampler(S.bd(1, *NB), temperature=0.7)(S.params(), row, key)
  plain = S.sampler(S.ar(), temperature=0.7, forbid=(S.MASK,))(S.params(), row, key)
  np.testing.assert_array_equal(blocks.tokens, plain.tokens)


@pytest.mark.parametrize(
  "objective, cache, fix",
  [
    (S.mdm(), "block_exact", "none"),
    (S.mdm(), "causal_exact", "none"),
    (S.bd(), "causal_exact", "block_exact"),
    (S.bd(), "prefixes", "auto"),
    (S.ar(), "prefix", "auto"),
  ],
)
def test_wrong_pairings_are_refused(objective, cache, fix):
  with pytest.raises(ConfigError, match="sampler.cache") as e:
    S.sampler(objective, cache=cache)
  assert fix in e.value.fix


def test_undecodable_objectives_are_refused():
  leaky = dataclasses.replace(S.bd(), masks={"full": {"n>n": "BLK_EQ", "n>c": "BLK_LE", "c>c": "BLK_LE"}})
  with pytest.raises(ConfigError, match="beyond its block"):
    S.sampler(leaky)
  with pytest.raises(ConfigError, match="shift_clean_boundary"):
    S.sampler(S.bd(4, "bd3", "shift"))
  with pytest.raises(ConfigError, match="left-to-right"):
    S.sampler(dataclasses.replace(S.ar(), masks={"full": "full"}))
  with pytest.raises(ValueError, match="BOS"):
    S.sampler(S.ar())(S.params(), S.row((1, 0, 2, 3)), jax.random.key(0))


def test_prompts_longer_than_the_cache_are_refused():
  with pytest.raises(ValueError, match=r"prompt 1 has 14 tokens, a row has 14; raise the length"):
    sampling.prompt_row([[1], [2] * S.N], S.N, 4)
  with pytest.raises(ValueError, match=r"prefill is 4, .* up to 8 tokens"):
    S.sampler(S.bd())(S.params(), S.row(), jax.random.key(0), prefill=4)
