"""Where a state comes from, and the surgery on the way: order, coverage, rows, norms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from genmodels import state as states
from genmodels.checkpoint import init, surgery
from genmodels.checkpoint.manager import Manager, RestoreError
from genmodels.config import ConfigError
from genmodels.parallel.mesh import MeshConfig, make_mesh
from genmodels.parallel.rules import sharding_tree

AXES = {
  "embed": {"tokens": ("vocab", "embed")},
  "head": {"kernel": ("embed", "vocab"), "bias": ("vocab",)},
  "norm": (None,),
}
TX = optax.adam(1e-3)


def params(seed, vocab=16, width=8):
  rng = np.random.default_rng(seed)
  f = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)
  return {
    "embed": {"tokens": f(vocab, width)},
    "head": {"kernel": f(width, vocab), "bias": f(vocab)},
    "norm": f(width),
  }


class System:
  """A run's `make` and abstract state, as the training loop builds them."""

  def __init__(self, seed, vocab=16, ema=False, mesh=None, tx=TX):
    def make():
      trees = {"model": params(seed, vocab)}
      if ema:
        trees["ema"] = params(seed + 100, vocab)
      return states.create(trees, {"model": tx}, {})

    shapes = jax.eval_shape(make)
    mesh = mesh or make_mesh(MeshConfig(data=1), jax.devices()[:1])
    placed = states.shardings(shapes, {"model": sharding_tree(mesh, AXES, shapes.trees["model"])}, mesh)
    self.make = jax.jit(make, out_shardings=placed)
    self.rebuild = jax.jit(lambda trees: states.create(trees, {"model": tx}, {}), out_shardings=placed)
    self.abstract = states.abstract(make, shardings=placed)

  def start(self, workdir, section=None, **kw):
    return init.initialise(
      Manager(workdir / init.CHECKPOINTS), self.abstract, self.make, section, axes=AXES, **kw
    )


def equal(a, b):
  return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """A workdir whose state has moved on: step 5, model of seed 1, ema of seed 101."""
  workdir = tmp_path_factory.mktemp("source")
  s = System(1, ema=True).make()
  m = Manager(workdir / init.CHECKPOINTS)
  m.save(5, s.replace(step=s.step + 5, opt=jax.tree.map(lambda x: x + 1, s.opt)))
  m.close()
  return workdir


def test_checkpoints_are_merged(tmp_path):
  """The mean over steps of one run, leaf by leaf; a step that is not there is refused."""
  m = Manager(tmp_path / "run" / init.CHECKPOINTS)
  for step in (2, 4, 7):
    s = System(step).make()
    m.save(step, s.replace(step=s.step + step))
  m.close()
  recipe = {"kind": "workdir", "path": str(tmp_path / "run"), "step": 7, "average": (2, 4)}
  merged, line = System(1).start(tmp_path / "own", recipe)
  want = jax.tree.map(lambda *x: sum(x) / 3, *(params(n) for n in (2, 4, 7)))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged.trees["model"], want)
  assert not equal(merged.trees["model"], params(7)) and "step 7 averaged with 2, 4" in line
  with pytest.raises(RestoreError, match="no checkpoint of step 3"):
    System(1).start(tmp_path / "other", recipe | {"average": (2, 3)})
  for wrong in ({"step": -1}, {"average": (7,)}, {"average": (2, 2)}):
    with pytest.raises(ConfigError, match="different steps"):
      System(1).start(tmp_path / "other", recipe | wrong)


def test_networks_beside_come_from_elsewhere(source, tmp_path):
  """A recipe of its own for each network; leaves that were loaded from nowhere are named to `rebuild`."""
  shapes = jax.eval_shape(lambda: params(0))
  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  make = lambda: states.create({"model": params(2), "other": params(3)}, {"model": TX}, {})
  abstract = jax.eval_shape(make)
  axes = sharding_tree(mesh, AXES, shapes)
  placed = states.shardings(abstract, {"model": axes, "other": axes}, mesh)
  begun = jax.jit(make, out_shardings=placed)
  told = []

  def rebuild(trees, fresh=None):
    told.append(fresh)
    return begun().replace(trees=trees)

  def start(folder, **recipe):
    section = {"kind": "workdir", "path": str(source), **recipe}
    manager = Manager(tmp_path / folder / init.CHECKPOINTS)
    options = dict(axes=AXES, others={"other": AXES}, rebuild=rebuild)
    return init.initialise(manager, states.abstract(make, shardings=placed), begun, section, **options)

  beside = {"other": {"path": str(source), "tree": "ema"}}
  s, line = start("a", beside=beside)
  assert equal(s.trees["model"], params(1)) and equal(s.trees["other"], params(101)) and told == [None]
  assert f"other from 'ema' of {source}, step 5" in line
  s, _ = start("b", scratch=("head/.*",), drop=("head/.*",), beside=beside)
  assert told[1] == {"model": {"head/kernel", "head/bias"}} and equal(s.trees["other"], params(101))
  assert equal(s.trees["model"]["head"], params(2)["head"]) and equal(
    s.trees["model"]["norm"], params(1)["norm"]
  )
  mask = {"other": {"path": str(source), "mask_row": "mean_noise", "mask_id": 3}}
  s, _ = start("c", beside=mask)  # surgery by the network's own axes
  assert not equal(s.trees["other"], params(1)) and equal(s.trees["other"]["norm"], params(1)["norm"])
  with pytest.raises(ConfigError, match="third"):
    start("d", beside={"third": {"path": str(source)}})


def test_order(source, tmp_path):
  run = System(2, ema=True)
  recipe = {"kind": "workdir", "path": str(source)}
  fresh, line = run.start(tmp_path)
  assert line == "from scratch" and equal(fresh.trees["model"], params(2))
  loaded, line = run.start(tmp_path, recipe)
  assert "model, ema from 'model' of" in line and str(source) in line and int(loaded.step) == 0
  assert equal(loaded.trees["model"], params(1)) and equal(loaded.trees["ema"], params(1))
  assert equal(loaded.opt, fresh.opt)
  resumed, line = run.start(tmp_path, {"kind": "resume", "path": str(source)})
  assert line.startswith("resuming") and int(resumed.step) == 5 and equal(resumed.trees["ema"], params(101))
  assert not equal(resumed.opt, fresh.opt)
  m = Manager(tmp_path / init.CHECKPOINTS)  # once the run has saved, its own workdir wins over everything
  m.save(7, loaded.replace(step=loaded.step + 7))
  m.close()
  for section in (None, recipe, {"kind": "resume", "path": str(source)}):
    own, line = run.start(tmp_path, section, steps=7)
    assert int(own.step) == 7 and line.startswith("continuing") and "complete" in line
    assert ("does not apply" in line) == (section is not None)


def test_what_no_shape_shows_is_named(source, tmp_path):
  """Another RoPE base fits every leaf: the line says so, for a run that goes on and for one that begins."""
  saved = {"model": {"rope": {"base": 1e4}, "axes": (1, 2)}, "optim": {"lr": 1.0}}
  now = {"model": {"rope": {"base": 5e5}, "axes": (1, 2)}, "optim": {"lr": 2.0}}
  run = System(2, ema=True)
  m = Manager(tmp_path / "a" / init.CHECKPOINTS)
  m.save(3, run.make(), meta={"config": saved})
  m.close()
  model, all_of_it = "model.rope.base 10000.0 → 500000.0", "optim.lr 1.0 → 2.0"
  section = {"path": str(tmp_path / "a")}
  _, line = run.start(tmp_path / "a", cfg=now)
  assert line.endswith(f"step 3; changed since: {model}, {all_of_it}")
  _, line = run.start(tmp_path / "b", {"kind": "resume", **section}, cfg=now)
  assert line.endswith(f"; changed since: {model}, {all_of_it}")
  _, line = run.start(tmp_path / "c", {"kind": "workdir", **section}, cfg=now)
  assert line.endswith(f"; changed since: {model}")  # another optimizer is what one begins anew for
  many = {"model": {"rope": {"base": 1e4}, "axes": (1, 2)}, "optim": {str(i): i for i in range(20)}}
  _, line = run.start(tmp_path / "a", cfg=many)
  assert line.count("→") == 8 and line.endswith("and 13 more")
  for same in (saved, None):  # controls: nothing to say, nothing known
    _, line = run.start(tmp_path / "a", cfg=same)
    assert "changed" not in line
  _, line = run.start(tmp_path / "d", {"kind": "resume", "path": str(source)}, cfg=now)
  assert "changed" not in line


def test_ema_as_source_explicit_targets_and_errors(source, tmp_path):
  run = System(2, ema=True)
  s, _ = run.start(tmp_path, {"kind": "workdir", "path": str(source), "tree": "ema", "to": ("model",)})
  assert equal(s.trees["model"], params(101)) and equal(s.trees["ema"], params(102))
  cases = [
    ({"tree": "teacher"}, RestoreError, "'teacher'.*model"),
    ({"to": ("teacher",)}, ConfigError, "teacher"),
    ({"step": 4}, RestoreError, "step 4"),
    ({"path": str(tmp_path / "no")}, RestoreError, "holds no checkpoint"),
    ({"pth": "x"}, ConfigError, "pth"),
    ({"mask_row": "zero"}, ConfigError, "mask_row"),
    ({"mask_row": "reserved", "mask_id": 3}, ConfigError, "reserved_id"),
  ]
  for extra, error, words in cases:
    with pytest.raises(error, match=words):
      run.start(tmp_path, {"kind": "workdir", "path": str(source), **extra})


def test_both_trees_have_their_own_buffers(source, tmp_path):
  s, _ = System(2, ema=True).start(tmp_path, {"kind": "workdir", "path": str(source)})
  jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(s)  # donating twice would raise


def test_optimizer_state_that_copies_the_parameters_needs_rebuild(source, tmp_path):
  run = System(2, tx=optax.contrib.schedule_free_sgd(1e-2))
  recipe = {"kind": "workdir", "path": str(source)}
  with pytest.raises(ValueError, match="rebuild"):
    run.start(tmp_path, recipe)
  s, _ = run.start(tmp_path, recipe, rebuild=run.rebuild)
  assert equal(s.opt["model"].z, params(1))


@pytest.mark.parametrize("cfg", [dict(fsdp=4, tensor=2), dict(tensor=4)])
@pytest.mark.parametrize("vocab", [24, 8])
def test_vocabulary_resize_and_mask_row_on_a_mesh(source, tmp_path, cfg, vocab):
  run = System(2, vocab=vocab, mesh=make_mesh(MeshConfig(**{"data": -1, **cfg}), jax.devices()[:8]))
  recipe = {"kind": "workdir", "path": str(source)}
  with pytest.raises(RestoreError, match="resize_vocab"):
    run.start(tmp_path, recipe)
  plain, _ = run.start(tmp_path, recipe | {"resize_vocab": True})
  old, new, keep = params(1), params(2, vocab), min(vocab, 16)
  want = np.concatenate([old["embed"]["tokens"][:keep], new["embed"]["tokens"][keep:]])
  np.testing.assert_array_equal(plain.trees["model"]["embed"]["tokens"], want)
  want = np.concatenate([old["head"]["kernel"][:, :keep], new["head"]["kernel"][:, keep:]], 1)
  np.testing.assert_array_equal(plain.trees["model"]["head"]["kernel"], want)
  mask = vocab - 1
  s, line = run.start(tmp_path, recipe | {"resize_vocab": True, "mask_row": "mean_noise", "mask_id": mask})
  assert "mask row" in line
  got, ref = (
    np.asarray(s.trees["model"]["embed"]["tokens"]),
    np.asarray(plain.trees["model"]["embed"]["tokens"]),
  )
  np.testing.assert_array_equal(got[:mask], ref[:mask])
  assert not np.array_equal(got[mask], ref[mask])
  assert (
    s.trees["model"]["embed"]["tokens"].sharding == run.abstract.trees["model"]["embed"]["tokens"].sharding
  )


def test_load_tree(source):
  run = System(2)
  tree, step = init.load_tree(str(source), "ema", run.abstract.trees["model"])
  assert step == 5 and equal(tree, params(101))


# ------------------------------------------------------------------------------------------- surgery


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
@pytest.mark.parametrize("kind", ["reserved", "mean_noise"])
def test_mask_row_norm_is_near_the_median(kind, scale):  # T27
  rng = np.random.default_rng(0)
  table = rng.normal(size=(64, 32)).astype(np.float32) * np.linspace(0.5, 2, 64)[:, None].astype(np.float32)
  table[7] *= scale  # the reserved row: nearly zero, ordinary, far too large
  table[60:] = 0  # padding
  out = np.asarray(surgery.set_mask_row(jnp.asarray(table), 0, 9, kind, jax.random.key(0), reserved_id=7))
  norms = np.linalg.norm(table, axis=1)
  median = np.median(norms[norms > 0])
  assert 0.5 * median * 0.999 <= np.linalg.norm(out[9]) <= 2 * median * 1.001
  np.testing.assert_array_equal(np.delete(out, 9, 0), np.delete(table, 9, 0))
  if kind == "reserved":
    cosine = out[9] @ table[7] / np.linalg.norm(out[9]) / np.linalg.norm(table[7])
    assert cosine > 0.999
    if scale == 1.0:
      np.testing.assert_allclose(out[9], table[7], rtol=1e-5)
    else:  # negative control: the plain copy is out of the range
      assert not 0.5 * median <= norms[7] <= 2 * median


def test_mask_row_of_zeros_columns_and_biases():
  table = np.ones((4, 6), np.float32)
  table[:, 2] = 0
  out = np.asarray(
    surgery.set_mask_row(jnp.asarray(table), 1, 5, "reserved", jax.random.key(0), reserved_id=2)
  )
  assert np.isfinite(out).all() and np.linalg.norm(out[:, 5]) > 0.5
  bias = surgery.set_mask_row(jnp.arange(5.0), 0, 4, "mean_noise", jax.random.key(0))
  np.testing.assert_allclose(bias, [0, 1, 2, 3, 1.5])
  for kw in (dict(mask_id=6), dict(mask_id=1, reserved_id=9)):
    with pytest.raises(ValueError, match="not a row"):
      surgery.set_mask_row(
        jnp.asarray(table), 1, kind="reserved", key=jax.random.key(0), **{"reserved_id": 0, **kw}
      )


def test_coverage_is_strict_and_readable():
  target, source = ["a/w", "a/b", "new/w"], ["old/w", "old/b", "extra"]
  rename = ((r"a/(.*)", r"old/\1"),)
  full = surgery.cover(target, source, rename, scratch=("new/.*",), drop=("extra",))
  assert full == {"a/w": "old/w", "a/b": "old/b"}
  cases = [
    (dict(rename=rename, drop=("extra",)), "no source for: new/w"),
    (dict(rename=rename, scratch=("new/.*",)), "not used: extra"),
    (dict(scratch=("new/.*",), drop=("extra",)), r"no source for: a/b, a/w.*not used: old/b, old/w"),
    (dict(rename=rename, scratch=("new/.*", "nothing"), drop=("extra",)), "'nothing' matches no leaf"),
    (dict(rename=rename, scratch=("new/.*",), drop=("extra", "old/w")), "in `drop` but used: old/w"),
  ]
  for kw, words in cases:
    with pytest.raises(surgery.CoverageError, match=words):
      surgery.cover(target, source, **kw)
