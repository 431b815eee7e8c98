"""Mixture of experts: routing, sorting, sharding, adapters, against formulas written as loops over slots."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import models
from genmodels.models import moe
from genmodels.models.layers import Mlp
from genmodels.parallel import MeshConfig, make_mesh, sharding_tree, use_mesh

from . import cases

EXPERTS = dict(pattern=(dict(mlp="moe"),))
SOFTMAX = dict(experts=6, top_k=2, mlp=12)
ROUTINGS = {
  "softmax": SOFTMAX,
  "normalised": dict(SOFTMAX, normalise=True, top_k=3),
  "grouped": dict(
    experts=8, top_k=3, mlp=12, score="sigmoid", normalise=True, groups=4, top_groups=2, bias=True, scale=2.5,
    shared=10,
  ),
}  # fmt: skip


@functools.cache
def layer(name="softmax", **more):
  """(cfg, parameters of one MoeMlp, x [B, S, D], valid bool[B, S])."""
  model, params = cases.build(layers=1, moe={**ROUTINGS[name], **more}, **EXPERTS)
  one = jax.tree.map(lambda x: x[0], params["stack"]["s0"]["l0"]["mlp"])
  x = np.random.default_rng(0).standard_normal((2, 7, 16), np.float32)
  valid = np.ones((2, 7), bool)
  valid[0, -2:] = False
  return model.cfg, one, jnp.asarray(x), jnp.asarray(valid)


@functools.cache
def compiled(cfg):
  def f(params, x, valid):
    return moe.MoeMlp(cfg).apply({"params": params}, x, {"valid": valid})

  return jax.jit(f)


def oracle(cfg, p, x, valid):
  """Slot by slot, expert by expert, in float64. (output, load)."""
  m, load = cfg.moe, np.zeros(cfg.moe.experts)
  silu = lambda z: z / (1 + np.exp(-z))
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), p)
  mlp = lambda v, k: (silu(v @ k["gate"]) * (v @ k["up"])) @ k["down"]
  kernels = {n: p["experts"][n]["kernel"] for n in ("gate", "up", "down")}
  out = np.zeros(x.shape)
  for at in np.ndindex(*x.shape[:2]):
    v = np.asarray(x[at], np.float64)
    if m.shared:
      out[at] = mlp(v, {n: p["shared"][n]["kernel"] for n in kernels})
    if not valid[at]:
      continue
    z = v @ p["router"]["kernel"]
    s = np.exp(z) / np.exp(z).sum() if m.score == "softmax" else 1 / (1 + np.exp(-z))
    choice = s + p.get("expert_bias", 0)
    if m.groups > 1:
      groups = choice.reshape(m.groups, -1)
      best = np.argsort(-np.sort(groups, -1)[:, -2:].sum(-1))[: m.top_groups]
      choice = np.where(np.isin(np.arange(m.groups), best)[:, None], groups, -np.inf).reshape(-1)
    chosen = np.argsort(-choice)[: m.top_k]
    w = s[chosen] / (s[chosen].sum() if m.normalise else 1) * m.scale
    for e, weight in zip(chosen, w):
      out[at] += weight * mlp(v, {n: k[e] for n, k in kernels.items()})
      load[e] += 1
  return out, load


@pytest.mark.parametrize("name", ROUTINGS)
def test_is_a_loop_over_slots_and_experts(name):
  cfg, p, x, valid = layer(name)
  y, stats = compiled(cfg)(p, x, valid)
  want, load = oracle(cfg, p, x, valid)
  np.testing.assert_allclose(y, want, atol=2e-5)
  np.testing.assert_array_equal(stats["load"][0], load)
  assert load.sum() == cfg.moe.top_k * 12 and float(stats["slots"][0]) == 12  # nothing dropped
  # The bias moves choices; it weighs nothing, and without it others are chosen.
  if cfg.moe.bias:
    other = oracle(cfg, {**p, "expert_bias": 0 * p["expert_bias"]}, x, valid)[1]
    assert (other != load).any()


def test_gradients_are_those_of_the_sum_over_all_experts():
  """Sorting, gathers and their hand-written gradients, against a mixture that computes every expert."""
  cfg, p, x, valid = layer("normalised")
  weight = jnp.asarray(np.random.default_rng(1).standard_normal(x.shape), jnp.float32)

  def dense(p, x):
    experts, w, _ = moe.route((x @ p["router"]["kernel"]).reshape(-1, 6), cfg.moe)
    k = {n: p["experts"][n]["kernel"] for n in ("gate", "up", "down")}
    v = x.reshape(-1, 16)
    h = jax.nn.silu(jnp.einsum("td,edf->tef", v, k["gate"])) * jnp.einsum("td,edf->tef", v, k["up"])
    every = jnp.einsum("tef,efd->ted", h, k["down"])
    share = (jax.nn.one_hot(experts, 6) * w[..., None]).sum(1) * valid.reshape(-1, 1)
    return jnp.einsum("ted,te->td", every, share).reshape(x.shape)

  f = lambda p, x: compiled(cfg)(p, x, valid)[0]
  loss = lambda g: jax.jit(jax.grad(lambda p, x: (g(p, x) * weight).sum(), (0, 1)))(p, x)
  got, want = loss(f), loss(dense)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, want)
  assert float(jnp.abs(want[0]["router"]["kernel"]).max()) > 0.1
  assert not np.asarray(got[1])[0, -2:].any()  # an empty slot gets no gradient from the experts


def test_the_order_of_experts_means_nothing():
  cfg, p, x, valid = layer("normalised")
  want = compiled(cfg)(p, x, valid)[0]
  order = np.random.default_rng(3).permutation(6)
  shuffled = {
    "router": {"kernel": p["router"]["kernel"][:, order]},
    "experts": jax.tree.map(lambda a: a[order], p["experts"]),
  }
  np.testing.assert_allclose(compiled(cfg)(shuffled, x, valid)[0], want, atol=1e-5)
  wrong = {**shuffled, "router": p["router"]}  # negative control
  assert np.abs(np.asarray(compiled(cfg)(wrong, x, valid)[0] - want)).max() > 1e-2


def test_a_wrong_inverse_is_seen(monkeypatch):
  """Negative control: the oracle above notices outputs that come back to the wrong slots."""
  cfg, p, x, valid = layer()
  right = moe.order_by_expert

  def wrong(experts, count):
    order, _, sizes = right(experts, count)
    return order, order, sizes

  monkeypatch.setattr(moe, "order_by_expert", wrong)
  y, _ = compiled.__wrapped__(cfg)(p, x, valid)
  assert np.abs(np.asarray(y) - oracle(cfg, p, x, valid)[0]).max() > 1e-2


def test_one_expert_is_the_dense_mlp():
  cfg, p, x, valid = layer(experts=1, top_k=1)
  valid = jnp.ones_like(valid)
  dense = {n: {"kernel": p["experts"][n]["kernel"][0]} for n in ("gate", "up", "down")}
  want = jax.jit(lambda p, x: Mlp(cfg, 12).apply({"params": p}, x, None))(dense, x)
  np.testing.assert_array_equal(compiled(cfg)(p, x, valid)[0], want)


def test_a_slot_depends_on_no_other_and_on_no_empty_one():
  cfg, p, x, valid = layer("grouped")
  want, stats = compiled(cfg)(p, x, valid)
  noise = jnp.asarray(np.random.default_rng(5).standard_normal(x.shape), jnp.float32)
  alone = compiled(cfg)(p, x.at[:, 1:].set(noise[:, 1:]), valid)[0]  # all other slots elsewhere
  np.testing.assert_allclose(alone[:, 0], want[:, 0], atol=1e-5)
  y, same = compiled(cfg)(p, jnp.where(valid[..., None], x, jnp.nan), valid)
  np.testing.assert_array_equal(np.asarray(y)[valid], np.asarray(want)[valid])
  jax.tree.map(np.testing.assert_array_equal, same, stats)


def test_statistics_are_in_the_order_of_the_layers():
  """Layer i is made to choose expert i; layers 0 and 3 are dense."""
  dense, mixed = dict(mlp="dense"), dict(mlp="moe")
  segments = [dict(pattern=(dense, mixed, mixed), repeats=1), dict(pattern=(dense,), repeats=1)]
  segments += [dict(pattern=(mixed,), repeats=2)]
  model, params = cases.build(
    segments=segments, moe=dict(experts=6, top_k=1, mlp=12, bias=True), remat=dict(preset="full")
  )
  for i, spec in enumerate("dmmdmm"):
    s, r, p = models.layer_path(model.cfg, i)
    if spec == "m":
      mlp = params["stack"][f"s{s}"][f"l{p}"]["mlp"]
      mlp["expert_bias"] = mlp["expert_bias"].at[r].set(10.0 * (jnp.arange(6) == i))
    else:
      assert "router" not in params["stack"][f"s{s}"][f"l{p}"]["mlp"]
  x = cases.inputs(cases.tokens(2, 8))
  x = x.replace(doc=x.doc.at[:, -1].set(-1))
  router = jax.jit(model.apply)(params, x, {}).layers["router"]
  np.testing.assert_array_equal(router["load"], 14 * np.eye(6)[[1, 2, 4, 5]])
  np.testing.assert_array_equal(router["slots"], 14 * np.ones(4))
  np.testing.assert_allclose(np.asarray(router["score"]).sum(1), 14, rtol=1e-5)


@pytest.mark.slow
def test_adapters_of_experts():
  lora = dict(rank=3, targets=r"stack/.*/experts/(gate|down)")
  model, params = cases.build(moe=SOFTMAX, lora=lora, layers=1, **EXPERTS)  # lora_b random, not zero
  site = params["stack"]["s0"]["l0"]["mlp"]["experts"]["down"]
  assert site["lora_a"].shape == (1, 6, 12, 3) and site["lora_b"].shape == (1, 6, 3, 16)
  x = cases.inputs(cases.tokens(2, 8))
  with_adapters = cases.run(model, params, x)
  merged = models.lora.merge(params, model.cfg)
  np.testing.assert_allclose(cases.run(model, merged, x), with_adapters, atol=1e-4)
  base = cases.run(model, models.lora.strip(params), x)
  assert np.abs(np.asarray(base - with_adapters)).max() > 1e-2
  shapes = jax.tree.map(lambda a: a.shape, model.abstract_params())
  assert jax.tree.map(len, shapes, is_leaf=lambda s: isinstance(s, tuple)) == jax.tree.map(
    len, model.logical_axes(), is_leaf=lambda s: isinstance(s, tuple)
  )
  with pytest.raises(ValueError, match="switches them slot by slot"):
    jax.eval_shape(model.apply, params, x.replace(route=jnp.ones_like(x.doc)), {})


@pytest.mark.slow
def test_cached_decoding():
  model, params = cases.build(moe=ROUTINGS["grouped"], **EXPERTS)
  x = cases.inputs(cases.tokens(2, 8), masks={"full": cases.causal(8)})
  want = jax.jit(model.apply)(params, x, {}).layers["hidden"]
  cache, out = model.init_cache(2, 8), []
  for at in (slice(0, 5), slice(5, 8)):
    m = x.masks["full"]
    mask = m.replace(code=m.code[:, at], lo=m.lo[:, :, at], hi=m.hi[:, :, at])
    part = x.replace(ids=x.ids[:, at], pos=x.pos[:, at], doc=x.doc[:, at], masks={"full": mask})
    o = jax.jit(model.apply)(params, part, {}, cache=cache)
    cache = models.write_cache(cache, o.new, jnp.ones(part.doc.shape, bool))
    out.append(o.layers["hidden"])
  np.testing.assert_allclose(jnp.concatenate(out, 1), want, atol=1e-5)


@pytest.mark.slow
def test_bfloat16_routes_as_float32():
  """The router computes in float32 from float32 masters: only its input is rounded."""
  cfg, p, x, valid = layer("normalised")
  exact, stats = compiled(cfg)(p, x.astype(jnp.bfloat16).astype(jnp.float32), valid)
  model = models.build(
    {**cases.BASE, "layers": 1, "moe": ROUTINGS["normalised"], "dtype": "bfloat16", **EXPERTS}
  )
  y, rounded = compiled(model.cfg)(p, x.astype(jnp.bfloat16), valid)
  np.testing.assert_array_equal(rounded["load"], stats["load"])
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=0.05)
  total = lambda p: compiled(model.cfg)(p, x.astype(jnp.bfloat16), valid)[0].astype(jnp.float32).sum()
  grads = jax.jit(jax.grad(total))(p)
  assert all(np.isfinite(g).all() and g.dtype == jnp.float32 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(moe=SOFTMAX), "no layer with mlp='moe'"),
    (dict(EXPERTS), "a layer with mlp='moe'"),
    (dict(EXPERTS, moe=dict(SOFTMAX, top_k=7)), "between 1 and the 6 experts"),
    (dict(EXPERTS, moe=dict(SOFTMAX, groups=4)), "groups=4 must divide experts=6"),
    (dict(EXPERTS, moe=dict(SOFTMAX, groups=6, top_groups=2)), "ranked by its two best"),
    (dict(EXPERTS, moe=SOFTMAX, bias=("up",)), "experts have no biases"),
    (dict(EXPERTS, moe=dict(SOFTMAX, capacity=1.0)), "unknown key of Moe"),
  ],
)
def test_what_cannot_be_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    models.build({**cases.BASE, **fields})


# ---------------------------------------------------------------------------------- on a mesh

needs_8 = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 host devices")


@needs_8
@pytest.mark.parametrize(
  "sizes, implementation, compared",
  [
    (dict(data=2, fsdp=2, tensor=2), "blocks", True),
    pytest.param(dict(data=1, fsdp=4, context=2), "ragged", True, marks=pytest.mark.slow),
    # Two rows on eight devices: they cannot be split over fsdp, so nothing gathers the experts by hand.
    pytest.param(dict(data=2, fsdp=2, tensor=2), "blocks", False, marks=pytest.mark.full),
  ],
  ids=str,
)
def test_the_mesh_changes_nothing(sizes, implementation, compared):
  experts = dict(SOFTMAX, shared=8, experts=4)
  model, params = cases.build(moe=experts, expert_matmul=implementation, vocab=20, layers=1, **EXPERTS)
  ids = cases.tokens(4 if compared else 2, 8, 20)
  x, t = cases.inputs(ids), cases.everywhere(ids)
  x = x.replace(doc=x.doc.at[:, -2:].set(-1))

  def loss(p):
    out = model.apply(p, x, t)
    router = out.layers["router"]
    extra = (router["load"] * router["score"]).sum() + router["z"].sum()
    return out.dists["t"].nll(ids[..., 0]).sum() + extra, router

  f = lambda: jax.jit(jax.value_and_grad(loss, has_aux=True))
  want = f()(params)
  mesh = make_mesh(MeshConfig(**sizes))
  shardings = sharding_tree(mesh, model.logical_axes(), model.abstract_params())
  gate = shardings["stack"]["s0"]["l0"]["mlp"]["experts"]["gate"]["kernel"].spec
  assert gate[1] == "fsdp" and (gate[3] == "tensor") == ("tensor" in sizes)
  with use_mesh(mesh):
    got = f()(jax.device_put(params, shardings))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5, rtol=1e-4), got, want)


@needs_8
@pytest.mark.full
def test_gathered_experts_are_not_kept(monkeypatch):
  """Without remat, a layer more keeps activations, and not its experts gathered; their gradients are
  reduce-scattered, which the negative control does too, but it keeps them."""
  mesh = make_mesh(MeshConfig(data=1, fsdp=8))

  def compile_(layers):
    fields = {**cases.BASE, "vocab": 20, "width": 64, "layers": layers, **EXPERTS}
    model = models.build({**fields, "moe": dict(experts=8, top_k=2, mlp=64)})
    ids = cases.tokens(8, 8, 20)
    x, t = cases.inputs(ids), cases.everywhere(ids)
    shardings = sharding_tree(mesh, model.logical_axes(), model.abstract_params())
    shape = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
    params = jax.tree.map(shape, model.abstract_params(), shardings)
    loss = lambda p: model.apply(p, x, t).dists["t"].nll(ids[..., 0]).sum()
    with use_mesh(mesh):
      return jax.jit(jax.grad(loss), out_shardings=shardings).lower(params).compile()

  def a_layer():
    few, many = compile_(2), compile_(4)
    text = many.as_text()
    assert text.count(" reduce-scatter(") == 3, text.count(" reduce-scatter(")
    return (many.memory_analysis().temp_size_in_bytes - few.memory_analysis().temp_size_in_bytes) / 2

  gathered = 3 * 8 * 64 * 64 * 4
  assert a_layer() < gathered / 4
  everything = jax.checkpoint_policies.everything_saveable
  monkeypatch.setattr(jax.checkpoint_policies, "save_only_these_names", lambda *names: everything)
  assert a_layer() > gathered
