"""The state: creation, the abstract form, and placement of everything that follows a parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from genmodels import state


def params():
  # "w" is the end of both paths and of every moment's path: the longest suffix must win.
  return {"w": jnp.ones([4, 6]), "inner": {"w": jnp.ones([6, 4]), "b": jnp.ones([4])}}


def make(p):
  return state.create(
    {"model": p, "ema": p, "table": {"x": p["w"]}}, {"model": optax.adam(1e-3)}, {"n": jnp.zeros([3])}
  )


def mesh():
  return Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def test_create_and_abstract_agree_and_the_players_need_trees():
  concrete, abstract = make(params()), state.abstract(make, params())
  assert concrete.step.dtype == jnp.int32 and int(concrete.step) == 0
  jax.tree.map(
    lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)), concrete, abstract
  )
  with pytest.raises(ValueError, match="player 'critic' trains no tree of .'model'."):
    state.create({"model": params()}, {"critic": optax.sgd(1.0)})


def test_shardings_follow_the_parameters():
  m = mesh()
  spec = {
    "w": PartitionSpec("fsdp", "tensor"),
    "inner": {"w": PartitionSpec("tensor", "fsdp"), "b": PartitionSpec("tensor")},
  }
  placed = jax.tree.map(lambda s: NamedSharding(m, s), spec, is_leaf=lambda x: isinstance(x, PartitionSpec))
  abstract = state.abstract(make, params())
  s = state.shardings(abstract, {"model": placed}, m)
  assert s.trees["model"] == placed and s.trees["ema"] == placed
  adam = s.opt["model"][0]
  assert adam.mu == placed and adam.nu == placed
  whole = NamedSharding(m, PartitionSpec())
  assert (s.step, adam.count, s.stats["n"], s.trees["table"]["x"]) == (whole,) * 4
  attached = state.abstract(make, params(), shardings=s)
  assert attached.opt["model"][0].nu["inner"]["w"].sharding == placed["inner"]["w"]
  born = jax.jit(make, out_shardings=s)(params())
  assert born.opt["model"][0].mu["w"].sharding.spec == spec["w"]


def test_step_key_depends_on_seed_and_step_alone():
  bits = lambda seed, step: jax.random.bits(state.step_key(seed, jnp.int32(step))).item()
  assert bits(0, 3) == bits(0, 3) and len({bits(0, 3), bits(0, 4), bits(1, 3)}) == 3


def test_param_paths_are_slash_joined_in_flattening_order():
  assert list(state.param_paths(params())) == ["inner/b", "inner/w", "w"]
