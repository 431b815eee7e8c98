"""The list of systems: every config names its paper and tests that exist, run and are named once."""

import ast
import inspect
import json
import pathlib
import subprocess
import sys
import tempfile
import textwrap

import pytest

from genmodels import config, systems
from genmodels.config import ConfigError
from genmodels.systems import Paper, System

ROOT = pathlib.Path(__file__).resolve().parents[1]


class Collected:
  """pytest plugin: {node id, with and without parameters: always skipped} of the collected tests."""

  def __init__(self):
    self.tests = {}

  def pytest_collection_modifyitems(self, items):
    for item in items:
      skipped = item.get_closest_marker("skip") is not None or skips_first(item.function)
      self.tests[item.nodeid] = self.tests[item.nodeid.split("[")[0]] = skipped


def skips_first(function) -> bool:
  """Whether the body of a test begins with pytest.skip(…)."""
  try:
    body = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0].body
  except (OSError, SyntaxError):
    return False
  body = [s for s in body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
  call = body[0].value if body and isinstance(body[0], ast.Expr) else None
  return isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.skip"


def problems(tests, collected) -> list[str]:
  """What is wrong with a system's node ids, given {id: skipped} of the collected tests."""
  out = []
  for test in tests:
    if test not in collected:
      out.append(f"{test}: no such test")
    elif collected[test]:
      out.append(f"{test}: always skipped")
    if tests.count(test) > 1:
      out.append(f"{test}: named twice")
  return out


def collect(root: pathlib.Path, files) -> dict[str, bool]:
  """{node id: skipped} of `files` (below `root`), collected in a process of its own."""
  code = """if True:
    import json, sys, pytest
    sys.path.insert(0, sys.argv[1])
    from tests.test_systems import Collected
    plugin = Collected()
    pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *sys.argv[3:]], [plugin])
    json.dump(plugin.tests, open(sys.argv[2], "w"))
    """
  with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(folder) / "tests.json"
    argv = [sys.executable, "-c", code, str(ROOT), str(out), *files]
    done = subprocess.run(argv, cwd=root, capture_output=True, text=True)
    assert out.exists(), done.stdout + done.stderr
    return json.loads(out.read_text())


def test_every_system_names_tests_that_run():
  named = {s.name: s.tests for s in systems.all_systems()}
  assert named, "no systems"
  files = sorted({t.split("::")[0] for tests in named.values() for t in tests})
  missing = [f for f in files if not (ROOT / f).is_file()]
  collected = collect(ROOT, [f for f in files if f not in missing])
  wrong = {name: problems(tests, collected) for name, tests in named.items()}
  assert not any(wrong.values()), {k: v for k, v in wrong.items() if v}


def test_wrong_node_ids_are_found(tmp_path):
  (tmp_path / "test_planted.py").write_text(
    textwrap.dedent(
      """
      import pytest
      def test_runs(): pass
      @pytest.mark.parametrize("x", [1, 2])
      def test_many(x): pass
      @pytest.mark.skip
      def test_marked(): pass
      def test_first():
        "Docstring."
        pytest.skip("later")
      def test_sometimes():
        if True:
          pytest.skip("not here")
      @pytest.mark.skip
      class TestGroup:
        def test_in(self): pass
      """
    )
  )
  collected = collect(tmp_path, ["test_planted.py"])
  at = "test_planted.py::".__add__
  assert (
    problems([at("test_runs"), at("test_many"), at("test_many[1]"), at("test_sometimes")], collected) == []
  )
  assert problems([at("test_many[3]")], collected) == [at("test_many[3]: no such test")]
  assert problems([at("test_gone")], collected) == [at("test_gone: no such test")]
  assert problems([at("test_marked")], collected) == [at("test_marked: always skipped")]
  assert problems([at("test_first")], collected) == [at("test_first: always skipped")]
  assert problems([at("TestGroup::test_in")], collected) == [at("TestGroup::test_in: always skipped")]
  assert problems([at("test_runs")] * 2, collected) == [at("test_runs: named twice")] * 2


@pytest.fixture
def two(monkeypatch, tmp_path):
  """A configs folder of two systems."""
  text = textwrap.dedent(
    """
    import ml_collections
    VARIANTS = ("tiny",)
    def get_config(variant=""):
      paper = dict(title="Block diffusion", arxiv="2503.09573", row=6)
      return ml_collections.ConfigDict(dict(name="b", paper=paper, tests=("tests/a.py::test_x",)))
    """
  )
  for name in ("language/b", "vision/a"):
    (tmp_path / name).parent.mkdir()
    (tmp_path / f"{name}.py").write_text(text)
  monkeypatch.setattr(config.files, "configs_root", lambda: tmp_path)
  return tmp_path


def test_listing(two, capsys):
  systems.main([])
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[0] for line in lines] == ["system", "language/b", "vision/a"]
  assert lines[1].split()[1:5] == ["tiny", "6", "2503.09573", "1"] and lines[1].endswith("Block diffusion")
  systems.main(["--json"])
  listed = json.loads(capsys.readouterr().out)
  assert listed[0] == {
    "name": "language/b",
    "paper": {"title": "Block diffusion", "arxiv": "2503.09573", "row": 6},
    "variants": ["tiny"],
    "tests": ["tests/a.py::test_x"],
  }


@pytest.mark.parametrize(
  "old, new, words",
  [
    ("row=6", "row=274", "language/b.paper.row = 274: row must be"),
    ('title="Block diffusion", ', "", "language/b.paper.title: missing"),
    ('("tests/a.py::test_x",)', "()", "language/b.tests = (): tests is empty"),
    ("test_x", "test_x", None),
    ("::", ".", "is no node id"),
  ],
)
def test_incomplete_systems_are_refused(two, old, new, words):
  path = two / "language" / "b.py"
  path.write_text(path.read_text().replace(old, new))
  if words is None:  # control: the unchanged file is accepted
    assert systems.system("language/b").paper.row == 6
    return
  with pytest.raises(ConfigError) as e:
    systems.system("language/b")
  assert words in str(e.value)


def test_a_test_named_twice_is_refused():
  with pytest.raises(ValueError, match="twice"):
    System("x", Paper("T"), (), ("tests/a.py::b", "tests/a.py::b"))
