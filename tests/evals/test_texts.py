"""Questions of an evaluation harness, answered by runs: likelihoods against the evaluator's, texts against the sampler's."""

import json

import jax
import numpy as np
import pytest

from genmodels import evals
from genmodels.config import ConfigError
from genmodels.evals import harness
from genmodels.evals.texts import TextConfig, TextModel
from genmodels.sampling.run import load_run
from tests.sampling.test_run import workdir

SMALL = ["data.documents=40", "data.heldout=0.3", "model.layers=1"]
TEXTS = ["def f(x):\n  return x + 1\n" * 3, "", "import os"]


@pytest.fixture(scope="module")
def ar(tmp_path_factory):
  path = tmp_path_factory.mktemp("ar")
  workdir(path, "language/ar:tiny", SMALL)
  return load_run(path)


@pytest.fixture(scope="module")
def bd3(tmp_path_factory):
  path = tmp_path_factory.mktemp("bd3")
  workdir(path, "language/bd3lm:tiny", SMALL)
  return load_run(path)


@pytest.fixture(scope="module")
def asked(ar):
  return TextModel(ar, TextConfig(batch_size=4, length=48, new=6, sampler={"temperature": 0.0}))


def total(run, text, key="nats_per_token"):
  ecfg = evals.EvalConfig(batch_size=8)
  got = evals.Evaluator(ecfg, run.parts, run.mesh, jax.random.key(0)).of_texts(run.trees, [text], run.step)
  return got[key], got["tokens"]


def test_scores_of_the_parts_are_the_score_of_the_whole(asked):
  """log p(b, c | a) = log p(b | a) + log p(c | a, b), whatever row lengths and batches they fall into."""
  a, b, c = "class A", ":\n  def", " g(self):"
  whole, first, second = asked.score([(a, b + c), (a, b), (a + b, c)])
  assert whole.nats == pytest.approx(first.nats + second.nats, rel=1e-5)
  assert whole.tokens == first.tokens + second.tokens > 0 and whole.nats < -1
  assert asked.exact and whole.stderr == 0
  # Spaces at the end of a context are the beginning of what follows.
  assert asked.score([("x = ", "1")]) == asked.score([("x =", " 1")])


def test_a_rolling_score_is_the_evaluators(ar, asked):
  nats, tokens = total(ar, TEXTS[2])
  got = asked.rolling(TEXTS)
  # The evaluator pays for the EOS of a document, a harness does not.
  eos = asked.meta.specials["eos"]
  ids = asked.encode(TEXTS[2])
  tail = asked.score_ids([(ids, np.asarray([eos], np.int32))])[0].nats
  assert -got[2].nats - tail == pytest.approx(nats * tokens, rel=1e-5)
  assert got[1].nats == 0 and got[1].tokens == 0
  # A text longer than a row: every token once, and windows that begin where the last one ended.
  assert got[0].tokens == len(asked.encode(TEXTS[0])) - 1 > asked.length


@pytest.mark.slow
def test_what_greedy_decoding_writes_is_greedy_and_nothing_else(asked):
  prompt = "def "
  written = asked.write([asked.encode(prompt)], [5], {"temperature": 0.0})[0]
  context = asked.encode(prompt)
  other = written.copy()
  other[-1] = (other[-1] + 1) % 200
  yes, no = asked.score_ids([(context, written), (context, other)])
  assert yes.greedy and not no.greedy and yes.nats > no.nats


@pytest.mark.slow
def test_a_bound_is_below_its_own_ar_reading_and_has_an_error(bd3):
  model = TextModel(
    bd3, TextConfig(batch_size=4, length=32, draws=8, greedy=True, sampler={"temperature": 0.0})
  )
  context = model.encode("def ")
  written = model.write([context], [4])[0]
  scores = model.score_ids([(context, written), (context, (written + 1) % 200)])
  assert not model.exact and scores[0].stderr > 0
  assert scores[0].greedy and not scores[1].greedy
  plain = TextModel(bd3, TextConfig(batch_size=4, length=32, draws=8))
  again = plain.score_ids([(context, written)])[0]
  assert not again.greedy and again.nats == pytest.approx(
    scores[0].nats, rel=1e-6
  )  # its own noise, not the batch's


def test_texts_are_the_samplers_and_speed_is_counted(asked):
  asked.speed.__init__()
  asked._seen.clear()
  one = asked.generate(["def ", "import numpy"], until=())
  assert asked.generate(["import numpy"]) == one[1:]  # a row does not know its batch
  assert (asked.speed.tokens, asked.speed.forwards) == (18, 18)  # six tokens behind three prompts
  stop = one[0][2:4]
  assert asked.generate(["def "], until=[stop]) == [one[0][: one[0].index(stop)]]


def test_lengths_that_cannot_be(asked):
  with pytest.raises(ConfigError, match="longer rows"):
    asked.score([("a", "b" * 60)])
  with pytest.raises(ConfigError, match="longer rows"):
    asked.score([("a", "")])
  with pytest.raises(ConfigError, match="leave no room"):
    asked.generate(["a"], new=48)
  long = asked.score([("x" * 100, "y")])[0]
  assert long.cut == len(asked.encode("x" * 100)) + 1 - asked.length and long.tokens == 1


def test_begin_of_text(ar):
  ids = lambda bos, **kw: TextModel(ar, TextConfig(bos=bos)).encode("ab", **kw).tolist()
  bos = ar.parts.data.meta.specials["bos"]
  assert ids("auto") == ids("always") == [bos, 97, 98] and ids("never") == ids("auto", start=False) == [
    97,
    98,
  ]


def test_settings_of_tasks():
  of = harness.sampling_of
  assert of({"do_sample": False, "temperature": 0.7}) == {"temperature": 0.0} == of({"until": ["\n"]})
  assert of({"temperature": 0.5, "top_p": 0.9}) == {"temperature": 0.5, "top_p": 0.9}
  assert of({"do_sample": True}) == {"temperature": 1.0}


def test_without_the_harness_the_error_says_what_to_install(monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "lm_eval.api.model", None)
  harness.adapter_class.cache_clear()
  with pytest.raises(ConfigError, match=r"genmodels\[eval\]"):
    harness.adapter_class()
  harness.adapter_class.cache_clear()


@pytest.mark.parity
def test_tasks_of_the_harness(ar, tmp_path, capsys):
  """Multiple choice, generation and perplexity on local data, against the same sums taken by hand."""
  pytest.importorskip("lm_eval")
  data = [
    {"q": "1 + 1 =", "options": [" 2", " three", " f"], "y": 0},
    {"q": "def", "options": [" f", "  ", "x"], "y": 2},
  ]
  (tmp_path / "data.jsonl").write_text("".join(json.dumps(d) + "\n" for d in data))
  common = (
    f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/data.jsonl\ntest_split: test\n"
  )
  (tmp_path / "choice.yaml").write_text(
    f"task: tiny_choice\n{common}output_type: multiple_choice\ndoc_to_text: '{{{{q}}}}'\n"
    "doc_to_choice: '{{options}}'\ndoc_to_target: y\ntarget_delimiter: ''\nmetric_list:\n  - metric: acc\n"
  )
  (tmp_path / "write.yaml").write_text(
    f"task: tiny_write\n{common}output_type: generate_until\ndoc_to_text: '{{{{q}}}}'\ndoc_to_target: y\n"
    "generation_kwargs:\n  until: ['@']\n  max_gen_toks: 5\nmetric_list:\n  - metric: exact_match\n"
  )
  (tmp_path / "rolling.yaml").write_text(
    f"task: tiny_rolling\n{common}output_type: loglikelihood_rolling\ndoc_to_text: ''\n"
    "doc_to_target: '{{q}}'\nmetric_list:\n  - metric: bits_per_byte\n"
  )
  args = [
    "--tasks",
    "tiny_choice,tiny_write,tiny_rolling",
    "--include-path",
    str(tmp_path),
    "--batch-size",
    "4",
  ]
  out = tmp_path / "out.json"
  workdir_ = tmp_path / "run"
  workdir(workdir_, "language/ar:tiny", SMALL)
  assert harness.main([str(workdir_), *args, "--out", str(out), "--length", "48"]) == 0
  got = json.loads(out.read_text())
  model = TextModel(load_run(workdir_), TextConfig(batch_size=4, length=48))
  right = 0
  for d in data:
    nats = [s.nats for s in model.score([(d["q"], o) for o in d["options"]])]
    right += int(np.argmax(nats)) == d["y"]
  assert got["results"]["tiny_choice"]["acc,none"] == right / 2
  nats = sum(s.nats for s in model.rolling([d["q"] for d in data]))
  size = sum(len(d["q"].encode()) for d in data)
  assert got["results"]["tiny_rolling"]["bits_per_byte,none"] == pytest.approx(
    -nats / np.log(2) / size, rel=1e-5
  )
  assert got["speed"]["tokens"] == 10 and "tiny_write" in capsys.readouterr().out
