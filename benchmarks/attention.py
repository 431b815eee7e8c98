"""Interval attention against what users pick today: one run, one table, one JSON.

  python benchmarks/attention.py --out attention.json            everything, on a Hopper GPU
  python benchmarks/attention.py --quick                         the deciding mask and its anchor
  python benchmarks/attention.py --only 'bd3-8k*:ours*'          cases[:contenders] by shell patterns
  python benchmarks/attention.py --seconds 500 --out a.json      stops in time; run again to go on
  python benchmarks/attention.py --device cpu                    tiny shapes: the machinery, not a measurement

Without a GPU it prints the table of the TPU kernels instead (benchmarks/attention_tpu.py).

Protocol. JAX and PyTorch live in a process each and share one GPU; they get the same random tensors,
never zeros, and only one has work on the device at a time. A contender's numbers are checked first, over
outputs that held NaN, against a float32 reference of the same run: an error above 1e-2 fails the cell. Then
contenders take turns (A B C, C B A, …): a turn is a batch of back-to-back calls over rotating inputs that
together exceed the L2 cache, timed by the host from an idle device to an idle device. A cell is the median
and the quartiles over the turns of a pass; there are two passes. "faster" needs quartile ranges that do not
meet, in both. Useful TFLOP/s count visible pairs alone (4·D forward, 10·D backward, per head); tile TFLOP/s
count the pairs of all forward tiles that are visited. Every result is written as soon as it is there, losses
too.

docs/attention.md says how to read the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from benchmarks.contenders import cases as all_cases
from benchmarks.contenders.worker import QUANTITIES, serve

SIDES = {"jax": "benchmarks.contenders.jax_side", "torch": "benchmarks.contenders.torch_side"}
CONTENDERS = {
  "ours": "jax",
  "ours-deterministic": "jax",
  "ours-safe": "jax",
  "ours-132-blocks": "jax",
  "ours-xla": "jax",
  "flex": "torch",
  "flex-64": "torch",
  "flex-autotuned": "torch",
  "flex-flash4": "torch",
  "sdpa-cudnn": "torch",
  "sdpa-flash": "torch",
  "sdpa-cudnn-masked": "torch",
  "sdpa-efficient-masked": "torch",
  "sdpa-math-masked": "torch",
  "jax-cudnn": "jax",
  "jax-cudnn-masked": "jax",
  "jax-xla-masked": "jax",
  "jax-mgpu-fp16": "jax",
  "tokamax": "jax",
}
OPTIONAL = ("flex-autotuned", "ours-132-blocks")  # searches of a setting: when --only or --autotune asks
FLOPS = {"fwd": 4, "bwd": 10, "both": 14}  # per visible pair and unit of D
PASSES = 2
LAYERS = 32  # over which the cost of a mask or plan, built once a step, is spread


class Lost(Exception):
  """A worker process that died or did not answer in time."""


class Worker:
  """A process of one framework; `ask` starts it anew after it was lost."""

  def __init__(self, module: str, device: str):
    self.module, self.device, self.process = module, device, None

  def ask(self, method: str, *args, timeout: float = 120):
    """The result of a method of the side.

    Raises:
      Lost: the process died (a crash of the driver, say) or the timeout passed.
      RuntimeError: the method raised; the message is its own.
    """
    if self.process is None:
      context = multiprocessing.get_context("spawn")
      self.pipe, theirs = context.Pipe()
      self.process = context.Process(target=serve, args=(theirs, self.module, self.device), daemon=True)
      self.process.start()
      theirs.close()
    try:
      self.pipe.send((method, args))
      if not self.pipe.poll(timeout):
        raise Lost(f"no answer to {method} within {timeout:.0f} s")
      kind, value = self.pipe.recv()
    except (EOFError, OSError) as e:
      code = self._stop()
      raise Lost(f"the process died in {method} (exit code {code})") from e
    except Lost:
      self._stop()
      raise
    if kind == "error":
      raise RuntimeError(value)
    return value

  def _stop(self):
    self.process.join(2)
    if self.process.is_alive():
      self.process.kill()
      self.process.join()
    code, self.process = self.process.exitcode, None
    return code

  def close(self):
    if self.process is not None:
      self.pipe.close()
      self._stop()


@dataclasses.dataclass
class Plan:
  """What one run does.

  Attributes:
    turns: of each contender in a pass.
    calls, milliseconds: what a turn has at least.
    repeats: of the deterministic modes, for equal bits.
    verdicts: whether times mean anything.
    deadline: time.monotonic after which no case starts.
  """

  cases: list
  contenders: list[str]
  wanted: list[str]
  turns: int = 10
  calls: int = 5
  milliseconds: float = 20.0
  repeats: int = 50
  verdicts: bool = True
  deadline: float = float("inf")

  def wants(self, case: str, contender: str) -> bool:
    """Whether --only asks for the pair; everything, if it asks for nothing."""
    for pattern in self.wanted:
      a, _, b = pattern.partition(":")
      if fnmatch.fnmatch(case, a or "*") and fnmatch.fnmatch(contender, b or "*"):
        return True
    return not self.wanted


def measure(plan: Plan, workers: dict, report: dict, save) -> None:
  """Fills report["cells"]. Results that are there are kept, so that a run can be continued."""
  cells = report.setdefault("cells", {})
  for case in plan.cases:
    new = {"shape": dataclasses.asdict(case), "slots": case.slots, "contenders": {}}
    cell = cells.setdefault(case.name, new)
    names = [n for n in plan.contenders if plan.wants(case.name, n) and CONTENDERS[n] in workers]
    names = [n for n in names if not _finished(cell["contenders"].get(n, {}))]
    if not names:
      continue
    if time.monotonic() > plan.deadline:
      report.setdefault("left", []).append(case.name)
      continue
    _case(plan, {n: workers[CONTENDERS[n]] for n in names}, case, cell, save)
    for name in names:
      cell["contenders"][name]["run"] = len(report.get("runs", []))
    derive(cell, case, report.get("ceilings", {}))
    if plan.verdicts:
      cell["verdicts"] = verdicts(cell["contenders"])
    save()


def _finished(result) -> bool:
  return "skipped" in result or "failed" in result or len(result.get("ms", {}).get("fwd", ())) == PASSES


def _case(plan, workers, case, cell, save):
  """Checks and times contenders {name: worker} on a case."""
  results = cell["contenders"]
  trouble = _load(workers, case, cell)
  for name, worker in workers.items():
    if trouble.get(worker):
      results[name] = {"failed": trouble[worker]}
      continue
    print(f"  {case.name}: {name} …", file=sys.stderr, flush=True)
    results[name] = _guarded(worker, case, lambda w, n=name: _prepare(plan, w, n))
    save()
  ready = {n: w for n, w in workers.items() if results[n].get("ok")}
  for number in range(PASSES):
    _pass(plan, ready, case, results, number)
    save()


def _load(workers, case, cell) -> dict:
  """Loads the case into the frameworks; {worker: what went wrong}. Their references must agree."""
  answers, trouble = {}, {}
  for worker in dict.fromkeys(workers.values()):
    try:
      answers[worker] = worker.ask("load", case, timeout=300)
    except (Lost, RuntimeError) as e:
      trouble[worker] = str(e)
  if answers:
    first = next(iter(answers.values()))
    cell["pairs"], cell["reference_norms"] = first["pairs"], first["norms"]
    for answer in answers.values():
      difference = max(abs(a / b - 1) for a, b in zip(answer["norms"], first["norms"]))
      if answer["pairs"] != first["pairs"] or difference > 1e-3:
        trouble = dict.fromkeys(answers, f"the frameworks' references differ: {first} and {answer}")
  return trouble


def _guarded(worker, case, action):
  """What the action returns, or {"failed": why}, and then a worker that is fit for the next contender."""
  try:
    return action(worker)
  except Lost as e:
    failed = {"failed": str(e)}
  except RuntimeError as e:
    failed = {"failed": str(e)}
    try:
      worker.ask("wait", timeout=60)  # a kernel that faulted takes its process' device context with it
      return failed
    except (Lost, RuntimeError):
      worker.close()
  try:
    worker.ask("load", case, timeout=300)
  except (Lost, RuntimeError):
    pass  # the next contender's request says so
  return failed


def _prepare(plan, worker, name):
  result = worker.ask("prepare", name, timeout=400)
  if "skipped" in result:
    return result
  if not result["ok"]:
    result["failed"] = f"relative errors above 1e-2: {result['error']}"
  elif name in ("ours-deterministic", "ours-safe", "ours-xla"):
    result["repeats"] = plan.repeats
    other = worker.ask("repeats", name, plan.repeats, timeout=300)
    if other:
      result |= {"ok": False, "failed": f"{other} of {plan.repeats} repeats gave other bits"}
  return result


def _pass(plan, workers, case, results, number):
  """One pass: turns of all contenders {name: worker}, in alternating order."""
  samples = {n: {w: [] for w in QUANTITIES} for n in workers}
  calls, share = {}, dict.fromkeys(workers, 0.0)
  for turn in range(plan.turns + 1):  # turn 0 warms up and says how many calls make a turn
    for name in list(workers) if turn % 2 else list(workers)[::-1]:
      if "failed" in results[name]:
        continue
      for what in QUANTITIES if results[name]["backward"] else ("fwd",):

        def timed(worker, name=name, what=what):
          worker.ask("ensure", name, timeout=400)  # it may have been started anew since
          return {"timed": worker.ask("time", name, what, calls.get((name, what), 10))}

        answer = _guarded(workers[name], case, timed)
        if "failed" in answer:
          results[name]["failed"] = f"timing {what}: {answer['failed']}"
          break
        seconds, host = answer["timed"]
        if turn:
          samples[name][what].append(seconds * 1e3)
          share[name] = max(share[name], host)
        else:
          calls[name, what] = min(max(plan.calls, round(plan.milliseconds / (seconds * 1e3))), 500)
  for name in workers:
    if "failed" not in results[name]:
      for what, values in samples[name].items():
        if values:
          results[name].setdefault("ms", {}).setdefault(what, []).append(quartiles(values))
      results[name].setdefault("host_share", []).append(share[name])


def quartiles(values) -> dict:
  """{"median", "low", "high", "n"} of a pass, low and high the quartiles."""
  if len(values) < 2:
    return {"median": values[0], "low": values[0], "high": values[0], "n": len(values)}
  low, median, high = statistics.quantiles(values, n=4, method="inclusive")
  return {"median": median, "low": low, "high": high, "n": len(values)}


def apart(a: list[dict], b: list[dict]) -> str | None:
  """ "faster", "slower" where a's quartile range is below, above b's in every pass; None where they meet."""
  if len(a) < PASSES or len(b) < PASSES:
    return None
  if all(x["high"] < y["low"] for x, y in zip(a, b)):
    return "faster"
  return "slower" if all(x["low"] > y["high"] for x, y in zip(a, b)) else None


def derive(cell, case, ceilings) -> None:
  """Rates and shares of the ceilings, from the times."""
  gemm = max((c["gemm_tflops"] for c in ceilings.values()), default=None)
  for result in cell["contenders"].values():
    if "ms" not in result:
      continue
    result["tflops"], result["share_of_gemm"] = {}, {}
    for what, passes in result["ms"].items():
      seconds = min(p["median"] for p in passes) / 1e3
      rate = FLOPS[what] * case.head_dim * cell["pairs"] * case.heads / seconds / 1e12
      result["tflops"][what] = rate
      if gemm:
        result["share_of_gemm"][what] = rate / gemm
    if result.get("executed"):
      seconds = min(p["median"] for p in result["ms"]["fwd"]) / 1e3
      result["tile_tflops_fwd"] = 4 * case.head_dim * result["executed"] * case.heads / seconds / 1e12
    if result.get("build_ms") is not None:
      result["build_ms_a_layer"] = result["build_ms"] / LAYERS


def verdicts(results: dict) -> dict:
  """{our mode: {rival: {quantity: "faster" | "slower" | "not apart"}}} of what took turns with each other."""
  out = {}
  timed = {n: r for n, r in results.items() if "ms" in r and "failed" not in r}
  for mine in (n for n in timed if n.startswith("ours")):
    rivals = [n for n in timed if not n.startswith("ours") and timed[n].get("run") == timed[mine].get("run")]
    for rival in rivals:
      shared = [w for w in QUANTITIES if w in timed[mine]["ms"] and w in timed[rival]["ms"]]
      found = {w: apart(timed[mine]["ms"][w], timed[rival]["ms"][w]) or "not apart" for w in shared}
      out.setdefault(mine, {})[rival] = found
  return out


# ------------------------------------------------------------------------------------- facts and tables


def clocks() -> dict:
  """Driver, clocks, temperature and power by nvidia-smi; empty without it."""
  fields = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw,power.limit"
  values = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
  first = [x.strip() for x in values.splitlines()[0].split(",")] if values else []
  return dict(zip(fields.split(","), first))


def versions(workers: dict) -> dict:
  """Of everything that makes a number; a framework that does not start says why."""
  out = {"python": platform.python_version(), "commit": _output("git", "rev-parse", "--short", "HEAD")}
  ptxas = shutil.which("ptxas") or "/usr/local/cuda/bin/ptxas"
  said = _output(ptxas, "--version").splitlines()
  out["ptxas"] = next((line.strip() for line in said if "release" in line), None)
  for side, worker in list(workers.items()):
    try:
      out[side] = worker.ask("versions", timeout=180)
    except (Lost, RuntimeError) as e:
      out[side] = f"not here: {e}"
      workers.pop(side).close()
  return out


def ceilings(workers: dict) -> dict:
  out = {}
  for side, worker in workers.items():
    try:
      out[side] = worker.ask("ceilings", timeout=180)
    except (Lost, RuntimeError) as e:
      print(f"{side}: no ceilings ({e})", file=sys.stderr)
  return out


def _output(*command) -> str:
  try:
    return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
  except (OSError, subprocess.TimeoutExpired):
    return ""


def table(report: dict) -> str:
  """The report as text: a block a case, a line a contender, quickest forward + backward first."""
  lines = []
  for name, c in report.get("ceilings", {}).items():
    lines.append(f"{name}: GEMM {c['gemm_tflops']:.3g} TFLOP/s, copy {c['copy_gb_s']:.3g} GB/s")
  head = f"{'':24}{'fwd ms':>16} {'bwd ms':>16} {'both ms':>16}  {'useful TFLOP/s':>16}"
  head += f" {'tile':>5} {'% GEMM':>8} {'build':>7} {'MiB':>7} {'error':>8}"
  for name, cell in report.get("cells", {}).items():
    s, found = cell["shape"], cell["contenders"]
    shape = f"B={s['rows']} S={cell['slots']} H={s['heads']} Hk={s['key_heads']} D={s['head_dim']}"
    if cell.get("pairs"):
      shape += f", {cell['pairs'] / (s['rows'] * cell['slots'] ** 2):.1%} of the pairs visible"
    lines += ["", f"{name}: {shape}", head]
    both = lambda r: (r["ms"].get("both") or r["ms"]["fwd"])[0]["median"] if "ms" in r else float("inf")
    reasons = {}
    for contender, r in sorted(found.items(), key=lambda x: both(x[1])):
      if "skipped" in r:
        reasons.setdefault(r["skipped"], []).append(contender)
      else:
        lines.append(f"  {contender:22}{_line(r)}")
    lines += [f"  skipped: {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    lines += ["  " + v for v in sentences(cell.get("verdicts", {}))]
  for name in report.get("left", []):
    lines.append(f"{name}: not reached in the time given; run again with the same --out")
  return "\n".join(lines)


def _line(r) -> str:
  if "failed" in r:
    return f"FAILED: {r['failed']}"
  if "ms" not in r:
    return "not timed"
  spread = lambda w: f"{r['ms'][w][0]['median']:.3f}±{(r['ms'][w][0]['high'] - r['ms'][w][0]['low']) / 2:.3f}"
  times = " ".join(f"{spread(w) if w in r['ms'] else '–':>16}" for w in QUANTITIES)
  rate = "/".join(f"{r['tflops'][w]:.3g}" for w in QUANTITIES if w in r["tflops"])
  share = "/".join(f"{100 * r['share_of_gemm'][w]:.0f}" for w in QUANTITIES if w in r["share_of_gemm"])
  tile = f"{r['tile_tflops_fwd']:.3g}" if "tile_tflops_fwd" in r else "–"
  build = f"{r['build_ms']:.2f}" if r.get("build_ms") is not None else "–"
  memory = f"{r['memory'] / 2**20:.0f}" if r.get("memory") else "–"
  note = f"  {r['repeats']} repeats equal" if "repeats" in r else ""
  if max(r["host_share"]) > 0.8:
    note += "  (host-bound)"
  worst = max(r["error"].values())
  return f"{times}  {rate:>16} {tile:>5} {share:>8} {build:>7} {memory:>7} {worst:8.1e}{note}"


def sentences(found: dict) -> list[str]:
  """Verdicts as lines, losses as plainly as wins."""
  out = []
  for mine, rivals in found.items():
    for rival, by in rivals.items():
      out.append(f"{mine} against {rival}: " + ", ".join(f"{w} {verdict}" for w, verdict in by.items()))
  return out


# --------------------------------------------------------------------------------------------- command


def _arguments(argv):
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--quick", action="store_true", help="the deciding mask and its anchor only")
  parser.add_argument(
    "--only", action="append", default=[], metavar="CASES[:CONTENDERS]", help="shell patterns; repeatable"
  )
  parser.add_argument("--out", default="", help="JSON, written as results come; an old one is continued")
  parser.add_argument("--seconds", type=float, default=0, help="start no case after so many")
  parser.add_argument("--device", choices=("auto", "gpu", "cpu"), default="auto")
  parser.add_argument("--autotune", action="store_true", help="settings that are searched for, on both sides")
  parser.add_argument("--turns", type=int, default=10, help="of a contender in a pass")
  return parser.parse_args(argv)


def main(argv=None) -> int:
  args = _arguments(argv)
  device = args.device if args.device != "auto" else "gpu" if clocks() else "tpu"
  if device == "tpu":
    from benchmarks import attention_tpu

    print("No GPU here: the TPU kernels, compiled ahead of time. No TPU was run.")
    return attention_tpu.main([*["--quick"] * args.quick, *(["--out", args.out] if args.out else [])])
  if device == "cpu":
    os.environ |= {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
  os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # PyTorch has its half of the memory
  report = {}
  if args.out and os.path.exists(args.out):
    with open(args.out) as f:
      report = json.load(f)
    report.pop("left", None)
  small = device == "cpu"
  chosen = all_cases.tiny() if small else all_cases.full()
  chosen = chosen[:2] if args.quick else chosen
  names = [n for n in CONTENDERS if n not in OPTIONAL or args.autotune or any(n in o for o in args.only)]
  plan = Plan(chosen, names, args.only, turns=args.turns)
  if small:
    plan = dataclasses.replace(plan, turns=2, calls=1, milliseconds=1.0, repeats=3, verdicts=False)
  if args.seconds:
    plan.deadline = time.monotonic() + args.seconds
  plan.cases = [c for c in chosen if any(plan.wants(c.name, n) for n in names)]
  sides = {CONTENDERS[n] for n in names if any(plan.wants(c.name, n) for c in chosen)}
  if not sides:
    known = f"cases: {[c.name for c in chosen]}, contenders: {names}"
    raise SystemExit(f"--only {args.only} fits nothing; {known}")

  def save():
    if args.out:
      with open(args.out + ".new", "w") as f:
        json.dump(report, f, indent=1)
      os.replace(args.out + ".new", args.out)

  workers = {side: Worker(module, device) for side, module in SIDES.items() if side in sides}
  try:
    report.setdefault("runs", []).append({"clocks_before": clocks(), "versions": versions(workers)})
    if not workers:
      raise SystemExit(f"no framework starts: {report['runs'][-1]['versions']}")
    report["ceilings"] = ceilings(workers)
    save()
    measure(plan, workers, report, save)
    report["runs"][-1]["ceilings_after"] = ceilings(workers)
    report["runs"][-1]["clocks_after"] = clocks()
    save()
  finally:
    for worker in workers.values():
      worker.close()
  if small:
    print("On a CPU, with tiny shapes: this checks the machinery and measures nothing.")
  print(json.dumps(report["runs"][-1]["versions"]))
  print(table(report))
  every = [pair for cell in report["cells"].values() for pair in cell["contenders"].items()]
  return int(any(name.startswith("ours") and "failed" in r for name, r in every))


if __name__ == "__main__":
  raise SystemExit(main())
