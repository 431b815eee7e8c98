"""Saves and restores: every kind of damage is seen and an older step is used; nothing else changes."""

import json
import logging
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from genmodels.checkpoint import manager as manager_lib
from genmodels.checkpoint.manager import CheckpointConfig, Manager, RestoreError, SaveError
from genmodels.parallel.mesh import MeshConfig, make_mesh
from genmodels.state import TrainState, param_paths


def make_state(step, mesh=None):
  rng = np.random.default_rng(step)
  put = lambda x, *spec: (
    jnp.asarray(x) if mesh is None else jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
  )
  params = {
    "w": put(rng.normal(size=(16, 32)).astype(np.float32), "fsdp", "tensor"),
    "b": put(rng.normal(size=(32,)).astype(jnp.bfloat16), "tensor"),
  }
  return TrainState(
    step=put(np.int32(step)),
    trees={"model": params},
    opt={
      "model": (put(rng.integers(0, 9, (8,)).astype(np.int32)), {"mu": put(rng.random((16, 32), np.float32))})
    },
    stats={"seen": put(rng.random(4) < 0.5), "key": put(jax.random.key(step))},
  )


def abstract(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def bits(tree):
  plain = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
  return [np.asarray(plain(x)).tobytes() for x in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A directory with steps 1 and 2; copy it before harming it."""
  directory = tmp_path_factory.mktemp("saved") / "c"
  m = Manager(directory)
  for step in (1, 2):
    m.save(step, make_state(step), {"config": {"lr": 0.1}, "cursor": step})
  m.close()
  return directory


@pytest.fixture
def copy(saved, tmp_path):
  shutil.copytree(saved, tmp_path / "c")
  return tmp_path / "c"


def test_round_trip(saved):
  m = Manager(saved, read_only=True)
  r = m.restore(abstract(make_state(2)))
  assert m.latest() == r.step == 2 and r.meta == {"config": {"lr": 0.1}, "cursor": 2}
  assert bits(r.state) == bits(make_state(2)) and bits(r.state) != bits(make_state(1))
  assert bits(m.restore(abstract(make_state(2)), step=1).state) == bits(make_state(1))
  with pytest.raises(RestoreError, match="no step 9"):
    m.restore(abstract(make_state(2)), step=9)
  with pytest.raises(ValueError, match="reading only"):
    m.save(3, make_state(3))


def test_empty_directory_is_none_and_read_only_creates_nothing(tmp_path):
  m = Manager(tmp_path / "none", read_only=True)
  assert m.latest() is None and m.restore(abstract(make_state(0))) is None
  assert not (tmp_path / "none").exists()
  with pytest.raises(RestoreError, match="no checkpoint"):
    m.read()


def test_onto_other_meshes(saved, tmp_path):
  meshes = [
    make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:8]),
    make_mesh(MeshConfig(fsdp=8), jax.devices()[:8]),
    make_mesh(MeshConfig(tensor=4), jax.devices()[:4]),
  ]
  want = bits(make_state(2))
  directory = saved
  for i, mesh in enumerate(meshes):
    like = abstract(make_state(0, mesh))
    r = Manager(directory, read_only=True).restore(like)
    assert bits(r.state) == want
    assert r.state.trees["model"]["w"].sharding == like.trees["model"]["w"].sharding
    directory = tmp_path / str(i)
    m = Manager(directory)
    m.save(2, r.state)
    m.close()
  a, b = (json.loads(json.loads((d / "2/digests/metadata").read_text())["body"]) for d in (saved, directory))
  assert a == b  # digests know no mesh


def test_a_flipped_bit_in_any_file_never_reaches_the_state(saved, tmp_path, caplog):
  files = sorted(p.relative_to(saved) for p in (saved / "2").rglob("*") if p.is_file() and p.stat().st_size)
  want = {s: bits(make_state(s)) for s in (1, 2)}
  like = abstract(make_state(2))
  fell_back = set()
  for n, file in enumerate(files):
    for k, place in enumerate((0.35, 0.8)):
      directory = tmp_path / f"{n}-{k}"
      shutil.copytree(saved, directory)
      data = bytearray((directory / file).read_bytes())
      data[int(len(data) * place)] ^= 0x10
      (directory / file).write_bytes(data)
      caplog.clear()
      r = Manager(directory).restore(like)
      assert bits(r.state) == want[r.step], file
      if r.step == 1:
        fell_back.add(str(file))
        assert "step 2 is not usable" in caplog.text and "restored step 1" in caplog.text
        assert (directory / "damaged" / "2-0").is_dir()
  assert any("/d/" in f for f in fell_back)
  assert any("digests" in f for f in fell_back) and any("meta/" in f for f in fell_back)


def test_orbax_alone_restores_wrong_data_silently(copy):
  # Negative control, and the reason for the digests.
  good, _, _ = Manager(copy, read_only=True).read(2)
  args = {
    n: ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype) for n, x in good.items()
  }
  args = ocp.args.PyTreeRestore(item=manager_lib.nested(good), restore_args=manager_lib.nested(args))
  silent = 0
  for file in sorted(p for p in (copy / "2" / "state").rglob("*") if p.is_file() and "/d/" in str(p)):
    data = file.read_bytes()
    for at in range(len(data) // 4, len(data), max(1, len(data) // 8)):
      file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
      try:
        got = param_paths(ocp.PyTreeCheckpointHandler().restore(copy / "2" / "state", args=args))
      except Exception:
        continue
      finally:
        file.write_bytes(data)
      silent += any(bits(got[n]) != bits(good[n]) for n in good)
  assert silent


def harm_truncate(d):
  file = max((p for p in (d / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def harm_missing_data(d):
  max((p for p in (d / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size).unlink()


def harm_missing_manifest(d):
  for p in (d / "state").rglob("manifest.ocdbt"):
    p.unlink()


def harm_missing_state(d):
  shutil.rmtree(d / "state")


def harm_missing_meta(d):
  shutil.rmtree(d / "meta")


def harm_meta_edited(d):
  p = d / "meta" / "metadata"
  p.write_text(p.read_text().replace("0.1", "0.2"))


def harm_digest_edited(d):
  p = d / "digests" / "metadata"
  value = json.loads(p.read_text())
  body = json.loads(value["body"])
  body["leaves"]["trees/model/w"]["digest"][0] ^= 1
  p.write_text(json.dumps(manager_lib.verify.seal(body)))


def harm_another_steps_files(d):
  shutil.rmtree(d)
  shutil.copytree(d.parent / "1", d)


def harm_another_steps_state(d):
  shutil.rmtree(d / "state")
  shutil.copytree(d.parent / "1" / "state", d / "state")


HARMS = {k[5:]: v for k, v in globals().items() if k.startswith("harm_")}


@pytest.mark.parametrize("harm", HARMS)
def test_damage_is_named_and_the_older_step_used(harm, copy, caplog):
  HARMS[harm](copy / "2")
  m = Manager(copy)
  assert m.latest() == 2
  r = m.restore(abstract(make_state(2)))
  assert r.step == 1 and bits(r.state) == bits(make_state(1))
  assert "step 2 is not usable" in caplog.text
  if harm == "digest_edited":
    assert "trees/model/w" in caplog.text
  if harm == "another_steps_state":
    assert "leaf " in caplog.text
  m.save(2, make_state(2))  # the number is free again
  m.close()
  assert Manager(copy).restore(abstract(make_state(2))).step == 2


def test_what_orbax_can_do_without_is_still_verified(copy):
  (copy / "2" / "state" / "_METADATA").unlink()
  r = Manager(copy).restore(abstract(make_state(2)))
  assert r.step == 2 and bits(r.state) == bits(make_state(2))


def test_a_step_without_digests_is_no_checkpoint(copy, caplog):
  shutil.rmtree(copy / "2" / "digests")
  m = Manager(copy)
  assert m.latest() == 1 and m.restore(abstract(make_state(2))).step == 1
  assert "no digests" in caplog.text
  assert (copy / "damaged" / "2-0").is_dir()


def test_nothing_left_is_an_error_and_nothing_is_moved(copy):
  for step in "12":
    harm_truncate(copy / step)
  for _ in range(2):  # a second run does not start from scratch either
    with pytest.raises(RestoreError, match="no checkpoint verifies.*step 2.*step 1"):
      Manager(copy).restore(abstract(make_state(2)))
  assert Manager(copy).steps() == [1, 2]


def test_read_only_moves_nothing(copy):
  harm_truncate(copy / "2")
  assert Manager(copy, read_only=True).restore(abstract(make_state(2))).step == 1
  assert Manager(copy).steps() == [1, 2]


def test_another_state_is_an_error_with_names_not_a_reason_to_fall_back(saved):
  m = Manager(saved, read_only=True)
  like = abstract(make_state(2))
  w = like.trees["model"]["w"]
  other = like.replace(
    trees={"model": {"w": jax.ShapeDtypeStruct((16, 64), w.dtype, sharding=w.sharding), "c": w}}
  )
  with pytest.raises(RestoreError) as e:
    m.restore(other)
  for word in (
    "step 2",
    "trees/model/w is float32[16, 32]",
    "float32[16, 64]",
    "trees/model/b",
    "trees/model/c",
  ):
    assert word in str(e.value)


def test_read_by_name(saved):
  mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[:8])
  m = Manager(saved, read_only=True)
  values, step, meta = m.read(
    shardings=lambda name, shape: (
      NamedSharding(mesh, PartitionSpec()) if name.startswith("trees/model/") else None
    )
  )
  assert m.recorded(2)["trees/model/b"]["dtype"] == "bfloat16"
  assert set(values) == {"trees/model/w", "trees/model/b"} and step == 2 and meta["cursor"] == 2
  assert values["trees/model/w"].sharding.mesh == mesh
  np.testing.assert_array_equal(
    np.asarray(values["trees/model/w"]), np.asarray(make_state(2).trees["model"]["w"])
  )


def test_keeps_last_every_and_best(tmp_path):
  m = Manager(tmp_path, CheckpointConfig(keep_last=2, keep_every=4, keep_best=1))
  x = {"x": jnp.zeros(3)}
  for step in range(1, 8):
    m.save(step, x, metric=abs(step - 3))
  m.close()
  assert m.steps() == [3, 4, 6, 7]
  m = Manager(tmp_path, CheckpointConfig(keep_last=2, keep_every=4, keep_best=1))
  m.save(8, x, metric=9.0)  # a new process still knows the best
  m.close()
  assert m.steps() == [3, 4, 7, 8]


def test_the_state_may_be_donated_after_save_returns(tmp_path):
  m = Manager(tmp_path)
  x = jnp.arange(1 << 16, dtype=jnp.float32)
  want = np.asarray(x).tobytes()
  m.save(1, {"x": x})
  jax.jit(lambda x: x * 0, donate_argnums=0)(x).block_until_ready()
  x.is_deleted() or x.delete()
  m.wait()
  like = {"x": jax.ShapeDtypeStruct((1 << 16,), jnp.float32, sharding=jnp.zeros(1).sharding)}
  assert np.asarray(m.restore(like).state["x"]).tobytes() == want


def test_leaves_must_be_arrays(tmp_path):
  with pytest.raises(ValueError, match="step: a int"):
    Manager(tmp_path).save(1, {"step": 3})


def test_a_background_failure_surfaces(tmp_path, monkeypatch):
  m = Manager(tmp_path)
  m.save(1, {"x": jnp.zeros(3)})
  m.wait()

  def full(self, directory):
    raise OSError("no space left on device")

  monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "finalize", full)
  m.save(2, {"x": jnp.zeros(3)})
  with pytest.raises(SaveError, match="no space left"):
    while True:
      m.check()
      time.sleep(0.01)
  monkeypatch.undo()
  assert m.steps() == [1]


def test_a_save_that_hangs_is_an_error_after_the_deadline(tmp_path, monkeypatch):
  real, go = ocp.PyTreeCheckpointHandler.finalize, threading.Event()
  monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "finalize", lambda *a: (go.wait(), real(*a))[1])
  m = Manager(tmp_path, CheckpointConfig(deadline_s=0.2))
  m.save(1, {"x": jnp.zeros(3)})
  m.check()
  with pytest.raises(SaveError, match="step 1 has not finished within 0.2 s"):
    m.wait()
  with pytest.raises(SaveError):
    m.check()
  go.set()
  m._orbax.wait_until_finished()


@pytest.mark.parametrize("bad", [dict(keep_last=1), dict(keep_every=-1), dict(deadline_s=0)])
def test_config_is_checked(bad):
  with pytest.raises(ValueError):
    CheckpointConfig(**bad)


def test_quiet_unless_something_is_wrong(saved, caplog):
  with caplog.at_level(logging.WARNING, "genmodels"):
    Manager(saved, read_only=True).restore(abstract(make_state(2)))
  assert not [r for r in caplog.records if r.name.startswith("genmodels")]
