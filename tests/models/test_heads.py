"""Dists: closed forms, padding, forbidden classes, sampling, guidance, the flow head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels.contracts import Target
from genmodels.models.config import Head
from genmodels.models.heads import Categorical, Flow, FlowField

from . import cases


def dist(vocab=7, head=None, extra=0, seed=0, B=2, M=5, D=6):
  rng = np.random.default_rng(seed)
  draw = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)
  valid = jnp.asarray(rng.random((B, M)) < 0.7).at[0, 0].set(True)
  return Categorical(draw(B, M, D), draw(D, vocab + extra), None, valid, head or Head(chunk=3), vocab)


def test_nll_entropy_argmax_against_dense_logits():
  d = dist(head=Head(chunk=3, soft_cap=2.0, forbid=(4,)), extra=2)
  z = 2 * np.tanh(np.asarray(d.hidden @ d.weight)[..., :7] / 2)
  z[..., 4] = -np.inf
  logp = np.asarray(jax.nn.log_softmax(z, -1))
  p, on = np.exp(logp), np.asarray(d.valid)
  value = jnp.asarray(np.random.default_rng(1).integers(0, 4, (2, 5)))

  @jax.jit
  def stats(d):
    return d.nll(value), d.entropy(), d.argmax_prob()

  nll, entropy, (best, top) = stats(d)
  np.testing.assert_allclose(
    nll, np.where(on, -np.take_along_axis(logp, np.asarray(value)[..., None], -1)[..., 0], 0), rtol=1e-5
  )
  np.testing.assert_allclose(
    entropy, np.where(on, -np.where(p > 0, p * np.where(p > 0, logp, 0), 0).sum(-1), 0), rtol=1e-5
  )
  np.testing.assert_array_equal(best, np.where(on, p.argmax(-1), 0))
  np.testing.assert_allclose(top, np.where(on, p.max(-1), 0), rtol=1e-5)
  assert np.isinf(np.asarray(jax.jit(lambda d: d.nll(jnp.full((2, 5), 4)))(d))[on]).all()


@pytest.mark.parametrize("tied", [True, False])
def test_padded_vocabulary(tied):
  """Rows beyond the vocabulary have probability 0 and no gradient; the same model without them agrees."""
  ids = cases.tokens(2, 6)
  x, t = cases.inputs(ids), cases.everywhere(ids)
  wide, params = cases.build(vocab_multiple=8, heads={"text": dict(tied=tied)})
  assert params["embed"]["tokens"]["embedding"].shape == (24, 16)
  assert ("text" in params.get("heads", {})) != tied
  loss = lambda model, p: model.apply(p, x, t).dists["t"].nll(ids[..., 0]).sum()
  grads = jax.jit(jax.grad(lambda p: loss(wide, p)))(params)
  assert np.abs(np.asarray(grads["embed"]["tokens"]["embedding"][19:])).max() == 0
  assert np.abs(np.asarray(grads["embed"]["tokens"]["embedding"][:19])).min() > 0 or not tied
  narrow, _ = cases.build(heads={"text": dict(tied=tied)})
  cut = jax.tree.map(lambda v: v, params)
  cut["embed"] = {"tokens": {"embedding": params["embed"]["tokens"]["embedding"][:19]}}
  if not tied:
    assert np.abs(np.asarray(grads["heads"]["text"]["kernel"][:, 19:])).max() == 0
    cut["heads"] = {"text": {"kernel": params["heads"]["text"]["kernel"][:, :19]}}
  np.testing.assert_allclose(cases.run(wide, params, x), cases.run(narrow, cut, x), atol=1e-6)


def test_tied_head_is_the_table():
  model, params = cases.build(heads={"text": dict(tied=True, bias=True)})
  x = cases.inputs(cases.tokens(1, 4))
  out = jax.jit(
    lambda p: (lambda o: (cases.logits(o.dists["t"]), o.layers["hidden"]))(
      model.apply(p, x, cases.everywhere(x.ids))
    )
  )
  got, hidden = out(params)
  want = hidden @ params["embed"]["tokens"]["embedding"].T + params["heads"]["text_bias"]
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_target_reads_its_slot_and_skips_the_rest():
  model, params = cases.build()
  ids = cases.tokens(2, 6)
  x = cases.inputs(ids)
  slot = jnp.asarray([[3, -1, 0], [5, 5, 2]])
  weight = jnp.asarray([[1.0, 1.0, 1.0], [1.0, 0.0, 2.0]])
  target = Target("text", slot, jnp.zeros((2, 3), jnp.int32), weight)
  got = cases.run(model, params, x, {"t": target})
  every = cases.run(model, params, x)
  for b, m in np.ndindex(2, 3):
    asked = slot[b, m] >= 0 and weight[b, m] > 0
    np.testing.assert_allclose(got[b, m], every[b, slot[b, m]] if asked else 0 * every[0, 0], atol=1e-6)
  with pytest.raises(ValueError, match="head 'txt' does not exist"):
    cases.run(model, params, x, {"t": Target("txt", slot, slot, weight)})


def test_no_full_logits_forward_or_backward():
  """Nothing of S × V elements exists in the compiled gradient; it does for the head written out."""
  V, S = 997, 64
  model, params = cases.build(vocab=V, layers=1, heads={"text": dict(chunk=8)})
  ids = cases.tokens(1, S, V)
  x, t = cases.inputs(ids), cases.everywhere(ids)

  def lazy(p):
    return model.apply(p, x, t).dists["t"].nll(ids[..., 0]).sum()

  def dense(p):
    z = model.apply(p, x, {}).layers["hidden"] @ p["heads"]["text"]["kernel"]
    return -jnp.take_along_axis(jax.nn.log_softmax(z), ids, -1).sum()

  def temp(f):
    return jax.jit(jax.grad(f)).lower(params).compile().memory_analysis().temp_size_in_bytes

  assert temp(lazy) < 4 * S * V < temp(dense)


def test_map_is_differentiable_in_what_it_closes_over():
  d = dist()

  def f(a):
    return d.map(lambda z, v: (z * a).sum(-1) * v, jnp.ones((2, 5))).sum()

  want = float((np.asarray(d.hidden @ d.weight).sum(-1) * np.asarray(d.valid)).sum())
  np.testing.assert_allclose(jax.jit(jax.grad(f))(2.0), want, rtol=1e-4)


def test_sampling_law_filters_and_confidence():
  M, n = 1, 40000
  d = dist(B=1, M=M, head=Head(forbid=(2,)))
  d = d.replace(hidden=jnp.broadcast_to(d.hidden, (1, n, 6)), valid=jnp.ones((1, n), bool))
  p = np.asarray(jax.nn.softmax(jnp.where(jnp.arange(7) == 2, -jnp.inf, d.hidden[0, 0] @ d.weight)))

  @jax.jit
  def draws(key):
    plain, conf = d.sample(key, with_prob=True)
    return (
      plain,
      conf,
      d.sample(key, top_k=2),
      d.sample(key, top_p=0.5),
      d.sample(key, temperature=0),
      d.sample(key, temperature=0.5),
    )

  plain, conf, k2, nucleus, greedy, cold = (np.asarray(x[0]) for x in draws(jax.random.key(3)))
  law = lambda ids: np.bincount(ids, minlength=7) / n
  assert np.abs(law(plain) - p).max() < 5 * 0.5 / np.sqrt(n) and law(plain)[2] == 0
  np.testing.assert_allclose(conf, p[plain], rtol=1e-4)
  assert np.abs(law(cold) - p**2 / (p**2).sum()).max() < 5 * 0.5 / np.sqrt(n)
  assert set(k2) == set(np.argsort(p)[-2:])
  order = np.argsort(-p)
  assert set(nucleus) == set(order[: np.searchsorted(np.cumsum(p[order]), 0.5) + 1])
  assert set(greedy) == {p.argmax()}


def test_a_position_s_draw_follows_its_key():
  d = dist().replace(valid=jnp.ones((2, 5), bool))
  keys = jax.random.split(jax.random.key(0), (2, 5))
  sample = jax.jit(lambda d, k: d.sample(k))
  whole = sample(d, keys)
  swapped = sample(d.replace(hidden=d.hidden[:, ::-1]), keys[:, ::-1])
  np.testing.assert_array_equal(whole, swapped[:, ::-1])
  np.testing.assert_array_equal(
    sample(d, jax.random.key_data(jax.random.key(1))), sample(d, jax.random.key(1))
  )


def test_sampling_asks_for_the_long_tail(monkeypatch):
  modes = []
  real = jax.random.categorical
  monkeypatch.setattr(
    jax.random, "categorical", lambda *a, mode=None, **k: modes.append(mode) or real(*a, mode=mode, **k)
  )
  jax.eval_shape(dist().sample, jax.random.key(0))
  assert modes and set(modes) == {"high"}


@pytest.mark.slow
def test_gumbel_tail_is_not_truncated():
  """The largest of 2·10⁷ Gumbel draws: ln N + 0.58 = 17.4 expected; 23-bit uniforms stop at 15.94."""
  draw = lambda mode: jax.jit(lambda k: jax.random.gumbel(k, (20_000_000,), mode=mode).max())
  assert float(draw("low")(jax.random.key(0))) < 15.95
  assert float(draw("high")(jax.random.key(0))) > 16.5


def test_guidance_is_the_combination_of_logits():
  c, u = (
    dist(seed=0).replace(valid=jnp.ones((2, 5), bool)),
    dist(seed=0).replace(valid=jnp.ones((2, 5), bool)),
  )
  u = u.replace(hidden=-0.5 * u.hidden + 1)
  z = lambda d: d.hidden @ d.weight
  scale = jnp.linspace(0, 3, 10).reshape(2, 5)
  got = jax.jit(lambda c, u: cases.logits(c.guide(u, scale)))(c, u)
  np.testing.assert_allclose(got, z(u) + scale[..., None] * (z(c) - z(u)), atol=1e-5)
  with pytest.raises(ValueError, match="soft cap"):
    dist(head=Head(soft_cap=1.0)).guide(u, 2.0)


def flow_case(**given):
  model, params = cases.build(heads={"flow": dict(kind="flow", size=3, width=8, depth=2)})
  ids = cases.tokens(2, 4)
  slot = jnp.asarray([[0, 2], [3, -1]])
  target = Target("flow", slot, jnp.zeros((2, 2, 3)), jnp.ones((2, 2)), given or None)
  return model, params, cases.inputs(ids), target


def test_flow_head_regresses_noise_minus_data():
  """nll is the mean squared distance of v to ε − x; an exact field has none, and sampling undoes noise."""
  rng = np.random.default_rng(0)
  x1, eps = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((2, 2, 3), (2, 2, 5, 3)))
  t = jnp.asarray(rng.uniform(0.05, 1, (2, 2, 5)), jnp.float32)
  z = (1 - t[..., None]) * x1[:, :, None] + t[..., None] * eps
  model, params, x, target = flow_case(z=z, t=t)

  def f(p):
    d = model.apply(p, x, {"f": target}).dists["f"]
    return d.nll(x1), d.velocity(z, t), d.valid

  nll, v, valid = jax.jit(f)(params)
  want = jnp.where(valid, jnp.square(v - (eps - x1[:, :, None])).mean((-2, -1)), 0)
  np.testing.assert_allclose(nll, want, rtol=1e-4)
  assert valid.tolist() == [[True, True], [True, False]]
  grads = jax.jit(jax.grad(lambda p: f(p)[0].sum()))(params)
  assert all(np.abs(np.asarray(g)).max() > 0 for g in jax.tree.leaves(grads["heads"]["flow"]))


def test_flow_sampling_with_an_oracle_field(monkeypatch):
  """For data at one point x the field is (z − x)/t; Euler from any noise ends at x."""
  point = jnp.asarray([0.3, -1.0, 2.0])
  monkeypatch.setattr(Flow, "velocity", lambda self, z, t: (z - point) / t)
  head = Head(kind="flow", size=3)
  d = Flow(jnp.zeros((1, 4, 2)), {}, jnp.asarray([[True, True, True, False]]), None, head, None)
  got = jax.jit(lambda k: d.sample(k, steps=8))(jax.random.key(0))
  np.testing.assert_allclose(got[0, :3], jnp.broadcast_to(point, (3, 3)), atol=1e-5)
  assert not got[0, 3].any()
  with pytest.raises(ValueError, match="Target.given"):
    d.nll(jnp.zeros((1, 4, 3)))


def test_flow_field_starts_at_zero_and_reads_hidden_and_time():
  model, params, _, _ = flow_case()
  field = FlowField(model.cfg, model.cfg.head("flow"))
  z, t, h = jnp.ones((2, 3)), jnp.asarray([0.1, 0.9]), jnp.ones((2, 16))
  start = jax.jit(field.init)(jax.random.key(0), z, t, h)
  apply = jax.jit(field.apply)
  assert not np.asarray(apply(start, z, t, h)).any()
  p = {"params": params["heads"]["flow"]}
  a = apply(p, z, t, h)
  assert np.abs(np.asarray(a[0] - a[1])).max() > 1e-3
  assert np.abs(np.asarray(a - apply(p, z, t, 2 * h))).max() > 1e-3
