"""Two pure functions that plans stand on: a keyed permutation with random access, and packing of rows.

Legend: P pieces.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping

import numpy as np

from genmodels.data.records import DataError

U64 = np.uint64


# --------------------------------------------------------------------------------------------- cipher


_GOLDEN = U64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
  """The splitmix64 finaliser (Steele et al. 2014) of a uint64 array; arrays wrap silently."""
  x = (x ^ (x >> U64(30))) * U64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> U64(27))) * U64(0x94D049BB133111EB)
  return x ^ (x >> U64(31))


def hash64(*values) -> np.ndarray:
  """A 64-bit hash of uint64 numbers or arrays."""
  with np.errstate(over="ignore"):
    h = np.zeros((), U64)
    for v in values:
      h = _mix((h ^ np.asarray(v, U64)) + _GOLDEN)
  return h


def permute(index, size: int, key) -> np.ndarray:
  """A keyed permutation of [0, size) at `index`, int64: an unbalanced Feistel network, walked in cycles.

  Args:
    index: int[...] in [0, size).
    key: uint64 (a hash), scalar or an array like `index` (every element under its own key).
  """
  index = np.asarray(index, np.int64)
  bits = max(int(size - 1).bit_length(), 2)
  low = bits // 2
  shift, low_mask, high_mask = U64(low), U64((1 << low) - 1), U64((1 << (bits - low)) - 1)
  flat = index.astype(U64).reshape(-1)
  keys = np.broadcast_to(np.asarray(key, U64), index.shape).reshape(-1)
  walking = np.arange(flat.size)
  while walking.size:
    x, k = flat[walking], keys[walking]
    a, b = x & low_mask, x >> shift
    for _ in range(4):
      a = a ^ (_mix(b ^ k) & low_mask)
      k = k + _GOLDEN
      b = b ^ (_mix(a ^ k) & high_mask)
      k = k + _GOLDEN
    flat[walking] = x = (b << shift) | a
    walking = walking[x >= U64(size)]
  return flat.reshape(index.shape).astype(np.int64)


# -------------------------------------------------------------------------------------------- packing


def pack(sizes: Mapping[str, np.ndarray], room: Mapping[str, int], documents: int) -> tuple[np.ndarray, int]:
  """Best-fit decreasing over several budgets at once.

  Args:
    sizes: {budget: int[P]} what each piece costs. room: {budget: capacity of a row}.
    documents: pieces that a row may hold.
  Returns: row int32[P] of each piece, number of rows. No row exceeds any budget.
  Raises: DataError if a piece fits no row.
  """
  for name, size in sizes.items():
    if size.size and size.max() > room[name]:
      i = int(size.argmax())
      raise DataError(
        f"packing: a piece costs {int(size[i])} of budget {name!r}, a row has {room[name]}; "
        f"raise data.budgets.{name} (for 'copy': objective.layout.copy_slots) or lower data.piece_len"
      )
  # Fit by the budget that fills first; the others are only checked.
  first = max(sizes, key=lambda n: (sizes[n].sum() / room[n], n))
  others = [n for n in sizes if n != first and not np.array_equal(sizes[n], sizes[first])]
  size, cap = sizes[first], int(room[first])
  order = np.argsort(-size.astype(np.int64), kind="stable")
  rest = np.stack([sizes[n] for n in others], 1)[order].tolist() if others else None
  caps = [int(room[n]) for n in others]
  out = np.empty(len(size), np.int32)
  stacks: dict[int, list[int]] = collections.defaultdict(list)  # open rows by the room they have left
  mask = 0  # bit r: some open row has room r
  count: list[int] = []
  left: list[list[int]] = []
  smallest = int(size.min()) if size.size else 0
  rows = []
  for i, s in enumerate(size[order].tolist()):
    row, r = -1, cap
    m = mask >> s
    if rest is None:
      if m:
        r = s + (m & -m).bit_length() - 1
        row = stacks[r].pop()
        if not stacks[r]:
          mask ^= 1 << r
    else:
      row, r, mask = _fit(stacks, mask, s, rest[i], left)
    if row < 0:
      row, r = len(count), cap
      count.append(0)
      if rest is not None:
        left.append(list(caps))
    rows.append(row)
    count[row] += 1
    if rest is not None:
      left[row] = [a - b for a, b in zip(left[row], rest[i])]
    r -= s
    if r >= smallest and count[row] < documents:
      if not stacks[r]:
        mask |= 1 << r
      stacks[r].append(row)
  out[order] = rows
  return out, len(count)


def _fit(stacks, mask, s, costs, left, tries=64):
  """The tightest open row that also has room in the other budgets, among the `tries` tightest."""
  m, base = mask >> s, s
  while m:
    skip = (m & -m).bit_length() - 1
    r = base + skip
    stack = stacks[r]
    for j in range(len(stack) - 1, -1, -1):
      if all(a >= b for a, b in zip(left[stack[j]], costs)):
        row = stack.pop(j)
        return row, r, mask if stack else mask ^ (1 << r)
      tries -= 1
      if not tries:
        return -1, 0, mask
    m >>= skip + 1
    base = r + 1
  return -1, 0, mask
