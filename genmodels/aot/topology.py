"""Devices of TPU slices that are not here, to compile for, and what their chips can do.

libtpu contains the compiler of every TPU generation and runs on any Linux x86-64 machine, so a jitted
function lowers and compiles for a pod from `devices`; only running it needs the pod. The topology is
"chip:bounds", chips along each dimension: "v5e:2x2", "v5p:4x4x8", "v6e:16x16", "tpu7x:2x2x1".

  mesh = jax.sharding.Mesh(np.reshape(devices("v5p:4x4x8"), shape), names)
  with kernels.building_for(target("v5p:4x4x8")):
    compiled = jax.jit(step, in_shardings=...).lower(*shape_dtype_structs).compile()
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import platform
import re

import jax

from genmodels import kernels, metrics

MiB = 2**20


@dataclasses.dataclass(frozen=True)
class Chip:
  """One TensorCore of a chip: kernels and their schedules are per core.

  Sources: the vendor's dense bf16 rate (`metrics.PEAKS`) for `flops`; jax's own table
  (jax/_src/pallas/mosaic/tpu_info.py of jax 0.10.2) for memories, their bandwidth and the edge and number
  of MXUs. It gives v5p 2.46e12 B/s a chip; the cloud documentation says 2.765e12.

  Attributes:
    name: of topologies, "v5e".
    kind: device_kind of jax.
    cores: TensorCores of one jax device (v5p joins two; TPU7x shows each as a device).
    flops: dense bf16 FLOP/s of a core.
    hbm_rate: HBM bytes/s of a core. hbm: HBM bytes of a core.
    vmem, smem: on-chip bytes of a core, vectors and scalars.
    mxus, mxu_edge: matrix units of a core and the rows and columns of each.
    rows_per_cycle: rows of the left-hand operand that one MXU takes in a cycle. Inferred: the peak rate of
      v6e and TPU7x asks for two at any plausible clock.
  """

  name: str
  kind: str
  cores: int
  flops: float
  hbm_rate: float
  hbm: int
  vmem: int
  smem: int
  mxus: int
  mxu_edge: int
  rows_per_cycle: int

  @property
  def macs_per_cycle(self) -> int:
    """Multiply-accumulates of a core in one cycle, all matrix units busy."""
    return self.mxus * self.mxu_edge**2 * self.rows_per_cycle

  @property
  def clock(self) -> float:
    """Cycles per second, from the peak rate and the work of a cycle: 1.50, 1.75, 1.75, 2.20 GHz."""
    return self.flops / (2 * self.macs_per_cycle)


def _chips(*rows: tuple) -> dict[str, Chip]:
  """From the published numbers of a jax device: name, kind, cores, HBM bytes/s and bytes, then VMEM of a
  core in MiB and MXU geometry."""
  found = {}
  for name, kind, cores, hbm_rate, hbm, vmem, *mxu in rows:
    flops = metrics.PEAKS[kind] / cores
    memories = hbm_rate / cores, int(hbm / cores), vmem * MiB, 1 * MiB
    found[name] = Chip(name, kind, cores, flops, *memories, *mxu)
  return found


CHIPS = _chips(
  # name, kind, cores, HBM bytes/s, HBM bytes, VMEM MiB, MXUs, their edge, rows a cycle
  ("v5e", "TPU v5 lite", 1, 0.82e12, 17.2e9, 128, 4, 128, 1),
  ("v5p", "TPU v5", 2, 2.46e12, 103e9, 64, 4, 128, 1),
  ("v6e", "TPU v6 lite", 1, 1.64e12, 34.4e9, 128, 2, 256, 2),
  ("tpu7x", "TPU7x", 1, 3.70e12, 103e9, 64, 2, 256, 2),
)

_NAME = re.compile(r"(\w+):\d+(x\d+)*")

# libtpu otherwise takes a machine-wide lock, and asks the network what machine this is.
_ALWAYS = {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}
# It complains to stderr where these are missing; on a TPU machine they are its own to say.
_WITHOUT_TPU = {
  "TPU_ACCELERATOR_TYPE": "v5litepod-1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
}


def chip(topology: str) -> Chip:
  """The chip of a topology ("v5p:4x4x8", or its name alone) or of a device_kind ("TPU v5p").

  Raises:
    ValueError: a chip that is not in `CHIPS`.
  """
  name = topology.split(":")[0]
  if name in CHIPS:
    return CHIPS[name]
  alias = {"TPU v5e": "v5e", "TPU v5p": "v5p", "TPU v6e": "v6e"} | {c.kind: n for n, c in CHIPS.items()}
  if topology not in alias:
    raise ValueError(f"aot: no TPU chip is called {topology!r}; known are {', '.join(CHIPS)}")
  return CHIPS[alias[topology]]


def environment(platforms: str | None) -> dict[str, str]:
  """What libtpu wants to find in the environment when a process with these JAX_PLATFORMS loads it."""
  return _ALWAYS | (_WITHOUT_TPU if platforms == "cpu" else {})


def missing() -> str | None:
  """Why nothing can be compiled for a TPU here, with the fix; None if it can."""
  if importlib.util.find_spec("libtpu") is not None:
    return None
  machine = f"{platform.system()} {platform.machine()}"
  if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
    return f"libtpu, the TPU compiler, exists for Linux x86_64 only, this is {machine}"
  return "libtpu, the TPU compiler, is not installed; pip install 'genmodels[tpu]'"


def devices(topology: str) -> list[jax.Device]:
  """Compile-only devices of a slice, in the order of jax.devices() on it.

  Run with JAX_PLATFORMS=cpu on a machine without TPUs: jax would look for one first.

  Args:
    topology: "chip:bounds". A v5p device is a whole chip (two cores), a TPU7x device one core of two.

  Raises:
    ModuleNotFoundError: no libtpu (Linux x86-64 only; the extra `tpu`).
    ValueError: not a topology; the compiler's own words are in the message.
  """
  if reason := missing():
    raise ModuleNotFoundError(f"aot: {reason}", name="libtpu")
  if not _NAME.fullmatch(topology):
    raise ValueError(f"aot: a topology is 'chip:bounds' such as 'v5p:2x2x1', got {topology!r}")
  chip(topology)
  for name, value in environment(jax.config.jax_platforms).items():
    os.environ.setdefault(name, value)
  from jax.experimental import topologies

  try:
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
  except jax.errors.JaxRuntimeError as e:
    raise ValueError(f"aot: libtpu has no topology {topology!r}: {e}") from e


def target(topology: str) -> kernels.Target:
  """The target of `kernels.building_for` while tracing for a topology."""
  return kernels.Target.of(devices(topology)[0])
