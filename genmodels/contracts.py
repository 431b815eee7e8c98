"""The types that cross rooms: rows, noise, slots, inputs, targets, outputs.

Legend: B rows · N clean tokens of a row · D documents of a row · S physical slots · C noisy copies
· A position axes · K id tables · M read positions of a term · T intervals of a query.

A *row* is what the data plan yields (or a generation in progress); its *coordinate* n is the index
of a clean token in it. Documents are contiguous in a row and their tokens are in logical order, so a
document, a block or a scale is an interval of coordinates, and so is everything a mask speaks about.

Every type here is a frozen dataclass registered as a pytree: it crosses jit, scan and shard_map.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

Array = jax.Array

# Roles of a clean token.
CONTEXT = 0  # given: never noised, never a target (BOS, a prompt, the overlap of a cut document)
TEXT = 1  # noised and predicted
FILLER = 2  # stands in the block of the text before it as it is, never noised or predicted (MASK padding)

CLEAN = "c"  # name of the clean stream; noisy copies are "n", "n1", …; query streams "q"


def pytree(*static: str):
  """Class decorator: frozen dataclass + pytree registration, with `static` fields as metadata."""

  def wrap(cls):
    cls = dataclasses.dataclass(frozen=True)(cls)
    data = [f.name for f in dataclasses.fields(cls) if f.name not in static]
    jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=list(static))
    cls.replace = dataclasses.replace
    return cls

  return wrap


@pytree()
class Documents:
  """Per-document tables of a row, [B, D, …]; D is the static capacity, unused entries are zero.

  Fields:
    example_id: uint32[B, D, 2], identity of the document (or piece of one); keys its noise.
    occurrence: int32[B, D], how often this document was drawn before: a second draw has own noise.
    rank: int32[B, D, 2], (index, count) of the document in the global batch; stratified times only.
    mode: int32[B, D], component of an objective mixture.
    source: int32[B, D], data source, for metrics.
    side: further tables by name, [B, D, …]: labels, captions' features, pixels.
  """

  example_id: Array
  occurrence: Array
  rank: Array
  mode: Array
  source: Array
  side: dict[str, Array]


@pytree()
class Row:
  """B packed rows of N clean tokens.

  Fields:
    tokens: int32[B, N].
    doc: int32[B, N], index of the document in `docs`; −1 is padding.
    pos: float32[B, N, A], position inside the document on A axes.
    role: int32[B, N], CONTEXT, TEXT or FILLER.
    modality: int32[B, N].
    index: int32[B, N], entry of a side table, −1 none.
    docs: Documents.
  """

  tokens: Array
  doc: Array
  pos: Array
  role: Array
  modality: Array
  index: Array
  docs: Documents


@pytree()
class Noise:
  """What a corruption drew for C copies of each token (or the state of a generation).

  Fields:
    level: float32[B, C, N], noise level t in [0, 1].
    hit: bool[B, C, N], corrupted (when sampling: not committed yet).
    marginal: float32[B, C, N], probability that the token was hit given its unit's level or count.
    nelbo: float32[B, C, N], weight under which the sum of masked cross-entropies is a likelihood bound.
    order: int32[B, N], generation rank inside the document (0 first).
    blk_lo, blk_hi: int32[B, N], the token's block as an interval of row coordinates.
    value: int32[B, C, N] or None, what stands at a hit token (None: the mask id).
    drop: bool[B, D] or None, conditions dropped for classifier-free guidance.
    pairs: bool[N, N] or None, (query, key) pairs of a random mask, one for all rows: it takes the dense path.
    share: float32[B, N] or None, the part of a token that each one counts as in a loss and its denominator.
  """

  level: Array
  hit: Array
  marginal: Array
  nelbo: Array
  order: Array
  blk_lo: Array
  blk_hi: Array
  value: Array | None = None
  drop: Array | None = None
  pairs: Array | None = None
  share: Array | None = None


@pytree("shards", "whole_blocks")
class Slots:
  """S physical slots: where each token of each stream sits, and all that a mask may read about it.

  Every field int32[B, S] unless said otherwise. Coordinates are row coordinates (module docstring).
    src: the clean token of this slot, −1 for an empty slot (visible to nobody, sees nothing).
    stream: 0-based index into the layout's `streams`.
    doc: document, −1 for an empty slot.
    pos: coordinate of the token; order: document start + generation rank.
    doc_lo, doc_hi, blk_lo, blk_hi: the token's document and block as half-open intervals.
    where: int32[B, streams, N], slot that holds (stream, token), −1 if it is not in this call.
    shards: context shards that the slots were placed for, equal parts of S; every stream has an equal part of
      each shard, in the order of the streams. Static.
    whole_blocks: no block of such a placement is cut by a shard's border. Static.
  """

  src: Array
  stream: Array
  doc: Array
  pos: Array
  order: Array
  doc_lo: Array
  doc_hi: Array
  blk_lo: Array
  blk_hi: Array
  where: Array
  shards: int = 1
  whole_blocks: bool = False


@pytree()
class Inputs:
  """What a trunk consumes.

  Fields:
    ids: int32[B, S, K] or None; K id tables summed, −1 adds nothing.
    pos: float32[B, S, A].
    doc: int32[B, S], −1 is an empty slot.
    masks: {pattern: AttnMask}; a layer names the pattern it attends under ("full", "local").
    features: float[B, S, F] or None, input vectors instead of, or besides, ids.
    cond: {name: [B, E, …]}, short tables of conditions (int32 class ids, float32 levels, vectors);
      all tables have the same E entries, their embeddings are summed per entry.
    cond_index: int32[B, S] or None, entry of `cond` that modulates the slot; −1 unmodulated.
    add_embed: float[B, S, width] or None, added to the embedding (self-conditioning, refinement).
    route: int32[B, S] or None, per-slot adapter switch (0 = base only).
  """

  ids: Array | None
  pos: Array
  doc: Array
  masks: dict[str, Any]
  features: Array | None = None
  cond: dict[str, Array] | None = None
  cond_index: Array | None = None
  add_embed: Array | None = None
  route: Array | None = None


@pytree("head")
class Target:
  """What one loss term asks of one head at M read positions.

  Fields:
    head: name of the head (static).
    slot: int32[B, M], the slot that predicts, −1 none.
    value: int32[B, M] or float[B, M, F].
    weight: float32[B, M]; 0 where nothing is asked.
    given: what the head is fed in training besides the hidden state (noised targets, levels).
  """

  head: str
  slot: Array
  value: Array
  weight: Array
  given: Any = None


class Dist(Protocol):
  """A lazy conditional distribution at [B, M] read positions: no [B, M, vocabulary] array exists.

  `map(fn, *xs)` calls fn(logits float32[c, V], *chunks of xs [c, …]) -> pytree of [c, …] chunk by
  chunk, recomputed in the backward pass, and returns pytrees of [B, M, …], zero where invalid.
  """

  def nll(self, value: Array) -> Array: ...

  def entropy(self) -> Array: ...

  def map(self, fn, *xs): ...

  def sample(self, key: Array) -> Array: ...


@pytree()
class Outputs:
  """What a trunk returns.

  Fields:
    dists: {term: Dist}, one for each Target given.
    new: {pattern: …}, keys, values and codes of this call's slots, for `write_cache`; None if no
      cache was passed.
    work: {"slots": int32, "pairs": {pattern: int32[B, S]}} of this call, for FLOP counts, and "overflow"
      {pattern: int32}, tile lists that were too short, where they may be.
    layers: named intermediates (final hidden state), for probes and teachers.
  """

  dists: dict[str, Any]
  new: Any = None
  work: Any = None
  layers: Any = None


def token_row(tokens, doc=None, *, role=None, pos=None, docs=None, capacity: int = 1) -> Row:
  """A Row from tokens int32[B, N] alone: one document a row unless `doc` is given. For tests, tools.

  Args:
    doc: int32[B, N] document indices (< capacity), −1 padding.
    role, pos, docs: as in Row; by default TEXT, position inside the document, and example ids
      counted from the row index.
  """
  tokens = jnp.asarray(tokens, jnp.int32)
  B, N = tokens.shape
  doc = jnp.zeros((B, N), jnp.int32) if doc is None else jnp.asarray(doc, jnp.int32)
  if pos is None:
    idx = jnp.arange(N, dtype=jnp.int32)[None]
    new = jnp.concatenate([jnp.ones((B, 1), bool), doc[:, 1:] != doc[:, :-1]], 1)
    start = jax.lax.cummax(jnp.where(new, idx, 0), axis=1)
    pos = (idx - start).astype(jnp.float32)[..., None]
  if docs is None:
    ids = jnp.arange(B * capacity, dtype=jnp.uint32).reshape(B, capacity)
    zero = jnp.zeros((B, capacity), jnp.int32)
    docs = Documents(
      example_id=jnp.stack([jnp.zeros_like(ids), ids], -1),
      occurrence=zero,
      rank=jnp.stack([ids.astype(jnp.int32), jnp.full_like(zero, B * capacity)], -1),
      mode=zero,
      source=zero,
      side={},
    )
  role = jnp.full((B, N), TEXT, jnp.int32) if role is None else jnp.asarray(role, jnp.int32)
  return Row(tokens, doc, pos, role, jnp.zeros((B, N), jnp.int32), jnp.full((B, N), -1, jnp.int32), docs)
