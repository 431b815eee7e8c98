"""The attention benchmark's machinery: cases, turns, verdicts, what is kept when a contender fails."""

import json
import sys
import types

import jax
import numpy as np
import pytest

from benchmarks import attention as bench
from benchmarks.contenders import cases as all_cases

CASES = {c.name: c for c in all_cases.tiny()}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_encoding_is_the_definition(case):
  i = np.arange(case.slots)
  rows = np.arange(case.mask_rows)[:, None, None]
  seen = case.visible(case.tables(), rows, i[None, :, None], i[None, None])
  seen = np.broadcast_to(seen, (case.mask_rows, case.slots, case.slots))
  np.testing.assert_array_equal(np.asarray(jax.jit(case.encode)(case.doc()).to_dense()), seen)
  assert 0.05 < seen.mean() and seen.any(-1).all()


def test_the_protocols_cases_fill_the_chip():
  cases = all_cases.full()
  assert len({c.name for c in cases}) == len(cases) == 34
  for c in cases:
    assert 16_000 <= c.rows * c.slots <= 66_000 and c.head_dim == 128
    assert not c.scales or sum(s * s for s in c.scales) == c.tokens
  anchor = all_cases.quick()[0]
  assert (anchor.mask, anchor.tokens, anchor.block, anchor.heads) == ("bd3", 4096, 32, 16)
  assert {c.mask for c in all_cases.tiny()} == {c.mask for c in cases}


class Fake:
  """A worker with a script: {contender: milliseconds, or a function of how often it was timed}."""

  def __init__(self, script, pairs=100):
    self.script, self.pairs, self.order, self.loads, self.count = script, pairs, [], 0, {}

  def ask(self, method, *args, timeout=0):
    return getattr(self, method)(*args)

  def load(self, case):
    self.loads += 1
    return {"pairs": self.pairs, "norms": [1.0, 2.0]}

  def prepare(self, name):
    how = self.script[name]
    if how == "skipped":
      return {"skipped": "not installed"}
    if how == "wrong":
      return {"ok": False, "error": {"out": 0.5}, "backward": True}
    if how == "does not compile":
      raise RuntimeError("ptxas: internal error")
    return {
      "ok": True,
      "error": {"out": 1e-3},
      "backward": how != "forward only",
      "build_ms": 3.2,
      "executed": 200.0,
      "memory": 1,
    }

  def ensure(self, name):
    pass

  def repeats(self, name, count):
    return 2 if self.script[name] == "racy" else 0

  def time(self, name, what, calls):
    self.order.append((name, what))
    n = self.count[name] = self.count.get(name, 0) + 1
    how = self.script[name]
    if how == "crashes" and n > 8:
      raise bench.Lost("the process died in time (exit code -11)")
    return (how(n) if callable(how) else how if isinstance(how, float) else 1.0) / 1e3, 0.1

  def wait(self):
    pass

  def close(self):
    pass


def _measure(script, wanted=(), report=None, **more):
  workers = {"jax": Fake({n: s for n, s in script.items() if bench.CONTENDERS[n] == "jax"})}
  workers["torch"] = Fake({n: s for n, s in script.items() if bench.CONTENDERS[n] == "torch"})
  report = (
    report if report is not None else {"ceilings": {"torch": {"gemm_tflops": 800.0, "copy_gb_s": 4000.0}}}
  )
  saved = []
  plan = bench.Plan([CASES["bd3"]], list(script), list(wanted), turns=4, calls=1, milliseconds=1.0, **more)
  bench.measure(plan, workers, report, lambda: saved.append(json.dumps(report)))
  return report, workers, saved


def test_a_contender_that_fails_loses_its_own_cell_only():
  script = {
    "ours": 1.0, "ours-deterministic": "racy", "ours-xla": "wrong", "jax-cudnn": "does not compile", "tokamax": "skipped",
    "flex": 2.0, "flex-64": "crashes", "jax-mgpu-fp16": "forward only",
  }  # fmt: skip
  report, workers, saved = _measure(script)
  found = report["cells"]["bd3"]["contenders"]
  assert found["ours-deterministic"]["failed"] == "2 of 50 repeats gave other bits"
  assert "relative errors above 1e-2: {'out': 0.5}" in found["ours-xla"]["failed"]
  assert found["jax-cudnn"] == {"failed": "ptxas: internal error", "run": 0}
  assert found["tokamax"]["skipped"] == "not installed"
  assert "timing both: the process died" in found["flex-64"]["failed"] and workers["torch"].loads == 2
  for name, quantities in (("ours", 3), ("flex", 3), ("jax-mgpu-fp16", 1)):
    assert [len(v) for v in found[name]["ms"].values()] == [bench.PASSES] * quantities
  # pairs · D · H · 4 / 1 ms, the same over the ceiling; the tiles are twice the pairs.
  assert found["ours"]["tflops"]["fwd"] == pytest.approx(100 * 16 * 2 * 4 / 1e-3 / 1e12)
  assert found["ours"]["share_of_gemm"]["bwd"] == pytest.approx(found["ours"]["tflops"]["bwd"] / 800)
  assert found["ours"]["tile_tflops_fwd"] == pytest.approx(2 * found["ours"]["tflops"]["fwd"])
  assert len(saved) > len(script), "results are written as they come"
  assert '"ours": {"ok": true' in saved[0] and '"ms"' not in saved[0]
  text = bench.table(report)
  assert "FAILED: 2 of 50 repeats" in text and "skipped: tokamax: not installed" in text
  assert "ours against flex: fwd faster, bwd faster, both faster" in text
  assert "against flex-64" not in text, "a contender that failed proves nothing"


def test_turns_alternate():
  _, workers, _ = _measure({"ours": 1.0, "jax-cudnn": 1.0, "jax-xla-masked": 1.0})
  order = [n for n, what in workers["jax"].order if what == "fwd"]
  names = ["ours", "jax-cudnn", "jax-xla-masked"]
  assert order == (names[::-1] + names) * 2 + names[::-1] + (names[::-1] + names) * 2 + names[::-1]


def test_faster_needs_both_passes_apart():
  q = lambda low, high: {"low": low, "median": (low + high) / 2, "high": high}
  assert bench.apart([q(1, 2), q(1, 2)], [q(3, 4), q(3, 4)]) == "faster"
  assert bench.apart([q(3, 4), q(3, 4)], [q(1, 2), q(1, 2)]) == "slower"
  assert bench.apart([q(1, 2), q(1, 3)], [q(3, 4), q(3, 4)]) is None
  assert bench.apart([q(1, 2), q(5, 6)], [q(3, 4), q(3, 4)]) is None
  assert bench.apart([q(1, 2)], [q(3, 4)]) is None, "one pass is none"


def test_noise_is_no_win():
  report, *_ = _measure({"ours": lambda n: 1.0 + 0.5 * (n % 5), "flex": lambda n: 1.1 + 0.5 * ((n + 1) % 5)})
  assert set(report["cells"]["bd3"]["verdicts"]["ours"]["flex"].values()) == {"not apart"}


def test_a_loss_is_published():
  report, *_ = _measure({"ours": 3.0, "flex": 2.0})
  assert "ours against flex: fwd slower, bwd slower, both slower" in bench.table(report)


def test_a_run_goes_on_where_the_last_one_stopped():
  script = {"ours": 1.0, "flex": 2.0}
  report, *_ = _measure(script, deadline=0.0)
  assert report["left"] == ["bd3"] and "not reached in the time given" in bench.table(report)
  report, workers, _ = _measure(script, wanted=["bd*:ours"], report=report)
  assert workers["torch"].loads == 0
  report["runs"] = [1]
  report, workers, _ = _measure(script, report=report)
  assert workers["jax"].loads == 0 and workers["torch"].loads == 1
  # They took no turns with each other: no verdict.
  assert report["cells"]["bd3"]["verdicts"] == {}


def test_frameworks_must_compute_the_same():
  workers = {"jax": Fake({"ours": 1.0}, pairs=99), "torch": Fake({"flex": 1.0})}
  report = {}
  bench.measure(bench.Plan([CASES["bd3"]], ["ours", "flex"], []), workers, report, lambda: None)
  found = report["cells"]["bd3"]["contenders"]
  assert all("the frameworks' references differ" in r["failed"] for r in found.values()) and len(found) == 2


def test_a_worker_survives_its_process():
  worker = bench.Worker("tests.benchmarks.stub", "cpu")
  try:
    assert worker.ask("double", 21, timeout=60) == 42
    with pytest.raises(RuntimeError, match="ValueError: no such kernel"):
      worker.ask("refuse")
    with pytest.raises(bench.Lost, match=r"died in die \(exit code 3\)"):
      worker.ask("die")
    assert worker.ask("double", 4, timeout=60) == 8
    with pytest.raises(bench.Lost, match="no answer to hang"):
      worker.ask("hang", timeout=0.2)
    assert worker.ask("double", 5, timeout=60) == 10
  finally:
    worker.close()


def test_the_command_on_a_cpu(tmp_path, monkeypatch, capsys):
  for name, value in (
    ("OMP_NUM_THREADS", "1"),
    ("XLA_PYTHON_CLIENT_PREALLOCATE", "false"),
    ("JAX_PLATFORMS", "cpu"),
  ):
    monkeypatch.setenv(name, value)
  out = tmp_path / "a.json"
  only = ["--only", "bd3:ours*"]
  assert bench.main(["--device", "cpu", "--quick", "--out", str(out), *only]) == 0
  report = json.loads(out.read_text())
  found = report["cells"]["bd3"]["contenders"]
  assert set(found) == {"ours", "ours-deterministic", "ours-safe", "ours-xla"}
  assert found["ours-xla"]["repeats"] == 3
  assert max(found["ours-xla"]["error"].values()) < 1e-2 and found["ours-xla"]["ms"]["both"][1]["median"] > 0
  assert all("cannot run here" in found[n]["skipped"] for n in ("ours", "ours-deterministic", "ours-safe"))
  assert report["cells"]["bd3"]["pairs"] == 2 * (64 * 64 + 64 * 8)
  text = capsys.readouterr().out
  assert "measures nothing" in text and "faster" not in text


def test_only_that_fits_nothing_is_an_error():
  with pytest.raises(SystemExit, match="fits nothing; cases: .*'bd3'"):
    bench.main(["--device", "cpu", "--only", "bd4*"])


def test_without_a_gpu_it_is_the_tpu_table(monkeypatch, capsys):
  import benchmarks

  # A stand-in: the module sets XLA's flags when it is imported.
  asked = []
  table = types.SimpleNamespace(main=lambda argv: asked.append(argv) or 0)
  monkeypatch.setattr(benchmarks, "attention_tpu", table, raising=False)
  monkeypatch.setitem(sys.modules, "benchmarks.attention_tpu", table)
  monkeypatch.setattr(bench, "clocks", dict)
  assert bench.main(["--quick", "--out", "t.json"]) == 0 and bench.main([]) == 0
  assert asked == [["--quick", "--out", "t.json"], []]
  assert "No TPU was run" in capsys.readouterr().out


@pytest.mark.parity
def test_both_frameworks_compute_the_same():
  from benchmarks.contenders import jax_side, torch_side

  sides = [jax_side.make("cpu"), torch_side.make("cpu")]
  for case in CASES.values():
    a, b = (side.load(case) for side in sides)
    assert a["pairs"] == b["pairs"]
    np.testing.assert_allclose(a["norms"], b["norms"], rtol=1e-4)
  torch = sides[1]
  torch.load(CASES["bd3-packed"])
  assert torch.prepare("flex")["skipped"]
  found = torch.prepare("sdpa-math-masked")
  assert found["ok"] and set(found["error"]) == {"out", "dq", "dk", "dv"}
  torch.reference[3] = torch.reference[3] * 1.02
  assert not torch.prepare("sdpa-math-masked")["ok"], "an error of 2 % in one gradient fails"
  seconds, share = torch.time("sdpa-math-masked", "both", 2)
  assert seconds > 0 and 0 <= share <= 1 and torch.repeats("sdpa-math-masked", 2) == 0
