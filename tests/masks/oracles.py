"""Every mask twice: our builder, and a predicate on pairs written from the paper's definition.

The predicates are plain Python on token indices and know nothing of codes or intervals. `rows(seed)`
draws random packed rows with padding, ragged blocks, cuts, orders, spans, of any length.

Legend: B rows · N clean tokens of a row · S slots = streams · N.
"""

import dataclasses
from typing import Any

import numpy as np

from genmodels.masks import builders

B, N = 2, 24


@dataclasses.dataclass
class Rows:
  """Per-token tables [B, N]; "local" means counted from the document's start."""

  doc: Any
  local: Any
  start: Any
  blk: Any  # running number of the ragged block
  blk_lo: Any
  blk_hi: Any
  rank: Any  # local generation rank
  within: Any  # as rank, but only permuting tokens inside blocks
  clean: Any  # bool
  clean_rank: Any  # as rank, with the clean tokens first
  cut: Any  # local, one per document


def rows(seed: int, N: int = N) -> Rows:
  """Random rows of N tokens; the last document of row 0 is followed by padding."""
  rng = np.random.default_rng(seed)
  out = {f.name: np.zeros((B, N), int) for f in dataclasses.fields(Rows)}
  out["clean"] = rng.random((B, N)) < 0.5
  for b in range(B):
    ends = np.sort(rng.choice(np.arange(1, N - 1), size=2, replace=False)).tolist() + [N]
    pad = N - 1 - int(rng.integers(0, 3)) if b == 0 else N
    lo = 0
    for d, hi in enumerate(ends):
      at = np.arange(lo, hi)
      out["doc"][b, at], out["local"][b, at], out["start"][b, at] = d, at - lo, lo
      out["cut"][b, at] = rng.integers(0, hi - lo + 1)
      out["rank"][b, at] = rng.permutation(hi - lo)
      clean = out["clean"][b, at]
      order = np.concatenate([rng.permutation(np.nonzero(clean)[0]), rng.permutation(np.nonzero(~clean)[0])])
      out["clean_rank"][b, at] = np.argsort(order)
      begin, number = lo, 0
      while begin < hi:
        end = min(hi, begin + int(rng.integers(1, 6)))
        mine = np.arange(begin, end)
        out["blk"][b, mine], out["blk_lo"][b, mine], out["blk_hi"][b, mine] = number, begin, end
        out["within"][b, mine] = begin - lo + rng.permutation(end - begin)
        begin, number = end, number + 1
      lo = hi
    if pad < N:
      # Whole documents are padded away or cut; blocks and spans then end at the padding.
      out["doc"][b, pad:] = -1
      out["blk_hi"][b, :pad] = np.minimum(out["blk_hi"][b, :pad], pad)
      for key in ("rank", "within", "clean_rank"):
        for d in range(3):
          some = out["doc"][b] == d
          out[key][b, some] = np.argsort(np.argsort(out[key][b, some]))
  return Rows(**out)


def _ragged(r):
  return r.blk_lo, r.blk_hi


def _fixed(size):
  return lambda r, b, n: r.local[b, n] // size


def _blk(r, b, n):
  return r.blk[b, n]


def _bd3(blk):
  """bd3lms: block_diag | offset_block_causal | block_causal, with noisy flags instead of halves."""

  def pred(r, b, qs, i, ks, j):
    q, k = blk(r, b, i), blk(r, b, j)
    diagonal = q == k and qs == ks
    offset = q > k and ks == "c" and qs != "c"
    clean = q >= k and ks == "c" and qs == "c"
    return diagonal or offset or clean

  return pred


def _context_causal(blk, inner=lambda r, b, i, j: True):
  def pred(r, b, qs, i, ks, j):
    if qs == "c":
      return ks == "c" and j <= i
    if ks == "c":
      return blk(r, b, j) < blk(r, b, i)
    return blk(r, b, j) == blk(r, b, i) and inner(r, b, i, j)

  return pred


def _prefix(r, b, qs, i, ks, j):
  cut = r.cut[b, i]
  return j <= i or (r.local[b, i] < cut and r.local[b, j] < cut)


def _eso_diffusion(r, b, qs, i, ks, j):
  if r.clean[b, i]:
    return r.clean[b, j]
  return r.clean[b, j] or r.clean_rank[b, j] <= r.clean_rank[b, i]


def _eso_sequential(r, b, qs, i, ks, j):
  if qs == "c":
    return ks == "c" and _prefix(r, b, qs, i, ks, j)
  return i == j if ks == "n" else j < i


def _eso_ordered(r, b, qs, i, ks, j):
  qi, kj = r.rank[b, i], r.rank[b, j]
  return {("n", "n"): i == j, ("n", "c"): kj < qi, ("c", "c"): kj <= qi}.get((qs, ks), False)


def _two_stream(r, b, qs, i, ks, j):
  qi, kj = r.rank[b, i], r.rank[b, j]
  return ks == "h" and (kj <= qi if qs == "h" else kj < qi)


def _frames(size, last, sink):
  def pred(r, b, qs, i, ks, j):
    q, k = r.local[b, i] // size, r.local[b, j] // size
    return k <= q and (k > q - last or k < sink)

  return pred


SCALES = (1, 4, 9, 16, 25, 36, 64, 100)


def _scale(r, b, qs, i, ks, j):
  def level(n):
    total = 0
    for s, tokens in enumerate(SCALES):
      total += tokens
      if r.local[b, n] < total:
        return s

  return level(j) <= level(i)


def _active(r):
  """The active block of each row, int[B], first and end."""
  n = r.doc.shape[1]
  return np.array([3 * n // 8, 3 * n // 8 + 1]), np.array([7 * n // 12] * 2)


def _decode(r, b, qs, i, ks, j):
  start, end = (x[b] for x in _active(r))
  if start <= i < end and start <= j < end:
    return True
  return j <= i


_OLDER = lambda r, b, qs, i, ks, j: r.blk[b, j] <= r.blk[b, i]
_WITHIN = lambda r, b, i, j: r.within[b, j] <= r.within[b, i]
_ORDER = lambda r, b, i, j: j <= i

# name -> (builder of Rows, streams in storage order, predicate on pairs of one document)
CASES = {
  "causal": (lambda r: builders.causal(r.doc), "c", lambda r, b, qs, i, ks, j: j <= i),
  "full": (lambda r: builders.full(r.doc), "c", lambda r, b, qs, i, ks, j: True),
  "window": (lambda r: builders.window(r.doc, 4), "c", lambda r, b, qs, i, ks, j: i - 4 < j <= i),
  "prefix_lm": (lambda r: builders.prefix_lm(r.doc, r.cut), "c", _prefix),
  "eso_mixed": (
    lambda r: builders.eso_mixed(r.doc, r.cut),
    "c",
    lambda r, b, qs, i, ks, j: r.local[b, i] >= r.cut[b, i] or j <= i,
  ),
  "eso_diffusion": (
    lambda r: builders.eso_diffusion(r.doc, r.clean, r.start + r.clean_rank),
    "c",
    _eso_diffusion,
  ),
  "spans": (
    lambda r: builders.spans(r.doc, _ragged(r)),
    "c",
    lambda r, b, qs, i, ks, j: j <= i or r.blk[b, i] == r.blk[b, j],
  ),
  "block_causal": (lambda r: builders.block_causal(r.doc, _ragged(r)), "c", _OLDER),
  "block_causal_3": (
    lambda r: builders.block_causal(r.doc, 3),
    "c",
    lambda r, b, qs, i, ks, j: r.local[b, j] // 3 <= r.local[b, i] // 3,
  ),
  "scale_causal": (lambda r: builders.scale_causal(r.doc, SCALES), "c", _scale),
  "any_order": (
    lambda r: builders.any_order(r.doc, r.start + r.rank),
    "c",
    lambda r, b, qs, i, ks, j: r.rank[b, j] <= r.rank[b, i],
  ),
  "any_order_two_stream": (
    lambda r: builders.any_order_two_stream(r.doc, r.start + r.rank),
    "hg",
    _two_stream,
  ),
  "subset": (lambda r: builders.subset(r.doc, r.clean), "c", lambda r, b, qs, i, ks, j: r.clean[b, j]),
  "bd3": (lambda r: builders.bd3(r.doc, _ragged(r)), "nc", _bd3(_blk)),
  "bd3_4": (lambda r: builders.bd3(r.doc, 4), "nc", _bd3(_fixed(4))),
  "bd3_copies": (lambda r: builders.bd3(r.doc, _ragged(r), copies=2), "nmc", _bd3(_blk)),
  "context_causal": (lambda r: builders.context_causal(r.doc, _ragged(r)), "nc", _context_causal(_blk)),
  "idlm": (lambda r: builders.idlm(r.doc, 3), "nc", _context_causal(_fixed(3), _ORDER)),
  "wedlm": (
    lambda r: builders.wedlm(r.doc, _ragged(r), r.start + r.within),
    "nc",
    _context_causal(_blk, _WITHIN),
  ),
  "nbdiff_decode": (
    lambda r: builders.nbdiff_decode(r.doc * 0, *(x[:, None] for x in _active(r))),
    "c",
    _decode,
  ),
  "eso_sequential": (lambda r: builders.eso_sequential(r.doc, r.cut), "nc", _eso_sequential),
  "eso_ordered": (lambda r: builders.eso_ordered(r.doc, r.start + r.rank), "nc", _eso_ordered),
  "frame_window": (lambda r: builders.frame_window(r.doc, 3, 2, 1), "c", _frames(3, 2, 1)),
  "shared_prefix": (lambda r: builders.shared_prefix(r.doc, *_prompt(r)), "c", None),
  "tidar_decode": (
    lambda r: builders.tidar_decode(_committed(r)[:, None], 3, r.doc.shape[1] - 8),
    None,
    None,
  ),
}


def _prompt(r):
  """Document 0 is the prompt of all others; itself and padding have none."""
  end = (r.doc == 0).sum(1, keepdims=True)
  return np.zeros(r.doc.shape, int), np.where(r.doc > 0, end, 0)


def _shared_prefix(r):
  N = r.doc.shape[1]
  out = np.zeros((B, N, N), bool)
  for b in range(B):
    for i in range(N):
      for j in range(N):
        if r.doc[b, i] >= 0:
          out[b, i, j] = (r.doc[b, i] == r.doc[b, j] and j <= i) or r.doc[b, j] == 0 < r.doc[b, i]
  return out


def _committed(r):
  n = r.doc.shape[1]
  return np.array([n // 3 - 1, n // 3 + 2])


def _tidar(prefixes, length, K=3):
  """Slots: committed and drafts at 0 … P + K − 1; group j: K masks that follow j accepted drafts."""
  S = length + (K + 1) * K
  out = np.zeros((len(prefixes), S, S), bool)
  for b, P in enumerate(prefixes):
    for i in range(P + K):
      out[b, i, : i + 1] = True
    for j in range(K + 1):
      group = range(length + j * K, length + (j + 1) * K)
      for i in group:
        out[b, i, : P + j] = True
        out[b, i, list(group)] = True
  return out


def dense(name: str, r: Rows) -> np.ndarray:
  """bool[B, S, S] from the predicate, by loops."""
  _, streams, pred = CASES[name]
  if name == "shared_prefix":
    return _shared_prefix(r)
  if name == "tidar_decode":
    return _tidar(_committed(r), r.doc.shape[1] - 8)
  doc = r.doc * 0 if name == "nbdiff_decode" else r.doc
  slots = [(s, n) for s in streams for n in range(r.doc.shape[1])]
  out = np.zeros((B, len(slots), len(slots)), bool)
  for b in range(B):
    for x, (qs, i) in enumerate(slots):
      for y, (ks, j) in enumerate(slots):
        if doc[b, i] >= 0 and doc[b, i] == doc[b, j]:
          out[b, x, y] = pred(r, b, qs, i, ks, j)
  return out
