"""Cache policies, and the law that makes one exact.

A policy only says which slots are kept and when: under which codes they are seen follows from the mask's
relation table, which training and decoding share.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genmodels.config import ConfigError
from genmodels.contracts import CLEAN, CONTEXT, TEXT, token_row
from genmodels.sampling.partial import REGISTRY, Partial


@dataclasses.dataclass(frozen=True)
class CachePolicy:
  """What enters the cache.

  Fields:
    name: key in the config.
    stores: keys and values are kept at all.
    exact: decoding with it equals decoding without.
    reach: what a stored slot may see: "causal" tokens up to its own, "block" its own block too.
    partial: a partial.Partial: which slots of the front unit a step computes; None: all of them.
  """

  name: str
  stores: bool
  exact: bool
  reach: str = ""
  partial: Any = None


POLICIES = {
  p.name: p
  for p in (
    CachePolicy("none", stores=False, exact=True),
    # Next-token models, and block models whose clean stream is causal (NBDiff, TiDAR).
    CachePolicy("causal_exact", stores=True, exact=True, reach="causal"),
    # A pass over the finished block, whose slots see all of it (BD3-LM, SDAR); next-scale models.
    CachePolicy("block_exact", stores=True, exact=True, reach="block"),
  )
}


@dataclasses.dataclass(frozen=True)
class Reach:
  """Who sees whom, found out on a small symbolic row.

  Fields:
    stored: "causal", "block" or "" (beyond its block, or another stream): what slots of the commit
      stream see.
    predicts: "block" if the predicting slots see nothing of their own stream beyond their block.
  """

  stored: str
  predicts: str


def store_stream(objective) -> str:
  """The stream whose slots are what later tokens condition on: the clean one, or the only noisy one."""
  return CLEAN if CLEAN in objective.layout.streams else objective.layout.streams[0]


def reach(objective, patterns, stream: str, store: str, single: bool) -> Reach:
  """What slots of `store` and of `stream` see.

  Args:
    patterns: mask patterns that the model's layers attend under.
    single: units are single tokens, whatever the corruption's blocks.
  """
  blocks = objective.corruption.blocks
  if not single and not blocks.whole and blocks.anchor != "prompt":
    # The relations know no sizes, so a small row says it all.
    sizes = (1, 2, 3) if blocks.sizes else ()
    small = dataclasses.replace(blocks, sizes=sizes) if sizes else dataclasses.replace(blocks, size=2)
    objective = dataclasses.replace(
      objective, corruption=dataclasses.replace(objective.corruption, blocks=small)
    )
  n = 6
  role = jnp.asarray([[CONTEXT] * 2 + [TEXT] * 4], jnp.int32) if blocks.anchor == "prompt" else None
  row = token_row(np.zeros((1, n)), role=role)

  def build():
    noise = objective.corruption.state(row, row.doc < 0)
    slots = objective.layout.arrange(row, noise)
    seen = [r.mask(slots).to_dense()[0] for p, r in objective.relations.items() if p in patterns]
    return slots.src[0], slots.stream[0], noise.blk_hi[0], sum(s.astype(np.int32) for s in seen) > 0

  with jax.ensure_compile_time_eval():
    src, streams, blk_hi, seen = (np.asarray(x) for x in jax.jit(build)())
  of = objective.layout.streams.index
  key_block = blk_hi[src]  # the end of the key's block
  stored_key = (streams == of(store))[None]
  q = streams == of(store)
  other = (seen & ~stored_key)[q].any()
  late = (seen & (src[None] > src[:, None]))[q].any()
  beyond = (seen & (key_block[None] > key_block[:, None]))[q].any()
  stored = "" if other or late and (beyond or single) else "block" if late else "causal"
  if stream == store:
    return Reach(stored, "block")
  outside = ~stored_key & (key_block[None] != key_block[:, None])
  ahead = stored_key & (key_block[None] >= key_block[:, None])
  p = streams == of(stream)
  return Reach(stored, "" if (seen & (outside | ahead))[p].any() else "block")


def resolve(name, found: Reach, where: str = "sampler.cache") -> CachePolicy:
  """The policy of a config, checked: a cached slot never sees what is not committed yet.

  Args:
    name: of a policy, "auto", or a partial.Partial: units behind the front are then kept as under "auto".

  Raises:
    ConfigError: an unknown policy, or one that would not be exact under the objective's masks.
  """
  if isinstance(name, Partial):
    base = resolve("auto", found)
    kind = next(k for k, cls in REGISTRY.items() if cls is type(name))
    return CachePolicy(kind, stores=True, exact=False, reach=base.reach, partial=name)
  if name == "auto":
    return POLICIES[{"causal": "causal_exact", "block": "block_exact", "": "none"}[found.stored]]
  if name not in POLICIES:
    raise ConfigError(
      "unknown policy", key=where, value=name, fix=f"auto, {', '.join((*POLICIES, *REGISTRY))}"
    )
  policy = POLICIES[name]
  if not policy.stores or policy.reach == found.stored or (policy.reach, found.stored) == ("block", "causal"):
    return policy
  sees = {
    "": "committed tokens see tokens that are not committed yet, so their keys and values change",
    "block": "a stored token sees later tokens of its block",
    "causal": "",
  }[found.stored]
  right = {"": "none", "block": "block_exact"}.get(found.stored, "auto")
  raise ConfigError(f"the cache would not be exact: {sees}", key=where, value=name, fix=f"{where}={right!r}")
