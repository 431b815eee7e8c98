"""From a workdir to samples and numbers: the verbs `sample` and `eval` on a checkpoint (no training)."""

import json
import math
import types

import jax
import numpy as np
import pytest

from genmodels import config, evals, sampling, system
from genmodels import state as states
from genmodels.checkpoint import manager as checkpoints
from genmodels.config import ConfigError
from genmodels.data import chat, tokenizers
from genmodels.evals import main as eval_main
from genmodels.sampling import main as sample_main
from genmodels.sampling import run as runs


def workdir(path, name, overrides=(), step=3, ema=False):
  """A workdir as a training run leaves it, with fresh parameters."""
  cfg = config.load(name, list(overrides))
  parts = system.build(cfg, workdir=str(path))
  params = jax.jit(parts.model.init)(jax.random.key(1))
  trees = {"model": params}
  if ema:
    cfg.train.ema = 0.9
    trees["ema"] = jax.tree.map(lambda x: 0 * x, params)
  config.write_json(path / "config.json", config.plain(cfg))
  state = states.create(trees, {})
  with_step = states.TrainState(state.step + step, state.trees, state.opt, state.stats)
  saver = checkpoints.Manager(path / "checkpoints")
  saver.save(step, with_step)
  saver.close()
  return parts, params


def out(capsys) -> dict:
  return json.loads(capsys.readouterr().out)


def test_chats_are_rendered_as_the_data_were(tmp_path):
  """The template beside the data, else the one that an import brought, else one that is named; none is an
  error."""
  t = tokenizers.ByteTokenizer()
  parts = types.SimpleNamespace(data=types.SimpleNamespace(tokenizer=t, folder=str(tmp_path)))
  talk = [{"role": "user", "content": "hi"}]
  text = lambda *a: t.decode(runs.chat_ids(parts, [talk], *a)[0][0])
  with pytest.raises(ConfigError, match="not trained on conversations"):
    text()
  assert text("plain") == "user: hi\nassistant: "
  carried = tmp_path / "hf"
  carried.mkdir()
  (carried / "chat_template.jinja").write_text(chat.PLAIN.replace(": ", "> "))
  assert text("", str(carried)) == "user> hi\nassistant> "
  chat.Template(chat.CHATML, {}, "chatml").save(str(tmp_path))
  assert text("", str(carried)) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
  assert runs.chat_ids(parts, [talk])[1] == t.specials["eos"]  # bytes spell no special token
  with pytest.raises(ConfigError, match="--chat"):
    runs.chat_ids(parts, [talk], str(tmp_path / "no.jinja"))


@pytest.mark.full
def test_chat(tmp_path, capsys):
  data = ("data.content=documentation", "data.documents=30", "data.seq_len=128")
  workdir(tmp_path, "language/ar:tiny", data)
  lines = tmp_path / "talks.jsonl"
  lines.write_text(
    json.dumps(
      [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
      ]
    )
    + "\n"
  )
  args = [
    "--workdir",
    str(tmp_path),
    "--chat",
    "--prompt",
    "why?",
    "--prompts-file",
    str(lines),
    "--length",
    "48",
  ]
  assert sample_main.main([*args, "--json", "temperature=0"]) == 0
  got = out(capsys)["samples"]
  t = tokenizers.ByteTokenizer()
  for sample, want in zip(
    got, ("user: why?\nassistant: ", "user: a\nassistant: b\nuser: c\nassistant: "), strict=True
  ):
    assert sample["tokens"][: len(want)] == list(want.encode()) and len(sample["tokens"]) > len(want)
  assert t.specials["eos"] == 257
  with pytest.raises(SystemExit):
    sample_main.main(["--workdir", str(tmp_path), "--chat"])
  assert "answers somebody" in capsys.readouterr().err
  lines.write_text("why?\n")
  with pytest.raises(SystemExit):
    sample_main.main(["--workdir", str(tmp_path), "--chat", "--prompts-file", str(lines)])
  assert "JSON list" in capsys.readouterr().err


@pytest.mark.slow
def test_images(tmp_path, capsys):
  parts, params = workdir(tmp_path, "vision/raster_digits:tiny")
  run = sampling.load_run(tmp_path)
  assert run.step == 3
  jax.tree.map(np.testing.assert_array_equal, run.trees["model"], params)
  # A head that starts at zero is uniform over the grey levels: the exact likelihood is known.
  assert eval_main.main(["--workdir", str(tmp_path), "--documents", "20", "--json"]) == 0
  got = out(capsys)
  levels = 17
  assert got["exact"] and got["documents"] == 20
  assert got["bits_per_token"] == pytest.approx(math.log2(levels), rel=1e-5)
  assert got["bits_per_byte"] == pytest.approx(math.log2(levels), rel=1e-5)  # a pixel is a token
  args = ["--workdir", str(tmp_path), "--labels", "3,7", "--n", "2", "--json", "guidance.scale=1.0"]
  assert sample_main.main(args) == 0
  got = out(capsys)
  assert [s["prompt"] for s in got["samples"]] == [3, 3, 7, 7] and got["cache"] == "causal_exact"
  assert all(s["done"] and len(s["tokens"]) == 65 for s in got["samples"])
  assert (tmp_path / "samples" / "sample.png").stat().st_size > 100


@pytest.mark.slow
def test_text(tmp_path, capsys):
  overrides = ["data.documents=40", "data.heldout=0.3"]
  parts, params = workdir(tmp_path, "language/bd3lm:tiny", overrides, ema=True)
  run = sampling.load_run(tmp_path)
  assert all(float(abs(x).max()) == 0 for x in jax.tree.leaves(run.trees["model"]))  # the average is taken
  args = [
    "--workdir",
    str(tmp_path),
    "--prompt",
    "def ",
    "--prompt",
    "",
    "--length",
    "24",
    "--json",
    "top_p=1.0",
  ]
  assert sample_main.main(args) == 0
  first = out(capsys)
  assert first["cache"] == "block_exact" and len(first["samples"]) == 2
  for s in first["samples"]:
    assert s["done"] and len(s["tokens"]) <= 24 and parts.objective.mask_id not in s["tokens"]
    assert min(s["committed_at"]) == -1 and max(s["committed_at"]) < first["steps"]
  assert sample_main.main(args) == 0
  assert out(capsys)["samples"] == first["samples"]
  text = tmp_path / "text.txt"
  text.write_text("héllo\n" * 40)
  with pytest.warns(UserWarning, match="trained with 4"):
    eval_main.main(
      ["--workdir", str(tmp_path), "--file", str(text), "--draws", "2", "--block", "8", "--json"]
    )
  got = out(capsys)
  assert got["block"] == 8 and not got["exact"] and any("trained with 4" in n for n in got["notes"])
  assert got["bytes"] == 7 * 40  # é is two bytes; BOS is given, EOS is predicted and is no byte
  assert got["tokens"] == 7 * 40 + 1
  # All weights zero: uniform over the vocabulary without the mask.
  assert got["bits_per_token"] == pytest.approx(math.log2(parts.model.cfg.vocab - 1), rel=1e-5)
  evaluator = evals.Evaluator(evals.EvalConfig(documents=5, draws=2), run.parts, run.mesh, jax.random.key(0))
  assert evaluator(run.trees, run.step)["documents"] == 5


@pytest.mark.full
def test_speculation_by_config(tmp_path, capsys):
  """Three drafters by their keys; greedy ids are those of plain decoding."""
  workdir(tmp_path, "language/tidar:tiny", ["data.documents=40"])
  args = ["--workdir", str(tmp_path), "--prompt", "def ", "--prompt", "", "--length", "24", "--json"]
  rows, forwards = {}, {}
  for name, draft in {
    "plain": ["draft.kind=plain"],
    "tidar": [],
    "ngram": ["draft.kind=ngram"],
    "model": ["draft.kind=model", f"draft.path={tmp_path}", "draft.size=3"],
  }.items():
    assert sample_main.main([*args, "temperature=0.0", *draft]) == 0
    got = out(capsys)
    rows[name], forwards[name] = [s["tokens"] for s in got["samples"]], got["forwards"]
    assert all(s["done"] for s in got["samples"]) and got["cache"] == "causal_exact"
    assert rows[name] == rows["plain"]
  assert forwards["model"] < forwards["plain"] / 3  # it drafts with the target's own weights


def test_a_folder_without_a_run_says_so(tmp_path):
  with pytest.raises(FileNotFoundError, match="--workdir"):
    sampling.load_run(tmp_path)
