"""Grouped products on TPU: two Mosaic kernels over a flat list of (tile of rows, group) pairs.

  product   y[r] = x[r] · w[group of r], and with the transposed matrices the gradient of the rows
  weights   dw[e] = Σ over the rows of group e of x[r] ⊗ g[r]

The rows are cut into tiles, and a step of the grid is a pair of a tile and a group that has rows in it: at
most ⌈M/m⌉ + E − 1 of them, however the rows fall, and the grid is as long as there are. Steps come in the
order of the rows, so a group's matrix is fetched when its first tile comes and stays until its last, and
a tile that several groups share stays until the last of them has written its rows. Inside a tile only the
parts that the group has rows in are worked off. No dimension of the sum is cut: operands are read once (x
once for each block of columns, and with the default sizes there is one), and no sum is kept in `product`.

Legend: M rows · E groups · D inputs · F outputs · K summed dimension of a product, N its columns · m rows
of a tile · S steps.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from genmodels.kernels import pallas_tpu, target
from genmodels.kernels.pallas_tpu_bodies import dot
from genmodels.kernels.pallas_tpu_lists import LANES, MAX_ENTRIES, Chip, chip
from genmodels.kernels.varying import axes_of, vary

Array = jax.Array

_MIB = 2**20
_NN, _NT, _TN = ((((a,), (b,)), ((), ())) for a, b in ((1, 0), (1, 1), (0, 0)))
_ROWS = 512
_SHARE = 5 / 8  # of vector memory that is planned with; the limit that is set is 1.5 times what is planned
_BODY = 2048  # cycles of one straight line of code, all matrix units busy


class _Options(NamedTuple):
  """What the kernels close over: the target at the forward trace."""

  interpret: Any
  chip: Chip


class ProductTiles(NamedTuple):
  """Tile of `product`: `rows` × all K by all K × `columns`, in parts of `part` × `chunk` outputs."""

  rows: int
  columns: int
  part: int
  chunk: int


class WeightTiles(NamedTuple):
  """Block of `weights`: `inputs` × `outputs`, summed over tiles of `rows`; `chunk` inputs at a time.

  A tile of one group alone is one sum; others are summed in parts of `part` rows.
  """

  rows: int
  inputs: int
  outputs: int
  part: int
  chunk: int


def unavailable(M: int, E: int, D: int, F: int, dtype) -> str | None:
  """Why x [M, D] · w [E, D, F] or its gradients cannot run on `target.current()`; None if they can."""
  here = target.current()
  if reason := pallas_tpu.unavailable(here):
    return reason
  if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
    return f"it multiplies bfloat16 and float32, not {jnp.dtype(dtype).name}"
  if (entries := -(-M // _ROWS) + 4 * E) > MAX_ENTRIES:
    return f"its list of {entries} steps and groups does not fit scalar memory"
  made, size = chip(), jnp.dtype(dtype).itemsize
  tiles = (product_tiles, M, D, F), (product_tiles, M, F, D), (weight_tiles, M, D, F)
  if not all(choose(max(rows, 1), a, b, size, made) for choose, rows, a, b in tiles):
    return f"{D} × {F} matrices are too wide for {made.vmem // _MIB} MiB of vector memory"
  return None


def multiply(x: Array, w: Array, sizes: Array) -> Array:
  """`grouped.grouped_matmul` for operands of one dtype; differentiable in x and w."""
  if not x.shape[0]:
    return jnp.zeros((0, w.shape[2]), x.dtype)
  options = _Options(target.current().interpret, chip())
  return _multiply(options, *vary((x, w, sizes), axes_of((x, w, sizes))))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(options, x, w, sizes):
  return _forward(options, x, w, sizes)[0]


def _forward(options, x, w, sizes):
  # Under a jit, so that jax before 0.12 too drops the call where a remat policy has kept its output.
  y = jax.jit(_product, static_argnums=(0, 4))(options, x, w, sizes, False)
  return y, (x, w, sizes)


def _backward(options, residuals, g):
  x, w, sizes = residuals
  return _product(options, g, w, sizes, True), _weights(options, x, g, w, sizes), None


_multiply.defvjp(_forward, _backward)


# -- tile sizes ---------------------------------------------------------------------------------------


@functools.cache
def product_tiles(M: int, K: int, N: int, itemsize: int, on: Chip) -> ProductTiles | None:
  """The fewest blocks of columns that the vector memory holds, whole rows and matrices beside them.

  Every block of columns reads all rows again; matrices are read once. Chips whose cores share a device get
  at least a block a core. Tiles have 512 rows unless that leaves less than 512 columns.
  """
  best = None
  for rows, part in _row_tiles(M, on):
    for columns in _blocks(N, on.cores):
      chunk = _chunk(columns, part * K, itemsize, on)
      blocks = [((rows, K), itemsize), ((K, columns), itemsize), ((rows, columns), itemsize)]
      if _vmem(blocks, [], 2 * part * chunk * 4) <= on.vmem * _SHARE:
        if best is None or columns > best.columns:
          best = ProductTiles(rows, columns, part, chunk)
        break
    if best is not None and best.columns >= min(512, -(-N // on.cores)):
      break
  return best


@functools.cache
def weight_tiles(M: int, D: int, F: int, itemsize: int, on: Chip) -> WeightTiles | None:
  """The blocks that read the rows the fewest times, sums in float32 included."""
  best, least = None, None
  for rows, part in _row_tiles(M, on):
    for outputs in _blocks(F, on.cores):
      for inputs in _blocks(D, 1):
        chunk = _chunk(inputs, rows * outputs, itemsize, on)
        blocks = [((rows, inputs), itemsize), ((rows, outputs), itemsize), ((inputs, outputs), itemsize)]
        temporaries = 2 * chunk * outputs * 4 + rows * (chunk + outputs) * 4
        if _vmem(blocks, [((inputs, outputs), 4)], temporaries) <= on.vmem * _SHARE:
          traffic = D * -(-F // outputs) + F * -(-D // inputs)
          if least is None or traffic < least:
            best, least = WeightTiles(rows, inputs, outputs, part, chunk), traffic
          break
  return best


def _row_tiles(M: int, on: Chip) -> list[tuple[int, int]]:
  """(rows, part) to try: 512 and less in parts of a matrix unit's edge; or all M rows and some padding."""
  if M <= on.mxu:
    rows = -(-M // 16) * 16
    return [(rows, rows)]
  most = min(_ROWS, -(-M // on.mxu) * on.mxu)
  return [*((rows, on.mxu) for rows in range(most, 0, -on.mxu)), (LANES, LANES)]


def _blocks(width: int, cores: int) -> list[int]:
  """Widths of equal blocks, widest first, a multiple of `cores` of them where there are lanes enough."""
  lanes = -(-width // LANES)
  counts = [1] if lanes < cores else range(cores, lanes + cores, cores)
  found = [width if n == 1 else -(-lanes // n) * LANES for n in counts]
  return sorted(set(found), reverse=True)


def _chunk(width: int, macs: int, itemsize: int, on: Chip) -> int:
  """Width of the parts that take at most _BODY cycles at `macs` products a column, or a matrix unit's.

  Equal parts if that at most halves them, because a shorter last one has code of its own.
  """
  cycles = macs * (6 if itemsize == 4 else 1)  # float32 is multiplied in six passes
  most = max(on.mxu, _BODY * 4 * on.mxu**2 // cycles // on.mxu * on.mxu)
  if width <= most:
    return width
  for unit in (on.mxu, LANES):
    for n in range(most, most // 2, -unit):
      if width % n == 0:
        return n
  parts = -(-width // most)
  return -(-width // (parts * on.mxu)) * on.mxu


def _vmem(blocks, scratch, temporaries: int) -> int:
  dtype = {2: jnp.bfloat16, 4: jnp.float32}
  typed = ([(shape, dtype[size]) for shape, size in xs] for xs in (blocks, scratch))
  return pallas_tpu.vmem_bytes(*typed, temporaries)


# -- steps --------------------------------------------------------------------------------------------


class _Steps(NamedTuple):
  """Scalars that the kernels read; see `_steps`. `group` int32[S], the others by group."""

  group: Array
  origin: Array
  start: Array
  end: Array

  def tile(self, s):
    return self.origin[self.group[s]] + s

  def bounds(self, s, rows: int):
    """Rows of the step's tile that are of its group: [lo, hi)."""
    g, first = self.group[s], self.tile(s) * rows
    return jnp.clip(self.start[g] - first, 0, rows), jnp.clip(self.end[g] - first, 0, rows)


def _steps(sizes: Array, M: int, rows: int, every_group: bool) -> tuple[_Steps, Array]:
  """The pairs (tile, group) with rows in common, by row; how many.

  Besides, every group has a step (`every_group`, for outputs by group), or every tile has: those behind
  the last group's belong to a group E without rows.
  """
  tiles, E = -(-M // rows), sizes.shape[0]
  end = jnp.minimum(jnp.cumsum(sizes.astype(jnp.int32)), M)
  start = jnp.concatenate([jnp.zeros_like(end[:1]), end[:-1]])
  some = end > start
  first = start // rows
  count = jnp.where(some, (end - 1) // rows - first + 1, 0)
  start, stop = jnp.where(some, start, 0), jnp.where(some, end, 0)
  if every_group:
    first, count = jnp.minimum(first, tiles - 1), jnp.maximum(count, 1)
  else:
    used = -(-end[-1:] // rows)
    first, count = jnp.concatenate([first, used]), jnp.concatenate([count, tiles - used])
    start, stop = (jnp.pad(x, (0, 1)) for x in (start, stop))
  last = jnp.cumsum(count)
  at = jnp.arange(tiles + E, dtype=jnp.int32)  # one more than there can be: a step looks at the next
  group = jnp.searchsorted(last, at, side="right", method="compare_all").astype(jnp.int32)
  return _Steps(group, first - (last - count), start, stop), last[-1]


# -- kernels ------------------------------------------------------------------------------------------


def _of(group_rows, size: int, offset):
  """bool[size, 1], whether row `offset + i` of the tile is of the group."""
  at = jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0) + offset
  return (at >= group_rows[0]) & (at < group_rows[1])


def _each(first, stop, size: int, whole: int, body) -> None:
  """body(slice, its start) for every aligned slice of `size` of `whole` that meets [first, stop).

  A last slice that is shorter has code of its own, and comes whenever stop > first.
  """
  aligned = whole // size * size
  if size < whole:

    def step(i, _):
      at = pl.multiple_of(i * size, size)
      body(pl.ds(at, size), at)
      return 0

    first, stop = jnp.int32(first), jnp.minimum(stop, aligned)
    jax.lax.fori_loop(jax.lax.div(first, size), jax.lax.div(stop + (size - 1), size), step, 0)
    if aligned == whole:
      return
  body(pl.ds(aligned % whole, whole - aligned % whole), aligned % whole)


def _product_kernel(group, origin, start, end, x, w, y, *, tiles: ProductTiles, transposed: bool):
  steps, s = _Steps(group, origin, start, end), pl.program_id(1)
  lo, hi = mine = steps.bounds(s, tiles.rows)
  fresh = (s == 0) | (steps.tile(jnp.maximum(s - 1, 0)) != steps.tile(s))

  @pl.when(fresh & ((lo > 0) | (hi < tiles.rows)))
  def _():
    y[...] = jnp.zeros_like(y)

  def part(rows, offset):
    inside = _of(mine, tiles.part, offset)

    def chunk(columns, _):
      if transposed:
        made = dot(x[rows, :], w[columns, :], _NT)
      else:
        made = dot(x[rows, :], w[:, columns], _NN)
      old = y[rows, columns].astype(jnp.float32)
      y[rows, columns] = jnp.where(inside, made, old).astype(y.dtype)

    _each(0, tiles.columns, tiles.chunk, tiles.columns, chunk)

  @pl.when(lo < hi)
  def _():
    _each(lo, hi, tiles.part, tiles.rows, part)


def _weights_kernel(group, origin, start, end, x, g, dw, acc, *, tiles: WeightTiles):
  steps, s = _Steps(group, origin, start, end), pl.program_id(2)
  lo, hi = mine = steps.bounds(s, tiles.rows)
  empty = lo >= hi
  fresh = (s == 0) | (steps.group[jnp.maximum(s - 1, 0)] != steps.group[s])
  last = steps.group[s + 1] != steps.group[s]

  def add(rows, offset, masked: bool):
    new = fresh & (offset <= lo)  # the first part of the group that is summed: `acc` holds another's
    inside = _of(mine, rows.size, offset) if masked else None
    # Rows of others may hold anything, so both factors are cleared.
    own = (lambda a: jnp.where(inside, a.astype(jnp.float32), 0).astype(a.dtype)) if masked else (lambda a: a)

    def chunk(inputs, _):
      made = dot(own(x[rows, inputs]), own(g[rows, :]), _TN)
      acc[inputs, :] = made + jnp.where(new, 0, acc[inputs, :])

    _each(0, tiles.inputs, tiles.chunk, tiles.inputs, chunk)

  whole = (lo == 0) & (hi == tiles.rows)

  @pl.when(whole)
  def _():
    add(pl.ds(0, tiles.rows), 0, False)

  @pl.when(~whole & ~empty)
  def _():
    _each(lo, hi, tiles.part, tiles.rows, lambda rows, offset: add(rows, offset, True))

  @pl.when(last & ~empty)
  def _():
    dw[...] = acc[...].astype(dw.dtype)

  @pl.when(empty)
  def _():
    dw[...] = jnp.zeros_like(dw)


# -- calls --------------------------------------------------------------------------------------------


def _product(options: _Options, x: Array, w: Array, sizes: Array, transposed: bool) -> Array:
  """x [M, K] · w [E, K, N] by group, or · w [E, N, K]ᵀ: [M, N], zero for rows of no group."""
  (M, K), E, N = x.shape, w.shape[0], w.shape[1 if transposed else 2]
  tiles = product_tiles(M, K, N, x.dtype.itemsize, options.chip)
  steps, count = _steps(sizes, M, tiles.rows, every_group=False)
  x = _whole(x, tiles.rows)
  own = lambda s, tables: jnp.minimum(tables[0][s], E - 1)
  matrix = (None, tiles.columns, K) if transposed else (None, K, tiles.columns)
  columns = -(-N // tiles.columns)
  y = _call(
    options,
    functools.partial(_product_kernel, tiles=tiles, transposed=transposed),
    "grouped_matmul_dx" if transposed else "grouped_matmul",
    (columns, count),
    steps,
    [
      (x, (tiles.rows, K), lambda n, s, *t: (_Steps(*t).tile(s), 0)),
      (w, matrix, lambda n, s, *t: (own(s, t), n, 0) if transposed else (own(s, t), 0, n)),
    ],
    ((x.shape[0], N), (tiles.rows, tiles.columns), lambda n, s, *t: (_Steps(*t).tile(s), n)),
    scratch=[],
    temporaries=2 * tiles.part * tiles.chunk * 4,
    macs=M * K * N,
    read=columns * x.size + w.size,
  )
  return y[:M]


def _weights(options: _Options, x: Array, g: Array, w: Array, sizes: Array) -> Array:
  """Σ over the rows of each group of x [M, D] ⊗ g [M, F]: [E, D, F], summed in float32; zero without rows."""
  M, (_, D, F) = x.shape[0], w.shape
  tiles = weight_tiles(M, D, F, x.dtype.itemsize, options.chip)
  steps, count = _steps(sizes, M, tiles.rows, every_group=True)
  x, g = _whole(x, tiles.rows), _whole(g, tiles.rows)
  grid = -(-D // tiles.inputs), -(-F // tiles.outputs)
  block = tiles.inputs, tiles.outputs
  return _call(
    options,
    functools.partial(_weights_kernel, tiles=tiles),
    "grouped_matmul_dw",
    (*grid, count),
    steps,
    [
      (x, (tiles.rows, tiles.inputs), lambda i, j, s, *t: (_Steps(*t).tile(s), i)),
      (g, (tiles.rows, tiles.outputs), lambda i, j, s, *t: (_Steps(*t).tile(s), j)),
    ],
    (w.shape, (None, *block), lambda i, j, s, *t: (t[0][s], i, j)),
    scratch=[(block, jnp.float32)],
    temporaries=2 * tiles.chunk * tiles.outputs * 4 + tiles.rows * (tiles.chunk + tiles.outputs) * 4,
    macs=M * D * F,
    read=grid[1] * x.size + grid[0] * g.size,
  )


def _whole(x: Array, rows: int) -> Array:
  """At least one tile of rows; a last tile that sticks out of more needs no copy."""
  return x if x.shape[0] >= rows else jnp.pad(x, ((0, rows - x.shape[0]), (0, 0)))


def _call(options, kernel, name, grid, steps, inputs, output, *, scratch, temporaries, macs, read) -> Array:
  """Runs a kernel over a grid whose last axis is the steps.

  Args:
    inputs: (array, block, index map). output: (shape, block, index map), of the first input's dtype.
    macs: multiply-accumulates; read: elements of the inputs that are fetched.
  """
  arrays = [x for x, _, _ in inputs]
  shape, block, index = output
  dtype = arrays[0].dtype
  blocks = [(b, x.dtype) for x, b, _ in inputs] + [(block, dtype)]
  wanted = pallas_tpu.vmem_bytes(blocks, scratch, temporaries)
  out = jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(arrays[0]).manual_axis_type)
  run = pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(steps),
      grid=grid,
      in_specs=[pl.BlockSpec(b, at) for _, b, at in inputs],
      out_specs=pl.BlockSpec(block, index),
      scratch_shapes=[pltpu.VMEM(*x) for x in scratch],
    ),
    out_shape=out,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=(*("parallel",) * (len(grid) - 1), "arbitrary"),
      vmem_limit_bytes=min(max(16 * _MIB, wanted * 3 // 2), options.chip.vmem - 2 * _MIB),
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * macs, transcendentals=0, bytes_accessed=(read + out.size) * dtype.itemsize
    ),
    interpret=options.interpret or False,
    name=name,
  )
  return run(*steps, *arrays)
