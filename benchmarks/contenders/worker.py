"""A process that holds one framework's half of the benchmark: inputs, reference, contenders, timing.

The parent asks (`serve`), one request at a time, so only one framework has work on the device. A contender
that raises loses its own cell; for one that takes the process down the parent starts another.

Legend: B rows · S slots · H query heads · Hk key heads · G = H / Hk · D head size · c queries of a chunk.
"""

from __future__ import annotations

import importlib
import time
import traceback

import numpy as np

from benchmarks.contenders.cases import Case

SETS = 3  # input sets in rotation: together larger than the L2 cache
QUANTITIES = ("fwd", "bwd", "both")
LIMIT = 1e-2  # relative error of a cell that counts
RESULTS = ("out", "dq", "dk", "dv")


class Unsupported(Exception):
  """Why a contender is not run on a case: not installed, or not made for it."""


class Contender:
  """A contender prepared for a case.

  Attributes:
    has_backward: whether bwd and both exist.
    build_ms: making the mask or plan of one step, None if there is none.
    executed: pairs of the tiles that are computed, per head, summed over rows; None if unknown.
    memory: bytes of temporaries and outputs of both, beyond the inputs.
  """

  has_backward = True
  build_ms: float | None = None
  executed: float | None = None
  memory: float | None = None

  def run(self, what: str, at: int):
    """Starts one call of "fwd", "bwd" or "both" on input set `at`; returns what to wait for."""
    raise NotImplementedError

  def results(self, at: int):
    """(out, dq, dk, dv), or (out,) without a backward pass, written into memory that held NaN."""
    raise NotImplementedError


class Side:
  """One framework. Subclasses name the device arrays, the contenders and the versions.

  Args:
    device: "gpu" or "cpu".
  """

  xp = None  # the framework's array functions

  def __init__(self, device: str):
    self.device = device
    self.case, self.inputs, self.reference, self.prepared = None, None, None, {}

  # What a framework provides.

  def put(self, x, dtype=None):
    """A NumPy array on the device, in the type of the benchmark unless one is given."""
    raise NotImplementedError

  def wait(self, x=None) -> None:
    """Returns when x, or everything that was started, is done."""
    raise NotImplementedError

  def make(self, name: str, case: Case) -> Contender:
    raise NotImplementedError

  def versions(self) -> dict:
    raise NotImplementedError

  def ceilings(self) -> dict:
    """{"gemm_tflops", "copy_gb_s"}: an 8192³ product of random bf16 matrices, a copy (read + write)."""
    raise NotImplementedError

  def numpy(self, x):
    raise NotImplementedError

  def same(self, a, b) -> bool:
    """Whether two device arrays hold the same bits."""
    raise NotImplementedError

  # What the parent asks.

  def load(self, case: Case) -> dict:
    """Makes the tensors of a case, the same in every framework, and their float32 reference.

    Returns:
      pairs: visible pairs per head, summed over rows.
      norms: of the reference's results, in which frameworks must agree.
    """
    self.drop()
    self.case = case
    rng = np.random.default_rng(0)
    heads = case.heads, case.key_heads, case.key_heads, case.heads
    first = [rng.standard_normal((case.rows, case.slots, h, case.head_dim), np.float32) for h in heads]
    # The other sets are the first one rolled along the row: as random, and cheap to make.
    self.inputs = [[self.put(np.roll(x, n * 7, 1)) for x in first] for n in range(SETS)]
    self.reference, pairs = self._reference(case, self.inputs[0])
    return {"pairs": pairs, "norms": [float(np.linalg.norm(x)) for x in self.reference]}

  def prepare(self, name: str) -> dict:
    """Builds a contender for the loaded case and checks its numbers.

    Returns:
      {"error": {result: relative error}, "ok", "build_ms", "executed", "memory", "backward"}, or
      {"skipped": reason}.
    """
    try:
      made = self.make(name, self.case)
    except Unsupported as e:
      return {"skipped": str(e)}
    got = [self.numpy(x).astype(np.float32) for x in made.results(0)]
    error = {}
    for key, a, b in zip(RESULTS, got, self.reference):
      distance = float(np.linalg.norm(a - b) / np.linalg.norm(b))
      error[key] = distance if np.isfinite(distance) else float("inf")
    self.prepared[name] = made
    return {
      "error": error,
      "ok": max(error.values()) <= LIMIT,
      "build_ms": made.build_ms,
      "executed": made.executed,
      "memory": made.memory,
      "backward": made.has_backward,
    }

  def ensure(self, name: str) -> None:
    """Prepares a contender again, after this process was started anew."""
    if name not in self.prepared:
      self.prepared[name] = self.make(name, self.case)

  def repeats(self, name: str, count: int) -> int:
    """How many of `count` runs over poisoned outputs give other bits than the first."""
    made = self.prepared[name]
    first = made.results(0)
    again = (made.results(0) for _ in range(count))
    return sum(not all(self.same(a, b) for a, b in zip(x, first)) for x in again)

  def time(self, name: str, what: str, calls: int) -> tuple[float, float]:
    """(seconds a call, share of them that the host needed) of back-to-back calls over rotating inputs."""
    made = self.prepared[name]
    self.wait()
    start = time.perf_counter()
    for n in range(calls):
      last = made.run(what, n % SETS)
    queued = time.perf_counter()
    self.wait(last)
    end = time.perf_counter()
    return (end - start) / calls, (queued - start) / (end - start)

  def drop(self) -> None:
    """Frees a case and its contenders."""
    self.case = self.inputs = self.reference = None
    self.prepared = {}

  def timed_build(self, build, count: int = 5) -> float:
    """Median milliseconds of a mask or plan, after a first one."""
    self.wait(build())
    spent = []
    for _ in range(count):
      start = time.perf_counter()
      self.wait(build())
      spent.append((time.perf_counter() - start) * 1e3)
    return float(np.median(spent))

  def _reference(self, case: Case, inputs):
    """((out, dq, dk, dv) in float32, pairs): the definition, a few queries at a time."""
    xp, G = self.xp, case.heads // case.key_heads
    B, S, D = case.rows, case.slots, case.head_dim
    q, k, v, d_out = (self.put(x, "float32") for x in inputs)
    q, d_out = (x.reshape(B, S, case.key_heads, G, D) for x in (q, d_out))
    tables = {name: self.put(t, "int32") for name, t in case.tables().items()}
    rows = self.put(np.arange(case.mask_rows), "int32")[:, None, None]
    j = self.put(np.arange(S), "int32")[None, None]
    scale, pairs, out, dq, dk, dv = D**-0.5, 0, [], [], 0, 0
    chunk = max(1, min(S, int(2**29 / (B * case.heads * S))))
    for start in range(0, S, chunk):
      at = slice(start, start + chunk)
      i = self.put(np.arange(S)[at], "int32")[None, :, None]
      seen = case.visible(tables, rows, i, j)
      pairs += int(seen.sum()) * (B // case.mask_rows)
      seen = seen[:, None, None]
      s = xp.einsum("bihgd,bjhd->bhgij", q[:, at], k) * scale
      s = xp.where(seen, s, -1e30)
      p = xp.exp(s - xp.amax(s, -1)[..., None]) * seen
      p = p / p.sum(-1)[..., None]
      o = xp.einsum("bhgij,bjhd->bihgd", p, v)
      g = d_out[:, at]
      dp = xp.einsum("bihgd,bjhd->bhgij", g, v)
      delta = (o * g).sum(-1)  # [B, c, Hk, G]
      ds = p * (dp - xp.einsum("bihg->bhgi", delta)[..., None]) * scale
      out.append(o.reshape(B, -1, case.heads, D))
      dq.append(xp.einsum("bhgij,bjhd->bihgd", ds, k).reshape(B, -1, case.heads, D))
      dk = dk + xp.einsum("bhgij,bihgd->bjhd", ds, q[:, at])
      dv = dv + xp.einsum("bhgij,bihgd->bjhd", p, g)
    whole = lambda x: np.concatenate([self.numpy(y) for y in x], 1)
    return [whole(out), whole(dq), self.numpy(dk), self.numpy(dv)], pairs


def serve(connection, module: str, device: str) -> None:
  """Answers (method, arguments) with ("ok", value) or ("error", message) until the pipe closes."""
  side = None
  while True:
    try:
      method, args = connection.recv()
    except EOFError:
      return
    try:
      if side is None:
        side = importlib.import_module(module).make(device)
      connection.send(("ok", getattr(side, method)(*args)))
    except Exception as e:
      last = traceback.extract_tb(e.__traceback__)[-1]
      text = f"{type(e).__name__}: {e}".strip()
      connection.send(("error", f"{text[:600]} [{last.name}, line {last.lineno}]"))
