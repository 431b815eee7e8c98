"""The training step against the same computation written by hand, in one function.

  python benchmarks/step.py [--pairs 40] [--batch 16] [--length 256] [--out report.json]

What the composition of objects (corruption, layout, relations, objective, model, optimiser, guard)
costs at run time is what XLA could not remove. Two things are compared, for an AR model of about 1 M
parameters: the compiled programs on one device and on a mesh of 8 (FLOPs, bytes accessed, temporary
memory, collectives by kind), and the time of 40 interleaved pairs of steps on one device, as the
median of the ratios with a 95 % bootstrap interval. Both start from one state and must agree in loss
and parameters, or the comparison says so and fails.

Limits: 1 % more FLOPs, 3 % more bytes, the same number of collectives, an interval that reaches 1.03.

Legend: B rows · N tokens · D width · H heads · G key heads · K head dimension · L layers · V vocabulary.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import os
import re
import sys
import time

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import genmodels
from genmodels import config, contracts, models, objectives, optim, parallel, state, step
from genmodels.kernels import attention, plan
from genmodels.kernels.cross_entropy import chunked_map
from genmodels.masks import CODE_HIDDEN, AttnMask

MODEL = dict(width=128, layers=4, num_heads=4, num_kv_heads=2, mlp=344, vocab=512, rope=dict(base=10_000.0))
OBJECTIVE = dict(
  corruption=dict(kind="clean"),
  layout=dict(kind="streams", streams=("c",)),
  masks=dict(full="causal"),
  terms=dict(text=dict(stream="c", align="shift")),
)
OPTIM = optim.OptimConfig(lr=1e-3, schedule=optim.LrSchedule(kind="constant", warmup=10))
LIMITS = {"flops": 1.01, "bytes": 1.03, "ratio": 1.03}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
ROWS = ("data", "fsdp")


# ------------------------------------------------------------------------------ the framework's step


def composed(mesh):
  """(step, initial state) as the trainer builds them."""
  model = models.build(dict(MODEL))
  objective = config.build(objectives.Objective, OBJECTIVE, "objective")
  axes, abstract = model.logical_axes(), model.abstract_params()
  tx, _ = optim.build(OPTIM, abstract, axes, 1000)
  cfg = step.StepConfig()
  fns = {"model": lambda trees, *args, **kw: model.apply(trees["model"], *args, **kw)}
  make = lambda key: state.create({"model": model.init(key)}, {"model": tx}, step.initial_stats(cfg))
  placed = parallel.sharding_tree(mesh, axes, abstract)
  shardings = state.shardings(jax.eval_shape(make, jax.random.key(0)), {"model": placed}, mesh)
  return step.make_train_step(objective, fns, tx, cfg), make, shardings


# --------------------------------------------------------------------------------- the same, by hand


def by_hand(mesh, s: state.TrainState, row: contracts.Row, key):
  """One AdamW step of a Llama on next-token prediction over packed rows. No object of ours but the
  attention and the chunked cross-entropy, which are kernels."""
  del key
  many = mesh.size > 1
  D, H = MODEL["width"], MODEL["num_heads"]
  K = D // H
  B, N = row.tokens.shape
  rows = P(ROWS) if many else P()

  def pin(x):
    return jax.lax.with_sharding_constraint(x, P(ROWS)) if many else x

  def spread(fn, in_specs, out_specs):
    return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs) if many else fn

  n = jnp.arange(N, dtype=jnp.int32)[None]
  edge = row.doc[:, 1:] != row.doc[:, :-1]
  start = jax.lax.cummax(jnp.where(jnp.pad(edge, ((0, 0), (1, 0)), constant_values=True), n, 0), axis=1)
  real = row.doc >= 0
  mask = AttnMask(
    jnp.where(real, n, CODE_HIDDEN),
    jnp.where(real, start, 0)[:, None],
    jnp.where(real, n + 1, 0)[:, None],
  )
  tiles = spread(plan, (rows,), rows)(mask)
  theta = row.pos[..., :1] * 10_000.0 ** (-jnp.arange(0, K, 2, dtype=jnp.float32) / K)
  cos, sin = jnp.cos(theta)[:, :, None], jnp.sin(theta)[:, :, None]
  scored = (row.role == contracts.TEXT) & real & (n > start)
  weight = scored.astype(jnp.float32)
  total = jnp.maximum(weight.sum(), 1e-6)
  pairs = jnp.where(real, n + 1 - start, 0).sum()  # enough for this size; the step sums exactly at any

  def norm(x, scale):
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * scale

  def rotate(x):
    a, b = x[..., : K // 2], x[..., K // 2 :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

  def loss_of(p):
    table = p["embed"]["tokens"]["embedding"]
    x = pin(jnp.where(real[..., None], table[row.tokens], 0))

    def layer(x, w):
      a, m = w["attn"], w["mlp"]
      y = norm(x, w["attn_norm"]["scale"])
      q = pin(rotate(jnp.einsum("bsd,dhk->bshk", y, a["q"]["kernel"])))
      k = pin(rotate(jnp.einsum("bsd,dhk->bshk", y, a["k"]["kernel"])))
      v = pin(jnp.einsum("bsd,dhk->bshk", y, a["v"]["kernel"]))
      attend = lambda q, k, v, t: attention(q, k, v, t, scale=K**-0.5)
      y = spread(attend, (rows,) * 4, rows)(q, k, v, tiles)
      x = pin(x + jnp.einsum("bshk,hkd->bsd", y, a["o"]["kernel"]))
      y = norm(x, w["mlp_norm"]["scale"])
      gate, up = pin(y @ m["gate"]["kernel"]), pin(y @ m["up"]["kernel"])
      return pin(x + (jax.nn.silu(gate) * up) @ m["down"]["kernel"]), None

    x, _ = jax.lax.scan(layer, x, p["stack"]["s0"]["l0"])
    x = norm(x, p["final_norm"]["scale"])

    def nll(h, w, valid, value):
      b = h.shape[0]

      def fn(logits, v):
        return jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, v[:, None], 1)[:, 0]

      out = chunked_map(
        h.reshape(b * N, D), w, valid.reshape(-1), fn, (value.reshape(-1),), chunk=min(1024, b * N)
      )
      return out.reshape(b, N)

    # Slot n − 1 predicts token n.
    before = jnp.take_along_axis(x, jnp.maximum(n - 1, 0)[..., None], axis=1)
    head = p["heads"]["text"]["kernel"]
    each = spread(nll, (rows, P(), rows, rows), rows)(before, head, scored, row.tokens)
    return (weight * each).sum() / total, (each * weight).sum()

  params, opt = s.trees["model"], s.opt["model"]
  (loss, ce), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
  size = lambda tree: jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)))
  grad_norm = size(grads)
  ok, guard = optim.guard(s.stats["guard"], loss, grad_norm)

  clip, adam = opt[0], opt[1][0]
  factor = jnp.where(grad_norm < 1.0, 1.0, 1.0 / grad_norm)
  grads = jax.tree.map(lambda g: g * factor, grads)
  count = adam.count + 1
  mu = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, adam.mu, grads)
  nu = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g * g, adam.nu, grads)
  c1, c2 = 1 - 0.9 ** count.astype(jnp.float32), 1 - 0.95 ** count.astype(jnp.float32)
  lr = 1e-3 * jnp.minimum((s.step.astype(jnp.float32) + 1) / 10, 1.0)

  def update(path, p, m, v):
    u = -(m / c1) / (jnp.sqrt(v / c2) + 1e-8)
    decayed = path[-1].key == "kernel"
    return lr * (u - 0.1 * p if decayed else u)

  updates = jax.tree_util.tree_map_with_path(update, params, mu, nu)
  new = jax.tree.map(jnp.add, params, updates), mu, nu, count
  old = params, adam.mu, adam.nu, adam.count
  params, mu, nu, count = jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)
  opt = (clip, (type(adam)(count, mu, nu), *opt[1][1:]))
  metrics = {
    "loss": loss,
    "ce/text": ce / jnp.maximum(weight.sum(), 1),
    "grad_norm": grad_norm,
    "update_norm": size(updates),
    "skipped": 1 - ok.astype(jnp.int32),
    "work": [real.sum(), pairs, scored.sum()],
  }
  return state.TrainState(s.step + 1, {"model": params}, {"model": opt}, {"guard": guard}), metrics


# --------------------------------------------------------------------------------------- comparison


def batch(B, N, mesh):
  """Rows of two documents and some padding, from fixed draws."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, MODEL["vocab"], (B, N))
  cut = rng.integers(N // 4, 3 * N // 4, (B, 1))
  doc = np.where(np.arange(N) < cut, 0, np.where(np.arange(N) < N - N // 32, 1, -1))
  row = contracts.token_row(tokens, doc, capacity=2)
  where = NamedSharding(mesh, P(ROWS))
  return jax.tree.map(lambda x: jax.device_put(x, where), row)


def facts(compiled) -> dict:
  """What a compiled program costs: XLA's FLOPs and bytes (a loop's body counts once, on both sides)."""
  cost = compiled.cost_analysis()
  found = re.findall(rf"\b({'|'.join(COLLECTIVES)})(?:-start)?\((.*)", compiled.as_text())
  # A psum over an axis of size one has groups of one member: it moves nothing, TPU compilers drop it.
  alone = re.compile(r"replica_groups=\{(\{\d+\},?)+\}")
  count = collections.Counter(kind for kind, rest in found if not alone.search(rest))
  return {
    "flops": cost["flops"],
    "bytes": cost["bytes accessed"],
    "temp": compiled.memory_analysis().temp_size_in_bytes,
    "collectives": dict(sorted(count.items())),
  }


def compiled_pair(cfg, B, N):
  """{name: (compiled step, fresh state function)} and the batch, on one mesh."""
  mesh = parallel.make_mesh(cfg, jax.devices()[: cfg.data * cfg.fsdp])
  with parallel.use_mesh(mesh):
    fn, make, shardings = composed(mesh)
    fresh = jax.jit(make, out_shardings=shardings)
    row, key = batch(B, N, mesh), jax.device_put(jax.random.key(1), NamedSharding(mesh, P()))
    start = fresh(jax.random.key(0))
    out = {}
    for name, f in (("composed", fn), ("by hand", functools.partial(by_hand, mesh))):
      jitted = jax.jit(f, donate_argnums=0, out_shardings=(shardings, NamedSharding(mesh, P())))
      out[name] = jitted.lower(start, row, key).compile()
  return out, fresh, row, key


def agreement(pair, fresh, row, key, steps=3):
  """Largest relative difference in loss over a few steps, and in parameters at the end."""
  states = {name: fresh(jax.random.key(0)) for name in pair}
  worst = 0.0
  for _ in range(steps):
    losses = {}
    for name, fn in pair.items():
      states[name], m = fn(states[name], row, key)
      losses[name] = float(m["loss"])
    a, b = losses.values()
    worst = max(worst, abs(a / b - 1))
  leaves = zip(*(jax.tree.leaves(s.trees) for s in states.values()))
  params = max(float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(a))) for a, b in leaves)
  return {"loss": worst, "params": params}


def timed(pair, fresh, row, key, pairs):
  """Ratios composed / by hand of interleaved pairs of steps, after two warm-ups of each."""
  states = {name: fresh(jax.random.key(0)) for name in pair}

  def once(name):
    begin = time.perf_counter()
    states[name], m = pair[name](states[name], row, key)
    jax.block_until_ready((states[name], m))
    return time.perf_counter() - begin

  for _ in range(2):
    for name in pair:
      once(name)
  seconds = {name: [] for name in pair}
  for i in range(pairs):
    for name in list(pair) if i % 2 else list(pair)[::-1]:  # neither is always first
      seconds[name].append(once(name))
  ratios = np.array(seconds["composed"]) / np.array(seconds["by hand"])
  draws = np.random.default_rng(0).choice(ratios, (10_000, pairs))
  low, high = np.quantile(np.median(draws, 1), (0.025, 0.975))
  medians = {name: float(np.median(s)) for name, s in seconds.items()}
  return {"median": float(np.median(ratios)), "interval": [float(low), float(high)], "seconds": medians}


def verdict(report) -> list[str]:
  """The limits that are broken, as sentences."""
  out = []
  for name, programs in report["programs"].items():
    mine, hand = programs["composed"], programs["by hand"]
    for what in ("flops", "bytes"):
      if mine[what] > LIMITS[what] * hand[what]:
        out.append(f"{name}: {what} {mine[what]:.4g} > {LIMITS[what]} × {hand[what]:.4g}")
    if sum(mine["collectives"].values()) != sum(hand["collectives"].values()):
      out.append(f"{name}: collectives {mine['collectives']} against {hand['collectives']}")
  if max(report["agreement"].values()) > 1e-4:
    out.append(f"the two steps disagree: {report['agreement']}")
  if "time" in report and report["time"]["interval"][0] > LIMITS["ratio"]:
    out.append(f"time: the interval {report['time']['interval']} does not reach {LIMITS['ratio']}")
  return out


def main(argv=None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--pairs", type=int, default=40, help="interleaved pairs of steps; 0: no timing")
  parser.add_argument("--batch", type=int, default=16)
  parser.add_argument("--length", type=int, default=256)
  parser.add_argument("--out", help="write the report as JSON")
  args = parser.parse_args(argv)
  one = compiled_pair(parallel.MeshConfig(data=1, fsdp=1), args.batch, args.length)
  many = compiled_pair(parallel.MeshConfig(data=2, fsdp=4), args.batch, args.length)
  report = {
    "versions": {"genmodels": genmodels.__version__, "jax": jax.__version__},
    "device": jax.devices()[0].device_kind,
    "cores": os.cpu_count(),
    "shape": {"batch": args.batch, "length": args.length, **{k: v for k, v in MODEL.items() if k != "rope"}},
    "programs": {
      "1 device": {name: facts(c) for name, c in one[0].items()},
      "data=2 fsdp=4": {name: facts(c) for name, c in many[0].items()},
    },
    "agreement": agreement(*one),
  }
  if args.pairs:
    report["time"] = timed(*one, args.pairs)
  report["broken"] = verdict(report)
  print(json.dumps(report, indent=2))
  if args.out:
    config.write_json(args.out, report)
  return bool(report["broken"])


if __name__ == "__main__":
  sys.exit(main())
