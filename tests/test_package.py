"""What pip installs: the package, with configs/ as `genmodels.configs`."""

import pathlib
import subprocess
import sys

from genmodels import config

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_installed_configs_are_those_of_the_checkout(tmp_path):
  build = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "base"), "--build-lib"]
  egg = ["egg_info", "--egg-base", str(tmp_path)]
  subprocess.run(
    [*build[:3], *egg, *build[3:], str(tmp_path / "lib")], cwd=ROOT, check=True, capture_output=True
  )
  code = "from genmodels import config; print(config.configs_root(), *config.names(), sep='\\n')"
  env = {"PYTHONPATH": str(tmp_path / "lib")}
  done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
  root, *names = done.stdout.split()
  assert pathlib.Path(root) == tmp_path / "lib" / "genmodels" / "configs", done.stderr
  assert names == config.names()
  assert (pathlib.Path(root) / "__init__.py").is_file()
