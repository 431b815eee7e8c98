"""The quickstart: stages run once, a line every ten seconds, FLOPs that agree, a page that stands alone."""

import html
import io
import itertools
import json
import re

import jax
import pytest

from genmodels import config, objectives, system
from genmodels.data import prepare
from genmodels.quickstart import recipes, report, run, smoke
from genmodels.quickstart.live import Live

# ------------------------------------------------------------------------------------------- live line


class Clock:
  def __init__(self):
    self.now = 0.0

  def __call__(self):
    return self.now


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_silence_is_broken_every_ten_seconds():
  out, clock = io.StringIO(), Clock()
  live = Live(out, clock=clock)
  live.stage("evaluation", "[1/2] evaluation")
  for clock.now in range(1, 31):
    live.beat()
  assert out.getvalue().splitlines() == [
    "[1/2] evaluation", "  … evaluation, 10s", "  … evaluation, 20s", "  … evaluation, 30s",
  ]  # fmt: skip


def test_no_line_while_others_write():
  out, clock = io.StringIO(), Clock()
  live = Live(out, clock=clock)
  live.stage("training")
  for clock.now in range(1, 31):
    live.write(f"step {clock.now}\n")
    live.beat()
  assert "…" not in out.getvalue()


def test_on_a_terminal_the_line_is_rewritten_and_cleared():
  out, clock = Terminal(), Clock()
  live = Live(out, clock=clock)
  live.stage("sampling")
  clock.now = 2.0
  live.beat()
  live.write("done\n")
  assert out.getvalue() == "\r  … sampling, 2s\x1b[K\r\x1b[Kdone\n"
  live.write("\rstep 1/9")  # a progress line that is being rewritten stays
  clock.now = 20.0
  live.beat()
  assert out.getvalue().endswith("step 1/9")


# --------------------------------------------------------------------------------------------- stages


def test_a_finished_stage_is_read_back_and_an_unfinished_one_runs_again(tmp_path):
  live, calls = Live(io.StringIO()), []
  stages = lambda: run.Stages(tmp_path, run.Options(), live, ["a", "b"])

  def do():
    calls.append(1)
    if len(calls) == 1:
      raise KeyboardInterrupt
    return {"value": 1.5}

  with pytest.raises(KeyboardInterrupt):
    stages()("a", "first", do)
  result = stages()("a", "first", do)
  assert stages()("a", "first", do) == result and len(calls) == 2
  assert result["value"] == 1.5 and result["seconds"] >= 0 and result["cpu_seconds"] >= 0
  stages()("b", "second", do)
  assert len(calls) == 3


def test_a_workdir_belongs_to_one_quickstart(tmp_path):
  run.Stages(tmp_path, run.Options(0.5), Live(io.StringIO()), [])
  run.Stages(tmp_path, run.Options(0.5), Live(io.StringIO()), [])
  with pytest.raises(config.ConfigError, match="another --workdir"):
    run.Stages(tmp_path, run.Options(1.0), Live(io.StringIO()), [])


def test_smoke_empties_only_its_own_folder(tmp_path):
  (tmp_path / "thesis.txt").write_text("precious")
  with pytest.raises(config.ConfigError, match="no earlier smoke run"):
    smoke.smoke(str(tmp_path), io.StringIO())
  assert (tmp_path / "thesis.txt").exists()


# ------------------------------------------------------------------------------------------- recipes


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp("quickstart")
  prepare.prepare(prepare.read_python(None, 12), str(root / "data"), tokenizer="byte", heldout=0.2)
  return root


def test_scratch_takes_the_first_step_count_that_reaches_the_budget(root):
  counts = recipes.step_flops(recipes.recipe("scratch", str(root), steps=1))
  first = [next(counts) for _ in range(4)]
  assert len(set(first)) > 1  # reads and pairs vary with the batch: the count is of the batch, not a formula
  assert recipes.equal_steps(str(root), sum(first[:3])) == 3
  assert recipes.equal_steps(str(root), sum(first[:3]) + 1) == 4


def test_a_two_stream_step_costs_what_its_slots_pairs_and_reads_say(root):
  cfg = recipes.recipe("convert", str(root), scale=0.25)
  cfg.model.update(width=8, num_heads=1, num_kv_heads=1, head_dim=8, mlp=16, layers=2)
  parts = system.build(cfg)
  batch = parts.data.batch(0)
  n = int((batch["doc"] >= 0).sum())
  text = int(((batch["doc"] >= 0) & (batch["role"] == 1)).sum())
  lengths = [int((d == i).sum()) for d in batch["doc"] for i in range(d.max() + 1)]
  # Block size 1 at step 0: noisy slots see the clean past and themselves, clean slots the same.
  pairs = sum(length * (length + 1) for length in lengths)
  vocab = parts.model.cfg.vocab_padded
  matrices = 2 * (4 * 8 * 8 + 3 * 8 * 16)
  expected = 6 * matrices * 2 * n + 12 * (2 * 8) * pairs + 6 * 8 * vocab * 2 * text
  assert next(recipes.step_flops(cfg)) == expected


def test_the_curriculum_ends_at_the_largest_block(root):
  for scale in (0.25, 1.0, 4.0):
    cfg = recipes.recipe("convert", str(root), scale=scale)
    objective = objectives.build(cfg.objective, {"mask_id": 258})
    size = objective.corruption.blocks.size
    assert size(0) == 1  # the loss of step 0 is the AR loss
    assert size(int(cfg.train.steps) // 2) == max(recipes.BLOCKS) == size(int(cfg.train.steps))


# -------------------------------------------------------------------------------------------- report


def summary() -> dict:
  results = []
  for name, (part, block) in run.MODELS.items():
    bits = {"ar": 2.0, "b4": 2.1, "b8": 2.2, "b16": 2.3, "scratch": 3.0}[name]
    results.append({
      "name": name, "title": run.title(name), "run": part, "block": block, "bits_per_byte": bits,
      "stderr": 0.02, "tokens": 100, "bytes": 250, "documents": 4, "draws": 8, "exact": name == "ar",
      "train": {"steps": 20, "tokens": 5000, "flops": {"ar": 1e12}.get(part, 2e12)},
    })  # fmt: skip
  rows = [{"text": ["if", " <", "b", ">", "\n", "&"], "step": [-1, 0, 2, 1, 1, 3]}]
  names = ["data", *recipes.PARTS, *(f"eval-{m}" for m in run.MODELS), "samples"]
  split = {"documents": 9, "tokens": 400, "source_bytes": 1000, "vocab_size": 260}
  convert = {"objective": {"corruption": {"blocks": {"size": {"values": [1, 16], "at": [0, 5]}}}}}
  return {
    "data": {"train": split, "heldout": split},
    "runs": {p: {"steps": 10, "flops": 1e12, "tokens": 5000, "parameters": 1000} for p in recipes.PARTS},
    "results": results, "converted_beats_scratch": True,
    "samples": {"models": {m: {"rows": rows, "steps": 4, "forwards": 7} for m in run.MODELS}},
    "configs": {"ar": {"data": {"seq_len": 256}, "batch_size": 16}, "convert": convert, "scratch": {}},
    "measured": {
      "seconds": dict.fromkeys(names, 3.0), "cpu_seconds": dict.fromkeys(names, 5.0),
      "training_seconds": dict.fromkeys(run.MODELS, 6.0), "machine": run.machine(),
    },
  }  # fmt: skip


@pytest.fixture(scope="module")
def page():
  keys = {"ar": "loss/text", "convert": "loss/diffusion", "scratch": "loss/diffusion"}
  loss = {p: [{"step": s, keys[p]: 5 - 0.1 * s} for s in range(1, 11)] for p in recipes.PARTS}
  once = report.page(summary(), loss, {p: "{}" for p in recipes.PARTS})
  assert once == report.page(summary(), loss, {p: "{}" for p in recipes.PARTS})
  return once


def test_the_report_needs_nothing_else(page):
  assert "<script" not in page and "<link" not in page and "@import" not in page
  outside = set(re.findall(r"""(?:src|href)=["']?([^"' >]+)|url\(([^)]+)\)""", page))
  assert all((a or b).startswith("#") for a, b in outside), outside
  assert page.count("<svg") == 1 and "<details>" in page and "viewport" in page


def test_the_report_shows_every_number_and_every_sample(page):
  text = html.unescape(re.sub(r"<[^>]+>", "", page))
  for value in ("2.000", "≤ 2.100", "≤ 2.200", "≤ 2.300", "≤ 3.000", "5,000"):
    assert value in text, value
  assert "less than the 3.00" in text
  sample = re.search(r"<div class=sample>(.*?)</div>", page, re.S).group(1)
  assert html.unescape(re.sub(r"<[^>]+>", "", sample)) == "if <b>\n&"
  assert sample.startswith("<b>if</b>")  # the prompt


def test_colours_follow_the_step():
  shade = [report.shade_of(s, 95) for s in range(96)]
  assert shade == sorted(shade) and shade[0] == 0 and shade[-1] == report.SHADES - 1
  assert report.mix(report.RAMP, 0.0) == report.RAMP[0] and report.mix(report.RAMP, 1.0) == report.RAMP[-1]
  row = {"text": list("pabcd"), "step": [-1, 0, 95, 95, 0]}
  assert report._sample(row) == (
    "<div class=sample><b>p</b><span class=k0>a</span><span class=k23>bc</span><span class=k0>d</span></div>"
  )


def test_tokens_per_step_counts_generated_tokens_of_every_row():
  rows = [{"step": [-1, 0, 0, 1, 2]}, {"step": [-1, 0, 0, 0, 0]}]
  assert report.tokens_per_step({"rows": rows}) == 8 / 4


def test_labels_keep_their_distance_and_order():
  out = report.spread([1.0, 1.0, 1.05, 3.0], 0.2)
  assert all(b - a >= 0.2 - 1e-6 for a, b in zip(out, out[1:])) and out[-1] == 3.0
  assert report.spread([1.0, 2.0], 0.2) == [1.0, 2.0]


def test_a_lost_comparison_is_said(page):
  worse = summary() | {"converted_beats_scratch": False}
  assert "not all less than the 3.00" in report._lead(worse)


# ------------------------------------------------------------------------------------- the whole thing


@pytest.mark.multiprocess
def test_smoke(tmp_path):
  out = io.StringIO()
  assert smoke.smoke(str(tmp_path / "smoke"), out) == 0
  assert "repeated bit for bit" in out.getvalue() and "smoke: ok" in out.getvalue()


@pytest.mark.slow
def test_quickstart_ends_and_skips_what_is_done(tmp_path, monkeypatch):
  monkeypatch.setattr(recipes, "FILES", 40)
  monkeypatch.setattr(recipes, "HELD_OUT", 0.1)
  cache = jax.config.jax_compilation_cache_dir
  out = io.StringIO()
  try:
    first = run.quickstart(str(tmp_path / "q"), run.Options(0.1), out)
    again = run.quickstart(str(tmp_path / "q"), run.Options(0.1), out)
  finally:
    jax.config.update("jax_compilation_cache_dir", cache)
  done = out.getvalue().count("done before")
  assert done == 5 + len(run.MODELS) and again["results"] == first["results"]
  assert (tmp_path / "q" / "report.html").stat().st_size > 20_000
  for part in recipes.PARTS:  # what is counted before a run is what the trainer counts in it
    lines = (tmp_path / "q" / part / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    steps = first["runs"][part]["steps"]
    assert [r["step"] for r in records] == list(range(1, steps + 1))
    cfg = recipes.recipe(part, str(tmp_path / "q"), scale=0.1, steps=steps)
    for record, flops in zip(records[1:], itertools.islice(recipes.step_flops(cfg), 1, None)):
      seen = record["flops_per_second_per_device"] * record["step_seconds"] * jax.device_count()
      assert seen == pytest.approx(flops, rel=1e-9)
  start = json.loads((tmp_path / "q" / "convert" / "metrics.jsonl").read_text().splitlines()[0])
  assert start["loss/diffusion"] == pytest.approx(start["loss/ar"], abs=1e-4)  # block size 1 is the AR model
  budget = first["runs"]["ar"]["flops"] + first["runs"]["convert"]["flops"]
  assert 1 <= first["runs"]["scratch"]["flops"] / budget < 1.1
