"""Masks and shapes of the attention benchmark, each mask twice: from its definition, and as our encoding.

The definition is a predicate on index arrays that NumPy, JAX and PyTorch evaluate alike: FlexAttention's
mask_mod, dense masks and the reference all come from it, our encoding does not.

Legend: B rows · N clean tokens of a row · S slots of a row
· H query heads · Hk key heads.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

VAR_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)  # VAR-d36, 512 px: 2,240 tokens
VAR_1024 = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)  # Infinity, 1024 px: 10,521 tokens


@dataclasses.dataclass(frozen=True)
class Case:
  """One mask on one shape.

  Attributes:
    mask: "causal", "full", "prefix", "scales", "frames", "bd3" or "context_causal".
    rows: B. tokens: N. heads: H. key_heads: Hk. head_dim: D.
    block: of bd3 and context_causal. copies: noisy copies. prefix: visible to all. scales: side lengths.
    frame: tokens of a frame. frames: window. sink: first frames that stay visible.
    documents: mean length of packed documents, other ones in each row; 0: one document a row.
  """

  name: str
  mask: str
  rows: int
  tokens: int
  heads: int = 16
  key_heads: int = 16
  head_dim: int = 128
  block: int = 0
  copies: int = 1
  prefix: int = 0
  scales: tuple[int, ...] = ()
  frame: int = 0
  frames: int = 0
  sink: int = 0
  documents: int = 0

  @property
  def dual(self) -> bool:
    """Whether the row is stored as [noisy copies | clean]."""
    return self.mask in ("bd3", "context_causal")

  @property
  def slots(self) -> int:
    """S."""
    return self.tokens * (self.copies + 1 if self.dual else 1)

  @property
  def mask_rows(self) -> int:
    """Rows of the mask: 1 where all rows of the batch share it."""
    return self.rows if self.documents else 1

  def tables(self) -> dict[str, np.ndarray]:
    """What `visible` looks up, int32 [mask rows, N]; nothing where arithmetic is enough."""
    if self.documents:
      doc, start = self._documents()
      out = {"doc": doc}
      if self.dual:  # a running number of the block: blocks start at their document
        at = np.arange(self.tokens)
        first = (at - start) % self.block == 0
        out["block"] = np.cumsum(first, 1)
      return {name: x.astype(np.int32) for name, x in out.items()}
    if self.mask == "scales":
      return {"scale": np.repeat(np.arange(len(self.scales)), np.square(self.scales))[None].astype(np.int32)}
    return {}

  def _documents(self):
    """doc, start of document: int[B, N], log-normal lengths from a fixed seed."""
    rng = np.random.default_rng(20)
    doc, start = np.zeros((2, self.rows, self.tokens), np.int64)
    for b in range(self.rows):
      at = number = 0
      while at < self.tokens:
        n = max(2, int(rng.lognormal(math.log(self.documents) - 0.5, 1.0)))
        doc[b, at : at + n], start[b, at : at + n] = number, at
        at, number = at + n, number + 1
    return doc, start

  def visible(self, t, b, i, j):
    """Whether query slots i see key slots j of row b; arrays that broadcast, tables `t` of the same kind."""
    N = self.tokens
    if self.documents:
      same = t["doc"][b, i % N] == t["doc"][b, j % N]
    if self.mask == "causal":
      return (j <= i) & same if self.documents else j <= i
    if self.mask == "full":
      return (i >= 0) & (j >= 0)
    if self.mask == "prefix":
      return (j <= i) | (j < self.prefix)
    if self.mask == "scales":
      return t["scale"][0, j] <= t["scale"][0, i]
    if self.mask == "frames":
      fi, fj = i // self.frame, j // self.frame
      return (fj <= fi) & ((fj > fi - self.frames) | (fj < self.sink))
    pi, pj, si, sj = i % N, j % N, i // N, j // N
    bi, bj = (
      (t["block"][b, pi], t["block"][b, pj]) if self.documents else (pi // self.block, pj // self.block)
    )
    noisy = si < self.copies  # the clean stream is the last one
    own = noisy & (si == sj) & (bi == bj)
    context = noisy & (sj == self.copies) & (bj < bi)
    among = (bj <= bi) if self.mask == "bd3" else (pj <= pi)
    seen = own | context | ((si == self.copies) & (sj == self.copies) & among)
    return seen & same if self.documents else seen

  def doc(self) -> np.ndarray:
    """int32[mask rows, N], which document each token is of."""
    return self.tables()["doc"] if self.documents else np.zeros((1, self.tokens), np.int32)

  def encode(self, doc):
    """AttnMask with `mask_rows` rows; traceable in `doc`, which a training step gets with its batch."""
    from genmodels.masks import builders

    return {
      "causal": lambda: builders.causal(doc),
      "full": lambda: builders.full(doc),
      "prefix": lambda: builders.prefix_lm(doc, self.prefix),
      "scales": lambda: builders.scale_causal(doc, tuple(int(s) ** 2 for s in self.scales)),
      "frames": lambda: builders.frame_window(doc, self.frame, self.frames, self.sink),
      "bd3": lambda: builders.bd3(doc, self.block, self.copies),
      "context_causal": lambda: builders.context_causal(doc, self.block),
    }[self.mask]()


def _of(*cases: Case) -> list[Case]:
  """With as many key heads as query heads, and grouped (H = 32, Hk = 8)."""
  grouped = [dataclasses.replace(c, name=f"{c.name}-gqa", heads=32, key_heads=8) for c in cases]
  return [*cases, *grouped]


@functools.cache
def full() -> list[Case]:
  """The cases of the protocol, the one that decides first."""
  return _of(
    Case("bd3-8k-b32", "bd3", 2, 4096, block=32),
    Case("causal-8k", "causal", 2, 8192),
    Case("full-8k", "full", 2, 8192),
    Case("bd3-8k-b4", "bd3", 2, 4096, block=4),
    Case("bd3-8k-b256", "bd3", 2, 4096, block=256),
    Case("bd3-16k-b32", "bd3", 1, 8192, block=32),
    Case("bd3-packed-16k-b32", "bd3", 1, 8192, block=32, documents=1024),
    Case("causal-packed-16k", "causal", 2, 16384, documents=1024),
    Case("nbdiff-8k-b32", "context_causal", 2, 4096, block=32),
    Case("bd3-copies-12k-b32", "bd3", 2, 4096, block=32, copies=2),
    Case("prefix-8k", "prefix", 2, 8192, prefix=2048),
    Case("var-512px", "scales", 8, 2240, scales=VAR_512),
    Case("var-1024px", "scales", 2, 10521, scales=VAR_1024),
    Case("frames-32k", "frames", 1, 32760, frame=1560, frames=3, sink=1),
    Case("bd3-64k-b4", "bd3", 1, 32768, block=4),
    Case("bd3-64k-b32", "bd3", 1, 32768, block=32),
    Case("bd3-64k-b256", "bd3", 1, 32768, block=256),
  )


def quick() -> list[Case]:
  """The case that decides and its anchor."""
  return full()[:2]


def tiny() -> list[Case]:
  """Every kind of mask at a size for a CPU: for the machinery, never for a claim."""
  size = dict(heads=2, key_heads=1, head_dim=16)
  return [
    Case("bd3", "bd3", 2, 64, block=8, **size),
    Case("causal", "causal", 2, 96, **size),
    Case("full", "full", 1, 64, **size),
    Case("prefix", "prefix", 1, 64, prefix=20, **size),
    Case("var", "scales", 1, 91, scales=(1, 4, 5, 7), **size),
    Case("frames", "frames", 1, 70, frame=7, frames=3, sink=1, **size),
    Case("nbdiff", "context_causal", 1, 48, block=6, **size),
    Case("bd3-packed", "bd3", 2, 64, block=8, documents=16, **size),
    Case("causal-packed", "causal", 2, 96, documents=16, **size),
    Case("bd3-copies", "bd3", 1, 32, block=4, copies=2, **size),
  ]
