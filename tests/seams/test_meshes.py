"""One process, one to eight devices, every mesh axis: the same gradients and the same first 20 losses (T11)."""

import jax
import numpy as np
import pytest

from genmodels import step as steps
from genmodels.parallel import rules

from . import systems

STEPS = 20
MESHES = {
  "2 data": dict(data=2),
  "2 fsdp": dict(fsdp=2),
  "2 tensor": dict(tensor=2),
  "2 context": dict(context=2),
  "4 data fsdp": dict(data=2, fsdp=2),
  "4 fsdp tensor": dict(fsdp=2, tensor=2),
  "8 data": dict(data=8),
  "8 fsdp": dict(fsdp=8),
  "8 data fsdp tensor": dict(data=2, fsdp=2, tensor=2),
  "8 fsdp tensor context": dict(fsdp=2, tensor=2, context=2),
}
# `make test` takes one mesh with three axes, `make test-all` every one.
FAST = [("language/bd3lm", "8 data fsdp tensor")]
ALL = [(name, mesh) for name in ("language/bd3lm", "language/ar") for mesh in MESHES]
# Heads and adapters with a frozen trunk: `make test-full`.
DRAFTS = [(name, "8 fsdp tensor context") for name in ("language/mtp", "language/hydra", "language/dflash")]

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 host devices")


@pytest.fixture(scope="module")
def alone():
  """system → (losses, states, bench) on one device, run once each."""
  done = {}

  def get(name):
    if name not in done:
      bench = systems.bench(systems.build(name))
      done[name] = (*bench.run(STEPS), bench)
    return done[name]

  return get


@pytest.mark.parametrize(
  "name, mesh",
  [c if c in FAST else pytest.param(*c, marks=pytest.mark.slow) for c in ALL]
  + [pytest.param(*c, marks=pytest.mark.full) for c in DRAFTS],
)
def test_losses_and_gradients_do_not_know_the_mesh(alone, name, mesh):
  want, (first, _), _ = alone(name)
  bench = systems.bench(systems.build(name), **MESHES[mesh])
  assert bench.mesh.size == int(mesh[0])
  losses, (one, _) = bench.run(STEPS)
  np.testing.assert_allclose(losses, want, rtol=1e-5)
  assert len(set(want)) == STEPS  # every step saw another batch and other parameters
  # Adam's first moment after one step is (1 − b1) times the clipped gradient.
  for a, b in zip(moments(one), moments(first)):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(np.abs(b).max(), 1e-3 * scale(first)))


def moments(state) -> list[np.ndarray]:
  """The leaves of the first moment."""
  mu = [
    s.mu for s in jax.tree.leaves(state.opt["model"], is_leaf=lambda x: hasattr(x, "mu")) if hasattr(s, "mu")
  ]
  assert len(mu) == 1
  return [np.asarray(x) for x in jax.tree.leaves(mu[0])]


def scale(state) -> float:
  return max(float(np.abs(x).max()) for x in moments(state))


def test_a_row_read_twice_is_seen(alone):
  """The negative control: one device with its neighbour's row moves the loss by far more than the tolerance."""
  want, _, bench = alone("language/bd3lm")
  at = np.array([0, 0, 2, 3, 4, 5, 6, 7])
  with rules.use_mesh(bench.mesh):
    _, m = bench.step(bench.fresh(), jax.tree.map(lambda x: x[at], bench.row(0)), bench.key)
  assert abs(float(m["loss"]) / want[0] - 1) > 1e-4


@pytest.mark.slow
def test_micro_batches_on_a_mesh(alone):
  """Accumulation and sharding together: the same losses again."""
  want, _, _ = alone("language/bd3lm")
  parts = systems.build("language/bd3lm")
  losses, _ = systems.bench(parts, steps.StepConfig(accumulate=2), data=2, fsdp=2).run(3)
  np.testing.assert_allclose(losses, want[:3], rtol=1e-5)
