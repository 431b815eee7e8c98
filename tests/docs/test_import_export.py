"""The commands of docs/import_export.md, on a random-weight Qwen3 folder and a tokenizer trained here."""

import json
import pathlib
import re
import shlex

import numpy as np
import pytest

from genmodels import cli
from genmodels.checkpoint import hf_config, hf_import, tensors
from tests.checkpoint import folders

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "import_export.md"
SMALL = (
  "train.steps=8", "train.save_every=0", "train.tensorboard=false", "eval.documents=2", "eval.draws=2",
  "data.seq_len=32", "batch_size=8",
)  # fmt: skip


def commands():
  """The first code block, a list of arguments each."""
  block = re.search(r"```bash\n(.*?)```", PAGE.read_text(), re.S).group(1)
  return [shlex.split(line) for line in block.splitlines()]


def test_the_page_lists_every_layout_and_refusal():
  text = PAGE.read_text()
  assert all(f"`{name}`" in text for name in {*hf_config.MODEL_TYPES, *hf_config.MODEL_TYPES.values()})
  assert [c[1] for c in commands()] == ["import", "prepare", "train", "export"]


@pytest.mark.parity
def test_the_commands(tmp_path, monkeypatch, capsys):
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(tensors, "sync", lambda path: None)
  src, named = folders.make(tmp_path / "Qwen3-4B", "qwen3", folders.BF16, shards=2)
  folders.tokenizer(src, bos=False)
  (tmp_path / "corpus").mkdir()
  for i in range(40):
    (tmp_path / "corpus" / f"{i}.txt").write_text(f"{i} {folders.TEXT}")
  by_verb = {c[1]: c[1:] for c in commands()}
  at = lambda text: text.replace("~/checkpoints/Qwen3-4B", str(src))
  run = lambda verb, *more: cli.main([*map(at, by_verb[verb]), *more])
  assert run("import") == 0
  assert run("prepare", "--heldout", "0.2") == 0
  by_verb["train"] = [t.replace("language/sdar", "language/sdar:tiny") for t in by_verb["train"]]
  assert run("train", *SMALL) == 0
  out = capsys.readouterr().out
  assert "model and parameters of" in out and "done: step 8" in out
  assert run("export") == 0

  # transformers reads it; the weights have moved, the mask row has a sound norm, the tokenizer is the source's.
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "sdar")
  assert model.dtype == torch.bfloat16 and type(model).__name__ == "Qwen3ForCausalLM"
  ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "sdar")(
    "the cat", return_tensors="pt"
  ).input_ids
  assert torch.isfinite(model(ids).logits).all()
  back = {n: t.open() for n, t in tensors.folder(tmp_path / "out" / "sdar").items()}
  assert set(back) == set(named)
  table, was = (x["model.embed_tokens.weight"].astype(np.float32) for x in (back, named))
  config = json.loads((tmp_path / "out" / "sdar" / "config.json").read_text())
  mask = config["mask_token_id"]
  norms = np.linalg.norm(table, axis=1)
  assert 0.5 * np.median(norms) <= norms[mask] <= 2 * np.median(norms)
  assert 0 < np.abs(np.delete(table - was, mask, 0)).max() < 0.1  # trained on from there, 8 steps
  assert config["diffusion"]["logit_alignment"] == "same_position" and config["block_size"] == 4
  assert (tmp_path / "out" / "sdar" / "tokenizer.json").read_bytes() == (src / "tokenizer.json").read_bytes()

  # The published layout, key by key; and it is imported again as what it says it is.
  assert run("export", "--layout", "sdar") == 2  # the folder exists
  by_verb["export"][2] = "out/published"
  assert run("export", "--layout", "sdar") == 0
  assert set(tensors.folder(tmp_path / "out" / "published")) == set(folders.keys("sdar"))
  again = hf_import.import_folder("out/published", "runs/again")
  facts = json.loads((tmp_path / "runs" / "again" / "config.json").read_text())["objective"]
  assert again.manifest["layout"] == "sdar" and facts["mask_id"] == mask
  assert facts["corruption"]["blocks"]["size"] == 4


def test_data_of_another_tokenizer_are_refused(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(tensors, "sync", lambda path: None)
  src, _ = folders.make(tmp_path / "src", "qwen3")
  folders.tokenizer(src)
  assert cli.main(["import", str(src), str(tmp_path / "dst")]) == 0
  (tmp_path / "text.txt").write_text(folders.TEXT)
  assert (
    cli.main(["prepare", str(tmp_path / "text.txt"), "--out", str(tmp_path / "data"), "--heldout", "0"]) == 0
  )
  train = [
    "train",
    "--config",
    "language/ar:tiny",
    "--from",
    str(tmp_path / "dst"),
    "--workdir",
    str(tmp_path / "run"),
  ]
  assert cli.main([*train, f"data.path={tmp_path / 'data'}"]) == 2
  error = capsys.readouterr().err
  assert "tokenised by another tokenizer" in error and f"--tokenizer {tmp_path / 'dst'}" in error
  assert not (tmp_path / "run" / "config.json").exists()
