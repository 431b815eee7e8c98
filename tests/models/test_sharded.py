"""The same numbers on one device and on meshes of eight: outputs, gradients, init, cached decoding."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import models
from genmodels.parallel import MeshConfig, make_mesh, sharding_tree, use_mesh

from . import cases

MESHES = [
  (dict(data=2, fsdp=2, tensor=2), "gather"),
  # Two key heads on four tensor shards.
  pytest.param(dict(data=1, fsdp=1, tensor=4, context=2), "gather", marks=pytest.mark.slow),
  pytest.param(dict(data=1, fsdp=1, tensor=4, context=2), "ring", marks=pytest.mark.slow),
]

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 host devices")


def case(**more):
  fields = more | dict(vocab_multiple=4, heads={"text": dict(bias=True, chunk=8)}, norm="layer")
  fields |= dict(adaln="zero", cond={"class": dict(size=4)})
  model, params = cases.build(**fields)
  ids = cases.tokens(4, 16)
  cond = {"class": jnp.arange(8, dtype=jnp.int32).reshape(4, 2) % 4}
  index = jnp.asarray([[0] * 8 + [1] * 7 + [-1]] * 4)
  x = cases.inputs(ids, cond=cond, cond_index=index)
  weight = (jax.random.uniform(jax.random.key(0), (4, 16)) < 0.6).astype(jnp.float32)
  target = cases.everywhere(ids)["t"].replace(weight=weight)
  return model, params, x, {"t": target}


@pytest.mark.compat
@pytest.mark.parametrize("sizes, context", MESHES, ids=str)
def test_loss_and_gradients_do_not_depend_on_the_mesh(sizes, context):
  model, params, x, t = case(context=context)

  def loss(p, x, t):
    out = model.apply(p, x, t).dists["t"]
    sampled = out.sample(jax.random.key(0))
    return out.nll(t["t"].value).sum(), sampled

  f = lambda: jax.jit(jax.value_and_grad(loss, has_aux=True))
  (want, ids), grads = f()(params, x, t)
  mesh = make_mesh(MeshConfig(**sizes))
  shardings = sharding_tree(mesh, model.logical_axes(), model.abstract_params())
  with use_mesh(mesh):
    args = jax.device_put(params, shardings), x, t
    compiled = f().lower(*args).compile()
    (got, ids2), grads2 = compiled(*args)
  # The partitioner's last resort, seen where a gather from a table sharded both ways is left to it.
  lost = re.findall(
    r'(?:collective-permute|all-to-all)\(.*op_name="[^"]*(?:gather|scatter-add)"', compiled.as_text()
  )
  assert not lost, lost
  np.testing.assert_allclose(got, want, rtol=1e-5)
  np.testing.assert_array_equal(ids2, ids)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4), grads2, grads)


def test_init_does_not_depend_on_the_mesh():
  model = models.build({**cases.BASE, "vocab": 20})
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  shardings = sharding_tree(mesh, model.logical_axes(), model.abstract_params())
  want = jax.jit(model.init)(jax.random.key(0))
  got = jax.jit(model.init, out_shardings=shardings)(jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, got, want)
  q = got["stack"]["s0"]["l0"]["attn"]["q"]["kernel"]
  assert q.addressable_shards[0].data.shape == (2, 8, 2, 4)


@pytest.mark.parametrize(
  "sizes",
  [
    dict(data=2, fsdp=2, tensor=2),
    # The slots of a call are split over context, every shard holds the whole cache.
    pytest.param(dict(data=2, tensor=2, context=2), marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_cached_decoding_on_a_mesh(sizes):
  model, params = cases.build(vocab=20)
  x = cases.inputs(cases.tokens(2, 8))  # two rows on four batch shards: rows split as far as they go
  split = lambda at: x.replace(
    ids=x.ids[:, at],
    pos=x.pos[:, at],
    doc=x.doc[:, at],
    masks={
      n: m.replace(code=m.code[:, at], lo=m.lo[:, :, at], hi=m.hi[:, :, at]) for n, m in x.masks.items()
    },
  )

  def decode(params):
    cache, out = model.init_cache(2, 8), []
    for at in (slice(0, 4), slice(4, 8)):
      o = model.apply(params, split(at), {}, cache=cache)
      cache = models.write_cache(cache, o.new, jnp.ones((2, 4), bool))
      out.append(o.layers["hidden"])
    return jnp.concatenate(out, 1)

  want = jax.jit(decode)(params)
  mesh = make_mesh(MeshConfig(**sizes))
  with use_mesh(mesh):
    got = jax.jit(decode)(
      jax.device_put(params, sharding_tree(mesh, model.logical_axes(), model.abstract_params()))
    )
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_map_may_close_over_traced_values_on_a_mesh():
  model, params, x, t = case()

  def f(a, p):
    dist = model.apply(p, x, t).dists["t"]
    teacher = dist.replace(hidden=dist.hidden[:, ::-1] * a)
    return dist.map(lambda z: a * jax.nn.log_softmax(z)[:, 0]).sum() + dist.cross_entropy(teacher).sum()

  want = jax.jit(jax.grad(f))(2.0, params)
  with use_mesh(make_mesh(MeshConfig(data=4, fsdp=1, tensor=2))):
    got = jax.jit(jax.grad(f))(2.0, params)
  np.testing.assert_allclose(got, want, rtol=1e-5)
