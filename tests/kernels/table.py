"""The acceptance table of interval attention: factors, cases, tensors, the comparison with the oracle.

A case is a program (everything that compiles anew: shapes, types, tiles, soft-cap) and its data: the mask
of each of two batch elements, and what is hidden. Masks are data, so few programs serve all cases.

Legend: B = 2 rows · L queries · Lk keys · H query heads · Hk key heads · G = H / Hk · D head size · T intervals.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import kernels
from genmodels.masks import CODE_HIDDEN, AttnMask
from tests.kernels import pairwise
from tests.kernels.test_attention import _pulled, dense_attention
from tests.masks import oracles

PROGRAM = {
  "head_dim": (64, 128, 256),
  "group": (1, 4, 8),
  "soft_cap": ("off", "on"),
  "length": ("aligned", "ragged"),  # whole tiles, or a last tile that sticks out
  "ratio": ("Lq=Lk", "Lq<Lk", "Lq>Lk"),
  "dtype": ("wide", "narrow"),  # of the implementation: float32 and bfloat16, or bfloat16 and float16
  "tiles": ("square", "oblong"),
}
DATA = {
  "hidden": ("padding", "queries", "element"),  # nothing more; some queries see nothing; a row sees nothing
  "mask": tuple(oracles.CASES),
}
FACTORS = {**PROGRAM, **DATA}
TERMS = 2  # all builders need at most two intervals
HEADS = {1: (2, 2), 4: (8, 2), 8: (8, 1)}  # G -> (H, Hk)


@functools.cache
def programs() -> list[dict]:
  """Programs in which all pairs of their own factors meet."""
  return pairwise.cover(pairwise.product(PROGRAM), pairwise.required(PROGRAM))


@functools.cache
def cases() -> list[dict]:
  """The table: every mask meets every value of every other factor, and these meet each other."""
  # A row that sees nothing leaves room for one mask only.
  alone = lambda pair: 9 if ("hidden", "element") in pair and any(name == "mask" for name, _ in pair) else 1
  return pairwise.cover(_candidates(), pairwise.required(FACTORS), weight=alone)


@functools.cache
def short_cases() -> list[dict]:
  """Every program, every mask and every kind of hidden keys once; for an implementation that is slow to run."""
  goals = {("program", i) for i in range(len(programs()))}
  goals |= {(name, value) for name, values in DATA.items() for value in values}

  def reached(case):
    index = programs().index({name: case[name] for name in PROGRAM})
    return {("program", index), ("hidden", case["hidden"]), *(("mask", m) for m in case["mask"])}

  return pairwise.cover(_candidates(), goals, reached)


def _candidates():
  couples = list(itertools.combinations(DATA["mask"], 2))
  single = [(m,) for m in DATA["mask"]]  # beside a row that sees nothing
  return [
    {**p, "hidden": hidden, "mask": masks}
    for p in programs()
    for hidden in DATA["hidden"]
    for masks in (single if hidden == "element" else couples)
  ]


def label(case) -> str:
  """One line of the table, without the masks if the case has none."""
  program = (
    f"D={case['head_dim']:<3} G={case['group']} cap={case['soft_cap']:<3} {case['dtype']:<6} "
    f"{case['ratio']} {case['length']:<7} {case['tiles']:<6}"
  )
  return program + (f" {case['hidden']:<7} {' + '.join(case['mask'])}" if "mask" in case else "")


@dataclasses.dataclass(frozen=True)
class Side:
  """How one implementation is run: its sizes, types, tiles.

  Attributes:
    lengths: {"aligned" | "ragged": (long, short)}; a length is at least 32.
    dtypes: {"wide" | "narrow": dtype}.
    tiles: {"square" | "oblong": tiles}.
    target: what the kernels are built for; None for this machine.
    heads: {G: (H, Hk)}.
  """

  lengths: Any
  dtypes: Any
  tiles: Any
  target: kernels.Target | None = None
  heads: Any = dataclasses.field(default_factory=lambda: HEADS)

  def shape(self, case) -> tuple[int, int, int, int, int]:
    """(Lq, Lk, H, Hk, D)."""
    long, short = self.lengths[case["length"]]
    lq, lk = {"Lq=Lk": (long, long), "Lq<Lk": (short, long), "Lq>Lk": (long, short)}[case["ratio"]]
    return lq, lk, *self.heads[case["group"]], case["head_dim"]


def hopper() -> kernels.Target:
  """Mosaic GPU kernels in jax's interpreter; skips a test where jax has none."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  if not hasattr(plgpu, "InterpretGPUParams"):
    pytest.skip(f"jax {jax.__version__}: Mosaic GPU kernels need jax >= 0.11; `make test-compat` runs them")
  # The interpreter imports this at its first kernel. It defines a jax setting, and a new setting makes jit
  # trace everything once more, which would look like a mask that recompiles.
  from jax.experimental.pallas import tpu  # noqa: F401

  return kernels.Target("gpu", "NVIDIA H200", interpret=plgpu.InterpretGPUParams())


@functools.cache
def mask_of(name: str, length: int, seed: int) -> tuple[AttnMask, np.ndarray]:
  """(encoding with B = 2 rows, bool[2, length, length] from the paper's definition), padded to `length`."""
  streams = oracles.CASES[name][1]
  r = oracles.rows(seed, length // len(streams) if streams else length - 4)
  mask, seen = oracles.CASES[name][0](r), oracles.dense(name, r)
  pad = length - seen.shape[1]
  lo, hi = (np.pad(np.asarray(x), ((0, 0), (0, TERMS - x.shape[1]), (0, pad))) for x in (mask.lo, mask.hi))
  code = np.pad(np.asarray(mask.code), ((0, 0), (0, pad)), constant_values=CODE_HIDDEN)
  return AttnMask(code, lo, hi), np.pad(seen, ((0, 0), (0, pad), (0, pad)))


def data_of(names, hidden: str, lq: int, lk: int, seed: int) -> tuple[AttnMask, np.ndarray]:
  """(encoding, bool[rows, Lq, Lk]): row b has the mask names[b].

  Fewer queries than keys, or keys than queries, are a random choice of slots in their order: codes and bounds
  belong to slots, so any choice is a mask. `hidden`: see DATA; the row that sees nothing is the last one.
  """
  rng = np.random.default_rng(seed)
  length = max(lq, lk)
  rows = [
    (mask, dense, (b + seed) % 2) for b, (mask, dense) in enumerate(mask_of(n, length, seed) for n in names)
  ]
  queries, keys = (np.sort(rng.choice(length, n, replace=False)) for n in (lq, lk))
  code = np.stack([m.code[r] for m, _, r in rows])[:, keys]
  lo, hi = (np.stack([getattr(m, x)[r] for m, _, r in rows])[..., queries] for x in ("lo", "hi"))
  seen = np.stack([dense[r] for _, dense, r in rows])[:, queries][:, :, keys]
  if hidden == "queries":
    gone = rng.random((len(names), lq)) < 0.25
    gone[:, lq // 3 : lq // 2] = True  # runs as well as single ones
    lo, hi = (np.where(gone[:, None], 0, x) for x in (lo, hi))
    seen &= ~gone[..., None]
  if hidden == "element":
    code[-1], seen[-1] = CODE_HIDDEN, False
  return AttnMask(code, lo, hi), seen


@functools.cache
def tensors(shape, dtype, rows: int = 2):
  """q, k, v, d_out in `dtype`, d_lse float32."""
  lq, lk, H, Hk, D = shape
  rng = np.random.default_rng(0)
  shapes = (rows, lq, H, D), (rows, lk, Hk, D), (rows, lk, Hk, D), (rows, lq, H, D), (rows, H, lq)
  *main, d_lse = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes)
  return (*(x.astype(dtype) for x in main), d_lse)


def settings(case) -> tuple[float, float | None]:
  """scale, soft_cap: logits of a few units, which a cap of two bends visibly."""
  return case["head_dim"] ** -0.5 * 1.25, 2.0 if case["soft_cap"] == "on" else None


@functools.cache
def oracle(scale, soft_cap):
  """Jitted (tensors, seen) -> out, lse, dq, dk, dv, dense in float32."""

  @jax.jit
  def dense(tensors, seen):
    return _pulled(lambda q, k, v: dense_attention(q, k, v, seen, scale, soft_cap), *tensors)

  return dense


def kernel(implementation: str, side: Side, case):
  """(jitted (tensors, mask) -> out, lse, dq, dk, dv, list that grows with every trace)."""
  scale, soft_cap = settings(case)
  traces = []

  @jax.jit
  def ours(tensors, mask):
    traces.append(1)

    def attend(q, k, v):
      return kernels.attention(
        q, k, v, kernels.plan(mask, side.tiles[case["tiles"]], implementation), scale=scale,
        soft_cap=soft_cap, return_lse=True, implementation=implementation,
      )  # fmt: skip

    return _pulled(attend, *tensors)

  return ours, traces


def errors(got, want) -> dict[str, float]:
  """Largest relative error (Frobenius) over the batch elements of each result; inf where it must be exact.

  Exact are: where the LSE is −inf, and zeros of a batch element that is all zero. NaN counts as inf.
  """
  out = {}
  for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want):
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    worst = 0.0
    if name == "lse":
      empty = np.isneginf(b)
      worst = 0.0 if (np.isneginf(a) == empty).all() else np.inf
      a, b = np.where(empty, 0, a), np.where(empty, 0, b)
    for x, y in zip(a, b):
      size, distance = np.linalg.norm(y), np.linalg.norm(x - y)
      if not np.isfinite(distance) or (size == 0 and distance > 0):
        worst = np.inf
      elif size:
        worst = max(worst, float(distance / size))
    out[name] = worst
  return out


def limits(dtype) -> dict[str, float]:
  """Allowed relative errors: the LSE comes from float32 logits of exact products, whatever the inputs."""
  if dtype == jnp.float32:
    return {"out": 2e-6, "lse": 2e-6, "dq": 5e-6, "dk": 5e-6, "dv": 5e-6}
  return {"out": 5e-3, "lse": 1e-3, "dq": 1e-2, "dk": 1e-2, "dv": 1e-2}
