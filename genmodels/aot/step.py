"""The training step of a config, lowered for a pod that is not here: does it compile, and does it fit?

  cfg = config.load("language/bd3lm", ["mesh.fsdp=8", "mesh.tensor=4", "mesh.data=-1"])
  compiled = aot.program(cfg, aot.devices("v5p:4x4x4"), workdir="runs/plan").lower().compile()
  compiled.memory_analysis().temp_size_in_bytes  # of one device

What is lowered is what `genmodels train` runs there: the same system, step, mesh, kernels and donation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from genmodels import config, optim, system
from genmodels import step as steps
from genmodels.parallel import mesh as meshes


def program(cfg, devices: Sequence, *, workdir: str = "") -> steps.Program:
  """The training step of a system on a mesh of `devices`, usually of `aot.devices`.

  Args:
    cfg: ConfigDict of a system. Its data are opened: shapes of a batch come from them.
    workdir: for data that prepare themselves.

  Raises:
    ConfigError, ValueError: what `genmodels train` would refuse before it compiles.
  """
  section = config.plain(cfg.train)
  known = {f.name for f in dataclasses.fields(steps.StepConfig)}
  tcfg = config.build(steps.StepConfig, {k: v for k, v in section.items() if k in known}, "train")
  ocfg = config.build(optim.OptimConfig, cfg.optim, "optim")
  mesh = meshes.make_mesh(config.build(meshes.MeshConfig, cfg.mesh, "mesh"), devices)
  parts = system.build(cfg, workdir=workdir, mesh=mesh)
  return steps.program(parts, tcfg, ocfg, int(section.get("steps", 1)), mesh)
