"""Any-subset speculative decoding (language.md T21) and a diffusion model's drafts (§4.9)."""

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
from genmodels.contracts import CONTEXT, TEXT, Target, token_row
from genmodels.objectives import Objective
from genmodels.sampling import diffuspec, joint, speculate, verify
from tests.sampling import systems as S

V, N, GIVEN = 3, 5, (0, 3)  # tokens 0 and 3 are given, 1, 2 and 4 are asked for
OPEN = tuple(i for i in range(N) if i not in GIVEN)
KEY = jax.random.key(0)


@functools.cache
def any_subset():
  objective = Objective(
    corruption={"kind": "subset"},
    layout={"kind": "streams", "streams": ("n", "c")},
    masks={"full": "any_subset"},
    terms={"subset": {"stream": "n", "on": "hit", "normaliser": "masked"}},
    mask_id=V,
  )
  model = models.build(
    {
      "width": 8, "layers": 1, "num_heads": 2, "num_kv_heads": 1, "mlp": 8, "vocab": V + 1, "init_std": 2.5,
      "heads": {"text": {"forbid": (V,)}},
    }
  )  # fmt: skip
  return objective, model, jax.jit(model.init)(jax.random.key(1))


def prompts(B):
  """Rows of unequal prompts: every second one has one more given token."""
  row = sampling.prompt_row([[1]] * B, N, N)
  role = np.full((B, N), TEXT)
  role[:, GIVEN] = CONTEXT
  role[1::2, 1] = CONTEXT
  tokens = np.zeros((B, N), int)
  tokens[:, 0], tokens[:, 3] = 1, 2
  return row.replace(role=jnp.asarray(role), tokens=jnp.asarray(tokens))


@functools.cache
def sequential(first=None):
  """p float64 of all 27 completions in rank order; `first`: given token 1 as well."""
  objective, model, params = any_subset()
  text = np.zeros((27, N), int)
  text[:, 0], text[:, 3] = 1, 2
  text[:, OPEN] = list(itertools.product(range(V), repeat=3))
  row = token_row(text, role=jnp.asarray([[CONTEXT if i in GIVEN else TEXT for i in range(N)]] * 27))
  inputs, read = objective.view(row, objective.corruption.state(row, row.role == CONTEXT))
  target = Target("text", read["subset"], row.tokens, (row.role == TEXT).astype(jnp.float32))
  nll = np.asarray(model.apply(params, inputs, {"t": target}).dists["t"].nll(row.tokens), np.float64)
  if first is not None:  # the same order of ranks behind another prompt: its own forward
    role = row.role.at[:, 1].set(CONTEXT)
    given = row.replace(role=role)
    inputs, read = objective.view(given, objective.corruption.state(given, role == CONTEXT))
    target = Target("text", read["subset"], row.tokens, (role == TEXT).astype(jnp.float32))
    nll = np.asarray(model.apply(params, inputs, {"t": target}).dists["t"].nll(row.tokens), np.float64)
  p = np.exp(-nll.sum(1))
  return p if first is None else np.where(text[:, 1] == first, p, 0)


def sampler(temperature=1.0, size=3, **section):
  objective, model, _ = any_subset()
  section |= {"eos": -2, "draft": {"kind": "marginals", "size": size}, "temperature": temperature}
  return sampling.build(section, objective, model)


def p_value(tokens, p):
  cells = np.asarray(tokens)[:, OPEN] @ [9, 3, 1]
  seen, expected = np.bincount(cells, minlength=27), p / p.sum() * len(cells)
  few = expected < 8
  group = lambda x: np.append(x[~few], x[few].sum() + 1e-9)
  return stats.chisquare(group(seen), group(expected), sum_check=False).pvalue


@pytest.mark.parametrize(
  "rows", [pytest.param(1 << 12, marks=pytest.mark.slow), pytest.param(1 << 17, marks=pytest.mark.full)]
)
def test_the_joint_is_the_sequential_law(rows):
  """T21."""
  _, _, params = any_subset()
  row, made = prompts(rows), sampler()
  assert made.policy.name == "causal_exact"  # contents are kept by rank
  with pytest.raises(ConfigError, match="under its rank"):
    sampler(cache="none")
  result = made(params, row, KEY)
  assert abs(sequential().sum() - 1) < 1e-5 and abs(sequential(0).sum() - 1) < 1e-5
  assert p_value(result.tokens[::2], sequential()) > 1e-3
  assert p_value(result.tokens[1::2], sequential(0)) > 1e-3
  # Forwards never exceed tokens, and there are rejections to speak of.
  calls = np.asarray(result.calls["draft"] + result.calls["verify"])
  tokens = np.asarray(result.committed_at >= 0).sum(1)
  assert (calls <= tokens).all() and bool(result.done.all())
  np.testing.assert_array_equal(tokens, np.where(np.arange(rows) % 2, 2, 3))
  assert (np.asarray(result.memory["accepted"])[::2] < 3).mean() > 0.1

  # Negative control: drafts that are never refused are independent of each other.
  class Gullible(joint.Joint):
    def verify(self, *args):
      went, cache = super().verify(*args)
      at, exists, tokens = args[5:8]
      return went.replace(tokens=jnp.pad(tokens, ((0, 0), (0, 1))), taken=exists), cache

  if rows > 1 << 13:
    fields = {f.name: getattr(made, f.name) for f in dataclasses.fields(made)}
    wrong = Gullible(**fields)(params, row, KEY)
    assert p_value(wrong.tokens[::2], sequential()) < 1e-6


@pytest.mark.full
def test_greedy_is_one_token_at_a_time():
  """At temperature 0 the ids are those of the likeliest token, one after another by rank."""
  objective, model, params = any_subset()
  row = prompts(2)
  for size in (2, 3, 5):
    result = sampler(0.0, size)(params, row, KEY)
    tokens = row.tokens
    for i in OPEN:
      filled = row.replace(tokens=tokens)
      inputs, read = objective.view(filled, objective.corruption.state(filled, row.role == CONTEXT))
      target = Target("text", read["subset"], tokens, jnp.ones(tokens.shape))
      best = model.apply(params, inputs, {"t": target}).dists["t"].argmax_prob()[0]
      tokens = jnp.where((jnp.arange(N) == i) & (row.role == TEXT), best, tokens)
    np.testing.assert_array_equal(result.tokens, tokens)


# -- a diffusion model drafts ---------------------------------------------------------------------------


@pytest.mark.slow
def test_the_path_is_the_best_of_the_lattice():
  rng = np.random.default_rng(0)
  B, K, M = 3, 3, 3
  ids = np.stack([[rng.permutation(7)[:M] for _ in range(K)] for _ in range(B)]).astype(np.int32)
  logp = np.log(rng.dirichlet(np.ones(M), (B, K))).astype(np.float32)
  tokens = rng.integers(0, 7, (B, 12)).astype(np.int32)
  length, start = jnp.array([12, 9, 1]), jnp.asarray(tokens[np.arange(B), [11, 8, 0]])

  def ln_proxy(b, a, c):
    text = tokens[b, : length[b]].tolist()
    pairs = list(itertools.pairwise(text))
    single = (text.count(c) + 1) / (len(text) + 7)
    return np.log((pairs.count((a, c)) + single) / (sum(p[0] == a for p in pairs) + 1))

  proxy = lambda last, candidates: diffuspec.bigrams(jnp.asarray(tokens), length, last, candidates, 7)
  run = lambda weight, beams: np.asarray(
    diffuspec.search(jnp.asarray(ids), jnp.asarray(logp), start, proxy, weight, beams)
  )
  differ = 0
  for b in range(B):

    def score(path, weight):
      out, last = 0.0, int(start[b])
      for i, m in enumerate(path):
        out += logp[b, i, m] + weight * ln_proxy(b, last, ids[b, i, m])
        last = ids[b, i, m]
      return out

    for weight, got in ((0.0, run(0.0, 1)), (1.0, run(1.0, M ** (K - 1)))):
      best = max(itertools.product(range(M), repeat=K), key=lambda p: score(p, weight))
      assert got[b].tolist() == [ids[b, i, m] for i, m in enumerate(best)]
    differ += got[b].tolist() != run(0.0, 1)[b].tolist()
  assert differ  # the proxy matters


@pytest.mark.full
def test_diffusion_drafts_keep_the_targets_ids():
  """T19 with a lattice of a denoiser; its length follows what is accepted."""
  target = S.sampler(S.ar(), temperature=0.0)
  want = target(S.params(), S.row(), KEY)
  denoiser = S.sampler(S.mdm())
  sampler = speculate.build(target, diffuspec.DiffuSpec(6, margin=1, denoiser=denoiser), own=S.params())
  result = sampler(S.params(), S.row(), KEY)
  np.testing.assert_array_equal(result.tokens, want.tokens)
  assert sampler.rule == verify.Match() and bool(result.done.all())
  # Six tokens at first, then fewer: this denoiser's drafts are poor.
  left = S.N - np.array([1, 3, 6, 9])
  assert (
    np.asarray(result.memory["drafted"])[:2]
    < np.array([sum(min(6, x) for x in range(1, n + 1)) for n in left])[:2]
  ).all()
