"""The survey of held-out losses: what it finds stands in the state, and a resumed run finds it again."""

import io
import shutil

import jax
import numpy as np
import pytest

from genmodels import config, train

SMALL = (
  "data.documents=40", "data.seq_len=32", "model.layers=1", "model.width=32", "train.tensorboard=False",
  "train.steps=4", "train.save_every=2", "train.log_every=1", "eval.every=0", "optim.schedule.warmup=1",
  "objective.corruption.search.every=2", "objective.corruption.search.draws=2",
)  # fmt: skip


@pytest.mark.full
def test_a_resumed_run_finds_what_the_whole_one_found(tmp_path):
  out = io.StringIO()
  more = (*SMALL, f"data.path={tmp_path / 'python'}")
  go = lambda folder: train.train(config.load("language/bd3lm:tiny", more), str(tmp_path / folder), out=out)
  straight = go("straight")
  assert out.getvalue().count("survey of held-out losses") == 2
  band = np.asarray(straight.state.stats["objective"]["band"])
  assert 0.5 - 1e-6 <= band[1] - band[0] <= 0.9 + 1e-6  # no longer the whole of [0, 1]
  shutil.copytree(tmp_path / "straight/checkpoints/2", tmp_path / "parts/checkpoints/2")
  resumed = go("parts")
  bits = lambda x: np.asarray(x).tobytes()
  jax.tree.map(lambda x, y: bits(x) == bits(y) or pytest.fail("states differ"), straight.state, resumed.state)
  # What was found at step 2 was in the checkpoint and was drawn by: another band is another run.
  assert out.getvalue().count("survey of held-out losses") == 3
