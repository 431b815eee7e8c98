"""Self-distillation through time (SDTT): targets are those of the step that decided, and m steps become one."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from genmodels import models, objectives
from genmodels.contracts import token_row
from genmodels.objectives.base import Nets
from genmodels.step import bind

V, MASK, L = 5, 4, 3
KEY = jax.random.key(0)


def objective(steps=2, dt=0.5, t=(0.0, 1.0), **more):
  section = {
    "kind": "through_time",
    "corruption": {"kind": "absorb", "count": "bernoulli", "time": "uniform", "band": t},
    "layout": {"kind": "streams", "streams": ("n",)},
    "masks": {"full": "full"},
    "terms": {"diffusion": {"stream": "n", "on": "hit", "weight": "one", "normaliser": "batch"}},
    "steps": steps,
    "dt": dt,
  }
  return objectives.build(section | more, {"mask_id": MASK})


@functools.cache
def trunk():
  model = models.build(
    dict(
      width=24, layers=1, num_heads=2, mlp=32, vocab=V, init_std=0.6, learned_pos=16, rope=None,
      heads={"text": {"forbid": (MASK,)}},
    )
  )  # fmt: skip
  return model, jax.jit(model.init)(jax.random.key(1))


def functions():
  model, _ = trunk()
  return {n: lambda trees, *a, n=n, **kw: model.apply(trees[n], *a, **kw) for n in ("model", "teacher")}


def rows(B, N=L):
  return token_row(np.random.default_rng(0).integers(0, MASK, (B, N)))


def loss_of(obj, row, step=1):
  def loss(params, teacher, step=step):
    nets = bind(functions(), {"model": params, "teacher": teacher})
    sums, den, aux = obj.run(nets, row, KEY, step)
    return sums["diffusion"] / den["diffusion"], aux["ratios"]["kl/diffusion"]

  return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.slow
def test_one_step_of_oneself_gives_no_gradient():
  """Control: two steps of the same weights teach something."""
  _, params = trunk()
  for steps, least, most in ((1, 0.0, 1e-5), (2, 1e-2, np.inf)):
    (_, (kl, count)), g = loss_of(objective(steps), rows(8))(params, params)
    assert least <= float(kl / count) + 1e-6 and float(kl / count) <= most
    assert least <= float(optax.global_norm(g)) <= most


def recorded(dt, B=256, N=8):
  """(row, noise, the targets' states, the first call's probabilities, [(ids, states) of each call])."""
  model, params = trunk()
  obj, row = objective(2, dt), rows(B, N)

  @jax.jit
  def run():
    calls = []

    def teacher(inputs, targets):
      out = model.apply(params, inputs, targets)
      calls.append((inputs.ids[..., 0], out.dists["diffusion"]))
      return out

    noise = obj.corruption.draw(row, KEY, 1)
    target = obj.asked(row, noise)[1]["diffusion"]
    dist, _ = obj.taught(Nets({"teacher": teacher}), row, noise, target, KEY, 1)
    p = calls[0][1].map(lambda logits: jax.nn.softmax(logits, -1))
    return noise, dist.hidden, p, [(ids, d.hidden) for ids, d in calls]

  noise, hidden, p, calls = jax.tree.map(np.asarray, run())
  return row, noise, hidden, p, calls


def test_targets_are_of_the_step_that_decided():
  dt = 0.25
  schedule = {"kind": "steps", "values": (1.0, dt), "at": (0, 1)}  # the step is 1
  row, noise, hidden, _, ((first, before), (second, after)) = recorded(schedule)
  hit, t = noise.hit[:, 0], noise.level[:, 0]
  np.testing.assert_array_equal(first, np.where(hit, MASK, row.tokens))
  decided = hit & (second != MASK)
  np.testing.assert_array_equal(second[~hit], np.asarray(row.tokens)[~hit])  # what is shown stays
  assert (second[hit & ~decided] == MASK).all() and (second[decided] < MASK).all()
  want = np.where(decided[..., None], before, after)
  np.testing.assert_array_equal(hidden[hit], want[hit])
  assert np.abs(before - after)[hit & ~decided].max() > 0.1  # the step that decides makes a difference
  # Ancestral sampling from t to t − dt reveals with probability min(1, dt/t), independently.
  p = np.minimum(1, dt / t)
  n, mean, var = hit.sum(), p[hit].sum(), (p * (1 - p))[hit].sum()
  assert n > 500 and abs(decided.sum() - mean) < 4 * var**0.5
  assert decided[hit & (t <= dt)].all()


def test_drawn_tokens_follow_the_teacher():
  """Means of the drawn tokens' one-hots against the teacher's own probabilities, at five standard errors."""
  _, noise, _, p, (_, (second, _)) = recorded(1.0)
  hit = noise.hit[:, 0]
  got, want = np.eye(V)[second[hit]].mean(0), p[hit].mean(0)
  assert (np.abs(got - want) < 5 * (want / hit.sum()) ** 0.5 + 1e-6).all() and want.max() < 0.9


@pytest.mark.slow
def test_two_steps_become_one():
  """All masked, the best one-step student has the marginals of the teacher's two steps; distilled, the
  Kullback-Leibler divergence from the two-step law to the student's one-step law falls to about that of them."""
  model, start = trunk()
  obj, B = objective(2, 0.5, (1.0, 1.0)), 128
  row = rows(B)

  @jax.jit
  def predict(params, tokens, hidden):
    """float32[B, L, V] of texts int32[B, L], masked where `hidden`."""
    r = token_row(tokens)
    noise = obj.corruption.state(r, ~hidden)
    inputs, read = obj.view(r, noise)
    target, _ = obj.target(r, noise, read["diffusion"], obj.terms["diffusion"])
    dist = model.apply(params, inputs, {"d": target.replace(slot=read["diffusion"])}).dists["d"]
    return dist.map(lambda logits: jax.nn.softmax(logits, -1))

  texts = np.array(list(itertools.product(range(MASK), repeat=L)))
  each = lambda p: np.take_along_axis(np.asarray(p, np.float64), texts[..., None], 2)[..., 0]
  none = np.zeros(texts.shape, bool)
  one = lambda params: each(predict(params, texts, ~none)).prod(1)
  law = np.zeros(len(texts))
  for shown in itertools.product((False, True), repeat=L):
    shown = none | np.array(shown)
    p, q = each(predict(start, texts, ~none)), each(predict(start, texts, ~shown))
    law += 0.5**L * np.where(shown, p, q).prod(1)
  assert abs(law.sum() - 1) < 1e-5
  marginal = np.stack([[law[texts[:, i] == v].sum() for v in range(MASK)] for i in range(L)])
  best = np.take_along_axis(marginal[None], texts[..., None], 2)[..., 0].prod(1)
  kl = lambda q: float((law * (np.log(law) - np.log(q))).sum())

  tx, grad = optax.adam(4e-2), loss_of(obj, row)
  update = jax.jit(lambda g, s, p: (lambda u, s: (optax.apply_updates(p, u), s))(*tx.update(g, s, p)))
  params, opt = start, tx.init(start)
  for i in range(150):
    _, g = grad(params, start, i)
    params, opt = update(g, opt, params)
  first, last, least = kl(one(start)), kl(one(params)), kl(best)
  assert first - least > 0.05 and last - least < 0.05 * (first - least), (first, last, least)


def test_what_does_not_fit_is_refused():
  cases = (
    ({"steps": 0}, "at least one"),
    ({"dt": 0.0}, "a time in"),
    ({"dt": {"kind": "steps", "values": (0.5, 2.0), "at": (0, 10)}}, "a time in"),
    ({"corruption": {"kind": "absorb", "complement": True}}, "complement"),
    ({"layout": {"kind": "streams", "streams": ("n", "c")}, "masks": {"full": "bd3"}}, "one noisy copy"),
  )
  for more, words in cases:
    with pytest.raises(ValueError, match=words):
      objective(**more)


def test_the_works_of_the_teachers_calls_add_up():
  _, params = trunk()
  nets = bind(functions(), {"model": params, "teacher": params})
  work = jax.jit(lambda: objective(3).run(nets, rows(4), KEY, 1)[2]["work"])()
  assert int(work["teacher"]["slots"]) == 3 * int(work["model"]["slots"]) == 3 * 4 * L
  assert jnp.all(work["teacher"]["pairs"]["full"] == 3 * work["model"]["pairs"]["full"])
