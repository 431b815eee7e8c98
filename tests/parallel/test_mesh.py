"""Meshes, the rule table, constraints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from genmodels.parallel import mesh as mesh_lib
from genmodels.parallel import rules as rules_lib
from genmodels.parallel.mesh import MeshConfig, make_mesh
from genmodels.parallel.rules import Rules, constrain, current_mesh, sharding_tree, use_mesh
from tests.parallel.topologies import chips


@pytest.fixture(scope="module", autouse=True)
def eight_devices():
  assert jax.device_count() >= 8, "run with XLA_FLAGS=--xla_force_host_platform_device_count=8"


@pytest.mark.compat
def test_axes_and_types():
  mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:8])
  assert mesh.axis_names == ("data", "fsdp", "tensor", "context")
  assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2, "context": 1}
  assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
  "cfg, words",
  [
    (dict(fsdp=3), ["fsdp=3", "8 devices"]),
    (dict(data=2, tensor=2), ["data=2", "tensor=2", "8", "mesh.data=-1"]),
    (dict(data=8, dcn_data=3), ["dcn_data=3", "data=8"]),
  ],
)
def test_size_errors_name_axis_sizes_devices_and_fix(cfg, words):
  with pytest.raises(ValueError) as e:
    make_mesh(MeshConfig(**cfg), jax.devices()[:8])
  for word in words:
    assert word in str(e.value)


@pytest.mark.parametrize("cfg", [dict(data=0), dict(data=-1, fsdp=-1), dict(tensor=-2), dict(dcn_data=0)])
def test_config_is_checked_alone(cfg):
  with pytest.raises(ValueError):
    MeshConfig(**cfg)


def test_tensor_axis_lies_on_neighbours_of_the_torus():
  mesh = make_mesh(MeshConfig(fsdp=16, tensor=4), chips("v5p:4x4x4"))
  for i in range(16):
    row = [d.coords for d in mesh.devices[0, i, :, 0]]
    varying = [k for k in range(3) if len({c[k] for c in row}) > 1]
    assert len(varying) == 1, row  # one physical ring


def test_slices_go_on_the_data_axis():
  devices = chips("v5p:4x4x4", slices=2)
  mesh = make_mesh(MeshConfig(fsdp=64, dcn_data=2), devices)
  assert [{d.slice_index for d in mesh.devices[i].flat} for i in range(2)] == [{0}, {1}]
  with pytest.raises(ValueError, match="dcn_data=2"):
    make_mesh(MeshConfig(fsdp=64), devices)
  with pytest.raises(ValueError, match="dcn_data=1"):
    make_mesh(MeshConfig(dcn_data=2), chips("v6e:4x4")[:4])


AXES = {"wq": ("embed", "heads", "head_dim"), "wk": ("embed", "kv_heads", "head_dim"), "norm": (None,)}


def shapes(heads=4, kv=2):
  s = lambda *x: jax.ShapeDtypeStruct(x, jnp.float32)
  return {"wq": s(8, heads, 4), "wk": s(8, kv, 4), "norm": s(8)}


def test_rules_give_the_expected_specs():
  mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:8])
  tree = sharding_tree(mesh, AXES, shapes())
  assert tree["wq"].spec == PartitionSpec("fsdp", "tensor", None)
  assert tree["norm"].spec == PartitionSpec(None)
  x = jax.device_put(np.zeros((8, 4, 4)), tree["wq"])
  assert x.addressable_shards[0].data.shape == (4, 2, 4)


def test_a_rule_that_does_not_divide_is_an_error_with_names():
  mesh = make_mesh(MeshConfig(data=2, tensor=4), jax.devices()[:8])
  with pytest.raises(ValueError) as e:
    sharding_tree(mesh, {"layer": AXES}, {"layer": shapes(heads=6, kv=4)})
  for word in ("layer/wq", "heads", "6", "tensor=4", "replicate"):
    assert word in str(e.value)


def test_only_declared_rules_are_dropped_and_they_are_listed():
  mesh = make_mesh(MeshConfig(data=2, tensor=4), jax.devices()[:8])
  dropped = []
  tree = sharding_tree(mesh, AXES, shapes(kv=2), dropped=dropped)
  assert tree["wk"].spec == PartitionSpec(None, None, None) and len(dropped) == 1 and "wk" in dropped[0]
  with pytest.raises(ValueError, match="kv_heads"):
    sharding_tree(mesh, AXES, shapes(kv=2), rules=Rules(replicate=()))


def test_structural_errors():
  mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[:8])
  s = jax.ShapeDtypeStruct((8, 8), jnp.float32)
  with pytest.raises(ValueError, match="has no rule"):
    sharding_tree(mesh, {"a": ("embed", "width")}, {"a": s})
  with pytest.raises(ValueError, match="both map to mesh axis 'fsdp'"):
    sharding_tree(mesh, {"a": ("embed", "embed")}, {"a": s})
  with pytest.raises(ValueError, match="dimensions"):
    sharding_tree(mesh, {"a": ("embed",)}, {"a": s})
  with pytest.raises(ValueError, match="no logical axes"):
    sharding_tree(mesh, {"b": ("embed", None)}, {"a": s})


@pytest.mark.compat
def test_constrain_follows_the_current_mesh():
  assert current_mesh() is None
  traces = []

  @jax.jit
  def f(x):
    traces.append(1)
    return constrain(x * 2, ("batch", "seq", "act_embed"))

  x = jnp.ones((4, 8, 3))
  f(x)
  a = make_mesh(MeshConfig(fsdp=2, context=2, data=2), jax.devices()[:8])
  b = make_mesh(MeshConfig(data=4), jax.devices()[:4])
  for mesh, shard in ((a, (1, 4, 3)), (b, (1, 8, 3))):
    with use_mesh(mesh):
      assert current_mesh() is mesh
      y = f(jax.device_put(x, rules_lib.replicated(mesh)))
      assert y.addressable_shards[0].data.shape == shard
      assert jnp.zeros(3).sharding.device_set == {jax.devices()[0]}  # eager arrays stay local
  assert len(traces) == 3  # no mesh, a, b: never a stale constraint
  assert current_mesh() is None


def test_constrain_skips_what_does_not_fit_and_manual_axes():
  mesh = make_mesh(MeshConfig(data=4, context=2), jax.devices()[:8])
  with use_mesh(mesh):
    y = jax.jit(lambda x: constrain(x, ("batch", "seq")))(
      jax.device_put(jnp.ones((3, 4)), rules_lib.replicated(mesh))
    )
    assert y.shape == (3, 4)
    inner = lambda x: constrain(x, ("batch", "seq"))
    g = jax.shard_map(inner, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"))
    assert jax.jit(g)(jnp.ones((4, 4))).shape == (4, 4)
    with pytest.raises(ValueError, match="shape"):
      constrain(jnp.ones((4, 4)), ("batch",))


def test_mesh_axes_are_named_once():
  assert set(mesh_lib._BY_NETWORK_USE) == set(mesh_lib.AXES)
