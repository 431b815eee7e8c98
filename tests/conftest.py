"""Before jax is imported: tests run on the CPU, with eight host devices to build meshes from."""

import os

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
