"""What the TPU attention kernels would cost, from the compiler's schedules. No TPU is run.

  python benchmarks/attention_tpu.py --out attention_tpu.json    every chip and mask
  python benchmarks/attention_tpu.py --quick                     two chips, the deciding mask and its anchor

libtpu compiles the kernels for each chip and says how many instruction bundles the body of a tile has; a
bundle is issued in a cycle if nothing stalls. The tile lists of the real mask say how many tiles of which
kind there are. Together:

  ms = (sum over entries of bundles + lines · bundles outside bodies + entries · step) / clock

`step` is what a grid step costs beside its body. It is not known (0.35 us is a rule of thumb), so every time
is given without and with it. DMA that is not hidden is not in it: `memory` is the time that the bytes of all
blocks take at full HBM bandwidth, and where it is larger than the time of the bundles it is what counts.
Splash is jax's own kernel with the same tiles, compiled alike: a static mask evaluated in the kernel or
stored (the cheaper of the two), tiles that the mask leaves empty at the cost of a step; documents go by
segment ids, which skip nothing and are not charged for. Times are of a whole device: v5p has two cores and
splits the heads.

Legend: D head size · H query heads · Hk key heads · full and partial: tiles without and with the mask.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tile lists are built on this machine, once each: compiling them takes longer than running them.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.contenders import cases as all_cases
from genmodels import kernels
from genmodels.aot import attention, schedule, topology
from genmodels.kernels import tiles as tile_lists

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
WIDE = ("v6e", "tpu7x")  # 256-wide matrix units, which a head of 128 half fills
STEP = 0.35e-6  # seconds of a grid step beside its body; a rule of thumb
FLOPS = {"fwd": 4, "bwd": 10}  # per visible pair and unit of D
SHORT = {"fwd": attention.FWD, "dq": attention.DQ, "dkv": attention.DKV}
SPLASH = {
  "fwd": "splash_mha_fwd_residuals",
  "dq": "splash_mha_dq_no_residuals",
  "dkv": "splash_mha_dkv_no_residuals",
}
# tokamax Splash on Ironwood, causal, H = 32, Hk = 8, tuned (openxla/tokamax, splash microbenchmarks,
# 2025-11): MFU by head size and direction at these lengths; None: not published.
LENGTHS = (4096, 8192, 32768, 131072)
PUBLISHED = {
  (128, "fwd"): (20.6, 24.9, 30.9, 34.3), (256, "fwd"): (35.8, 44.9, 56.8, 63.4),
  (128, "bwd"): (25.0, None, None, 37.2), (256, "bwd"): (48.0, None, None, 71.7),
}  # fmt: skip


# ------------------------------------------------------------------------------- what the masks need


@dataclasses.dataclass(frozen=True)
class Entries:
  """Of one kernel and one pass over the query heads of a row (for dkv: the key heads).

  Attributes:
    full, partial: tiles worked off in a straight line, without and with the mask.
    parts: tiles' parts worked off alone, by part.
    skipped: tiles that are visited part by part.
    lines: of the list; each is begun and ended once. empty: lines without a tile.
  """

  full: int
  partial: int
  parts: tuple[int, ...]
  skipped: int
  lines: int
  empty: int

  @property
  def steps(self) -> int:
    return self.full + self.partial + self.skipped + self.empty


def entries(lists, rows: int) -> Entries:
  """Counts the entries of a plan's lists of one kernel over `rows` rows of the batch that they serve."""
  total = np.zeros(5, int)
  parts = np.zeros(lists[0].layout.parts, int)
  for one in lists:
    entry = one.entry[0, : int(one.count[0])]
    seen = np.asarray(one.layout.parts_of(entry))
    full, every = np.asarray(one.layout.is_full(entry)), seen == 2 ** len(parts) - 1
    alone = seen[~every & (seen > 0)]
    last = np.asarray(one.layout.is_last(entry))
    total += [x.sum() for x in (full, every & ~full, seen > 0, last, seen == 0)]
    parts += [int(((alone >> c) & 1).sum()) for c in range(len(parts))]
  full, partial, some, lines, empty = (int(x) * rows for x in total)
  return Entries(full, partial, tuple(int(p) * rows for p in parts), some - full - partial, lines, empty)


@dataclasses.dataclass(frozen=True)
class Work:
  """A case on a chip: tiles, entries of our kernels, active tiles of Splash, visible pairs.

  Attributes:
    pairs: visible pairs of all rows, one head.
    splash: by kernel, (active tiles, grid steps, lines) of one head over all rows.
  """

  case: all_cases.Case
  chip: topology.Chip
  tiles: dict[str, tuple[int, int, int]]
  entries: dict[str, Entries]
  pairs: int
  splash: dict[str, tuple[int, int, int]]


@functools.cache
def _mask(case: all_cases.Case):
  return jax.jit(case.encode)(case.doc())


_SAME_TILES: dict[tuple, str] = {}  # the first chip that asked


@functools.cache
def _counted(case: all_cases.Case, kind: str, sizes: tuple) -> tuple[dict, dict, int]:
  """Entries of our kernels, active tiles of Splash, visible pairs; chips with the same tiles share them."""
  mask, rows = _mask(case), case.rows // case.mask_rows
  with kernels.building_for(kernels.Target("tpu", kind)):
    plan = jax.jit(lambda m: kernels.plan(m, None, "pallas_tpu"))(mask)
  code, lo, hi = (np.asarray(x) for x in (mask.code, mask.lo, mask.hi))
  pairs = sum(_pairs(*row) for row in zip(code, lo, hi)) * rows
  unpacked = _mask(dataclasses.replace(case, documents=0))
  splash = {n: _splash_tiles(unpacked, size, n == "dkv", case.rows) for n, size in zip(SHORT, sizes)}
  return {n: entries(getattr(plan, n), rows) for n in SHORT}, splash, pairs


def work(case: all_cases.Case, name: str) -> Work:
  """Tile lists of a case with the default tiles of a chip."""
  chip = topology.chip(name)
  mask = jax.eval_shape(case.encode, jax.ShapeDtypeStruct(case.doc().shape, jnp.int32))
  with kernels.building_for(kernels.Target("tpu", chip.kind)):
    tiles = jax.eval_shape(lambda m: kernels.plan(m, None, "pallas_tpu"), mask).tiles
  sizes = tuple(tuple(getattr(tiles, n)) for n in SHORT)
  bare = dataclasses.replace(case, name="", heads=1, key_heads=1, head_dim=1)
  found, splash, pairs = _counted(bare, _SAME_TILES.setdefault((bare, sizes), chip.kind), sizes)
  return Work(case, chip, dict(zip(SHORT, sizes)), found, pairs, splash)


def _pairs(code, lo, hi) -> int:
  """Visible pairs of one mask row: code [Lk], lo and hi [T, Lq]."""
  order = np.sort(code)
  some = lo < hi
  count = np.searchsorted(order, hi) - np.searchsorted(order, lo)
  return int(np.where(some, count, 0).sum())


def _splash_tiles(mask, size, by_key: bool, rows: int) -> tuple[int, int, int]:
  """Active tiles, grid steps (as wide as the longest line) and lines of a static mask."""
  q, k, _ = size
  pad = lambda x, n, value: jnp.pad(
    x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % n)], constant_values=value
  )
  code, lo, hi = pad(mask.code, k, -(2**30)), pad(mask.lo, q, 0), pad(mask.hi, q, 0)
  active, _ = tile_lists.classify(code, lo, hi, tile_lists.Tiles(q, k))
  some = np.asarray(active.any(2))[0]
  some = some.T if by_key else some
  longest = int(some.sum(1).max())
  return int(some.sum()) * rows, longest * len(some) * rows, len(some) * rows


# ---------------------------------------------------------------------------------- what tiles cost


def splash_program(*, mask: str, fwd, bwd, head_dim: int, length: int, heads: int = 2):
  """jax's Splash attention with its gradients.

  Args:
    mask: "causal", "full", "bd3" (blocks of 32, evaluated in the kernel), "bd3-stored" (its tiles in memory).
  """
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  shape, n, shift = (length, length), length // 2 >> 5, 5  # blocks of 32

  def bd3(i, j):
    where = np.where if isinstance(i, np.ndarray) else jnp.where
    bi, bj = i >> shift, j >> shift
    return (bi == bj) | ((bj >= n) & (bj < bi + where(bi < n, n, 0)))

  class InKernel(masks._ComputableMask):
    def __init__(self):
      super().__init__(shape, bd3)

    def __eq__(self, other):
      return isinstance(other, InKernel)

    def __hash__(self):
      return hash(shape)

  at = np.arange(length)
  made = {
    "causal": lambda: masks.CausalMask(shape),
    "full": lambda: masks.FullMask(shape),
    "bd3": InKernel,
    "bd3-stored": lambda: masks.NumpyMask(bd3(at[:, None], at[None, :])),
  }[mask]()
  sizes = kernel.BlockSizes(
    **dict(zip(("block_q", "block_kv", "block_kv_compute"), fwd)),
    **dict(zip(("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"), bwd)),
    **dict(zip(("block_q_dq", "block_kv_dq"), bwd)),
  )
  call = kernel.make_splash_mha_single_device(masks.MultiHeadMask([made] * heads), block_sizes=sizes)
  array = jax.ShapeDtypeStruct((heads, length, head_dim), jnp.bfloat16)

  def run(q, k, v, d_out):
    out, pull = jax.vjp(call, q, k, v)
    return out, pull(d_out)

  return run, (array,) * 4


def our_job(w: Work) -> schedule.Job:
  """A case in full size: heads, rows, lengths, lists with room for the worst mask of its shape."""
  c = w.case
  names = ("q", "k", "k_compute")
  given = dict(zip(names, w.tiles["fwd"])) | {"dq": list(w.tiles["dq"]), "dkv": list(w.tiles["dkv"])}
  arguments = dict(
    rows=c.rows, heads=c.heads, key_heads=c.key_heads, head_dim=c.head_dim, lengths=[c.slots, c.slots],
    terms=int(_mask(c).lo.shape[1]), shared=c.mask_rows == 1, tiles=given, plan_inside=True,
  )  # fmt: skip
  return schedule.Job(TOPOLOGIES[w.chip.name], "genmodels.aot.attention:program", arguments)


def splash_job(chip: str, mask: str, fwd, bwd, head_dim: int) -> schedule.Job:
  # As short as the mask allows: bodies do not depend on the length.
  length = 4 * max(*fwd, *bwd)
  arguments = dict(mask=mask, fwd=list(fwd), bwd=list(bwd), head_dim=head_dim, length=length)
  return schedule.Job(TOPOLOGIES[chip], "benchmarks.attention_tpu:splash_program", arguments)


def group(w: Work) -> tuple:
  """Cases of one group share bodies."""
  return w.chip.name, w.case.head_dim, w.tiles["fwd"], w.tiles["dq"], w.tiles["dkv"]


SPLASH_MASKS = {
  "causal": ("causal",),
  "full": ("full",),
  "bd3": ("bd3", "bd3-stored"),
  "context_causal": ("bd3",),
}


# --------------------------------------------------------------------------------------- predictions


def cycles(e: Entries, tile: attention.Tile) -> float:
  inside = e.full * tile.full + e.partial * tile.partial + sum(a * b for a, b in zip(e.parts, tile.parts))
  return inside + e.lines * tile.rest


def predict(w: Work, tiles: dict[str, attention.Tile]) -> dict:
  """Milliseconds of a device without and with the step, HBM milliseconds, useful FLOP/s, by direction."""
  c, chip, clock = w.case, w.chip, w.chip.clock
  heads = {"fwd": c.heads, "dq": c.heads, "dkv": c.heads}
  out = {}
  for direction, names in (("fwd", ("fwd",)), ("bwd", ("dq", "dkv"))):
    # A dkv list is walked once for each query head: G times for each key head.
    bare = sum(heads[n] * cycles(w.entries[n], tiles[n]) for n in names) / clock / chip.cores
    steps = sum(heads[n] * w.entries[n].steps for n in names) / chip.cores
    memory = sum(_bytes(w, n) for n in names) / (chip.hbm_rate * chip.cores)
    out[direction] = _outcome(w, direction, bare, steps, memory)
  return out


def predict_splash(w: Work, made: list[schedule.Compiled]) -> dict | None:
  """As `predict`, of the cheapest of Splash's programs for each kernel."""
  made = [m for m in made if m.error is None]
  if not made:
    return None
  chip, out = w.chip, {}
  for direction, names in (("fwd", ("fwd",)), ("bwd", ("dq", "dkv"))):
    bare = steps = 0
    for n in names:
      active, walked, lines = w.splash[n]
      found = [m.kernel(SPLASH[n]) for m in made]
      bodies = [(sum(b.bundles for b in k.bodies), k.bundles) for k in found]
      bare += min(active * b + lines * (total - b) for b, total in bodies)
      steps += walked
    scale = w.case.heads / chip.cores
    out[direction] = _outcome(w, direction, bare * scale / chip.clock, steps * scale, 0.0)
  return out


def _outcome(w: Work, direction: str, bare: float, steps: float, memory: float) -> dict:
  flops = FLOPS[direction] * w.case.head_dim * w.pairs * w.case.heads
  slow = max(bare + steps * STEP, memory)
  return {
    "ms": [1e3 * max(bare, memory), 1e3 * slow],
    "memory_ms": 1e3 * memory,
    "tflops": [flops / max(bare, memory) / 1e12, flops / slow / 1e12],
    "mfu": [flops / t / (w.chip.flops * w.chip.cores) for t in (max(bare, memory), slow)],
  }


def _bytes(w: Work, name: str) -> float:
  """HBM bytes of a kernel over all heads: blocks that follow an entry, blocks that follow a line."""
  c, e, (q, k, _) = w.case, w.entries[name], w.tiles[name]
  D, group = c.head_dim, c.heads // c.key_heads
  keys, queries = 2 * k * D * 2 + 4 * k, 2 * q * D * 2 + 2 * 4 * q
  if name == "fwd":
    return c.heads * (e.steps * keys + e.lines * (queries + 2 * 4 * q))
  if name == "dq":
    return c.heads * (e.steps * keys + e.lines * (3 * q * D * 2 + 4 * 4 * q))
  return c.key_heads * (e.steps * group * (queries + 2 * 4 * q) + e.lines * 2 * keys)


def validation(costs: dict) -> list[dict]:
  """The model on causal attention of Ironwood beside what was published for tokamax's tuned Splash."""
  out = []
  for head_dim in (128, 256):
    for length, at in zip(LENGTHS, range(len(LENGTHS))):
      case = all_cases.Case(f"causal-{length}", "causal", 1, length, 32, 8, head_dim)
      w = work(case, "tpu7x")
      if group(w) not in costs:
        continue
      tiles, splash = costs[group(w)]["tiles"], costs[group(w)]["splash"].get("causal", [])
      ours, theirs = predict(w, tiles), predict_splash(w, splash)
      for direction in FLOPS:
        out.append({
          "length": length, "head_dim": head_dim, "direction": direction,
          "published_mfu": PUBLISHED[head_dim, direction][at],
          "ours_mfu": [100 * x for x in ours[direction]["mfu"]],
          "splash_mfu": theirs and [100 * x for x in theirs[direction]["mfu"]],
        })  # fmt: skip
  return out


# -------------------------------------------------------------------------------------------- tables


def table(
  quick: bool = False,
  out: str | None = None,
  workers: int = 2,
  each: bool = False,
  chips: tuple[str, ...] = (),
) -> dict:
  """Compiles, predicts, prints, and writes one JSON.

  Args:
    quick: two masks, two chips. out: path of the JSON. chips: these alone. each: compile every case in its
      own shape, not only the largest of those that share tiles.

  Returns:
    What the JSON holds.
  """
  if reason := topology.missing():
    raise SystemExit(f"attention_tpu: {reason}")
  chips = chips or (("v5e", "v6e") if quick else tuple(TOPOLOGIES))
  base = [c for c in (all_cases.quick() if quick else all_cases.full()) if c.heads == c.key_heads]
  works = [work(c, chip) for chip in chips for c in base]
  if not quick:
    halves = [dataclasses.replace(c, head_dim=256, heads=c.heads // 2, key_heads=c.heads // 2) for c in base]
    works += [work(c, chip) for chip in chips if chip in WIDE for c in halves]
  if "tpu7x" in chips:
    long = [all_cases.Case("causal-128k", "causal", 1, LENGTHS[-1], 32, 8, d) for d in (128, 256)]
    works += [work(c, "tpu7x") for c in long]
  groups: dict[tuple, list[Work]] = {}
  for w in works:
    groups.setdefault(group(w), []).append(w)
  jobs: dict[tuple, schedule.Job] = {}
  for key, members in groups.items():
    largest = max(members, key=lambda w: w.case.rows * w.case.slots * w.case.heads)
    for w in members if each else [largest]:
      jobs["ours", key, w.case.name] = our_job(w)
    chip, head_dim, fwd, dq, dkv = key
    for mask in sorted({m for w in members for m in SPLASH_MASKS.get(w.case.mask, ())}):
      jobs["splash", key, mask] = splash_job(chip, mask, fwd, dkv, head_dim)
  print(
    f"{len(works)} cases on {len(chips)} chips; {len(jobs)} programs to compile, no TPU is run", flush=True
  )
  compiled = dict(zip(jobs, schedule.compile_all(list(jobs.values()), workers, _progress(len(jobs)))))
  costs = {key: _cost(key, compiled) for key in groups}
  report = {
    "note": "Predicted from static schedules of libtpu. No TPU was run.",
    "versions": schedule.versions(),
    "step_us": STEP * 1e6,
    "chips": {n: dataclasses.asdict(topology.chip(n)) | {"clock": topology.chip(n).clock} for n in chips},
    "programs": [_program_row(key, compiled[key]) for key in jobs],
    "cases": [_case_row(w, costs[group(w)]) for w in works],
    "validation": validation(costs),
  }
  _print(report)
  if out:
    with open(out, "w") as f:
      json.dump(report, f, indent=1)
    print(f"\n{out}")
  return report


def _progress(total: int):
  start, done = time.perf_counter(), []

  def report(made: schedule.Compiled) -> None:
    done.append(made)
    a, spent = made.job.arguments, time.perf_counter() - start
    what = f"splash {a['mask']}" if "mask" in a else "ours"
    state = "ok" if made.error is None else made.error.splitlines()[0][:80]
    left = spent / len(done) * (total - len(done))
    print(
      f"  {len(done)}/{total} {made.job.topology} {what} D{a['head_dim']}: {state}, {made.seconds:.0f} s · "
      f"about {left:.0f} s left", flush=True,
    )  # fmt: skip

  return report


def _cost(key: tuple, compiled: dict) -> dict:
  _, _, *sizes = key
  parts = {n: k // part for n, (_, k, part) in zip(SHORT, sizes)}
  ours = next(m for (kind, of, _), m in compiled.items() if kind == "ours" and of == key)
  splash = {mask: m for (kind, of, mask), m in compiled.items() if kind == "splash" and of == key}
  tiles = {n: attention.tile(ours.kernel(name), parts[n]) for n, name in SHORT.items()}
  by_mask = {m: [splash[x] for x in names if x in splash] for m, names in SPLASH_MASKS.items()}
  return {"tiles": tiles, "splash": by_mask}


def _program_row(key: tuple, made: schedule.Compiled) -> dict:
  kind, (chip, head_dim, *sizes), what = key
  row = {"chip": chip, "kind": kind, "what": what, "head_dim": head_dim, "tiles": dict(zip(SHORT, sizes))}
  row |= {"error": made.error, "temp_bytes": made.temp_bytes, "seconds": made.seconds}
  row |= {"argument_bytes": made.argument_bytes, "output_bytes": made.output_bytes}
  row["kernels"] = [
    {
      "name": k.name, "bundles": k.bundles, "spills": k.spills,
      "bodies": [{"bundles": b.bundles, "mxu": b.occupancy()} for b in k.bodies],
    }
    for k in made.kernels
  ]  # fmt: skip
  return row


def _case_row(w: Work, cost: dict) -> dict:
  splash = predict_splash(w, cost["splash"].get(w.case.mask, []))
  return {
    "chip": w.chip.name, "case": w.case.name, "head_dim": w.case.head_dim, "heads": w.case.heads,
    "tiles": w.tiles, "pairs": w.pairs, "density": w.pairs / (w.case.rows * w.case.slots**2),
    "entries": {n: dataclasses.asdict(e) for n, e in w.entries.items()},
    "bundles": {n: dataclasses.asdict(t) for n, t in cost["tiles"].items()},
    "ours": predict(w, cost["tiles"]), "splash": splash,
  }  # fmt: skip


def _print(report: dict) -> None:
  versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
  print(f"\nTPU kernels, compiled ahead of time ({versions}). No TPU was run: times are predictions.")
  print("\nPrograms: bundles of a tile (full/partial; Splash has one body), MXU slots filled, spill stores")
  for row in report["programs"]:
    _print_program(row)
  step = report["step_us"]
  print(
    f"\nCases: predicted ms without | with {step:g} us a grid step; the rest with it; rates of useful pairs"
  )
  head = f"  {'chip':6}{'case':22}{'D':4}{'entries full/partial':>21}"
  head += "".join(f" {d + ' ms':>15} {'TFLOP/s':>8} {'MFU':>5}" for d in FLOPS)
  print(head + f"{'memory ms':>13} {'Splash fwd ms':>15} {'bwd ms':>15} {'x fwd':>6} {'x bwd':>6}")
  for row in report["cases"]:
    _print_case(row)
  if report["validation"]:
    print(
      "\nThe model beside measurements: causal on Ironwood, H = 32, Hk = 8, % of peak, with … without steps"
    )
    print(f"  {'length':>8} {'D':>4} {'':5}{'tokamax Splash, measured':>26}{'ours':>20}{'jax Splash':>20}")
  for v in report["validation"]:
    cells = "".join(f"{_two(v[k]):>20}" for k in ("ours_mfu", "splash_mfu"))
    measured = "–" if v["published_mfu"] is None else v["published_mfu"]
    print(f"  {v['length']:8} {v['head_dim']:4} {v['direction']:5}{measured:>26}{cells}")


def _two(shares) -> str:
  return "–" if shares is None else f"{shares[1]:.1f} … {shares[0]:.1f}"


def _print_program(p: dict) -> None:
  size = " ".join(f"{q}x{k}" for q, k, _ in (p["tiles"]["fwd"], p["tiles"]["dkv"]))
  head = f"  {p['chip']:6}{p['kind']:7}{p['what']:20}D{p['head_dim']:<4}{size:20}"
  if p["error"]:
    print(f"{head} DOES NOT COMPILE: {p['error'].splitlines()[0][:90]}")
    return
  cells = []
  for k in p["kernels"]:
    short = next(n for n in ("dkv", "dq", "fwd") if n in k["name"])
    bundles = "/".join(str(b["bundles"]) for b in k["bodies"][:2])
    cells.append(f"{short} {bundles} {100 * k['bodies'][0]['mxu']:.0f}% {k['spills']}")
  print(f"{head} temp {p['temp_bytes'] / 2**20:7.1f} MiB  {' · '.join(cells)}")


def _print_case(r: dict) -> None:
  e, ours, theirs = r["entries"]["fwd"], r["ours"], r["splash"]
  pair = lambda ms: f"{ms[0]:.3f}|{ms[1]:.3f}"
  count = f"{e['full']}/{e['partial'] + e['skipped']}"
  line = f"  {r['chip']:6}{r['case']:22}{r['head_dim']:<4}{count:>21}"
  for d in FLOPS:
    line += f" {pair(ours[d]['ms']):>15} {ours[d]['tflops'][1]:8.0f} {100 * ours[d]['mfu'][1]:4.0f}%"
  line += f"{ours['fwd']['memory_ms']:.2f}+{ours['bwd']['memory_ms']:.2f}".rjust(13)
  if theirs:
    line += "".join(f" {pair(theirs[d]['ms']):>15}" for d in FLOPS)
    line += "".join(f" {theirs[d]['ms'][1] / ours[d]['ms'][1]:6.2f}" for d in FLOPS)
  print(line)


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--quick", action="store_true", help="two chips, the deciding mask and its anchor")
  parser.add_argument("--chips", default="", help=f"some of {', '.join(TOPOLOGIES)}, with commas")
  parser.add_argument("--each", action="store_true", help="compile every case in its own shape (an hour)")
  parser.add_argument("--workers", type=int, default=2, help="compiling processes")
  parser.add_argument("--out", help="write everything as JSON")
  given = parser.parse_args(argv)
  chips = tuple(name for name in given.chips.split(",") if name)
  if unknown := [name for name in chips if name not in TOPOLOGIES]:
    parser.error(f"no such chip: {', '.join(unknown)}; there are {', '.join(TOPOLOGIES)}")
  table(given.quick, given.out, given.workers, given.each, chips)
  return 0


if __name__ == "__main__":
  sys.exit(main())
