"""The masks of the literature by name, each an `AttnMask` made from a relation table.

Training code goes through `Relations` and a layout's slots; these functions are the same tables over
the plainest layout (streams stored one after the other) for tools, tests and benchmarks. All take
`doc` int32[B, N], contiguous document indices with −1 for padding, and are document aware; block sizes,
cuts and orders may be traced, so that a curriculum changes them without recompiling.

Legend: B rows · N clean tokens · F tokens of a frame.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from genmodels.contracts import Slots
from genmodels.masks.core import CODE_HIDDEN, AttnMask, normalise, plain_slots
from genmodels.masks.relations import Relations

Array = jax.Array
Blocks = int | Array | tuple[Array, Array]


def documents(doc: Array) -> tuple[Array, Array]:
  """doc_lo, doc_hi int32[B, N]: the half-open coordinate interval of each token's document."""
  doc = jnp.asarray(doc, jnp.int32)
  at = jnp.broadcast_to(jnp.arange(doc.shape[1], dtype=jnp.int32), doc.shape)
  edge = doc[:, 1:] != doc[:, :-1]
  first = jnp.pad(edge, ((0, 0), (1, 0)), constant_values=True)
  last = jnp.pad(edge, ((0, 0), (0, 1)), constant_values=True)
  lo = jax.lax.cummax(jnp.where(first, at, 0), axis=1)
  hi = jax.lax.cummin(jnp.where(last, at + 1, doc.shape[1]), axis=1, reverse=True)
  return lo, hi


def blocks(doc: Array, block: Blocks) -> tuple[Array, Array]:
  """blk_lo, blk_hi int32[B, N]; a size makes blocks from each document's start, cut at its end."""
  lo, hi = documents(doc)
  if isinstance(block, tuple):
    return tuple(jnp.broadcast_to(jnp.asarray(x, jnp.int32), lo.shape) for x in block)
  at = jnp.arange(lo.shape[1], dtype=jnp.int32)
  blk_lo = lo + (at - lo) // block * block
  return blk_lo, jnp.minimum(blk_lo + block, hi)


def stack(doc: Array, streams: int = 1, *, block: Blocks = 1, order: Array | None = None) -> Slots:
  """Slots of `streams` copies of a row, one after the other.

  Args:
    order: int32[B, N], document start + generation rank; by default the position.
  """
  lo, hi = documents(doc)
  blk_lo, blk_hi = blocks(doc, block)
  pos = jnp.broadcast_to(jnp.arange(lo.shape[1], dtype=jnp.int32), lo.shape)
  order = pos if order is None else jnp.broadcast_to(order, lo.shape)

  def copies(x):
    return jnp.tile(jnp.asarray(x, jnp.int32), (1, streams))

  stream = jnp.repeat(jnp.arange(streams, dtype=jnp.int32), lo.shape[1])[None]
  lo, hi, blk_lo, blk_hi, pos, order, doc = map(copies, (lo, hi, blk_lo, blk_hi, pos, order, doc))
  return plain_slots(pos, lo, hi, blk_lo=blk_lo, blk_hi=blk_hi, order=order, stream=stream, doc=doc)


def _one(doc, relation, *, coord="pos", **slots) -> AttnMask:
  return Relations({("c", "c"): relation}, ("c",), {"c": coord}).mask(stack(doc, **slots))


def causal(doc: Array) -> AttnMask:
  """Autoregressive, packed documents."""
  return _one(doc, "POS_LE")


def full(doc: Array) -> AttnMask:
  """Bidirectional inside each document: encoders, MDLM, LLaDA, Dream."""
  return _one(doc, "ALL")


def window(doc: Array, length: int) -> AttnMask:
  """Causal, the last `length` keys (the query's own included)."""
  return _one(doc, f"WIN({length})")


def prefix_lm(doc: Array, prefix: Array) -> AttnMask:
  """Causal, but a prefix sees all of itself; `prefix` int32[B, N] or scalar, length per document."""
  lo, hi = documents(doc)
  end = jnp.minimum(lo + prefix, hi)
  at = jnp.arange(lo.shape[1], dtype=jnp.int32)
  inside = at < end
  return spans(doc, (jnp.where(inside, lo, at), jnp.where(inside, end, at + 1)))


def eso_mixed(doc: Array, cut: Array) -> AttnMask:
  """Tokens from `cut` (int32[B, N] or scalar, per document) on see the whole document, others causal."""
  lo, hi = documents(doc)
  at = jnp.arange(lo.shape[1], dtype=jnp.int32)
  inside = at >= lo + cut
  return spans(doc, (jnp.where(inside, lo + cut, at), jnp.where(inside, hi, at + 1)))


def eso_diffusion(doc: Array, clean: Array, order: Array) -> AttnMask:
  """Eso-LM (A), diffusion: clean tokens see each other, masked ones see them and earlier masked ones.

  Args:
    clean: bool[B, N]; `order` must rank the clean tokens of a document first.
  """
  lo, _ = documents(doc)
  doc = jnp.asarray(doc, jnp.int32)
  same = doc[:, :, None] == doc[:, None, :]
  count = (same & clean[:, None, :]).sum(-1, dtype=jnp.int32)
  blk = jnp.where(clean, lo, order), jnp.where(clean, lo + count, order + 1)
  return _one(doc, "SPAN_LE", coord="order", block=blk, order=order)


def spans(doc: Array, span: tuple[Array, Array]) -> AttnMask:
  """Causal, but each span (images in text; Transfusion) sees all of itself; text: spans of one token."""
  return _one(doc, "SPAN_LE", block=span)


def block_causal(doc: Array, block: Blocks) -> AttnMask:
  """Each block sees itself and earlier ones: D2F, multi-block decoding, Prefix-DLM (prompt, answer)."""
  return _one(doc, "BLK_LE", block=block)


def scale_causal(doc: Array, scales: tuple[int, ...]) -> AttnMask:
  """VAR: blocks are the scales of an image, `scales` tokens each; a document is one image."""
  lo, hi = documents(doc)
  at = jnp.arange(lo.shape[1], dtype=jnp.int32) - lo
  edges = jnp.cumsum(jnp.asarray((0, *scales), jnp.int32))
  scale = jnp.searchsorted(edges, at, side="right") - 1
  blk_hi = jnp.minimum(lo + edges[jnp.minimum(scale + 1, len(scales))], hi)
  return block_causal(doc, (lo + edges[scale], blk_hi))


def any_order(doc: Array, order: Array) -> AttnMask:
  """Content tokens stored in raster order, seeing those of no later generation order."""
  return _one(doc, "ORD_LE", coord="order", order=order)


def any_order_two_stream(doc: Array, order: Array) -> AttnMask:
  """XLNet, AS-ARM, RandAR's rule: stored [content | queries]; a query sees strictly earlier content."""
  table = {("h", "h"): "ORD_LE", ("g", "h"): "ORD_LT"}
  return Relations(table, ("h", "g"), {"h": "order"}).mask(stack(doc, 2, order=order))


def subset(doc: Array, visible: Array) -> AttnMask:
  """MAR: every token sees the tokens of its document that are `visible`, bool[B, N]."""
  mask = full(doc)
  return mask.replace(code=jnp.where(visible, mask.code, CODE_HIDDEN))


def dual(doc: Array, block: Blocks, noisy: str, clean: str, *, copies=1, order=None) -> AttnMask:
  """Stored [noisy copies | clean]: a copy sees itself by `noisy` and earlier clean blocks."""
  names = tuple(f"n{i}" for i in range(copies))
  table = {("c", "c"): clean}
  for n in names:
    table |= {(n, n): noisy, (n, "c"): "BLK_LT"}
  coord = {n: "order" for n in names if order is not None}
  return Relations(table, (*names, "c"), coord).mask(stack(doc, copies + 1, block=block, order=order))


def bd3(doc: Array, block: Blocks, copies: int = 1) -> AttnMask:
  """BD3-LM, SDAR, Fast-dLLM v2, ACDiT; with copies: complementary masks over one clean stream."""
  return dual(doc, block, "BLK_EQ", "BLK_LE", copies=copies)


def context_causal(doc: Array, block: Blocks) -> AttnMask:
  """NBDiff and TiDAR in training: a causal clean stream."""
  return dual(doc, block, "BLK_EQ", "POS_LE")


def idlm(doc: Array, block: Blocks) -> AttnMask:
  """I-DLM and Jacobi Forcing: noisy blocks causal inside."""
  return dual(doc, block, "BLK_EQ&POS_LE", "POS_LE")


def wedlm(doc: Array, block: Blocks, order: Array) -> AttnMask:
  """WeDLM: noisy blocks causal in an order that permutes tokens within blocks (observed first)."""
  return dual(doc, block, "BLK_EQ&ORD_LE", "POS_LE", order=order)


def nbdiff_decode(doc: Array, start: Array, end: Array) -> AttnMask:
  """NBDiff inference, one stream: causal, the active block [start, end) (int32[B, 1]) sees itself."""
  lo, _ = documents(doc)
  at = jnp.arange(lo.shape[1], dtype=jnp.int32)
  inside = (at >= start) & (at < end)
  return spans(doc, (jnp.where(inside, start, at), jnp.where(inside, end, at + 1)))


def eso_sequential(doc: Array, cut: Array) -> AttnMask:
  """Eso-LM (A), sequential part, stored [noisy | clean]: clean prefix of `cut` tokens sees itself."""
  lo, hi = documents(doc)
  end = jnp.minimum(lo + cut, hi)
  at = jnp.arange(lo.shape[1], dtype=jnp.int32)
  span = jnp.where(at < end, lo, at), jnp.where(at < end, end, at + 1)
  table = {("n", "n"): "SELF", ("n", "c"): "POS_LT", ("c", "c"): "SPAN_LE"}
  return Relations(table, ("n", "c")).mask(stack(doc, 2, block=span))


def eso_ordered(doc: Array, order: Array) -> AttnMask:
  """Eso-LM (B), sequential part, stored [noisy | clean]: everything by one random order."""
  table = {("n", "n"): "SELF", ("n", "c"): "ORD_LT", ("c", "c"): "ORD_LE"}
  return Relations(table, ("n", "c"), {"n": "order", "c": "order"}).mask(stack(doc, 2, order=order))


def frame_window(doc: Array, frame: int, frames: int, sink: int) -> AttnMask:
  """Video: a frame of `frame` tokens sees itself, the last `frames` frames and the first `sink`."""
  relation = f"BLK_LE&SINK({sink * frame})|BLK_LE&BACK({(frames - 1) * frame})"
  return _one(doc, relation, block=frame)


def shared_prefix(doc: Array, prompt_lo: Array, prompt_hi: Array) -> AttnMask:
  """GRPO: completions (documents, causal) that also see one prompt, stored once as its own document.

  Args:
    prompt_lo, prompt_hi: int32[B, N], the prompt of each token; empty interval for prompt tokens.
  """
  mask = causal(doc)
  some = (jnp.asarray(doc) >= 0) & (prompt_lo < prompt_hi)
  lo = jnp.concatenate([mask.lo, jnp.where(some, prompt_lo, 0)[:, None]], 1)
  hi = jnp.concatenate([mask.hi, jnp.where(some, prompt_hi, 0)[:, None]], 1)
  return AttnMask(mask.code, *normalise(lo, hi))


def tidar_decode(prefix: Array, drafts: int, length: int) -> AttnMask:
  """TiDAR decoding: stored [committed tokens, drafts | masks after 0 drafts | … | masks after all].

  Args:
    prefix: int32[B, 1], committed tokens P; the drafts are coordinates P … P + K − 1.
    drafts: K (static); each of the K + 1 groups of masks has K slots and its own origin P + j.
    length: static number of slots of the clean stream, at least P + K; later ones are empty.
  """
  prefix = jnp.asarray(prefix, jnp.int32)
  groups = tuple(f"m{j}" for j in range(drafts + 1))
  table = {("c", "c"): "POS_LE"}
  for m in groups:
    table |= {(m, "c"): "BLK_LT", (m, m): "BLK_EQ"}
  at = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (prefix.shape[0], length))
  origin = prefix + jnp.repeat(jnp.arange(drafts + 1, dtype=jnp.int32), drafts)[None]
  inner = origin + jnp.tile(jnp.arange(drafts, dtype=jnp.int32), drafts + 1)[None]
  stream = jnp.concatenate([jnp.zeros_like(at), origin - prefix + 1], 1)
  slots = plain_slots(
    jnp.concatenate([at, inner], 1),
    jnp.zeros_like(stream),
    prefix + 2 * drafts,
    blk_lo=jnp.concatenate([at, origin], 1),
    blk_hi=jnp.concatenate([at + 1, origin + drafts], 1),
    stream=stream,
    doc=jnp.concatenate([jnp.where(at < prefix + drafts, 0, -1), jnp.zeros_like(inner)], 1),
  )
  return Relations(table, ("c", *groups)).mask(slots)
