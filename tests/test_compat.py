"""What compat.py promises on every supported jax: Auto axes, shard_map over arrays placed nowhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from genmodels import compat

pytestmark = pytest.mark.compat


def test_meshes_have_auto_axes():
  mesh = compat.make_mesh((2, 2), ("data", "tensor"), jax.devices()[:4])
  assert dict(mesh.shape) == {"data": 2, "tensor": 2}
  assert set(mesh.axis_types) == {AxisType.Auto}


def test_shard_map_takes_unplaced_inputs():
  mesh = compat.make_mesh((4,), ("data",), jax.devices()[:4])
  rows = PartitionSpec("data")
  f = compat.shard_map(lambda x: jax.lax.psum(x, "data"), mesh, rows, PartitionSpec())
  x = jnp.arange(8.0)  # under Explicit axes, jax >= 0.11 refuses it
  np.testing.assert_array_equal(f(x), x.reshape(4, 2).sum(0))
  local = compat.shard_map(lambda x: jax.lax.axis_index("data") + 0 * x, mesh, rows, rows, check=False)
  np.testing.assert_array_equal(local(x), [0, 0, 1, 1, 2, 2, 3, 3])
