"""Class-conditional image modelling: next-token (LlamaGen) and next-scale (VAR).

Both take their codes from the latent that they are handed, never from a tokenizer of their own, and both
are exact likelihoods of the codes. A document is one image.

Legend: B rows · N clean tokens · S slots · D documents · n codes of an image · F features · K id channels.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from genmodels import rows
from genmodels.contracts import CLEAN, CONTEXT, TEXT, Documents, Inputs, Noise, Row, Slots
from genmodels.corruption.base import eligible
from genmodels.objectives.base import Objective

Array = jax.Array


def needs(latent, what: str):
  """The latent, or an error that says who must pass it."""
  if latent is None:
    raise ValueError(
      f"{what} needs the latent of the config's `latent` section, got None; pass latent= to prepare and view "
      "(Nets.latent carries it in training)"
    )
  return latent


def ordinal(flag: Array, doc: Array) -> Array:
  """int32[B, N]: how many flagged tokens of the document stand before each token."""
  doc_lo, _ = rows.doc_bounds(doc)
  return rows.count_in(doc_lo, jnp.broadcast_to(rows.coordinates(doc), doc.shape), flag)


def to_tokens(table: Array, doc: Array, at: Array) -> Array:
  """table [B, D, n, …] at (document, entry) of each token, [B, N, …]; clipped where out of range."""
  B, D, n = table.shape[:3]
  index = jnp.clip(doc, 0, D - 1) * n + jnp.clip(at, 0, n - 1)
  flat = table.reshape(B, D * n, *table.shape[3:])
  return jnp.take_along_axis(flat, index.reshape(B, -1, *(1,) * (table.ndim - 3)), axis=1)


def to_table(value: Array, doc: Array, at: Array, where: Array, D: int, n: int) -> Array:
  """The inverse of `to_tokens`: value [B, N] to [B, D, n], zero where no token of `where` brings one."""
  index = jnp.where(where & (at < n), doc * n + at, D * n)
  put = lambda i, v: jnp.zeros((D * n + 1,), v.dtype).at[i].set(v)[:-1]
  return jax.vmap(put)(index, value).reshape(-1, D, n)


def at_slots(x: Array, slots: Slots) -> Array:
  """x [B, N] at the tokens of the slots, [B, S] (entry 0 for empty slots)."""
  return jnp.take_along_axis(x, jnp.maximum(slots.src, 0), 1)


@dataclasses.dataclass(frozen=True)
class Image(Objective):
  """What both have in common: codes from the latent, class labels, dropped classes.

  Fields:
    classes: number of classes; id `classes` is the null class of classifier-free guidance.
    label: side table of class ids, int32[B, D].
    mask_id: unused, there is no absorbing state.
  """

  classes: int = 10
  label: str = "label"

  prefix = 0  # CONTEXT tokens before the codes of an image

  def prepare(self, row: Row, key: Array, step, latent=None, bound: tuple | None = None):
    """As Objective.prepare; the codes of the images are made here, from the latent."""
    return super().prepare(self.encoded(row, latent), key, step, latent, bound)

  def encoded(self, row: Row, latent) -> Row:
    """The row with its codes as tokens. A row without the latent's side table holds them already.

    The j-th TEXT token of a document carries code j of its image.
    """
    codes = needs(latent, type(self).__name__).encode_side(row.docs.side)
    if codes is None:
      return row
    ok = eligible(row)
    return row.replace(tokens=jnp.where(ok, to_tokens(codes, row.doc, ordinal(ok, row.doc)), row.tokens))

  def classes_of(self, row: Row, noise: Noise) -> Array:
    """int32[B, D], class ids with the null class where the condition is dropped."""
    if self.label not in row.docs.side:
      raise ValueError(
        f"side table {self.label!r} of class ids is missing; the row has {sorted(row.docs.side)}: name it in "
        "objective.label or let the data yield it"
      )
    label = row.docs.side[self.label].astype(jnp.int32).reshape(row.docs.occurrence.shape)
    return label if noise.drop is None else jnp.where(noise.drop, self.classes, label)

  def blank(self, label, latent, example_id=None) -> Row:
    """One empty image a row, to be generated.

    Args:
      label: int[B], class ids.
      example_id: uint32[B, 2], identities that key the draws; default: counted.

    Returns:
      A Row of N = prefix + n tokens, the prefix CONTEXT, all codes 0 and TEXT.
    """
    label = jnp.asarray(label, jnp.int32)
    B, N = label.shape[0], self.prefix + needs(latent, "blank").length
    zero, one = jnp.zeros((B, N), jnp.int32), jnp.zeros((B, 1), jnp.int32)
    if example_id is None:
      ids = jnp.arange(B, dtype=jnp.uint32)
      example_id = jnp.stack([jnp.zeros_like(ids), ids], -1)
    docs = Documents(
      example_id=jnp.asarray(example_id, jnp.uint32)[:, None],
      occurrence=one,
      rank=jnp.stack([jnp.arange(B, dtype=jnp.int32)[:, None], jnp.full_like(one, B)], -1),
      mode=one,
      source=one,
      side={self.label: label[:, None]},
    )
    role = jnp.broadcast_to(jnp.where(jnp.arange(N) < self.prefix, CONTEXT, TEXT), (B, N)).astype(jnp.int32)
    pos = jnp.broadcast_to(jnp.arange(N, dtype=jnp.float32)[None, :, None], (B, N, 1))
    return Row(zero, zero, pos, role, zero, jnp.full_like(zero, -1), docs)

  def images(self, row: Row, latent) -> Array:
    """uint8[B, D, H, W], the decoded images of a row; documents without tokens decode zeros."""
    ok = eligible(row)
    D = row.docs.occurrence.shape[1]
    codes = to_table(row.tokens, row.doc, ordinal(ok, row.doc), ok, D, needs(latent, "images").length)
    return latent.decode(codes)


@dataclasses.dataclass(frozen=True)
class NextTokenImage(Image):
  """Next-token prediction over the codes in raster order (LlamaGen, Sun et al., arXiv:2406.06525 §2.2).

  A document is one CONTEXT token, the class, then n codes; slot i predicts token i + 1. Id channels:
  tokens, class. Positions: (row, column) of the code that a slot shows, (−1, −1) at the class slot, which
  `Rope.zero_prefix` turns into LlamaGen's zero rows.
  """

  terms: dict = dataclasses.field(default_factory=lambda: {"text": {"align": "shift"}})

  prefix = 1

  def __post_init__(self):
    super().__post_init__()
    if self.layout.streams != (CLEAN,):
      raise ValueError(
        f"layout.streams is {self.layout.streams}; next-token images have the clean stream ('c',) only"
      )

  def inputs(self, row: Row, noise: Noise, slots: Slots, latent=None) -> Inputs:
    base = super().inputs(row, noise, slots, latent)
    local = slots.pos - slots.doc_lo
    some, first = slots.src >= 0, local == 0
    label = at_slots(rows.of_doc(row.doc, self.classes_of(row, noise)), slots)
    token = jnp.where(some & ~first, base.ids[..., 0], -1)
    ids = jnp.stack([token, jnp.where(some & first, label, -1)], -1)
    grid = np.concatenate([np.full((1, 2), -1, np.float32), needs(latent, "NextTokenImage").positions])
    return base.replace(ids=ids, pos=jnp.asarray(grid)[jnp.clip(local, 0, len(grid) - 1)])


@dataclasses.dataclass(frozen=True)
class NextScale(Image):
  """Next-scale prediction (VAR, Tian et al., arXiv:2404.02905 §3).

  All codes of a scale are predicted at once, at their own slots. A slot of scale k shows the image that
  the scales before k add up to, resized to scale k (`latent.next_input`), and never a code: so the slots
  of a scale may see each other, and their keys and values are final as soon as they are computed.

  The class modulates every slot (AdaLN) and is shown at the first one. Id channels: class and start (first
  slot only), level, pos (place in the code). The loss is the exact negative log-likelihood of the codes.
  """

  corruption: dict = dataclasses.field(
    default_factory=lambda: {"kind": "clean", "blocks": {"sizes": (1, 4, 16, 64)}}
  )
  masks: dict = dataclasses.field(default_factory=lambda: {"full": "block_causal"})
  terms: dict = dataclasses.field(default_factory=lambda: {"text": {"align": "same"}})

  def __post_init__(self):
    super().__post_init__()
    if self.layout.streams != (CLEAN,):
      raise ValueError(
        f"layout.streams is {self.layout.streams}; next-scale images have the clean stream ('c',) only"
      )
    if not self.corruption.blocks.sizes:
      raise ValueError(
        "corruption.blocks.sizes is empty; name the tokens of each scale, for example (1, 4, 16, 64)"
      )

  def carries(self, row: Row, noise: Noise, slots: Slots) -> Array:
    """A slot holds something of every code of the scales before its own, and of no other."""
    n = rows.coordinates(row.doc)[:, None]
    earlier = (n >= slots.doc_lo[..., None]) & (n < slots.blk_lo[..., None])
    return (slots.src >= 0)[..., None] & earlier

  def inputs(self, row: Row, noise: Noise, slots: Slots, latent=None) -> Inputs:
    base = super().inputs(row, noise, slots, latent)
    latent = needs(latent, "NextScale")
    if tuple(self.corruption.blocks.sizes) != tuple(latent.blocks):
      raise ValueError(
        f"corruption.blocks.sizes is {self.corruption.blocks.sizes}; the latent's scales have {latent.blocks}"
      )
    D, n = row.docs.occurrence.shape[1], latent.length
    label = self.classes_of(row, noise)
    ok = eligible(row)
    at = ordinal(ok, row.doc)
    shown = latent.next_input(to_table(row.tokens, row.doc, at, ok, D, n))
    place = at_slots(at, slots)
    some, first = slots.src >= 0, place == 0
    channels = (
      jnp.where(first, jnp.take_along_axis(label, jnp.maximum(slots.doc, 0), 1), -1),
      jnp.where(first, 0, -1),
      jnp.asarray(latent.scale_of)[jnp.clip(place, 0, n - 1)],
      place,
    )
    features = to_tokens(shown, slots.doc, place)
    return base.replace(
      ids=jnp.where(some[..., None], jnp.stack(channels, -1), -1),
      features=jnp.where(some[..., None], features, 0),
      cond={"class": label},
      cond_index=slots.doc,
    )
