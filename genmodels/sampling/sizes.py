"""Block diffusion that asks a learned policy how long the next block is (CtrlDiff, Huang & Tang 2505.14455).

The policy that `objectives.policy` has trained reads the hidden state of the last token before a block, in
a causal pass over the clean row. Decoding makes that pass block by block: when one is complete, its tokens
go through the network once more under the causal mask, behind a cache of their own, and the policy takes the
size of the next block from the last one's state. So the blocks of a generated row are those that training
would cut it into. Calls have room for the largest size; a smaller block leaves slots empty.

Legend: B rows · N tokens of a row · A slots of a call (the largest size) · C sizes · D width.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from genmodels import config
from genmodels.config import ConfigError
from genmodels.contracts import Array, Noise, Row
from genmodels.corruption.base import eligible
from genmodels.corruption.sampled import chain
from genmodels.models import write_cache
from genmodels.objectives.policy import BlockPolicy
from genmodels.sampling import active, stop
from genmodels.sampling.loop import Sampler
from genmodels.sampling.state import Ask, Result, State, at_coordinate, first_where, put


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Section `sampler.sizes`.

  Fields:
    path: workdir of the run that has the policy. name: of its tree there; "": the objective's own.
    draw: sizes are drawn from the policy, as in training; False takes the likeliest.
    network: filled in by `load`.
  """

  path: str = ""
  name: str = ""
  draw: bool = True
  network: Any = None

  def load(self, load: Callable | None, name: str) -> tuple[Sizes, Any]:
    """The section with the policy's network, and its parameters.

    Raises:
      ConfigError: no run is named, or it has no such network.
    """
    if not self.path or load is None:
      raise ConfigError(
        "the policy has no run", key="sampler.sizes.path", value=self.path, fix="sizes.path=<workdir>"
      )
    network, params = load(self.path, self.name or name)
    return dataclasses.replace(self, network=network), params


@dataclasses.dataclass(frozen=True, eq=False)
class Sized(Sampler):
  """A Sampler whose blocks a policy chooses; `sizes.build` makes it.

  Its memory "sizes" has "size" int32[B, N], the size that a block beginning at the token has or would have
  (0: not known yet), and "cache", the keys and values of the policy's pass.

  Fields:
    sizes: with the policy's network. own: its parameters.
  """

  sizes: Sizes = None
  own: Any = None

  def __call__(self, params, row: Row, key: Array, prefill: int | None = None) -> Result:
    """As Sampler; the policy's passes count as forwards, not among `calls`."""
    return super().__call__((params, self.own), row, key, prefill)

  def prefill_width(self, row: Row) -> int:
    most = int(jnp.max(jnp.minimum(first_where(eligible(row)), (row.doc >= 0).sum(1))))
    return min(1 << (most - 1).bit_length(), row.tokens.shape[1]) if most else 0

  def most_units(self, row: Row) -> int:
    return -(-row.tokens.shape[1] // min(self.objective.corruption.sizes)) + 2

  def noise(self, row: Row, s: State) -> Noise:
    return self.cut(row, s.committed, s.memory["sizes"]["size"])

  def cut(self, row: Row, committed: Array, size: Array) -> Noise:
    """The noise of a state whose blocks have these sizes; where none is chosen yet, the largest."""
    lo, hi = chain(row.doc, jnp.where(size > 0, size, self.capacity))
    return self.objective.corruption.progress(row, committed, lo, hi)

  # -- the policy -----------------------------------------------------------------------------------

  def read(self, params, row: Row, cache, at: Array, keep: Array):
    """(hidden states [B, A, D] of the slots of tokens int32[B, A], the cache with the kept ones)."""
    reader = self.objective.reader
    only = active.pairs(jnp.zeros((at.shape[0], 1), jnp.int32), at, keep)
    inputs, _ = reader.view(row, reader.corruption.state(row, row.doc >= 0), only)
    out = self.model.apply(params, inputs, {}, cache=cache)
    return out.layers["hidden"], write_cache(cache, out.new, keep)

  def choose(self, own, row: Row, hidden: Array, at: Array, key: Array) -> Array:
    """int32[B, M], sizes of blocks that begin at coordinates int32[B, M], from the hidden states [B, M, D] of
    the tokens before; the draws are those of training at step 0."""
    corruption, N = self.objective.corruption, row.doc.shape[1]
    logp = self.sizes.network.apply(own, hidden)
    if not self.sizes.draw:
      index = jnp.argmax(logp, -1)
    else:
      shape = (*row.doc.shape, logp.shape[-1])
      where = jnp.broadcast_to((at >= 0) & (at < N), at.shape)
      index = corruption.choose(row, key, 0, put(jnp.zeros(shape, logp.dtype), at, logp, where))
      index = at_coordinate(index, at)
    return jnp.asarray(corruption.sizes, jnp.int32)[index]

  # -- the loop -------------------------------------------------------------------------------------

  def start(self, params, row: Row, prefill: int, key: Array | None = None) -> State:
    """The state before the first step. The policy reads the prompts, which are cut into blocks too."""
    params, own = params
    B, N = row.tokens.shape
    committed = jnp.logical_not(eligible(row))
    cache, key = self.model.init_cache(B, N), jax.random.key(0) if key is None else key
    given = jnp.minimum(first_where(~committed), (row.doc >= 0).sum(1, dtype=jnp.int32))
    before = jnp.zeros((B, 1, self.model.cfg.width), jnp.dtype(self.model.cfg.dtype))  # as training has it
    if prefill:
      at = jnp.broadcast_to(jnp.arange(prefill, dtype=jnp.int32), (B, prefill))
      hidden, cache = self.read(params, row, cache, at, at < given[:, None])
      before = jnp.concatenate([before.astype(hidden.dtype), hidden], 1)
    at = jnp.broadcast_to(jnp.arange(before.shape[1], dtype=jnp.int32), before.shape[:2])
    size = self.choose(own, row, before, at, key)
    size = put(jnp.zeros((B, N), jnp.int32), at, size, (at <= given[:, None]) & (at < N))
    base = super().start(params, row, prefill, noise=self.cut(row, committed, size))
    memory = base.memory | {"sizes": {"size": size, "cache": cache}}
    return base.replace(memory=memory, forwards=base.forwards + (1 if prefill else 0))

  def step(self, params, row: Row, s: State, key: Array) -> State:
    params, own = params
    after = super().step(params, row, s, key)
    moved = after.cursor > s.cursor
    kept = after.memory["sizes"]

    def ask(cache):
      at = s.cursor[:, None] + jnp.arange(self.capacity, dtype=jnp.int32)
      # The prompt's part of the first block has been read.
      keep = (at >= cache.length[:, None]) & (at < after.cursor[:, None]) & moved[:, None]
      filled = row.replace(tokens=after.tokens)
      hidden, cache = self.read(params, filled, cache, at, keep)
      last = jnp.clip(after.cursor - 1 - s.cursor, 0, self.capacity - 1)
      hidden = jnp.take_along_axis(hidden, last[:, None, None], 1)
      return self.choose(own, filled, hidden, after.cursor[:, None], key), cache

    # A loop of one turn or none: it updates the cache in place, a conditional would copy it.
    empty = jnp.zeros((len(moved), 1), jnp.int32), kept["cache"]
    some = moved.any()
    body = lambda c: (jnp.bool_(False), *ask(c[2]))
    _, size, cache = jax.lax.while_loop(lambda c: c[0], body, (some, *empty))
    at = after.cursor[:, None]
    size = put(kept["size"], at, size, moved[:, None] & (at < row.doc.shape[1]))
    memory = after.memory | {"sizes": {"size": size, "cache": cache}}
    return after.replace(memory=memory, forwards=after.forwards + some)

  def logits(self, params, row: Row, s: State, key: Array | None = None) -> tuple[Array, Ask]:
    return super().logits(params[0], row, s, key)

  def result(self, row: Row, s: State) -> Result:
    size = s.memory["sizes"]["size"]
    return super().result(row, s.replace(memory=s.memory | {"sizes": size}))


def section(value) -> Sizes:
  """The Sizes of a section, a path or a Sizes.

  Raises:
    ConfigError: a wrong key or value.
  """
  return config.build(Sizes, {"path": value} if isinstance(value, str) else value, "sizes")


def build(sampler: Sampler, sizes: Sizes, load: Callable | None = None) -> Sized:
  """The sampler with a policy for its blocks.

  Args:
    load: (workdir, tree) → (network, its parameters).

  Raises:
    ConfigError: an objective without a policy, or a sampler that does not decode block by block.
  """
  objective, cfg = sampler.objective, sampler.cfg

  def law(broken: bool, reason: str, key: str, value, fix: str):
    if broken:
      raise ConfigError(reason, key=f"sampler.{key}", value=value, fix=fix)

  law(
    not isinstance(objective, BlockPolicy) or sampler.store is None,
    "no policy was trained with this objective", "sizes", sizes.path, "a run of language/ctrldiff",
  )  # fmt: skip
  law(type(sampler.active) is not active.Units, "blocks follow each other", "active", "", "active='units'")
  law(sampler.lead, "the first token of a block is predicted before its size is known", "term", sampler.term,
      "align='same'")  # fmt: skip
  law(sampler.branches > 1, "the policy reads one row, not two branches of it", "guidance", "", "guidance=1")
  law(
    sampler.policy.partial is not None, "what may be read inside a block is said of blocks of one size",
    "cache", sampler.policy.name, "cache='auto'",
  )  # fmt: skip
  law(
    any(type(x).after is not stop.Stop.after for x in sampler.stops),
    "a row that begins anew has been cut already", "stop", "entropy_floor", "stop=()",
  )  # fmt: skip
  if cfg.block:
    warnings.warn(f"sampler.block={cfg.block} has no effect: the policy chooses the sizes", stacklevel=3)
  sizes, own = sizes.load(load, objective.policy)
  classes = len(objective.corruption.sizes)
  hidden = jax.ShapeDtypeStruct((1, 1, sampler.model.cfg.width), jnp.float32)
  found = jax.eval_shape(sizes.network.apply, own, hidden).shape[-1]
  law(found != classes, f"the policy chooses among {found} sizes, the objective has {classes}", "sizes.path",
      sizes.path, "the run of this objective")  # fmt: skip
  fields = {f.name: getattr(sampler, f.name) for f in dataclasses.fields(Sampler)}
  return Sized(**fields | {"capacity": max(objective.corruption.sizes)}, sizes=sizes, own=own)
