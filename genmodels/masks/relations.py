"""Relation tables: a mask said as "queries of stream a see keys of stream b by relation r".

Every relation implies the same document. A relation is a union (`|`) of intersections (`&`) of the
atoms below, each one an interval of the key stream's coordinate that follows from the query slot
alone: so `codes` and `bounds` are functions of one slot, a KV cache can store codes, and training
and decoding share one table. (specs: language §0.6, kernels §3.)

Legend: B rows · S slots · T intervals of a query. `x` is the query's coordinate in the coordinate of
the key stream ("pos" or "order"); [ds, de) its document, [bs, be) its block.

  ALL       [ds, de)            NONE       nothing
  BLK_EQ    [bs, be)            BLK_LT     [ds, bs)           BLK_LE   [ds, be)
  POS_LE    [ds, x]             POS_LT     [ds, x)            (key stream coded by "pos")
  ORD_LE    [ds, x]             ORD_LT     [ds, x)            (key stream coded by "order")
  SELF      [x, x]              SPAN_LE    [ds, max(x + 1, be)): causal, but a block sees all of itself
  WIN(w)    the last w keys up to x     NEAR(w)   [x − w, x + w]
  SINK(n)   the first n of the document BACK(n)   the last n before bs, and all that follow

`be` and `bs` on a stream coded by order assume that generation order permutes tokens within blocks.
"""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp

from genmodels.contracts import Slots
from genmodels.masks.core import CODE_HIDDEN, MAX_TERMS, STREAM, AttnMask, normalise

Array = jax.Array

# atom -> (slots, x, argument) -> (lo, hi), before the document's bounds are applied.
_ATOMS = {
  "ALL": lambda s, x, a: (s.doc_lo, s.doc_hi),
  "NONE": lambda s, x, a: (s.doc_lo, s.doc_lo),
  "BLK_EQ": lambda s, x, a: (s.blk_lo, s.blk_hi),
  "BLK_LT": lambda s, x, a: (s.doc_lo, s.blk_lo),
  "BLK_LE": lambda s, x, a: (s.doc_lo, s.blk_hi),
  "POS_LE": lambda s, x, a: (s.doc_lo, x + 1),
  "POS_LT": lambda s, x, a: (s.doc_lo, x),
  "ORD_LE": lambda s, x, a: (s.doc_lo, x + 1),
  "ORD_LT": lambda s, x, a: (s.doc_lo, x),
  "SELF": lambda s, x, a: (x, x + 1),
  "SPAN_LE": lambda s, x, a: (s.doc_lo, jnp.maximum(x + 1, s.blk_hi)),
  "WIN": lambda s, x, a: (x - a + 1, x + 1),
  "NEAR": lambda s, x, a: (x - a, x + a + 1),
  "SINK": lambda s, x, a: (s.doc_lo, s.doc_lo + a),
  "BACK": lambda s, x, a: (s.blk_lo - a, s.doc_hi),
}
_ARGUMENT = ("WIN", "NEAR", "SINK", "BACK")
_NEEDS = {"POS_LE": "pos", "POS_LT": "pos", "ORD_LE": "order", "ORD_LT": "order"}


def parse(relation: str) -> tuple[tuple[tuple[str, int], ...], ...]:
  """ "A&B(3)|C" -> ((("A", 0), ("B", 3)), (("C", 0),)): clauses of atoms.

  Raises:
    ValueError: an unknown atom, a missing or superfluous argument.
  """
  clauses = []
  for clause in relation.replace(" ", "").split("|"):
    atoms = []
    for text in clause.split("&"):
      found = re.fullmatch(r"([A-Z_]+)(?:\((\d+)\))?", text)
      if not found or found[1] not in _ATOMS:
        raise ValueError(f"relation {relation!r}: unknown atom {text!r}; known atoms: {', '.join(_ATOMS)}")
      if (found[1] in _ARGUMENT) != (found[2] is not None):
        takes = "takes a length, as in WIN(128)" if found[1] in _ARGUMENT else "takes no argument"
        raise ValueError(f"relation {relation!r}: {found[1]} {takes}, got {text!r}")
      atoms.append((found[1], int(found[2] or 0)))
    if ("NONE", 0) not in atoms:
      clauses.append(tuple(atoms))
  return tuple(clauses)


@dataclasses.dataclass(frozen=True, init=False)
class Relations:
  """A relation table over streams, compiled per slot.

  Args:
    table: {(query stream, key stream): relation}; pairs that are not named see nothing.
    streams: names of all streams, in the order of the layout's stream index.
    coord: {stream: "pos" | "order"}, what its keys are coded by; "pos" where not named.

  Raises:
    ValueError: unknown stream or atom, an atom that needs the other coordinate, more than
      `MAX_TERMS` intervals for a query stream.
  """

  table: tuple[tuple[tuple[str, str], str], ...]
  streams: tuple[str, ...]
  coord: tuple[str, ...]

  def __init__(self, table, streams, coord=None):
    streams, coord = tuple(streams), dict(coord or {})
    table = dict(table)
    for name in [n for pair in table for n in pair] + list(coord):
      if name not in streams:
        raise ValueError(f"Relations: stream {name!r} is not in {streams}; name it there or fix the table")
    for stream, kind in coord.items():
      if kind not in ("pos", "order"):
        raise ValueError(f"Relations: coord of stream {stream!r} must be 'pos' or 'order', got {kind!r}")
    if len(streams) > 2**9:
      raise ValueError(f"Relations: at most {2**9} streams fit int32 codes, got {len(streams)}")
    object.__setattr__(self, "table", tuple(sorted(table.items())))
    object.__setattr__(self, "streams", streams)
    object.__setattr__(self, "coord", tuple(coord.get(s, "pos") for s in streams))
    for (q, k), relation in table.items():
      for atom, _ in (a for clause in parse(relation) for a in clause):
        kind = self.coord[streams.index(k)]
        if _NEEDS.get(atom, kind) != kind:
          raise ValueError(
            f"Relations: {relation!r} of ({q!r}, {k!r}) needs the keys of {k!r} coded by "
            f"{_NEEDS[atom]!r}, got {kind!r}; set coord={{{k!r}: {_NEEDS[atom]!r}}}"
          )
    for q in streams:
      if self._count(q) > MAX_TERMS:
        raise ValueError(
          f"Relations: queries of stream {q!r} have {self._count(q)} intervals, at most {MAX_TERMS} fit a "
          "tile-list entry; merge relations or split the mask into attention calls joined by kernels.merge"
        )

  def _clauses(self, q: str):
    """(key stream index, clause) for all intervals of query stream q."""
    return [
      (self.streams.index(k), clause)
      for (a, k), relation in self.table
      if a == q
      for clause in parse(relation)
    ]

  def _count(self, q: str) -> int:
    return len(self._clauses(q))

  @property
  def terms(self) -> int:
    """T, intervals of a query (static)."""
    return max(1, *(self._count(q) for q in self.streams))

  def codes(self, slots: Slots) -> Array:
    """int32[B, S], the code under which each slot is seen; CODE_HIDDEN for empty slots."""
    by_order = jnp.asarray([c == "order" for c in self.coord])[jnp.clip(slots.stream, 0)]
    code = jnp.where(by_order, slots.order, slots.pos) + slots.stream * STREAM
    return jnp.where(slots.doc >= 0, code, CODE_HIDDEN).astype(jnp.int32)

  def bounds(self, slots: Slots) -> tuple[Array, Array]:
    """lo, hi int32[B, T, S]: disjoint code intervals each slot sees; empty for empty slots."""
    zero = jnp.zeros_like(slots.pos)
    lo, hi = [zero] * self.terms, [zero] * self.terms
    union = False
    for index, q in enumerate(self.streams):
      clauses = self._clauses(q)
      union |= len({k for k, _ in clauses}) < len(clauses)
      mine = (slots.stream == index) & (slots.doc >= 0)
      for t, (k, clause) in enumerate(clauses):
        x = slots.order if self.coord[k] == "order" else slots.pos
        a, b = slots.doc_lo, slots.doc_hi
        for atom, argument in clause:
          atom_lo, atom_hi = _ATOMS[atom](slots, x, argument)
          a, b = jnp.maximum(a, atom_lo), jnp.minimum(b, atom_hi)
        some = mine & (a < b)
        lo[t] = jnp.where(some, a + k * STREAM, lo[t])
        hi[t] = jnp.where(some, b + k * STREAM, hi[t])
    lo, hi = jnp.stack(lo, 1).astype(jnp.int32), jnp.stack(hi, 1).astype(jnp.int32)
    # Intervals in different streams are disjoint; only a union within one stream can overlap or touch.
    return normalise(lo, hi) if union else (lo, hi)

  def block_local(self, stream: str) -> bool:
    """Whether keys of `stream` are seen from within their own block only (or by nobody)."""
    clauses = [clause for (_, k), r in self.table if k == stream for clause in parse(r)]
    return all({"BLK_EQ", "SELF"} & {atom for atom, _ in clause} for clause in clauses)

  def mask(self, slots: Slots, code: Array | None = None) -> AttnMask:
    """AttnMask of these slots as queries over `code` int32[B, Lk] (by default the slots' own codes)."""
    lo, hi = self.bounds(slots)
    if code is not None:
      return AttnMask(code, lo, hi)
    part = slots.src.shape[1] // slots.shards // len(self.streams)
    local = [i for i, s in enumerate(self.streams) if slots.whole_blocks and self.block_local(s)]
    local = tuple((i * part, (i + 1) * part) for i in local) if len(local) < len(self.streams) else ()
    return AttnMask(self.codes(slots), lo, hi, slots.shards, local)
