"""The curve: settings, counts that can be taken by hand, and a plot and a table that hold them."""

import json
import math

import pytest

from genmodels.config import ConfigError, merged
from genmodels.evals import curve
from tests.sampling.test_run import workdir


def test_every_combination_of_the_lists():
  got = curve.variations(["quota.kind=linear", "quota.steps=4,8", "temperature=0,0.5"])
  assert [setting for setting, _ in got] == [
    f"quota.steps={s} temperature={t}" for s in ("4", "8") for t in ("0", "0.5")
  ]
  assert got[1][1] == {"quota": {"kind": "linear", "steps": 4}, "temperature": 0.5}
  assert curve.variations([]) == [("", {})]
  with pytest.raises(ConfigError, match="key=value"):
    curve.variations(["quota.tau"])


def test_sections_are_merged_unless_their_kind_changes():
  base = {"quota": {"kind": "threshold", "tau": 0.9}, "temperature": 1.0}
  assert merged(base, {"quota": {"tau": 0.5}}) == {
    "quota": {"kind": "threshold", "tau": 0.5},
    "temperature": 1.0,
  }
  assert merged(base, {"quota": {"kind": "linear", "steps": 3}})["quota"] == {"kind": "linear", "steps": 3}
  assert base["quota"]["tau"] == 0.9


def test_repetition():
  assert curve.repetition([1, 2, 3, 4, 1, 2, 3, 4]) == (1, 5)
  assert curve.repetition([1, 2]) == (0, 0)


@pytest.mark.full
def test_the_verb(tmp_path, capsys):
  small = ["data.documents=60", "data.heldout=0.4", "model.layers=1"]
  workdir(tmp_path / "bd3", "language/bd3lm:tiny", small)
  args = [
    str(tmp_path / "bd3"),
    "--vary",
    "quota.kind=linear",
    "quota.steps=1,4",
    "--prompts",
    "6",
    "--given",
    "8",
  ]
  out = tmp_path / "c.png"
  assert curve.main([*args, "--new", "16", "--batch-size", "8", "--draws", "2", "--out", str(out)]) == 0
  body = json.loads(out.with_suffix(".json").read_text())
  fast, slow = body["points"]
  assert (fast["setting"], slow["setting"]) == ("quota.steps=1", "quota.steps=4")
  assert fast["tokens_per_forward"] > slow["tokens_per_forward"] > 0
  assert fast["texts"] == 6 and all(math.isfinite(p["bits_per_byte"]) for p in (fast, slow))
  # A head that starts at zero is uniform: every text is as likely as any other, whoever wrote it.
  assert out.stat().st_size > 5000 and "quota.steps=4" in capsys.readouterr().out
  with pytest.raises(ConfigError, match="fewer --given"):
    curve.main([*args, "--new", "5000", "--out", str(out)])
