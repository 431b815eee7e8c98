"""Forward of the Hopper kernels (Mosaic GPU): warp-specialised online softmax over the lines of a plan.

A thread block takes 128 queries of one head: two consumer warpgroups of 64 rows, and a producer that streams
key tiles, their codes and value tiles through a ring in shared memory by TMA. All three walk the same row of
the table: first the entries that need the mask, then the full ones.

The consumers take turns on the tensor cores: while one multiplies, the other does its softmax (ping-pong,
Shah et al., FlashAttention-3, arXiv 2407.08608, §3.1). How the probabilities become an operand of the product
with v:
  fast: in registers, added to the accumulator in place.
  safe (`Tiles.safe`, and whatever the interpreter runs): through shared memory, into a fresh accumulator that
    is added afterwards. For a ptxas that corrupts wgmma with a register operand (before CUDA 13.3), and
    because the interpreter has neither such a wgmma nor accumulators with an initial value.
Nothing else differs.

Work order: items (a query tile of a head) by falling number of entries, inside sections of heads whose keys
and values fit the L2 cache together, so that the blocks which run at one time share them. A thread block
takes one item; with `Tiles.blocks` it takes many, and its producer fetches the keys of the next one while the
consumers still finish theirs.

Budgets at 232 registers a thread (the producer gives up all but 40) and 227 KiB of shared memory; f32
accumulators cost columns / 2 registers a thread, bf16 operands and the codes of a masked step columns / 4:

         step   out   S    P    codes   sum + vectors   shared memory: q + stages · (k, v, codes) [+ P, safe]
  D 64   128    32    64   32   32      ~180            16 + 3 · 32.5 [+ 32] =  114 [146] KiB
  D 128  128    64    64   32   32      ~212            32 + 2 · 64.5 [+ 32] =  161 [193]
  D 256  64     128   32   16   16      ~212            64 + 2 · 64.3 [+ 16] =  193 [209]
The safe mode's second accumulator spills at D 256.

Legend: B rows · M rows of the mask (1 if shared) · Lq, Lk lengths, Lq' padded · H query heads · Hk key heads
(H = Hk · G) · D head size · T intervals of a query · N lines · P pairs (row, key head) of a section.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from genmodels.kernels import target
from genmodels.kernels.pallas_gpu_lists import Options, Plan, column, term

Array = jax.Array

_LOG2E = math.log2(math.e)
# Masked logits lie so far below the smallest running maximum that exp2 underflows to exactly 0: no second
# `where` on the probabilities, and rows without a key come out with a zero sum.
_MASKED = -1e30
_FLOOR = -1e29
_ROWS = 64  # of a warpgroup: the M of wgmma
_CONSUMERS = 2
_REGISTERS, _PRODUCER_REGISTERS = 232, 40
_SHARED_BYTES = 227 * 1024
_L2_BYTES = 32 * 2**20  # of the cache's 50 or 60 MB, for the keys and values of a section

_TILE = plgpu.Layout.WGMMA
_ROW, _COLUMN = _TILE.reduce(1), _TILE.reduce(0)


class _Item(NamedTuple):
  """A query tile of a head: scalars of a thread block.

  Attributes:
    b, hk, h: row, key head, query head.
    m, r: row of the mask, row of its table.
    partial, total: steps with the mask, steps.
  """

  b: Array
  hk: Array
  h: Array
  m: Array | int
  r: Array
  partial: Array
  total: Array


def forward(options: Options, plan: Plan, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
  """out [B, Lq, H, D] in q's dtype, lse float32[B, H, Lq] (natural log; −inf for a query that sees no key).

  Args:
    options: Options.
    plan: Plan of the mask.
    q: [B, Lq, H, D], k, v: [B, Lk, Hk, D], all bfloat16 or all float16, D 64, 128 or 256.
  """
  B, Lq, H, D = q.shape
  Lk, Hk = k.shape[1:3]
  G = H // Hk
  M, T, padded = plan.lo.shape
  tiles, lines = plan.tiles, plan.forward
  safe = tiles.safe or target.current().interpret is not None
  step = math.gcd(tiles.k, 128 if D <= 128 else 64)  # keys in shared memory at a time
  steps = tiles.k // step  # of an entry
  stages = tiles.stages or _stages(D, step, T, safe)
  section = _section(B * Hk, 2 * Lk * D * q.dtype.itemsize)
  N = lines.line.shape[1]
  items = B * H * N
  blocks = min(tiles.blocks or items, items)

  def body(
    q_g, k_g, v_g, code_g, lo_g, hi_g, line_g, count_g, entry_g, out_g, lse_g,
    q_s, k_s, v_s, code_s, bounds_s, lse_s, p_s, q_full, k_full, v_full, k_free, v_free, turn,
  ):  # fmt: skip
    wg = lax.axis_index("wg")

    def each_item(work):
      """Calls work(item, steps done before) for the items of this thread block; the steps of all."""
      block = lax.axis_index("block")
      if blocks == items:
        return work(item(block), 0)

      def place(n):
        """Items are sorted by length: dealing every other round backwards evens the sums out."""
        return n * blocks + jnp.where(lax.rem(n, jnp.int32(2)) == 0, block, blocks - 1 - block)

      full = items // blocks
      rounds = full + (place(jnp.int32(full)) < items).astype(jnp.int32)
      return lax.fori_loop(0, rounds, lambda n, done: work(item(place(n)), done), 0)

    def item(n):
      head = lax.rem(n, jnp.int32(section * G))
      n = lax.div(n, jnp.int32(section * G))
      r, n = lax.rem(n, jnp.int32(N)), lax.div(n, jnp.int32(N))
      pair = n * section + lax.div(head, jnp.int32(G))
      b, hk = lax.div(pair, jnp.int32(Hk)), lax.rem(pair, jnp.int32(Hk))
      h, m = hk * G + lax.rem(head, jnp.int32(G)), b if M > 1 else 0
      partial = count_g[m, r, 0] * steps
      return _Item(b, hk, h, m, r, partial, partial + count_g[m, r, 1] * steps)

    def slot_of(step):
      return lax.rem(step, jnp.int32(stages))

    def take_turns():
      """Lets the other consumer go on, and waits until it does the same."""
      plgpu.barrier_arrive(turn)
      plgpu.barrier_wait(turn)

    def entry(at, i):
      return entry_g[at.m, at.r, lax.div(i, jnp.int32(steps)) if steps > 1 else i]

    def consume(at, done):
      b, h, m = at.b, at.h, at.m
      rows = pl.ds(line_g[m, at.r] * tiles.q + wg * _ROWS, _ROWS)
      plgpu.copy_gmem_to_smem(q_g.at[b, rows, h], q_s.at[wg], q_full.at[wg])
      plgpu.copy_gmem_to_smem(lo_g.at[m, :, rows], bounds_s.at[wg, 0], q_full.at[wg])
      plgpu.copy_gmem_to_smem(hi_g.at[m, :, rows], bounds_s.at[wg, 1], q_full.at[wg])
      acc = _constant(0, (_ROWS, D), _TILE)
      top, mass = _constant(_FLOOR, (_ROWS,), _ROW), _constant(0, (_ROWS,), _ROW)
      plgpu.barrier_wait(q_full.at[wg])

      def wait_for_keys(i):
        pl.when(i < at.total)(lambda: plgpu.barrier_wait(k_full.at[slot_of(done + i)]))

      def step_of(masked):
        def do(i, carry):
          acc, top, mass = carry
          slot = slot_of(done + i)
          t = term(entry(at, i)) if masked and T > 1 else 0

          def products(s_acc):
            plgpu.wgmma(s_acc, q_s.at[wg], k_s.at[slot].transpose((1, 0)))
            take_turns()
            return s_acc[...]

          s = pl.run_scoped(products, plgpu.ACC((_ROWS, step), jnp.float32))
          s, unit = _logits(options, s)
          if masked:
            c = _spread(plgpu.load(code_s.at[slot], layout=_COLUMN), s.shape, 1)
            lo, hi = (plgpu.load(bounds_s.at[wg, x, t], layout=_ROW) for x in range(2))
            # lo <= c < hi in one comparison: below lo the difference wraps to the largest numbers.
            width = jnp.maximum(hi - lo, 0).astype(jnp.uint32)
            seen = (c - _spread(lo, s.shape, 0)).astype(jnp.uint32) < _spread(width, s.shape, 0)
            s = jnp.where(seen, s, _MASKED / unit)
            plgpu.commit_smem()  # the codes are read before TMA writes the next ones
          plgpu.barrier_arrive(k_free.at[slot])
          new = jnp.maximum(top, s.max(axis=1) * unit)
          shrink = jnp.exp2(top - new)
          p = jnp.exp2(s * unit - _spread(new, s.shape, 0))
          acc = acc * _spread(shrink, acc.shape, 0)
          mass = mass * shrink
          left = p.astype(q_g.dtype)
          if D <= 128:
            mass = mass + p.sum(axis=1)
            # Pins the softmax into this consumer's half of the turn.
            acc, mass, new, left = lax.optimization_barrier((acc, mass, new, left))
          if safe:
            p_s[wg] = left
            plgpu.commit_smem()
          plgpu.barrier_arrive(turn)
          plgpu.barrier_wait(v_full.at[slot])
          plgpu.barrier_wait(turn)
          if D > 128:  # registers: P is summed while the other consumer leaves the tensor cores
            mass = mass + p.sum(axis=1)

          def values(out_acc):
            plgpu.wgmma(out_acc, p_s.at[wg] if safe else left, v_s.at[slot])
            wait_for_keys(i + 1)
            return out_acc[...] if safe else None

          if safe:
            acc = acc + pl.run_scoped(values, plgpu.ACC((_ROWS, D), jnp.float32))
          else:
            acc = pl.run_state(values)(plgpu.ACC.init(acc))
          plgpu.barrier_arrive(v_free.at[slot])
          return acc, new, mass

        return do

      wait_for_keys(0)
      pl.when(wg == 1)(take_turns)
      carry = lax.fori_loop(0, at.partial, step_of(True), (acc, top, mass))
      acc, top, mass = lax.fori_loop(at.partial, at.total, step_of(False), carry)
      pl.when(wg == 0)(take_turns)

      some = mass > 0
      safe_mass = jnp.where(some, mass, 1.0)
      q_s[wg] = (acc * _spread(1 / safe_mass, acc.shape, 0)).astype(q_g.dtype)
      lse_s[wg] = jnp.where(some, top * (1 / _LOG2E) + jnp.log(safe_mass), -jnp.inf)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(q_s.at[wg], out_g.at[b, rows, h])
      plgpu.copy_smem_to_gmem(lse_s.at[wg], lse_g.at[b, h, rows])
      plgpu.wait_smem_to_gmem(0)
      return done + at.total

    def produce(at, done):
      def copy(i, _):
        slot, again = slot_of(done + i), done + i >= stages
        first = column(entry(at, i)) * tiles.k
        keys = pl.ds(first + lax.rem(i, jnp.int32(steps)) * step if steps > 1 else first, step)
        pl.when(again)(lambda: plgpu.barrier_wait(k_free.at[slot]))
        plgpu.copy_gmem_to_smem(k_g.at[at.b, keys, at.hk], k_s.at[slot], k_full.at[slot])
        plgpu.copy_gmem_to_smem(code_g.at[at.m, keys], code_s.at[slot], k_full.at[slot])
        pl.when(again)(lambda: plgpu.barrier_wait(v_free.at[slot]))
        plgpu.copy_gmem_to_smem(v_g.at[at.b, keys, at.hk], v_s.at[slot], v_full.at[slot])

      lax.fori_loop(0, at.total, copy, None)
      return done + at.total

    @pl.when(wg < _CONSUMERS)
    def _():
      plgpu.set_max_registers(_REGISTERS, action="increase")
      each_item(consume)

    @pl.when(wg == _CONSUMERS)
    def _():
      plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
      done = each_item(produce)

      # Every arrival is awaited before the barriers go away.
      @pl.loop(jnp.maximum(done - stages, 0), done)
      def _(i):
        plgpu.barrier_wait(k_free.at[slot_of(i)])
        plgpu.barrier_wait(v_free.at[slot_of(i)])

  def operand(*shape):
    swizzle = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
    return plgpu.SMEM(shape, q.dtype, transforms=swizzle)

  def barrier(arrivals, count):
    return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)

  out, lse = plgpu.kernel(
    body,
    out_type=[
      jax.ShapeDtypeStruct(q.shape, q.dtype),
      # TMA wants rows of whole 16 bytes, so the log-sum-exp keeps its padding in memory.
      jax.ShapeDtypeStruct((B, H, padded), jnp.float32),
    ],
    scratch_types=[
      operand(_CONSUMERS, _ROWS, D),
      operand(stages, step, D),
      operand(stages, step, D),
      plgpu.SMEM((stages, step), jnp.int32),
      plgpu.SMEM((_CONSUMERS, 2, T, _ROWS), jnp.int32),
      plgpu.SMEM((_CONSUMERS, _ROWS), jnp.float32),
      operand(_CONSUMERS, _ROWS, step) if safe else None,
      barrier(3, _CONSUMERS),
      barrier(2, stages),
      barrier(1, stages),
      barrier(_CONSUMERS, stages),
      barrier(_CONSUMERS, stages),
      barrier(_CONSUMERS, 1),
    ],
    grid=(blocks,),
    grid_names=("block",),
    num_threads=_CONSUMERS + 1,
    thread_name="wg",
    kernel_name="attention_forward",
    compiler_params=plgpu.CompilerParams(approx_math=True),
    interpret=interpreter(),
  )(q, k, v, plan.code, plan.lo, plan.hi, lines.line, lines.count, lines.entry)
  return out, lse[:, :, :Lq]


def interpreter():
  """Interpreter parameters of the current target; None to compile."""
  interpret = target.current().interpret
  return plgpu.InterpretGPUParams() if interpret is True else interpret


def _stages(D: int, step: int, T: int, safe: bool) -> int:
  """Key tiles in flight: as many as shared memory holds, at most 3."""
  fixed = _CONSUMERS * _ROWS * (2 * D + 8 * T + 4 + (2 * step if safe else 0)) + 1024
  return min(3, (_SHARED_BYTES - fixed) // (step * (4 * D + 4)))


def _section(pairs: int, pair_bytes: int) -> int:
  """Pairs (row, key head) of a section: the most that share the cache and divide them all."""
  most = max(1, _L2_BYTES // pair_bytes)
  return next(n for n in range(min(most, pairs), 0, -1) if pairs % n == 0)


def _logits(options: Options, s):
  """(x, unit > 0) with logits · log2 e = x · unit: the factor is left to the multiply-add under the exp2."""
  if options.soft_cap is not None:
    return jnp.tanh(s * (options.scale / options.soft_cap)), options.soft_cap * _LOG2E
  unit = options.scale * _LOG2E
  return (s, unit) if unit > 1e-6 else (s * unit, 1.0)


def _constant(value, shape, layout):
  return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _spread(x, shape, axis: int):
  return lax.broadcast_in_dim(x, shape, [axis])
