"""`genmodels train`: runs, files, continuing, bit-exact resume, refusals before compilation, --debug."""

import contextlib
import io
import json
import math
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import cli, config, kernels, metrics, step, system, train
from genmodels.config import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[1]
TEXT = ("data.documents=40",)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  """Overrides under which the text systems share one prepared data set."""
  return (*TEXT, f"data.path={tmp_path_factory.mktemp('text') / 'python'}")


def run(name, workdir, *overrides, flags=()):
  """`genmodels train` in this process: (exit status, stdout, stderr)."""
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    status = cli.main(["train", "--config", name, "--workdir", str(workdir), *flags, *overrides])
  return status, out.getvalue(), err.getvalue()


def records(workdir) -> dict[int, dict]:
  """{step: every scalar logged for it}."""
  out: dict[int, dict] = {}
  for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines():
    record = json.loads(line)
    out.setdefault(record["step"], {}).update(record)
  return out


def losses(workdir, metric: str = "loss") -> dict[int, float]:
  return {s: r[metric] for s, r in records(workdir).items() if metric in r}


# ---- every system

# One of each kind of objective, layout and latent: test-all trains these, test-full all of them.
FAMILIES = (
  "language/ar",
  "language/bd3lm",
  "vision/raster_digits",
  "vision/next_scale_digits",
  "multimodal/flow_digits",
)


# Systems that learn from what a model decoded: {name: tokens of a span}.
DECODED = {"language/cllm": 16, "language/jacobi_forcing": 8}


# Systems that go on from another one, and what falls while they do: {name: (the other, metric)}.
TAUGHT = {"language/sdtt": ("language/mdlm", "kl/diffusion")}


def trained(name, path, corpus):
  """Overrides of a system of TAUGHT: 100 steps of the other one in `path`."""
  other = TAUGHT[name][0]
  assert run(f"{other}:tiny", path / "other", *overrides_of(other, 100, corpus), "eval.every=0")[0] == 0
  return *corpus, "init.kind=workdir", f"init.path={path / 'other'}"


def decoded(name, path, corpus):
  """Overrides of a system of DECODED: an autoregressive run, and its trajectories, in `path`."""
  ar, out = path / "ar", path / "trajectories"
  assert run("language/ar:tiny", ar, *overrides_of("language/ar", 60, corpus), "eval.every=0")[0] == 0
  flags = ["--span", str(DECODED[name]), "--most", "256", "--repeats", "0"]
  with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    assert cli.main(["collect", "--workdir", str(ar), "--out", str(out), *flags]) == 0
  return f"data.path={out}", "init.kind=workdir", f"init.path={ar}"


def overrides_of(name, steps, corpus):
  text = corpus if name.startswith("language/") else ()
  return (f"train.steps={steps}", "train.log_every=1", "train.save_every=0", "optim.schedule.warmup=2", *text)


@pytest.mark.parametrize(
  "name",
  [pytest.param(n, marks=pytest.mark.slow if n in FAMILIES else pytest.mark.full) for n in config.names()],
)
def test_every_system_trains(name, tmp_path, corpus):
  """30 steps of every tiny variant: a finite loss that falls, and a likelihood (bound) that does, on held-out
  documents under the same draws, unless the model that it is of stands still."""
  more = ("eval.every=30", "eval.documents=8", "train.sample_every=30", "optim.schedule={'kind':'constant'}")
  text = corpus
  if name in DECODED or name in TAUGHT:
    text = (decoded if name in DECODED else trained)(name, tmp_path, corpus)
  for steps in (1, 30):
    status, out, err = run(f"{name}:tiny", tmp_path, *overrides_of(name, steps, text), *more)
    assert status == 0, err
  curve = losses(tmp_path, TAUGHT.get(name, ("", "loss"))[1])
  assert sorted(curve) == list(range(1, 31)) and all(map(math.isfinite, curve.values()))
  assert np.mean([curve[s] for s in range(26, 31)]) < np.mean([curve[s] for s in range(1, 6)])
  before, after = (records(tmp_path)[s]["eval/bits_per_token"] for s in (1, 30))
  # Drafts for a frozen model, adapters that imitate a random one, and a model that imitates itself leave the
  # likelihood about where it was.
  still = bool(config.load(f"{name}:tiny").optim.get("freeze")) or name in TAUGHT
  assert after < before or (still and after == pytest.approx(before, rel=0.05)), (before, after)
  assert list((tmp_path / "samples").iterdir())
  assert "done: step 30" in out


@pytest.mark.slow
@pytest.mark.compat
@pytest.mark.parametrize("name", FAMILIES)
def test_one_step_of_every_family(name, tmp_path, corpus):
  """One step, saved; the same command restores it and takes the next: what a new jax may break first."""
  for steps in (1, 2):
    settings = (*overrides_of(name, steps, corpus), "eval.every=0", "optim.schedule={'kind':'constant'}")
    status, _, err = run(f"{name}:tiny", tmp_path, *settings)
    assert status == 0, err
  assert "step 1" in err and sorted(losses(tmp_path)) == [1, 2]
  assert all(map(math.isfinite, losses(tmp_path).values()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpus):
  """A block-diffusion run of 30 steps: (workdir, stdout, stderr)."""
  workdir = tmp_path_factory.mktemp("bd3lm")
  more = ("eval.every=30", "eval.documents=8", "eval.draws=2")
  status, out, err = run("language/bd3lm:tiny", workdir, *overrides_of("language/bd3lm", 30, corpus), *more)
  assert status == 0, err
  return workdir, out, err


def test_a_run_learns_and_says_so(finished):
  workdir, out, err = finished
  curve = losses(workdir)
  assert sorted(curve) == list(range(1, 31)) and all(map(math.isfinite, curve.values()))
  assert np.mean([curve[s] for s in range(26, 31)]) < 0.9 * np.mean([curve[s] for s in range(1, 6)])
  assert out.startswith("done: step 30, loss ")
  assert "from scratch" in err and "step 30/30" in err and "held out" in err
  last = records(workdir)[30]
  for key in (
    "grad_norm",
    "update_norm",
    "lr",
    "tokens_per_second",
    "denominator/diffusion",
    "eval/bits_per_token",
  ):
    assert math.isfinite(last[key]), key
  assert last["skipped"] == 0


def test_networks_beside_the_model_are_counted_by_their_own_shape(corpus):
  """A second language model of half the depth has half the trunk and half the attention; it reads nothing."""
  section = "{'num_heads': 2, 'num_kv_heads': 2, 'head_dim': 16, 'width': 64, 'mlp': 128, 'layers': %d}"
  of = {}
  for layers in (2, 4):
    cfg = config.load("language/maria:tiny", [f"trees.mlm.model={section % layers}", *corpus])
    of[layers] = step.flop_counts(system.build(cfg))
  assert sorted(of[2]) == ["mlm", "model"] and of[2]["model"] == of[4]["model"] != of[2]["mlm"]
  assert of[4]["mlm"].trunk == 2 * of[2]["mlm"].trunk == 4 * (4 * 64 * 32 + 3 * 64 * 128)
  assert (
    of[4]["mlm"].attention == {"full": 4 * 2 * 16} == {p: 2 * n for p, n in of[2]["mlm"].attention.items()}
  )


def test_files_of_a_run(finished):
  workdir, _, _ = finished
  stored = json.loads((workdir / "config.json").read_text())
  assert stored["name"] == "language/bd3lm" and stored["train"]["steps"] == 30
  resolved = json.loads((workdir / "resolved.json").read_text())
  assert {"train", "optim", "eval", "checkpoint", "mesh", "model", "objective"} <= set(resolved)
  assert resolved["train"]["guard_sigma"] == 6.0  # defaults are written out
  assert list((workdir / "tensorboard").glob("*tfevents*"))
  assert sorted(p.name for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()) == ["30"]
  assert (workdir / "data_plan.json").exists()


def test_every_second_is_accounted_for(finished):
  g = metrics.goodput(finished[0] / "goodput.jsonl")
  assert g["wall"] > 0 and abs(g["unaccounted"]) <= 0.01 * g["wall"]
  assert {"init", "compile", "step", "data", "save", "eval"} <= set(g)


def test_the_same_command_continues(finished, corpus):
  """A finished run is left as it is; no step is taken again."""
  workdir, _, _ = finished
  before = (workdir / "metrics.jsonl").read_bytes()
  status, out, err = run("language/bd3lm:tiny", workdir, *overrides_of("language/bd3lm", 30, corpus))
  assert status == 0 and "step 30" in err and "complete" in err and out.startswith("done: step 30")
  assert "; changed since: eval.documents 8 → 32, eval.draws 2 → 8\n" in err
  assert (workdir / "metrics.jsonl").read_bytes() == before


def test_resume_is_bit_exact(tmp_path, corpus):
  """10 steps, and 5 steps, a checkpoint and 5 more: losses and the whole state, bit for bit."""
  small = ("model.layers=1", "model.width=32", "data.seq_len=32", "train.ema=0.9", "train.tensorboard=False")
  settings = (*overrides_of("language/mdlm", 10, corpus), "train.save_every=5", "eval.every=0", *small)
  go = lambda folder: train.train(
    config.load("language/mdlm:tiny", settings), str(tmp_path / folder), out=io.StringIO()
  )
  straight = go("straight")
  shutil.copytree(tmp_path / "straight/checkpoints/5", tmp_path / "parts/checkpoints/5")
  resumed = go("parts")
  a, b = losses(tmp_path / "straight"), losses(tmp_path / "parts")
  assert sorted(a) == list(range(1, 11)) and sorted(b) == [6, 7, 8, 9, 10]
  assert [a[s].hex() for s in b] == [b[s].hex() for s in b] and len(set(a.values())) == 10
  assert int(resumed.state.step) == 10 and {"model", "ema"} == set(resumed.state.trees)
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(bits(x), bits(y)), straight.state, resumed.state)


def bits(x):
  x = np.asarray(x)
  return x.view(np.uint32) if x.dtype == np.float32 else x


# ---- refusals

# (config, overrides, words of the message: key and value, reason, fix)
REFUSED = {
  "unknown key": ("language/ar", ["optim.learning_rate=1"], ["optim.learning_rate = 1", "unknown key", "known: "]),
  "misspelt key": ("language/ar", ["train.stesp=1"], ["train.stesp = 1", "unknown key", "did you mean 'steps'"]),
  "unknown section": ("language/ar", ["trainer={}"], ["trainer = {}", "unknown section", "did you mean 'train'"]),
  "wrong type": ("language/ar", ["train.log_every=many"], ["train.log_every = 'many'", "int", "fix: write a int"]),
  "a list for a number": ("language/ar", ["optim.eps=(1,)"], ["optim.eps = (1,)", "expected float", "fix: "]),
  "unknown kind": ("language/ar", ["objective.kind=tokenz"], ["objective.kind = 'tokenz'", "unknown kind", "'tokens'"]),
  "unknown mask": ("language/ar", ["objective.masks.full=causl"], ["mask is 'causl'", "causal"]),
  "range": ("language/ar", ["train.ema=1.5"], ["train.ema = 1.5", "must lie in [0, 1)", "fix: "]),
  "accumulate": (
    "language/ar", ["train.accumulate=3"],
    ["batch_size = 8", "not divisible by train.accumulate", "fix: a multiple of 3"],
  ),
  "AR loss on a stream that sees ahead": (
    "language/ar", ["objective.masks.full=full"],
    ["objective.terms.text = ", "reaches that token's clean identity", "fix: a shifted loss needs a causal stream"],
  ),
  "AR term on a block-bidirectional clean stream": (
    "language/nbdiff", ["objective.masks.full=bd3", "objective.corruption.blocks.size=4"],
    ["objective.terms.ar = ", "reaches that token's clean identity", "fix: a shifted loss needs a causal stream"],
  ),
  "noisy queries see their own clean block": (
    "language/bd3lm", ["objective.masks={'full': {'n>n': 'BLK_EQ', 'n>c': 'BLK_LE', 'c>c': 'BLK_LE'}}"],
    ["objective.terms.diffusion = ", "reaches that token's clean identity", "clean tokens of earlier blocks only"],
  ),
  "noisy queries see all clean tokens": (
    "language/bd3lm", ["objective.masks={'full': {'n>n': 'BLK_EQ', 'n>c': 'ALL', 'c>c': 'BLK_LE'}}"],
    ["objective.terms.diffusion = ", "reaches that token's clean identity", "clean tokens of earlier blocks only"],
  ),
  "the clean stream sees noise": (
    "language/bd3lm", ["objective.masks={'full': {'n>n': 'BLK_EQ', 'n>c': 'BLK_LT', 'c>c': 'BLK_LE', 'c>n': 'BLK_LT'}}"],
    ["objective.masks = ", "changing the noise changes the clean stream", "fix: remove the clean → noisy relation"],
  ),
  "a weight that is not 1/marginal": (
    "language/sdar", ["objective.reproduction=False"],
    ["objective.terms.diffusion.weight = 'inverse_marginal'", "true marginal", "fix: use corruption.count='exact'"],
  ),
  "weights of a complementary pair": (
    "language/mdlm",
    ["objective.corruption={'kind': 'absorb', 'complement': True, 'schedule': 'cosine'}",
     "objective.layout.streams=('n', 'n1')"],
    ["objective.terms.diffusion.weight = 'nelbo'", "complement", "fix: "],
  ),
  "no such head": ("language/ar", ["objective.terms.text.head=image"], ["objective.terms.text.head = 'image'", "fix: one of text"]),
  "no such pattern": (
    "language/ar", ["objective.masks={'local': 'causal'}"], ["model.pattern = 'full'", "add it to objective.masks"],
  ),
  "mask id outside of the vocabulary": (
    "language/mdlm", ["model.vocab=200"], ["objective.mask_id = ", "outside of the vocabulary of 200", "enlarge model.vocab"],
  ),
  "several terms, none reported": (
    "language/nbdiff", ["objective.likelihood="], ["objective.likelihood", "nobody says which one", "fix: "],
  ),
  "warm-up longer than the run": (
    "language/ar", ["train.steps=4"], ["warmup", "5", "steps 4", "fix: "],
  ),
  "optimiser": ("language/ar", ["optim.name=adam"], ["optim.name = 'adam'", "expected one of adamw", "fix: "]),
  "a freeze that matches nothing": ("language/ar", ["optim.freeze=('nothing/.*',)"], ["optim.freeze", "matches no parameter"]),
  "mesh and devices": ("language/ar", ["mesh.data=3"], ["mesh", "data=3", "devices", "-1"]),
  "mesh and width": (
    "language/ar", ["mesh.data=1", "mesh.fsdp=8", "model.width=36"],
    ["embed", "36", "fsdp=8", "pad"],
  ),
  "a kernel of another platform": (
    "language/ar", ["model.attention=pallas_tpu"],
    ["model.attention = 'pallas_tpu'", "cannot run here", "needs a TPU", "fix: 'auto', or 'xla'"],
  ),
  "unknown attention": ("language/ar", ["model.attention=flash"], ["model.attention = 'flash'", "unknown", "pallas_gpu"]),
  "attention tiles": ("language/ar", ["model.attention_tiles=(100, 64)"], ["attention_tiles=(100, 64)", "multiples of 8"]),
  "capacity": ("language/ar", ["model.attention_capacity=2.0"], ["attention_capacity=2.0", "(0, 1]"]),
  "mesh and batch": ("language/ar", ["batch_size=12"], ["batch_size = 12", "data × fsdp", "fix: a multiple of 8"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_configs_are_refused_before_anything_compiles(case, tmp_path, corpus, monkeypatch):
  name, overrides, words = REFUSED[case]

  def compiled(*args, **kw):
    pytest.fail("the run went as far as its state")

  monkeypatch.setattr(train.initialisation, "initialise", compiled)
  monkeypatch.setattr(train.steps, "make_train_step", compiled)
  status, out, err = run(f"{name}:tiny", tmp_path / "run", *corpus, *overrides)
  assert status == 2 and not out
  for word in words:
    assert word in err, f"{word!r} is missing from:\n{err}"


def test_a_sound_config_reaches_its_state(tmp_path, corpus, monkeypatch):
  """The control of the refusals: without the wrong key the same call goes on to the state."""

  class Reached(Exception):
    pass

  def reached(*args, **kw):
    raise Reached

  monkeypatch.setattr(train.initialisation, "initialise", reached)
  with pytest.raises(Reached):
    run("language/ar:tiny", tmp_path, *corpus)


def test_a_pinned_kernel_is_refused_before_data_are_read(tmp_path, monkeypatch):
  monkeypatch.setattr(train.system.data, "build", lambda *a, **k: pytest.fail("the data were opened"))
  status, _, err = run("language/ar:tiny", tmp_path, "model.attention=pallas_gpu")
  assert status == 2 and "model.attention = 'pallas_gpu'" in err
  with pytest.raises(pytest.fail.Exception, match="opened"):  # the control: "auto" goes on
    run("language/ar:tiny", tmp_path)


def test_the_choice_of_attention_is_said(tmp_path, corpus, monkeypatch):
  """Once, at the start: the implementation, why, its tiles; and what a section asks for in vain."""
  monkeypatch.setattr(
    train.initialisation, "initialise", lambda *a, **k: (_ for _ in ()).throw(ConfigError("stop"))
  )
  start = lambda *more: run("language/bd3lm:tiny", tmp_path / "run", *corpus, *more)[2]
  said = start()
  assert (
    "attention xla (auto: no kernel of its own for cpu) · tiles full 64×64\n" in said and "note:" not in said
  )
  resolved = json.loads((tmp_path / "run/resolved.json").read_text())
  assert resolved["model"]["attention"] == "xla"  # not "auto"
  said = start("model.attention=xla", "model.attention_tiles=(16,32)", "model.attention_capacity=0.5")
  assert "attention xla (as configured) · tiles full 16×32\n" in said
  assert "note: model.attention_capacity is without effect" in said
  with kernels.building_for(TPU):
    said = start("model.attention_capacity=0.5")
  assert "attention pallas_tpu (auto: the kernel of TPU v5p) · tiles full" in said and "note:" not in said


# ---- tile lists that are too short

TPU = kernels.Target("tpu", "TPU v5p", interpret=True)
BOUNDED = (
  "batch_size=2", "model.layers=1", "model.width=32", "model.mlp=32", "model.num_heads=2", "model.num_kv_heads=1", "data.seq_len=64",
  "eval.every=0", "train.tensorboard=False", "model.attention=pallas_tpu",
  "model.attention_tiles=(16,16)",
)  # fmt: skip


@pytest.fixture
def one_device(monkeypatch):
  """The interpreter does not run in a shard_map that checks what varies over which axis."""
  make = train.meshes.make_mesh
  monkeypatch.setattr(train.meshes, "make_mesh", lambda cfg: make(cfg, jax.devices()[:1]))


def test_short_tile_lists_stop_the_run_and_say_what_to_change(tmp_path, corpus, one_device):
  """128 slots in 8 × 8 tiles and two intervals are 128 entries at worst; the mask needs 24 or so."""
  settings = (*overrides_of("language/bd3lm", 3, corpus), *BOUNDED)
  with kernels.building_for(TPU):
    status, out, err = run("language/bd3lm:tiny", tmp_path / "a", *settings, "model.attention_capacity=0.05")
  assert status == 2 and not out
  for word in (
    "model.attention_capacity = 0.05",
    "step 1",
    "pattern full",
    "fix: 0.1, or None",
    "parameters are as before",
  ):
    assert word in err, err
  assert "update refused" not in err and "skipped" not in err  # nobody calls it a bad batch
  assert not losses(tmp_path / "a") and not list((tmp_path / "a/checkpoints").glob("[0-9]*"))


@pytest.mark.full
def test_lists_with_room_train_as_the_worst_case_does(tmp_path, corpus, one_device):
  """The control: half the worst case is enough, and the numbers are those of plain XLA."""
  settings = (*overrides_of("language/bd3lm", 3, corpus), *BOUNDED)
  with kernels.building_for(TPU):
    status, _, err = run("language/bd3lm:tiny", tmp_path / "a", *settings, "model.attention_capacity=0.5")
  assert status == 0, err
  status, _, err = run("language/bd3lm:tiny", tmp_path / "b", *settings, "model.attention=xla")
  assert status == 0, err
  a, b = losses(tmp_path / "a"), losses(tmp_path / "b")
  np.testing.assert_allclose([a[s] for s in (1, 2, 3)], [b[s] for s in (1, 2, 3)], rtol=1e-5)


@pytest.mark.slow
def test_one_noisy_stream_is_noted(tmp_path, corpus, monkeypatch):
  """Laws that warn: D2F's blocks condition on noisy blocks, SDAR's loss is no bound."""
  monkeypatch.setattr(
    train.initialisation, "initialise", lambda *a, **k: (_ for _ in ()).throw(ConfigError("stop"))
  )
  assert "note: one noisy stream" in run("language/d2f:tiny", tmp_path / "a", *corpus)[2]
  assert "note: reproduction" in run("language/sdar:tiny", tmp_path / "b", *corpus)[2]
  assert "note:" not in run("language/bd3lm:tiny", tmp_path / "c", *corpus)[2]


# ---- debug


@pytest.mark.full
def test_debug_names_the_layer_of_a_planted_nan(tmp_path, corpus, monkeypatch):
  """A NaN in one weight of layer 1 is found in that layer's module, with no jit and no scan."""
  jitted, plant = [], train.initialisation.initialise

  def planted(*args, **kw):
    state, origin = plant(*args, **kw)
    leaf = state.trees["model"]["stack"]["s0"]["l0"]["mlp"]["up"]["kernel"]  # [layers, …]
    state.trees["model"]["stack"]["s0"]["l0"]["mlp"]["up"]["kernel"] = leaf.at[1, 0, 3].set(jnp.nan)
    return state, origin

  monkeypatch.setattr(train.initialisation, "initialise", planted)
  make = train.steps.make_train_step

  def watched(*args, **kw):
    fn = make(*args, **kw)

    def step_fn(*a):
      jitted.append(jax.config.jax_disable_jit)
      return fn(*a)

    return step_fn

  monkeypatch.setattr(train.steps, "make_train_step", watched)
  small = ("model.width=16", "model.mlp=16", "model.num_heads=2", "model.num_kv_heads=1", "model.head_dim=8",
           "data.seq_len=16", "eval.every=0", "train.tensorboard=False")  # fmt: skip
  with pytest.raises(FloatingPointError, match=r"layer 1 mlp/up.*from finite inputs"):
    run("language/ar:tiny", tmp_path, *overrides_of("language/ar", 3, corpus), *small, flags=("--debug",))
  assert jitted == [True]


# ---- the trainer knows no system


def test_train_and_step_name_no_system():
  """Neither file contains the name of a system, of a paper's method, or of a kind of objective."""
  from genmodels.corruption import REGISTRY as corruptions
  from genmodels.layouts import REGISTRY as layouts
  from genmodels.objectives.base import registry

  words = {n.split("/")[1] for n in config.names()} - {"ar"}
  words |= {
    "d2f",
    "llada",
    "mdlm",
    "bd3",
    "nbdiff",
    "sdar",
    "dream",
    "var",
    "llamagen",
    "digits",
    "flow",
    "nextstep",
  }
  words |= set(registry()) | set(corruptions) | set(layouts)
  pattern = re.compile(
    r"(?<![A-Za-z])(" + "|".join(sorted(words, key=len, reverse=True)) + r")(?![A-Za-z])", re.I
  )
  for module in (train, step):
    code = pathlib.Path(module.__file__).read_text()
    code = code.replace("configs/language/bd3lm.py:tiny", "").replace(
      "runs/bd3lm", ""
    )  # the example of the usage
    found = {m.group(1) for m in pattern.finditer(code)} - {
      "clean",
      "tokens",
      "streams",
    }  # ordinary words, too
    assert not found, (module.__name__, found)
    assert not re.search(r"objective\s*(==|\bin\b)|isinstance\(.*(objective|layout|corruption)", code)
  assert len(pathlib.Path(train.__file__).read_text().splitlines()) <= 350
  assert pattern.search("if kind == 'bd3lm'")  # the pattern finds what it is for
