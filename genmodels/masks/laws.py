"""What a mask must not let happen: a target that reaches its own loss, noise in the clean stream.

Both checks take dense masks of a small symbolic row and follow several layers: what a slot can know is
the transitive closure of what it attends to.

Legend: S slots.
"""

from __future__ import annotations

import numpy as np


def reach(dense) -> np.ndarray:
  """bool[S, S]: which slots a query depends on after any number of layers, itself included.

  Args:
    dense: bool[S, S], visible keys by query; the union where layers use several patterns.
  """
  seen = np.asarray(dense, bool) | np.eye(len(dense), dtype=bool)
  while True:
    wider = (seen.astype(np.float32) @ seen.astype(np.float32)) > 0
    if (wider == seen).all():
      return seen
    seen = wider


def leak_closure(dense, carries, targets) -> list[tuple[int, int, int]]:
  """All ways in which a loss-bearing query can know what it must predict.

  Args:
    dense: bool[S, S], visible keys by query (the union over patterns if layers use several).
    carries: int[S], the token whose clean identity the slot's input holds, −1 if none (a masked slot);
      or bool[S, N], all tokens that it holds something of.
    targets: int[S], or a sequence of (slot, token): the token each slot predicts, −1 if none.

  Returns:
    (query slot, leaking slot, token) of each leak; empty if the system is sound.
  """
  seen, carries = reach(dense), np.asarray(carries)
  holds = (lambda token: carries == token) if carries.ndim == 1 else (lambda token: carries[:, token])
  targets = np.asarray(targets)
  pairs = enumerate(targets) if targets.ndim == 1 else targets
  return [
    (int(slot), int(source), int(token))
    for slot, token in pairs
    if slot >= 0 and token >= 0
    for source in np.nonzero(seen[slot] & holds(token))[0]
  ]


def purity(dense, noisy, clean) -> list[tuple[int, int]]:
  """(clean slot, noisy slot) pairs where noise can reach a clean activation; empty if it cannot.

  Args:
    dense: bool[S, S], visible keys by query.
    noisy, clean: bool[S].
  """
  seen = reach(dense)
  noisy, clean = np.asarray(noisy, bool), np.asarray(clean, bool)
  return [(int(a), int(b)) for a, b in np.argwhere(seen & clean[:, None] & noisy[None])]
