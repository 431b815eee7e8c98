"""Counter-based noise: a pure function of (seed, step, example id, occurrence, copy, position).

Nothing here knows a row, a slot, a device or a host, so packing, sharding, resuming and the order of a
batch change no draw. The generator is Threefry-2x32 with 20 rounds (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011), elementwise over whole rows: jax.random derives one key at a
time, and a key per token would cost a vmapped fold_in each.

Legend: B rows · N clean tokens · D documents.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from genmodels.contracts import Row
from genmodels.rows import doc_bounds, of_doc

Array = jax.Array

# What a draw is for; different tags are independent.
LEVEL, WHICH, VALUE, ORDER, DROP, NOISE, SIZE, PAIR = range(8)

# Stands for the step in evaluations, which must not depend on how long a model was trained.
EVAL_STEP = 0xFFFFFFFF

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


@functools.partial(jax.jit, inline=True)  # traced once for each shape: a program draws many times
def threefry2x32(k0, k1, x0, x1) -> tuple[Array, Array]:
  """Threefry-2x32-20 of key (k0, k1) and counter (x0, x1); all uint32, broadcast against each other."""
  k0, k1, x0, x1 = (jnp.asarray(a, jnp.uint32) for a in (k0, k1, x0, x1))
  ks = (k0, k1, k0 ^ k1 ^ np.uint32(0x1BD11BDA))
  x0, x1 = x0 + ks[0], x1 + ks[1]
  for i in range(5):
    for r in _ROTATIONS[i % 2]:
      x0 = x0 + x1
      x1 = ((x1 << np.uint32(r)) | (x1 >> np.uint32(32 - r))) ^ x0
    x0 = x0 + ks[(i + 1) % 3]
    x1 = x1 + ks[(i + 2) % 3] + np.uint32(i + 1)
  return x0, x1


def uniform(bits: Array) -> Array:
  """uint32 → float32 in the open interval (0, 1): the centre of one of 2²³ equal cells."""
  return (bits >> np.uint32(9)).astype(jnp.float32) * np.float32(2**-23) + np.float32(2**-24)


def _key_words(key: Array) -> tuple[Array, Array]:
  data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
  return data[..., 0], data[..., 1]


def _word(x) -> Array:
  return np.uint32(x) if isinstance(x, int) else x.astype(jnp.uint32)


def doc_key(row: Row, key: Array, step, copy: int, tag: int) -> tuple[Array, Array]:
  """The key of each document's noise, two uint32[B, D]."""
  k = step_key(key, step, tag)
  k = threefry2x32(*k, row.docs.example_id[..., 0], row.docs.example_id[..., 1])
  return threefry2x32(*k, row.docs.occurrence.astype(jnp.uint32), _word(copy))


def step_key(key: Array, step, tag: int) -> tuple[Array, Array]:
  """The key of what all rows of a step share, two uint32 scalars."""
  return threefry2x32(*_key_words(key), _word(step), np.uint32(tag))


def doc_uniform(row: Row, key: Array, step, copy: int, tag: int) -> Array:
  """One uniform per document, float32[B, D]."""
  return uniform(threefry2x32(*doc_key(row, key, step, copy, tag), np.uint32(0), np.uint32(1))[0])


def doc_level(row: Row, key: Array, step, time: str, bound: tuple | None = None) -> Array:
  """A level in (0, 1) of each token's document, float32[B, N].

  Args:
    time: "uniform", or "stratified": over the documents of the global batch by their `rank`.
    bound: (r, R), stratum r of R instead.
  """
  u = doc_uniform(row, key, step, 0, LEVEL)
  if bound is not None:
    u = (bound[0] + u) / bound[1]
  elif time == "stratified":
    u = (row.docs.rank[..., 0] + u) / jnp.maximum(row.docs.rank[..., 1], 1)
  return of_doc(row.doc, u)


def token_bits(
  row: Row, key: Array, step, copy: int, tag: int, at: Array | None = None, lane: int = 0
) -> Array:
  """uint32[B, N] of independent bits per (document, position).

  Args:
    at: int32[B, N], what plays the position (default: the index inside the document); tokens with
      equal `at` in one document share their bits, which is how a whole block draws one number.
    lane: further independent numbers of the same position.
  """
  return _lane_bits(row, key, step, copy, tag, at, np.array([lane]))[..., 0]


def _lane_bits(row: Row, key: Array, step, copy: int, tag: int, at: Array | None, lanes: np.ndarray) -> Array:
  """uint32[B, N, len(lanes)]: `token_bits` of several lanes, in one call of the generator."""
  if at is None:
    lo, _ = doc_bounds(row.doc)
    at = jnp.arange(row.doc.shape[1], dtype=jnp.int32)[None] - lo
  k0, k1 = (of_doc(row.doc, k)[..., None] for k in doc_key(row, key, step, copy, tag))
  return threefry2x32(k0, k1, at.astype(jnp.uint32)[..., None], (2 + lanes).astype(np.uint32))[0]


def token_uniform(row: Row, key: Array, step, copy: int, tag: int, at=None, lane: int = 0) -> Array:
  """float32[B, N] uniforms in (0, 1); arguments of `token_bits`."""
  return uniform(token_bits(row, key, step, copy, tag, at, lane))


def token_keys(row: Row, key: Array, step, copy: int, tag: int) -> Array:
  """A jax.random key for each token, [B, N]; arguments of `token_bits`, of which it takes lanes 0 and 1."""
  bits = [token_bits(row, key, step, copy, tag, lane=lane) for lane in (0, 1)]
  return jax.random.wrap_key_data(jnp.stack(bits, -1), impl="threefry2x32")


def token_normal(row: Row, key: Array, step, copy: int, tag: int, width: int, lane: int = 0) -> Array:
  """float32[B, N, width] standard normals, by the inverse error function."""
  u = uniform(_lane_bits(row, key, step, copy, tag, None, lane * width + np.arange(width)))
  return jnp.float32(np.sqrt(2)) * jax.scipy.special.erfinv(2 * u - 1)
