"""The import contract (pyproject.toml, [tool.importlinter]) holds, and it can fail."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


def lint(folder: pathlib.Path) -> tuple[int, str]:
  code = "import sys; from importlinter.cli import lint_imports_command as c; c(['--no-cache'])"
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=folder, env={"PYTHONPATH": str(folder)}, capture_output=True, text=True
  )
  return done.returncode, done.stdout + done.stderr


def test_contract_holds():
  status, text = lint(ROOT)
  assert status == 0, text


# An import that each contract must refuse, inside a function: (room, import, contract).
FORBIDDEN = [
  ("masks", "from genmodels import cli", "A room imports only rooms below it"),
  ("objectives", "from genmodels import models", "Objectives are handed nets and rows"),
  ("data", "from genmodels import contracts", "Data imports nothing of ours but config"),
  ("data", "import jax", "Data imports nothing of ours but config"),
  ("checkpoint", "from genmodels import objectives", "Checkpoints know no objective"),
  ("evals", "from genmodels import train", "Nothing imports train but cli, quickstart and the studies"),
  ("sampling", "import flax.linen", "Flax stays in models and latents"),
  ("objectives", "import orbax.checkpoint", "Orbax stays in checkpoint"),
  ("optim", "import grain", "Grain stays in data"),
  ("systems", "import jax", "The command line and the configs load without jax"),
]


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
  """What the linter says of a copy of the package in which every contract is broken lazily."""
  folder = tmp_path_factory.mktemp("broken")
  shutil.copytree(ROOT / "genmodels", folder / "genmodels", ignore=shutil.ignore_patterns("__pycache__"))
  shutil.copy(ROOT / "pyproject.toml", folder)
  for room, line, _ in FORBIDDEN:
    package = folder / "genmodels" / room
    path = package / "planted.py" if package.is_dir() else package.with_suffix(".py")
    with path.open("a") as f:
      f.write(f"\n\ndef planted():\n  {line}\n")
  return lint(folder)


@pytest.mark.parametrize("room, line, contract", FORBIDDEN)
def test_contract_counts_lazy_imports(broken, room, line, contract):
  status, text = broken
  assert status == 1, text
  assert re.search(rf"{contract}[^.\n]*\sBROKEN", text), text
  module = line.removeprefix("import ").replace("from genmodels import ", "genmodels.").split(".")
  imported = ".".join(module[:2]) if module[0] == "genmodels" else module[0]
  assert any(f"genmodels.{room}" in t and f"-> {imported}" in t for t in text.splitlines()), text


def test_undeclared_room_is_refused(tmp_path):
  shutil.copytree(ROOT / "genmodels", tmp_path / "genmodels", ignore=shutil.ignore_patterns("__pycache__"))
  shutil.copy(ROOT / "pyproject.toml", tmp_path)
  (tmp_path / "genmodels" / "utils.py").write_text("")
  status, text = lint(tmp_path)
  assert status == 1 and "utils" in text, text
