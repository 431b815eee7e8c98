"""Import and export of Hugging Face folders: bad input, runs, config sections, kills, memory."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import cli, models, state
from genmodels.checkpoint import (
  adopt,
  folder,
  hf_adapters,
  hf_config,
  hf_export,
  hf_import,
  hf_names,
  init,
  tensors,
)
from genmodels.checkpoint.manager import Manager, nested
from genmodels.config import ConfigError
from genmodels.data import tokenizers
from genmodels.models import config as trunk_config
from tests.checkpoint import folders
from tests.models import cases

# ------------------------------------------------------------------------------------- bad input


def cut(path):
  data = path.read_bytes()
  path.write_bytes(data[: len(data) - 100])


def edit(path, **changes):
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def recast(src, dtype):
  named = {n: t.open().copy() for n, t in tensors.folder(src).items()}
  name = "model.layers.1.mlp.up_proj.weight"
  named[name] = named[name].astype(dtype)
  shutil.rmtree(src)
  folders.write(src, folders.CONFIGS["qwen3"], named)


def drop(src, name):
  named = {n: t.open().copy() for n, t in tensors.folder(src).items() if n != name}
  shutil.rmtree(src)
  folders.write(src, folders.CONFIGS["qwen3"], named)


def pickled(src):
  for p in src.glob("*.safetensors*"):
    p.unlink()
  (src / "pytorch_model.bin").write_bytes(b"\x80\x04")


BAD = {
  "missing shard": (lambda s: (s / "model-00002-of-00003.safetensors").unlink(), "missing shard model-00002-of-00003"),
  "truncated shard": (lambda s: cut(s / "model-00002-of-00003.safetensors"), "truncated: expected .* bytes, got"),
  "cut header": (lambda s: (s / "model-00001-of-00003.safetensors").write_bytes(b"\xff" * 12), "cut inside its header"),
  "no header": (lambda s: (s / "model-00001-of-00003.safetensors").write_bytes(b"\x04" + 7 * b"\0" + b"oops"), "no JSON"),
  "wrong dtype": (lambda s: recast(s, np.int8), "up_proj.weight is I8; weights are read as F32, F16, BF16"),
  "missing tensor": (lambda s: drop(s, "model.norm.weight"), "1 missing tensors: model.norm.weight"),
  "pickle": (pickled, "only pickled weights .* runs whatever code"),
  "no weights": (lambda s: [p.unlink() for p in s.glob("*.safetensors*")], r"no \*.safetensors file"),
  "vocabulary of the config": (lambda s: edit(s / "config.json", vocab_size=301), "expected shape .*do not belong"),
  "vocabulary of the tokenizer": (lambda s: folders.tokenizer(s, specials=[f"<{i}>" for i in range(60)]), "ids up to 3.., the weights 300 rows"),
  "layers": (lambda s: edit(s / "config.json", num_hidden_layers=2), "9 tensors that no parameter takes|no parameter"),
  "heads": (lambda s: edit(s / "config.json", num_key_value_heads=3), "k_proj.weight: expected shape"),
  "unknown architecture": (lambda s: edit(s / "config.json", model_type="mamba"), "model_type = 'mamba': cannot read"),
  "mixture of experts": (lambda s: edit(s / "config.json", model_type="mixtral"), "not supported yet: it needs its names"),
  "fused experts": (lambda s: edit(s / "config.json", model_type="llada2_moe_veomni"), "experts stored as one tensor"),
  "experts of the config": (lambda s: edit(s / "config.json", model_type="qwen3_moe"), "lacks a key.*num_experts|num_experts"),
  "activation": (lambda s: edit(s / "config.json", hidden_act="relu2"), "hidden_act = 'relu2'"),
  "rope": (lambda s: edit(s / "config.json", rope_scaling={"rope_type": "longrope", "factor": 2.0}), "longrope"),
  "quantised": (lambda s: edit(s / "config.json", quantization_config={"bits": 4}), "quantised weights"),
  "window": (
    lambda s: edit(s / "config.json", layer_types=["sliding_attention"] * 3, sliding_window=None), "sliding_window",
  ),
  "incomplete config": (lambda s: edit(s / "config.json", model_type="gpt2"), "config.json lacks a key"),
  "no config": (lambda s: (s / "config.json").unlink(), "has no config.json"),
  "config is no JSON": (lambda s: (s / "config.json").write_text("{"), "no JSON"),
  "tokenizer is no JSON": (lambda s: (s / "tokenizer.json").write_text("{"), "tokenizer.json cannot be read"),
  "index of pickles": (
    lambda s: (s / tensors.INDEX).write_text(json.dumps({"weight_map": {"a": "../model.bin"}})), "no index",
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, tmp_path, capsys):
  """One message that says what and where; nothing is written."""
  src, _ = folders.make(tmp_path / "src", "qwen3", shards=3)
  folders.tokenizer(src)
  spoil, message = BAD[name]
  spoil(src)
  with pytest.raises(ValueError, match=message):
    hf_import.import_folder(str(src), str(tmp_path / "dst"))
  assert [p.name for p in tmp_path.iterdir()] == ["src"]
  assert cli.main(["import", str(src), str(tmp_path / "dst")]) == 2
  assert capsys.readouterr().err.startswith("genmodels import: ")


def test_nothing_is_written_over(tmp_path):
  src, _, done = folders.imported(tmp_path)
  before = {p: p.stat().st_mtime_ns for p in (tmp_path / "dst").rglob("*")}
  assert (
    hf_import.import_folder(str(src), str(tmp_path / "dst")).manifest == done.manifest
  )  # the same: nothing to do
  other, _ = folders.make(tmp_path / "other", "qwen2")
  with pytest.raises(ValueError, match="is an import of .*src.*nothing was written"):
    hf_import.import_folder(str(other), str(tmp_path / "dst"))
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "thesis.tex").write_text("x")
  with pytest.raises(ValueError, match="something else; nothing was written"):
    hf_import.import_folder(str(src), str(tmp_path / "mine"))
  with pytest.raises(ValueError, match="exists; nothing was written"):
    hf_export.export_folder(str(tmp_path / "dst"), str(tmp_path / "mine"))
  assert {p: p.stat().st_mtime_ns for p in (tmp_path / "dst").rglob("*")} == before
  assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
  # The rest of another import is not taken for this one's.
  (tmp_path / "new.importing").mkdir()
  (tmp_path / "new.importing" / "identity.json").write_text("{}")
  with pytest.raises(ValueError, match="rest of another import"):
    hf_import.import_folder(str(src), str(tmp_path / "new"))


def test_a_full_disk_is_found_before_anything_is_written(tmp_path, monkeypatch):
  src, _ = folders.make(tmp_path / "src", "qwen3")
  monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
  with pytest.raises(tensors.TensorError, match="bytes of free disk for the import, got 1,000"):
    hf_import.import_folder(str(src), str(tmp_path / "dst"))
  assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
  folders.imported(tmp_path)
  monkeypatch.setattr(
    tensors, "copy_into", lambda a, b: (_ for _ in ()).throw(OSError(28, "No space left on device"))
  )
  with pytest.raises(OSError, match="No space"):
    hf_export.export_folder(str(tmp_path / "dst"), str(tmp_path / "out"))
  assert not list(tmp_path.glob("out*"))


def test_export_needs_to_know_the_layout(tmp_path):
  with pytest.raises(FileNotFoundError, match="SRC is a workdir of `train`, or an import"):
    hf_export.export_folder(str(tmp_path), str(tmp_path / "out"))
  src, _ = folders.make(tmp_path / "src", "qwen3")
  with pytest.raises(ConfigError, match="neither an import nor a workdir"):
    hf_export.export_folder(str(src), str(tmp_path / "out"))


# ------------------------------------------------------------------------------ workdirs of runs


def workdir(path, done, trees, **sections):
  """A workdir as `train` leaves it: config.json and one checkpoint of `trees` {name: {leaf: array}}."""
  ours = json.loads((done.directory / "config.json").read_text())
  (path / init.CHECKPOINTS).mkdir(parents=True)
  (path / "config.json").write_text(json.dumps({**ours, "train": {}, **sections}))
  manager = Manager(path / init.CHECKPOINTS)
  nest = lambda leaves: nested({n: jnp.asarray(x) for n, x in leaves.items()})
  manager.save(3, {"trees": {tree: nest(leaves) for tree, leaves in trees.items()}})
  manager.close()
  return path


def test_export_of_a_run(tmp_path):
  """The average where one is kept; what the import brought along; padding of the vocabulary left out."""
  src, named, done = folders.imported(tmp_path, dtype=folders.BF16)
  leaves = {n: np.asarray(done.leaf(n), np.float32) for n in done.manifest["leaves"]}
  pad = lambda x: np.concatenate([x, np.full((20, x.shape[1]), 9, x.dtype)])
  leaves["embed/tokens/embedding"] = pad(leaves["embed/tokens/embedding"])
  leaves["heads/text/kernel"] = pad(leaves["heads/text/kernel"].T).T
  model = json.loads((done.directory / "config.json").read_text())["model"]
  run = workdir(
    tmp_path / "run", done, {"model": {n: x + 1 for n, x in leaves.items()}, "ema": leaves}, train={"ema": 0.9},
    model={**model, "vocab_multiple": 64, "param_dtype": "float32"},
  )  # fmt: skip
  with pytest.raises(ConfigError, match="nothing says which layout"):
    hf_export.export_folder(str(run), str(tmp_path / "out"))
  hf_export.carry(str(tmp_path / "dst"), run)
  made = hf_export.export_folder(str(run), str(tmp_path / "out"))
  assert (made["layout"], made["step"]) == ("qwen3", 3)
  back = tensors.folder(tmp_path / "out")
  assert {n: t.open().tobytes() for n, t in back.items()} == {n: x.tobytes() for n, x in named.items()}
  assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (src / "tokenizer.json").read_bytes()
  hf_export.export_folder(str(run), str(tmp_path / "raw"), tree="model", dtype="float32")
  norm = tensors.folder(tmp_path / "raw")["model.norm.weight"].open()
  np.testing.assert_array_equal(norm, named["model.norm.weight"].astype(np.float32) + 1)
  # A run that starts from this run passes the files on.
  hf_export.carry(str(run), tmp_path / "next")
  assert (tmp_path / "next" / "hf" / "facts.json").is_file()
  # Without them: a layout by name, and a folder to be like.
  shutil.rmtree(run / "hf")
  hf_export.export_folder(str(run), str(tmp_path / "bare"), layout="qwen3")
  assert json.loads((tmp_path / "bare" / "config.json").read_text())["vocab_size"] == 300
  hf_export.export_folder(str(run), str(tmp_path / "like"), like=str(src))
  assert json.loads((tmp_path / "like" / "config.json").read_text())["max_position_embeddings"] == 64
  with pytest.raises(ConfigError, match="has no such tree"):
    hf_export.export_folder(str(run), str(tmp_path / "x"), tree="teacher", layout="qwen3")


def adapted(tmp_path, gated=False):
  """(import, its leaves with random adapters, the workdir): a run with adapters of rank 2 on q, o and down."""
  src, _, done = folders.imported(tmp_path)
  leaves = {n: np.asarray(done.leaf(n)) for n in done.manifest["leaves"]}
  section = json.loads((done.directory / "config.json").read_text())["model"]
  spec = {"rank": 2, "alpha": 3.0, "targets": "stack/.*/(q|o|down)", "gated": gated}
  shapes = models.build(hf_import.tuples({**section, "lora": spec})).abstract_params()
  rng = np.random.default_rng(5)
  for name, x in state.param_paths(shapes).items():
    if "lora_" in name:
      leaves[name] = rng.standard_normal(x.shape).astype(np.float32)
  return src, leaves, workdir(tmp_path / "lora", done, {"model": leaves}, model={**section, "lora": spec})


def test_adapters_are_merged_on_export(tmp_path):
  """W + alpha/r · B·A in torch's names, whatever is not adapted bit for bit; or the base model, if asked for."""
  src, leaves, run = adapted(tmp_path)
  made = hf_export.export_folder(str(run), str(tmp_path / "out"), layout="qwen3", like=str(src))
  before, after = tensors.folder(src), tensors.folder(tmp_path / "out")
  assert set(before) == set(after) and made["tensors"] == len(after)
  for name, t in after.items():
    base, module = before[name].open().astype(np.float32), name.split(".")[-2]
    want = base
    if module in ("q_proj", "o_proj", "down_proj"):
      site = {"q_proj": "attn/q", "o_proj": "attn/o", "down_proj": "mlp/down"}[module]
      i = int(name.split(".")[2])
      a, b = (leaves[f"stack/s0/l0/{site}/lora_{x}"][i] for x in "ab")
      want = base + 1.5 * (a.reshape(-1, 2) @ b.reshape(2, -1)).T
      assert np.abs(want - base).max() > 0.1
    np.testing.assert_allclose(t.open(), want, rtol=1e-6, atol=1e-6)
    assert module in ("q_proj", "o_proj", "down_proj") or (np.asarray(t.open()) == base).all()
  hf_export.export_folder(str(run), str(tmp_path / "base"), layout="qwen3", like=str(src), adapters="drop")
  for name, t in tensors.folder(tmp_path / "base").items():
    np.testing.assert_array_equal(t.open(), before[name].open())
  with pytest.raises(ConfigError, match="has no adapters"):
    hf_export.export_folder(str(tmp_path / "dst"), str(tmp_path / "x"), adapters="peft")
  assert not (tmp_path / "x").exists()


def test_gated_adapters_are_not_merged(tmp_path):
  """They are refused by name; as a PEFT folder they say where they act."""
  src, leaves, run = adapted(tmp_path, gated=True)
  with pytest.raises(ConfigError, match=r"gated(.|\n)*'peft' for the adapters alone, 'drop' for the base"):
    hf_export.export_folder(str(run), str(tmp_path / "out"), layout="qwen3")
  assert not (tmp_path / "out").exists()
  done = cli.main(["export", str(run), str(tmp_path / "peft"), "--layout", "qwen3", "--adapters", "peft"])
  assert done == 0 and not (tmp_path / "peft" / "config.json").exists()
  settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
  assert (settings["r"], settings["lora_alpha"], settings["target_modules"]) == (
    2,
    3.0,
    ["down_proj", "o_proj", "q_proj"],
  )
  assert json.loads((tmp_path / "peft" / "gate.json").read_text())["gated"] is True
  named = tensors.header(tmp_path / "peft" / "adapter_model.safetensors")[0]
  assert len(named) == 3 * 2 * 3
  a = named["base_model.model.model.layers.1.self_attn.o_proj.lora_A.weight"].open()
  np.testing.assert_array_equal(a, leaves["stack/s0/l0/attn/o/lora_a"][1].reshape(-1, 2).T)
  with pytest.raises(ConfigError, match="single sites"):
    hf_adapters.write(
      tmp_path,
      models.build(trunk_config.TrunkConfig(24, 4, 40, 300, layers=3)).cfg,
      "gpt2",
      {},
      [],
      "F32",
      {},
    )


def test_draft_heads_stay_behind(tmp_path):
  """They have no tensor in any layout: the trunk is exported as it came, and the run says what it keeps."""
  src, _, done = folders.imported(tmp_path)
  leaves = {n: np.asarray(done.leaf(n)) for n in done.manifest["leaves"]}
  section = json.loads((done.directory / "config.json").read_text())["model"]
  drafts = {"draft1": {"kind": "draft", "depth": 1}, "block": {"kind": "block", "depth": 1, "taps": (0, 2)}}
  section |= {"heads": {**section["heads"], **drafts}}
  shapes = state.param_paths(models.build(hf_import.tuples(section)).abstract_params())
  more = {n: np.zeros(x.shape, np.float32) for n, x in shapes.items() if n not in leaves}
  assert {n.split("/")[1] for n in more} == {"draft1", "block"}
  run = workdir(tmp_path / "run", done, {"model": leaves | more}, model=section)
  made = hf_export.export_folder(str(run), str(tmp_path / "out"), layout="qwen3", like=str(src))
  assert made["notes"] == ("draft heads stay in the run: block, draft1",)
  before = tensors.folder(src)
  for name, t in tensors.folder(tmp_path / "out").items():
    np.testing.assert_array_equal(t.open(), before[name].open())


def test_hidden_averages_are_not_dropped(tmp_path):
  _, _, done = folders.imported(tmp_path)
  leaves = {n: np.asarray(done.leaf(n)) for n in done.manifest["leaves"]}
  run = workdir(tmp_path / "free", done, {"model": leaves}, optim={"name": "schedule_free"})
  with pytest.raises(ConfigError, match="average that lies in the optimizer"):
    hf_export.export_folder(str(run), str(tmp_path / "out"), layout="qwen3")


def test_adopt_takes_the_model_and_leaves_the_recipe(tmp_path):
  """GPT-2's table ends with its vocabulary: it grows for the mask. Local layers get the rule, narrowed."""
  from genmodels import config

  src, _ = folders.make(tmp_path / "gpt2", "gpt2", vocab_size=290)
  folders.tokenizer(src)
  hf_import.import_folder(str(src), str(tmp_path / "dst"))
  mask = tokenizers.load(str(src)).specials["mask"]
  assert mask == 290
  cfg = config.load("language/bd3lm:tiny")
  dtype, blocks = cfg.model.dtype, cfg.objective.corruption.blocks.to_dict()
  cfg.data.documents = 5
  notes = adopt.adopt(cfg, str(tmp_path / "dst"), str(tmp_path / "run")).notes
  assert cfg.model.vocab == mask + 1 and cfg.model.learned_pos == 64 and cfg.model.dtype == dtype
  assert cfg.objective.corruption.blocks.to_dict() == blocks
  assert cfg.init.to_dict() == {
    "kind": "workdir", "path": str(tmp_path / "dst"), "mask_row": "mean_noise", "mask_id": mask, "resize_vocab": True,
  }  # fmt: skip
  assert any("grows from 290 to 291" in n for n in notes)

  src, _ = folders.make(
    tmp_path / "dream", "dream", use_sliding_window=True, sliding_window=7, max_window_layers=1
  )
  hf_import.import_folder(str(src), str(tmp_path / "dst2"))
  cfg = config.load("language/sdar:tiny")
  cfg.data = {"kind": "tokenizer", "seq_len": 32, "vocab": 300}
  adopt.adopt(cfg, str(tmp_path / "dst2"), "")
  assert cfg.objective.masks.to_dict() == {"full": "bd3", "local": "bd3&NEAR(6)"}
  assert cfg.objective.mask_id == 299 and "mask_row" not in cfg.init  # a row of its own, trained


@pytest.mark.parametrize("name", ["mtp", "medusa", pytest.param("hydra", marks=pytest.mark.full)])
def test_adopt_keeps_adapters_and_draft_heads(tmp_path, name):
  """The checkpoint's trunk, fresh adapters, and draft heads that start as the checkpoint's own head."""
  from genmodels import config

  src, _ = folders.make(tmp_path / "src", "qwen3")
  hf_import.import_folder(str(src), str(tmp_path / "dst"))
  cfg = config.load(f"language/{name}:{'plus_tiny' if name == 'hydra' else 'tiny'}")
  cfg.data = {"kind": "tokenizer", "seq_len": 32, "vocab": 300}
  cfg.objective.mask_id, cfg.model.vocab_multiple = 299, 1
  notes = adopt.adopt(cfg, str(tmp_path / "dst"), "").notes
  assert any("fresh draft heads" in n for n in notes)
  model = models.build(config.plain(cfg.model))
  with_heads = {"mtp": {"sampler", "latent"}, "medusa": {f"medusa{k}" for k in range(1, 6)}}
  with_heads = (with_heads | {"hydra": {f"hydra{k}" for k in range(1, 5)}})[name]
  assert {n for n, _ in model.cfg.heads} == {"text"} | with_heads
  fresh = state.param_paths(cases.draw(model.abstract_params()))
  axes = state.param_paths(model.logical_axes(), is_leaf=lambda a: isinstance(a, tuple))
  recipe = config.build_kind(init.REGISTRY, cfg.init, "init")
  recipe = dataclasses.replace(recipe, mask_row="", mask_id=-1)
  leaves, *_ = recipe.load(fresh, axes)
  source = folder.Folder.open(tmp_path / "dst")
  for leaf, x in leaves.items():
    if leaf in source.manifest["leaves"]:
      np.testing.assert_array_equal(x, source.leaf(leaf))
    elif leaf.endswith("out/kernel"):
      np.testing.assert_array_equal(x, source.leaf("heads/text/kernel"))
    else:
      assert "lora_" in leaf or "block" in leaf or "norm" in leaf or leaf.startswith("prefix/")
      np.testing.assert_array_equal(x, fresh[leaf])
  theirs = json.loads((tmp_path / "dst" / "config.json").read_text())
  tied = {**theirs["model"], "heads": {"text": {"tied": True}}}
  if name == "medusa":
    with pytest.raises(ConfigError, match="tied to its token table"):
      adopt._with_drafts(tied["heads"], config.plain(cfg.model.heads))


def test_sampling_and_evaluation_of_an_import_say_what_does_not_fit(tmp_path, capsys):
  src, _ = folders.make(tmp_path / "src", "gpt2")
  folders.tokenizer(src)
  hf_import.import_folder(str(src), str(tmp_path / "dst"))
  sample = ["sample", str(tmp_path / "dst")]
  assert cli.main([*sample, "--prompt", folders.TEXT, "--length", "8"]) == 2
  assert "a row has 8; raise the length or cut the prompt" in capsys.readouterr().err
  assert cli.main([*sample, "--prompt", "the", "--length", "65"]) == 2
  assert "64 learned positions" in capsys.readouterr().err
  assert cli.main(["eval", str(tmp_path / "dst")]) == 2
  assert "--text FILE" in capsys.readouterr().err
  (tmp_path / "text.txt").write_text(folders.TEXT)
  assert (
    cli.main(["eval", str(tmp_path / "dst"), "--text", str(tmp_path / "text.txt"), "--length", "65"]) == 2
  )
  assert "64 positions" in capsys.readouterr().err


# ------------------------------------------------------------------------------- config sections


def test_layers_of_a_pattern():
  section = hf_config.section(folders.CONFIGS["gemma3_text"])
  local = {"mask": "local", "rope_base": 1e4, "rope_scaling": False}
  assert section["pattern"] == (local, local, {}) and section["layers"] == 5
  cfg = trunk_config.from_section(section)
  assert [(s.repeats, len(s.pattern)) for s in cfg.segments] == [(1, 3), (1, 2)]
  assert (
    cfg.rope.scaling.kind == "linear" and cfg.attn_scale == 20**-0.5 and cfg.post_norm and cfg.norm_offset
  )
  runs = hf_config.section(folders.CONFIGS["qwen2_window"])["segments"]
  assert [(s["pattern"], s["repeats"]) for s in runs] == [(({},), 2), (({"mask": "local"},), 1)]
  assert hf_config.section(folders.CONFIGS["mistral"])["pattern"] == ({"mask": "local"},)
  assert hf_config.window(folders.CONFIGS["mistral"], hf_config.section(folders.CONFIGS["mistral"])) == 5
  assert hf_config.masks("bd3", 5) == {"full": "bd3", "local": "bd3&NEAR(4)"}


@pytest.mark.parametrize("case", folders.CONFIGS)
def test_every_config_writes_itself(case):
  """From our model alone: the layout's own config.json gives the same model back."""
  config = folders.CONFIGS[case]
  layout = (
    "diffullama" if case == "diffullama" else "diffugpt" if case == "diffugpt" else hf_config.layout(config)
  )
  cfg = trunk_config.from_section(hf_config.section(config))
  out = hf_config.write(cfg, layout, {}, config.get("sliding_window") or 0)
  assert not hf_config.differences(
    trunk_config.from_section(hf_config.section(json.loads(json.dumps(out)))), cfg
  )
  assert hf_names.entries(cfg, layout)


@pytest.mark.full  # an 8-device step: 40 s of a core
def test_a_mixture_of_experts_from_a_folder_to_a_folder(tmp_path, capsys):
  """Import, train on as SDAR, export under its layout: the published keys, experts moved, router included."""
  src, named, _ = folders.imported(tmp_path, "qwen3_moe")
  run, data = tmp_path / "run", "data={'kind': 'python', 'documents': 12, 'seq_len': 32, 'path': '%s'}"
  assert cli.main([
    "train", "--config", "language/sdar:tiny", "--from", str(tmp_path / "dst"), "--workdir", str(run), "train.steps=2", "optim.schedule.warmup=0",
    "eval.every=0", "batch_size=8", data % (tmp_path / "data"), "objective.router={'balance': 0.01}",
  ]) == 0  # fmt: skip
  last = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()][-1]
  assert last["loss/router_balance"] > 1.9 and 1 <= last["router/load_max"] <= 3
  assert cli.main(["export", str(run), str(tmp_path / "out"), "--layout", "sdar_moe"]) == 0
  back = tensors.folder(tmp_path / "out")
  assert set(back) == set(folders.keys("qwen3_moe"))
  moved = [n for n, x in named.items() if not np.array_equal(back[n].open()[: x.shape[0]], x)]
  assert {"model.layers.0.mlp.gate.weight", "model.layers.2.mlp.experts.5.down_proj.weight"} <= set(moved)
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert config["model_type"] == "sdar_moe" and config["mlp_only_layers"] == [1] and config["block_size"] == 4


# ----------------------------------------------------------------------- processes of their own

KILLED = """
import os, signal, sys
from genmodels.checkpoint import hf_import, tensors
left, copy = int(sys.argv[3]), tensors.copy_into
def mine(a, b):
  global left
  if left == 0:
    a.reshape(-1)[: a.size // 2] = 7  # half of a tensor is there
    os.kill(os.getpid(), signal.SIGKILL)
  left -= 1
  copy(a, b)
tensors.copy_into = mine
hf_import.import_folder(sys.argv[1], sys.argv[2], threads=1)
"""


def script(code, *args):
  env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(pathlib.Path(cli.__file__).parents[1])}
  return subprocess.run(
    [sys.executable, "-c", code, *map(str, args)], env=env, capture_output=True, text=True
  )


def files(root):
  return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_blocks_of_one_token_cost_what_the_imported_model_costs(tmp_path):
  """Context-causal block diffusion at block size 1, a block's first token from the clean stream, is next-token
  prediction: a conversion by block-size curriculum begins at the checkpoint's own likelihood."""
  from genmodels.evals import heldout
  from genmodels.sampling.run import load_run

  folders.imported(tmp_path, "qwen3_tied")
  section = {
    "kind": "tokens", "corruption": {"kind": "absorb", "unit": "block", "blocks": {"size": 1}},
    "layout": {"kind": "streams", "streams": ("n", "c")}, "masks": {"full": "context_causal"}, "mask_id": 299,
    "terms": {"diffusion": {"stream": "n", "on": "hit", "weight": "nelbo", "align": "shift_clean_boundary"}},
  }  # fmt: skip
  nats = {}
  path = tmp_path / "dst" / "config.json"
  ours = json.loads(path.read_text())
  for name, objective in (("ar", ours["objective"]), ("blocks", section)):
    path.write_text(json.dumps({**ours, "objective": objective}))
    run = load_run(tmp_path / "dst", overrides=("model.heads.text.forbid=(299,)",))
    evaluator = heldout.Evaluator(heldout.EvalConfig(draws=1), run.parts, run.mesh, jax.random.key(0))
    nats[name] = evaluator.of_published(run.trees, [folders.TEXT], 40)["nats_per_token"]
  assert nats["blocks"] == pytest.approx(nats["ar"], rel=1e-4)


@pytest.mark.slow
def test_a_killed_import_goes_on_and_ends_the_same(tmp_path, monkeypatch):
  src, _ = folders.make(tmp_path / "src", "qwen3")
  folders.tokenizer(src)
  hf_import.import_folder(str(src), str(tmp_path / "straight"))
  dst = tmp_path / "dst"
  for tensors_left in (0, 9):
    assert script(KILLED, src, dst, tensors_left).returncode == -signal.SIGKILL
    assert not dst.exists()
  # What the journal promises is read again: bits lost with the machine's memory are copied anew.
  lines = (tmp_path / "dst.importing" / "journal.jsonl").read_text().splitlines()
  assert len(lines) == 9
  path = folder.leaf_file(tmp_path / "dst.importing", json.loads(lines[0])[0].split(":")[0])
  damaged = path.read_bytes()
  path.write_bytes(damaged[:-8] + 8 * b"\1")
  copied = []
  monkeypatch.setattr(tensors, "copy_into", lambda a, b: (copied.append(a.shape), a.__setitem__(..., b)))
  hf_import.import_folder(str(src), str(dst))
  assert len(copied) == len(folders.keys("qwen3")) - 9 + 1
  monkeypatch.undo()
  assert files(dst) == files(tmp_path / "straight")


MEMORY = """
import sys, threading, time
from genmodels.checkpoint import hf_import, tensors
tensors.sync = lambda path: None
peak, done = 0, False
def anon():
  return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) * 1024
def watch():
  global peak
  while not done:
    peak = max(peak, anon())
    time.sleep(0.005)
t = threading.Thread(target=watch); t.start()
if sys.argv[3] == "stream":
  hf_import.import_folder(sys.argv[1], sys.argv[2])
else:
  import numpy as np
  held = [np.array(t.open()) for t in tensors.folder(sys.argv[1]).values()]
done = True
t.join()
print(peak)
"""


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
@pytest.mark.parametrize(
  "case, sizes",
  [
    ("qwen3", dict(intermediate_size=8192, num_hidden_layers=12)),
    pytest.param(
      "sdar_moe", dict(num_experts=64, moe_intermediate_size=1024, num_hidden_layers=2), marks=pytest.mark.full,
    ),
  ],
)  # fmt: skip
def test_memory_of_an_import(case, sizes, tmp_path):
  """Anonymous memory stays under the largest tensor plus 1 GiB, for a model of 1.4 GB; holding it does not."""
  config = dict(
    folders.CONFIGS[case], hidden_size=2048, vocab_size=1000, head_dim=64, num_attention_heads=16,
    num_key_value_heads=8, torch_dtype="bfloat16", **sizes,
  )  # fmt: skip
  src = tmp_path / "src"
  src.mkdir()
  (src / "config.json").write_text(json.dumps(config))
  specs = {n: ("BF16", folders.shape(case, n, config)) for n in folders.keys(case, config)}
  tensors.create(src / tensors.SINGLE, specs)
  found = tensors.header(src / tensors.SINGLE)[0]
  total, largest = sum(t.nbytes for t in found.values()), max(t.nbytes for t in found.values())
  bound = largest + 2**30
  assert total > 1.2 * bound
  streamed = script(MEMORY, src, tmp_path / "dst", "stream")
  held = script(MEMORY, src, tmp_path / "dst2", "hold")
  assert streamed.returncode == held.returncode == 0, streamed.stderr + held.stderr
  print(
    f"{total / 1e6:.0f} MB model, largest {largest / 1e6:.0f} MB: peak {int(streamed.stdout) / 1e6:.0f} MB"
  )
  assert int(streamed.stdout) < bound < int(held.stdout)
