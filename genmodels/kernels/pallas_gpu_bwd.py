"""Backward of the Hopper kernels (Mosaic GPU): a deterministic pair of kernels, and a fused one.

All recompute the probabilities from the log-sum-exp the forward kept; nothing of size Lq × Lk is ever stored:

  P = 2^(cap(scale · q kᵀ) log2 e − lse log2 e)    dP = dO vᵀ    dS = P (dP − Δ) · cap'
  dV = Pᵀ dO    dK = scale · dSᵀ q    dQ = scale · dS k    Δ = Σ_D out · dO − d_lse

(Dao, FlashAttention-2, arXiv 2307.08691, §3.1.2; the LSE's cotangent enters through Δ.)

  pair (deterministic): `_dq` walks the lines of query tiles, `_dkv` those of key tiles; 7 products a tile.
    Every thread block owns its output rows, those of dk and dv over all query heads of a key head: repeats
    are equal bit for bit, and nothing is kept per query head.
  fused: `_dkv` also multiplies dS k and adds it to dq in memory by TMA reduction (Shah et al.,
    FlashAttention-3, arXiv 2407.08608, §3): 5 products. The order of the additions is not fixed. D 256 has no
    shared memory left for it and takes the pair.

A thread block is a producer warpgroup, which streams tiles through a ring in shared memory by TMA, and
consumers of 64 rows each. The scores of `_dkv` are transposed (keys are rows): the queries' bounds, LSE and Δ
are column vectors that arrive with the query tile, the keys' codes are rows and stay in registers.

How P and dS become operands of the next product:
  fast: in registers, as the left operand of wgmma.
  safe (`Tiles.safe`, and whatever the interpreter runs): through shared memory. For a ptxas that corrupts
    wgmma with a register operand (before CUDA 13.3), and because the interpreter has no such wgmma.
Nothing else differs; the accumulators of dq, dk, dv stay in wgmma registers over the whole line in both. The
interpreter has no TMA reduction either: there the pieces of dq go to arrays of their own, which XLA sums.

Budgets, for 2 consumers at 240 registers a thread (the producer keeps 24) and 227 KiB of shared memory. An
f32 accumulator costs half its columns in registers of a thread, a 16-bit operand a quarter.

             step   accumulators   S + dP    P, dS     sum   shared memory with 2 stages, KiB
  dq   D 64  128    dq 32          64 + 64   32        192   q, dO 32 + k, v 64               =  96
       D 128  64    dq 64          32 + 32   16        144   q, dO 64 + k, v 64               = 128
       D 256  32    dq 128         16 + 16    8        168   q, dO 128 + k, v 64              = 192
  dkv  D 64   64    dk 32, dv 32   32 + 32   16 + 16   160   k, v 32 + q, dO 32 [+ dS, dq 64] =  64 [128]
       D 128  64    dk 64, dv 64   32 + 32   16 + 16   224   k, v 64 + q, dO 64 [+ dS, dq 96] = 128 [224]
       D 256  64    dk 64, dv 64   32 + 32   16 + 16   224   k, v 64 + q, dO 128              = 192
In brackets what the fused kernel adds; the safe mode of the pair adds 8 to 32 KiB. ptxas (CUDA 13.5) keeps
dq and the D 64 kernels free of spills; dkv spills 8 bytes a thread at D 128 (fused 116), 164 at D 256. There
the accumulators of 64 keys do not fit one warpgroup: both consumers take the same 64 keys, compute the same
S and dP, and keep half of the columns of dk and dv each. Nothing here has been timed.

Legend: B rows · Lq, Lk lengths · H query heads · Hk key heads (H = Hk · G) · D head size · C chunks of at
most 128 of its columns · M rows of the mask (1 if shared) · T intervals of a query.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from genmodels.kernels import target
from genmodels.kernels.pallas_gpu_lists import Lines, Options, Plan, column, term

Array = jax.Array

_LOG2E = math.log2(math.e)
# A masked logit: far below any LSE, so that the exponential is exactly 0 without a second `where`.
_MASKED = -1e30
_ROWS = 64  # of a warpgroup: the M of wgmma
_STAGES = 2
_DQ_STEP = {64: 128, 128: 64, 256: 32}  # keys of a step of dq, by head size
_DKV_STEP = 64  # queries of a step of dkv
# Of a thread, with two consumers: 2 · 240 + 24 = 3 · 168, all that a launch of three warpgroups gets. With
# one consumer everyone has enough.
_REGISTERS, _PRODUCER_REGISTERS = 240, 24

_TILE = plgpu.Layout.WGMMA
_ROW, _COLUMN = _TILE.reduce(1), _TILE.reduce(0)


class _Kernel(NamedTuple):
  """Static choices of one kernel.

  Attributes:
    options: Options.
    safe: operands through shared memory.
    consumers: warpgroups that compute.
    shared_rows: whether all consumers take the same rows, and split the columns of the accumulators.
    rows: output rows of a thread block.
    blocks: thread blocks of a line.
    edge: tile edge along the line's list; step: of it, what is in shared memory at a time.
    width, chunks: D = width · chunks.
  """

  options: Options
  safe: bool
  consumers: int
  shared_rows: bool
  rows: int
  blocks: int
  edge: int
  step: int
  width: int
  chunks: int

  @property
  def parts(self) -> int:
    """Groups of 64 rows in a thread block."""
    return self.rows // _ROWS

  @property
  def steps(self) -> int:
    """Steps of an entry."""
    return self.edge // self.step

  def tile(self, shape, dtype):
    """Shared memory for operands of wgmma, swizzled in rows of 128 bytes, or of a step if that is shorter:
    both operands must be swizzled alike, and a contraction is a multiple of such a row."""
    size = jnp.dtype(dtype).itemsize
    columns = min(128 // size, self.step)
    swizzle = plgpu.SwizzleTransform(columns * size)
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, columns)), swizzle))


def backward(
  options: Options,
  plan: Plan,
  q: Array,
  k: Array,
  v: Array,
  out: Array,
  lse: Array,
  d_out: Array,
  d_lse: Array,
) -> tuple[Array, Array, Array]:
  """dq, dk, dv in the dtypes and shapes of q, k, v.

  Args:
    options: Options of the forward call.
    plan: Plan of the mask.
    q: [B, Lq, H, D], k, v: [B, Lk, Hk, D], bfloat16 or float16; D 64, 128 or 256, lengths multiples of 8.
    out: [B, Lq, H, D], lse: float32[B, H, Lq], of the forward: natural log, −inf for a query without a key.
    d_out: [B, Lq, H, D], d_lse: float32[B, H, Lq], their cotangents.

  Raises:
    ValueError: a head size or dtype the kernels do not take.
  """
  D = q.shape[3]
  if D not in _DQ_STEP or v.shape[3] != D or q.dtype not in (jnp.bfloat16, jnp.float16):
    raise ValueError(
      f"pallas_gpu backward: head size 64, 128 or 256 for q, k and v in bfloat16 or float16, got q {q.shape} "
      f"{q.dtype}, v {v.shape}; pad the head or use implementation='xla'"
    )
  safe = plan.tiles.safe or target.current().interpret is not None
  d_out = d_out.astype(q.dtype)
  some = lse > -jnp.inf
  delta = jnp.einsum("bihd,bihd->bhi", out, d_out, preferred_element_type=jnp.float32) - d_lse
  # Queries without a key are masked in every tile; their vectors only have to be finite.
  rows = jnp.stack([jnp.where(some, lse * _LOG2E, 0), jnp.where(some, delta, 0)], 2)  # [B, H, 2, Lq]
  padded = plan.lo.shape[2]
  rows = jnp.pad(rows, ((0, 0), (0, 0), (0, 0), (0, padded - rows.shape[3])))
  bounds = jnp.stack([plan.lo, plan.hi], 2)  # [M, T, 2, Lq']
  operands = q, k, v, d_out, rows, bounds, plan.code
  by_key = _dkv_kernel(options, plan, D, safe)
  if options.deterministic or by_key.shared_rows:
    return _dq(_dq_kernel(options, plan, D, safe), plan.dq, *operands), *_dkv(by_key, plan.dkv, *operands)
  # The interpreter has no reduction: there every entry of every thread block gets an array of its own.
  interpreted = target.current().interpret is not None
  pieces = plan.dkv.line.shape[1] * by_key.blocks * plan.dkv.entry.shape[2] if interpreted else 1
  B = q.shape[0]
  dq_ref = jax.new_ref(jnp.zeros((pieces * B, *q.shape[1:]), jnp.float32))
  dk, dv = _dkv(by_key, plan.dkv, *operands, dq_ref)
  dq = jax.freeze(dq_ref).reshape(pieces, *q.shape).sum(0)
  return (dq * options.scale).astype(q.dtype), dk, dv


def _dq_kernel(options: Options, plan: Plan, D: int, safe: bool) -> _Kernel:
  rows, keys = plan.tiles.dq
  consumers = 1 if rows % 128 else 2
  width = min(D, 128)
  return _Kernel(
    options, safe, consumers, False, consumers * _ROWS, rows // (consumers * _ROWS), keys,
    math.gcd(keys, _DQ_STEP[D]), width, D // width,
  )  # fmt: skip


def _dkv_kernel(options: Options, plan: Plan, D: int, safe: bool) -> _Kernel:
  queries, rows = plan.tiles.dkv
  shared = D > 128
  consumers = 2 if shared or rows % 128 == 0 else 1
  own = _ROWS if shared else consumers * _ROWS
  width = min(D, 128)
  return _Kernel(
    options,
    safe,
    consumers,
    shared,
    own,
    rows // own,
    queries,
    math.gcd(queries, _DKV_STEP),
    width,
    D // width,
  )


def _dq(kernel: _Kernel, lines: Lines, q, k, v, d_out, rows, bounds, code) -> Array:
  """dq [B, Lq, H, D]: a thread block per `kernel.rows` queries of a query head."""
  B, _, H, D = q.shape
  G = H // k.shape[2]
  T = bounds.shape[1]
  chunks, parts, step = kernel.chunks, kernel.parts, kernel.step

  def body(
    q_g, k_g, v_g, do_g, rows_g, bounds_g, code_g, line_g, count_g, entry_g, dq_g,
    q_s, do_s, rows_s, bounds_s, k_s, v_s, code_s, ds_s, own, k_full, v_full, k_free, v_free,
  ):  # fmt: skip
    b, h, wg = lax.axis_index("b"), lax.axis_index("h"), lax.axis_index("wg")
    m, row, first = _place(kernel, lines, line_g, b)
    partial = count_g[m, row, 0] * kernel.steps
    total = partial + count_g[m, row, 1] * kernel.steps

    @pl.when(wg < kernel.consumers)
    def _():
      _set_registers(kernel, _REGISTERS)
      plgpu.barrier_wait(own)
      lse = plgpu.load(rows_s.at[0, pl.ds(wg * _ROWS, _ROWS)], layout=_ROW)
      delta = plgpu.load(rows_s.at[1, pl.ds(wg * _ROWS, _ROWS)], layout=_ROW)

      def run(*dq_acc):
        def step_of(masked):
          def do(i, _):
            slot = lax.rem(i, jnp.int32(_STAGES))
            if masked:
              t = term(entry_g[m, row, lax.div(i, jnp.int32(kernel.steps))]) if T > 1 else 0
              lo, hi = (
                plgpu.load(bounds_s.at[t, x, pl.ds(wg * _ROWS, _ROWS)], layout=_ROW) for x in range(2)
              )

            def scores(s_acc, dp_acc):
              plgpu.barrier_wait(k_full.at[slot])
              _multiply(s_acc, q_s.at[wg], k_s.at[slot], chunks)
              plgpu.barrier_wait(v_full.at[slot])
              _multiply(dp_acc, do_s.at[wg], v_s.at[slot], chunks)
              seen = None
              if masked:
                c = _spread(plgpu.load(code_s.at[slot], layout=_COLUMN), (_ROWS, step), 1)
                seen = (c >= _spread(lo, c.shape, 0)) & (c < _spread(hi, c.shape, 0))
              _, weight = _probabilities(
                kernel.options, _loaded(s_acc, chunks), _spread(lse, (_ROWS, step), 0), seen
              )
              ds = weight * (_loaded(dp_acc, 0) - _spread(delta, weight.shape, 0))
              plgpu.barrier_arrive(v_free.at[slot])
              return ds

            ds = pl.run_scoped(scores, *[plgpu.ACC((_ROWS, step), jnp.float32)] * 2)
            ds = ds.astype(q_g.dtype)
            left = _staged(ds, ds_s.at[wg]) if kernel.safe else ds
            if masked and not kernel.safe:
              plgpu.commit_smem()  # the codes are read before TMA writes the next ones
            for c in range(chunks):
              plgpu.wgmma(dq_acc[c], left, k_s.at[slot, c])
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(k_free.at[slot])

          return do

        lax.fori_loop(0, partial, step_of(True), None)
        lax.fori_loop(partial, total, step_of(False), None)
        return [_loaded(x, 0) for x in dq_acc]

      dq = pl.run_scoped(run, *[plgpu.ACC((_ROWS, kernel.width), jnp.float32)] * chunks)
      for c in range(chunks):
        q_s[wg, c] = (dq[c] * kernel.options.scale).astype(q_g.dtype)
      plgpu.commit_smem()
      for c in range(chunks):
        plgpu.copy_smem_to_gmem(
          q_s.at[wg, c], dq_g.at[b, pl.ds(first + wg * _ROWS, _ROWS), h, _columns(kernel, c)]
        )
      plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == kernel.consumers)
    def _():
      _set_registers(kernel, _PRODUCER_REGISTERS)
      for part in range(parts):
        at = pl.ds(first + part * _ROWS, _ROWS)
        _copy(kernel, q_g.at[b, at, h], q_s.at[part], own)
        _copy(kernel, do_g.at[b, at, h], do_s.at[part], own)
      at = pl.ds(first, kernel.rows)
      plgpu.copy_gmem_to_smem(rows_g.at[b, h, :, at], rows_s, own)
      plgpu.copy_gmem_to_smem(bounds_g.at[m, :, :, at], bounds_s, own)
      hk = lax.div(h, jnp.int32(G))

      @pl.loop(0, total)
      def _(i):
        slot = lax.rem(i, jnp.int32(_STAGES))
        j = column(entry_g[m, row, lax.div(i, jnp.int32(kernel.steps))]) * kernel.edge
        keys = pl.ds(j + lax.rem(i, jnp.int32(kernel.steps)) * step, step)
        _wait_for_room(i, k_free, slot)
        _copy(kernel, k_g.at[b, keys, hk], k_s.at[slot], k_full.at[slot])
        plgpu.copy_gmem_to_smem(code_g.at[m, keys], code_s.at[slot], k_full.at[slot])
        _wait_for_room(i, v_free, slot)
        _copy(kernel, v_g.at[b, keys, hk], v_s.at[slot], v_full.at[slot])

      _drain(total, k_free, v_free)

  tile = functools.partial(kernel.tile, dtype=q.dtype)
  return plgpu.kernel(
    body,
    out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
    scratch_types=[
      tile((parts, chunks, _ROWS, kernel.width)),
      tile((parts, chunks, _ROWS, kernel.width)),
      plgpu.SMEM((2, kernel.rows), jnp.float32),
      plgpu.SMEM((T, 2, kernel.rows), jnp.int32),
      tile((_STAGES, chunks, step, kernel.width)),
      tile((_STAGES, chunks, step, kernel.width)),
      plgpu.SMEM((_STAGES, step), jnp.int32),
      tile((kernel.consumers, _ROWS, step)) if kernel.safe else None,
      plgpu.Barrier(num_arrivals=2 * parts * chunks + 2),
      *_ring_barriers(chunks + 1, chunks, kernel.consumers),
    ],
    grid=(H, lines.line.shape[1] * kernel.blocks, B),
    grid_names=("h", "n", "b"),
    **_launch(kernel, "attention_dq"),
  )(q, k, v, d_out, rows, bounds, code, lines.line, lines.count, lines.entry)


def _dkv(
  kernel: _Kernel, lines: Lines, q, k, v, d_out, rows, bounds, code, dq_ref=None
) -> tuple[Array, Array]:
  """dk, dv [B, Lk, Hk, D]: a thread block per `kernel.rows` keys of a key head.

  With dq_ref, float32[S · B, Lq, H, D] of zeros, it leaves dq / scale there, in S parts to be summed.
  """
  B, _, Hk, D = k.shape
  G = q.shape[2] // Hk
  T = bounds.shape[1]
  chunks, parts, step, consumers = kernel.chunks, kernel.parts, kernel.step, kernel.consumers
  per_entry = G * kernel.steps
  shape = _ROWS, step
  fused = dq_ref is not None
  reduces = fused and dq_ref.shape[0] == B

  def body(
    q_g, k_g, v_g, do_g, rows_g, bounds_g, code_g, line_g, count_g, entry_g, *rest,
    k_s, v_s, q_s, do_s, rows_s, bounds_s, left_s, own, ring, done, ds_full, ds_free, dq_s,
  ):  # fmt: skip
    *dq_g, dk_g, dv_g = rest
    q_full, do_full, q_free, do_free = ring
    b, hk, wg = lax.axis_index("b"), lax.axis_index("h"), lax.axis_index("wg")
    m, row, first = _place(kernel, lines, line_g, b)
    partial = count_g[m, row, 0] * per_entry
    total = partial + count_g[m, row, 1] * per_entry

    def source(i):
      """(entry, query head, queries) of a step."""
      at, rest = lax.div(i, jnp.int32(per_entry)), lax.rem(i, jnp.int32(per_entry))
      h = hk * G + lax.div(rest, jnp.int32(kernel.steps))
      first = column(entry_g[m, row, at]) * kernel.edge + lax.rem(rest, jnp.int32(kernel.steps)) * step
      return at, h, pl.ds(first, step)

    def add_dq(i, slot):
      """dq of a step, from the dS of all warpgroups, by one of them: they take turns."""
      plgpu.barrier_wait(ds_full.at[slot])

      def product(acc):
        for part in range(parts):
          plgpu.wgmma(acc, left_s.at[slot, part].transpose((1, 0)), k_s.at[part, 0])
        return _loaded(acc, 0)

      dq = pl.run_scoped(product, plgpu.ACC((step, kernel.width), jnp.float32))
      plgpu.barrier_arrive(ds_free.at[slot])
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      dq_s[wg] = dq
      plgpu.commit_smem()
      at, h, queries = source(i)
      to = b if reduces else (lax.axis_index("n") * lines.entry.shape[2] + at) * B + b
      plgpu.copy_smem_to_gmem(
        dq_s.at[wg], dq_g[0].at[to, queries, h], reduction_op="add" if reduces else None
      )

    @pl.when(wg < consumers)
    def _():
      _set_registers(kernel, _REGISTERS)
      part, chunk = (0, wg) if kernel.shared_rows else (wg, 0)  # what this warpgroup owns of dk and dv
      keys = pl.ds(first + part * _ROWS, _ROWS)
      code = plgpu.load(code_g.at[m, keys], layout=_ROW, optimized=False)
      plgpu.barrier_wait(own)

      def run(dk_acc, dv_acc):
        def step_of(masked):
          def do(i, _):
            slot = lax.rem(i, jnp.int32(_STAGES))
            staged = left_s.at[slot, wg] if fused else left_s.at[wg] if kernel.safe else None

            def products(s_acc, dp_acc):
              plgpu.barrier_wait(q_full.at[slot])
              _multiply(s_acc, k_s.at[part], q_s.at[slot], chunks)
              plgpu.barrier_wait(do_full.at[slot])
              _multiply(dp_acc, v_s.at[part], do_s.at[slot], chunks)
              if fused:
                _wait_for_room(i, ds_free, slot)
              s = _loaded(s_acc, chunks)  # first: comparisons made before it would wait in registers
              seen = None
              if masked:
                c = _spread(code, shape, 0)
                lo, hi = (
                  _spread(plgpu.load(bounds_s.at[slot, x], layout=_COLUMN), shape, 1) for x in range(2)
                )
                seen = (c >= lo) & (c < hi)
              lse = _spread(plgpu.load(rows_s.at[slot, 0], layout=_COLUMN), shape, 1)
              p, weight = _probabilities(kernel.options, s, lse, seen)
              left = p.astype(q_g.dtype)
              plgpu.wgmma(dv_acc, _staged(left, staged) if kernel.safe else left, do_s.at[slot, chunk])
              # In the safe mode dS takes the place of P, which dV must have read by then.
              dp = _loaded(dp_acc, 0 if kernel.safe else 1)
              return weight * (dp - _spread(plgpu.load(rows_s.at[slot, 1], layout=_COLUMN), shape, 1))

            ds = pl.run_scoped(products, *[plgpu.ACC(shape, jnp.float32)] * 2).astype(q_g.dtype)
            if fused or kernel.safe:
              in_shared = _staged(ds, staged)
            else:
              plgpu.commit_smem()  # the vectors are read before TMA writes the next ones
            if fused:
              plgpu.barrier_arrive(ds_full.at[slot])
            plgpu.wgmma(dk_acc, in_shared if kernel.safe else ds, q_s.at[slot, chunk])
            plgpu.wgmma_wait(1)
            plgpu.barrier_arrive(do_free.at[slot])
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(q_free.at[slot])
            if fused:
              pl.when(wg == lax.rem(i, jnp.int32(consumers)))(lambda: add_dq(i, slot))

          return do

        lax.fori_loop(0, partial, step_of(True), None)
        lax.fori_loop(partial, total, step_of(False), None)
        return _loaded(dk_acc, 0), _loaded(dv_acc, 0)

      dk, dv = pl.run_scoped(run, *[plgpu.ACC((_ROWS, kernel.width), jnp.float32)] * 2)
      if fused:
        _drain(total, ds_free)
      if fused or kernel.shared_rows:  # the other warpgroup may still read k and v
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)
      k_s[part, chunk] = (dk * kernel.options.scale).astype(k_g.dtype)
      v_s[part, chunk] = dv.astype(v_g.dtype)
      plgpu.commit_smem()
      to = b, keys, hk, _columns(kernel, chunk)
      plgpu.copy_smem_to_gmem(k_s.at[part, chunk], dk_g.at[to])
      plgpu.copy_smem_to_gmem(v_s.at[part, chunk], dv_g.at[to])
      plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == consumers)
    def _():
      _set_registers(kernel, _PRODUCER_REGISTERS)
      for part in range(parts):
        keys = pl.ds(first + part * _ROWS, _ROWS)
        _copy(kernel, k_g.at[b, keys, hk], k_s.at[part], own)
        _copy(kernel, v_g.at[b, keys, hk], v_s.at[part], own)

      @pl.loop(0, total)
      def _(i):
        slot = lax.rem(i, jnp.int32(_STAGES))
        at, h, queries = source(i)
        t = term(entry_g[m, row, at]) if T > 1 else 0
        _wait_for_room(i, q_free, slot)
        _copy(kernel, q_g.at[b, queries, h], q_s.at[slot], q_full.at[slot])
        plgpu.copy_gmem_to_smem(bounds_g.at[m, t, :, queries], bounds_s.at[slot], q_full.at[slot])
        plgpu.copy_gmem_to_smem(rows_g.at[b, h, :, queries], rows_s.at[slot], q_full.at[slot])
        _wait_for_room(i, do_free, slot)
        _copy(kernel, do_g.at[b, queries, h], do_s.at[slot], do_full.at[slot])

      _drain(total, q_free, do_free)

  tile = functools.partial(kernel.tile, dtype=q.dtype)
  own_tile, ring_tile = (
    tile((parts, chunks, _ROWS, kernel.width)),
    tile((_STAGES, chunks, step, kernel.width)),
  )
  scratch = dict(
    k_s=own_tile,
    v_s=own_tile,
    q_s=ring_tile,
    do_s=ring_tile,
    rows_s=plgpu.SMEM((_STAGES, 2, step), jnp.float32),
    bounds_s=plgpu.SMEM((_STAGES, 2, step), jnp.int32),
    left_s=tile((_STAGES, consumers, *shape))
    if fused
    else tile((consumers, *shape))
    if kernel.safe
    else None,
    own=plgpu.Barrier(num_arrivals=2 * parts * chunks),
    ring=_ring_barriers(chunks + 2, chunks, consumers),
    done=plgpu.Barrier(num_arrivals=consumers) if fused or kernel.shared_rows else None,
    ds_full=plgpu.Barrier(num_arrivals=consumers, num_barriers=_STAGES) if fused else None,
    ds_free=plgpu.Barrier(num_barriers=_STAGES) if fused else None,
    dq_s=kernel.tile((consumers, step, kernel.width), jnp.float32) if fused else None,
  )
  return plgpu.kernel(
    body,
    out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
    scratch_types=scratch,
    grid=(Hk, lines.line.shape[1] * kernel.blocks, B),
    grid_names=("h", "n", "b"),
    **_launch(kernel, "attention_dkv"),
  )(q, k, v, d_out, rows, bounds, code, lines.line, lines.count, lines.entry, *([dq_ref] if fused else []))


def _place(kernel: _Kernel, lines: Lines, line_g, b):
  """(row of the mask, row of its table, first output row) of this thread block."""
  n = lax.axis_index("n")
  m = b if lines.line.shape[0] > 1 else 0
  row, block = lax.div(n, jnp.int32(kernel.blocks)), lax.rem(n, jnp.int32(kernel.blocks))
  return m, row, (line_g[m, row] * kernel.blocks + block) * kernel.rows


def _probabilities(options: Options, s, lse, seen):
  """P float32 of raw products s, and P times the slope of the soft-cap. lse: base 2."""
  if options.soft_cap is None:
    z = s * (options.scale * _LOG2E)
  else:
    ratio = jnp.tanh(s * (options.scale / options.soft_cap))
    z = ratio * (options.soft_cap * _LOG2E)
  if seen is not None:
    z = jnp.where(seen, z, _MASKED)
  p = jnp.exp2(z - lse)
  return p, p if options.soft_cap is None else p * (1.0 - ratio * ratio)


def _multiply(acc, a, b, chunks: int):
  """acc += Σ_C a[c] b[c]ᵀ, left running: one group of wgmma per chunk."""
  for c in range(chunks):
    plgpu.wgmma(acc, a.at[c], b.at[c].transpose((1, 0)))


def _loaded(acc, pending: int):
  """Value of an accumulator once at most `pending` groups still run.

  The barrier pins the order: to LLVM the accumulator is a plain register, which it may read too early.
  """
  return lax.optimization_barrier(plgpu.wgmma_accumulator_load(acc, wait_n=pending))


def _staged(x, staged_s):
  """x in shared memory, ready to be an operand of wgmma."""
  staged_s[...] = x
  plgpu.commit_smem()
  return staged_s


def _spread(x, shape, axis: int):
  return lax.broadcast_in_dim(x, shape, [axis])


def _columns(kernel: _Kernel, chunk):
  return pl.ds(chunk * kernel.width, kernel.width)


def _copy(kernel: _Kernel, source, to, barrier):
  """GMEM [rows, D] -> SMEM [C, rows, width]: one arrival per chunk. Rows past the end arrive as zeros."""
  for c in range(kernel.chunks):
    plgpu.copy_gmem_to_smem(source.at[:, _columns(kernel, c)], to.at[c], barrier)


def _set_registers(kernel: _Kernel, count: int):
  if kernel.consumers == 2:
    plgpu.set_max_registers(count, action="increase" if count == _REGISTERS else "decrease")


def _wait_for_room(i, free, slot):
  @pl.when(i >= _STAGES)
  def _():
    plgpu.barrier_wait(free.at[slot])


def _drain(total, *frees):
  """Awaits the last arrivals: a barrier must not die with one pending."""

  @pl.loop(jnp.maximum(total - _STAGES, 0), total)
  def _(i):
    for free in frees:
      plgpu.barrier_wait(free.at[lax.rem(i, jnp.int32(_STAGES))])


def _ring_barriers(first: int, second: int, consumers: int):
  """full, full, free, free of a ring with two kinds of tiles that take so many copies."""
  full = [plgpu.Barrier(num_arrivals=n, num_barriers=_STAGES) for n in (first, second)]
  return *full, *[plgpu.Barrier(num_arrivals=consumers, num_barriers=_STAGES)] * 2


def _launch(kernel: _Kernel, name: str):
  """Arguments of plgpu.kernel that do not depend on the kernel."""
  interpret = target.current().interpret
  return dict(
    num_threads=kernel.consumers + 1,
    thread_name="wg",
    kernel_name=name,
    compiler_params=plgpu.CompilerParams(approx_math=True),
    interpret=plgpu.InterpretGPUParams() if interpret is True else interpret,
  )
