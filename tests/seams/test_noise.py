"""Noise from records to masks: it knows the document and the step, not the mesh, host, row or packing (T12, T13)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import corruption, data, system
from genmodels.config import build_kind
from genmodels.data import prepare
from genmodels.parallel import MeshConfig, make_mesh, multihost, rules

KEY = jax.random.key(5)
STEP = 7
KINDS = {
  "exact by document": dict(unit="doc", time="uniform"),
  "bernoulli by block": dict(unit="block", time="uniform", count="bernoulli", blocks={"size": 4}),
  "stratified by document": dict(unit="doc", time="stratified"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """source(batch_size, documents=60, **section): Data of that many short texts, cut into pieces of at most 24."""
  folder = tmp_path_factory.mktemp("texts")

  def make(batch_size=8, documents=60, workdir="", **section):
    path = folder / str(documents)
    if not path.exists():
      rng = np.random.default_rng(0)
      texts = ["".join(map(chr, rng.integers(97, 123, n))) for n in rng.integers(4, 40, documents)]
      prepare.prepare(texts, str(path), heldout=0.0)
    section = {"kind": "text", "path": str(path), "seq_len": 48, "piece_len": 24, **section}
    return data.build(section, batch_size=batch_size, workdir=workdir)

  return make


@functools.cache
def draw(kind: str):
  """(row, step) → (hit, level), compiled once for each kind and shape."""
  noise = build_kind(corruption.REGISTRY, {"kind": "absorb", **KINDS[kind]}, "corruption")

  def run(row, step):
    drawn = noise.draw(row, KEY, step)
    return drawn.hit, drawn.level

  return jax.jit(run)


def placed(batch):
  return system.row_of(jax.tree.map(jnp.asarray, batch))


def by_document(batch, drawn) -> dict:
  """{(example id, occurrence): (hit, level) of its tokens}; a document of a batch is there once."""
  hit, level = (np.asarray(x)[:, 0] for x in drawn)
  out = {}
  for b, d in np.argwhere(
    (batch["doc"][:, None] == np.arange(batch["occurrence"].shape[1])[:, None]).any(-1)
  ):
    key = (*batch["example_id"][b, d].tolist(), int(batch["occurrence"][b, d]))
    assert key not in out
    out[key] = tuple(x[b, batch["doc"][b] == d] for x in (hit, level))
  return out


def same(a, b, least):
  """Documents in both have equal noise; at least `least` are, and their draws are not all alike."""
  both = a.keys() & b.keys()
  assert len(both) >= least
  for key in both:
    for x, y in zip(a[key], b[key]):
      np.testing.assert_array_equal(x, y, err_msg=str(key))
  assert len({a[k][0].tobytes() for k in both}) > len(both) // 2


@pytest.mark.parametrize("kind", ["exact by document", "bernoulli by block"])
def test_packing(source, kind):
  """Packed or one to a row, in longer rows or other batches: a document of a step draws the same."""
  packed, alone, longer = source(32), source(64, pack=False, seq_len=24), source(24, seq_len=64)
  found = []
  for x in (packed, alone, longer):
    many = {}
    for step in range(4):  # several batches of the plan, all drawn at one training step
      batch = x.batch(step)
      many |= by_document(batch, draw(kind)(placed(batch), STEP))
    found.append(many)
  assert packed.batch(0)["doc"].max() > 0 == alone.batch(0)["doc"].max()
  same(found[0], found[1], 30)
  same(found[0], found[2], 30)


@pytest.mark.parametrize("kind", KINDS)
def test_batch_order_and_hosts(source, kind):
  """Rows in another order, or the rows of one host alone, draw what they draw in the whole batch."""
  x = source(8)
  whole = x.batch(2)
  want = by_document(whole, draw(kind)(placed(whole), STEP))
  order = np.random.default_rng(0).permutation(8)
  turned = {k: v[order] for k, v in whole.items()}
  same(want, by_document(turned, draw(kind)(placed(turned), STEP)), len(want))
  host = x.batch(2, [(1, 3), (6, 8)])
  alone = by_document(host, draw(kind)(placed(host), STEP))
  same(want, alone, len(alone))
  other = by_document(whole, draw(kind)(placed(whole), STEP + 1))
  assert any((want[k][0] != other[k][0]).any() for k in want)  # and the step matters


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 host devices")
@pytest.mark.parametrize("kind", ["stratified by document", "bernoulli by block"])
@pytest.mark.parametrize("sizes", [dict(data=2, fsdp=2, context=2), dict(data=1, fsdp=1, context=8)], ids=str)
def test_meshes(source, kind, sizes):
  batch = source(8).batch(3)
  hit, level = draw(kind)(placed(batch), STEP)
  mesh = make_mesh(MeshConfig(**sizes))
  with rules.use_mesh(mesh):
    row = system.row_of(multihost.global_batch(batch, mesh, 8))
    assert len(row.tokens.sharding.device_set) == 8
    got = draw(kind)(row, STEP)
  np.testing.assert_array_equal(got[0], hit)
  np.testing.assert_array_equal(got[1], level)


def test_resume(source, tmp_path):
  """A run that starts again at step 5 reads and draws what the first one did there."""
  first = list(zip(range(8), source(8, workdir=str(tmp_path)).loader(threads=0).at(0)))
  again = zip(range(5, 8), source(8, workdir=str(tmp_path)).loader(threads=0).at(5))
  for step, batch in again:
    want = first[step][1]
    for name in want:
      np.testing.assert_array_equal(batch[name], want[name], err_msg=name)
    for a, b in zip(*(draw("stratified by document")(placed(x), jnp.int32(step)) for x in (batch, want))):
      np.testing.assert_array_equal(a, b)
  assert (first[5][1]["tokens"] != first[4][1]["tokens"]).any()


def test_stratified_times_follow_the_rank(source):
  """One level in every bin [i, i + 1)/count of the global batch, in the bin of the document's rank (T13)."""
  batch = source(8).batch(1)
  drawn = by_document(batch, draw("stratified by document")(placed(batch), STEP))
  rank = {
    (*batch["example_id"][b, d].tolist(), int(batch["occurrence"][b, d])): batch["rank"][b, d]
    for b, d in np.argwhere(batch["rank"][..., 1] > 0)
  }
  count = len(drawn)
  assert count > 8
  bins = {k: int(level[0] * count) for k, (_, level) in drawn.items()}
  assert sorted(bins.values()) == list(range(count))
  assert all(bins[k] == rank[k][0] and rank[k][1] == count for k in drawn)
  # The rank and nothing else moves it: ranks in reverse, bins in reverse.
  turned = dict(
    batch, rank=np.where(batch["rank"][..., 1:] > 0, [[[count - 1, count]]] - batch["rank"] * [1, 0], 0)
  )
  moved = by_document(batch, draw("stratified by document")(placed(turned), STEP))
  assert all(int(moved[k][1][0] * count) == count - 1 - bins[k] for k in bins)
  # The negative control: independent levels leave bins empty.
  free = by_document(batch, draw("exact by document")(placed(batch), STEP))
  assert len({int(level[0] * count) for _, level in free.values()}) < count


def test_a_document_drawn_twice_in_a_step_has_own_noise(source):
  """A source smaller than the batch: the second draw of a document is told apart by its occurrence."""
  x = source(64, documents=12).batch(0)
  drawn = by_document(x, draw("exact by document")(placed(x), STEP))
  seen = {}
  for key, (hit, _) in drawn.items():
    seen.setdefault(key[:2], []).append(hit)
  seen = {k: v for k, v in seen.items() if len(v) > 1 and len(v[0]) > 12}
  assert seen and all(len({h.tobytes() for h in hits}) > 1 for hits in seen.values())
  # The negative control: without the occurrence all draws of a document are one.
  first = {}
  hit, _ = draw("exact by document")(placed(dict(x, occurrence=np.zeros_like(x["occurrence"]))), STEP)
  for b, d in np.argwhere(x["rank"][..., 1] > 0):
    key = tuple(x["example_id"][b, d].tolist())
    if key in seen:
      here = np.asarray(hit)[b, 0, x["doc"][b] == d].tobytes()
      assert here == first.setdefault(key, here)
