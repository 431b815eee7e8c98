"""Device stand-ins with the coordinates, kinds and host assignment of real TPU topologies.

`jax.make_mesh` and NamedSharding look at nothing else, so they give the device orders of the pods
without libtpu; `test_rows.py` compares with libtpu's own topologies where it is installed.
"""

import dataclasses

HOSTS = {"v5p": (2, 2, 1), "v6e": (2, 2, 1)}  # chips of one host, by axis
KINDS = {"v5p": "TPU v5", "v6e": "TPU v6 lite"}


@dataclasses.dataclass(frozen=True, order=True)
class Chip:
  id: int
  coords: tuple
  process_index: int
  device_kind: str
  slice_index: int = 0
  core_on_chip: int = 0
  platform: str = "tpu"


def chips(name: str, slices: int = 1) -> list[Chip]:
  """Chips of "v5p:4x4x4" or "v6e:16x16" in the order of `jax.devices()`: by process, then x fastest."""
  generation, shape = name.split(":")
  dims = tuple(int(s) for s in shape.split("x"))
  dims += (1,) * (3 - len(dims))
  host = HOSTS[generation]
  grid = [d // h for d, h in zip(dims, host)]
  out = []
  for s in range(slices):
    for z in range(dims[2]):
      for y in range(dims[1]):
        for x in range(dims[0]):
          hx, hy, hz = x // host[0], y // host[1], z // host[2]
          process = hx + grid[0] * (hy + grid[1] * (hz + grid[2] * s))
          out.append((process, (x, y, z), s))
  out = [Chip(i, xyz, p, KINDS[generation], s) for i, (p, xyz, s) in enumerate(out)]
  return sorted(out, key=lambda c: (c.process_index, c.id))
