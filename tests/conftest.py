"""Before jax is imported: tests run on the CPU, with eight host devices to build meshes from."""

import gc
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Threads of the client: two programs in flight on eight devices must not starve each other's collectives.
os.environ.setdefault("PJRT_NPROC", "24")
_FLAGS = {
  "xla_force_host_platform_device_count": 8,
  # Eight device threads on two busy cores may wait for each other longer than XLA's 40 s before it aborts.
  "xla_cpu_collective_call_terminate_timeout_seconds": 300,
}
for _name, _value in _FLAGS.items():
  if _name not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{_name}={_value}".strip()


import jax  # noqa: E402
import pytest  # noqa: E402

_MAPS, _MOST = pathlib.Path("/proc/self/maps"), pathlib.Path("/proc/sys/vm/max_map_count")


@pytest.fixture(autouse=True, scope="module")
def _room_for_programs():
  """XLA:CPU holds some 25 memory maps for every program; a process that reaches the kernel's limit of them
  (Linux: 65,530) is aborted in the middle of a compilation, so a long run forgets its programs in time."""
  yield
  if _MAPS.exists() and _MOST.exists():
    with _MAPS.open() as maps:
      if sum(1 for _ in maps) > int(_MOST.read_text()) // 2:
        jax.clear_caches()
        gc.collect()
