"""`genmodels`: help without jax, errors for people, and a frozen surface of flags."""

import contextlib
import importlib
import io
import re
import subprocess
import sys
import types

import pytest

from genmodels import cli
from genmodels.config import ConfigError

# Every flag of every verb. A new flag is a promise: add it here on purpose, or make it a key of a config.
FLAGS = {
  "": {"--version", "--traceback", "--help"},
  "prepare": {
    "--help",
    "--out",
    "--tokenizer",
    "--heldout",
    "--text",
    "--prompt",
    "--messages",
    "--template",
    "--template-arg",
    "--learn",
    "--max-length",
    "--too-long",
    "--block",
    "--pad",
    "--anchor",
    "--split",
    "--no-bos",
    "--no-eos",
    "--shard-mb",
    "--compression",
    "--max-bad",
    "--verify",
  },  # fmt: skip
  "import": {"--help"},
  "export": {"--help", "--layout", "--dtype", "--like", "--tree", "--step", "--adapters", "--shard-gb"},
  "train": {"--help", "--config", "--workdir", "--from", "--debug"},
  "systems": {"--help", "--json", "--markdown"},
  "sample": {
    "--chat",
    "--help",
    "--json",
    "--labels",
    "--length",
    "--n",
    "--new",
    "--out",
    "--prompt",
    "--prompts-file",
    "--sampler",
    "--seed",
    "--step",
    "--suffix",
    "--template",
    "--workdir",
  },
  "collect": {
    "--batch-size",
    "--data",
    "--heldout",
    "--help",
    "--length",
    "--most",
    "--new",
    "--out",
    "--part",
    "--prompt",
    "--repeats",
    "--seed",
    "--span",
    "--step",
    "--tolerance",
    "--workdir",
  },
  "eval": {
    "--block",
    "--documents",
    "--draws",
    "--file",
    "--help",
    "--json",
    "--length",
    "--step",
    "--text",
    "--workdir",
  },
  "lm-eval": {
    "--batch-size",
    "--block",
    "--bos",
    "--draws",
    "--fewshot",
    "--greedy",
    "--help",
    "--include-path",
    "--length",
    "--limit",
    "--new",
    "--out",
    "--seed",
    "--step",
    "--tasks",
  },
  "curve": {
    "--batch-size",
    "--block",
    "--draws",
    "--given",
    "--help",
    "--judge",
    "--new",
    "--out",
    "--prompts",
    "--sampler",
    "--seed",
    "--vary",
  },
  "quickstart": {"--help", "--smoke", "--steps-scale", "--workdir"},
}


def run(*argv):
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    try:
      status = cli.main(argv)
    except SystemExit as e:  # argparse, after --help
      status = e.code
  return status, out.getvalue(), err.getvalue()


def test_help_imports_no_jax():
  code = (
    "import sys\n"
    "from genmodels import cli\n"
    "assert cli.main(['--help']) == 0\n"
    "heavy = {'jax', 'flax', 'numpy', 'grain', 'torch'} & set(sys.modules)\n"
    "assert not heavy, heavy\n"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert all(verb in done.stdout for verb in cli.VERBS)


@pytest.mark.parametrize("verb", ["", *cli.VERBS])
def test_flags_are_frozen(verb):
  status, out, err = run(*filter(None, [verb]), "--help")
  assert status in (0, None), err
  assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", out)) == FLAGS[verb]


@pytest.mark.parametrize("verb", cli.VERBS)
def test_verbs_have_a_main(verb):
  assert callable(importlib.import_module(cli.VERBS[verb][0]).main)


def test_unknown_verb():
  status, _, err = run("trian")
  assert status == 2 and "unknown verb 'trian'; did you mean 'train'?" in err
  assert run()[0] == 2
  assert run("--version")[1].strip()


@pytest.fixture
def failing(monkeypatch):
  """A verb that raises what it is told to."""

  def plant(error):
    def main(argv):
      assert "--traceback" not in argv
      raise error

    module = types.ModuleType("genmodels.planted")
    module.main = main
    monkeypatch.setitem(sys.modules, "genmodels.planted", module)
    monkeypatch.setitem(cli.VERBS, "planted", ("genmodels.planted", "fails"))

  return plant


@pytest.mark.parametrize(
  "error, text",
  [
    (
      ConfigError("unknown key", key="optim.lrr", value=1, fix="lr"),
      "optim.lrr = 1: unknown key\n  fix: lr\n",
    ),
    (ValueError("no rows"), "no rows\n(where it was raised: add --traceback)\n"),
    (FileNotFoundError(2, "No such file", "data.txt"), "No such file"),
  ],
)
def test_errors_are_one_message(failing, error, text):
  failing(error)
  status, out, err = run("planted", "--config", "x")
  assert status == 2 and err.startswith("genmodels planted: ") and text in err and not out
  with pytest.raises(type(error)):
    cli.main(["planted", "--traceback", "--config", "x"])


def test_bugs_keep_their_traceback(failing):
  failing(KeyError("a bug"))
  with pytest.raises(KeyError):
    cli.main(["planted"])
  failing(KeyboardInterrupt())
  assert cli.main(["planted"]) == 130


@pytest.mark.parametrize("verb", ["sample", "eval", "collect"])
def test_the_folder_stands_first_or_behind_its_flag(verb, tmp_path):
  """Overrides anywhere; without a folder the verb says what it misses, before anything is read."""
  more = ["--out", str(tmp_path / "out")] if verb == "collect" else []
  for argv in ([str(tmp_path / "no")], ["seed=1", "--workdir", str(tmp_path / "no")]):
    status, _, err = run(verb, *more, *argv)
    assert status == 2 and f"{tmp_path / 'no'}" in err, err
  for argv in ([], ["seed=1", str(tmp_path / "no")]):
    status, _, err = run(verb, *more, *argv)
    assert status == 2 and "name the folder of a training run, or an import" in err
