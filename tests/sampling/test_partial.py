"""Caches inside the front unit: what they compute, which are exact, how far the others drift (T17, T18)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import models, sampling
from genmodels.config import ConfigError
from genmodels.sampling import laws, partial
from tests.sampling import systems as S
from tests.sampling.test_cache import _AppendsNoise

LINEAR = {"kind": "linear", "steps": 3}
STEPS = 20
FIELDS = {
  "prefix": {},
  "dual": {},
  "vicinity": {"around": 1},
  "free": {},
  "delayed": {"refresh": 4},
  "logit_selective": {"ratio": 0.5, "warm": 0.0, "refresh": 4},
}
TOGETHER = tuple(k for k in FIELDS if k != "logit_selective")


def prefix_dlm():
  """LaViDa's Prefix-DLM: what is given sees only itself, the answer sees all."""
  return dataclasses.replace(S.single_stream(), corruption={"kind": "absorb", "blocks": {"anchor": "prompt"}})


def with_policy(policy, objective=None, sub_block=4, **section):
  """A sampler under a partial policy that nobody has judged yet."""
  plain = S.sampler(
    objective or S.mdm(), **{"quota": LINEAR, "sub_block": sub_block, "temperature": 0.0, **section}
  )
  name = next((k for k, cls in partial.REGISTRY.items() if cls is type(policy)), "any")
  return dataclasses.replace(
    plain, policy=sampling.CachePolicy(name, True, False, plain.policy.reach, policy)
  )


@dataclasses.dataclass(frozen=True)
class Any(partial.Partial):
  """Policy number `index` (traced) of several: they share one program."""

  policies: tuple = ()
  index: object = 0

  foresees = property(lambda self: self.policies[0].foresees)
  keeps = property(lambda self: self.policies[0].keeps)
  compares = property(lambda self: self.policies[0].compares)

  def recompute(self, look):
    return jnp.stack([p.recompute(look) for p in self.policies])[self.index]


POLICIES = [partial.REGISTRY[k](**FIELDS[k]) for k in TOGETHER]
POLICIES += [dataclasses.replace(p, refresh=1) for p in POLICIES]


def together(policies, objective=None, sub_block=4, **section):
  """index → (float32[STEPS, B] drift, last State) of one of the policies, on the row of unequal prompts."""
  base, row, key = with_policy(partial.Dual(), objective, sub_block, **section), S.row(), jax.random.key(5)
  params = S.params()
  prefill = base.prefill_width(row)

  def run(index):
    policy = dataclasses.replace(base.policy, partial=Any(widths=2, policies=tuple(policies), index=index))
    return partial.scan_drift(dataclasses.replace(base, policy=policy), params, row, key, STEPS, prefill)

  return jax.jit(run)


program = functools.cache(lambda: together(POLICIES))


@functools.cache
def selective(ratio):
  policy = partial.LogitSelective(**{**FIELDS["logit_selective"], "ratio": ratio})
  return partial.drift(with_policy(policy), S.params(), S.row(), jax.random.key(5), STEPS)


def drifted(kind, fresh=False):
  if kind == "logit_selective":
    off, s = selective(0.0 if fresh else 0.5)
  else:
    off, s = program()(TOGETHER.index(kind) + fresh * len(TOGETHER))
  return np.asarray(off), s


KINDS = [*TOGETHER, pytest.param("logit_selective", marks=pytest.mark.full)]


@pytest.mark.parametrize("kind", KINDS)
def test_drift_is_measured_and_bounded(kind):
  """T18: stale entries show as a number, a unit computed anew has none, and every row is finished."""
  off, s = drifted(kind)
  assert np.asarray(s.done).all()
  assert off[0].max() < 1e-5, "the first call computes everything"
  assert 1e-3 < off.max() < 20, "logits of this network reach about 8"
  if kind in ("prefix", "dual", "vicinity"):  # new windows begin at steps 0, 3, 6 … of every row
    assert off[::3].max() < 1e-5
  slots, used = (np.asarray(s.memory["cache"][k]) for k in ("slots", "used"))
  assert used.max() <= slots and used.max() < int(s.forwards) * S.N
  fresh = np.asarray(drifted(kind, True)[1].memory["cache"]["used"])
  assert (used < fresh).all(), "rows of every prompt length compute fewer slots than with refresh=1"


@pytest.mark.parametrize("kind", KINDS)
def test_computed_anew_at_every_step_it_is_exact(kind):
  """T18: refresh=1, and ratio 0 of the max-logit cache."""
  off, s = drifted(kind, True)
  assert np.asarray(s.done).all() and off.max() < 1e-5


def test_what_is_read_is_not_computed():
  """`dual` reads all that `vicinity` and `prefix` read and more."""
  used = {k: np.asarray(drifted(k)[1].memory["cache"]["used"]) for k in ("dual", "vicinity", "prefix")}
  assert (used["dual"] < used["vicinity"]).all() and (used["dual"] < used["prefix"]).all()


@pytest.mark.slow
def test_what_will_be_committed_is_computed():
  """dKV-Cache-Greedy (T18): refresh=1 gives what no cache gives, token by token; else the drift is a number, and
  a step computes the token that it commits, the last one and the window: their number knows no row length."""
  greedy = functools.partial(partial.Greedy, window=2)
  run = together(
    [greedy(), greedy(refresh=1), greedy(refresh=0)], sub_block=0, quota={"kind": "linear", "steps": S.N},
    score="random",
  )  # fmt: skip
  (off, s), (exact, fresh), (_, never) = run(0), run(1), run(2)
  assert np.asarray(s.done).all() and np.asarray(fresh.done).all() and np.asarray(never.done).all()
  assert (
    np.asarray(exact).max() < 1e-5 and np.asarray(off)[::2].max() < 1e-5 < 1e-3 < np.asarray(off).max() < 20
  )
  for state in (s, never):  # the order is that of the keys, whatever is computed
    np.testing.assert_array_equal(state.committed_at, fresh.committed_at)
  steps = (np.asarray(never.committed_at) >= 0).sum(1)
  assert (np.asarray(never.memory["cache"]["used"]) <= S.N + (steps - 1) * (2 + 2)).all()


@pytest.mark.slow
def test_what_moved_most_is_computed():
  """dLLM-Cache (T18): everything in every step is exact; else the drift is a number, predictions stand, and the
  values that a step replaces are compared."""
  similar = functools.partial(partial.ValueSimilarity, prompt=5, refresh=4)
  run = together([similar(), similar(refresh=1, prompt=1)])
  (off, s), (exact, fresh) = run(0), run(1)
  assert np.asarray(s.done).all() and np.asarray(fresh.done).all()
  assert (
    np.asarray(exact).max() < 1e-5 and np.asarray(off)[0].max() < 1e-5 < 1e-3 < np.asarray(off).max() < 20
  )
  assert (np.asarray(s.memory["cache"]["used"]) < np.asarray(fresh.memory["cache"]["used"])).all()
  moved = np.asarray(s.memory["cache"]["similar"])
  assert moved.min() > -1.001 and moved.max() < 1.001 and (moved < 0.99).any()


def test_what_is_not_foreseen_is_refused():
  greedy = {"cache": "delayed_greedy", "quota": LINEAR}
  for section, match in (
    ({"score": "prob"}, "only where the order is random"),
    ({"score": {"kind": "random", "eos": 0.5}}, "EOS"),
    ({"score": "random", "stop": "gap"}, "by the predictions"),
  ):
    with pytest.raises(ConfigError, match=match):
      S.sampler(S.mdm(), **greedy, **section)


@pytest.mark.slow
def test_a_sub_block_cache_inside_an_exact_block_cache():
  """Fast-dLLM v2: the first visit of a sub-block computes the whole block, later ones the sub-block alone. The
  blocks behind the front stay exact: where the whole block is computed, and in the passes that store one, there
  is no drift."""
  run = together([partial.Dual(), partial.Dual(refresh=1)], S.bd(6, "bd3", "shift_clean_boundary"), 3)
  (off, s), (exact, fresh) = run(0), run(1)
  assert np.asarray(s.done).all() and np.asarray(fresh.done).all()
  assert np.asarray(exact).max() < 1e-5
  off = np.asarray(off)
  assert 1e-3 < off.max() < 20 and (off < 1e-5).any(1).sum() > 4 and off[0].max() < 1e-5
  assert (np.asarray(s.memory["cache"]["used"]) < np.asarray(fresh.memory["cache"]["used"])).all()


@pytest.mark.slow
def test_a_row_does_not_depend_on_its_batch():
  """Unequal prompts: each row alone gives what it gives in the batch, and its neighbours' refreshes (the
  batch then computes at a larger width) change nothing."""
  policy = partial.Prefix()
  together = with_policy(policy)(S.params(), S.row(), jax.random.key(2))
  alone = with_policy(policy)
  for i in (0, 3):
    one = jax.tree.map(lambda x, i=i: x[i : i + 1], S.row())
    got = alone(S.params(), one, jax.random.key(2))
    np.testing.assert_array_equal(got.tokens[0], together.tokens[i])
    np.testing.assert_array_equal(got.committed_at[0], together.committed_at[i])
    assert float(got.slots_per_token) > 0
  assert together.slots_per_token == together.memory["cache"]["slots"] * 4 / (14 * 4 - (1 + 3 + 6 + 9))


# -- what a policy computes -----------------------------------------------------------------------------


def look(later=0, **kw):
  """10 slots: 2 given, 3 committed at steps 3, 4, 5, the rest open; the window is [4, 7), the step 6."""
  at = jnp.arange(10)[None]
  committed_at = jnp.array([[-1, -1, 3, 4, 5, -1, -1, -1, -1, -1]])
  open_ = at >= 5
  values = {
    "at": at, "use": at >= 0, "open": open_, "need": (at >= 5) & (at < 7),
    "since": jnp.where(committed_at < 0, partial.LONG_AGO, 6 + later - committed_at),
    "sure": jnp.where(open_, jnp.array([[0, 0, 0, 0, 0, 3.0, 1, -jnp.inf, -jnp.inf, -jnp.inf]]), jnp.inf),
    "lo": jnp.array([4]), "hi": jnp.array([7]), "before": jnp.array([4]), "first": jnp.array([False]),
    "fresh": jnp.array([False]), "k": jnp.array([2]), "step": jnp.int32(6), "bound": 3, "chosen": at == 6, "given": at < 2,
    "similar": jnp.array([[0, 0, 0.9, 0.2, 0.1, 0.8, 0.7, 0.6, 1, 1]]),
  }  # fmt: skip
  return partial.Look(**values | kw)


SIMILAR = partial.ValueSimilarity(refresh=4, ratio=0.25)
HALF = partial.LogitSelective(ratio=0.5, warm=0.0)
EVERY, NEW = list(range(10)), {"fresh": jnp.array([True])}
COMPUTED = [
  (partial.Prefix(), {}, [4, 5, 6, 7, 8, 9]),
  (partial.Dual(), {}, [4, 5, 6]),
  (partial.Vicinity(around=1), {}, [3, 4, 5, 6, 7]),
  *((p, NEW, EVERY) for p in (partial.Prefix(), partial.Dual(), partial.Vicinity())),
  *((p(refresh=2), {}, EVERY) for p in (partial.Prefix, partial.Dual, partial.Vicinity)),  # k = 2
  (partial.Free(), {"before": jnp.array([2]), **NEW}, [2, 3, 4, 5, 6, 7, 8, 9]),
  # dKV-Cache: at step 6 the cached set is what was filled before step 5; the commit of step 5 is computed.
  (partial.Delayed(refresh=0), {}, [4, 5, 6, 7, 8, 9]),
  (partial.Delayed(refresh=0), {"later": 1}, [5, 6, 7, 8, 9]),
  (partial.Delayed(refresh=3), {}, EVERY),
  (partial.Delayed(refresh=4), {}, [4, 5, 6, 7, 8, 9]),
  # dKV-Cache-Greedy: slot 6 is committed now, 4 was in the last step; the open ones are 5 … 9.
  (partial.Greedy(refresh=0, window=0), {}, [4, 6]),
  (partial.Greedy(refresh=0, window=3), {}, [4, 5, 6, 7]),
  (partial.Greedy(refresh=0, window=4), {}, [4, 5, 6, 7, 8]),
  (partial.Greedy(), {}, EVERY),  # the window's third step
  # dLLM-Cache: 4 was committed in the last step; a quarter of the answer's eight are the two that moved most.
  (SIMILAR, {}, [3, 4, 7]),
  (dataclasses.replace(SIMILAR, ratio=0.0), {}, [4]),
  (SIMILAR, NEW, [3, 4, 5, 6, 7]),
  (dataclasses.replace(SIMILAR, refresh=3), {}, list(range(2, 10))),
  (dataclasses.replace(SIMILAR, prompt=3, ratio=0.0), {}, [0, 1, 4]),
  (SIMILAR, {"first": jnp.array([True])}, EVERY),
  # Half of ten are read: the given two, those committed earlier (2, 3), then the surest open one (5).
  (HALF, {}, [4, 6, 7, 8, 9]),
  (dataclasses.replace(HALF, ratio=0.0), {}, EVERY),
  (dataclasses.replace(HALF, warm=1.0), {}, EVERY),
]


def test_what_is_computed():
  got = jax.jit(lambda: [p.recompute(look(**kw))[0] for p, kw, _ in COMPUTED])()
  for (policy, kw, want), mask in zip(COMPUTED, got, strict=True):
    assert np.flatnonzero(np.asarray(mask)).tolist() == want, (policy, kw)


def test_static_widths():
  assert partial.Prefix().ladder(1024, 32) == (32, 182, 1024)
  assert partial.Prefix().ladder(1024, 1024) == (256, 512, 1024)
  assert partial.Dual().ladder(1024, 33) == (33, 1024)
  assert partial.Vicinity().ladder(1024, 32) == (64, 1024)
  assert partial.Delayed(widths=1).ladder(1024, 32) == (1024,)
  assert partial.Greedy().ladder(1024, 1024) == (6, 79, 1024)


# -- which are exact --------------------------------------------------------------------------------------

DUAL, PREFIX = partial.Dual(), partial.Prefix()
CASES = {
  # Given tokens see open ones under ALL, only given ones under Prefix-DLM: one policy, two verdicts.
  "full": (PREFIX, S.mdm, 0, False),
  "prefix_dlm": (PREFIX, prefix_dlm, 0, True),
  "prefix_dlm_windows": (PREFIX, prefix_dlm, 4, False),
  "refreshed": (partial.Dual(refresh=1), S.mdm, 4, True),
  "window_is_the_block": (DUAL, lambda: S.bd(6), 0, True),
  "fast_dllm_v2": (DUAL, lambda: S.bd(6, "bd3", "shift_clean_boundary"), 3, False),
  "free_full": (partial.Free(), S.mdm, 4, False),
  "nothing_read": (partial.LogitSelective(ratio=0.0), S.mdm, 0, True),
}


OFTEN = ("full", "prefix_dlm", "prefix_dlm_windows", "fast_dllm_v2")


@pytest.mark.parametrize(
  "name", [pytest.param(n, marks=pytest.mark.slow if n in OFTEN else pytest.mark.full) for n in CASES]
)
def test_the_law_finds_out_what_is_exact(name):
  policy, objective, sub_block, want = CASES[name]
  assert laws.exact(with_policy(policy, objective(), sub_block)) is want


@pytest.mark.slow
def test_a_demand_for_exactness_is_met_or_refused():
  demand = {"kind": "prefix", "exact": True}
  with pytest.raises(ConfigError, match="not exact") as e:
    S.sampler(S.mdm(), quota=LINEAR, cache=demand)
  assert e.value.key == "sampler.cache"
  assert S.sampler(prefix_dlm(), quota=LINEAR, cache=demand).policy.exact
  assert not S.sampler(S.mdm(), quota=LINEAR, cache="prefix").policy.exact


@pytest.mark.slow
def test_the_law_refuses_noise_under_an_exact_name():
  """Negative control: slots of uncommitted tokens that enter a cache which is called exact; the right sampler
  passes."""
  right = S.sampler(S.bd(), quota=LINEAR)
  fields = {f.name: getattr(right, f.name) for f in dataclasses.fields(right)}
  assert laws.exact(right)
  assert not laws.exact(_AppendsNoise(**fields))


@pytest.mark.full
def test_the_cache_is_updated_in_place():
  """Whatever width a step takes, no copy of the cache is made: the loop's program holds none of its shape but
  the keys and values of the widest call itself."""
  section = {"width": 64, "layers": 16, "num_heads": 4, "num_kv_heads": 4, "mlp": 64, "vocab": 128}
  model = models.build({**section, "heads": {"text": {}}})
  objective = dataclasses.replace(S.mdm(), mask_id=127)
  plain = sampling.build({"eos": -2, "sub_block": 32, "quota": LINEAR}, objective, model)
  policy = sampling.CachePolicy("dual", True, False, "", partial.Dual())
  made = dataclasses.replace(plain, policy=policy)
  row = jax.eval_shape(lambda: sampling.prompt_row([[1, 2]] * 4, 2048, 2048))
  key, params = jax.eval_shape(lambda: jax.random.key(0)), model.abstract_params()
  state = jax.eval_shape(lambda p, r: made.start(p, r, 0), params, row)

  def loop(p, r, s, k):
    return jax.lax.while_loop(lambda x: x.step < 5, lambda x: made.step(p, r, x, k), s)

  text = jax.jit(loop, donate_argnums=2).lower(params, row, state, key).compile().as_text()
  big = {"f32[" + ",".join(map(str, x.shape)) + "]" for x in jax.tree.leaves(state.caches) if x.ndim == 5}
  copies = [
    x for x in text.splitlines() if " copy(" in x and any(shape in x.split("copy(")[0] for shape in big)
  ]
  assert [x for x in copies if "broadcast" not in x] == []
