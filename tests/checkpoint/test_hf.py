"""Import and export of Hugging Face folders: bytes, keys, metadata, digests, placement."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from genmodels.checkpoint import (
  folder,
  hf_config,
  hf_export,
  hf_import,
  init,
  tensors,
  verify,
)
from genmodels.checkpoint.manager import RestoreError
from genmodels.config import ConfigError
from tests.checkpoint import folders

# ------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("dtype", [np.float32, folders.BF16, np.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("case", folders.CONFIGS)
def test_export_of_an_import_is_the_identity(case, dtype, tmp_path):
  src, named = folders.make(tmp_path / "src", case, dtype, shards=3)
  done = hf_import.import_folder(str(src), str(tmp_path / "dst"))
  assert set(done.manifest["hf_dtypes"]) == set(folders.keys(case)) == set(named)
  made = hf_export.export_folder(str(tmp_path / "dst"), str(tmp_path / "out"), shard_bytes=30_000)
  back = tensors.folder(tmp_path / "out")
  assert set(back) == set(named) and made["files"] > 1
  for name, want in named.items():
    got = back[name].open()
    assert (got.dtype, got.shape) == (want.dtype, want.shape), name
    assert got.tobytes() == want.tobytes(), name
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert {k: config[k] for k in folders.CONFIGS[case]} == json.loads((src / "config.json").read_text())


def test_mixed_dtypes_come_back(tmp_path):
  """One layer of a leaf in bfloat16, the others in float32: stored as float32, given back as they were."""
  named = folders.values("qwen3")
  odd = "model.layers.1.mlp.up_proj.weight"
  named[odd] = named[odd].astype(folders.BF16)
  src = folders.write(tmp_path / "src", folders.CONFIGS["qwen3"], named)
  hf_import.import_folder(str(src), str(tmp_path / "dst"))
  hf_export.export_folder(str(tmp_path / "dst"), str(tmp_path / "out"))
  back = tensors.folder(tmp_path / "out")
  assert back[odd].dtype == "BF16"
  assert all(back[n].open().tobytes() == x.tobytes() for n, x in named.items())


def test_tied_weights_that_are_stored_twice(tmp_path):
  named = folders.values("qwen3_tied")
  named["lm_head.weight"] = named["model.embed_tokens.weight"]
  named["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
  src = folders.write(tmp_path / "src", folders.CONFIGS["qwen3_tied"], named)
  done = hf_import.import_folder(str(src), str(tmp_path / "dst"))
  assert done.manifest["dropped"] == ["model.layers.0.self_attn.rotary_emb.inv_freq"]
  hf_export.export_folder(str(tmp_path / "dst"), str(tmp_path / "out"))
  back = tensors.folder(tmp_path / "out")
  assert back["lm_head.weight"].open().tobytes() == named["lm_head.weight"].tobytes()
  # Said to be tied, and not equal: neither may be thrown away silently.
  named["lm_head.weight"] = named["lm_head.weight"] + 1
  src = folders.write(tmp_path / "src2", folders.CONFIGS["qwen3_tied"], named)
  with pytest.raises(ConfigError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
    hf_import.import_folder(str(src), str(tmp_path / "dst2"))
  assert not list(tmp_path.glob("dst2*"))


def test_tokenizer_and_chat_template_travel(tmp_path):
  src, _, _ = folders.imported(tmp_path)
  (src / "pytorch_model.bin").write_bytes(b"")  # not carried
  hf_export.export_folder(str(tmp_path / "dst"), str(tmp_path / "out"))
  for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
    assert (tmp_path / "out" / name).read_bytes() == (src / name).read_bytes()
  assert {p.name for p in (tmp_path / "out").iterdir()} == {
    "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
  }  # fmt: skip


# -------------------------------------------------------------------------------- other layouts


@pytest.mark.parametrize(
  "case, layout",
  [
    ("qwen3", "sdar"), ("qwen2", "fast_dllm_v2"), ("qwen2", "dream"), ("sdar", "qwen3"), ("dream", "qwen2"),
    ("fast_dllm_v2", "qwen2"), ("mistral_global", "diffullama"), ("gpt2", "diffugpt"), ("diffugpt", "gpt2"),
    ("mistral_global", "llada"), ("mistral_global", "llama"), ("sdar_moe", "qwen3_moe"), ("qwen3_moe", "sdar_moe"),
    ("llada_moe", "qwen3_moe"),
  ],
)  # fmt: skip
def test_a_model_under_another_layout(case, layout, tmp_path):
  """The same architecture by another name: every key of the target's list, and it reads back as the same model."""
  changes = {"sliding_window": None, "head_dim": 4} if case == "mistral_global" else {}
  src, named = folders.make(tmp_path / "src", case.removesuffix("_global"), **changes)
  first = hf_import.import_folder(str(src), str(tmp_path / "dst"))
  hf_export.export_folder(str(tmp_path / "dst"), str(tmp_path / "out"), layout=layout)
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  names = folders.CONFIGS[case if "moe" in case else layout]
  expected = folders.keys(layout if layout != "llama" else "mistral", names)
  assert set(tensors.folder(tmp_path / "out")) == set(expected)
  again = hf_import.import_folder(str(tmp_path / "out"), str(tmp_path / "again"))
  assert again.manifest["layout"] == layout and len(expected) == len(named)
  assert {n: d["digest"] for n, d in again.manifest["leaves"].items()} == {
    n: d["digest"] for n, d in first.manifest["leaves"].items()
  }
  if layout in hf_config.REMOTE:
    assert config["auto_map"]["AutoConfig"].startswith("configuration")
  assert config["architectures"] == [hf_config.ARCHITECTURES[layout]]


@pytest.mark.parametrize(
  "case, layout, names",
  [("qwen3", "qwen2", "qk_norm: .*; bias"), ("llama", "qwen3", "mlp|bias"), ("gemma2", "llama", "norm_offset"),
   ("qwen3", "gpt2", "rope|gated|norm"), ("gpt2", "llama", "rotates positions"), ("qwen3", "llada", "qk_norm"),
   ("mistral", "sdar", "qk_norm"), ("qwen3", "qwen3_moe", "has experts"), ("sdar_moe", "sdar", "no tensor|pattern|segments"),
   ("llada2_moe", "qwen3_moe", "rope|moe"), ("qwen3_moe", "llada2_moe", "dense layers before")],
)  # fmt: skip
def test_a_layout_that_cannot_say_it(case, layout, names, tmp_path):
  src, _ = folders.make(tmp_path / "src", case)
  hf_import.import_folder(str(src), str(tmp_path / "dst"))
  with pytest.raises(ConfigError, match=names):
    hf_export.export_folder(str(tmp_path / "dst"), str(tmp_path / "out"), layout=layout)
  assert not list(tmp_path.glob("out*"))


def test_dtype_of_an_export(tmp_path):
  _, named, _ = folders.imported(tmp_path)
  hf_export.export_folder(str(tmp_path / "dst"), str(tmp_path / "out"), dtype="bfloat16")
  back = tensors.folder(tmp_path / "out")
  assert {t.dtype for t in back.values()} == {"BF16"}
  name = "model.layers.2.self_attn.o_proj.weight"
  assert back[name].open().tobytes() == named[name].astype(folders.BF16).tobytes()
  assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
  with pytest.raises(ConfigError, match="unknown dtype"):
    hf_export.export_folder(str(tmp_path / "dst"), str(tmp_path / "out2"), dtype="int8")


# ------------------------------------------------------------------------------------- metadata

# What the named engines read of a config.json. tpu-inference's `seeded_shifted` adapter takes block_size or
# bd_size, mask_token_id or mask_id, and sub_block_size, which must divide the block.
BLOCK = {"block_size", "bd_size", "sub_block_size", "mask_token_id", "mask_id"}


def test_serving_metadata():
  terms = {"d": {"stream": "n", "align": "shift_clean_boundary"}}
  objective = {
    "corruption": {"kind": "absorb", "blocks": {"size": 32}}, "layout": {"streams": ("n", "c")}, "terms": terms,
    "masks": {"full": "bd3"}, "mask_id": 151665,
  }  # fmt: skip
  made = hf_export.serving({"objective": objective, "sampler": {"sub_block": 8}}, {})
  assert set(made) == BLOCK | {"diffusion"}
  assert (made["block_size"], made["bd_size"], made["sub_block_size"], made["mask_id"]) == (32, 32, 8, 151665)
  assert made["diffusion"] == {
    "strategy": "block_diffusion", "attention_policy": "block_causal", "logit_alignment": "shifted",
    "canvas_policy": "seed_and_mask", "next_block_policy": "last_logit_anchor",
    "prompt_remainder_policy": "include_in_first_canvas",
  }  # fmt: skip
  terms["d"]["align"] = "same"
  made = hf_export.serving({"objective": objective}, {"objective": {"mask_id": 7}})
  assert made["mask_token_id"] == 7 and made["diffusion"]["logit_alignment"] == "same_position"
  assert made["diffusion"]["canvas_policy"] == made["diffusion"]["next_block_policy"] == "all_masked"
  assert made["sub_block_size"] == 32
  growing = {"kind": "steps", "values": (1, 4, 16), "at": (0, 100, 200)}
  objective["corruption"]["blocks"]["size"] = growing
  assert hf_export.serving({"objective": objective}, {})["block_size"] == 16
  whole = {
    "corruption": {"kind": "absorb"},
    "layout": {"streams": ("n",)},
    "terms": {"d": {"stream": "n"}},
    "mask_id": 5,
  }
  made = hf_export.serving({"objective": whole}, {})
  assert (
    set(made) == {"mask_token_id", "mask_id", "diffusion"} and made["diffusion"]["attention_policy"] == "full"
  )
  ar = {"corruption": {"kind": "clean"}, "terms": {"text": {"stream": "c", "align": "shift"}}}
  assert hf_export.serving({"objective": ar}, {}) == {}


@pytest.mark.parametrize("case", ["llada", "dream", "sdar", "fast_dllm_v2", "diffullama", "diffugpt"])
def test_published_diffusion_models_are_systems(case, tmp_path):
  """Their config builds: objective, laws, model, mask id; and exports with what a server must know."""
  from genmodels import system

  src, _ = folders.make(tmp_path / "src", case)
  folders.tokenizer(src)
  hf_import.import_folder(str(src), str(tmp_path / "dst"))
  cfg = hf_import.tuples(json.loads((tmp_path / "dst" / "config.json").read_text()))
  import ml_collections

  parts = system.build(ml_collections.ConfigDict(cfg), workdir=str(tmp_path / "dst"))
  assert parts.objective.mask_id == 299 and parts.data.meta.specials["mask"] == 299
  assert parts.model.cfg.head("text").forbid == (299,)
  hf_export.export_folder(str(tmp_path / "dst"), str(tmp_path / "out"))
  out = json.loads((tmp_path / "out" / "config.json").read_text())
  assert out["mask_token_id"] == 299
  assert out["diffusion"]["logit_alignment"] == ("same_position" if case in ("llada", "sdar") else "shifted")
  assert out.get("block_size") == {"sdar": 4, "fast_dllm_v2": 8}.get(case)


# --------------------------------------------------------------------------- digests and reading


@pytest.mark.parametrize("dtype", [np.float32, folders.BF16, np.float16, np.int8])
def test_host_digest_is_the_devices(dtype):
  x = np.random.default_rng(0).standard_normal((4, 6, 10)).astype(np.float32)
  x = (100 * x).astype(dtype)
  want = tuple(int(v) for v in verify.leaf_digest(jnp.asarray(x)))
  rows = [verify.host_digest(x[r], x.shape, 60 * r, chunk=13) for r in range(4)]
  assert tuple(sum(r[i] for r in rows) % 2**32 for i in range(2)) == want
  assert verify.host_digest(x, x.shape) == want
  assert verify.host_digest(x, (6, 4, 10)) == want  # row-major order is what counts
  x[1, 2, 3] += 1
  assert verify.host_digest(x, x.shape) != want


def test_host_digest_of_more_elements_than_32_bits_count(monkeypatch):
  """The index is then split into parts; here at 2⁵ elements, so that it can be tried."""

  def strides(shape):
    out, part, stride = [], 0, 1
    for size in reversed(shape):
      if stride * size > 2**5:
        part, stride = part + 1, 1
      out.append((part, stride))
      stride *= size
    return out[::-1]

  assert verify.strides((80, 8192, 28672)) == [(1, 1), (0, 28672), (0, 1)]  # a 70B MLP leaf
  monkeypatch.setattr(verify, "strides", strides)
  x = np.random.default_rng(0).standard_normal((5, 3, 4, 8)).astype(np.float32)
  want = tuple(int(v) for v in verify.leaf_digest(jnp.asarray(x)))
  assert verify.host_digest(x, x.shape) == want
  rows = [verify.host_digest(x[r], x.shape, 96 * r, chunk=7) for r in range(5)]
  assert tuple(sum(r[i] for r in rows) % 2**32 for i in range(2)) == want


def test_each_device_reads_its_own_slice(tmp_path):
  """Of a leaf that is sharded, no read is larger than a shard; and the values are right."""
  _, named, done = folders.imported(tmp_path)
  name = "stack/s0/l0/mlp/up/kernel"  # [3, 24, 40]
  leaf = done.leaf(name)
  asked = []

  class Spy:
    shape = leaf.shape

    def __getitem__(self, index):
      asked.append(leaf[index].size)
      return leaf[index]

  mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:8])
  x = folder._place(Spy(), NamedSharding(mesh, PartitionSpec(None, "fsdp")))
  assert max(asked) == leaf.size // 8 and len(asked) == 8
  want = np.stack([named[f"model.layers.{i}.mlp.up_proj.weight"].T for i in range(3)])
  np.testing.assert_array_equal(np.asarray(x), want)
  sharding = lambda n, shape: NamedSharding(mesh, PartitionSpec()) if n.endswith("final_norm/scale") else None
  values, step, _ = done.read(None, sharding)
  assert list(values) == ["trees/model/final_norm/scale"] and step == 0


def test_damage_of_an_import_is_named(tmp_path):
  _, _, done = folders.imported(tmp_path)
  root = tmp_path / "dst"
  path = folder.leaf_file(root, "stack/s0/l0/attn/q/kernel")
  whole = path.read_bytes()
  path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
  with pytest.raises(RestoreError, match="stack/s0/l0/attn/q/kernel: the bits read do not have the digest"):
    done.read()
  path.write_bytes(whole[:-4])
  with pytest.raises(RestoreError, match="truncated"):
    done.read()
  path.unlink()
  with pytest.raises(RestoreError, match="missing"):
    done.read()
  path.write_bytes(whole)
  assert done.read()[0]
  (root / "import.json").write_text((root / "import.json").read_text().replace("qwen3", "qwen2"))
  with pytest.raises(RestoreError, match="damaged"):
    init.open_folder(str(root))
  (root / "import.json").unlink()
  with pytest.raises(RestoreError, match="holds no checkpoint"):
    init.open_folder(str(root))
