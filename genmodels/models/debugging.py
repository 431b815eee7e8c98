"""Shapes and the first non-finite tensor, by module name: for runs without jit (`train --debug`)."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp

from genmodels.models.config import layer_index


@contextlib.contextmanager
def debug(say: Callable[[str], None]) -> Iterator[None]:
  """Within it (and `jax.disable_jit`), every module's output is checked as it is computed.

  `say` gets one line for each module and layer, the first time it runs: "layer 3 attn/q: float32[8, 64,
  4, 16]". Values under a gradient are looked into, values under jit are not.

  Raises:
    FloatingPointError: a non-finite output: names the module that made the first one, and how many.
  """
  runs: Counter[str] = Counter()
  said: set[str] = set()

  def intercept(call, args, kwargs, context):
    out = call(*args, **kwargs)
    module = context.module
    if context.method_name != "__call__" or module.scope is None or module.is_initializing():
      return out
    values = [_value(x) for x in jax.tree.leaves(out)]
    if not values or any(x is None for x in values):
      return out  # traced for shapes, as a scan does before its first repeat
    name = _name(module, "/".join(module.path), runs)
    leaves = [x for x in values if jnp.issubdtype(x.dtype, jnp.floating)]
    if leaves and name not in said:
      said.add(name)
      shapes = ", ".join(f"{x.dtype}{list(x.shape)}" for x in leaves[:4])
      say(f"{name}: {shapes}{' …' if len(leaves) > 4 else ''}")
    for x in leaves:
      bad = int((~jnp.isfinite(x)).sum())
      if bad:
        finite = [bool(jnp.isfinite(v).all()) for a in args if (v := _value(a)) is not None]
        came = "from finite inputs" if all(finite) else "its inputs were not finite"
        raise FloatingPointError(
          f"{name}: {bad} of {x.size} values of {x.dtype}{list(x.shape)} not finite, {came}"
        )
    return out

  with nn.intercept_methods(intercept):
    yield


def _name(module: nn.Module, path: str, runs: Counter[str]) -> str:
  """ "layer 7 attn/q" for a module in the stack (repeats are counted as the scan runs them)."""
  found = re.fullmatch(r"stack/s(\d+)/l(\d+)(/.*)?", path)
  if not found:
    return path or "trunk"
  segment, position = int(found[1]), int(found[2])
  repeats = module.cfg.segments[segment].repeats
  layer = layer_index(module.cfg, segment, runs[path] % repeats, position)
  runs[path] += 1
  return f"layer {layer} {(found[3] or '')[1:]}".strip()


def _value(x):
  """The concrete array behind x (a primal, under a gradient), or None."""
  while isinstance(x, jax.core.Tracer):
    x = getattr(x, "primal", None)
  return x if isinstance(x, jax.Array) else None
