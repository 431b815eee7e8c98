"""Stop rules: when what is masked is committed at once, and when a row is over or begins anew.

An EOS ends a row without a rule (`sampler.eos`): as soon as it is committed and so is all before it. No rule
changes a token that is committed.

Legend: B rows · N tokens of a row · M tokens asked for.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from genmodels.contracts import Array, Row
from genmodels.corruption.base import eligible
from genmodels.models import crop_cache
from genmodels.sampling.draw import Picked
from genmodels.sampling.state import Ask, State, first_where, mean


@dataclasses.dataclass(frozen=True)
class Stop:
  """Base: a rule that never stops.

  Class attributes: extras, what it reads of a Picked.
  """

  extras = ()

  def flush(self, a: Ask, picked: Picked, progress: Array) -> Array:
    """bool[B]: all masked tokens that are asked for are committed in this step.

    Args:
      progress: float32[B] in [0, 1], the part of the unit that is committed.
    """
    return jnp.zeros(progress.shape, bool)

  def memory(self, row: Row) -> dict[str, Array]:
    """What the rule remembers, at the start."""
    return {}

  def after(self, sampler, row: Row, before: State, s: State) -> State:
    """The state after a step."""
    return s

  def lengths(self, s: State, lengths: Array) -> Array:
    """int32[B]: valid tokens of the rows."""
    return lengths


@dataclasses.dataclass(frozen=True)
class Gap(Stop):
  """Commits the rest when the mean distance of the two largest logits of the masked tokens passes a threshold
  that falls with the progress (Prophet, 2508.19982 §4). Thresholds of infinity are no rule.

  Fields:
    thresholds: of the mean gap in logits, one for each stage.
    at: progress at which each stage begins, 0 first.
  """

  thresholds: tuple[float, ...] = (7.5, 5.0, 2.5)
  at: tuple[float, ...] = (0.0, 0.33, 0.67)

  extras = ("gap",)

  def __post_init__(self):
    if len(self.thresholds) != len(self.at) or self.at[:1] != (0.0,) or sorted(self.at) != list(self.at):
      raise ValueError(f"thresholds {self.thresholds} and at {self.at}: one each, at rising from 0.0")

  def flush(self, a, picked, progress):
    stage = jnp.sum(progress[:, None] >= jnp.asarray(self.at), 1) - 1
    return a.under.any(1) & (mean(picked.gap, a.under) >= jnp.asarray(self.thresholds)[stage])


@dataclasses.dataclass(frozen=True)
class Converged(Stop):
  """Commits the rest when the predictions stand still: the mean of KL(p_t ‖ p_{t−1}) over the masked tokens
  is below `tol` (LRD, 2510.11052 §3.3). The divergence is taken over the likeliest tokens of the step before
  and the rest as one class, see `draw.kl_on`.

  Fields:
    tol: nats (unverified). top: how many tokens are remembered.
  """

  tol: float = 1e-3
  top: int = 16

  extras = ("top", "kl")

  def flush(self, a, picked, progress):
    return a.under.any(1) & (mean(picked.kl, a.under) < self.tol)


@dataclasses.dataclass(frozen=True)
class EntropyFloor(Stop):
  """A row whose last `window` tokens have an empirical entropy below `floor` has degenerated: it ends,
  without them, or is drawn anew (BD3-LM's sampler, 2503.09573 §C). Looked at when a block is finished.

  Fields:
    window: tokens. floor: nats.
    then: "stop", or "resample" from the prompt, at most `tries` times, then stop.
  """

  window: int = 256
  floor: float = 4.0
  then: Literal["stop", "resample"] = "resample"
  tries: int = 10

  def __post_init__(self):
    if self.window < 1 or self.tries < 1:
      raise ValueError(f"window is {self.window}, tries {self.tries}; both must be at least 1")

  def memory(self, row):
    zero = jnp.zeros(row.doc.shape[:1], jnp.int32)
    return {"cut": zero + row.doc.shape[1], "tries": zero}

  def entropy(self, tokens: Array, edge: Array) -> Array:
    """float32[B]: entropy of the `window` tokens before `edge` int32[B]."""
    at = edge[:, None] - 1 - jnp.arange(self.window)
    x = jnp.take_along_axis(tokens, jnp.clip(at, 0, tokens.shape[1] - 1), 1)
    same = (x[:, :, None] == x[:, None]).sum(2)
    return -jnp.log(same / self.window).mean(1)

  def after(self, sampler, row, before, s):
    memory = s.memory["entropy_floor"]
    total = (row.doc >= 0).sum(1, dtype=jnp.int32)
    over = s.done & ~before.done
    edge = jnp.where(over, jnp.minimum(first_where(~s.committed), total), s.cursor)
    look = (over | (s.cursor > before.cursor)) & ~before.done & (edge >= self.window)
    low = look & (self.entropy(s.tokens, edge) < self.floor)
    again = low & (memory["tries"] < self.tries) & (self.then == "resample")
    cut = jnp.where(low & ~again, edge - self.window, memory["cut"])
    done = (s.done | low) & ~again
    s = s.replace(
      done=done,
      memory=s.memory | {"entropy_floor": {"cut": cut, "tries": memory["tries"] + again}},
    )
    return restart(sampler, row, s, again) if self.then == "resample" else s

  def lengths(self, s, lengths):
    return jnp.minimum(lengths, s.memory["entropy_floor"]["cut"])


def restart(sampler, row: Row, s: State, again: Array) -> State:
  """The state with the flagged rows as they were before their first step; draws differ, see
  `Sampler.forward`."""
  committed = jnp.logical_not(eligible(row))
  cursor = sampler.active.start(sampler, row)

  def pick(new, old):
    return jnp.where(again.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

  # Counts of what was opened or begun anew go on: they key the draws.
  forgotten = {k: v for k, v in sampler.memory(row).items() if k in ("top", "refined", "credit")}
  memory = s.memory | jax.tree.map(pick, forgotten, {k: s.memory[k] for k in forgotten})
  return s.replace(
    memory=memory,
    tokens=pick(row.tokens, s.tokens),
    committed=pick(committed, s.committed),
    committed_at=pick(-1, s.committed_at),
    level_at=pick(0.0, s.level_at),
    cursor=pick(cursor, s.cursor),
    unit=pick(-1, s.unit),
    busy=pick(False, s.busy),
    caches=tuple(crop_cache(c, pick(cursor, c.length)) for c in s.caches),
    changed=s.changed | again.any(),
  )


REGISTRY = {"gap": Gap, "converged": Converged, "entropy_floor": EntropyFloor}
