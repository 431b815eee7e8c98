"""A decoder over two frozen networks: from two runs, through training, evaluation, sampling and export."""

import contextlib
import io
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from genmodels import cli, config, optim, system
from genmodels import state as states
from genmodels import step as steps
from genmodels.checkpoint import init, tensors
from genmodels.checkpoint.manager import Manager
from genmodels.config import ConfigError
from genmodels.evals.texts import TextConfig, TextModel
from genmodels.parallel import mesh as meshes
from genmodels.parallel import rules
from genmodels.sampling import run as runs
from tests.checkpoint import folders

DECODER = "heads/infill/kernel"


def verb(*argv):
  """A verb in this process: (exit status, stdout, stderr)."""
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    status = cli.main([str(x) for x in argv])
  return status, out.getvalue(), err.getvalue()


def begun(name: str, workdir: pathlib.Path, *overrides) -> dict:
  """A run of a system that has saved its first state and taken no step; the leaves of its model."""
  cfg = config.load(f"{name}:tiny", overrides)
  mesh = meshes.make_mesh(meshes.MeshConfig(data=1), jax.devices()[:1])
  parts = system.build(cfg, workdir=str(workdir), mesh=mesh)
  ocfg = config.build(optim.OptimConfig, cfg.optim, "optim")
  program = steps.program(parts, steps.StepConfig(), ocfg, int(cfg.train.steps), mesh)
  with rules.use_mesh(mesh):
    state = program.fresh(jax.random.key(int(cfg.seed)))
  manager = Manager(workdir / init.CHECKPOINTS)
  manager.save(1, state.replace(step=state.step + 1))
  manager.close()
  config.write_json(workdir / "config.json", config.plain(cfg))
  config.write_json(workdir / "resolved.json", config.resolved({"model": parts.model.cfg}))
  return {k: np.asarray(v) for k, v in states.param_paths(state.trees["model"]).items()}


def tree(workdir, name) -> dict:
  values = init.open_folder(str(workdir)).read(
    None, lambda n, _: jax.sharding.SingleDeviceSharding(jax.devices()[0])
  )
  prefix = f"trees/{name}/"
  return {k.removeprefix(prefix): np.asarray(v) for k, v in values[0].items() if k.startswith(prefix)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """(workdir, leaves of the two runs that it started from, messages) of a run of one step at rate 0; the masked
  network is narrower."""
  root = tmp_path_factory.mktemp("two")
  text = ("data.documents=20", f"data.path={root / 'python'}")
  first = begun("language/ar", root / "ar", "seed=1", *text)
  second = begun(
    "language/mdlm", root / "mdlm", "seed=2", "model.width=48", "model.mlp=80", "train.ema=0.0", *text
  )
  argv = (
    "train", "--config", "language/maria:tiny", "--workdir", root / "maria", *text, "init.kind=workdir",
    f"init.path={root / 'ar'}", f"init.scratch=('{DECODER}',)", f"init.beside.mlm.path={root / 'mdlm'}",
    "train.steps=1", "eval.every=0", "optim.lr=0.0", "optim.schedule={'kind':'constant'}",
  )  # fmt: skip
  status, _, err = verb(*argv)
  assert status == 0, err
  return root, first, second, err, argv


@pytest.mark.full
def test_both_networks_come_from_their_runs(made):
  root, first, second, err, _ = made
  assert (
    f"model from 'model' of {root / 'ar'}" in err and f"mlm from 'model' of {root / 'mdlm'}, step 1" in err
  )
  model, mlm = tree(root / "maria", "model"), tree(root / "maria", "mlm")
  kernel = model.pop(DECODER)
  assert model.keys() == first.keys() and mlm.keys() == second.keys()
  for mine, theirs in ((model, first), (mlm, second)):
    for name, x in theirs.items():
      np.testing.assert_array_equal(mine[name], x, err_msg=name)
  halves = np.concatenate([first["heads/text/kernel"], second["heads/text/kernel"]]) / 2
  vocab = json.loads((root / "maria" / "resolved.json").read_text())["model"]["vocab"]
  np.testing.assert_array_equal(kernel[:, :vocab], halves[:, :vocab])
  assert kernel.shape[0] == 64 + 48 and not kernel[:, vocab:].any()
  stored = json.loads((root / "maria" / "config.json").read_text())
  assert stored["trees"]["mlm"]["model"]["width"] == stored["model"]["heads"]["infill"]["width"] == 48


@pytest.mark.full
def test_a_run_is_evaluated_sampled_and_exported(made):
  """With both sources gone: what a run needs is in its workdir."""
  root, first, *_ = made
  workdir = root / "maria"
  run = runs.load_run(workdir, overrides=("data.path=" + str(root / "python"),))
  assert set(run.trees) == {"model", "mlm"}
  status, out, err = verb(
    "sample", "--workdir", workdir, "--prompt", "def ", "--suffix", "return", "--length", 20, "--json"
  )
  assert status == 0, err
  got = json.loads(out)
  assert got["samples"][0]["text"].endswith("return") and got["tokens"] == 20 - 1 - len("def return")
  assert got["forwards"] == got["tokens"] + 2 and got["cache"] == "causal_exact"
  texts = TextModel(run, TextConfig(batch_size=2, length=24))
  (score,) = texts.score([("def ", "main(")])
  assert texts.exact and score.tokens == 6 and -6 * 6 < score.nats < -6 * 5  # random networks over 257 tokens
  assert len(texts.generate(["def "], new=4)) == 1
  out = root / "hf"
  status, said, err = verb("export", workdir, out, "--layout", "llama")
  assert status == 0, err
  assert "decoder.safetensors holds infill" in said and "draft heads" not in said
  weight = tensors.header(out / "decoder.safetensors")[0]["infill.weight"].open()
  assert weight.shape == (260, 64 + 48)
  np.testing.assert_array_equal(weight, tree(workdir, "model")[DECODER][:, :260].T)
  names = tensors.header(out / tensors.SINGLE)[0]
  np.testing.assert_array_equal(names["lm_head.weight"].open(), first["heads/text/kernel"][:, :260].T)
  status, said, err = verb("export", workdir, root / "mlm", "--layout", "llama", "--tree", "mlm")
  assert status == 0 and "decoder" not in said, err
  table = tensors.header(root / "mlm" / tensors.SINGLE)[0]["model.embed_tokens.weight"].open()
  np.testing.assert_array_equal(table, tree(workdir, "mlm")["embed/tokens/embedding"][:260])


@pytest.mark.full
def test_a_run_goes_on_without_its_sources(made):
  root, *_, argv = made
  shutil.copytree(root / "maria", root / "again")
  moved = [str(x).replace(str(root / "mdlm"), str(root / "gone")) for x in argv]
  moved[moved.index(str(root / "maria"))] = str(root / "again")
  status, _, err = verb(*moved, "train.steps=2", "optim.lr=1e-2")
  assert status == 0 and "continuing from" in err, err
  before, after = tree(root / "maria", "model"), tree(root / "again", "model")
  assert {n for n in before if not np.array_equal(before[n], after[n])} == {DECODER}
  np.testing.assert_equal(tree(root / "again", "mlm"), tree(root / "maria", "mlm"))


@pytest.mark.full
def test_both_networks_come_from_imports(tmp_path, monkeypatch):
  """A Qwen3 folder with a tied head and a LLaDA folder, one vocabulary: the second one's shape is its own."""
  monkeypatch.setattr(tensors, "sync", lambda path: None)
  for kind in ("qwen3_tied", "llada"):
    src, _ = folders.make(tmp_path / kind, kind)
    folders.tokenizer(src)
    assert verb("import", src, tmp_path / f"{kind}_import")[0] == 0
  status, _, err = verb(
    "train", "--config", "language/maria:tiny", "--from", tmp_path / "qwen3_tied_import", "--workdir",
    tmp_path / "run", f"init.beside.mlm.path={tmp_path / 'llada_import'}", "objective.mask_id=299",
    "data.documents=20", "train.steps=1", "eval.every=0", "optim.lr=0.0", "optim.schedule={'kind':'constant'}",
  )  # fmt: skip
  assert status == 0, err
  model, mlm = tree(tmp_path / "run", "model"), tree(tmp_path / "run", "mlm")
  first, second = model["embed/tokens/embedding"].T, mlm["heads/text/kernel"]
  want = np.concatenate([first[:, :300], second[:, :300]]).astype(np.float32) / 2
  np.testing.assert_array_equal(model[DECODER][:, :300], want)
  theirs = tree(tmp_path / "llada_import", "model")
  assert mlm.keys() == theirs.keys()
  for name, x in theirs.items():
    np.testing.assert_array_equal(mlm[name], x, err_msg=name)
  status, out, err = verb(
    "sample", "--workdir", tmp_path / "run", "--suffix", "return", "--length", 24, "--json"
  )
  assert status == 0 and json.loads(out)["tokens"] > 0, err


def test_shapes_that_are_not_there(tmp_path):
  from genmodels.checkpoint import adopt

  cfg = config.load("language/maria:tiny", [f"init.beside.mlm.path={tmp_path / 'no'}"])
  with pytest.raises(FileNotFoundError, match="neither a run's workdir nor an import"):
    adopt.networks(cfg, str(tmp_path / "run"))
  wrong = {"kind": "workdir", "path": "x", "beside": {"mlm": {"path": "y", "mask_row": "noise"}}}
  with pytest.raises(ConfigError, match="mask_row"):
    config.build_kind(init.REGISTRY, wrong, "init")
