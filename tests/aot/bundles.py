"""Recorded schedules of the TPU attention kernels, and the programs that they are recorded of.

`python -m tests.aot.bundles` compiles all of them (minutes; progress is shown) and rewrites bundles.json
for the installed (jax, libtpu), printing what changed. A schedule is a fact about a compiler: records
are kept by that pair, and another pair is not judged.

Legend: D head size · T intervals of a query.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys

from genmodels.aot import attention, schedule

PATH = pathlib.Path(__file__).with_name("bundles.json")
TOLERANCE = 0.03

TOPOLOGY = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
SHORT = {"fwd": attention.FWD, "dq": attention.DQ, "dkv": attention.DKV}
EDGE = 512  # keys of one matrix product where a tile has more


@dataclasses.dataclass(frozen=True)
class Case:
  """A program with all three kernels: tiles of the forward and of both backward kernels, head size D."""

  chip: str
  fwd: tuple[int, int]
  bwd: tuple[int, int]
  head_dim: int = 128
  length: int = 4096
  arguments: tuple[tuple[str, object], ...] = ()

  @property
  def job(self) -> schedule.Job:
    tiles = {"q": self.fwd[0], "k": self.fwd[1], "dq": self.bwd, "dkv": self.bwd}
    given = {"tiles": tiles, "head_dim": self.head_dim, "lengths": (self.length, self.length)}
    return schedule.Job(TOPOLOGY[self.chip], "genmodels.aot.attention:program", given | dict(self.arguments))

  def key(self, kernel: str) -> str:
    q, k = self.fwd if kernel == "fwd" else self.bwd
    return f"{self.chip} {kernel} {q}x{k} D{self.head_dim}"

  def tiles(self, made: schedule.Compiled) -> dict[str, attention.Tile]:
    """By key, the static cost of each kernel."""
    found = {}
    for short, name in SHORT.items():
      keys = (self.fwd if short == "fwd" else self.bwd)[1]
      found[self.key(short)] = attention.tile(made.kernel(name), max(1, keys // EDGE))
    return found


SMALL, LARGE = ((512, 1024), (512, 512)), ((1024, 1024), (1024, 1024))
INSIDE = (("plan_inside", True),)
OWN_MASKS = (*INSIDE, ("shared", False))

# Long rows, packed ones with masks of their own: bodies do not depend on the length, memory does.
CASES = (
  Case("v5e", *SMALL, length=8192, arguments=(("rows", 2), ("heads", 8), ("key_heads", 2))),
  Case("v6e", *SMALL, length=8192, arguments=(*OWN_MASKS, ("rows", 2))),
  Case("v5p", *LARGE, length=2 * 32768, arguments=OWN_MASKS),
  Case("tpu7x", *LARGE, length=131072, arguments=OWN_MASKS),
  Case("tpu7x", *LARGE, head_dim=256, length=32768, arguments=INSIDE),
)
SWEEP = (
  Case("v5p", *SMALL),
  Case("v5p", (512, 1024), (512, 1024)),
  Case("v5e", *LARGE, length=32768),
  Case("v6e", *LARGE, length=32768, arguments=INSIDE),
  Case("v5p", (128, 128), (128, 128), length=2048),
  Case("v6e", *LARGE, head_dim=256),
  Case("v5e", (512, 512), (512, 512), head_dim=64),
)

# The design's prototype: (full, partial) bundles as its report gives them, and as this module counts them
# in the same prototype. The count here is of whole branches, 20 to 140 bundles more: fill and drain of the
# software pipeline, which the report leaves out. Only equal counts can be compared.
DESIGN = {
  "v5e fwd 512x1024 D128": ((2069, 2159), (2132, 2215)),
  "v5e dq 512x512 D128": ((1447, 1494), (1474, 1517)),
  "v5e dkv 512x512 D128": ((1838, 1787), (1898, 1857)),
  "v5p fwd 512x1024 D128": ((2075, 2188), (2140, 2244)),
  "v5p dq 512x512 D128": ((1418, 1475), (1475, 1532)),
  "v5p dkv 512x512 D128": ((1854, 1798), (1914, 1885)),
  "v5p fwd 1024x1024 D128": ((4268, 4460), (4332, 4543)),
  "v5p dq 1024x1024 D128": ((5666, 5735), (5733, 5798)),
  "v5p dkv 1024x1024 D128": ((7300, 7168), (7360, 7220)),
  "v6e fwd 512x1024 D128": ((1508, 1706), (1619, 1820)),
  "v6e dq 512x512 D128": ((939, 1140), (1010, 1216)),
  "v6e dkv 512x512 D128": ((1068, 1220), (1176, 1343)),
  "v6e fwd 1024x1024 D128": ((2657, 3256), (2765, 3370)),
  "tpu7x fwd 1024x1024 D128": ((2713, 3277), (2816, 3367)),
  "tpu7x dq 1024x1024 D128": ((3444, 4335), (3559, 4451)),
  "tpu7x dkv 1024x1024 D128": ((4112, 4650), (4216, 4771)),
  "tpu7x fwd 1024x1024 D256": ((3360, 3810), (3475, 3928)),
  "tpu7x dq 1024x1024 D256": ((3675, 3907), (3799, 4031)),
  "tpu7x dkv 1024x1024 D256": ((4326, 4395), (4435, 4532)),
  "v5p fwd 128x128 D128": ((192, 210), (244, 265)),
  "v5p dq 128x128 D128": ((247, 270), (284, 307)),
  "v5p dkv 128x128 D128": ((188, 200), (227, 250)),
}


def pair() -> str:
  """The compilers that are installed, as records are keyed."""
  return ", ".join(f"{name} {version}" for name, version in schedule.versions().items())


def recorded() -> dict[str, dict[str, dict]]:
  return json.loads(PATH.read_text()) if PATH.exists() else {}


def record(tile: attention.Tile) -> dict:
  return {"full": tile.full, "partial": tile.partial, "parts": list(tile.parts), "spills": tile.spills}


def exceeded(old: dict, new: dict) -> list[str]:
  """What a schedule has lost against its record: a body 3 % longer, or one spill store more."""
  bodies = [(name, old[name], new[name]) for name in ("full", "partial")]
  bodies += [(f"parts[{i}]", *both) for i, both in enumerate(zip(old["parts"], new["parts"], strict=True))]
  found = [f"{n}: {b} bundles, recorded {a}" for n, a, b in bodies if b > a * (1 + TOLERANCE)]
  if new["spills"] > old["spills"]:
    found.append(f"{new['spills']} spill stores, recorded {old['spills']}")
  return found


def main() -> None:
  """Rewrites the records of the installed compilers."""
  cases = [*CASES, *SWEEP]
  done = []

  def progress(made: schedule.Compiled) -> None:
    done.append(made)
    what = f"{made.job.topology} {made.job.arguments['tiles']} D{made.job.arguments['head_dim']}"
    print(f"{len(done)}/{len(cases)} {what}: {made.seconds:.0f} s {made.error or ''}", flush=True)

  all_made = schedule.compile_all([c.job for c in cases], workers=2, progress=progress)
  everything = recorded()
  before, now = everything.get(pair(), {}), {}
  for case, made in zip(cases, all_made, strict=True):
    now |= {key: record(tile) for key, tile in case.tiles(made).items()}
  for key in sorted(before.keys() | now.keys()):
    if before.get(key) != now.get(key):
      print(f"{key}: {before.get(key)} -> {now.get(key)}")
  everything[pair()] = dict(sorted(now.items()))
  PATH.write_text(json.dumps(everything, indent=1) + "\n")
  print(f"{PATH}: {len(now)} kernels of {pair()}")


if __name__ == "__main__":
  sys.exit(main())
