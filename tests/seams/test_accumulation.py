"""Micro-batches change nothing: with two terms of own denominators, one step is one step (ARCHITECTURE §8)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import step as steps
from genmodels.contracts import token_row
from genmodels.parallel import rules

from . import systems

# Plain SGD: the parameters move by the gradient itself, and the mean of several steps is the step of the mean.
SGD = ("optim.name=sgd", "optim.b1=0.0", "optim.lr=0.5", "optim.clip_norm=0.0", "optim.weight_decay=0.0")
# One level per document, drawn independently: the number of masked tokens differs from row to row.
NOISE = (
  "objective.corruption.unit=doc",
  "objective.corruption.time=uniform",
  "objective.corruption.blocks.size=4",
)
OVERRIDES = (*SGD, *NOISE, "optim.schedule={'kind':'constant'}")


@pytest.fixture(scope="module")
def whole():
  """The system in one batch: its bench, the state before, the state and metrics after a step."""
  bench = systems.bench(systems.build("language/nbdiff", *OVERRIDES))
  assert set(bench.parts.objective.terms) == {"diffusion", "ar"}
  with rules.use_mesh(bench.mesh):
    start = bench.fresh()
    after, m = bench.step(start, bench.row(0), bench.key)
  return bench, start, after, jax.device_get(m)


def apart(a, b, start):
  """Largest distance of two updates, relative to the largest entry of the update of that leaf."""
  a, b, start = (jax.device_get(s.trees["model"]) for s in (a, b, start))
  moved = jax.tree.map(lambda x, s: np.abs(x - s).max(), b, start)
  return max(jax.tree.leaves(jax.tree.map(lambda x, y, m: np.abs(x - y).max() / (m + 1e-7), a, b, moved)))


@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_parameters_do_not_know_the_micro_batches(whole, count):
  one, start, want, m1 = whole
  bench = systems.bench(one.parts, steps.StepConfig(accumulate=count))
  with rules.use_mesh(bench.mesh):
    got, m = bench.step(start, bench.row(0), bench.key)
  assert apart(got, want, start) < 1e-4
  for name in m1:
    if name not in ("work", "source"):
      np.testing.assert_allclose(m[name], m1[name], rtol=2e-5, err_msg=name)
  jax.tree.map(np.testing.assert_array_equal, m["work"], m1["work"])


def test_dividing_inside_the_micro_batch_is_another_step(whole):
  """The negative control: four quarters, each divided by its own denominators, then averaged."""
  bench, start, want, m1 = whole
  row = bench.row(0)
  with rules.use_mesh(bench.mesh):
    # A quarter is the batch with the other rows emptied: the same compiled step takes it.
    quarter = lambda i: row.replace(doc=jnp.where((jnp.arange(8) % 4 == i)[:, None], row.doc, -1))
    quarters = [bench.step(start, quarter(i), bench.key) for i in range(4)]
  for term in ("diffusion", "ar"):
    assert sum(float(m[f"denominator/{term}"]) for _, m in quarters) == float(m1[f"denominator/{term}"])
  masked = [float(m["denominator/diffusion"]) for _, m in quarters]
  assert max(masked) > 1.2 * min(masked)
  wrong = jax.tree.map(lambda *x: sum(x) / len(x), *[s.trees for s, _ in quarters])
  assert apart(start.replace(trees=wrong), want, start) > 3e-2


def test_micro_batches_leave_rows_on_their_device():
  """Row r goes to micro-batch r mod A: a device's contiguous rows fall into every micro-batch."""
  row = token_row(np.arange(8)[:, None] * np.ones(3))
  np.testing.assert_array_equal(steps.micro_batches(row, 4).tokens[..., 0], [[0, 4], [1, 5], [2, 6], [3, 7]])
  with pytest.raises(ValueError, match="8 is not divisible by train.accumulate 3"):
    steps.micro_batches(row, 3)
