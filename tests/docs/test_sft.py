"""The commands of docs/sft.md, on a random-weight Qwen3 folder and questions about the standard library."""

import json
import pathlib
import re
import shlex

import pytest

from genmodels import cli
from genmodels.checkpoint import tensors
from genmodels.data import chat, records
from tests.checkpoint import folders

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "sft.md"
TEMPLATE = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SMALL = (
  "train.save_every=0", "train.log_every=5", "train.tensorboard=false", "eval.documents=8", "eval.draws=4",
  "eval.every=10", "optim.lr=1e-2",
)  # fmt: skip


def commands():
  """The first code block, a list of arguments each."""
  block = re.search(r"```bash\n(.*?)```", PAGE.read_text(), re.S).group(1)
  return {c[1]: c[1:] for c in map(shlex.split, block.splitlines())}


def test_the_page_names_what_there_is():
  text = PAGE.read_text()
  assert list(commands()) == ["import", "prepare", "train", "export"]
  for word in (*chat.LEARN, *chat.TOO_LONG, *chat.PADS, *chat.NAMED):
    assert f"{word}" in text
  reasons = set(re.findall(r'Malformed\(\s*"([^"]+)"', pathlib.Path(chat.__file__).read_text()))
  assert len(reasons) > 6 and all(r in text.replace("\n", " ") for r in reasons), reasons


@pytest.mark.slow
def test_the_commands(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(tensors, "sync", lambda path: None)
  src, named = folders.make(tmp_path / "Qwen3-4B", "qwen3", folders.BF16, shards=2)
  folders.tokenizer(src, bos=False)
  (src / "chat_template.jinja").write_text(TEMPLATE)
  talks = [{"messages": list(t.messages)} for t in chat.read_python_docs(150)]
  (tmp_path / "chats.jsonl").write_text("".join(json.dumps(t) + "\n" for t in [*talks, {"messages": []}]))
  by_verb = commands()
  at = lambda text: text.replace("~/checkpoints/Qwen3-4B", str(src)).replace("sdar:sft", "sdar:sft_tiny")
  run = lambda verb, *more: cli.main([*map(at, by_verb[verb]), *more])
  assert run("import") == 0
  assert run("prepare", "--heldout", "0.2", "--max-length", "192") == 0
  out = capsys.readouterr().out
  assert "1 no messages" in out
  meta = records.read_manifest("data/chat/train")
  assert meta["meta"]["reasons"]["no messages"] == 1 and meta["documents"] > 60
  assert run("train", *SMALL, "train.steps=20") == 0
  log = [json.loads(line) for line in open("runs/sdar/metrics.jsonl")]
  held = [entry["eval/bits_per_token"] for entry in log if "eval/bits_per_token" in entry]
  assert len(held) >= 2 and held[-1] < held[0]
  assert run("export") == 0
  assert (tmp_path / "out" / "sdar" / "chat_template.jinja").read_text() == TEMPLATE
