"""Tokenizers and `genmodels prepare`."""

import gzip
import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from genmodels.data import prepare, records, tokenizers

WORDS = ["def", "return", "naïve", "☃ snow", "x = 1", "for i in range(10):", "<mask>", "\n\t"]
TEXTS = [" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 30)) + str(i) for i in range(50)]


@pytest.mark.parametrize("name", ["byte", "bpe"])
def test_tokenizers_round_trip_and_count_bytes(name, tmp_path):
  t = tokenizers.ByteTokenizer() if name == "byte" else tokenizers.train_bpe(TEXTS, 300)
  for text in [*TEXTS, "", "unseen 漢字 \x00"]:
    ids = t.encode(text)
    assert t.decode(ids) == text
    assert t.token_bytes()[ids].sum() == len(text.encode())
    assert not set(ids.tolist()) & set(t.specials.values())  # text that spells <mask> is text
  for a, b in zip(t.encode_batch(TEXTS), TEXTS):
    assert np.array_equal(a, t.encode(b))
  assert sorted(t.specials.values()) == list(range(t.vocab_size - 4, t.vocab_size))
  assert t.decode([t.specials["bos"], *t.encode("ab"), t.specials["mask"]]) == "ab"
  t.save(str(tmp_path))
  again = tokenizers.load(str(tmp_path))
  assert again.hash == t.hash and again.specials == t.specials and again.vocab_size == t.vocab_size


def test_training_is_deterministic_and_the_hash_tells_vocabularies_apart():
  a, b, c = (tokenizers.train_bpe(TEXTS, n) for n in (300, 300, 290))
  assert a.hash == b.hash != c.hash and (a.vocab_size, c.vocab_size) == (300, 290)
  with pytest.raises(ValueError, match="at least 260"):
    tokenizers.train_bpe(TEXTS, 100)


def test_a_foreign_file_gets_the_specials_it_lacks(tmp_path):
  import tokenizers as hf

  t = hf.Tokenizer(hf.models.WordLevel({"a": 0, "b": 1, "[UNK]": 2, "</s>": 3}, unk_token="[UNK]"))
  t.pre_tokenizer = hf.pre_tokenizers.Whitespace()
  t.save(str(tmp_path / "tokenizer.json"))
  got = tokenizers.load(str(tmp_path / "tokenizer.json"))
  assert got.specials["eos"] == 3 and got.vocab_size == 7
  assert sorted([got.specials[k] for k in ("bos", "mask", "pad")]) == [4, 5, 6]
  named = tokenizers.load(str(tmp_path / "tokenizer.json"), {"pad": "[UNK]"})
  assert named.specials["pad"] == 2 and named.vocab_size == 6
  with pytest.raises(ValueError, match="missing"):
    tokenizers.load(str(tmp_path / "no.json"))


@pytest.fixture
def folder(tmp_path):
  """The same 50 texts as files, JSONL (plain, gzip) and Parquet."""
  root = tmp_path / "in"
  (root / "txt").mkdir(parents=True)
  for i, t in enumerate(TEXTS):
    (root / "txt" / f"{i:03d}.txt").write_text(t)
  rows = "\n".join(json.dumps({"text": t, "q": "why?"}) for t in TEXTS)
  (root / "a.jsonl").write_text(rows)
  with gzip.open(root / "b.jsonl.gz", "wt") as f:
    f.write(rows)
  parquet.write_table(pa.table({"text": TEXTS, "q": ["why?"] * 50}), root / "c.parquet")
  return root


@pytest.mark.parametrize("name", ["txt", "a.jsonl", "b.jsonl.gz", "c.parquet"])
def test_every_format_gives_the_same_documents(folder, tmp_path, name, capsys):
  out = str(tmp_path / "out")
  assert prepare.main([str(folder / name), "--out", out, "--heldout", "0.2"]) == 0
  tok = tokenizers.load(out)
  got = {s: [d.tokens for d in (lambda x: x.read(np.arange(len(x))))(records.Dataset(f"{out}/{s}"))]
         for s in ("train", "heldout")}  # fmt: skip
  assert got["train"] and got["heldout"] and len(got["train"]) + len(got["heldout"]) == 50
  assert sorted(tok.decode(t) for s in got.values() for t in s) == sorted(TEXTS)
  first = got["train"][0]
  assert first[0] == tok.specials["bos"] and first[-1] == tok.specials["eos"]
  manifest = records.read_manifest(f"{out}/train")
  assert manifest["context"] == 1 and manifest["tokenizer"]["hash"] == tok.hash
  assert manifest["source_bytes"] == sum(len(tok.decode(t).encode()) for t in got["train"])
  assert "documents" in capsys.readouterr().out
  assert prepare.main(["--verify", out]) == 0


def test_it_is_deterministic_and_splits_by_content(folder, tmp_path):
  for out in ("x", "y"):
    assert prepare.main([str(folder / "a.jsonl"), "--out", str(tmp_path / out), "--heldout", "0.2"]) == 0
  a, b = (records.read_manifest(str(tmp_path / o / "train")) for o in ("x", "y"))
  assert a == b
  # The same document falls on the same side, however often and wherever it stands.
  result = prepare.prepare(TEXTS[::-1] + TEXTS, str(tmp_path / "z"), heldout=0.2)
  assert result["train"]["documents"] == 2 * a["documents"]


def test_prompts_are_context(folder, tmp_path):
  out = str(tmp_path / "out")
  args = [str(folder / "a.jsonl"), "--out", out, "--prompt", "q", "--heldout", "0", "--no-bos"]
  assert prepare.main(args) == 0
  data = records.Dataset(f"{out}/train")
  doc = data.read([0])[0]
  assert data.context == doc.context == len("why?") and bytes(doc.tokens[:4].astype(np.uint8)) == b"why?"
  assert doc.source_bytes == len(TEXTS[0].encode())


def test_bpe_is_trained_on_training_texts_only(tmp_path):
  secret = ["ZQZQZQZQ" * 40 + str(i) for i in range(30)]
  docs = [prepare.Text(t, key="") for t in TEXTS]
  held = [prepare.Text(t, key=f"k{i}") for i, t in enumerate(secret)]
  held = [t for t in held if prepare._held_out(t.key.encode(), 0.3)]
  train = [t for t in docs if not prepare._held_out(t.text.encode(), 0.3)]
  assert held
  prepare.prepare([*train, *held], str(tmp_path / "o"), tokenizer="bpe:400", heldout=0.3)
  vocabulary = tokenizers.load(str(tmp_path / "o"))._tokenizer.get_vocab()
  assert not any("ZQ" in t for t in vocabulary)
  prepare.prepare([*train, *secret], str(tmp_path / "p"), tokenizer="bpe:400", heldout=0.0)
  assert any("ZQ" in t for t in tokenizers.load(str(tmp_path / "p"))._tokenizer.get_vocab())  # control


def test_bad_input_is_named_counted_and_limited(tmp_path, capsys):
  root = tmp_path / "in"
  root.mkdir()
  lines = [json.dumps({"text": t}) for t in TEXTS]
  (root / "a.jsonl").write_text("\n".join([*lines[:10], "{broken", json.dumps({"no": 1}), *lines[10:]]))
  (root / "b.txt").write_bytes(b"\xff\xfe bad utf-8")
  (root / "c.txt").write_text("")
  out = str(tmp_path / "out")
  assert prepare.main([str(root), "--out", out]) == 1
  assert "a.jsonl:11" in (err := capsys.readouterr().err) and "--max-bad" in err
  assert not os.path.exists(out)
  assert prepare.main([str(root), "--out", out, "--max-bad", "0.2"]) == 0
  text = capsys.readouterr().out
  assert "3 unreadable" in text and "1 empty" in text
  assert len(records.read_manifest(f"{out}/train")["meta"]["bad"]) == 3
  parts = [records.read_manifest(f"{out}/{s}")["documents"] for s in ("train", "heldout")]
  assert sum(parts) == 50


def test_two_processes_may_prepare_the_same_data(tmp_path, monkeypatch):
  """The slower one finds the directory there, complete, and leaves it as it is."""
  out = str(tmp_path / "o")

  def docs():
    yield from TEXTS
    with monkeypatch.context() as other:
      other.setattr(os, "getpid", lambda: 1)
      prepare.prepare(TEXTS, out, heldout=0.2)

  slow = prepare.prepare(docs(), out, heldout=0.2)
  assert records.read_manifest(out + "/train") == slow["train"] and os.listdir(tmp_path) == ["o"]


def test_errors_are_for_people(tmp_path, capsys):
  assert prepare.main([str(tmp_path / "nope"), "--out", str(tmp_path / "o")]) == 1
  assert "no such file" in capsys.readouterr().err
  (tmp_path / "o").mkdir()
  (tmp_path / "x.txt").write_text("x")
  assert prepare.main([str(tmp_path / "x.txt"), "--out", str(tmp_path / "o")]) == 1
  assert "exists already" in capsys.readouterr().err


def test_codes_of_other_modalities(tmp_path):
  docs = [records.Document(np.arange(12).reshape(6, 2) + i, label=i, modality=2) for i in range(20)]
  out = prepare.prepare(docs, str(tmp_path / "o"), vocab_size=64, depth=2, heldout=0.2)
  assert out["train"]["documents"] + out["heldout"]["documents"] == 20 and out["train"]["depth"] == 2


def test_python_text_is_there_and_stable():
  a = [t.key for _, t in zip(range(40), prepare.read_python())]
  assert a == [t.key for t in prepare.read_python(documents=40)] and len(set(a)) == 40
  assert not any("site-packages" in k or "/test/" in k for k in a)


def test_preparing_imports_no_jax():
  code = (
    "import sys, genmodels.data, genmodels.data.prepare; sys.exit(len({'jax', 'grain'} & {*sys.modules}))"
  )
  assert subprocess.run([sys.executable, "-c", code]).returncode == 0
