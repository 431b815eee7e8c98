"""The file that docs/add_an_objective.md shows is a system that trains."""

import dataclasses
import pathlib
import re

import jax
import numpy as np
import pytest

from genmodels import config, evals, objectives, system, train
from genmodels.config import ConfigError
from genmodels.sampling.run import load_run

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "add_an_objective.md"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
  """The page's code block as a file."""
  blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
  assert len(blocks) == 1
  path = tmp_path_factory.mktemp("reweighted") / "reweighted.py"
  path.write_text(blocks[0])
  return path


@pytest.fixture(scope="module")
def trained(file):
  small = [
    "train.steps=8", "train.save_every=0", "train.tensorboard=false", "eval.documents=8", "eval.every=8",
    "eval.draws=2", "data.seq_len=32", "data.documents=12", "data.heldout=0.3",
  ]  # fmt: skip
  return train.train(config.load(str(file), small), str(file.parent / "run"))


def test_the_file_trains_evaluates_and_samples(trained, file):
  assert trained.step == 8 and np.isfinite(trained.last["loss"])
  run = load_run(file.parent / "run")  # the stored config still finds the class
  assert type(run.parts.objective).__name__ == "Reweighted"
  assert run.parts.objective.beta == 2.0


def test_likelihood_is_not_reweighted(trained):
  """The bound that is reported is the plain one: alpha and beta change the loss alone."""
  parts = trained.system
  key = jax.random.key(0)
  row = system.row_of(parts.data.batch(0))

  @jax.jit
  def both(params):
    out = {}
    for name, objective in (("weighted", parts.objective), ("plain", plain)):
      nets = objectives.Nets({"model": lambda *a: parts.model.apply(params, *a)})
      out[name] = objective.run(nets, row, key, 0)[0]["diffusion"], objective.bound(nets, row, key, 0, 2)[0]
    return out

  fields = {f.name: getattr(parts.objective, f.name) for f in dataclasses.fields(objectives.Objective)}
  plain = objectives.Objective(**fields)
  got = jax.device_get(both(trained.state.trees["model"]))
  np.testing.assert_allclose(got["weighted"][1], got["plain"][1], rtol=1e-6)
  assert got["weighted"][0] < 0.999 * got["plain"][0]  # v < 1 for alpha = 1
  assert trained.evals[-1][evals.METRIC] > 0


@pytest.mark.parametrize(
  "override, words",
  [
    ("objective.betta=1.0", "did you mean 'beta'"),
    ("objective.beta=-1.0", "at least 0"),
    ("objective.kind=nowhere.py:Reweighted", "nowhere.py"),
    ("objective.kind=genmodels.contracts:Row", "no class Row derived from"),
  ],
)
def test_errors_name_the_key(file, override, words):
  cfg = config.load(str(file), [override])
  with pytest.raises(ConfigError) as e:
    objectives.build(cfg.objective, {"mask_id": 258})
  assert words in str(e.value) and "objective." in str(e.value)
