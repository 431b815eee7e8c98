"""Context parallelism through whole training steps: the first losses of one device, whatever the strategy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import step as steps
from genmodels.parallel import rules

from . import systems

STEPS = 3
LONG = "data.seq_len=64"
PLACE = "objective.layout.placement="
WHOLE = "objective.layout.whole_blocks=4"
AXES = dict(fsdp=2, tensor=2, context=2)
CASES = {
  "gather": ([], AXES),
  "ring": (["model.context=ring"], dict(data=2, context=4)),
  "gather zigzag": ([PLACE + "zigzag"], dict(data=2, context=4)),
  "gather zigzag local": ([PLACE + "zigzag", WHOLE], dict(data=2, context=4)),
  "ring zigzag local": ([PLACE + "zigzag", WHOLE, "model.context=ring"], AXES),
  "ring balanced local": ([PLACE + "balanced", "objective.layout.pieces=2", WHOLE, "model.context=ring"], dict(context=8)),
  "gather balanced": ([PLACE + "balanced", "objective.layout.pieces=4"], dict(context=8)),
}  # fmt: skip

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 host devices")


@pytest.fixture(scope="module")
def alone():
  """system → losses of one device."""
  done = {}

  def get(name):
    if name not in done:
      done[name] = systems.bench(systems.build(name, LONG)).run(STEPS)[0]
    return done[name]

  return get


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_one_device(alone, case):
  overrides, mesh = CASES[case]
  parts = systems.build("language/bd3lm", LONG, *overrides)
  bench = systems.bench(parts, **mesh)
  mask = masks_of(bench)["full"]
  assert mask.shards == (mesh["context"] if "zigzag" in case or "balanced" in case else 1)
  assert bool(mask.local) == ("local" in case)
  losses, _ = bench.run(STEPS)
  np.testing.assert_allclose(losses, alone("language/bd3lm"), rtol=1e-5)
  assert len(set(losses)) == STEPS


def masks_of(bench):
  """The masks that a step attends under; shapes only."""
  parts = bench.parts
  with rules.use_mesh(bench.mesh):
    row = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), bench.row(0))
    prepare = lambda row, key: parts.objective.prepare(row, key, jnp.int32(0), parts.latent)[0]
    return jax.eval_shape(prepare, row, jax.random.key(0)).masks


@pytest.mark.slow
@pytest.mark.parametrize("name", ["language/ar", "language/d2f", "language/nbdiff", "language/wedlm"])
def test_other_systems_may_be_placed(alone, name):
  """Shifted heads, a second pass under another mask, a clean boundary, generation order: `read` and targets follow."""
  # A system may leave its layout out of the config: then its kind must be named before its fields can be.
  parts = systems.build(name, LONG, "objective.layout.kind=streams", PLACE + "zigzag")
  bench = systems.bench(parts, data=2, context=4)
  assert all(m.shards == 4 for m in masks_of(bench).values())
  losses, _ = bench.run(STEPS)
  np.testing.assert_allclose(losses, alone(name), rtol=1e-5)


@pytest.mark.slow
def test_the_likelihood_bound_may_be_placed():
  def bound(overrides, **mesh):
    parts = systems.build("language/bd3lm", LONG, *overrides)
    bench = systems.bench(parts, **mesh)
    with rules.use_mesh(bench.mesh):
      trees = bench.fresh().trees

      def f(trees, row, key):
        return parts.objective.bound(steps.bind(parts.fns, trees, None, ""), row, key, 0, 4)

      return jax.block_until_ready(jax.jit(f)(trees, jax.block_until_ready(bench.row(0)), bench.key))

  want, tokens = bound([])
  got, same = bound([PLACE + "zigzag", WHOLE, "model.context=ring"], data=2, context=4)
  np.testing.assert_array_equal(tokens, same)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
