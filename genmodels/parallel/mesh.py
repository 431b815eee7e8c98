"""The device mesh: four logical axes over the fast network (ICI), data also over the slow one (DCN)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "tensor", "context")

# Devices are assigned in order of growing network use, so that the busiest axis gets the best links.
_BY_NETWORK_USE = ("data", "fsdp", "context", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the mesh axes; the product is the number of devices.

  Fields:
    data: replicas of the parameters (one axis may be −1: all the devices that are left).
    fsdp: shards of parameters and optimizer state; the batch is split over data × fsdp.
    tensor: shards of heads, MLP width and vocabulary.
    context: shards of the sequence; `model.context` says how attention gets the keys of other shards,
      `objective.layout.placement` which tokens each of them holds.
    dcn_data: slices (or, without slices, processes) that the data axis spans over the slow network.

  Raises:
    ValueError: a size is neither positive nor −1, or two sizes are −1.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  context: int = 1
  dcn_data: int = 1

  def __post_init__(self):
    for name in AXES:
      size = getattr(self, name)
      if size != -1 and size < 1:
        raise ValueError(f"{name} = {size}: a mesh axis has a positive size, or −1 for all devices left")
    if self.dcn_data < 1:
      raise ValueError(f"dcn_data = {self.dcn_data}: the number of slices is at least 1")
    free = [name for name in AXES if getattr(self, name) == -1]
    if len(free) > 1:
      raise ValueError(f"{' and '.join(free)} are both −1: give all but one of them a size")

  def sizes(self, devices: int) -> dict[str, int]:
    """The size of every axis on `devices` devices.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    sizes = {name: getattr(self, name) for name in AXES}
    given = math.prod(s for s in sizes.values() if s != -1)
    text = " × ".join(f"{n}={s}" for n, s in sizes.items())
    free = [n for n, s in sizes.items() if s == -1]
    if free and devices % given == 0:
      sizes[free[0]] = devices // given
    elif free:
      raise ValueError(
        f"mesh {text}: the given axes multiply to {given}, which does not divide {devices} devices; "
        f"choose sizes whose product divides {devices}"
      )
    elif given != devices:
      raise ValueError(
        f"mesh {text} needs {given} devices, there are {devices}; set one axis to −1 "
        f"(for instance mesh.data=-1) or run on {given} devices"
      )
    if sizes["data"] % self.dcn_data:
      raise ValueError(
        f"mesh data={sizes['data']} spans dcn_data={self.dcn_data} slices, which must divide it; "
        f"{devices} devices, {text}"
      )
    return sizes


def make_mesh(cfg: MeshConfig = MeshConfig(), devices: Sequence | None = None) -> Mesh:
  """The mesh of `cfg` over `devices` (default: all devices of all processes).

  On TPU the axes are laid on the physical torus; several slices need `dcn_data` to be their number.

  Raises:
    ValueError: sizes do not fit the devices, or slices do not fit `dcn_data`.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = cfg.sizes(len(devices))
  order = [sizes[name] for name in _BY_NETWORK_USE]
  if devices[0].platform == "cpu":
    array = np.array(devices, dtype=object).reshape(order)  # no network to fit: device order
  else:
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if slices > 1 and slices != cfg.dcn_data:
      raise ValueError(
        f"{len(devices)} devices lie in {slices} slices, dcn_data={cfg.dcn_data}; set mesh.dcn_data={slices}"
      )
    if cfg.dcn_data > 1:
      granules = slices if slices > 1 else len({d.process_index for d in devices})
      if granules != cfg.dcn_data:
        raise ValueError(
          f"dcn_data={cfg.dcn_data}, but the {len(devices)} devices form one slice and {granules} "
          f"process(es); set mesh.dcn_data=1"
        )
      array = mesh_utils.create_hybrid_device_mesh(
        [order[0] // cfg.dcn_data, *order[1:]],
        [cfg.dcn_data, 1, 1, 1],
        devices,
        process_is_granule=slices == 1,
        allow_split_physical_axes=True,
      )
    else:
      array = mesh_utils.create_device_mesh(order, devices, allow_split_physical_axes=True)
  array = array.transpose([_BY_NETWORK_USE.index(name) for name in AXES])
  return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))
