"""What the kernels are built for: the mesh in use, or this process's devices, unless a caller says else.

Ahead-of-time compilation lowers for chips that are not here, and tests run kernels in an interpreter;
both say so with `building_for`, and everything that chooses (implementation, tile sizes, interpreter)
asks `current`.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from typing import Any

import jax

from genmodels.parallel import current_mesh


@dataclasses.dataclass(frozen=True)
class Target:
  """A platform and chip.

  Attributes:
    platform: "cpu", "gpu" or "tpu".
    kind: the device's own name ("TPU v5p", "NVIDIA H200"), "" if unknown.
    interpret: how Pallas kernels are interpreted: None (compiled), True (the TPU kernels as plain XLA), or
      the interpreter parameters of a platform (memory, barriers, races).
  """

  platform: str
  kind: str = ""
  interpret: Any = None

  @classmethod
  def of(cls, device, interpret=None) -> Target:
    """The target that compiles for `device`, a jax.Device of a live backend or of a topology."""
    platform = "gpu" if device.platform in ("cuda", "rocm", "gpu") else device.platform
    return cls(platform, device.device_kind, interpret)


_TARGET: contextvars.ContextVar[Target | None] = contextvars.ContextVar("genmodels_target", default=None)


def current() -> Target:
  """The target set by `building_for`, else the chip of the mesh in use, else of the default backend."""
  if (chosen := _TARGET.get()) is not None:
    return chosen
  mesh = current_mesh()
  return Target.of(jax.devices()[0] if mesh is None else mesh.devices.flat[0])


@contextlib.contextmanager
def building_for(target: Target):
  """Traces inside build for `target`. Not part of jit's cache key: use a jit of your own per target."""
  token = _TARGET.set(target)
  try:
    yield target
  finally:
    _TARGET.reset(token)
