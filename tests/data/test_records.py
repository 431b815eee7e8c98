"""Records: schema, widths, manifest, and what happens to bad files."""

import json
import os

import numpy as np
import pytest

from genmodels import contracts
from genmodels.data import records
from genmodels.data.records import DataError


def test_roles_are_the_contracts():
  assert (records.CONTEXT, records.TEXT) == (contracts.CONTEXT, contracts.TEXT)


@pytest.mark.parametrize("vocab,width", [(256, 1), (257, 2), (1 << 16, 2), ((1 << 16) + 1, 4)])
def test_one_schema_round_trips_at_the_narrowest_width(tmp_path, vocab, width):
  top = vocab - 1
  docs = [
    records.Document(np.array([0, 1, top]), context=1, source_bytes=12),
    records.Document(np.arange(12) % vocab, modality=1, label=4, shape=(3, 4), conditions=(0.5, -2.0)),
    records.Document(np.arange(5), spans=((0, 1, 0), (3, 4, 0))),
  ]
  with records.Writer(str(tmp_path / "d"), vocab_size=vocab) as w:
    for d in docs:
      w.write(d)
  data = records.Dataset(str(tmp_path / "d"))
  assert data.dtype.itemsize == width and data.manifest["source_bytes"] == 12 and data.spans
  assert data.lengths.tolist() == [3, 12, 5] and data.context.tolist() == [1, 0, 2]
  for want, got in zip(docs, data.read([0, 1, 2])):
    assert np.array_equal(want.tokens, got.tokens)
    for f in ("context", "label", "modality", "shape", "spans", "conditions", "source_bytes"):
      assert getattr(want, f) == getattr(got, f)


def test_depth_holds_several_codes_per_position(tmp_path):
  codes = np.arange(24).reshape(8, 3)
  with records.Writer(str(tmp_path / "d"), vocab_size=64, depth=3) as w:
    w.write(records.Document(codes))
    with pytest.raises(DataError, match="expected depth 3"):
      w.write(records.Document(np.arange(4)))
  data = records.Dataset(str(tmp_path / "d"))
  assert data.lengths.tolist() == [8] and np.array_equal(data.read([0])[0].tokens, codes)


def test_reads_any_order_with_repeats_over_shards(dataset):
  path, docs = dataset()
  data = records.Dataset(path)
  assert len(data.manifest["shards"]) > 3 and data.manifest["tokens"] == sum(map(len, docs))
  order = np.array([59, 0, 3, 3, 17, 58, 0])
  for i, got in zip(order, data.read(order)):
    assert np.array_equal(docs[i], got.tokens)


def test_one_read_per_shard(dataset):
  path, _ = dataset()
  data = records.Dataset(path)
  calls = []

  class Counted:
    def __init__(self, reader):
      self.read = lambda i: calls.append(len(i)) or reader.read(i)

  data._readers = [Counted(r) for r in data._readers]
  data.read_records(np.arange(60))
  assert len(calls) == len(data.manifest["shards"]) and sum(calls) == 60


def test_the_writer_refuses_what_it_cannot_hold(tmp_path):
  with records.Writer(str(tmp_path / "d"), vocab_size=10) as w:
    w.write(records.Document(np.array([1])))
    with pytest.raises(DataError, match="ids 3 … 10, expected 0 … 9"):
      w.write(records.Document(np.array([3, 10])))
    with pytest.raises(DataError, match="has no tokens"):
      w.write(records.Document(np.array([], np.int64)))
  with pytest.raises(DataError, match="exists already"):
    records.Writer(str(tmp_path / "d"), vocab_size=10)


def test_a_failed_write_leaves_nothing(tmp_path):
  with pytest.raises(RuntimeError), records.Writer(str(tmp_path / "d"), vocab_size=10) as w:
    w.write(records.Document(np.array([1])))
    raise RuntimeError
  assert os.listdir(tmp_path) == []


def _shards(path):
  return [os.path.join(path, s["file"]) for s in records.read_manifest(path)["shards"]]


def _truncate(path, shards):
  with open(shards[1], "rb+") as f:
    f.truncate(os.path.getsize(shards[1]) // 2)


def _missing(path, shards):
  os.remove(shards[1])


def _swapped(path, shards):
  os.replace(shards[0], shards[1])


@pytest.mark.parametrize(
  "damage,reason", [(_truncate, "bytes, expected"), (_missing, "missing"), (_swapped, "missing|bytes")]
)
def test_bad_shards_are_named_counted_or_refused(dataset, damage, reason):
  path, docs = dataset()
  shards = _shards(path)
  damage(path, shards)
  with pytest.raises(
    DataError, match=f"{os.path.basename(shards[1])}|{os.path.basename(shards[0])}.*({reason})"
  ):
    records.Dataset(path, corrupt="refuse")
  with pytest.raises(DataError, match="max_quarantined=0.01"):
    records.Dataset(path)
  data = records.Dataset(path, max_quarantined=0.5)
  bad = {e["shard"] for e in data.quarantine.entries}
  assert os.path.basename(shards[1]) in bad
  lost = [s for s in data.manifest["shards"] if s["file"] in bad]
  assert data.quarantine.documents == sum(s["documents"] for s in lost)
  assert data.quarantine.tokens == sum(s["tokens"] for s in lost)
  for i, got in enumerate(data.read(np.arange(60))):
    name = data.manifest["shards"][int(np.searchsorted(data.ends, i, side="right"))]["file"]
    assert (got is None) == (name in bad)
    assert got is None or np.array_equal(got.tokens, docs[i])


def test_a_truncated_file_would_open_as_an_empty_one(dataset):
  """Why counts are checked: without the size check the reader itself finds nothing wrong."""
  path, _ = dataset()
  shards = _shards(path)
  _truncate(path, shards)
  reader = records.array_record_module.ArrayRecordReader(shards[1], "readahead_buffer_size:0")
  assert reader.num_records() == 0


def test_a_flipped_byte_costs_its_record_only(dataset, caplog):
  path, docs = dataset(top=3000, n=20, shard_bytes=60_000)
  shard = _shards(path)[0]
  with open(shard, "rb+") as f:
    at = os.path.getsize(shard) // 3
    f.seek(at)
    byte = f.read(1)
    f.seek(at)
    f.write(bytes([byte[0] ^ 16]))
  data = records.Dataset(path, max_quarantined=0.5)
  assert not data.quarantine.entries  # sizes and counts agree: found when read
  got = data.read(np.arange(20))
  again = data.read(np.arange(20))
  lost = [i for i, d in enumerate(got) if d is None]
  assert len(lost) == 1 and [i for i, d in enumerate(again) if d is None] == lost
  assert all(np.array_equal(docs[i], d.tokens) for i, d in enumerate(got) if d is not None)
  (entry,) = data.quarantine.entries  # counted once
  assert entry["shard"] == os.path.basename(shard) and entry["record"] == lost[0]
  assert entry["tokens"] == len(docs[lost[0]]) and "quarantined" in caplog.text
  with pytest.raises(DataError, match=f"record {lost[0]}"):
    records.Dataset(path, corrupt="refuse").read(np.arange(20))
  with pytest.raises(DataError, match="xxh3"):
    records.Dataset(path, verify=True, corrupt="refuse")


@pytest.mark.parametrize("key", ["documents", "tokens"])
def test_an_edited_manifest_is_refused(dataset, key):
  path, _ = dataset()
  name = os.path.join(path, records.MANIFEST)
  tree = json.load(open(name))
  tree["shards"][0][key] += 1
  json.dump(tree, open(name, "w"))
  with pytest.raises(DataError, match="the manifest was edited"):
    records.Dataset(path)


def test_manifest_and_lengths_must_agree(dataset):
  path, _ = dataset()
  name = os.path.join(path, records.MANIFEST)
  tree = json.load(open(name))
  tree["shards"][2]["documents"] += 1
  tree["xxh3"] = records.json_digest(tree)
  json.dump(tree, open(name, "w"))
  with pytest.raises(DataError, match="manifest states 60 documents"):
    records.Dataset(path)


def test_changed_lengths_wrong_tokenizer_and_missing_data_are_refused(dataset, tmp_path):
  path, _ = dataset(tokenizer={"hash": "abc"})
  records.Dataset(path, tokenizer="abc")
  with pytest.raises(DataError, match="tokenizer abc, the config's tokenizer is xyz"):
    records.Dataset(path, tokenizer="xyz")
  lengths = os.path.join(path, "lengths.npy")
  raw = bytearray(open(lengths, "rb").read())
  raw[-1] ^= 1
  open(lengths, "wb").write(raw)
  with pytest.raises(DataError, match="lengths.npy: xxh3"):
    records.Dataset(path)
  with pytest.raises(DataError, match="genmodels prepare"):
    records.Dataset(str(tmp_path / "nothing"))
