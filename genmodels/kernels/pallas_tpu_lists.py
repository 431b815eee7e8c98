"""Plans of the TPU kernels: tile sizes, and the flat tile lists that scalar memory holds.

A TPU kernel walks a one-dimensional grid over the entries of a list. Lines of the forward and dq
kernels are query tiles, of the dk/dv kernel key tiles; the lines of all rows follow each other, and a
line without an entry gets a dummy that computes nothing, so every output block is written.

An entry is one int32, high bits first: row · line · column · term · parts · last · first · full.
`parts` has a bit for each stretch of `k_compute` keys which the interval meets.

Legend: B rows of the mask (1 = shared by the batch) · T intervals · I query tiles · J key tiles
· p parts of a key tile.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from genmodels.contracts import pytree
from genmodels.kernels import target, tiles
from genmodels.masks import CODE_HIDDEN, AttnMask

Array = jax.Array

LANES = 128
MAX_ENTRIES = 240_000  # of one call: scalar memory is 1 MiB a core, and the pipeline keeps some of it
_FULL, _FIRST, _LAST, _PART = 0, 1, 2, 3  # bit positions


class Sizes(NamedTuple):
  """Tile of one kernel: q queries × k keys, worked off in parts of k_compute keys."""

  q: int
  k: int
  k_compute: int


class Tiles(NamedTuple):
  """Static choices of a plan. `Tiles(512, 1024)` or (512, 1024) is enough.

  Attributes:
    q, k: tile of the forward kernel; multiples of 128 on a chip.
    k_compute: keys of one matrix product, a divisor of k; parts without a visible key are skipped.
    dq, dkv: (q, k[, k_compute]) of the backward kernels; by default as the forward tile.
    capacity: entries of each list: None for the worst case (all tiles, all intervals), a fraction of it,
      or a number. A mask that needs more sets `Plan.overflow`, and outputs and gradients are NaN.
    density: expected share of tiles that are visited; only the cost estimate for XLA's scheduler reads it.
  """

  q: int
  k: int
  k_compute: int | None = None
  dq: tuple[int, ...] | None = None
  dkv: tuple[int, ...] | None = None
  capacity: int | float | None = None
  density: float = 0.5

  @property
  def fwd(self) -> Sizes:
    return _sizes((self.q, self.k, self.k_compute))


class Layout(NamedTuple):
  """Bit widths of an entry, and which lines of each row its list is about."""

  parts: int
  term: int
  column: int
  line: int
  row: int
  start: int
  stop: int

  @property
  def _shifts(self) -> tuple[int, int, int, int]:
    term = _PART + self.parts
    column = term + self.term
    line = column + self.column
    return term, column, line, line + self.line

  def pack(self, row, line, column, term):
    shifts = self._shifts
    return (term << shifts[0]) | (column << shifts[1]) | (line << shifts[2]) | (row << shifts[3])

  def _field(self, entry, shift: int, bits: int):
    if not bits:
      return jnp.zeros_like(entry)
    moved = jax.lax.shift_right_logical(entry, jnp.int32(shift)) if shift else entry
    # Nothing stands above the highest field in use, and the sign bit is never set.
    return moved if shift + bits == self._used else moved & (2**bits - 1)

  @property
  def _used(self) -> int:
    return self._shifts[3] + self.row

  def term_of(self, entry):
    return self._field(entry, self._shifts[0], self.term)

  def column_of(self, entry):
    return self._field(entry, self._shifts[1], self.column)

  def line_of(self, entry):
    """Line, counted from `start`."""
    return self._field(entry, self._shifts[2], self.line)

  def row_of(self, entry):
    return self._field(entry, self._shifts[3], self.row)

  def parts_of(self, entry):
    """Bit c is set if part c of the tile has to be computed; 0 is a dummy."""
    return self._field(entry, _PART, self.parts)

  @staticmethod
  def is_full(entry):
    """Whether every pair of the tile is inside the interval."""
    return (entry & (1 << _FULL)) != 0

  @staticmethod
  def is_first(entry):
    return (entry & (1 << _FIRST)) != 0

  @staticmethod
  def is_last(entry):
    return (entry & (1 << _LAST)) != 0


@pytree("layout")
class TileList:
  """Entries of lines [layout.start, layout.stop) of every row, line by line.

  Fields:
    entry: int32[1, capacity].
    count: int32[1], how many are in use.
    layout: Layout. Static.
  """

  entry: Array
  count: Array
  layout: Layout


@pytree("tiles", "lengths", "implementation")
class Plan:
  """A mask with the tile lists of the three kernels. Build it once per batch; every layer shares it.

  Each list is a tuple: where the worst case of all lines together does not fit into scalar memory, the
  lines are divided, and each part is a kernel call of its own.

  The leading axis of every array is the mask's rows, or 1: the lists are about all rows of the call. A
  plan for several devices is made inside shard_map, and leaves it with P(mesh axes) for all leaves.

  Fields:
    code: int32[B, Lk], lo, hi: int32[B, T, Lq], the mask.
    fwd, dq: TileLists with lines I, columns J; dkv: lines J, columns I.
    overflow: bool[1], a list needed more entries than `tiles.capacity` allows: outputs and gradients of
      this plan are NaN. A train loop reports `overflow.any()` with its metrics and stops with the advice
      to raise `capacity` (or leave it None); false for ever if capacity is None.
    tiles: Tiles, all filled in; lengths: (Lq, Lk); implementation: whose lists these are. Static.
  """

  code: Array
  lo: Array
  hi: Array
  fwd: tuple[TileList, ...]
  dq: tuple[TileList, ...]
  dkv: tuple[TileList, ...]
  overflow: Array
  tiles: Tiles
  lengths: tuple[int, int]
  implementation: str = "pallas_tpu"

  @property
  def mask(self) -> AttnMask:
    return AttnMask(self.code, self.lo, self.hi)


@dataclasses.dataclass(frozen=True)
class Chip:
  """What tile sizes depend on.

  Attributes:
    vmem: bytes of vector memory of a core (jax's tpu_info).
    fwd, bwd: tiles (q, k) of rows up to 16k tokens; longer rows take `long`.
    cores: TensorCores that share a device, and with it the parallel part of a grid.
    mxu: rows and columns of a matrix unit; a core does 4 · mxu² multiply-accumulates a cycle.
  """

  vmem: int
  fwd: tuple[int, int]
  bwd: tuple[int, int]
  long: tuple[int, int]
  cores: int = 1
  mxu: int = 128


_MIB = 2**20
# By the start of jax's device_kind, the first match wins. 1024 × 1024 is what a 256-wide matrix unit needs;
# 512 × 1024 in two parts costs a 128-wide one what two tiles of 512 × 512 do, in half the grid steps.
_CHIPS = {
  "TPU v4": Chip(16 * _MIB, (512, 512), (512, 512), (512, 512), 2),
  "TPU v5 lite": Chip(128 * _MIB, (512, 1024), (512, 1024), (1024, 1024)),
  "TPU v5e": Chip(128 * _MIB, (512, 1024), (512, 1024), (1024, 1024)),
  "TPU v5": Chip(64 * _MIB, (512, 1024), (512, 1024), (1024, 1024), 2),
  "TPU v6": Chip(128 * _MIB, (1024, 1024), (1024, 1024), (1024, 1024), 1, 256),
  "TPU7": Chip(64 * _MIB, (1024, 1024), (1024, 1024), (1024, 1024), 1, 256),
}
_UNKNOWN = Chip(64 * _MIB, (512, 1024), (512, 1024), (1024, 1024))
_LONG = 16 * 1024


def chip() -> Chip:
  """The chip of `target.current()`; a careful guess for one that we do not know."""
  kind = target.current().kind
  return next((c for name, c in _CHIPS.items() if kind.startswith(name)), _UNKNOWN)


def default_tiles(lq: int, lk: int) -> Tiles:
  """Tiles of the current chip for rows of lq queries and lk keys."""
  made = chip()
  long = max(lq, lk) > _LONG
  fwd, bwd = (made.long, made.long) if long else (made.fwd, made.bwd)
  q, k = _fit(fwd[0], lq), _fit(fwd[1], lk)
  back = _fit(bwd[0], lq), _fit(bwd[1], lk)
  return Tiles(q, k, dq=back, dkv=back)


def _fit(edge: int, length: int) -> int:
  """As few tiles as `edge` gives, of equal size, in whole lanes: little padding in short or odd rows."""
  count = -(-length // edge)
  return min(edge, _up(-(-length // max(count, 1)), LANES))


def _sizes(given: tuple) -> Sizes:
  q, k, *rest = given
  part = rest[0] if rest and rest[0] else None
  if part is None:  # as few products of at most 512 keys as divide the tile evenly, but none below 256
    counts = range(-(-k // 512), k // 256 + 1)
    part = next((k // n for n in counts if k % (n * LANES) == 0), k)
  if k % part:
    raise ValueError(f"plan: k_compute={part} must divide the tile's {k} keys")
  return Sizes(q, k, part)


def _filled(given: Tiles) -> Tiles:
  fwd = given.fwd
  dq, dkv = (_sizes(x or (given.q, given.k, given.k_compute)) for x in (given.dq, given.dkv))
  return given._replace(k_compute=fwd.k_compute, dq=tuple(dq), dkv=tuple(dkv))


def plan(mask: AttnMask, given: Tiles | tuple[int, ...] | None = None, capacity: float | None = None) -> Plan:
  """Lists the tiles that the mask touches, for the three kernels. Pure, jit-able; O(L) + O(T·I·J).

  Args:
    capacity: in place of the tiles', if given.

  Raises:
    ValueError: shapes of the mask that do not fit each other; tiles that a chip cannot hold; rows whose
      lists fit into scalar memory in no division.
  """
  B, T, lq = mask.lo.shape
  lk = mask.code.shape[1]
  tiles.check(mask)
  made = _filled(default_tiles(lq, lk) if given is None else Tiles(*given))
  if target.current().interpret is None:
    for name, sizes in (("fwd", made.fwd), ("dq", made.dq), ("dkv", made.dkv)):
      if any(n % LANES for n in sizes):
        raise ValueError(
          f"plan: tiles of a chip are multiples of {LANES}, got {tuple(sizes)} (q, k, k_compute) for {name}"
        )
  made = made if capacity is None else made._replace(capacity=capacity)
  found, overflow = {}, jnp.zeros((), bool)
  for name, sizes, by_key in (("fwd", made.fwd, False), ("dq", made.dq, False), ("dkv", made.dkv, True)):
    key = (*sizes, by_key)
    if key not in found:
      lists, too_many = _lists(mask, Sizes(*sizes), by_key, made.capacity)
      found[key] = lists
      overflow |= too_many
    found[name] = found[key]
  return Plan(
    *(mask.code, mask.lo, mask.hi, found["fwd"], found["dq"], found["dkv"], overflow[None], made, (lq, lk))
  )


def padded(mask: AttnMask, sizes: Sizes) -> tuple[Array, Array, Array]:
  """code, lo, hi with hidden keys and empty queries up to whole tiles."""
  return (
    pad(mask.code, 1, sizes.k, CODE_HIDDEN),
    pad(mask.lo, 2, sizes.q, 0),
    pad(mask.hi, 2, sizes.q, 0),
  )


def pad(x: Array, axis: int, multiple: int, value=0) -> Array:
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, _up(x.shape[axis], multiple) - x.shape[axis])
  return jnp.pad(x, widths, constant_values=value) if widths[axis][1] else x


def _lists(mask: AttnMask, sizes: Sizes, by_key: bool, capacity) -> tuple[tuple[TileList, ...], Array]:
  """The lists of one kernel, and whether one of them is too short."""
  active, full = tiles.classify(*padded(mask, sizes), tiles.Tiles(sizes.q, sizes.k_compute))
  B, I, T, _ = active.shape
  p = sizes.k // sizes.k_compute
  active, full = (x.reshape(B, I, T, -1, p) for x in (active, full))
  parts = (active.astype(jnp.int32) << jnp.arange(p, dtype=jnp.int32)).sum(-1, dtype=jnp.int32)
  flags = (parts << _PART) | (full.all(-1).astype(jnp.int32) << _FULL)
  some = active.any(-1)
  order = (0, 3, 1, 2) if by_key else (0, 1, 3, 2)
  some, flags = some.transpose(order), flags.transpose(order)  # [B, lines, columns, T]
  _, lines, columns, _ = some.shape
  worst = some.size
  total = worst if capacity is None else capacity
  total = min(math.ceil(worst * total) if isinstance(total, float) else total, worst)
  calls = -(-total // MAX_ENTRIES)
  while calls <= lines and _share(total, lines, calls) > MAX_ENTRIES:
    calls += 1
  if calls > lines:
    raise ValueError(
      f"plan: {total} entries of {B} rows do not fit scalar memory ({MAX_ENTRIES} a call) even with one line "
      f"a call; take larger tiles, fewer rows a device, or a smaller Tiles.capacity"
    )
  each = -(-lines // calls)
  out, overflow = [], jnp.zeros((), bool)
  for start in range(0, lines, each):
    at = slice(start, min(start + each, lines))
    made, too_many = _compact(some[:, at], flags[:, at], p, at, _share(total, lines, calls))
    out.append(made)
    overflow |= too_many
  return tuple(out), overflow


def _share(total: int, lines: int, calls: int) -> int:
  """Entries of one of several calls: in proportion to its lines."""
  return math.ceil(total / lines * -(-lines // calls))


def _compact(some: Array, flags: Array, parts: int, at: slice, capacity: int) -> tuple[TileList, Array]:
  """Sorts what is listed to the front: an entry's high bits are its place in the order."""
  B, lines, columns, T = some.shape
  widths = (T, columns, lines, B)
  layout = Layout(parts, *((n - 1).bit_length() for n in widths), at.start, at.stop)
  if layout._used > 31:
    raise ValueError(
      f"plan: an entry has 31 bits, but {B} rows of {lines} × {columns} tiles with {T} intervals and {parts} "
      f"parts a tile need {layout._used}; take larger tiles, a larger k_compute, or fewer rows a device"
    )
  grid = (jax.lax.broadcasted_iota(jnp.int32, some.shape, axis) for axis in range(4))
  lonely = ~some.any((2, 3))
  listed = some.at[:, :, 0, 0].set(some[:, :, 0, 0] | lonely)
  packed = layout.pack(*grid) | jnp.where(some, flags, 0)
  packed = jnp.where(listed, packed, jnp.iinfo(jnp.int32).max).reshape(-1)
  capacity = min(capacity, packed.size)
  needed = listed.sum(dtype=jnp.int32)
  count = jnp.minimum(needed, capacity)
  entry = jnp.sort(packed)[:capacity]
  place = jnp.arange(capacity, dtype=jnp.int32)
  line = entry >> layout._shifts[2]  # row and line in one
  first = (place == 0) | (line != jnp.roll(line, 1))
  last = (place == count - 1) | (line != jnp.roll(line, -1))
  entry |= (first.astype(jnp.int32) << _FIRST) | (last.astype(jnp.int32) << _LAST)
  entry = jnp.where(place < count, entry, 0)
  return TileList(entry[None], count[None], layout), needed > capacity


def _up(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple
