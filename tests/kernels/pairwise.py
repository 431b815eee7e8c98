"""Covering tables: the fewest cases that a greedy choice finds in which all required pairs of values meet.

A case maps a factor to its value, or to a tuple of values where one case has several of them at once (a
batch of two masks). A pair is two values of two different factors in one case.
"""

from __future__ import annotations

import heapq
import itertools
import random


def pairs(case) -> frozenset:
  """All pairs ((factor, value), (factor, value)) of a case, in the order of its factors."""
  values = [[(name, v) for v in (x if isinstance(x, tuple) else (x,))] for name, x in case.items()]
  return frozenset(p for a, b in itertools.combinations(values, 2) for p in itertools.product(a, b))


def required(factors) -> frozenset:
  """Every pair of values of every two factors of {name: values}."""
  return pairs({name: tuple(values) for name, values in factors.items()})


def cover(candidates, goals, reached=pairs, weight=lambda goal: 1, seed=0) -> list:
  """Some of the candidates, in the order chosen, that together reach all goals; none of them is superfluous.

  Takes the candidate that reaches most of what is left, of equals the first in a shuffled order (else the
  table would use few values where all do): the same table every time.

  Args:
    candidates: sequence of cases.
    goals: set of what must be reached.
    reached: case -> set of what it reaches.
    weight: goal -> what it counts. Goals that few cases reach are worth more early: late they cost a case each.
    seed: of the shuffle.

  Raises:
    ValueError: goals that no candidate reaches.
  """
  candidates = random.Random(seed).sample(candidates, len(candidates))
  left = set(goals)
  gains = [frozenset(reached(c) & goals) for c in candidates]
  heap = [(-sum(map(weight, g)), i) for i, g in enumerate(gains)]
  heapq.heapify(heap)
  chosen = []
  while left:
    gain, i = heapq.heappop(heap) if heap else (0, 0)
    now = sum(map(weight, gains[i] & left))
    if gain == 0:
      raise ValueError(f"cover: no candidate reaches {sorted(left, key=str)[:3]} ({len(left)} goals left)")
    if now < -gain:  # gains only shrink: an entry of the heap is an upper bound
      if now:
        heapq.heappush(heap, (-now, i))
      continue
    chosen.append(i)
    left -= gains[i]
  for i in list(chosen):  # an early choice may have become superfluous
    rest = frozenset().union(*(gains[j] for j in chosen if j != i))
    if goals <= rest:
      chosen.remove(i)
  return [candidates[i] for i in chosen]


def product(factors) -> list[dict]:
  """All cases of {name: values}."""
  return [dict(zip(factors, values)) for values in itertools.product(*factors.values())]
