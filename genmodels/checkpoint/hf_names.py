"""Tensor names of Hugging Face layouts ↔ our leaves.

Pure mapping over NumPy arrays; config.json is the business of `hf_config`, files that of `hf_import` and
`hf_export`.

Legend: D width · V vocabulary · R repeats of a segment.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from genmodels.config import ConfigError
from genmodels.models import Model, TrunkConfig, layer_path

# Buffers that old checkpoints carry and no parameter corresponds to.
BUFFERS = re.compile(r".*rotary_emb\.inv_freq|.*\.attn\.(masked_)?bias")


@dataclasses.dataclass(frozen=True)
class Layout:
  """How a class of checkpoints names its tensors.

  Fields:
    table, final_norm, head: names outside of the layers; head carries its ".weight" or is ours tied away.
    layer: prefix of layer {i}.
    sites: our site or norm of a layer → its name there, that of an expert with {e}.
    positions: name of the learned position table, "" for none.
    transpose: torch Linear, [out, in]; GPT-2's Conv1D is [in, out], as ours.
    fused: name of one tensor that holds q, k and v one after the other, "" for none.
  """

  table: str
  final_norm: str
  head: str
  layer: str
  sites: Mapping[str, str]
  positions: str = ""
  transpose: bool = True
  fused: str = ""


_LLAMA_SITES = {
  "attn_norm": "input_layernorm",
  "mlp_norm": "post_attention_layernorm",
  **{f"attn/{n}": f"self_attn.{n}_proj" for n in "qkvo"},
  "attn/q_norm": "self_attn.q_norm",
  "attn/k_norm": "self_attn.k_norm",
  **{f"mlp/{n}": f"mlp.{n}_proj" for n in ("gate", "up", "down")},
}
_LLAMA = Layout("model.embed_tokens", "model.norm", "lm_head", "model.layers.{i}", _LLAMA_SITES)
_GEMMA2 = dataclasses.replace(
  _LLAMA,
  sites=_LLAMA_SITES
  | {
    "attn_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
  },
)
_GPT2 = Layout(
  "transformer.wte",
  "transformer.ln_f",
  "lm_head",
  "transformer.h.{i}",
  {
    "attn_norm": "ln_1",
    "mlp_norm": "ln_2",
    "attn/o": "attn.c_proj",
    "mlp/up": "mlp.c_fc",
    "mlp/down": "mlp.c_proj",
  },
  positions="transformer.wpe",
  transpose=False,
  fused="attn.c_attn",
)
_LLADA = Layout(
  "model.transformer.wte",
  "model.transformer.ln_f",
  "model.transformer.ff_out",
  "model.transformer.blocks.{i}",
  {
    "attn_norm": "attn_norm",
    "mlp_norm": "ff_norm",
    **{f"attn/{n}": f"{n}_proj" for n in "qkv"},
    "attn/o": "attn_out",
    "mlp/gate": "ff_proj",
    "mlp/up": "up_proj",
    "mlp/down": "ff_out",
  },
)
_EXPERTS = {
  "mlp/router": "mlp.gate",
  **{f"mlp/experts/{n}": f"mlp.experts.{{e}}.{n}_proj" for n in ("gate", "up", "down")},
}
_QWEN3_MOE = dataclasses.replace(_LLAMA, sites=_LLAMA_SITES | _EXPERTS)
_LLADA2 = dataclasses.replace(
  _QWEN3_MOE,
  table="model.word_embeddings",
  sites={k: v for k, v in _QWEN3_MOE.sites.items() if k not in ("attn/q", "attn/k", "attn/v")}
  | {
    "attn/o": "attention.dense",
    "attn/q_norm": "attention.query_layernorm",
    "attn/k_norm": "attention.key_layernorm",
    "mlp/expert_bias": "mlp.gate.expert_bias",
    **{f"mlp/shared/{n}": f"mlp.shared_experts.{n}_proj" for n in ("gate", "up", "down")},
  },
  fused="attention.query_key_value",
)
# DiffuLLaMA's wrapper takes the trunk out of its model: the table stands outside, the rest under its name.
_DIFFULLAMA = dataclasses.replace(
  _LLAMA, table="embed_tokens", final_norm="denoise_model.norm", layer="denoise_model.layers.{i}"
)
_DIFFUGPT = dataclasses.replace(
  _GPT2, table="embed_tokens", final_norm="denoise_model.ln_f", layer="denoise_model.h.{i}",
  positions="denoise_model.wpe",
)  # fmt: skip

LAYOUTS: dict[str, Layout] = {
  "llama": _LLAMA,
  "mistral": _LLAMA,
  "qwen2": _LLAMA,
  "qwen3": _LLAMA,
  "gemma": _LLAMA,
  "gemma2": _GEMMA2,
  "gemma3_text": _GEMMA2,
  "gpt2": _GPT2,
  "llada": _LLADA,
  "dream": _LLAMA,
  "sdar": _LLAMA,
  "fast_dllm_v2": _LLAMA,
  "qwen3_moe": _QWEN3_MOE,
  "sdar_moe": _QWEN3_MOE,
  "llada_moe": _QWEN3_MOE,
  "llada2_moe": _LLADA2,
  "diffullama": _DIFFULLAMA,
  "diffugpt": _DIFFUGPT,
}


@dataclasses.dataclass(frozen=True)
class Entry:
  """Where one leaf (or one layer of a stacked leaf) lives in the checkpoint.

  Fields:
    name: HF tensor name.
    leaf: '/'-joined path of ours; row: row of the stacked leaf, None if it is not stacked; expert: of that
      row, None where there are none.
    transpose: the tensor is [out, in] (torch Linear), our kernels contract their leading dimensions.
    part: (start, stop, n): of the n output features of a fused tensor, those of this leaf; None for all.
    pad: rows of the vocabulary beyond the tensor's are zero in ours, and left out on export.
  """

  name: str
  leaf: str
  row: int | None = None
  expert: int | None = None
  transpose: bool = False
  part: tuple[int, int, int] | None = None
  pad: bool = False

  @property
  def share(self) -> float:
    """Of the tensor, how much this entry takes."""
    return 1.0 if self.part is None else (self.part[1] - self.part[0]) / self.part[2]

  def place(self, leaf):
    """(the part of the leaf that the tensor fills, index of its first element)."""
    first = 0
    for i in (self.row, self.expert):
      if i is not None:
        leaf = leaf[i]
        first += i * leaf.size
    return leaf, first


def entries(cfg: TrunkConfig, layout: str) -> list[Entry]:
  """All entries of a model under a layout; together they cover every leaf (checked by `read` and `write`).

  Raises:
    ConfigError: an unknown layout, or leaves that it has no name for.
  """
  if layout not in LAYOUTS:
    raise ConfigError(
      "cannot map this layout", key="layout", value=layout, fix=f"one of {', '.join(LAYOUTS)}"
    )
  names = LAYOUTS[layout]
  out, nameless = [], []

  def site(name, leaf, row=None, part=None, bias=False, expert=None):
    out.append(Entry(f"{name}.weight", f"{leaf}/kernel", row, expert, names.transpose, part))
    if bias:
      out.append(Entry(f"{name}.bias", f"{leaf}/bias", row, part=part))

  def norm(name, leaf, row=None):
    out.append(Entry(f"{name}.weight", f"{leaf}/scale", row))
    if "norm" in cfg.bias and not leaf.endswith(("q_norm", "k_norm")):
      out.append(Entry(f"{name}.bias", f"{leaf}/bias", row))

  norms = ["attn_norm", "mlp_norm"] + ["attn_post_norm", "mlp_post_norm"] * cfg.post_norm
  norms += ["attn/q_norm", "attn/k_norm"] * (cfg.qk_norm == "rms")
  attention, mlps = [f"attn/{n}" for n in "qkvo"], ("gate",) * cfg.gated + ("up", "down")
  fused = _fused(cfg) if names.fused else {}
  out.append(Entry(f"{names.table}.weight", "embed/tokens/embedding", pad=True))
  if cfg.learned_pos:
    if names.positions:
      out.append(Entry(f"{names.positions}.weight", "embed/learned_pos/embedding"))
    else:
      nameless.append("embed/learned_pos")
  for i in range(cfg.layers):
    s, row, p = layer_path(cfg, i)
    ours, theirs = f"stack/s{s}/l{p}", names.layer.format(i=i)
    for n in norms + attention + _mlp_sites(cfg, i, mlps):
      if n not in fused and n not in names.sites:
        nameless.append(f"{ours}/{n}")
      elif n in norms:
        norm(f"{theirs}.{names.sites[n]}", f"{ours}/{n}", row)
      elif n == "mlp/expert_bias":
        out.append(Entry(f"{theirs}.{names.sites[n]}", f"{ours}/{n}", row))
      elif n.startswith("mlp/experts/"):
        for e in range(cfg.moe.experts):
          site(f"{theirs}.{names.sites[n].format(e=e)}", f"{ours}/{n}", row, expert=e)
      else:
        name = names.fused if n in fused else names.sites[n]
        site(f"{theirs}.{name}", f"{ours}/{n}", row, fused.get(n), n.rsplit("/", 1)[-1] in cfg.bias)
  if nameless:
    raise ConfigError(
      f"the layout has no tensor for {len(nameless)} parts of this model: {', '.join(nameless[:6])}",
      key="layout", value=layout, fix="another layout, or the one the model was imported from",
    )  # fmt: skip
  norm(names.final_norm, "final_norm")
  if not cfg.head("text").tied:
    out.append(Entry(f"{names.head}.weight", "heads/text/kernel", transpose=True, pad=True))
  return out


def _fused(cfg: TrunkConfig) -> dict[str, tuple[int, int, int]]:
  """Entry.part of q, k and v in one tensor."""
  sizes = [n * cfg.head_dim for n in (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads)]
  ends = np.cumsum(sizes).tolist()
  return {f"attn/{n}": (end - size, end, ends[-1]) for n, size, end in zip("qkv", sizes, ends)}


def _mlp_sites(cfg: TrunkConfig, layer: int, mlps: tuple[str, ...]) -> list[str]:
  """Sites of a layer's MLP, or of its experts with their router."""
  s, _, p = layer_path(cfg, layer)
  if cfg.segments[s].pattern[p].mlp == "dense":
    return [f"mlp/{n}" for n in mlps]
  found = ["mlp/router"] + ["mlp/expert_bias"] * cfg.moe.bias + [f"mlp/experts/{n}" for n in mlps]
  return found + [f"mlp/shared/{n}" for n in mlps if cfg.moe.shared]


def tied_name(layout: str) -> str:
  """The output weight's name, which a tied checkpoint leaves out, or repeats the table under."""
  return f"{LAYOUTS[layout].head}.weight"


def check(cfg: TrunkConfig, layout: str, shapes: Mapping[str, tuple[int, ...]]) -> list[Entry]:
  """The entries, if a checkpoint's tensors {name: shape} are exactly those of the model.

  Raises:
    ValueError: a tensor that is missing, has the wrong shape, or that nothing takes; a leaf that nothing
      fills. All of them are named.
  """
  found = entries(cfg, layout)
  leaves = leaf_shapes(cfg)
  names = {e.name for e in found}
  skipped = {tied_name(layout)} if cfg.head("text").tied else set()
  extra = sorted(n for n in shapes if n not in names and n not in skipped and not BUFFERS.fullmatch(n))
  _complain("tensors that no parameter takes", extra)
  _complain("missing tensors", sorted(names - set(shapes)))
  _complain("parameters without a tensor", sorted(set(leaves) - {e.leaf for e in found}))
  for e in found:
    want = tensor_shape(cfg, e, leaves[e.leaf])
    if tuple(shapes[e.name]) != want:
      raise ValueError(
        f"{e.name}: expected shape {want} for {e.leaf} {tuple(leaves[e.leaf])}, got {tuple(shapes[e.name])}: "
        "config.json and the weights do not belong together"
      )
  return found


@functools.lru_cache(maxsize=8)  # it traces the whole model
def leaf_shapes(cfg: TrunkConfig) -> Mapping[str, tuple[int, ...]]:
  """{leaf: shape} of the model, adapters left out."""
  abstract = Model(dataclasses.replace(cfg, lora=None)).abstract_params()
  return {path: tuple(x.shape) for path, x in _leaves(abstract).items()}


def tensor_shape(cfg: TrunkConfig, e: Entry, leaf: tuple[int, ...]) -> tuple[int, ...]:
  """Shape of the tensor that fills a leaf of shape `leaf` (one row of it)."""
  leaf = tuple(leaf[(e.row is not None) + (e.expert is not None) :])
  if not e.leaf.endswith("/kernel"):
    if e.pad:
      leaf = (cfg.vocab, *leaf[1:])
    if e.leaf.endswith("/bias"):
      return (int(np.prod(leaf)) if e.part is None else e.part[2],)
    return leaf
  n_in = 2 if e.leaf.endswith("/o/kernel") else 1
  d_in, d_out = int(np.prod(leaf[:n_in])), int(np.prod(leaf[n_in:]))
  if e.pad or e.part is not None:
    d_out = cfg.vocab if e.pad else e.part[2]
  return (d_out, d_in) if e.transpose else (d_in, d_out)


def views(cfg: TrunkConfig, e: Entry, leaf: np.ndarray, tensor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The part of a leaf and the part of a tensor that correspond, as views of one shape.

  Import is `leaf_view[...] = tensor_view`, export the other way round.

  Args:
    leaf: the whole leaf [R, …], [R, E, …] or […], C-contiguous; tensor: the whole tensor.
  """
  assert leaf.flags.c_contiguous  # else the reshapes below are copies
  leaf, _ = e.place(leaf)
  tensor = tensor.T if e.transpose else tensor
  if e.part is not None:
    tensor = tensor[..., e.part[0] : e.part[1]]
  if e.leaf.endswith("/kernel"):
    n_in = 2 if e.leaf.endswith("/o/kernel") else 1
    leaf = leaf.reshape(int(np.prod(leaf.shape[:n_in])), -1)
    leaf = leaf[:, : cfg.vocab] if e.pad else leaf
  elif e.leaf.endswith("/bias"):
    leaf = leaf.reshape(-1)
  elif e.pad:
    leaf = leaf[: cfg.vocab]
  assert leaf.shape == tensor.shape
  return leaf, tensor


def read(cfg: TrunkConfig, layout: str, tensors: Mapping[str, Any], dtype=None) -> dict:
  """Parameters from a checkpoint's tensors, in memory; `genmodels import` streams instead.

  Args:
    tensors: name → array (anything that `np.asarray` takes).
    dtype: of the leaves; the configuration's master type by default.

  Returns:
    Nested dicts of NumPy arrays.

  Raises:
    ValueError: as `check`.
  """
  found = check(cfg, layout, {n: tuple(x.shape) for n, x in tensors.items()})
  dtype = dtype or np.dtype(cfg.param_dtype)
  flat = {path: np.zeros(shape, dtype) for path, shape in leaf_shapes(cfg).items()}
  for e in found:
    leaf, tensor = views(cfg, e, flat[e.leaf], np.asarray(tensors[e.name]))
    leaf[...] = tensor
  return _nest(flat)


def write(cfg: TrunkConfig, layout: str, params) -> dict[str, np.ndarray]:
  """A checkpoint's tensors from parameters, in memory: the inverse of `read` (padding left out).

  Raises:
    ValueError: as `cover`.
  """
  flat = {n: np.ascontiguousarray(x) for n, x in _leaves(params).items()}
  out: dict[str, np.ndarray] = {}
  for e in cover(cfg, layout, flat):
    if e.name not in out:
      out[e.name] = np.zeros(tensor_shape(cfg, e, flat[e.leaf].shape), flat[e.leaf].dtype)
    leaf, tensor = views(cfg, e, flat[e.leaf], out[e.name])
    tensor[...] = leaf
  return out


def cover(cfg: TrunkConfig, layout: str, leaves: Iterable[str]) -> list[Entry]:
  """The entries, if they cover these leaves.

  Raises:
    ValueError: leaves that the layout has no tensor for (adapters: merge them first), or none for a tensor.
  """
  found, leaves = entries(cfg, layout), set(leaves)
  have = {e.leaf for e in found}
  _complain(f"leaves that {layout} has no tensor for", sorted(leaves - have))
  _complain("missing leaves", sorted(have - leaves))
  return found


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
