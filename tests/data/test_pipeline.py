"""Batches: golden order, any hosts, resume, content, quarantine, sections."""

import os

import numpy as np
import pytest
import xxhash

from genmodels import config, data
from genmodels.data import prepare, records, sources
from genmodels.data.records import CONTEXT, TEXT, DataError

# xxh3 of the first 1,000 global batches of the data set below, all arrays. If it changes, every run that
# resumes on the new code sees other data: raise plan.VERSION and say so in the log.
GOLDEN = "3dcaa3ec3d0e1538"


def section(path, **kw):
  return {"kind": "text", "path": path, "seq_len": 64, "max_quarantined": 0.5} | kw


def digest(batches):
  h = xxhash.xxh3_64()
  for batch in batches:
    for name in sorted(batch):
      h.update(f"{name}{batch[name].dtype}{batch[name].shape}".encode())
      h.update(np.ascontiguousarray(batch[name]).tobytes())
  return h.hexdigest()


def equal(a, b):
  return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_golden_order_of_a_thousand_batches(dataset):
  path, _ = dataset(n=300)
  d = data.build(section(path), batch_size=4, seed=1)
  assert digest(d.batch(s) for s in range(1000)) == GOLDEN


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
@pytest.mark.parametrize("scattered", [False, True])
def test_any_hosts_see_the_same_global_batch(dataset, hosts, scattered):
  path, _ = dataset()
  whole = data.build(section(path), batch_size=16)
  each = 16 // hosts
  order = np.random.default_rng(hosts).permutation(16) if scattered else np.arange(16)
  for step in (0, 3, 50):
    want = whole.batch(step)
    got = {k: np.zeros_like(v) for k, v in want.items()}
    for h in range(hosts):
      # Scattered: any rows, as device orders on a torus deal them, in ranges of one row.
      rows = np.sort(order[h * each : (h + 1) * each])
      ranges = [(int(r), int(r) + 1) for r in rows] if scattered else [(int(rows[0]), int(rows[-1]) + 1)]
      local = next(data.build(section(path), batch_size=16).loader(ranges).at(step))
      for k, v in got.items():
        v[rows] = local[k]
    assert equal(want, got)


def test_resume_from_any_step_is_identical(dataset, tmp_path):
  path, _ = dataset()
  work = str(tmp_path / "work")
  d = data.build(section(path, window=10), batch_size=4, workdir=work)
  it = d.loader().at(0)
  straight = [next(it) for _ in range(120)]
  for step in (0, 1, 57, 119):
    for threads in (0, 1, 3):
      again = (
        data.build(section(path, window=10), batch_size=4, workdir=work).loader(threads=threads).at(step)
      )
      assert equal(straight[step], next(again))
  assert not equal(straight[0], straight[1])
  assert data.build(section(path, window=10), batch_size=4, workdir=work).plan.windows >= 16
  with pytest.raises(DataError, match="other data or options.*seed"):
    data.build(section(path, window=10, seed=9), batch_size=4, workdir=work)


def test_rows_hold_what_the_documents_hold(dataset):
  path, docs = dataset()
  d = data.build(section(path), batch_size=4)
  N, D = 64, d.plan.documents
  for step in range(40):
    b, plan = d.batch(step), d.plan.batch(step)
    assert {k: (v.shape, v.dtype.name) for k, v in b.items()} == {
      **{k: ((4, N), "int32") for k in ("tokens", "doc", "role", "modality", "index")}, "pos": ((4, N, 1),
      "float32"), "example_id": ((4, D, 2), "uint32"), "rank": ((4, D, 2), "int32"), **{k: ((4, D), "int32")
      for k in ("occurrence", "mode", "source", "side/label")},
    }  # fmt: skip
    for r in range(4):
      n = 0
      for slot, p in enumerate(range(plan.row_ptr[r], plan.row_ptr[r + 1])):
        doc, start, size = plan.document[p], plan.start[p], plan.length[p]
        here = slice(n, n + size)
        assert np.array_equal(b["tokens"][r, here], docs[doc][start : start + size])
        assert (b["doc"][r, here] == slot).all()  # contiguous: block origins are document starts
        assert np.array_equal(b["pos"][r, here, 0], np.arange(size))
        assert b["role"][r, here].tolist() == [CONTEXT] + [TEXT] * (size - 1)
        assert b["side/label"][r, slot] == doc % 7
        assert tuple(b["example_id"][r, slot]) == (doc, plan.piece[p])
        n += size
      assert (b["doc"][r, n:] == -1).all() and (b["role"][r, n:] == CONTEXT).all()
      assert (b["tokens"][r, n:] == 0).all() and not b["example_id"][r, slot + 1 :].any()


def test_one_document_a_row_without_packing(dataset):
  path, docs = dataset(top=60)
  b = data.build(section(path, pack=False), batch_size=8).batch(2)
  assert b["occurrence"].shape == (8, 1) and set(np.unique(b["doc"])) == {-1, 0}


def test_quarantine_leaves_the_rest_where_it_was(dataset):
  path, docs = dataset(n=40, top=60)
  before = data.build(section(path), batch_size=4)
  want = [before.batch(s) for s in range(30)]
  shard = records.read_manifest(path)["shards"][1]
  os.remove(os.path.join(path, shard["file"]))
  after = data.build(section(path), batch_size=4)
  lost = set(range(*np.cumsum([s["documents"] for s in records.read_manifest(path)["shards"]])[:2].tolist()))
  seen = 0
  for a, b in zip(want, (after.batch(s) for s in range(30))):
    gone = (np.isin(a["example_id"][..., 0], list(lost))) & (a["rank"][..., 1] > 0)
    cell = np.take_along_axis(gone, np.maximum(a["doc"], 0), 1) & (a["doc"] >= 0)
    assert (b["doc"][cell] == -1).all() and (b["tokens"][cell] == 0).all() and not b["role"][cell].any()
    for k in ("tokens", "doc", "role", "pos"):
      assert np.array_equal(a[k][~cell], b[k][~cell])
    for k in ("example_id", "rank", "occurrence", "side/label"):
      assert np.array_equal(a[k][~gone], b[k][~gone])
    assert not b["example_id"][gone].any()
    seen += gone.sum()
  assert seen > 10
  (entry,) = after.quarantine
  assert entry["shard"] == shard["file"] and entry["documents"] == len(lost) and entry["path"] == path
  assert after.bytes_of(after.batch(0)).sum() < before.bytes_of(want[0]).sum() + 1


def test_too_much_loss_stops_the_iterator(dataset):
  path, _ = dataset()
  d = data.build(section(path, max_quarantined=0.0), batch_size=4)
  with open(os.path.join(path, records.read_manifest(path)["shards"][0]["file"]), "rb+") as f:
    f.seek(700)
    f.write(b"\xaa" * 40)
  d = data.build(section(path, max_quarantined=0.0), batch_size=4)
  it = d.loader().at(0)
  with pytest.raises(DataError, match="max_quarantined"):
    for _ in range(60):
      next(it)


def test_mixture_of_sources_modes_and_widths(dataset):
  small, a = dataset("small", vocab=200)
  large, b = dataset("large", vocab=70_000, salt=500)
  parts = ({"path": small, "weight": 0.5}, {"path": large, "weight": 0.25},
           {"path": large, "weight": 0.25, "mode": 1})  # fmt: skip
  d = data.build({"kind": "text", "sources": parts, "seq_len": 64}, batch_size=8)
  assert d.meta.sources == ("small", "large") and d.meta.vocab_size == 70_000
  ids, seen = [], set()
  for s in range(30):
    batch, plan = d.batch(s), d.plan.batch(s)
    row = np.repeat(np.arange(8), np.diff(plan.row_ptr))
    for p in range(plan.row_ptr[-1]):
      r, slot = row[p], p - plan.row_ptr[row[p]]
      doc = (a if plan.component[p] == 0 else b)[plan.document[p]]
      got = batch["tokens"][r, batch["doc"][r] == slot]
      assert np.array_equal(got, doc[plan.start[p] : plan.start[p] + plan.length[p]])
      seen.add((int(plan.component[p]), int(batch["source"][r, slot]), int(batch["mode"][r, slot])))
      ids.append((*batch["example_id"][r, slot].tolist(), int(batch["occurrence"][r, slot])))
  assert seen == {(0, 0, 0), (1, 1, 0), (2, 1, 1)}
  assert len(set(ids)) == len(ids)  # one document in two modes has two identities


def test_sources_must_share_a_tokenizer(tmp_path):
  for name, tok in (("a", "byte"), ("b", "bpe:300")):
    prepare.prepare([f"text number {i}" for i in range(60)], str(tmp_path / name), tokenizer=tok, heldout=0.1)
  parts = tuple({"path": str(tmp_path / n)} for n in "ab")
  with pytest.raises(DataError, match="its ids were made by tokenizer"):
    data.build({"kind": "text", "sources": parts}, batch_size=2)


def test_stages_reach_the_batches(dataset):
  paths = [dataset("a")[0], dataset("b", salt=300)[0]]
  parts = tuple({"path": p} for p in paths)
  base = {"kind": "text", "sources": parts, "seq_len": 64, "stages": ((0, (1, 1)),)}
  one = data.build(base, batch_size=4)
  two = data.build(base | {"stages": ((0, (1, 1)), (10, (0, 1)))}, batch_size=4)
  assert all(equal(one.batch(s), two.batch(s)) for s in range(10))
  late = two.batch(10)
  assert set(np.unique(late["source"][late["rank"][..., 1] > 0])) == {1}


def test_spans_grids_codes_and_conditions(tmp_path):
  path = str(tmp_path / "d")
  with records.Writer(path, vocab_size=64) as w:
    for i in range(8):
      w.write(
        records.Document(np.arange(13) + i, context=1, shape=(3, 4), modality=1, label=i, conditions=(i / 2,))
      )
      w.write(records.Document(np.arange(9) + i, spans=((0, 3, CONTEXT), (5, 7, CONTEXT))))
  d = data.build(section(path, axes=2, seq_len=32), batch_size=4)
  b, plan = d.batch(0), d.plan.batch(0)
  row = np.repeat(np.arange(4), np.diff(plan.row_ptr))
  for p in range(plan.row_ptr[-1]):
    r, slot = row[p], p - plan.row_ptr[row[p]]
    at = b["doc"][r] == slot
    if plan.document[p] % 2 == 0:
      assert b["pos"][r, at].tolist() == [[0, 0], *([1 + y, 1 + x] for y in range(3) for x in range(4))]
      assert (b["modality"][r, at] == 1).all() and b["role"][r, at].tolist() == [0] + [1] * 12
      assert b["side/label"][r, slot] * 0.5 == b["side/conditions"][r, slot, 0]
    else:
      assert b["role"][r, at].tolist() == [0, 0, 0, 1, 1, 0, 0, 1, 1]
      assert b["side/label"][r, slot] == -1 and (b["modality"][r, at] == 0).all()
  with records.Writer(str(tmp_path / "k"), vocab_size=64, depth=2) as w:
    for i in range(8):
      w.write(records.Document(np.arange(20).reshape(10, 2) + i))
  b = data.build(section(str(tmp_path / "k"), seq_len=16), batch_size=2).batch(0)
  assert b["side/codes"].shape == (2, 16, 2) and np.array_equal(b["side/codes"][..., 0], b["tokens"])
  assert (b["side/codes"][..., 1] == b["tokens"] + 1)[b["doc"] >= 0].all()
  assert b["index"][0].tolist() == [*range(10), *[-1] * 6]


def test_heldout_is_one_pass_in_order_and_disjoint(tmp_path):
  texts = [f"document {i} " * (i % 9 + 1) for i in range(300)]
  prepare.prepare(texts, str(tmp_path / "d"), heldout=0.3)
  d = data.build({"kind": "text", "path": str(tmp_path / "d"), "seq_len": 48}, batch_size=4)
  h = d.heldout()
  batches = [h.batch(s) for s in range(h.plan.steps)]
  size = records.read_manifest(str(tmp_path / "d" / "heldout"))["source_bytes"]
  assert sum(h.bytes_of(b).sum() for b in batches) == size > 0
  assert equal(batches[1], d.heldout().batch(1)) and not batches[0]["occurrence"].any()
  assert len(list(h.loader().at())) == h.plan.steps
  held = {tuple(map(tuple, b["tokens"])) for b in batches}
  assert held.isdisjoint(tuple(map(tuple, d.batch(s)["tokens"])) for s in range(20))
  bare = data.build({"kind": "text", "path": str(tmp_path / "d" / "train"), "seq_len": 48}, batch_size=4)
  with pytest.raises(DataError, match="no held-out documents"):
    bare.heldout()


def test_python_prepares_once(tmp_path, monkeypatch):
  s = {"kind": "python", "documents": 30, "seq_len": 64, "heldout": 0.3, "tokenizer": "bpe:300"}
  assert data.meta(s, workdir=str(tmp_path)).vocab_size == 300
  monkeypatch.setattr(prepare, "prepare", None)  # a second preparation would fail
  d = data.build(s, batch_size=4, workdir=str(tmp_path))
  assert d.meta.specials["mask"] == 298 and d.heldout().plan.steps > 0 and d.batch(0)["tokens"].max() < 300
  with pytest.raises(config.ConfigError, match="data.path.*first use"):
    data.build(s, batch_size=4)


@pytest.mark.parametrize("form,N,keys", [
  ("raster", 65, {"side/pixels", "side/label"}), ("none", 85, {"side/pixels", "side/label"}),
  ("caption", 37, {"side/pixels", "side/label", "side/features"}),
])  # fmt: skip
def test_digits(form, N, keys):
  d = data.build({"kind": "digits", "tokens": form, "axes": 2}, batch_size=16, seed=5)
  b = d.batch(7)
  assert b["tokens"].shape == (16, N) and keys == {k for k in b if k.startswith("side/")}
  assert d.meta.classes == 10 and d.meta.seq_len == N == data.meta({"kind": "digits", "tokens": form}).seq_len
  held = d.heldout(32)
  assert 0.05 < sum([len(r.tokens) for r in held.readers]) / 1797 < 0.15
  if form == "raster":
    assert np.array_equal(b["tokens"][:, 1:].reshape(16, 8, 8), b["side/pixels"][:, 0])
    assert (b["tokens"][:, 0] == d.meta.specials["bos"]).all() and (b["role"][:, 0] == CONTEXT).all()
    assert b["pos"][0, 1].tolist() == [1, 1] and b["pos"][0, 64].tolist() == [8, 8]
    assert (d.bytes_of(b) == 64).all() and d.meta.values == 17
  if form == "caption":
    text = d.tokenizer.decode(b["tokens"][0])
    assert text.endswith(sources.DIGIT_NAMES[b["side/label"][0, 0]] + "\0" * 16)
    at = b["index"][0] >= 0
    assert at.sum() == 16 and (b["modality"][0] == at).all()
    pixels = (b["side/features"][0, 0].reshape(4, 4, 2, 2).transpose(0, 2, 1, 3).reshape(8, 8) + 1) * 8
    assert np.array_equal(pixels, b["side/pixels"][0, 0])


@pytest.mark.parametrize("bad,what", [
  ({"kind": "tex"}, "did you mean 'text'"), ({"kind": "digits", "pack": True}, "data.pack"),
  ({"kind": "text"}, "path"), ({"kind": "text", "path": "x", "seq_length": 8}, "did you mean 'seq_len'"),
  ({"kind": "text", "sources": ({"pth": "x"},)}, "sources"),
  ({"kind": "digits", "seq_len": 10}, "an image is 65"),
  ({"kind": "python", "tokenizer": "bpe"}, "tokenizer"),
  ({"kind": "text", "path": "x", "corrupt": "skip"}, "refuse"),
])  # fmt: skip
def test_config_errors_name_the_key(bad, what):
  with pytest.raises(config.ConfigError, match=what):
    data.build(bad, batch_size=4)


def test_budgets_come_from_the_section(dataset):
  path, _ = dataset()
  cost = lambda lengths, mode: {"copy": lengths["text"]}
  assert data.build(section(path), cost, batch_size=4).plan.budgets == {"tokens": 64, "copy": 64}
  d = data.build(section(path, budgets={"copy": 40}, piece_len=40), cost, batch_size=4)
  assert max((d.batch(s)["role"] == TEXT).sum(1).max() for s in range(20)) <= 40
