"""What ptxas makes of a Mosaic GPU kernel, on a machine without a GPU: registers, spills, serialised products.

jax's CUDA plugin compiles Mosaic GPU modules to machine code on the host; it asks the driver for nothing but
the compute capability. A stand-in for the driver, built here by the C compiler, answers "9.0". The plugin runs
in a process of its own, which never imports jax.

Needs the wheels jax-cuda13-pjrt and jax-cuda13-plugin of this jax, nvidia-cuda-nvcc and nvidia-nvvm (13.x), and
a C compiler; no GPU and no driver.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys

_DRIVER = """
typedef int Result;
Result cuInit(unsigned flags) { return 0; }
Result cuDriverGetVersion(int *version) { *version = 13000; return 0; }
Result cuDeviceGet(int *device, int ordinal) { *device = 0; return 0; }
Result cuDeviceGetCount(int *count) { *count = 1; return 0; }
Result cuCtxGetDevice(int *device) { *device = 0; return 0; }
Result cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
Result cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? 9 : 0;  /* compute capability: major 75, minor 76 */
  return 0;
}
Result cuGetErrorString(int error, const char **text) { *text = "stand-in"; return 0; }
Result cuGetErrorName(int error, const char **text) { *text = "stand-in"; return 0; }
Result cuModuleLoadData(void **module, const void *image) { *module = (void *)1; return 0; }
Result cuModuleGetFunction(void **function, void *module, const char *name) { *function = (void *)1; return 0; }
Result cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
Result cuModuleUnload(void *module) { return 0; }
"""

_COMPILE = """
import ctypes, pathlib, sys
compile = ctypes.CDLL(sys.argv[1]).MosaicGpuCompile
compile.argtypes, compile.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_void_p
module = pathlib.Path(sys.argv[2]).read_bytes()
assert compile(module, len(module)), "not compiled"
"""


@dataclasses.dataclass(frozen=True)
class Kernel:
  """ptxas' report of one kernel; bytes of spills a thread, and whether it had to serialise wgmma."""

  name: str
  registers: int
  spill_stores: int
  spill_loads: int
  serialised: bool


def missing() -> str | None:
  """What this needs and does not find; None if it can run."""
  for package in ("jax_plugins.xla_cuda13", "jax_cuda13_plugin", "nvidia.cu13"):
    try:
      found = importlib.util.find_spec(package)
    except ModuleNotFoundError:
      found = None
    if found is None:
      return f"no package {package}: pip install --no-deps jax-cuda13-pjrt jax-cuda13-plugin nvidia-cuda-nvcc nvidia-nvvm"
  if not (_folder("nvidia.cu13") / "bin" / "ptxas").exists():
    return "no ptxas: pip install --no-deps nvidia-cuda-nvcc"
  return None if shutil.which("cc") else "no C compiler"


def compile_for_hopper(lowered, folder: pathlib.Path) -> list[Kernel]:
  """Compiles every Mosaic GPU kernel of a `jax.stages.Lowered` for cuda.

  Args:
    lowered: lowered with lowering_platforms=("cuda",).
    folder: empty, for intermediate files.
  """
  source, driver = folder / "driver.c", folder / "libcuda.so.1"
  source.write_text(_DRIVER)
  subprocess.run(["cc", "-shared", "-fPIC", "-o", driver, source], check=True)
  env = dict(
    os.environ,
    LD_LIBRARY_PATH=str(folder),
    MOSAIC_GPU_CUDA_ROOT=str(_folder("nvidia.cu13")),
    MOSAIC_GPU_RUNTIME_LIB_PATH=str(_folder("jax_cuda13_plugin") / "libmosaic_gpu_runtime.so"),
    MOSAIC_GPU_DUMP_PTXAS="1",
  )
  plugin = _folder("jax_plugins.xla_cuda13") / "xla_cuda_plugin.so"
  kernels = []
  for i, module in enumerate(_modules(lowered)):
    path = folder / f"{i}.mlir"
    path.write_bytes(module)
    command = [sys.executable, "-c", _COMPILE, plugin, path]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
      raise RuntimeError(f"compiling kernel {i} failed: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    kernels.append(_report(done.stdout + done.stderr))
  return kernels


def _report(said: str) -> Kernel:
  name = re.search(r"Compiling entry function '(\w+)'", said)
  spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
  registers = re.search(r"Used (\d+) registers", said)
  return Kernel(
    name[1], int(registers[1]), int(spills[1]), int(spills[2]), "C7510" in said or "serialized" in said
  )


def _modules(lowered) -> list[bytes]:
  """The Mosaic GPU modules inside a lowered program, in the order of the calls."""
  out = []

  def walk(op):
    for region in op.regions:
      for block in region:
        for inner in block:
          inner = inner.operation
          if inner.name == "stablehlo.custom_call" and "mosaic_gpu" in str(
            inner.attributes["call_target_name"]
          ):
            config = {x.name: x.attr for x in inner.attributes["mhlo.backend_config"]}
            out.append(config["module"].value_bytes)
          walk(inner)

  walk(lowered.compiler_ir("stablehlo").operation)
  return out


def _folder(package: str) -> pathlib.Path:
  return pathlib.Path(next(iter(importlib.util.find_spec(package).submodule_search_locations)))
