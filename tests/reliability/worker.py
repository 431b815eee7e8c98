"""A small training program over the real mesh, rows, checkpoints and preemption; each test starts it.

  python worker.py '{"workdir": …, "steps": 20, …}'      see DEFAULTS

Every process appends a line {"step", "loss"} (floats as hex) to <workdir>/losses-<process>.jsonl.
"""

import json
import logging
import os
import pathlib
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from genmodels import state as states
from genmodels.checkpoint import init
from genmodels.checkpoint.manager import CheckpointConfig, Manager, _Damaged
from genmodels.parallel import multihost, rules
from genmodels.parallel.mesh import MeshConfig, make_mesh

DEFAULTS = {
  "steps": 12,
  "save_every": 4,
  "mesh": {},
  "pause": 0.0,  # seconds per step
  "width": 16,
  "fail_load": [-1, -1],  # (process, step): that process cannot read that step
  "kill_in_save": 0,  # kill -9 this process inside the background part of this save
  "sync": False,  # wait for every save
}
BATCH, FEATURES = 16, 8
TX = optax.adamw(1e-2)


def rows(step: int, ranges) -> dict:
  """A pure function of the step, by row ranges."""
  rng = np.random.default_rng(step)
  tokens = rng.normal(size=(BATCH, FEATURES)).astype(np.float32)
  y = np.sin(tokens.sum(-1)).astype(np.float32)
  cut = lambda x: np.concatenate([x[a:b] for a, b in ranges])
  return {"tokens": cut(tokens), "y": cut(y)}


def main(args: dict) -> int:
  args = {**DEFAULTS, **args}
  logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s", stream=sys.stderr)
  multihost.initialize()
  process, workdir = jax.process_index(), pathlib.Path(args["workdir"])
  mesh = make_mesh(MeshConfig(**args["mesh"]))

  def fresh():
    k1, k2 = jax.random.split(jax.random.key(0))
    params = {
      "w": jax.random.normal(k1, (FEATURES, args["width"])) / 3,
      "v": jax.random.normal(k2, (args["width"],)) / 4,
    }
    return states.create({"model": params}, {"model": TX})

  axes = {"w": ("embed", "mlp"), "v": ("mlp",)}
  shapes = jax.eval_shape(fresh)
  placed = states.shardings(shapes, {"model": rules.sharding_tree(mesh, axes, shapes.trees["model"])}, mesh)

  def step_fn(state, batch):
    def loss_fn(p):
      h = jnp.tanh(rules.constrain(batch["tokens"], ("batch", None)) @ p["w"])
      return jnp.mean((h @ p["v"] - batch["y"]) ** 2)

    loss, g = jax.value_and_grad(loss_fn)(state.trees["model"])
    updates, opt = TX.update(g, state.opt["model"], state.trees["model"])
    params = optax.apply_updates(state.trees["model"], updates)
    return state.replace(step=state.step + 1, trees={"model": params}, opt={"model": opt}), loss

  manager = Manager(workdir / init.CHECKPOINTS, CheckpointConfig(keep_last=3))
  hurt(manager, args, process)
  with rules.use_mesh(mesh):
    make = jax.jit(fresh, out_shardings=placed)
    state, line = init.initialise(manager, states.abstract(fresh, shardings=placed), make)
    logging.info("%s", line)
    step = jax.jit(step_fn, donate_argnums=0, out_shardings=(placed, rules.replicated(mesh)))
    ranges = multihost.row_ranges(rules.row_sharding(mesh), BATCH)
    preemption = multihost.Preemption()
    with open(workdir / f"losses-{process}.jsonl", "a") as out:
      for at in range(int(state.step) + 1, args["steps"] + 1):
        batch = multihost.global_batch(rows(at, ranges), mesh, BATCH)
        state, loss = jax.block_until_ready(step(state, batch))  # a second step in flight may deadlock
        out.write(json.dumps({"step": at, "loss": float(loss).hex()}) + "\n")
        out.flush()
        time.sleep(args["pause"])
        stop = preemption.requested(at)
        if stop or at % args["save_every"] == 0 or at == args["steps"]:
          manager.save(at, state, {"step": at})
          if args["sync"]:
            manager.wait()
        manager.check()
        if stop:
          logging.info("stopped at step %d", at)
          break
  manager.close()
  preemption.close()
  return 0


def hurt(manager: Manager, args: dict, process: int) -> None:
  """The faults a test asks for."""
  if args["fail_load"][0] == process:
    load = manager._load

    def broken(step, *rest):
      if step == args["fail_load"][1]:
        raise _Damaged(f"file of step {step} unreadable here")
      return load(step, *rest)

    manager._load = broken
  if args["kill_in_save"] and process == 0:
    import orbax.checkpoint as ocp

    finalize = ocp.PyTreeCheckpointHandler.finalize

    def dying(self, directory):
      if str(directory).split("/checkpoints/")[1].startswith(f"{args['kill_in_save']}."):
        os.kill(os.getpid(), signal.SIGKILL)
      return finalize(self, directory)

    ocp.PyTreeCheckpointHandler.finalize = dying


if __name__ == "__main__":
  sys.exit(main(json.loads(sys.argv[1])))
