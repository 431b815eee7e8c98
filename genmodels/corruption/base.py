"""What every corruption shares: the blocks of a document, and the noise of a generation in progress.

Legend: B rows · C copies · N clean tokens · D documents.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from genmodels import rows
from genmodels.config import Schedule
from genmodels.contracts import CONTEXT, TEXT, Noise, Row
from genmodels.corruption import rng

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Blocks:
  """How a document is cut into groups that are denoised, or predicted, together.

  Fields:
    size: tokens of a block, a number or a schedule of the step; 0: the whole document is one block (in a
      schedule: at those steps).
    anchor: "document" counts blocks from the document's start, "response" from the start of each stretch of
      tokens that are not CONTEXT. No block then straddles such a border; those of a prompt are counted
      backwards from the response behind it, as a decoder that is given the prompt counts them. "prompt" has
      two blocks, what is given before the first TEXT token and all the rest, and excludes `size`
      (Prefix-DLM, LaViDa 2505.16839).
    sizes: ragged sizes of the successive blocks of every document (scales); excludes `size`.
  """

  size: Schedule = 0
  anchor: str = "document"
  sizes: tuple[int, ...] = ()

  def __post_init__(self):
    object.__setattr__(self, "size", Schedule.of(self.size))
    if self.anchor not in ("document", "response", "prompt"):
      raise ValueError(f"anchor is {self.anchor!r}; it must be 'document', 'response' or 'prompt'")
    if self.anchor == "prompt" and (self.sizes or self.size != Schedule.of(0)):
      raise ValueError("anchor is 'prompt', which says what the blocks are; leave size and sizes unset")
    if self.sizes and self.size != Schedule.of(0):
      raise ValueError("size and sizes are both set; keep `sizes` for ragged blocks, `size` for equal ones")

  @property
  def whole(self) -> bool:
    """A document is one block."""
    return self.size == Schedule.of(0) and not self.sizes and self.anchor != "prompt"

  @property
  def longest(self) -> int | None:
    """Tokens of the longest block at any step; None where it can be a whole document."""
    if self.whole or self.anchor == "prompt" or 0 in self.size.table and not self.sizes:
      return None
    return math.ceil(max(self.sizes or self.size.table))

  def bounds(self, row: Row, step) -> tuple[Array, Array]:
    """The block interval of every token at training step `step`, two int32[B, N]."""
    lo, hi = rows.doc_bounds(row.doc)
    if self.sizes:
      edge = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int32)
      block = jnp.searchsorted(edge, rows.coordinates(lo) - lo, side="right") - 1
      block = jnp.minimum(block, len(self.sizes) - 1)
      return lo + jnp.asarray(edge)[block], jnp.minimum(lo + jnp.asarray(edge)[block + 1], hi)
    if self.whole:
      return lo, hi
    if self.anchor == "prompt":
      cut = rows.first_in_doc(lo, hi, row.role == TEXT)
      before = rows.coordinates(lo) < cut
      return jnp.where(before, lo, cut), jnp.where(before, cut, hi)
    size = jnp.asarray(self.size(step)).astype(jnp.int32)
    if 0 in self.size.table:
      size = jnp.where(size == 0, row.doc.shape[1], size)
    if self.anchor == "document":
      return rows.block_bounds(lo, hi, size)
    given = row.role == CONTEXT
    run_lo, run_hi = rows.runs(row.doc, given)
    return rows.block_bounds(run_lo, run_hi, size, jnp.where(given & (run_hi < hi), run_hi, run_lo))


def eligible(row: Row) -> Array:
  """bool[B, N]: tokens that may be noised and predicted."""
  return (row.role == TEXT) & (row.doc >= 0)


@dataclasses.dataclass(frozen=True)
class Corruption:
  """Base: `draw` is a pure function of (row, key, step); subclasses set levels and hits.

  Fields:
    blocks: see `Blocks`.
    drop: probability that a document's conditions are dropped, for classifier-free guidance. Draws of
      a likelihood bound drop nothing.
  """

  blocks: Blocks = dataclasses.field(default_factory=Blocks)
  drop: float = 0.0

  copies = 1  # noisy copies drawn per token
  dense = False  # draws pairs, for a mask that is no union of intervals
  search = None  # when held-out losses decide statistics: corruption.band.Search
  absorbing = True  # a hit token shows the mask id

  def __post_init__(self):
    if not 0 <= self.drop <= 1:
      raise ValueError(f"drop is {self.drop}; it is a probability")

  def draw(self, row: Row, key: Array, step, latent=None, bound: tuple | None = None) -> Noise:
    """Noise of one training step.

    Args:
      key: the run's key; only its words are read, never split.
      step: training step (int or traced int32).
      latent: the bound Latent, for corruptions that replace values.
      bound: (r, R) for likelihoods: draw r of R, levels stratified over r, unclipped, exact counts,
        with the fixed tag EVAL_STEP in place of the step.
    """
    raise NotImplementedError

  @property
  def longest(self) -> int | None:
    """Tokens of the longest block that is drawn at any step; None where a document can be one."""
    return self.blocks.longest

  def stats(self) -> dict[str, Array]:
    """What the training state keeps for this corruption, {} for most: arrays that `update` moves."""
    return {}

  def bind(self, stats: dict[str, Array]) -> Corruption:
    """This corruption, drawing by the statistics of a state."""
    del stats
    return self

  def update(self, stats: dict[str, Array], sums: dict[str, Array]) -> dict[str, Array]:
    """New statistics from sums over a global batch."""
    del sums
    return stats

  def state(self, row: Row, committed: Array, step=0) -> Noise:
    """The noise that describes a generation in progress: hit = not committed yet (bool[B, N])."""
    return self.progress(row, committed, *self.blocks.bounds(row, step))

  def progress(self, row: Row, committed: Array, lo: Array, hi: Array) -> Noise:
    """`state` with blocks [lo, hi) int32[B, N] each."""
    hit = jnp.logical_not(committed) & eligible(row)
    share = rows.count_in(lo, hi, hit) / jnp.maximum(rows.count_in(lo, hi, eligible(row)), 1)
    return self.noise(row, lo, hi, hit[:, None], share[:, None].astype(jnp.float32))

  def trimmed(self, row: Row, key: Array, step, bound: tuple | None = None) -> Row:
    """The row whose tokens a draw is of: here all; a corruption may leave out the ends of documents."""
    del key, step, bound
    return row

  def symbolic(self, row: Row) -> Row:
    """A row that stands for data in `laws.check`: here as it is; with the side tables that draws read."""
    return row

  def dropped(self, row: Row, key: Array, at, bound: tuple | None = None) -> Array | None:
    """bool[B, D]: documents whose conditions this draw drops, one draw per document; None: none are."""
    if self.drop == 0 or bound is not None:
      return None
    return rng.doc_uniform(row, key, at, 0, rng.DROP) < self.drop

  def ranks(self, row: Row, lo: Array, hit: Array) -> Array:
    """Generation rank of every token inside its document, int32[B, N]: here the logical order.

    Args:
      lo: start of each token's block, int32[B, N].
      hit: bool[B, C, N], what is corrupted, or not committed yet.
    """
    del lo, hit
    doc_lo, _ = rows.doc_bounds(row.doc)
    return rows.coordinates(doc_lo) - doc_lo

  def noise(self, row, lo, hi, hit, level, marginal=None, nelbo=None, **kw) -> Noise:
    """Assembles a Noise; `order` is the corruption's `ranks` unless given."""
    marginal = level if marginal is None else marginal
    if "order" not in kw:
      kw["order"] = self.ranks(row, lo, hit)
    return Noise(
      level=level,
      hit=hit,
      marginal=marginal,
      nelbo=jnp.ones_like(level) if nelbo is None else nelbo,
      blk_lo=lo,
      blk_hi=hi,
      **kw,
    )


@dataclasses.dataclass(frozen=True)
class Clean(Corruption):
  """No corruption: autoregressive models see and predict clean tokens."""

  def draw(self, row, key, step, latent=None, bound=None) -> Noise:
    lo, hi = self.blocks.bounds(row, step)
    hit = jnp.zeros_like(row.doc, bool)[:, None]
    level, marginal = jnp.zeros(hit.shape, jnp.float32), jnp.ones(hit.shape, jnp.float32)
    return self.noise(row, lo, hi, hit, level, marginal, drop=self.dropped(row, key, step, bound))
