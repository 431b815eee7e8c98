"""FLOPs of a training step, counted in its jaxpr: what runs, not what a formula says should.

  program = aot.program(cfg, jax.devices()[:1], workdir="runs/plan")
  flops.step(program).total

Every product (dot_general) counts 2·m·n·k times how often it runs: the lengths of the scans around it, so
layers, micro-batches and the recomputation of remat are in. Attention counts by pairs, whatever tiles an
implementation visits: 2 · heads · head size for each visible pair and each product of an attention pass (two
forward, five backward). A loop whose length is data, the output head's over chunks of scored positions, runs
as often as a batch asks. Other kernels count what they tell XLA that they cost. Branches of a `cond` count as
the dearest one, always taken. Elementwise work, norms, softmax and an optimiser without products count
nothing.

Nothing is compiled and no array of the model is made: an 8B step is counted in seconds on a laptop.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import numpy as np
from jax.extend import core

from genmodels import system
from genmodels.models import accounting
from genmodels.parallel import rules

ATTENTION, HEAD = "attention", "head"  # named scopes in models/attend.py and models/heads.py


@dataclasses.dataclass(frozen=True)
class Count:
  """Products of a jaxpr.

  Fields:
    matmul: FLOPs of products outside of attention. head: those of them inside of the output heads' loops.
    passes: products of all attention passes, two of a forward and five of a backward one; times 2 · heads ·
      head size · visible pairs they are FLOPs.
  """

  matmul: float = 0.0
  head: float = 0.0
  passes: float = 0.0

  def __add__(self, other: Count) -> Count:
    return Count(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

  def __mul__(self, times: float) -> Count:
    return Count(*(a * times for a in dataclasses.astuple(self)))


@dataclasses.dataclass(frozen=True)
class Step:
  """FLOPs of one step of the global batch.

  Fields:
    matmul: of products outside of attention; head: the output heads' part of them; attention: by pairs.
    slots, pairs, reads: slots in use, visible pairs and scored positions of the batch.
  """

  matmul: float
  head: float
  attention: float
  slots: int
  pairs: int
  reads: int

  @property
  def total(self) -> float:
    return self.matmul + self.attention


def count(
  jaxpr: core.Jaxpr, trips: Callable[[str], float | None] = lambda scope: None, outer: str = ""
) -> Count:
  """Products of a jaxpr.

  Args:
    trips: name stack of a loop of unknown length → how often it runs, None where it does not know.
    outer: name stack of what calls it.

  Raises:
    ValueError: a loop with products in it whose length nobody knows.
  """
  total = Count()
  for eqn in jaxpr.eqns:
    scope = f"{outer}/{eqn.source_info.name_stack}"
    name = eqn.primitive.name
    if _in(ATTENTION, scope) and name in ("scan", "while", "pallas_call", "dot_general"):
      total += Count(passes=_products(eqn))
    elif name == "dot_general":
      flops = _dot(eqn)
      total += Count(matmul=flops, head=flops if _in(HEAD, scope) else 0.0)
    elif name == "pallas_call" and eqn.params["cost_estimate"] is not None:
      total += Count(matmul=float(eqn.params["cost_estimate"].flops))  # its loops are over data
    else:
      total += _nested(eqn, scope, trips)
  return total


def _nested(eqn, scope, trips) -> Count:
  """What the jaxprs inside of an equation cost, as often as they run."""
  inner = [count(j, trips, scope) for j in _inner(eqn)]
  if not any(c.matmul or c.passes for c in inner):
    return Count()
  name = eqn.primitive.name
  if name == "cond":
    return max(inner, key=lambda c: c.matmul + c.passes)
  times = {"scan": eqn.params.get("length"), "while": trips(scope)}.get(name, 1)
  if times is None:
    raise ValueError(f"a loop with products in it has no known length: {scope}")
  return sum(inner, Count()) * times


def _in(name: str, scope: str) -> bool:
  """Whether a name stack ("transpose(jvp(head))/while/body") passes through a scope."""
  return any(part.rstrip(")").split("(")[-1] == name for part in scope.split("/"))


def _inner(eqn) -> list[core.Jaxpr]:
  """Jaxprs that an equation runs."""
  values = [x for v in eqn.params.values() for x in (v if isinstance(v, tuple | list) else (v,))]
  return [getattr(x, "jaxpr", x) for x in values if isinstance(x, core.ClosedJaxpr | core.Jaxpr)]


def _products(eqn) -> float:
  """Products of one attention pass: each counts once, not as often as tiles are visited."""
  if eqn.primitive.name == "dot_general":
    return 1.0
  inner = [sum(_products(e) for e in j.eqns) for j in _inner(eqn)]
  return max(inner, default=0.0) if eqn.primitive.name == "cond" else sum(inner)


def _dot(eqn) -> float:
  (_, contracted), (_, batch) = eqn.params["dimension_numbers"]
  lhs, rhs = (v.aval.shape for v in eqn.invars)
  return 2.0 * math.prod(lhs) * math.prod(n for i, n in enumerate(rhs) if i not in (*contracted, *batch))


def step(program, row=None) -> Step:
  """FLOPs of a program's training step.

  Args:
    program: of `aot.program`, on one device: FLOPs of the global batch, wherever they are done.
    row: the batch, a Row of arrays, to count pairs and scored positions in; default: the first of the data.
  """
  parts = program.parts
  if program.mesh.size != 1:
    raise ValueError(f"counted on a mesh of {program.mesh.size} devices; build the program for one")
  if len(parts.model.cfg.patterns) > 1:
    raise ValueError(f"layers attend under {parts.model.cfg.patterns}; products are counted for one mask")
  with rules.use_mesh(program.mesh):
    row = system.row_of(parts.data.batch(0)) if row is None else row
    inputs, targets, _ = jax.jit(lambda r, k: parts.objective.prepare(r, k, 0, parts.latent))(
      row, jax.random.key(0)
    )
    pairs = {p: int(np.asarray(m.pairs(), np.int64).sum()) for p, m in inputs.masks.items()}
    reads = {n: int(((t.slot >= 0) & (t.weight != 0)).sum()) for n, t in targets.items()}
    chunk = {n: parts.model.cfg.head(t.head).chunk for n, t in targets.items()}
    chunks = [math.ceil(n / chunk[name]) for name, n in reads.items()]
    traced = jax.make_jaxpr(program.step)(program.state, program.rows(), program.key)
  # Heads of several terms are loops of one body: what matters is how often it runs in all.
  mean = sum(chunks) / max(len(chunks), 1)
  found = count(traced.jaxpr, lambda scope: mean if _in(HEAD, scope) else None)
  sizes = accounting.attention_sizes(parts.model.cfg)
  (pattern,) = parts.model.cfg.patterns
  per_layer = sizes[pattern] / parts.model.cfg.layers
  return Step(
    matmul=found.matmul, head=found.head, attention=2 * per_layer * pairs[pattern] * found.passes,
    slots=int((inputs.doc >= 0).sum()), pairs=pairs[pattern], reads=sum(reads.values()),
  )  # fmt: skip
