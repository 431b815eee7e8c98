"""Interval attention on TPU: three Mosaic kernels over flat lists of tiles.

Scores live in base 2 (one multiply before exp2). Masked logits lie so far below the smallest running
maximum that exp2 underflows to exactly 0: no second `where` on the probabilities, and a query without
a key ends with a zero sum. The dk/dv kernel works on transposed scores, keys in sublanes and queries
in lanes, so that what belongs to a query is a lane vector there and the accumulators stay in place
over a whole line and over the query heads of a key head: no atomics, no buffers per query head.
(specs: kernels §7; online softmax: Milakov & Gimelshein 2018; tiles: Dao 2023.)

Legend: B rows · L, Lq queries · Lk keys · H query heads · Hk key heads · G queries per key head · D, Dv
head sizes · T intervals · q, k queries and keys of a tile · c keys of a part of it.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from genmodels.kernels import pallas_tpu_bodies as bodies
from genmodels.kernels import pallas_tpu_lists as lists
from genmodels.kernels import target
from genmodels.kernels.pallas_tpu_lists import LANES, Layout, Plan, Sizes, TileList, Tiles, plan
from genmodels.kernels.varying import axes_of, vary

Array = jax.Array

__all__ = ["Plan", "Tiles", "attend", "attend_pages", "gradients", "plan", "unavailable", "vmem_bytes"]

_MSB = -(2**31)
_MIB = 2**20


class _Options(NamedTuple):
  """What the kernels close over; `interpret` and `vmem` (bytes) are of the target at the forward trace."""

  scale: float
  soft_cap: float | None
  interpret: Any
  vmem: int


def unavailable(on: target.Target) -> str | None:
  """Why the TPU kernels cannot run on a target; None if they can."""
  if on.platform == "tpu":
    if on.kind.startswith(("TPU v2", "TPU v3")):
      return f"{on.kind!r} has 16 KiB of scalar memory, too little for tile lists"
    return None
  if on.platform == "cpu" and (on.interpret is True or isinstance(on.interpret, pltpu.InterpretParams)):
    return None
  return f"it needs a TPU (or an interpreter), the platform is {on.platform!r}"


def attend(
  q: Array, k: Array, v: Array, plan: Plan, scale: float, soft_cap: float | None, deterministic: bool = False
):
  """out [B, Lq, H, Dv], lse float32[B, H, Lq]; arguments as in `kernels.attention`.

  Raises:
    ValueError: tiles that the chip's vector memory cannot hold at these head sizes.
  """
  del deterministic  # it always is
  operands = (q, k, v, plan)
  return _attend(_options(scale, soft_cap), *vary(operands, axes_of(operands)))


def gradients(q, k, v, plan, out, lse, d_out, d_lse, scale, soft_cap, deterministic=False):
  """dq, dk, dv of one key segment; arguments as in `kernels.gradients`."""
  del deterministic
  operands = (q, k, v, plan, out, lse), (d_out, d_lse)
  residuals, cotangents = vary(operands, axes_of(operands))
  return _backward(_options(scale, soft_cap), residuals, cotangents)[:3]


def attend_pages(
  q: Array, k: Array, v: Array, plan: Plan, pages: Array, scale: float, soft_cap: float | None
) -> tuple[Array, Array]:
  """As `attend` without gradients, for keys in pages of a pool: the list's columns are looked up.

  Args:
    q: [B, Lq, H, D].
    k: [P, page, Hk, D], v: [P, page, Hk, Dv], in any float type; a page is a key tile of the plan.
    plan: of a mask over N · page logical keys a row.
    pages: int32[B, N], the page of the pool that holds a row's n-th tile; anything where all are hidden.

  Raises:
    ValueError: pages that are no key tiles of the plan; a table that does not fit scalar memory.
  """
  B, N = pages.shape
  if k.shape[1] != plan.tiles.k or N * plan.tiles.k != plan.lengths[1] or B != q.shape[0]:
    raise ValueError(
      f"attend_pages: a page is a key tile: got a plan with k={plan.tiles.k} for {plan.lengths[1]} keys, "
      f"q {q.shape}, pool {k.shape}, pages {pages.shape}; plan N · page keys with tiles=(q, {k.shape[1]})"
    )
  if (most := max(x.entry.shape[1] for x in plan.fwd) + B * N - lists.MAX_ENTRIES) > 0:
    raise ValueError(
      f"attend_pages: tile list and page table are {most} entries more than scalar memory's "
      f"{lists.MAX_ENTRIES}; take larger pages, fewer rows a device, or a smaller Tiles.capacity"
    )
  pages = jnp.clip(pages, 0, k.shape[0] - 1)
  operands = vary((q, k, v, plan, pages), axes_of((q, k, v, plan, pages)))
  return _outputs(_options(scale, soft_cap), *operands)


def _options(scale, soft_cap) -> _Options:
  return _Options(scale, soft_cap, target.current().interpret, lists.chip().vmem)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, q, k, v, plan):
  return _forward(options, q, k, v, plan)[0]


def _forward(options, q, k, v, plan):
  out, lse = _outputs(options, q, k, v, plan)
  out, lse = checkpoint_name(out, "attn_out"), checkpoint_name(lse, "attn_lse")
  return (out, lse), (q, k, v, plan, out, lse)


def _outputs(options, q, k, v, plan, pages=None):
  """out [B, Lq, H, Dv], lse float32[B, H, Lq]; keys from a pool if `pages` are given."""
  sizes, lq = plan.tiles.fwd, q.shape[1]
  qh, kh, vh = _heads_first(q, sizes.q), _heads_first(k, sizes.k), _heads_first(v, sizes.k)
  code, lo, hi = lists.padded(plan.mask, sizes)
  B, T, _ = lo.shape
  bounds = jnp.stack(_interval(lo, hi), 2).reshape(B, 2 * T, -1)
  outs, lses = [], []
  for part in plan.fwd:
    at = _Place(options, part.layout, sizes, plan, q, k, v)
    lines = at.lines(sizes.q)
    q_part = qh[:, :, lines]
    out, lse = at.call(
      bodies.forward_kernel,
      part,
      "interval_attention_fwd",
      [
        (q_part, at.per_query),
        (kh, at.per_key if pages is None else at.per_page),
        (vh, at.per_key if pages is None else at.per_page),
        (code[:, None], at.code),
        (bounds[..., lines], at.bounds),
      ],
      [
        (jax.ShapeDtypeStruct((*q_part.shape[:3], v.shape[3]), q.dtype), at.per_query),
        (jax.ShapeDtypeStruct((*q_part.shape[:2], 1, q_part.shape[2]), jnp.float32), at.per_query_lane),
      ],
      [
        ((2 * T, sizes.q, LANES), jnp.int32),
        ((sizes.q, LANES), jnp.float32),
        ((sizes.q, LANES), jnp.float32),
        ((sizes.q, v.shape[3]), jnp.float32),
      ],
      temporaries=3,
      flops=2 * (q.shape[3] + v.shape[3]),
      pages=pages,
    )
    outs.append(out)
    lses.append(lse[:, :, 0])
  return _poisoned(plan, _heads_back(outs, lq)), _poisoned(plan, _one(lses, 2)[..., :lq])


def _backward(options, residuals, cotangents):
  q, k, v, plan, out, lse = residuals
  d_out, d_lse = cotangents
  some = lse > -jnp.inf
  # dS = P (dP − Δ) with Δ = Σ out·d_out, and P·d_lse more from the LSE output.
  delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1).transpose(0, 2, 1) - d_lse
  # Every logit of an empty query is masked, whatever its statistics; they must be finite.
  stats = jnp.stack([jnp.where(some, lse * bodies.LOG2E, 0), jnp.where(some, delta, 0)], 2)  # [B, H, 2, L]
  operands = q, k.astype(q.dtype), v.astype(q.dtype), d_out.astype(q.dtype), stats
  dq = _grad_queries(options, plan, *operands)
  dk, dv = _grad_keys(options, plan, *operands)
  return *(_poisoned(plan, x).astype(y.dtype) for x, y in ((dq, q), (dk, k), (dv, v))), None


_attend.defvjp(_forward, _backward)


def _grad_queries(options, plan, q, k, v, d_out, stats):
  sizes, (_, lq, _, D) = Sizes(*plan.tiles.dq), q.shape
  qh, gh = _heads_first(q, sizes.q), _heads_first(d_out, sizes.q)
  kh, vh = _heads_first(k, sizes.k), _heads_first(v, sizes.k)
  stats = lists.pad(stats, 3, sizes.q)
  code, lo, hi = lists.padded(plan.mask, sizes)
  B, T, _ = lo.shape
  bounds = jnp.stack(_interval(lo, hi), 2).reshape(B, 2 * T, -1)
  out = []
  for part in plan.dq:
    at = _Place(options, part.layout, sizes, plan, q, k, v)
    lines = at.lines(sizes.q)
    q_part = qh[:, :, lines]
    (dq,) = at.call(
      bodies.grad_queries_kernel,
      part,
      "interval_attention_dq",
      [
        (q_part, at.per_query),
        (kh, at.per_key),
        (vh, at.per_key),
        (gh[:, :, lines], at.per_query),
        (stats[..., lines], at.per_query_lane),
        (code[:, None], at.code),
        (bounds[..., lines], at.bounds),
      ],
      [(jax.ShapeDtypeStruct(q_part.shape, q.dtype), at.per_query)],
      [
        ((2 * T, sizes.q, LANES), jnp.int32),
        ((2, sizes.q, LANES), jnp.float32),
        ((sizes.q, D), jnp.float32),
      ],
      temporaries=5,
      flops=2 * (2 * D + v.shape[3]),
    )
    out.append(dq)
  return _heads_back(out, lq)


def _grad_keys(options, plan, q, k, v, d_out, stats):
  sizes, lk = Sizes(*plan.tiles.dkv), k.shape[1]
  qh, gh = _heads_first(q, sizes.q), _heads_first(d_out, sizes.q)
  kh, vh = _heads_first(k, sizes.k), _heads_first(v, sizes.k)
  stats = lists.pad(stats, 3, sizes.q)
  code, lo, hi = lists.padded(plan.mask, sizes)
  bounds = jnp.stack(_interval(lo, hi), 2)  # [B, T, 2, Lq]
  outs = []
  for part in plan.dkv:
    at = _Place(options, part.layout, sizes, plan, q, k, v, by_key=True)
    lines = at.lines(sizes.k)
    k_part, v_part = kh[:, :, lines], vh[:, :, lines]
    outs.append(
      at.call(
        bodies.grad_keys_kernel,
        part,
        "interval_attention_dkv",
        [
          (qh, at.per_query),
          (k_part, at.per_key),
          (v_part, at.per_key),
          (gh, at.per_query),
          (stats, at.per_query_lane),
          (code[:, None, lines], at.code),
          (bounds, at.bounds_of_term),
        ],
        [
          (jax.ShapeDtypeStruct(k_part.shape, k.dtype), at.per_key),
          (jax.ShapeDtypeStruct(v_part.shape, v.dtype), at.per_key),
        ],
        [
          ((sizes.k, LANES), jnp.int32),
          ((sizes.k, k.shape[3]), jnp.float32),
          ((sizes.k, v.shape[3]), jnp.float32),
        ],
        temporaries=5,
        flops=4 * (q.shape[3] + v.shape[3]),
      )
    )
  return tuple(_heads_back(x, lk) for x in zip(*outs))


class _Place:
  """One kernel call: which block of each operand an entry needs.

  The grid is (heads, entries) for lines of queries and (key heads, entries, G) for lines of keys: a key
  tile and its sums stay where they are while all queries of its line pass. A mask with one row has one
  list, and the rows of the batch join the heads.
  """

  def __init__(self, options, layout: Layout, sizes: Sizes, plan, q, k, v, by_key=False):
    self.options, self.layout, self.sizes, self.by_key = options, layout, sizes, by_key
    self.rows, self.heads, self.key_heads = q.shape[0], q.shape[2], k.shape[2]
    self.group = self.heads // self.key_heads
    self.shared = plan.code.shape[0] == 1
    self.columns = -(-plan.lengths[1] // sizes.k)
    lines = -(-plan.lengths[1] // sizes.k) if by_key else -(-plan.lengths[0] // sizes.q)
    share = plan.tiles.density * (layout.stop - layout.start) / lines
    self.pairs = int(share * self.rows * self.heads * math.prod(plan.lengths))
    self.kind = jax.typeof(q).manual_axis_type

  def lines(self, size: int) -> slice:
    return slice(self.layout.start * size, self.layout.stop * size)

  # Each gives the shape of an operand's block, and its index at (first grid index, entry, and g of the dk/dv
  # grid or the table of pages).

  def per_query(self, x):
    index = lambda h, e, *g: (*self._query_head(h, e, *g), self._i(e), 0)
    return (None, None, self.sizes.q, x.shape[3]), index

  def per_query_lane(self, x):
    index = lambda h, e, *g: (*self._query_head(h, e, *g), 0, self._i(e))
    return (None, None, x.shape[2], self.sizes.q), index

  def per_key(self, x):
    index = lambda h, e, *_: (*self._key_head(h, e), self._j(e), 0)
    return (None, None, self.sizes.k, x.shape[3]), index

  def per_page(self, x):
    def index(h, e, pages):
      row, head = self._key_head(h, e)
      return pages[row * self.columns + self._j(e)], head, 0, 0

    return (None, None, self.sizes.k, x.shape[3]), index

  def code(self, x):
    return (None, 1, self.sizes.k), lambda h, e, *_: (self._mask_row(e), 0, self._j(e))

  def bounds(self, x):
    return (None, x.shape[1], self.sizes.q), lambda h, e, *_: (self._mask_row(e), 0, self._i(e))

  def bounds_of_term(self, x):
    index = lambda h, e, *_: (self._mask_row(e), self.layout.term_of(e), 0, self._i(e))
    return (None, None, 2, self.sizes.q), index

  def _i(self, e):
    return self.layout.column_of(e) if self.by_key else self.layout.line_of(e)

  def _j(self, e):
    return self.layout.line_of(e) if self.by_key else self.layout.column_of(e)

  def _mask_row(self, e):
    return 0 if self.shared else self.layout.row_of(e)

  def _query_head(self, h, e, *g):
    row, head = self._row(h, e)
    return row, head * self.group + g[0] if self.by_key else head

  def _key_head(self, h, e):
    row, head = self._row(h, e)
    return row, head if self.by_key or self.group == 1 else jax.lax.div(head, jnp.int32(self.group))

  def _row(self, h, e):
    """Row and head of the first grid axis."""
    if not self.shared or self.rows == 1:
      return (0 if self.rows == 1 else self.layout.row_of(e)), h
    heads = jnp.int32(self.key_heads if self.by_key else self.heads)
    return jax.lax.div(h, heads), jax.lax.rem(h, heads)

  def call(
    self, kernel, part: TileList, name: str, inputs, outputs, scratch, *, temporaries, flops, pages=None
  ):
    """Runs a kernel over the entries of a list.

    Args:
      inputs, outputs: (array or its shape, method that gives its block), k and v second and third.
      scratch: (shape, dtype).
      temporaries: arrays of q × c scores alive at a time; flops: of a visible pair.
      pages: as `attend_pages`, for blocks `per_page`.
    """

    def spec(x, block):
      shape, index = block(x)

      def index_map(h, s, *rest):
        # What follows the grid indices: the prefetched list, and after it the table of pages.
        at = 1 if self.by_key else 0
        return index(h, rest[at][s], *rest[:at], *rest[at + 1 :])

      return pl.BlockSpec(shape, index_map)

    heads = (self.key_heads if self.by_key else self.heads) * (self.rows if self.shared else 1)
    grid = (heads, part.count[0], *((self.group,) if self.by_key else ()))
    arrays = [x for x, _ in inputs]
    in_specs, out_specs = ([spec(*x) for x in xs] for xs in (inputs, outputs))
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=self.kind) for x, _ in outputs]
    blocks = [(s.block_shape, x.dtype) for s, x in zip(in_specs + out_specs, arrays + shapes)]
    size = lambda x: x.size * x.dtype.itemsize
    key = sum(x.shape[3] * x.dtype.itemsize for x in arrays[1:3])  # k and v of one key
    wanted = vmem_bytes(blocks, scratch, temporaries * self.sizes.q * self.sizes.k_compute * 4)
    if wanted > self.options.vmem and self.options.interpret is None:
      raise ValueError(
        f"attention: {name} with tiles {tuple(self.sizes)} needs about {wanted / _MIB:.0f} MiB of vector "
        f"memory, the chip has {self.options.vmem // _MIB}; take smaller tiles"
      )
    run = pl.pallas_call(
      functools.partial(kernel, place=self) if pages is None else _without_pages(kernel, self),
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1 if pages is None else 2,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        scratch_shapes=[pltpu.VMEM(*x) for x in scratch],
      ),
      out_shape=shapes,
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel", *("arbitrary",) * (len(grid) - 1)),
        vmem_limit_bytes=min(max(16 * _MIB, wanted * 3 // 2), self.options.vmem - 2 * _MIB),
      ),
      cost_estimate=pl.CostEstimate(
        flops=self.pairs * flops,
        transcendentals=self.pairs,
        bytes_accessed=sum(map(size, arrays + shapes)) + self.pairs // self.sizes.q * key,
      ),
      interpret=self.options.interpret or False,
      name=name,
    )
    return run(part.entry[0], *(() if pages is None else (pages.reshape(-1),)), *arrays)


def _without_pages(kernel, place: _Place):
  """Only index maps read the table of pages."""
  return lambda entries, _, *refs: kernel(entries, *refs, place=place)


def vmem_bytes(blocks, scratch, temporaries: int) -> int:
  """Vector memory of a kernel: blocks twice (one is fetched while another is used), scratch, temporaries.

  Args:
    blocks, scratch: (shape, dtype) pairs; None in a shape is a dimension that the kernel does not see.
    temporaries: bytes of scores alive at a time. Counted from the algorithm, the compiler may keep more:
      the limit that is set is 1.5 times the sum.
  """

  def size(shape, dtype):
    *lead, rows, columns = [n for n in shape if n is not None]
    total = -(-columns // LANES) * LANES * (-(-rows // 8) * 8) * jnp.dtype(dtype).itemsize
    return functools.reduce(lambda a, b: a * b, lead, total)

  return 2 * sum(size(*x) for x in blocks) + sum(size(*x) for x in scratch) + temporaries


def _interval(lo, hi):
  """(base, width) with lo <= code < hi as one signed comparison, code − base < width.

  code − lo < hi − lo as unsigned numbers; signed ones compare alike with the top bit flipped on both
  sides. An empty interval has the least width, which nothing is below.
  """
  return lo + _MSB, jnp.maximum(hi - lo, 0) + _MSB


def _heads_first(x: Array, multiple: int) -> Array:
  """[B, L, H, D] -> [B, H, L, D] with whole tiles of zeros behind."""
  return lists.pad(x.transpose(0, 2, 1, 3), 2, multiple)


def _heads_back(parts, length: int) -> Array:
  """Parts of [B, H, L, D] -> [B, length, H, D]."""
  return _one(parts, 2)[:, :, :length].transpose(0, 2, 1, 3)


def _one(parts, axis: int) -> Array:
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)


def _poisoned(plan: Plan, x: Array) -> Array:
  """NaN instead of what an overflowing list computed."""
  return x if plan.tiles.capacity is None else jnp.where(plan.overflow[0], jnp.nan, x)
