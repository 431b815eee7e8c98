"""Hugging Face checkpoints as ours and back: config.json → model section, tensor name ↔ leaf.

Pure mapping over NumPy arrays; files are `checkpoint.hf`'s business. Model types: llama, qwen2, qwen3,
gpt2. What a configuration asks for and this trunk does not compute is refused, by key.

Legend: D width · V vocabulary · R repeats of a segment.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from genmodels.config import ConfigError
from genmodels.models import Model, TrunkConfig, layer_path

MODEL_TYPES = ("llama", "qwen2", "qwen3", "gpt2")
ACTIVATIONS = {
  "silu": "silu",
  "swish": "silu",
  "gelu": "gelu",
  "gelu_new": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
}

# Buffers that old checkpoints carry and no parameter corresponds to.
BUFFERS = re.compile(r".*rotary_emb\.inv_freq|.*\.attn\.(masked_)?bias")


@dataclasses.dataclass(frozen=True)
class Entry:
  """Where one leaf (or one layer of a stacked leaf) lives in the checkpoint.

  Fields:
    name: HF tensor name.
    leaf: '/'-joined path of ours; row: row of the stacked leaf, None if it is not stacked.
    transpose: the tensor is [out, in] (torch Linear), our kernels contract their leading dimensions.
    part: (i, n): the i-th of n equal parts of the tensor's last axis (a fused q, k, v).
    pad: rows of the vocabulary beyond the tensor's are zero in ours, and left out on export.
  """

  name: str
  leaf: str
  row: int | None = None
  transpose: bool = False
  part: tuple[int, int] = (0, 1)
  pad: bool = False


def section(hf: Mapping[str, Any]) -> dict[str, Any]:
  """The model section of a config.json.

  Raises:
    ConfigError: a model type, activation, RoPE scaling or option that this trunk does not compute.
  """
  kind = hf.get("model_type")
  if kind not in MODEL_TYPES:
    raise ConfigError(
      "cannot read this model type", key="model_type", value=kind, fix=f"one of {MODEL_TYPES}"
    )
  out = _gpt2(hf) if kind == "gpt2" else _llama(hf, kind)
  tied = bool(hf.get("tie_word_embeddings", kind == "gpt2"))
  out["heads"] = {"text": {"tied": tied}}
  return out


def _refuse(hf, key: str, accepted):
  if hf.get(key, accepted[0]) not in accepted:
    raise ConfigError(
      "this trunk does not compute it", key=key, value=hf[key], fix=f"expected one of {accepted}"
    )


def _activation(hf, key: str) -> str:
  _refuse(hf, key, tuple(ACTIVATIONS))
  return ACTIVATIONS[hf[key]]


def _llama(hf, kind: str) -> dict[str, Any]:
  _refuse(hf, "use_sliding_window", (False, None))
  _refuse(hf, "pretraining_tp", (1, None))
  heads, width = hf["num_attention_heads"], hf["hidden_size"]
  bias = ("q", "k", "v") if kind == "qwen2" else ()
  if kind != "qwen2" and hf.get("attention_bias"):
    bias = ("q", "k", "v", "o")
  if hf.get("mlp_bias"):
    bias += ("gate", "up", "down")
  return dict(
    width=width,
    layers=hf["num_hidden_layers"],
    num_heads=heads,
    num_kv_heads=hf.get("num_key_value_heads") or heads,
    head_dim=hf.get("head_dim") or width // heads,
    mlp=hf["intermediate_size"],
    vocab=hf["vocab_size"],
    eps=float(hf["rms_norm_eps"]),
    activation=_activation(hf, "hidden_act"),
    qk_norm="rms" if kind == "qwen3" else "none",
    bias=bias,
    rope=_rope(hf),
  )


def _rope(hf) -> dict[str, Any]:
  """RoPE of `rope_parameters` (transformers ≥ 5) or of `rope_theta` and `rope_scaling`."""
  p = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
  base = float(p.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0)
  kind = p.pop("rope_type", None) or p.pop("type", None) or "default"
  p.pop("type", None)
  if float(p.pop("partial_rotary_factor", 1.0)) != 1.0:
    raise ConfigError("partial rotary factors are not read", key="rope_parameters", value=hf, fix="1.0")
  if kind == "default":
    return dict(base=base)
  length = hf.get("max_position_embeddings")
  if kind == "linear":
    scaling = dict(kind="linear", factor=float(p.pop("factor")))
  elif kind == "llama3":
    scaling = dict(
      kind="llama3",
      factor=float(p.pop("factor")),
      original_len=int(p.pop("original_max_position_embeddings", length)),
      low_freq_factor=float(p.pop("low_freq_factor")),
      high_freq_factor=float(p.pop("high_freq_factor")),
    )
  elif kind == "yarn":
    scaling = dict(
      kind="yarn",
      factor=float(p.pop("factor")),
      original_len=int(p.pop("original_max_position_embeddings", length)),
      beta_fast=float(p.pop("beta_fast", None) or 32),
      beta_slow=float(p.pop("beta_slow", None) or 1),
      truncate=bool(p.pop("truncate", True)),
    )
    if p.get("attention_factor") is not None:
      scaling["attention_factor"] = float(p.pop("attention_factor"))
  else:
    raise ConfigError(
      "unknown RoPE type", key="rope_type", value=kind, fix="one of default, linear, llama3, yarn"
    )
  left = {k: v for k, v in p.items() if v is not None}
  if left:
    raise ConfigError(f"{kind} RoPE with fields that are not read", key="rope_parameters", value=left)
  return dict(base=base, scaling=scaling)


def _gpt2(hf) -> dict[str, Any]:
  _refuse(hf, "scale_attn_weights", (True,))
  _refuse(hf, "scale_attn_by_inverse_layer_idx", (False,))
  _refuse(hf, "add_cross_attention", (False,))
  return dict(
    width=hf["n_embd"],
    layers=hf["n_layer"],
    num_heads=hf["n_head"],
    mlp=hf.get("n_inner") or 4 * hf["n_embd"],
    vocab=hf["vocab_size"],
    norm="layer",
    eps=float(hf["layer_norm_epsilon"]),
    activation=_activation(hf, "activation_function"),
    gated=False,
    bias=("q", "k", "v", "o", "up", "down", "norm"),
    rope=None,
    learned_pos=hf["n_positions"],
  )


def entries(cfg: TrunkConfig, model_type: str) -> list[Entry]:
  """All entries of a model; together they cover every leaf (checked by `read` and `write`)."""
  if model_type not in MODEL_TYPES:
    raise ConfigError(
      "cannot map this model type", key="model_type", value=model_type, fix=f"one of {MODEL_TYPES}"
    )
  tied = cfg.head("text").tied
  out = []

  def site(name, leaf, row=None, transpose=True, part=(0, 1), bias=False):
    out.append(Entry(f"{name}.weight", f"{leaf}/kernel", row, transpose, part))
    if bias:
      out.append(Entry(f"{name}.bias", f"{leaf}/bias", row, False, part))

  def norm(name, leaf, row=None):
    out.append(Entry(f"{name}.weight", f"{leaf}/scale", row))
    if "norm" in cfg.bias and not leaf.endswith(("q_norm", "k_norm")):
      out.append(Entry(f"{name}.bias", f"{leaf}/bias", row))

  gpt2 = model_type == "gpt2"
  root = "transformer" if gpt2 else "model"
  table = "wte" if gpt2 else "embed_tokens"
  out.append(Entry(f"{root}.{table}.weight", "embed/tokens/embedding", pad=True))
  if gpt2:
    out.append(Entry(f"{root}.wpe.weight", "embed/learned_pos/embedding"))
  for i in range(cfg.layers):
    s, row, p = layer_path(cfg, i)
    ours = f"stack/s{s}/l{p}"
    if gpt2:
      at = f"{root}.h.{i}"
      norm(f"{at}.ln_1", f"{ours}/attn_norm", row)
      norm(f"{at}.ln_2", f"{ours}/mlp_norm", row)
      for j, name in enumerate("qkv"):
        site(f"{at}.attn.c_attn", f"{ours}/attn/{name}", row, False, (j, 3), True)
      site(f"{at}.attn.c_proj", f"{ours}/attn/o", row, False, bias=True)
      site(f"{at}.mlp.c_fc", f"{ours}/mlp/up", row, False, bias=True)
      site(f"{at}.mlp.c_proj", f"{ours}/mlp/down", row, False, bias=True)
      continue
    at = f"{root}.layers.{i}"
    norm(f"{at}.input_layernorm", f"{ours}/attn_norm", row)
    norm(f"{at}.post_attention_layernorm", f"{ours}/mlp_norm", row)
    for name in "qkvo":
      site(f"{at}.self_attn.{name}_proj", f"{ours}/attn/{name}", row, bias=name in cfg.bias)
    for name in ("gate", "up", "down"):
      site(f"{at}.mlp.{name}_proj", f"{ours}/mlp/{name}", row, bias=name in cfg.bias)
    if cfg.qk_norm == "rms":
      norm(f"{at}.self_attn.q_norm", f"{ours}/attn/q_norm", row)
      norm(f"{at}.self_attn.k_norm", f"{ours}/attn/k_norm", row)
  norm(f"{root}.ln_f" if gpt2 else f"{root}.norm", "final_norm")
  if not tied:
    out.append(Entry("lm_head.weight", "heads/text/kernel", transpose=True, pad=True))
  return out


def read(cfg: TrunkConfig, model_type: str, tensors: Mapping[str, Any], dtype=None) -> dict:
  """Parameters from a checkpoint's tensors.

  Args:
    tensors: name → array (anything that `np.asarray` takes; a lazy mapping is read one at a time).
    dtype: of the leaves; the configuration's master type by default.

  Returns:
    Nested dicts of NumPy arrays.

  Raises:
    ValueError: a tensor that is missing, has the wrong shape, or that nothing takes; a leaf that
      nothing fills. All of them are named.
  """
  found = entries(cfg, model_type)
  shapes = _leaves(Model(cfg).abstract_params())
  names = {e.name for e in found}
  skipped = {"lm_head.weight"} if cfg.head("text").tied else set()
  extra = sorted(n for n in tensors if n not in names and n not in skipped and not BUFFERS.fullmatch(n))
  _complain("tensors that no parameter takes", extra)
  _complain("missing tensors", sorted(names - set(tensors)))
  _complain("parameters without a tensor", sorted(set(shapes) - {e.leaf for e in found}))
  flat = {path: np.zeros(s.shape, dtype or s.dtype) for path, s in shapes.items()}
  for e in found:
    leaf = flat[e.leaf] if e.row is None else flat[e.leaf][e.row]
    x = np.asarray(tensors[e.name])
    if x.ndim and x.shape[-1] % e.part[1]:
      raise ValueError(f"{e.name}: shape {x.shape} does not split into {e.part[1]} parts")
    want = _shape(cfg, e, leaf.shape)
    if x.shape != want:
      raise ValueError(f"{e.name}: expected shape {want} for {e.leaf} {leaf.shape}, got {x.shape}")
    x = np.split(x, e.part[1], -1)[e.part[0]]
    x = x.T if e.transpose else x
    if e.pad:
      leaf = leaf[:, : cfg.vocab] if e.transpose else leaf[: cfg.vocab]
    leaf[...] = x.reshape(leaf.shape)
  return _nest(flat)


def write(cfg: TrunkConfig, model_type: str, params) -> dict[str, np.ndarray]:
  """A checkpoint's tensors from parameters: the inverse of `read` (padding left out).

  Raises:
    ValueError: leaves that the model type has no tensor for (adapters: merge them first), or none for
      a tensor.
  """
  flat = _leaves(params)
  found = entries(cfg, model_type)
  leaves = {e.leaf for e in found}
  _complain(f"leaves that {model_type} has no tensor for", sorted(set(flat) - leaves))
  _complain("missing leaves", sorted(leaves - set(flat)))
  parts: dict[str, dict[int, np.ndarray]] = {}
  for e in found:
    x = flat[e.leaf] if e.row is None else flat[e.leaf][e.row]
    if e.pad:
      x = x[:, : cfg.vocab] if e.transpose else x[: cfg.vocab]
    want = _shape(cfg, dataclasses.replace(e, part=(0, 1)), x.shape)
    x = np.asarray(x)
    x = x.reshape(want[::-1]).T if e.transpose else x.reshape(want)
    parts.setdefault(e.name, {})[e.part[0]] = x
  return {
    name: np.ascontiguousarray(np.concatenate([p[i] for i in sorted(p)], -1)) for name, p in parts.items()
  }


def _shape(cfg: TrunkConfig, e: Entry, leaf: tuple[int, ...]) -> tuple[int, ...]:
  """Shape of the tensor that fills a leaf (one layer of it)."""
  if not e.leaf.endswith("/kernel"):
    if e.pad:
      leaf = (cfg.vocab, *leaf[1:])
    return (int(np.prod(leaf)) * e.part[1],) if e.leaf.endswith("/bias") else leaf
  n_in = 2 if e.leaf.endswith("/o/kernel") else 1
  d_in, d_out = int(np.prod(leaf[:n_in])), int(np.prod(leaf[n_in:])) * e.part[1]
  if e.pad:
    d_out = cfg.vocab
  return (d_out, d_in) if e.transpose else (d_in, d_out)


def _complain(what: str, names: Iterable[str]):
  names = list(names)
  if names:
    raise ValueError(f"{len(names)} {what}: {', '.join(names[:8])}{' …' if len(names) > 8 else ''}")


def _leaves(tree, path: str = "") -> dict[str, Any]:
  if not isinstance(tree, Mapping):
    return {path: tree}
  return {p: x for k, v in tree.items() for p, x in _leaves(v, f"{path}/{k}" if path else k).items()}


def _nest(flat: Mapping[str, Any]) -> dict:
  out: dict = {}
  for path, x in flat.items():
    *heads, last = path.split("/")
    node = out
    for key in heads:
      node = node.setdefault(key, {})
    node[last] = x
  return out
