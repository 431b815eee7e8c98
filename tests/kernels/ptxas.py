"""Compiles lowered Mosaic GPU kernels to machine code, without a GPU: registers spilled, products serialised.

The CUDA plugin of jax exports the compiler that a GPU process calls (`MosaicGpuCompile`: MLIR, PTX, ptxas). It
asks the driver for no more than the compute capability; where there is no driver, a stub says 9.0.
"""

import ctypes
import dataclasses
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys

from jaxlib.mlir import ir

# What the compiler asks a driver: the attributes are the compute capability and the shared memory of a block.
_DRIVER = """
typedef int R;
R cuInit(unsigned f) { return 0; }
R cuDriverGetVersion(int *v) { *v = 13000; return 0; }
R cuDeviceGetCount(int *n) { *n = 1; return 0; }
R cuDeviceGet(int *d, int i) { *d = i; return 0; }
R cuDeviceGetAttribute(int *v, int a, int d) { *v = a == 75 ? 9 : a == 97 ? 232448 : 0; return 0; }
R cuCtxGetDevice(int *d) { *d = 0; return 0; }
R cuGetErrorString(R e, const char **s) { *s = "stub driver"; return 0; }
R cuGetErrorName(R e, const char **s) { *s = "stub driver"; return 0; }
R cuModuleLoadData(void **m, const void *p) { *m = (void *)1; return 0; }
R cuModuleGetFunction(void **f, void *m, const char *n) { *f = (void *)1; return 0; }
R cuFuncSetAttribute(void *f, int a, int v) { return 0; }
"""

_CHILD = """
import ctypes, sys
compile = ctypes.CDLL(sys.argv[1]).MosaicGpuCompile
compile.restype, compile.argtypes = ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_int]
module = open(sys.argv[2], "rb").read()
sys.exit(compile(module, len(module)) is None)
"""


@dataclasses.dataclass
class Report:
  """What ptxas says of a kernel.

  Attributes:
    name: of the kernel.
    spilled: bytes a thread stores to local memory, counted in the program text.
    remarks: advisories on wgmma and setmaxnreg, such as "C7510 ...": products serialised.
  """

  name: str
  spilled: int
  remarks: list[str]


def missing() -> str | None:
  """Why nothing can be compiled here; None if it can."""
  if (
    importlib.util.find_spec("jax_plugins") is None
    or importlib.util.find_spec("jax_plugins.xla_cuda13") is None
  ):
    return "the CUDA plugin of jax is not installed (extra `cuda`)"
  if _toolkit() is None:
    return "no ptxas: neither the wheel nvidia-cuda-nvcc nor a CUDA toolkit is installed"
  if not _has_driver() and shutil.which("cc") is None:
    return "neither a CUDA driver nor a C compiler to build a stub of one"
  return None


def compiled(lowered, folder: pathlib.Path) -> list[Report]:
  """Reports of all Mosaic GPU kernels of a `jax.stages.Lowered` for cuda.

  Raises:
    RuntimeError: the compiler failed; its last words.
  """
  toolkit = _toolkit()
  plugin = _package("jax_plugins.xla_cuda13") / "xla_cuda_plugin.so"
  runtime = _package("jax_cuda13_plugin") / "libmosaic_gpu_runtime.so"
  environment = dict(
    os.environ, MOSAIC_GPU_DUMP_PTXAS="1", MOSAIC_GPU_RUNTIME_LIB_PATH=str(runtime), CUDA_ROOT=str(toolkit),
    PATH=f"{toolkit / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}",
  )  # fmt: skip
  if not _has_driver():
    (folder / "driver.c").write_text(_DRIVER)
    build = ["cc", "-shared", "-fPIC", "-w", "-o", str(folder / "libcuda.so.1"), str(folder / "driver.c")]
    subprocess.run(build, check=True)
    environment["LD_LIBRARY_PATH"] = str(folder)
  reports = []
  for i, module in enumerate(_modules(lowered.compiler_ir("stablehlo").operation)):
    path = folder / f"{i}.mlir"
    path.write_bytes(module)
    child = [sys.executable, "-c", _CHILD, str(plugin), str(path)]
    ran = subprocess.run(child, env=environment, capture_output=True, text=True, check=False)
    said = ran.stdout + ran.stderr
    name = re.search(r"Compiling entry function '(\w+?)(?:_mosaic_gpu_kernel)?'", said)
    spilled = re.search(r"(\d+) bytes spill stores", said)
    if ran.returncode or not name or not spilled:
      raise RuntimeError(f"Mosaic GPU compilation failed ({ran.returncode}): {said[-2000:]}")
    # C7519 only says that ptxas added a fence it wants before a product.
    remarks = sorted(set(re.findall(r"\((C75(?!19)\d\d)\)", said)))
    reports.append(Report(name[1], int(spilled[1]), remarks))
  return reports


def _modules(operation) -> list[bytes]:
  """Bytecode of the kernels below an MLIR operation."""
  found = []
  for region in operation.regions:
    for block in region.blocks:
      for op in block.operations:
        if "mosaic_gpu" in str(
          op.attributes["call_target_name"] if "call_target_name" in op.attributes else ""
        ):
          config = ir.DictAttr(op.attributes["mhlo.backend_config"])
          found.append(ir.StringAttr(config["module"]).value_bytes)
        found += _modules(op.operation)
  return found


def _package(name: str) -> pathlib.Path:
  return pathlib.Path(importlib.util.find_spec(name).submodule_search_locations[0])


def _toolkit() -> pathlib.Path | None:
  """The folder with bin/ptxas: the wheel's, else the machine's."""
  places = [os.environ.get("CUDA_HOME", "/usr/local/cuda")]
  if importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.cu13") is not None:
    places.insert(0, str(_package("nvidia.cu13")))
  return next((pathlib.Path(p) for p in places if os.path.exists(os.path.join(p, "bin", "ptxas"))), None)


def _has_driver() -> bool:
  try:
    ctypes.CDLL("libcuda.so.1")
  except OSError:
    return False
  return True
