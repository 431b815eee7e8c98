"""What the loop carries, what one call asks, what comes out; and rows to generate from prompts.

Legend: B rows · N tokens of a row · W tokens of a unit that are asked for · M asked (W, and the next token)
· A slots of a call.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from genmodels.contracts import CONTEXT, TEXT, Array, Documents, Noise, Row, pytree
from genmodels.corruption.base import eligible

KINDS = ("prefill", "denoise", "write")  # forwards: of prompts, over noisy slots, only to fill the cache


@pytree()
class State:
  """A batch of generations in progress.

  Fields:
    tokens, committed, committed_at: [B, N]; committed_at is the step (0 first), −1 for given or open tokens.
    level_at: float32[B, N], noise level when the token was committed.
    cursor: int32[B], tokens whose unit is behind the front (in the cache, where there is one).
    unit, k, size, level: the unit being denoised: its first token, steps taken, masked tokens and noise
      level; [B].
    busy: bool[B], its steps are not over, even if it has no masked token now (remasking).
    done: bool[B]. step, forwards: int32 scalars. calls: {kind: int32[B]}, forwards a row took part in.
    caches: one per guidance branch, or none. draft: predictions kept while nothing changes, or none.
    changed: bool, some row changed in the last step.
    memory: {plug-in: arrays}, what plug-ins keep from step to step.
  """

  tokens: Array
  committed: Array
  committed_at: Array
  level_at: Array
  cursor: Array
  unit: Array
  k: Array
  size: Array
  level: Array
  busy: Array
  done: Array
  step: Array
  forwards: Array
  calls: dict[str, Array]
  caches: tuple
  draft: Any
  changed: Array
  memory: dict[str, Any]


@pytree()
class Result:
  """What was generated.

  Fields:
    tokens: int32[B, N], prompts included; only the first `lengths` are meant.
    committed_at: int32[B, N], step at which a token was committed; −1 for prompts and open tokens.
    level_at: float32[B, N], noise level left in its unit when it was committed.
    lengths: int32[B], valid tokens of the row, EOS included.
    done: bool[B], False only where the loop ran into its step limit.
    steps, forwards: int32 scalars: iterations of the loop, evaluations of the network (prefill and guidance
      included).
    calls: {"prefill", "denoise", "write": int32[B]}, forwards a row took part in, by what they were for.
    memory: {plug-in: arrays}, what plug-ins remember of the generation.
  """

  tokens: Array
  committed_at: Array
  level_at: Array
  lengths: Array
  done: Array
  steps: Array
  forwards: Array
  calls: dict[str, Array]
  memory: dict[str, Any]

  @property
  def tokens_per_forward(self) -> Array:
    """float32[B]: tokens committed by a row over the forwards it took part in, the prompt's left out."""
    generated = (self.committed_at >= 0).sum(1)
    return generated / jnp.maximum(sum(n for kind, n in self.calls.items() if kind != "prefill"), 1)

  @property
  def slots_per_token(self) -> Array:
    """float32: slots that the network computed for a generated token, over the batch; prompts, guidance and
    the padding of rows and calls count as executed."""
    generated = jnp.maximum((self.committed_at >= 0).sum(), 1)
    return self.memory["cache"]["slots"] * self.tokens.shape[0] / generated


@pytree()
class Ask:
  """One call: what to compute and what it may commit.

  Fields:
    only: int32[B, A, 2]; keep: bool[B, A], slots that enter the cache.
    at: int32[B, M], coordinates asked for; can: bool[B, M], those that may be committed; slot: int32[B, M].
    under: bool[B, M], those of `can` under a quota; the others are committed at once.
    held: bool[B, M], committed tokens that may be opened again: no cache holds anything that saw them.
    least: int32[B·G], tokens of each of the G groups of asked tokens that are committed at the least.
    denoise: bool[B], rows whose call is over noisy slots; fresh: their window is a new one.
    lo, hi, wlo: int32[B], the front unit, and the first token of the window inside it.
    cursor: int32[B], the front after this call.
    row, noise, inputs: what was viewed, and the first branch's Inputs.
  """

  only: Array
  keep: Array
  at: Array
  can: Array
  slot: Array
  under: Array
  held: Array
  least: Array
  denoise: Array
  fresh: Array
  lo: Array
  hi: Array
  wlo: Array
  cursor: Array
  row: Row
  noise: Noise
  inputs: Any


@pytree()
class Selected:
  """What a step does to the tokens.

  Fields:
    commit, opened: bool[B, M], committed now, and opened again.
    k, size, level, busy, memory: of the State after it.
  """

  commit: Array
  opened: Array
  k: Array
  size: Array
  level: Array
  busy: Array
  memory: dict[str, Any]


def mean(x: Array, where: Array) -> Array:
  """float32[B]: mean over the flagged of [B, M], 0 of none."""
  return jnp.where(where, x, 0.0).sum(1) / jnp.maximum(where.sum(1), 1)


def first_where(flag: Array) -> Array:
  """int32[B]: the first flagged coordinate of each row, N if none."""
  return jnp.where(flag.any(1), jnp.argmax(flag, 1), flag.shape[1]).astype(jnp.int32)


def calls_of(committed_at: Array, prefill: int = 0) -> dict[str, Array]:
  """`Result.calls` of a decoder in which a row takes part in every forward up to its last commit."""
  rows_ = jnp.ones(committed_at.shape[:1], jnp.int32)
  return {"prefill": prefill * rows_, "denoise": committed_at.max(1) + 1, "write": 0 * rows_}


def eos_at(eos: int, row: Row, tokens: Array, committed: Array) -> Array:
  """int32[B]: coordinate of the first EOS that was generated, N if none; `eos` below 0 is none."""
  if eos < 0:
    return jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32)
  return first_where((tokens == eos) & committed & eligible(row))


def at_coordinate(x: Array, at: Array) -> Array:
  """x [B, N] at coordinates int32[B] or [B, M], clipped into the row."""
  index = jnp.clip(at, 0, x.shape[1] - 1)
  take = lambda i: jnp.take_along_axis(x, i, 1, mode="promise_in_bounds")
  return take(index[:, None])[:, 0] if at.ndim == 1 else take(index)


def until(done: Array, end) -> Array:
  """`end` (int32[B] or a number) where rows go on, 0 where they are finished, [B, 1].

  In place of `(at < end) & ~done`: for 16 rows of 8 such flags LLVM finds no AVX-512 instruction and ends
  the process (jax 0.10.2).
  """
  return jnp.where(done, 0, end)[:, None]


def put(x: Array, at: Array, value, where: Array) -> Array:
  """x [B, N, …] with `value` at the coordinates int32[B, M] that are flagged by `where` bool[B, M]."""
  index = jnp.where(where, at, x.shape[1])
  return x.at[jnp.arange(x.shape[0])[:, None], index].set(value, mode="drop")


def prompt_row(
  prompts, length: int, new: int, *, suffix=(), example_ids=None, side=None, pad: int = 0, axes: int = 1
) -> Row:
  """Rows to generate from prompts of unequal length (host).

  Args:
    prompts: sequence of int sequences (BOS included where the model wants one); may be empty.
    length: N, tokens of a row.
    new: tokens to generate per row at most; a row ends at `length`.
    suffix: ids given behind the generated ones of every row.
    example_ids: uint32[B, 2]; by default the row's number. Equal ids draw equal noise.
    side: {name: [B, 1, …]} tables of conditions.
    axes: position axes.

  Raises:
    ValueError: a prompt that leaves no room.
  """
  B = len(prompts)
  tokens = np.full((B, length), pad, np.int32)
  doc = np.full((B, length), -1, np.int32)
  role = np.full((B, length), TEXT, np.int32)
  for i, p in enumerate(prompts):
    p = np.asarray(p, np.int32).reshape(-1)
    if len(p) + len(suffix) >= length:
      behind = f" and a suffix of {len(suffix)}" if len(suffix) else ""
      raise ValueError(
        f"prompt {i} has {len(p)} tokens{behind}, a row has {length}; raise the length or cut the prompt"
      )
    end = min(len(p) + new, length - len(suffix))
    tokens[i, : len(p)] = p
    tokens[i, end : end + len(suffix)] = suffix
    role[i, : len(p)] = role[i, end : end + len(suffix)] = CONTEXT
    doc[i, : end + len(suffix)] = 0
  if example_ids is None:
    example_ids = np.stack([np.zeros(B), np.arange(B)], -1)
  zero = np.zeros((B, 1), np.int32)
  docs = Documents(
    example_id=jnp.asarray(np.asarray(example_ids, np.uint32)[:, None]),
    occurrence=jnp.asarray(zero),
    rank=jnp.asarray(np.stack([np.arange(B), np.full(B, B)], -1)[:, None].astype(np.int32)),
    mode=jnp.asarray(zero),
    source=jnp.asarray(zero),
    side={k: jnp.asarray(v) for k, v in (side or {}).items()},
  )
  pos = np.zeros((B, length, axes), np.float32)
  pos[..., 0] = np.arange(length)
  none = np.full((B, length), -1, np.int32)
  return Row(*(jnp.asarray(x) for x in (tokens, doc, pos, role, np.zeros_like(doc), none)), docs)
