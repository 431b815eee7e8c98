"""Jacobi iteration by spans: its fixed points are greedy decoding, its states lead there; `genmodels collect`."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import cli, data
from genmodels.config import ConfigError
from genmodels.contracts import CONTEXT
from genmodels.data import records
from genmodels.parallel import mesh as meshes
from genmodels.parallel import rules
from genmodels.sampling import collect, jacobi
from genmodels.sampling.run import load_run
from tests.sampling import systems as S
from tests.sampling.test_run import workdir

KEY = jax.random.key(3)
SPAN = 4


@functools.cache
def greedy(eos=-2):
  return jax.tree.map(np.asarray, S.sampler(S.ar(), temperature=0.0, eos=eos)(S.params(), S.row(), KEY))


@functools.cache
def iteration(eos=-2):
  return jacobi.build(S.sampler(S.ar(), temperature=1.0, eos=eos), SPAN)


def spans(given, end):
  return [(lo, min(lo + SPAN, end)) for lo in range(given, end, SPAN)]


def given():
  return np.asarray(S.row().role == CONTEXT).sum(1)


@pytest.mark.slow
def test_fixed_points_are_greedy_decoding():
  """T19, for any first guess: the ids of greedy decoding, at most n forwards a span, its first i tokens right
  after i of them; the sampler's own temperature does not matter."""
  want, states = greedy(), []
  for seed in (0, 1):
    got = jax.tree.map(np.asarray, iteration()(S.params(), S.row(), jax.random.key(seed), 8))
    np.testing.assert_array_equal(got.tokens, want.tokens)
    assert got.done.all() and (got.lengths == S.N).all()
    for b, start in enumerate(given()):
      forwards = 0
      for lo, hi in spans(start, S.N):
        k = got.settled_at[b, lo]
        assert (got.settled_at[b, lo:hi] == k).all() and 1 <= k <= hi - lo
        forwards += k
        seen = got.states[b, lo:hi].T
        assert (seen[:k] >= 0).all() and (seen[k:] == -1).all()
        for i in range(k):
          np.testing.assert_array_equal(seen[i, :i], got.tokens[b, lo : lo + i])
        # What the last forward reads is right; what the one before read was not.
        assert (seen[k - 1, : SPAN - 1] == got.tokens[b, lo : lo + SPAN - 1]).all() or hi - lo < SPAN
        assert k == 1 or (seen[k - 2, : hi - lo - 1] != got.tokens[b, lo : hi - 1]).any()
      assert got.calls["verify"][b] == forwards
      assert got.greedy[b, start:].all() and not got.greedy[b, :start][:1].any()
    states.append(got.states)
  assert (states[0] != states[1]).any()


@pytest.mark.slow
def test_each_state_is_the_prediction_from_the_one_before():
  """State k + 1 is what one plain causal forward predicts greedily from state k; and the check of finished
  rows sees a token that is not the likeliest (negative control)."""
  made = iteration()
  got = jax.tree.map(np.asarray, made(S.params(), S.row(), KEY, 8))
  predicts = jax.jit(lambda row, length: made.greedy((S.params(), None), row, length))
  row, length = S.row(), jnp.full((4,), S.N)
  ok = lambda tokens: np.asarray(predicts(row.replace(tokens=jnp.asarray(tokens)), length))
  checked = 0
  for index in range(2):
    for k in range(SPAN - 1):
      mixed, pairs = got.tokens.copy(), []
      for b, start in enumerate(given()):
        if index >= len(spans(start, S.N)):
          continue
        lo, hi = spans(start, S.N)[index]
        if got.settled_at[b, lo] > k + 1:
          mixed[b, lo:hi] = got.states[b, lo:hi, k]
          pairs.append((b, lo, hi))
      for b, lo, hi in pairs:
        for at in range(lo, hi):  # is the next state's token the likeliest behind this state?
          probe = mixed.copy()
          probe[b, at] = got.states[b, at, k + 1]
          assert ok(probe)[b, at]
          checked += 1
  assert checked > 10
  wrong = got.tokens.copy()
  wrong[:, 11] = (wrong[:, 11] + 1) % S.V
  assert ok(got.tokens)[:, 9:].all() and not ok(wrong)[:, 11].any()


@pytest.mark.full
def test_rows_end_at_eos():
  """A row ends with its first EOS, whatever stands behind it in a state (T23)."""
  want = greedy()
  made = [want.tokens[b, g:] for b, g in enumerate(given())]
  eos = next(v for v in range(S.V) if 0 < sum((m[1:-1] == v).any() for m in made))
  short = greedy(eos)
  got = jax.tree.map(np.asarray, iteration(eos)(S.params(), S.row(), KEY, 8))
  np.testing.assert_array_equal(got.lengths, short.lengths)
  assert (got.lengths < S.N).any() and got.done.all()
  for b, n in enumerate(got.lengths):
    np.testing.assert_array_equal(got.tokens[b, :n], short.tokens[b, :n])
    assert (got.settled_at[b, n:] == 0).all()


@pytest.mark.full
def test_a_row_knows_no_batch():
  """Other rows, their order and the devices change no token and no state."""
  lengths = (1, 3, 6, 9, 2, 5, 7, 8)
  row = S.row(lengths)
  run = lambda row: jax.tree.map(np.asarray, iteration()(S.params(), row, KEY, 8))
  whole, order = run(row), np.random.default_rng(0).permutation(8)
  shuffled = run(jax.tree.map(lambda x: x[order], row))
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[order], b), whole, shuffled)
  mesh = meshes.make_mesh(meshes.MeshConfig(data=4, fsdp=2), jax.devices()[:8])
  with rules.use_mesh(mesh):
    jax.tree.map(np.testing.assert_array_equal, whole, run(row))


# -- records --------------------------------------------------------------------------------------------


def test_records_hold_distinct_states_and_end_before_repeats():
  tokens = np.array([7, 1, 2, 3, 4, 5, 5, 5, 6], np.int32)
  states = np.full((9, 4), -1, np.int32)
  states[1:5] = [[0, 1, 1, 1], [9, 9, 2, 2], [9, 9, 8, 3], [9, 9, 8, 0]]  # the second and third differ
  states[5:9] = [[5, -1, -1, -1], [5, -1, -1, -1], [5, -1, -1, -1], [6, -1, -1, -1]]  # right at once
  sizes = np.ones(10, int)
  doc, cut = collect.document(tokens, states, 1, 4, 0, sizes)
  assert not cut and doc.context == 1 and doc.source_bytes == 8
  np.testing.assert_array_equal(doc.tokens[:, 0], tokens)
  np.testing.assert_array_equal(doc.tokens[1:5, 1:], states[1:5])
  np.testing.assert_array_equal(doc.tokens[5:, 1:], np.repeat(tokens[5:, None], 4, 1))
  # A span that EOS cut short: states that agree as far as it goes are one.
  doc, _ = collect.document(tokens[:2], states[:2], 1, 4, 0, sizes)
  np.testing.assert_array_equal(doc.tokens[1], [1, 0, 1, 1, 1])
  doc, cut = collect.document(tokens, states, 1, 4, 3, sizes)
  assert cut and len(doc.tokens) == 5  # three fives stand in the second span
  assert collect.document(tokens[4:], states[4:], 1, 4, 3, sizes) == (None, True)


def section(path, seq_len=48):
  return {"kind": "text", "path": str(path), "seq_len": seq_len}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  path = tmp_path_factory.mktemp("ar")
  workdir(path, "language/ar:tiny", ["data.documents=20", "model.layers=1"])
  return load_run(path)


OPTIONS = collect.Options(span=8, length=48, prompt=12, most=40, repeats=0, batch=8, part=2)


@pytest.mark.full
def test_collect_goes_on_where_it_stopped(run, tmp_path, monkeypatch):
  """Interrupted in its third part, the same call ends with the same bytes; what it wrote, training reads."""
  source = collect._training_set(run)
  whole = collect.collect(run, source, str(tmp_path / "whole"), OPTIONS, heldout=0.2)
  assert whole["prompts"] == whole["documents"] == 40 and whole["tokens"] == 40 * 36
  assert whole["differ"] == 0 and whole["spans"] == 40 * 5 and 1 < whole["forwards_per_span"] <= 8
  calls, batch = [], collect.Collector.batch

  def counted(self, *args):
    calls.append(1)
    if len(calls) == 5:
      raise KeyboardInterrupt
    return batch(self, *args)

  monkeypatch.setattr(collect.Collector, "batch", counted)
  out = str(tmp_path / "again")
  with pytest.raises(KeyboardInterrupt):
    collect.collect(run, source, out, OPTIONS, heldout=0.2)
  assert not (tmp_path / "again").exists()
  again = collect.collect(run, source, out, OPTIONS, heldout=0.2)
  assert len(calls) == 6  # 4 stood, the fifth broke off, one more was needed
  for split in ("train", "heldout"):
    assert again[split]["shards"] == whole[split]["shards"] and again[split]["documents"] > 0
  assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "whole"]
  with pytest.raises(records.DataError, match="exists already"):
    collect.collect(run, source, out, OPTIONS)
  made = data.build(section(out), batch_size=4)
  got = made.batch(0)
  assert got["side/codes"].shape == (4, 48, 9) and made.tokenizer is not None
  np.testing.assert_array_equal(got["side/codes"][..., 0], got["tokens"])
  assert (np.diff(got["role"], axis=1) >= 0).all() and (got["role"][:, :12] == CONTEXT).all()
  with pytest.raises(ConfigError, match="cannot be cut"):
    data.build(section(out, seq_len=32), batch_size=4)


@pytest.mark.full
def test_collect_refuses_what_does_not_fit(run, tmp_path):
  source = collect._training_set(run)
  out = str(tmp_path / "out")
  with pytest.raises(ConfigError, match="no room"):
    collect.collect(run, source, out, dataclasses.replace(OPTIONS, length=16))
  foreign = records.Writer(str(tmp_path / "other"), vocab_size=260, tokenizer={"hash": "another"})
  foreign.write(records.Document(np.arange(40)))
  foreign.close()
  with pytest.raises(ConfigError, match="another"):
    collect.collect(run, records.Dataset(str(tmp_path / "other")), out, OPTIONS)
  # A model whose plain forward disagrees is found out, and nothing is written under the name.
  one = dataclasses.replace(OPTIONS, most=8)
  with pytest.raises(records.DataError, match="otherwise"):
    collect.collect(run, source, out, one, tolerance=-1.0)
  assert not (tmp_path / "out").exists()
  # Prompts that documents give are taken whole; those without room are left out.
  writer = records.Writer(str(tmp_path / "given"), vocab_size=260)
  for given in (5, 20, 45):
    writer.write(records.Document(np.arange(60), context=given))
  writer.close()
  found = list(collect.prompts(records.Dataset(str(tmp_path / "given")), OPTIONS, bos=256))
  assert [None if p is None else len(p) for p in found] == [5, 20, None]


@pytest.mark.full
def test_from_the_command_line(run, tmp_path, capsys):
  path = run.parts.data.readers[0].path.removesuffix("/train").rsplit("/data/", 1)[0]
  flags = [
    "--span",
    "8",
    "--length",
    "48",
    "--prompt",
    "12",
    "--most",
    "8",
    "--batch-size",
    "8",
    "--repeats",
    "0",
  ]
  assert collect.main(["--workdir", path, "--out", str(tmp_path / "out"), *flags]) == 0
  printed = capsys.readouterr().out.splitlines()
  assert json.loads(printed[0])["prompts"] == 8 and printed[1].startswith(f"{tmp_path}/out/train: ")


# -- what training is for -------------------------------------------------------------------------------


@pytest.mark.full
def test_training_needs_fewer_forwards(tmp_path, capsys):
  """An autoregressive model takes nearly n forwards for a span of n; after consistency training it takes
  fewer on prompts it has not seen, and as many steps of the next-token loss alone do not get there."""
  span, ar, text = 8, tmp_path / "ar", tmp_path / "data"
  quiet = ["eval.every=0", "train.save_every=0", "train.tensorboard=False"]

  def genmodels(*argv):
    assert cli.main([str(a) for a in argv]) == 0
    return capsys.readouterr().out

  def forwards(run, name):
    flags = ["--data", text / "heldout", "--span", span, "--most", 96, "--repeats", 0]
    out = genmodels("collect", "--workdir", run, "--out", tmp_path / f"{name}-heldout", *flags)
    return json.loads(out.splitlines()[0])["forwards_per_span"]

  base = [f"data.path={text}", "data.documents=100", "train.steps=600"]
  genmodels("train", "--config", "language/ar:tiny", "--workdir", ar, *base, *quiet)
  flags = ["--span", span, "--most", 768, "--repeats", 0]
  genmodels("collect", "--workdir", ar, "--out", tmp_path / "t", *flags)
  found = {"before": forwards(ar, "before")}
  for name, scale in (("trained", 1.0), ("control", 0.0)):
    start = [f"data.path={tmp_path / 't'}", "init.kind=workdir", f"init.path={ar}", "train.steps=150"]
    spans = [f"objective.corruption.span={span}", f"objective.corruption.blocks.size={span}"]
    more = [f"objective.terms.consistency.scale={scale}", *spans, *start, *quiet]
    genmodels("train", "--config", "language/cllm:tiny", "--workdir", tmp_path / name, *more)
    found[name] = forwards(tmp_path / name, name)
  assert found["before"] > 0.7 * span and found["control"] > 0.9 * found["before"], found
  assert found["trained"] < 0.85 * found["before"], found
