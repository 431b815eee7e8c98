"""The plan: cipher, packing, coverage, mixture, epochs, artefact."""

import dataclasses
import json
import types

import numpy as np
import pytest

from genmodels.data import packing
from genmodels.data import plan as plans
from genmodels.data.records import DataError


def component(n=500, name="a", seed=0, top=200, **kw):
  rng = np.random.default_rng(seed)
  return plans.Component(name, rng.integers(1, top, n).astype(np.uint32), kw.pop("context", 0), **kw)


def make(components=None, **kw):
  kw = {"seq_len": 64, "batch_size": 4, "seed": 3, "window": 100} | kw
  return plans.Plan(components or [component()], **kw)


def same(a, b):
  return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(plans.Rows))


def fields(rows):
  return np.stack([rows.component, rows.document, rows.piece, rows.occurrence], 1)


# ---- cipher


@pytest.mark.parametrize("n", [1, 2, 3, 10, 255, 1000])
def test_permute_is_a_permutation_and_depends_on_the_key(n):
  keys = [packing.hash64(k) for k in range(20)]
  out = [packing.permute(np.arange(n), n, k) for k in keys]
  for p in out:
    assert np.array_equal(np.sort(p), np.arange(n))
  if n >= 10:
    assert len({tuple(p.tolist()) for p in out}) == 20


def test_permute_takes_a_key_for_each_element_and_large_sizes():
  n, keys = 1000, packing.hash64(np.arange(3))
  whole = packing.permute(np.tile(np.arange(n), 3), n, np.repeat(keys, n))
  each = np.concatenate([packing.permute(np.arange(n), n, k) for k in keys])
  assert np.array_equal(whole, each)
  big = packing.permute(np.arange(1 << 20, (1 << 20) + 1000), 1 << 40, keys[0])
  assert len(np.unique(big)) == 1000 and 0 <= big.min() and big.max() < 1 << 40


def _quality(order, classes=16, batch=64):
  """How far an order of a sorted source is from a random one.

  Returns: the largest normalised autocorrelation of the index over 100 lags; by how many standard deviations
    the mean and the spread of the per-batch entropy of its class differ from those of true random orders.
  """
  n = len(order)
  x = (order - order.mean()) / order.std()
  auto = max(abs(np.mean(x[:-lag] * x[lag:])) for lag in range(1, 101)) * np.sqrt(n)

  def entropy(p):
    label = (p[: n // batch * batch] * classes // n).reshape(-1, batch)
    share = np.stack([(label == c).mean(1) for c in range(classes)], 1)
    h = -np.sum(share * np.log(np.maximum(share, 1e-9)), 1)
    return np.array([h.mean(), h.std()])

  rng = np.random.default_rng(0)
  reference = np.stack([entropy(rng.permutation(n)) for _ in range(50)])
  z = np.abs(entropy(order) - reference.mean(0)) / reference.std(0)
  return auto, z.max()


def _random_enough(order):
  auto, z = _quality(order)
  return auto < 5.5 and z < 5.5


def test_shuffle_quality_on_a_sorted_source():
  n = 1 << 14
  for seed in range(4):
    plan = make([plans.Component("sorted", np.full(n, 64, np.uint32))], seed=seed, window=1 << 12)
    order = np.concatenate([plan.batch(s).document for s in range(n // 4)])
    assert np.array_equal(np.sort(order), np.arange(n))
    assert _random_enough(order), _quality(order)
  # Negative controls: a linear congruential permutation (several multipliers), a windowed one, none at all.
  rng = np.random.default_rng(1)
  for a in [1_103_515_245 % n | 1, *(rng.integers(1, n, 4) | 1)]:
    assert not _random_enough((int(a) * np.arange(n) + 12345) % n)
  assert not _random_enough(np.concatenate([rng.permutation(1024) + 1024 * i for i in range(n // 1024)]))
  assert not _random_enough(np.arange(n))


# ---- packing


def test_packing_never_exceeds_a_budget_and_reports_fill():
  rng = np.random.default_rng(0)
  for _ in range(20):
    n, D = int(rng.integers(1, 400)), int(rng.integers(1, 12))
    sizes = {
      "a": rng.integers(1, 65, n),
      "b": rng.integers(0, 49, n),
      "c": -(-rng.integers(1, 33, n) // 8) * 8,
    }
    room = {"a": 64, "b": 48, "c": 40}
    row, count = packing.pack(sizes, room, D)
    for name, size in sizes.items():
      assert np.bincount(row, size, minlength=count).max() <= room[name]
    assert np.bincount(row).max() <= D and np.bincount(row, minlength=count).min() >= 1


def test_best_fit_fills_rows():
  sizes = {"tokens": np.clip(np.random.default_rng(0).lognormal(4, 1, 20_000), 1, 1024).astype(np.int64)}
  _, best = packing.pack(sizes, {"tokens": 1024}, 1024)
  _, capped = packing.pack(sizes, {"tokens": 1024}, 4)
  fill = sizes["tokens"].sum() / (best * 1024)
  assert fill > 0.999
  assert capped > 1.2 * best  # negative control: the document capacity is what costs rows


def test_a_piece_that_fits_no_row_is_named():
  with pytest.raises(DataError, match="costs 9 of budget 'copy', a row has 8"):
    packing.pack({"tokens": np.array([4, 5]), "copy": np.array([9, 1])}, {"tokens": 8, "copy": 8}, 4)


def cost(lengths, mode):
  """Block diffusion on the answer for mode 0, plain AR (no copy) for mode 1."""
  text = lengths["text"]
  return {"clean": lengths["context"] + text, "copy": -(-text // 16) * 16 if mode == 0 else 0 * text}


@pytest.mark.parametrize("documents", [0, 3])
def test_plan_packs_against_the_layouts_budgets(documents):
  parts = [component(context=5, mode=0, top=150), component(300, "b", 1, mode=1)]
  parts[0] = dataclasses.replace(parts[0], lengths=np.maximum(parts[0].lengths, 6))
  plan = make(parts, cost=cost, documents=documents)
  assert plan.budgets == {"tokens": 64, "clean": 64, "copy": 64}
  for step in range(60):
    rows = plan.batch(step)
    row = np.repeat(np.arange(4), np.diff(rows.row_ptr))
    text = rows.length - rows.context
    copy = np.where(rows.component == 0, -(-text // 16) * 16, 0)
    for size in (rows.length, copy):
      assert np.bincount(row, size, minlength=4).max() <= 64
    assert np.diff(rows.row_ptr).max() <= plan.documents
  assert 0.5 < plan.fill(0)["tokens"] <= 1
  tight = make(parts, cost=cost, budgets={"copy": 64, "clean": 64}, piece_len=48)
  assert max(tight.batch(s).length.max() for s in range(20)) <= 48


# ---- coverage


def _predicted(plan, steps, c=0):
  """How often each token of component c's documents is predicted."""
  hits = [np.zeros(n, int) for n in plan.components[c].lengths]
  for s in range(steps):
    rows = plan.batch(s)
    for k in np.flatnonzero(rows.component == c):
      a = rows.start[k] + rows.context[k]
      hits[rows.document[k]][a : rows.start[k] + rows.length[k]] += 1
  return hits


def _epoch_steps(plan, epochs=1):
  """Steps until some epochs are over (one component: windows end with epochs)."""
  w = plan._windows_per_epoch() * epochs
  while len(plan._digests) < w:
    plan._grow()
  assert plan._prefix[w] % plan.batch_size == 0, "choose sizes so that the epoch ends with a step"
  return plan._prefix[w] // plan.batch_size


@pytest.mark.parametrize("packed", [True, False])
def test_every_token_is_predicted_once_an_epoch(packed):
  plan = make([component(context=1, top=300)], packed=packed, batch_size=1)
  steps = _epoch_steps(plan)
  for n, hits in enumerate(_predicted(plan, steps)):
    assert hits[:1].max() == 0 and (hits[1:] == 1).all(), n
  assert any(len(h) > 64 for h in _predicted(plan, 0))  # some were cut
  twice = _predicted(plan, _epoch_steps(plan, 2))
  assert all((h[1:] == 2).all() for h in twice)


def test_coverage_would_notice_a_missing_overlap(monkeypatch):
  """Negative control: pieces that do not overlap leave their first token unpredicted."""
  measure = plans._Pieces.measure

  def broken(self, document, piece):
    start, length, context = measure(self, document, piece)
    return start, length, np.maximum(context, 1 + (piece > 0))

  monkeypatch.setattr(plans._Pieces, "measure", broken)
  plan = make([component(context=1, top=300)], batch_size=1)
  assert not all((h[1:] == 1).all() for h in _predicted(plan, _epoch_steps(plan)))


def test_epochs_are_shuffled_anew_and_counted():
  plan = make([plans.Component("a", np.full(40, 64, np.uint32))], window=1 << 16)
  epochs = [[(d, o) for s in range(10 * e, 10 * e + 10) for d, o in zip(plan.batch(s).document,
  plan.batch(s).occurrence)]
            for e in range(3)]  # fmt: skip
  assert plan._epochs_per_window() == 2  # 40 rows are fewer than 64: windows of two epochs
  counts = {}
  for d, o in sum(epochs, []):
    counts.setdefault(d, []).append(int(o))
  both = sum(epochs[:2], [])
  assert sorted(both) == sorted((d, o) for d in range(40) for o in (0, 1))
  assert [d for d, _ in epochs[0]] != [d for d, _ in epochs[2]]


def test_a_document_drawn_twice_in_a_step_has_two_occurrences():
  plan = make([plans.Component("tiny", np.array([20, 21, 22], np.uint32))], batch_size=8)
  for step in range(5):
    rows = plan.batch(step)
    keys = list(zip(rows.document, rows.piece, rows.occurrence))
    assert len(keys) > 3 and len(set(keys)) == len(keys)
    assert len({k[:2] for k in keys}) < len(keys)  # there are repeats


def test_ranks_and_ids():
  plan = make([component(), component(300, "b", 1)])
  for step in range(5):
    rows = plan.batch(step)
    count = rows.row_ptr[-1]
    assert sorted(rows.rank[:, 0]) == list(range(count)) and (rows.rank[:, 1] == count).all()
    ids = plan.example_id(rows)
    assert ids.dtype == np.uint32 and len(np.unique(ids, axis=0)) == count
    assert (ids[rows.component == 1, 0] >= 500).all()


# ---- mixture


def _shares(plan, steps):
  tokens = np.zeros(len(plan.components))
  for s in steps:
    rows = plan.batch(s)
    np.add.at(tokens, rows.component, rows.length)
  return tokens / tokens.sum()


def _mixture(stages, **kw):
  return make(
    [component(800, "a", 0, 40), component(500, "b", 1, 64), component(200, "c", 2, 64)], stages=stages, **kw
  )


def test_weights_are_shares_of_tokens():
  plan = _mixture([(0, (0.6, 0.3, 0.1))])
  assert np.abs(_shares(plan, range(400)) - [0.6, 0.3, 0.1]).max() < 0.02
  pieces = _mixture([(0, (0.6, 0.3, 0.1))], unit="pieces")
  assert _shares(pieces, range(400))[0] < 0.55  # short documents: the same share of pieces is fewer tokens
  natural = _mixture(None)
  sizes = np.array([p.tokens for p in natural._pieces])
  assert np.abs(_shares(natural, range(400)) - sizes / sizes.sum()).max() < 0.02


@pytest.mark.parametrize("k", [1, 37, 100])
def test_a_weight_change_affects_later_steps_only(k):
  before, after = (0.5, 0.5, 0.0), (0.0, 0.2, 0.8)
  plain, staged = _mixture([(0, before)]), _mixture([(0, before), (k, after)])
  assert all(same(plain.batch(s), staged.batch(s)) for s in range(k))
  assert not same(plain.batch(k), staged.batch(k))
  assert 0 not in staged.batch(k).component  # from step k on, exactly
  assert np.abs(_shares(staged, range(k, k + 300)) - after).max() < 0.02


@pytest.mark.parametrize("packed", [True, False])
def test_a_weight_change_loses_and_repeats_nothing(packed):
  stages = [(0, (1, 1, 1)), (13, (3, 1, 1)), (14, (1, 1, 3)), (60, (1, 1, 1))]
  plan = _mixture(stages, packed=packed)
  drawn = np.concatenate([fields(plan.batch(s)) for s in range(400 if packed else 900)])
  assert len(np.unique(drawn, axis=0)) == len(drawn)
  for c in range(3):
    first = drawn[(drawn[:, 0] == c) & (drawn[:, 3] == 0)]
    assert len(first) == plan._pieces[c].size  # the first epoch is complete


def test_bad_stages_are_refused():
  for stages, what in (
    ([(1, (1, 1, 1))], "rise from 0"),
    ([(0, (1, 1))], "expected 3"),
    ([(0, (0, 0, 0))], "not all 0"),
  ):
    with pytest.raises(ValueError, match=what):
      _mixture(stages)


# ---- any step, any order, artefact


def test_a_batch_is_a_pure_function_of_the_step():
  forward, backward = make(), make()
  want = [forward.batch(s) for s in range(80)]
  for s in reversed(range(80)):
    assert same(want[s], backward.batch(s))
  assert not same(want[0], make(seed=4).batch(0))


def test_rows_are_taken_by_number():
  plan = make(batch_size=8)
  whole = plan.batch(5)
  part = plan.take(5, np.array([6, 1, 2]))
  at = [i for r in (6, 1, 2) for i in range(whole.row_ptr[r], whole.row_ptr[r + 1])]
  assert np.array_equal(part.document, whole.document[at]) and np.array_equal(part.rank, whole.rank[at])
  with pytest.raises(ValueError, match="batch of 8"):
    plan.take(5, np.array([8]))


def test_evaluation_order_is_fixed_and_ends():
  plan = make([component(100), component(50, "b", 1)], shuffle=False, epochs=1, packed=False, window=1000)
  rows = [plan.batch(s) for s in range(plan.steps)]
  got = np.concatenate([np.stack([r.component, r.document, r.piece], 1) for r in rows])
  assert np.array_equal(got, got[np.lexsort(got.T[::-1])])
  assert len(got) == plan.size
  assert np.concatenate([np.diff(r.row_ptr) for r in rows])[plan.size :].sum() == 0
  packed = make([component(100)], shuffle=False, epochs=1)
  assert sum(len(packed.batch(s).document) for s in range(packed.steps)) == packed.size
  assert packed.steps < make([component(100)], shuffle=False, epochs=1, packed=False).steps


def test_artefact_resumes_refuses_other_data_and_keeps_the_past(tmp_path):
  path = str(tmp_path / "plan.json")
  stages = [(0, (1, 1, 1)), (20, (2, 1, 1))]
  plan = _mixture(stages)
  plan.extend(200)
  plan.save(path)
  again = _mixture(stages)
  again.load(path)
  assert again._prefix == plan._prefix
  built = []
  build = again._build
  again._build = lambda w: built.append(w) or build(w)
  assert same(again.batch(150), plan.batch(150)) and len(built) <= 2  # one window, not all before it
  assert again.chain() == plan.chain() and same(again.batch(1000), plan.batch(1000))
  # Later weights may change; earlier steps stay.
  other = _mixture([*stages, (100, (0, 0, 1))])
  other.load(path)
  assert all(same(other.batch(s), plan.batch(s)) for s in (0, 19, 20, 99)) and set(
    other.batch(100).component
  ) == {2}
  assert same(other.batch(300), _mixture([*stages, (100, (0, 0, 1))]).batch(300))
  with pytest.raises(DataError, match="seed: 3 in the artefact, 4 now"):
    _mixture(stages, seed=4).load(path)
  tree = json.load(open(path))
  tree["rows"][3] += 1
  json.dump(tree, open(path, "w"))
  with pytest.raises(DataError, match="own xxh3"):
    _mixture(stages).load(path)


def test_a_window_that_no_longer_agrees_is_refused(tmp_path):
  path = str(tmp_path / "plan.json")
  plan = make()
  plan.extend(50)
  plan.save(path)
  lengths = component().lengths.copy()
  lengths[::10] = 5
  changed = make([plans.Component("a", lengths)])
  changed.header = types.MethodType(lambda self: plan.header(), changed)
  changed.load(path)
  with pytest.raises(DataError, match="window .*: digest .* expected .* by the artefact"):
    for s in range(50):
      changed.batch(s)
