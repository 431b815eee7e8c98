"""Surgery on named arrays: which source leaf fills which target leaf, vocabulary rows, the mask row.

Dict code on {name: array}; no model is involved. D is the width, V the rows of a vocabulary table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp


class CoverageError(ValueError):
  """Leaves of a tree that nothing fills, or of a checkpoint that nothing uses."""


def source_name(name: str, rename: Sequence[tuple[str, str]]) -> str:
  """The source leaf of target leaf `name`: the first rule whose pattern matches the whole name."""
  for pattern, replacement in rename:
    if re.fullmatch(pattern, name):
      return re.sub(pattern, replacement, name)
  return name


def _matching(patterns: Sequence[str], names, what: str) -> set[str]:
  out: set[str] = set()
  for p in patterns:
    hits = {n for n in names if re.fullmatch(p, n)}
    if not hits:
      raise CoverageError(f"{what} pattern {p!r} matches no leaf; leaves: {_some(names)}")
    out |= hits
  return out


def _some(names, limit: int = 8) -> str:
  names = sorted(names)
  return ", ".join(names[:limit]) + (f" … ({len(names)} in all)" if len(names) > limit else "")


def cover(
  target: Sequence[str],
  source: Sequence[str],
  rename: Sequence[tuple[str, str]] = (),
  scratch: Sequence[str] = (),
  drop: Sequence[str] = (),
) -> dict[str, str]:
  """{target leaf: source leaf}; every leaf on either side is accounted for.

  Args:
    rename: (pattern on the target name, replacement) pairs; no match: the same name.
    scratch: patterns of target leaves that keep their fresh values.
    drop: patterns of source leaves that are left behind.

  Raises:
    CoverageError: a target leaf without a source that is not in `scratch`, a source leaf that is
      neither used nor in `drop`, a dropped leaf that is used, or a pattern that matches nothing.
  """
  fresh, left = _matching(scratch, target, "scratch"), _matching(drop, source, "drop")
  mapping = {name: source_name(name, rename) for name in target if name not in fresh}
  missing = {t: s for t, s in mapping.items() if s not in set(source)}
  unused = set(source) - set(mapping.values()) - left
  both = left & set(mapping.values())
  lines = []
  if missing:
    pairs = [t if t == s else f"{t} (from {s})" for t, s in missing.items()]
    lines.append(f"no source for: {_some(pairs)}; rename them, or list them in `scratch`")
  if unused:
    lines.append(f"not used: {_some(unused)}; rename them, or list them in `drop`")
  if both:
    lines.append(f"listed in `drop` but used: {_some(both)}")
  if lines:
    raise CoverageError("; ".join(lines))
  return mapping


def resize_rows(value: jax.Array, fresh: jax.Array, axis: int) -> jax.Array:
  """`value` with the number of rows of `fresh` along `axis`: cut, or continued by the rows of `fresh`."""
  have, want = value.shape[axis], fresh.shape[axis]
  if have >= want:
    return jax.lax.slice_in_dim(value, 0, want, axis=axis)
  return jnp.concatenate(
    [value, jax.lax.slice_in_dim(fresh, have, want, axis=axis).astype(value.dtype)], axis
  )


def row_norms(rows_VD: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Norms [V] in float32 and the median over the rows that are not zero (padding is)."""
  norms = jnp.sqrt(jnp.sum(jnp.square(rows_VD.astype(jnp.float32)), -1))
  return norms, jnp.nanmedian(jnp.where(norms > 0, norms, jnp.nan))


def set_mask_row(
  table: jax.Array, axis: int, mask_id: int, kind: str, key: jax.Array, reserved_id: int = -1, vocab: int = -1
) -> jax.Array:
  """A table with a usable row for the mask token.

  A near-zero row makes gradients explode when all tokens of a full-attention batch are masked, and a
  row of untrained noise may be far too large, so its norm always ends in [½, 2] × the median row's.

  Args:
    table: [V, D], [D, V] or [V]; the vocabulary is along `axis`.
    mask_id: the row to set.
    kind: "reserved": copy the row of `reserved_id` (an id the pretraining left for such uses), its
      norm clipped into the range; "mean_noise": the mean row plus Gaussian noise of the rows' own
      spread, at the median norm.
    key: for the noise.
    vocab: the rows that are tokens (those behind are padding); −1 all.

  Returns:
    The table, other rows untouched.

  Raises:
    ValueError: an id outside the table, or an unknown kind.
  """
  size = table.shape[axis] if vocab < 0 else vocab
  for what, row in (("mask_id", mask_id), *([("reserved_id", reserved_id)] if kind == "reserved" else [])):
    if not 0 <= row < size:
      raise ValueError(f"{what} = {row} is not a row of a table of {size} tokens")
  rows = jnp.moveaxis(table, axis, 0)
  others = rows[:size].astype(jnp.float32).reshape(size, -1)
  if kind == "reserved":
    row = others[reserved_id]
  elif kind == "mean_noise":
    known = jnp.arange(size) != mask_id
    mean = jnp.sum(jnp.where(known[:, None], others, 0), 0) / (size - 1)
    var = jnp.sum(jnp.where(known[:, None], jnp.square(others - mean), 0), 0) / (size - 1)
    row = mean + jnp.sqrt(var) * jax.random.normal(key, mean.shape)
  else:
    raise ValueError(f"mask_row = {kind!r}: 'reserved' or 'mean_noise'")
  if table.ndim > 1:
    _, median = row_norms(others)
    norm = jnp.sqrt(jnp.sum(row * row))
    want = median if kind == "mean_noise" else jnp.clip(norm, 0.5 * median, 2 * median)
    mean = jnp.mean(others, 0)  # the direction of a row that is exactly zero
    row = jnp.where(norm > 0, row * (want / jnp.maximum(norm, 1e-30)), mean * (want / jnp.linalg.norm(mean)))
  elif kind == "mean_noise":
    row = mean
  # A select, no `.at[].set`: after a cut and partitioned over V, that wrote other rows too (jax 0.10.2).
  here = (jnp.arange(rows.shape[0]) == mask_id).reshape(-1, *[1] * (rows.ndim - 1))
  return jnp.moveaxis(jnp.where(here, row.reshape(rows.shape[1:]).astype(table.dtype), rows), 0, axis)


def vocab_axis(axes: Mapping[str, tuple], name: str) -> int | None:
  """The axis of leaf `name` that is named "vocab", or None."""
  names = axes.get(name) or ()
  return names.index("vocab") if "vocab" in names else None
