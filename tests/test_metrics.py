"""FLOP counts against hand counts, rates, groups, files over restarts, progress, goodput."""

import io
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import contracts, metrics

LAYERS, WIDTH, HEADS, KV, DIM, MLP, VOCAB = 3, 8, 2, 1, 4, 12, 32
SHAPES = {
  "embed": ((VOCAB, WIDTH), ("vocab", "embed")),
  "q": ((LAYERS, WIDTH, HEADS, DIM), ("layers", "embed", "heads", "head_dim")),
  "kv": ((LAYERS, WIDTH, KV, DIM), ("layers", "embed", "kv_heads", "head_dim")),
  "up": ((LAYERS, WIDTH, MLP), ("layers", "embed", "mlp")),
  "bias": ((LAYERS, MLP), ("layers", "mlp")),
  "adaln": ((LAYERS, WIDTH, 6 * WIDTH), ("layers", "cond", "embed")),
  "head": ((WIDTH, VOCAB), ("embed", "vocab")),
}
PARAMS = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, (s, _) in SHAPES.items()}
AXES = {k: a for k, (_, a) in SHAPES.items()}
ATTENTION = {"full": 2 * HEADS * DIM, "local": HEADS * DIM}


def test_model_flops_counts_matrices_once_and_tables_never():
  m = metrics.model_flops(PARAMS, AXES, ATTENTION, {"text": "^head$"})
  trunk = LAYERS * (WIDTH * HEADS * DIM + WIDTH * KV * DIM + WIDTH * MLP)
  assert (m.trunk, m.frozen, m.heads) == (trunk, 0, {"text": WIDTH * VOCAB})
  assert m.cond == LAYERS * 6 * WIDTH * WIDTH
  tied = {k: v for k, v in PARAMS.items() if k != "head"}
  tied_axes = {k: v for k, v in AXES.items() if k != "head"}
  assert metrics.model_flops(tied, tied_axes, ATTENTION, {"text": "^embed$"}) == m
  trainable = {k: k not in ("q", "embed") for k in PARAMS}
  m = metrics.model_flops(PARAMS, AXES, ATTENTION, {"text": "^head$"}, trainable)
  assert m.frozen == LAYERS * WIDTH * HEADS * DIM and m.trunk == trunk
  with pytest.raises(ValueError, match="head 'image' has no weights"):
    metrics.model_flops(PARAMS, AXES, ATTENTION, {"image": "codes"})


def test_experts_count_as_far_as_a_slot_passes_through_them():
  shape = lambda *s: jax.ShapeDtypeStruct(s, "float32")
  params = {"mlp": {"experts": {"up": shape(3, 8, 4, 5)}, "router": shape(3, 4, 8)}}
  axes = {
    "mlp": {
      "experts": {"up": ("layers", "expert", "expert_embed", "mlp")},
      "router": ("layers", "embed", None),
    }
  }
  m = metrics.model_flops(params, axes, {}, {}, active={"/experts/": (2, 8)})
  assert m.trunk == 3 * 2 * 4 * 5 + 3 * 4 * 8
  assert (
    metrics.model_flops(
      params, axes, {}, {}, {"mlp": {"experts": {"up": False}, "router": True}}, {"/experts/": (2, 8)}
    ).frozen
    == 120
  )
  with pytest.raises(ValueError, match="mlp/experts/up is a stack of experts"):
    metrics.model_flops(params, axes, {}, {})


def test_step_flops_is_the_stated_convention():
  m = metrics.model_flops(PARAMS, AXES, ATTENTION, {"text": "^head$"})
  work = {"slots": 640, "pairs": {"full": 5_000_000_000, "local": 100}, "reads": {"text": 320}, "entries": 5}
  f = metrics.step_flops(m, work)
  # The specification, term by term: 6·N·slots, 12·(heads·head_dim)·layers·pairs, 6·N_head·reads.
  assert f["trunk"] == 6 * m.trunk * 640 + 6 * m.cond * 5
  assert f["attention"] == 12 * HEADS * DIM * (2 * 5_000_000_000 + 1 * 100)
  assert f["heads"] == 6 * WIDTH * VOCAB * 320
  assert f["total"] == f["trunk"] + f["attention"] + f["heads"]
  assert metrics.step_flops(m, work, passes=1)["total"] * 3 == f["total"]
  lora = metrics.ModelFlops(m.trunk, m.trunk, 0, {}, {})
  assert metrics.step_flops(lora, {"slots": 10, "pairs": {}})["trunk"] == 2 * 2 * m.trunk * 10
  # Draft heads on a trunk that stands still: one pass through it, three through the heads.
  heads = metrics.model_flops(PARAMS, AXES, ATTENTION, {"text": "^head$"}, {k: k == "head" for k in PARAMS})
  still, once = metrics.step_flops(heads, work), metrics.step_flops(m, work, passes=1)
  assert (still["attention"], still["heads"]) == (once["attention"], f["heads"])
  assert still["trunk"] - 6 * m.cond * 5 == once["trunk"] - 2 * m.cond * 5
  with pytest.raises(ValueError, match="counts .'sliding'., the model has .'full', 'local'."):
    metrics.step_flops(m, {"slots": 1, "pairs": {"sliding": 1}})


def test_step_flops_matches_a_compiled_matrix_chain():
  """XLA counts the same 6·N per slot for a trained stack of matrices (its own FLOPs, not ours)."""
  w = {"a": jnp.ones([16, 24]), "b": jnp.ones([24, 16])}
  axes = {"a": ("embed", "mlp"), "b": ("mlp", "embed")}
  x = jnp.ones([40, 16])

  def loss(w, x):
    return jnp.sum(jnp.square((x @ w["a"]) @ w["b"]))

  cost = jax.jit(jax.grad(loss, (0, 1))).lower(w, x).compile().cost_analysis()
  m = metrics.model_flops(w, axes, {}, {})
  ours = metrics.step_flops(m, {"slots": 40, "pairs": {}})["total"]
  assert abs(cost["flops"] / ours - 1) < 0.1  # sums of the loss ride along


def test_limbs_are_exact_where_int32_overflows():
  x = np.random.default_rng(0).integers(0, 2**31 - 1, (3, 1000)).astype(np.int32)
  exact = int(x.astype(np.int64).sum())
  got = jax.jit(metrics.limbs)(x)
  assert metrics.unlimb(got) == exact
  assert metrics.unlimb(jax.jit(metrics.limbs)(jnp.array([2**31 - 1], jnp.int32))) == 2**31 - 1
  assert metrics.unlimb(got + got) == 2 * exact  # micro-batches add limb by limb
  assert int(jnp.sum(x)) != exact  # negative control


def test_peak_table_and_the_unknown_device():
  assert metrics.peak("TPU v5 lite").flops == 197e12  # not the "TPU v5" of the v5p
  assert metrics.peak("TPU v5").flops == 459e12
  assert metrics.peak("NVIDIA H100 80GB HBM3").text == "989 TFLOP/s (dense bf16, NVIDIA H100 80GB HBM3)"
  assert metrics.peak("NVIDIA H100 PCIe").flops == 756e12
  assert metrics.peak() is None  # a CPU has no data sheet
  measured = metrics.peak(measure=True)
  assert measured.flops > 1e8 and "measured float32" in measured.text


def test_meter_rates_and_mfu():
  now = [0.0]
  meter = metrics.Meter(100, clock=lambda: now[0], peak=metrics.Peak(1e12, "1 TFLOP/s"), devices=4)
  assert meter.report(0) == {}
  for _ in range(5):
    meter.add(tokens=1000, slots=2000, loss_tokens=500, flops=4e11)
  now[0] = 2.0
  r = meter.report(5)
  assert r == {
    "step_seconds": 0.4,
    "tokens_per_second": 2500.0,
    "slots_per_second": 5000.0,
    "loss_tokens_per_second": 1250.0,
    "eta_seconds": 38.0,
    "flops_per_second_per_device": 2.5e11,
    "mfu": 0.25,
  }
  meter.add(tokens=10)
  now[0] = 3.0
  assert meter.report(6)["tokens_per_second"] == 10 and "mfu" not in meter.report(6)


def test_loss_by_source_equals_a_loop_and_ignores_padding():
  rng = np.random.default_rng(0)
  doc = np.array([[0, 0, 1, 1, 1, -1], [0, 1, 1, 2, 2, 2]])
  row = contracts.token_row(np.zeros((2, 6)), doc, capacity=3)
  source = jnp.array([[2, 0, 1], [1, 2, 2]], jnp.int32)
  row = row.replace(docs=row.docs.replace(source=source))
  nll, weight = rng.random((2, 6)), rng.integers(0, 2, (2, 6)) * 0.5
  nll[weight == 0] = np.nan  # what stands where nothing is asked must not be read
  want = np.zeros((4, 2))
  for b in range(2):
    for n in range(6):
      if doc[b, n] >= 0 and weight[b, n]:
        want[source[b, doc[b, n]]] += (nll[b, n] * weight[b, n], weight[b, n])
  nll[0, 5], weight[0, 5] = 7.0, 1.0  # padding
  got = jax.jit(lambda v, w, r: metrics.by_group(v, w, metrics.source_of(r), 4))(nll, weight, row)
  np.testing.assert_allclose(got["sum"], want[:, 0], rtol=1e-5)
  np.testing.assert_allclose(got["weight"], want[:, 1], rtol=1e-5)
  means = metrics.group_means("loss/source", got, ("web", "code", "books", "unused"))
  assert "loss/source/unused" not in means and set(means) <= {
    f"loss/source/{n}" for n in ("web", "code", "books")
  }
  for i, n in enumerate(("web", "code", "books")):
    assert means.get(f"loss/source/{n}", 0) == pytest.approx(want[i, 0] / want[i, 1] if want[i, 1] else 0)


def steps_of(path):
  return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_writer_truncates_to_the_restored_step_and_drops_a_torn_line(tmp_path):
  w = metrics.Writer(tmp_path)
  for s in range(1, 8):
    w.write(s, {"loss": jnp.float32(s), "name": "x", "norm": np.float32("nan")})
  w.close()
  assert any((tmp_path / "tensorboard").iterdir())
  path = tmp_path / "metrics.jsonl"
  with open(path, "a") as f:
    f.write('{"step": 8, "lo')  # kill -9 in the middle of a write
  w = metrics.Writer(tmp_path, restored=5, tensorboard=False)
  assert w.dropped == 3
  w.write(6, {"loss": 0.5})
  w.close()
  assert steps_of(path) == [1, 2, 3, 4, 5, 6]
  first = json.loads(path.read_text().splitlines()[0])
  assert first == {"step": 1, "loss": 1.0, "name": "x", "norm": "nan"} and np.isnan(float(first["norm"]))
  before = path.stat().st_ino
  assert metrics.Writer(tmp_path, restored=6, tensorboard=False).dropped == 0 and path.stat().st_ino == before


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_progress_rewrites_on_a_terminal_and_prints_every_ten_seconds_elsewhere():
  now, values = [0.0], {"loss": 2.3123, "tokens_per_second": 12345.0, "eta_seconds": 62}
  plain = metrics.Progress(50, io.StringIO(), clock=lambda: now[0])
  term = metrics.Progress(50, Terminal(), clock=lambda: now[0])
  for step in range(1, 51):
    now[0] = step * 0.5
    plain.show(step, values)
    term.show(step, values)
  lines = plain.out.getvalue().splitlines()
  # At 0.5, 10.5 and 20.5 seconds, and the last step.
  assert [line.split(" · ")[0] for line in lines] == ["step 1/50", "step 21/50", "step 41/50", "step 50/50"]
  assert lines[0] == "step 1/50 · loss 2.312 · 12.3k tok/s · ETA 1m02s"
  assert "\n" not in term.out.getvalue() and term.out.getvalue().count("\r") == 50
  term.note("saved step 50")
  assert term.out.getvalue().endswith("\r\x1b[Ksaved step 50\n")
  peak = metrics.Peak(459e12, "459 TFLOP/s (dense bf16, TPU v5)")
  line = metrics.progress_line(3, 9, {"mfu": 0.4123, "skipped": 2}, peak)
  assert line == "step 3/9 · MFU 41.2 % of 459 TFLOP/s (dense bf16, TPU v5) · 2 skipped"
  assert [metrics.duration(s) for s in (59.4, 3600 + 240, 86400 * 2 + 3 * 3600)] == ["59s", "1h04m", "2d03h"]


class Clock:
  def __init__(self, now=1000.0):
    self.now = now

  def __call__(self):
    return self.now

  def pass_(self, seconds):
    self.now += seconds


def run(path, clock, restored, steps, save_every=1000, age=2.0):
  ledger = metrics.Ledger(path, clock=clock, wall=clock, age=age)
  with ledger.span("restore"):
    clock.pass_(1)
  ledger.begin(restored)
  with ledger.span("compile"):
    clock.pass_(5)
  for s in range(restored + 1, restored + steps + 1):
    with ledger.span("data"):
      clock.pass_(0.1)
    clock.pass_(0.9)
    if s % save_every == 0:
      with ledger.span("save"):
        clock.pass_(2)
    if s % 5 == 0:
      ledger.flush(s)
  return ledger


def test_ledger_accounts_for_every_second_over_a_crash(tmp_path):
  path, clock = tmp_path / "goodput.jsonl", Clock()
  ledger = run(path, clock, 0, 20, save_every=8)  # saves at 8 and 16, dies after 20
  assert ledger.training() == pytest.approx(20)
  clock.pass_(10)  # the machine is away; the new process takes 2 seconds to import
  run(path, clock, 8, 12, save_every=1000)  # restored at 8: steps 9 … 20 are taken again
  g = metrics.goodput(path)
  assert g["wall"] == pytest.approx(2 + 1 + 5 + 20 + 4 + 8 + 2 + 1 + 5 + 12)
  assert g["step"] == pytest.approx(0.9 * 20) and g["data"] == pytest.approx(0.1 * 20)
  assert g["wasted"] == pytest.approx(12) and g["down"] == pytest.approx(8)
  assert (g["init"], g["restore"], g["compile"], g["save"]) == pytest.approx((4, 2, 10, 4))
  assert g["unaccounted"] == pytest.approx(0, abs=1e-3)
  assert g["goodput"] == pytest.approx(18 / g["wall"])
  # A second restart at the same step wastes the repeated part again, and no second twice.
  clock.pass_(3)
  run(path, clock, 8, 5, age=0.0)
  g = metrics.goodput(path)
  assert g["wasted"] == pytest.approx(24 - 0) and g["step"] == pytest.approx(0.9 * (8 + 2))
  # (the third run was cut after step 13; its last flush was at 10)
  assert g["unaccounted"] == pytest.approx(0, abs=1e-3)


def test_ledger_reconciles_with_the_real_clock_and_survives_a_torn_line(tmp_path):
  path = tmp_path / "goodput.jsonl"
  start = time.time()
  ledger = metrics.Ledger(path, age=0.0)
  ledger.begin()
  with ledger.span("eval"):
    time.sleep(0.05)
    with ledger.span("data"):
      time.sleep(0.05)
  time.sleep(0.02)
  ledger.flush(3)
  wall = time.time() - start
  g = metrics.goodput(path)
  # 20 ms for a loaded machine; a span lost or counted twice would be 50 ms off.
  assert abs(sum(ledger.totals.values()) - wall) < 0.02 and abs(g["unaccounted"]) < 0.02
  assert g["eval"] >= 0.05 and g["data"] >= 0.05 and g["step"] >= 0.02
  with open(path, "a") as f:
    f.write('{"event": "spe')
  metrics.Ledger(path, age=0.0).begin(3)
  assert metrics.goodput(path)["wasted"] == 0
  with pytest.raises(RuntimeError, match="twice"):
    ledger.begin()


def test_process_age_and_memory_are_those_of_this_process():
  age = metrics.process_age()
  time.sleep(0.05)
  assert 0 < age and 0.03 <= metrics.process_age() - age < 5
  before = metrics.rss_bytes()
  block = np.ones(2**23)  # 64 MiB, touched
  assert 0.9 * block.nbytes < metrics.rss_bytes() - before < 1.5 * block.nbytes
