"""A guide decides what is committed and rewrites nothing (FreeCache's Guided Diffusion)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import models, sampling
from genmodels.config import ConfigError
from genmodels.sampling import guide
from tests.sampling import systems as S

KEY = jax.random.key(4)
AGREE = {"kind": "threshold", "tau": 1.0}


@functools.cache
def small():
  """(model, parameters) of the guide, half as wide."""
  section = {"width": 16, "layers": 1, "num_heads": 2, "num_kv_heads": 1, "mlp": 16, "vocab": S.V + 1}
  model = models.build({**section, "init_std": 0.6, "heads": {"text": {}}})
  with jax.ensure_compile_time_eval():
    return model, jax.jit(model.init)(jax.random.key(9))


def load(path):
  model, params = small()
  objective = S.mdm() if path == "mdm" else S.ar()
  forbid = () if path == "mdm" else (S.MASK,)
  return sampling.build({"eos": -2, "forbid": forbid}, objective, model), params


def guided(objective=None, path="ar", **section):
  section = {"eos": -2, "quota": AGREE, "commit": "leftmost", "temperature": 0.0, **section}
  return sampling.build(section | {"guide": path}, objective or S.mdm(), S.model(1), load=load)


@dataclasses.dataclass(frozen=True)
class Same(guide.Guide):
  """Of the model's own opinion: its likeliest tokens are the proposals."""

  def tokens(self, own, row, at, ask):
    return jnp.take_along_axis(row.tokens, jnp.clip(at, 0, row.tokens.shape[1] - 1), 1)


class Mostly(guide.Guide):
  """The guide at every third place, of the model's own opinion elsewhere: so that runs of agreement are common."""

  def tokens(self, own, row, at, ask):
    proposed = jnp.take_along_axis(row.tokens, jnp.clip(at, 0, row.tokens.shape[1] - 1), 1)
    return jnp.where(at % 3 > 0, proposed, super().tokens(own, row, at, ask))


@pytest.mark.parametrize(
  "objective", [pytest.param(S.mdm, marks=pytest.mark.full), pytest.param(S.bd, marks=pytest.mark.slow)]
)
def test_a_guide_of_the_same_opinion_commits_everything(objective):
  """Every window in one step: the tokens and steps of quota "all"."""
  same = dataclasses.replace(guided(objective()), guide=Same())
  once = sampling.build({"eos": -2, "quota": "all", "temperature": 0.0}, objective(), S.model(1))
  row = S.row()
  got, want = same(S.params(1), row, KEY), once(S.params(1), row, KEY)
  np.testing.assert_array_equal(got.tokens, want.tokens)
  np.testing.assert_array_equal(got.committed_at, want.committed_at)
  jax.tree.map(np.testing.assert_array_equal, got.calls, want.calls)


def opinion(params, row):
  """int32[B, N], the guide's likeliest tokens of the rows, by its objective alone."""
  model = small()[0]
  objective = S.ar()
  row = row.replace(role=jnp.where(row.doc >= 0, 1, row.role))
  noise = objective.corruption.draw(row, KEY, 0)
  inputs, read = objective.view(row, noise)
  logits = model.apply(params, inputs, {"text": _target(read["text"])}).dists["text"].map(lambda z: z)
  return jnp.where(read["text"] < 0, -1, jnp.argmax(logits.at[..., S.MASK].set(-jnp.inf), -1))


def _target(slot):
  from genmodels.contracts import Target

  return Target("text", slot, jnp.zeros_like(slot), (slot >= 0).astype(jnp.float32))


@pytest.mark.parametrize(
  "commit, cache",
  [
    pytest.param("leftmost", "auto", marks=pytest.mark.slow),
    pytest.param("anywhere", "auto", marks=pytest.mark.full),
    pytest.param("leftmost", "free", marks=pytest.mark.full),
  ],
)
def test_what_agrees_is_committed_and_nothing_is_rewritten(commit, cache):
  """Step by step, against the guide's argmax over the row of proposals; committed tokens are the proposals, also
  behind a cache and inside windows; prompts and earlier tokens stay."""
  made = guided(commit=commit, sub_block=7, cache=cache)
  made = dataclasses.replace(made, guide=Mostly(made.guide.path, made.guide.scorer))
  row, params = S.row(), (S.params(1), small()[1])

  @jax.jit
  def step(s):
    a = made.ask(row, s)
    plain = sampling.Sampler.forward(made, params[0], row, s, a, KEY)[0]
    proposed = a.row.replace(tokens=sampling.loop.put(s.tokens, a.at, plain.token, a.can))
    best = jnp.where(jnp.arange(S.N) % 3 > 0, proposed.tokens, opinion(params[1], proposed))
    return made.step(params, row, s, KEY), a, proposed, plain.score, best

  s, several = jax.jit(lambda: made.start(params, row, 0))(), 0
  for _ in range(2 * S.N):
    after, a, proposed, score, best = jax.tree.map(np.asarray, step(s))
    for b in range(4):
      can = a.at[b][a.can[b]]
      if not can.size:
        continue
      agree = proposed.tokens[b, can] == best[b, can]
      if commit == "leftmost":
        want = can[: max(np.argmin([*agree, False]), 1)]
      else:
        want = can[agree] if agree.any() else can[[np.argmax(score[b][a.can[b]])]]
      new = np.flatnonzero(after.committed[b] & ~np.asarray(s.committed)[b])
      assert new.tolist() == want.tolist()
      assert (after.tokens[b, new] == proposed.tokens[b, new]).all()
      several += len(new) > 1
    old = np.asarray(s.committed)
    assert (after.tokens[old] == np.asarray(s.tokens)[old]).all()
    s = jax.tree.map(jnp.asarray, after)
    if after.done.all():
      break
  assert after.done.all() and several, "some steps commit more than one token"
  assert int(after.forwards) > int(after.step), "the guide's forwards count"


def test_refusals():
  for section, match in (
    ({"quota": {"kind": "ancestral", "steps": 4}, "commit": "anywhere"}, "no agreement"),
    ({"score": "neg_entropy"}, "at most 1"),
    ({"score": {"eos": 0.5}}, "lower the score"),
    ({"path": ""}, None),
    ({"path": "mdm"}, "from those before it"),
    ({"remask": "rcr", "quota": {"kind": "linear", "steps": 3}, "commit": "anywhere"}, "opened again"),
    ({"objective": S.ar()}, "predicted once"),
  ):
    if match is None:
      assert type(guided(**section)) is sampling.Sampler  # no guide
      with pytest.raises(ConfigError, match="has no run"):
        guided(path={"path": ""})
      continue
    with pytest.raises(ConfigError, match=match):
      guided(**section)
