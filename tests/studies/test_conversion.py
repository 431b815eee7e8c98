"""The conversion study without its hours: configs, estimate, corpus, report; a small one whole in test-full."""

import io
import json

import jax
import pytest

from genmodels import config
from genmodels.quickstart import run
from genmodels.quickstart.live import Live
from genmodels.studies import conversion, conversion_report, corpus


def test_pages_become_text():
  page = (
    "<html><head><title>no</title></head><body><nav><p>menu</p></nav><div role='navigation'><div>more<br>menu</div>"
    "</div><h1>Title<a>¶</a></h1><p>One &amp; two.</p><script>var x;</script><pre>code\n  here</pre></body></html>"
  )
  lines = [line for line in corpus.text_of_html(page).split("\n") if line]
  assert lines == ["Title", "One & two.", "code", "  here"]


@pytest.mark.parametrize("name", ["ar", *conversion.RECIPES])
def test_recipes_share_everything_but_the_objective(name, tmp_path):
  options = conversion.Options(scale=0.5)
  cfg, ar = (conversion.recipe(n, tmp_path, options) for n in (name, "ar"))
  for key in ("model", "data", "batch_size", "seed"):
    assert config.plain(cfg[key]) == config.plain(ar[key])
  tokens = cfg.train.steps * cfg.batch_size * cfg.data.seq_len
  assert 0 <= conversion.tokens_of(options, name) - tokens < cfg.batch_size * cfg.data.seq_len
  source = conversion.RECIPES.get(name, ("", ""))[1]
  assert (cfg.init.get("path") == str(tmp_path / "ar")) == (source == "ar")


def test_curricula_are_stretched_and_single_sizes_are_the_study_s(tmp_path):
  cfg = conversion.recipe("nbdiff", tmp_path, conversion.Options())
  tiny = config.load("language/nbdiff:tiny")
  at, old = cfg.objective.corruption.blocks.size["at"], tiny.objective.corruption.blocks.size["at"]
  assert at == tuple(a * cfg.train.steps // tiny.train.steps for a in old) and at[-1] > old[-1]
  sizes = [conversion.recipe(n, tmp_path, conversion.Options(block=16)).objective for n in ("bd3lm", "sdar")]
  assert [o.corruption.blocks.size for o in sizes] == [16, 16]


def test_the_estimate_grows_with_what_is_asked():
  of = lambda recipe, **kw: conversion.estimate(conversion.Options(recipes=(recipe,), **kw), 1e9)
  assert of("llada") < of("bd3lm") < of("fast_dllm_v2")
  assert of("bd3lm") < of("bd3lm", documents=128) < of("bd3lm", scale=4)
  with pytest.raises(ValueError, match="unknown"):
    conversion.Options(recipes=("bd4",))


def test_stages_are_read_back_and_other_options_refused(tmp_path):
  def open_(**kw):
    return run.Stages(tmp_path, conversion.Options(**kw), Live(io.StringIO()), ["data"])

  assert open_()("data", "data", lambda: {"found": 1})["found"] == 1
  assert open_()("data", "data", lambda: {"found": 2})["found"] == 1
  with pytest.raises(config.ConfigError, match="begun with"):
    open_(block=16)


def test_the_report_shows_every_number():
  like = lambda x: {"bits_per_byte": x, "stderr": 0.1, "tokens": 100, "bytes": 200}
  point = {
    "setting": "tau=0.5", "tokens_per_forward": 2.5, "tokens_per_second": None, "bits_per_byte": 1.75,
    "stderr": 0.05, "entropy": 6.5, "repeated": 0.125,
  }  # fmt: skip
  run = {"tokens": 1000, "steps": 10, "parameters": 5000}
  summary = {
    "options": {"block": 8, "prompts": 3},
    "data": {s: {"tokens": 9, "documents": 2, "vocab_size": 4} for s in ("train", "heldout")} | {"sources": {"x": 3}},
    "runs": {"ar": run, "bd3lm": run},
    "pace": {"ar": {"step_seconds": 2.0}, "bd3lm": {"step_seconds": 5.0}},
    "likelihood": {
      "ar": {"exact": True, "blocks": {"0": like(1.5)}, "ar": None},
      "bd3lm": {"exact": False, "blocks": {"4": like(1.625), "8": like(1.875)}, "ar": like(2.0)},
    },
    "curves": {n: {"points": [point], "held_out": 1.25} for n in ("ar", "bd3lm")},
    "memory": {"ar": {"temp_bytes": 2**20}, "bd3lm": {"temp_bytes": 3 * 2**20}},
    "machine": {"cpu": "c", "cores": 2, "devices": "d", "python": "3", "versions": {"jax": "0"}, "commit": "", "date": "t"},
  }  # fmt: skip
  page = conversion_report.page(summary)
  for text in (
    "| BD3-LM | 2.000 ± 0.050 | 1.625 ± 0.050 | 1.875 ± 0.050 |",
    "5.000 | 2.50× | 3 MiB (3.00×)",
    "12.5%",
    "1.250",
  ):
    assert text in page, page


@pytest.mark.full
def test_a_small_study(tmp_path, capsys):
  """Everything once, then again: every stage is read back; figures, tables and runs are there."""
  args = [
    "--workdir",
    str(tmp_path),
    "--scale",
    "0.01",
    "--recipes",
    "nbdiff,llada,tidar",
    "--documents",
    "4",
  ]
  args += ["--prompts", "4", "--size", "small"]
  cache = jax.config.jax_compilation_cache_dir
  try:
    assert conversion.main(args) == 0
    first = json.loads((tmp_path / "study.json").read_text())
    assert conversion.main(args) == 0
  finally:
    jax.config.update("jax_compilation_cache_dir", cache)
  again = json.loads((tmp_path / "study.json").read_text())
  assert {k: v for k, v in again.items() if k not in ("machine", "estimated_seconds")} == {
    k: v for k, v in first.items() if k not in ("machine", "estimated_seconds")
  }
  assert "done before" in capsys.readouterr().err
  assert all(
    (tmp_path / f).stat().st_size > 1000 for f in ("report.md", "study_curves.png", "study_likelihood.png")
  )
  assert set(first["likelihood"]["nbdiff"]["blocks"]) == {"1", "2", "4", "8", "16", "32"}
  assert first["likelihood"]["tidar"]["exact"] and first["likelihood"]["nbdiff"]["ar"]
  assert first["memory"]["llada"]["temp_bytes"] > 0
  assert all(first["pace"][n]["step_seconds"] > 0 and first["pace"][n]["steps"] == 12 for n in first["runs"])
