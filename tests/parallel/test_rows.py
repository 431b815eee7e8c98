"""Who reads which rows: pod topologies with tensor and context axes, and global batches."""

import jax
import numpy as np
import pytest

from genmodels.parallel import multihost
from genmodels.parallel.mesh import MeshConfig, make_mesh
from genmodels.parallel.multihost import global_batch, row_ranges
from genmodels.parallel.rules import batch_sharding
from tests.parallel.topologies import chips

MESHES = {
  "v5p:4x4x4": [
    dict(fsdp=16, tensor=2, context=2),
    dict(fsdp=8, tensor=4, context=2),
    dict(fsdp=64),
    dict(data=2, fsdp=8, context=4),
  ],
  "v6e:16x16": [
    dict(fsdp=64, tensor=2, context=2),
    dict(fsdp=16, tensor=4, context=4),
    dict(data=4, fsdp=8, tensor=8),
    dict(fsdp=16, context=16),
  ],
}
CASES = [(t, i) for t, ms in MESHES.items() for i in range(len(ms))]


def check(devices, cfg, batch_factor=2, seq=64):
  """Union of the ranges = the batch; every device finds exactly its rows in its process's rows."""
  mesh = make_mesh(cfg, devices)
  batch = batch_factor * mesh.shape["data"] * mesh.shape["fsdp"]
  sharding = batch_sharding(mesh)
  every = sharding.devices_indices_map((batch, seq))
  processes = {}
  for d in devices:
    processes.setdefault(d.process_index, []).append(d)
  position = {d: i for i, d in np.ndenumerate(mesh.devices)}
  seen = np.zeros(batch, int)
  scattered = 0
  for own in processes.values():
    ranges = row_ranges(sharding, batch, own)
    assert ranges == sorted(ranges) and all(a[1] < b[0] for a, b in zip(ranges, ranges[1:]))
    scattered += len(ranges) > 1
    rows = np.concatenate([np.arange(a, b) for a, b in ranges])
    seen[rows] += 1
    needed = set()
    for d in own:
      data, fsdp, _, context = position[d]
      group = data * mesh.shape["fsdp"] + fsdp
      want = np.arange(group * batch_factor, (group + 1) * batch_factor)
      got = rows[multihost._local(every[d][0], ranges, batch)]
      np.testing.assert_array_equal(got, want)
      columns = seq // mesh.shape["context"]
      assert every[d][1].indices(seq)[:2] == (context * columns, (context + 1) * columns)
      needed |= set(want.tolist())
    assert needed == set(rows.tolist())  # nothing read in vain
  assert (seen > 0).all()
  return seen, scattered, len(processes)


@pytest.mark.parametrize("topology, case", CASES)
def test_every_device_gets_exactly_its_rows(topology, case):
  check(chips(topology), MeshConfig(**{"data": -1, **MESHES[topology][case]}))


def test_the_nth_part_would_be_wrong():
  # Negative control: on these topologies processes hold scattered rows, or share them.
  scattered = shared = 0
  for topology, case in CASES:
    seen, s, _ = check(chips(topology), MeshConfig(**{"data": -1, **MESHES[topology][case]}))
    scattered += s > 0
    shared += seen.max() > 1
  assert scattered and shared


@pytest.mark.aot
@pytest.mark.parametrize("topology", MESHES)
def test_stand_ins_match_libtpu(topology):
  pytest.importorskip("libtpu")
  from jax.experimental import topologies

  real = topologies.get_topology_desc(topology, platform="tpu").devices
  fake = {c.coords: c for c in chips(topology)}
  groups = lambda ds: {
    frozenset(tuple(d.coords) for d in ds if d.process_index == p) for p in {d.process_index for d in ds}
  }
  assert {tuple(d.coords) for d in real} == set(fake)
  assert groups(real) == groups(list(fake.values()))
  for case in MESHES[topology]:
    cfg = MeshConfig(**{"data": -1, **case})
    a, b = make_mesh(cfg, list(real)).devices, make_mesh(cfg, chips(topology)).devices
    assert [tuple(d.coords) for d in a.flat] == [d.coords for d in b.flat]
    check(list(real), cfg)


def test_batch_that_does_not_divide():
  mesh = make_mesh(MeshConfig(data=8), jax.devices()[:8])
  with pytest.raises(ValueError, match="batch of 12 rows"):
    row_ranges(batch_sharding(mesh), 12)


@pytest.mark.parametrize("cfg", [dict(fsdp=2, context=2), dict(tensor=4), dict(data=8)])
def test_global_batch_puts_rows_where_they_belong(cfg):
  mesh = make_mesh(MeshConfig(**{"data": -1, **cfg}), jax.devices()[:8])
  tokens = np.arange(8 * 6, dtype=np.int32).reshape(8, 6)
  rows = {
    "tokens": tokens,
    "rank": np.arange(8 * 3 * 2).reshape(8, 3, 2),
    "side/label": np.arange(24).reshape(8, 3),
  }
  out = global_batch(rows, mesh, 8)
  for name, want in rows.items():
    np.testing.assert_array_equal(np.asarray(out[name]), want)
  assert out["tokens"].sharding.is_equivalent_to(batch_sharding(mesh), 2)
  with pytest.raises(ValueError, match="'tokens' has 4 rows"):
    global_batch({"tokens": tokens[:4]}, mesh, 8)


def test_scattered_ranges_index_the_concatenated_rows():
  ranges = [(4, 8), (16, 20)]
  assert multihost._local(slice(16, 18), ranges, 32) == slice(4, 6)
  assert multihost._local(slice(6, 8), ranges, 32) == slice(2, 4)
  with pytest.raises(ValueError, match="8:10"):
    multihost._local(slice(8, 10), ranges, 32)


@pytest.mark.parametrize(
  "bad",
  [
    dict(processes=2),
    dict(processes=2, coordinator="h:1", process_id=2),
    dict(heartbeat_s=0),
    dict(processes=-1),
  ],
)
def test_distributed_config_is_checked(bad):
  with pytest.raises(ValueError):
    multihost.DistributedConfig(**bad)
