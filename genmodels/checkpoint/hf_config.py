"""config.json of Hugging Face folders ↔ our model section, and how a published diffusion model predicts.

Pure functions over plain dicts. What a configuration asks for and this trunk does not compute is refused, by
key: nothing is read over.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from genmodels.checkpoint import hf_moe
from genmodels.checkpoint.hf_moe import refuse as _refuse
from genmodels.config import ConfigError
from genmodels.models import LayerSpec, Scaling, Segment, TrunkConfig, layer_path
from genmodels.models import config as trunk_config

ACTIVATIONS = {
  "silu": "silu",
  "swish": "silu",
  "gelu": "gelu",
  "gelu_new": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
}

# model_type of a config.json → layout (hf_names.LAYOUTS); DiffuLLaMA calls itself llama, its tensors tell;
# LLaDA-MoE calls itself llada, its keys tell.
MODEL_TYPES = {
  "llama": "llama",
  "mistral": "mistral",
  "qwen2": "qwen2",
  "qwen3": "qwen3",
  "gpt2": "gpt2",
  "gemma": "gemma",
  "gemma2": "gemma2",
  "gemma3_text": "gemma3_text",
  "llada": "llada",
  "Dream": "dream",
  "sdar": "sdar",
  "Fast_dLLM_Qwen": "fast_dllm_v2",
  "qwen3_moe": "qwen3_moe",
  "sdar_moe": "sdar_moe",
  "lladamoe": "llada_moe",
  "llada_moe": "llada_moe",
  "llada2_moe": "llada2_moe",
}
# Known, and what is missing for them.
NOT_YET = {
  "qwen2_moe": "a gate on the shared expert",
  "mixtral": "its names of experts (w1, w2, w3)",
  "llada2_moe_veomni": "experts stored as one tensor (split them, as in model type llada2_moe)",
  "gemma3": "a vision tower beside the text model (text-only folders are of type gemma3_text)",
}
LOCAL = "local"  # mask pattern of sliding-window layers

# Fields of a TrunkConfig that a checkpoint does not decide: how it is trained and run.
RUN_FIELDS = (
  "dtype", "param_dtype", "remat", "attention", "lora", "dropout", "init_std", "init_out_scale",
  "vocab_multiple", "expert_matmul", "prefix",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Diffusion:
  """How a published diffusion model reads and predicts.

  Fields:
    mask: attention rule: "full", or "bd3" (clean and noisy streams, blocks).
    align: Term.align.
    mask_id: id of the mask token; keys: config keys that hold it, first found.
    block_keys: config keys of the block size; block: its value where none is set (0: whole documents).
  """

  mask: str
  align: str
  mask_id: int
  keys: tuple[str, ...] = ("mask_token_id", "mask_id")
  block_keys: tuple[str, ...] = ()
  block: int = 0


DIFFUSION = {
  "llada": Diffusion("full", "same", 126336),
  "dream": Diffusion("full", "shift", 151666),
  "diffullama": Diffusion("full", "shift", 811),
  "diffugpt": Diffusion("full", "shift", 10541),
  "sdar": Diffusion("bd3", "same", 151669, block_keys=("block_size", "block_length"), block=4),
  "fast_dllm_v2": Diffusion(
    "bd3", "shift_clean_boundary", 151665, block_keys=("bd_size", "block_size"), block=32
  ),
  "sdar_moe": Diffusion("bd3", "same", 151669, block_keys=("block_size", "block_length"), block=4),
  "llada_moe": Diffusion("full", "same", 156895),
  "llada2_moe": Diffusion("bd3", "same", 156895, block_keys=("block_size", "block_length"), block=32),
}


def layout(hf: Mapping[str, Any], names=()) -> str:
  """The layout of a folder: by model_type, and by tensor names where two share one.

  Raises:
    ConfigError: an unknown model type, or one that needs what the trunk does not have.
  """
  kind = hf.get("model_type")
  if kind in NOT_YET:
    raise ConfigError(
      f"not supported yet: it needs {NOT_YET[kind]}", key="model_type", value=kind,
      fix=f"one of {', '.join(MODEL_TYPES)}",
    )  # fmt: skip
  if kind not in MODEL_TYPES:
    raise ConfigError(
      "cannot read this model type", key="model_type", value=kind, fix=f"one of {', '.join(MODEL_TYPES)}"
    )
  if kind == "llada" and "expert_intermediate_size" in hf:
    return "llada_moe"
  if kind in ("llama", "gpt2") and any(n.startswith("denoise_model.") for n in names):
    return {"llama": "diffullama", "gpt2": "diffugpt"}[kind]
  return MODEL_TYPES[kind]


def section(hf: Mapping[str, Any]) -> dict[str, Any]:
  """The model section of a config.json.

  Raises:
    ConfigError: a model type, activation, RoPE scaling or option that this trunk does not compute, or a key
      that is missing.
  """
  kind = layout(hf)
  if hf.get("quantization_config"):
    raise ConfigError(
      "quantised weights are not read", key="quantization_config", value=hf["quantization_config"],
      fix="the checkpoint in bfloat16 or float32",
    )  # fmt: skip
  try:
    if kind == "gpt2":
      return _gpt2(hf)
    return _llada(hf) if kind == "llada" else _llama(hf, kind)
  except KeyError as e:
    raise ConfigError(
      "config.json lacks a key", key=str(e.args[0]), value=None, fix=f"a complete config.json of {kind}"
    ) from None


def _activation(hf, *keys: str) -> str:
  key = next((k for k in keys if hf.get(k)), keys[0])
  _refuse(hf, key, tuple(ACTIVATIONS))
  return ACTIVATIONS[hf.get(key, "silu")]


def _head(hf, tied: bool) -> dict:
  out: dict[str, Any] = {"tied": tied}
  if hf.get("final_logit_softcapping"):
    out["soft_cap"] = float(hf["final_logit_softcapping"])
  return {"text": out}


def _llama(hf, kind: str) -> dict[str, Any]:
  _refuse(hf, "pretraining_tp", (1, None))
  _refuse(hf, "use_mrope", (False, None))
  _refuse(hf, "use_bidirectional_attention", (False, None))
  gemma = kind.startswith("gemma")
  heads, width = hf["num_attention_heads"], hf["hidden_size"]
  bias = ("q", "k", "v") if kind in ("qwen2", "dream", "fast_dllm_v2") or hf.get("use_qkv_bias") else ()
  if kind == "dream" and hf.get("attention_bias") is False:
    bias = ()  # Dream's layout over a Llama
  elif not bias and hf.get("attention_bias"):
    bias = ("q", "k", "v", "o")
  if kind == "llada2_moe" and hf.get("use_bias", True):
    bias += ("o",)
  if hf.get("mlp_bias"):
    bias += ("gate", "up", "down")
  head_dim = hf.get("head_dim") or (256 if gemma else width // heads)
  local: dict[str, Any] = {}
  if kind == "gemma3_text":
    rope, local = _gemma3_rope(hf)
  else:
    rope = _partial_rope(hf, head_dim) if kind == "llada2_moe" else _rope(hf)
  specs = [{"mask": LOCAL, **local} if t == "sliding_attention" else {} for t in _layer_types(hf, kind)]
  more: dict[str, Any] = {}
  if kind in hf_moe.LAYOUTS:
    on = hf_moe.mixed(hf, kind)
    specs = [s | ({"mlp": "moe"} if x else {}) for s, x in zip(specs, on)]
    more = {"moe": hf_moe.section(hf, kind)} if any(on) else {}
  out = dict(
    width=width,
    num_heads=heads,
    num_kv_heads=hf.get("num_key_value_heads") or heads,
    head_dim=head_dim,
    mlp=hf["dense_intermediate_size" if kind == "llada_moe" else "intermediate_size"],
    vocab=hf["vocab_size"],
    eps=float(hf["rms_norm_eps"]),
    activation=_activation(hf, *(("hidden_activation",) if gemma else ()), "hidden_act"),
    qk_norm="rms" if _qk_norm(hf, kind) else "none",
    bias=bias,
    rope=rope,
    heads=_head(hf, bool(hf.get("tie_word_embeddings", gemma))),
    **_stack(specs),
    **more,
  )
  if gemma:
    out |= dict(norm_offset=True, embed_scale=width**0.5)
    if not hf.get("hidden_activation") and hf.get("hidden_act") in (None, "gelu"):
      out["activation"] = "gelu_tanh"  # what Gemma is, whatever its first config files said
  if kind in ("gemma2", "gemma3_text"):
    out |= dict(post_norm=True, attn_scale=float(hf.get("query_pre_attn_scalar", 256)) ** -0.5)
    if hf.get("attn_logit_softcapping"):
      out["attn_soft_cap"] = float(hf["attn_logit_softcapping"])
  return out


def _qk_norm(hf, kind: str) -> bool:
  if kind == "llada_moe":
    return bool(hf.get("qk_layernorm", True))
  if kind == "llada2_moe":
    return bool(hf.get("use_qk_norm", True))
  return kind in ("qwen3", "sdar", "gemma3_text", "qwen3_moe", "sdar_moe")


def _partial_rope(hf, head_dim: int) -> dict[str, Any]:
  """RoPE of the first `partial_rotary_factor` of each head."""
  parameters = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
  share = float(parameters.pop("partial_rotary_factor", None) or hf.get("partial_rotary_factor", 0.5))
  rope = _rope({k: v for k, v in hf.items() if k != "partial_rotary_factor"}, parameters)
  dim = int(head_dim * share)
  _refuse(hf, "rotary_dim", (dim, None))
  return rope if dim == head_dim else rope | {"axes": (dim,)}


def _layer_types(hf, kind: str) -> list[str]:
  """ "full_attention" or "sliding_attention" of every layer."""
  n = hf["num_hidden_layers"]
  types = hf.get("layer_types")
  if types is None:
    slides = bool(hf.get("sliding_window"))
    if kind in ("gemma2", "gemma3_text"):
      period = int(hf.get("sliding_window_pattern") or (2 if kind == "gemma2" else 6))
      types = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(n)]
    elif kind == "mistral":
      types = ["sliding_attention" if slides else "full_attention"] * n
    else:
      first = hf.get("max_window_layers", n) if hf.get("use_sliding_window") and slides else n
      types = ["sliding_attention" if i >= first else "full_attention" for i in range(n)]
  if len(types) != n or set(types) - {"full_attention", "sliding_attention"}:
    raise ConfigError(
      f"expected full_attention or sliding_attention for each of {n} layers", key="layer_types", value=types
    )
  return list(types)


def _stack(specs: list[dict]) -> dict[str, Any]:
  """`layers` and `pattern`, or `segments` where the layers do not repeat: runs of equal ones."""
  n = len(specs)
  period = next((p for p in range(1, 13) if all(specs[i] == specs[i % p] for i in range(n))), n)
  if period < n or n == 1:
    pattern = tuple(specs[:period])
    return {"layers": n} if pattern == ({},) else {"layers": n, "pattern": pattern}
  runs: list[list] = []
  for spec in specs:
    if runs and runs[-1][0] == spec:
      runs[-1][1] += 1
    else:
      runs.append([spec, 1])
  return {"segments": tuple({"pattern": (spec,), "repeats": r} for spec, r in runs)}


def _rope(hf, parameters=None) -> dict[str, Any]:
  """RoPE of `rope_parameters` (transformers ≥ 5) or of `rope_theta` and `rope_scaling`."""
  given = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
  p = dict(given if parameters is None else parameters)
  base = float(p.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0)
  kind = p.pop("rope_type", None) or p.pop("type", None) or "default"
  p.pop("type", None)
  if float(p.pop("partial_rotary_factor", None) or hf.get("partial_rotary_factor") or 1.0) != 1.0:
    raise ConfigError("partial rotary factors are not read", key="rope_parameters", value=dict(hf), fix="1.0")
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


def _gemma3_rope(hf) -> tuple[dict, dict]:
  """RoPE of the global layers, and what a local LayerSpec changes: its base, and no scaling."""
  p = hf.get("rope_parameters") or {}
  if "full_attention" in p:
    rope, near = _rope(hf, p["full_attention"]), _rope(hf, p["sliding_attention"])
    if "scaling" in near:
      raise ConfigError("scaled RoPE in local layers is not read", key="rope_parameters", value=p)
  else:
    rope = _rope({"rope_theta": 1e6, **hf})
    near = dict(base=float(hf.get("rope_local_base_freq") or 10000.0))
  return rope, dict(rope_base=near["base"], rope_scaling=False)


def _llada(hf) -> dict[str, Any]:
  """LLaDA 8B (arXiv:2502.09992): OLMo's names over Llama's computation, attention in both directions."""
  for key, accepted in (
    ("block_type", ("llama",)), ("layer_norm_type", ("rms",)), ("layer_norm_with_affine", (True,)),
    ("bias_for_layer_norm", (False, None)), ("attention_layer_norm", (False,)), ("include_bias", (False,)),
    ("rope", (True,)), ("alibi", (False,)), ("scale_logits", (False,)), ("input_emb_norm", (False,)),
    ("clip_qkv", (None,)), ("block_group_size", (1,)), ("multi_query_attention", (None, False)),
  ):  # fmt: skip
    _refuse(hf, key, accepted)
  heads, width = hf["n_heads"], hf["d_model"]
  return dict(
    width=width,
    layers=hf["n_layers"],
    num_heads=heads,
    num_kv_heads=hf.get("n_kv_heads") or heads,
    head_dim=width // heads,
    mlp=hf.get("mlp_hidden_size") or hf["mlp_ratio"] * width,
    vocab=hf.get("embedding_size") or hf["vocab_size"],
    eps=float(hf["rms_norm_eps"]),
    activation=_activation(hf, "activation_type"),
    bias=("q", "k", "v") if hf.get("include_qkv_bias") else (),
    rope=dict(base=float(hf["rope_theta"])),
    heads=_head(hf, bool(hf.get("weight_tying", False))),
  )


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
    heads=_head(hf, bool(hf.get("tie_word_embeddings", True))),
  )


# ------------------------------------------------------------------------- objective of a folder


def window(hf: Mapping[str, Any], section: Mapping[str, Any]) -> int:
  """Keys that a sliding-window layer sees, itself included; 0 where there is none.

  Raises:
    ConfigError: local layers without a window.
  """
  specs = [s for seg in section.get("segments", ()) for s in seg["pattern"]] or section.get("pattern", ())
  if not any(s.get("mask") == LOCAL for s in specs):
    return 0
  size = hf.get("sliding_window")
  if not size:
    raise ConfigError(
      "sliding-window layers need a window", key="sliding_window", value=size, fix="its length"
    )
  return int(size)


def masks(rule: str, window: int) -> dict[str, str]:
  """Mask patterns of a model with local layers: the rule, and the rule within a window."""
  return {"full": rule} | ({LOCAL: f"{rule}&NEAR({window - 1})"} if window else {})


def diffusion(kind: str, hf: Mapping[str, Any]) -> dict[str, Any]:
  """{"mask_id", "block"} of a published diffusion model; {} for AR ones."""
  spec = DIFFUSION.get(kind)
  if spec is None:
    return {}
  first = lambda keys, default: next((int(hf[k]) for k in keys if hf.get(k) is not None), default)
  return {"mask_id": first(spec.keys, spec.mask_id), "block": first(spec.block_keys, spec.block)}


def objective(kind: str, hf: Mapping[str, Any], size: int) -> dict[str, Any]:
  """The objective section under which a folder is evaluated and sampled; `size` is the window."""
  spec = DIFFUSION.get(kind)
  if spec is None:
    return {
      "kind": "tokens",
      "corruption": {"kind": "clean"},
      "layout": {"kind": "streams", "streams": ("c",)},
      "masks": masks("causal", size),
      "terms": {"text": {"stream": "c", "align": "shift"}},
    }
  facts = diffusion(kind, hf)
  whole = spec.mask == "full"
  return {
    "kind": "tokens",
    "corruption": {"kind": "absorb", "unit": "doc"}
    if whole
    else {"kind": "absorb", "unit": "block", "blocks": {"size": facts["block"]}},
    "layout": {"kind": "streams", "streams": ("n",) if whole else ("n", "c")},
    "masks": masks(spec.mask, size),
    "terms": {"diffusion": {"stream": "n", "on": "hit", "weight": "nelbo", "align": spec.align}},
    "mask_id": facts["mask_id"],
  }


# --------------------------------------------------------------------------------------- writing


def architecture(cfg: TrunkConfig) -> TrunkConfig:
  """`cfg` without what a checkpoint does not decide: two models of equal architecture share tensors."""
  default = {f.name: f.default for f in dataclasses.fields(TrunkConfig) if f.name in RUN_FIELDS}
  heads = tuple((n, dataclasses.replace(h, forbid=(), chunk=1024, zero_init=False)) for n, h in cfg.heads)
  return dataclasses.replace(cfg, **default, heads=heads)


def differences(have: TrunkConfig, want: TrunkConfig) -> list[str]:
  """Architectural fields in which two models differ: "field: have, want"."""
  a, b = architecture(have), architecture(want)
  names = [f.name for f in dataclasses.fields(TrunkConfig)]
  return [f"{n}: {getattr(a, n)!r}, {getattr(b, n)!r}" for n in names if getattr(a, n) != getattr(b, n)]


ARCHITECTURES = {
  "llama": "LlamaForCausalLM",
  "mistral": "MistralForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
  "qwen3": "Qwen3ForCausalLM",
  "gpt2": "GPT2LMHeadModel",
  "gemma": "GemmaForCausalLM",
  "gemma2": "Gemma2ForCausalLM",
  "gemma3_text": "Gemma3ForCausalLM",
  "llada": "LLaDAModelLM",
  "dream": "DreamModel",
  "sdar": "SDARForCausalLM",
  "fast_dllm_v2": "Fast_dLLM_QwenForCausalLM",
  "qwen3_moe": "Qwen3MoeForCausalLM",
  "sdar_moe": "SDARMoeForCausalLM",
  "llada_moe": "LLaDAMoEModelLM",
  "llada2_moe": "LLaDA2MoeModelLM",
  "diffullama": "LlamaForCausalLM",
  "diffugpt": "GPT2LMHeadModel",
}
# The code that a folder of remote code brings; the exported one names it, as its publishers do.
REMOTE = {
  "llada": ("configuration_llada.LLaDAConfig", "modeling_llada.LLaDAModelLM"),
  "dream": ("configuration_dream.DreamConfig", "modeling_dream.DreamModel"),
  "sdar": ("configuration_sdar.SDARConfig", "modeling_sdar.SDARForCausalLM"),
  "fast_dllm_v2": ("configuration.Fast_dLLM_QwenConfig", "modeling.Fast_dLLM_QwenForCausalLM"),
  "sdar_moe": ("configuration_sdar_moe.SDARMoeConfig", "modeling_sdar_moe.SDARMoeForCausalLM"),
  "llada_moe": ("configuration_lladamoe.LLaDAMoEConfig", "modeling_lladamoe.LLaDAMoEModelLM"),
  "llada2_moe": ("configuration_llada2_moe.LLaDA2MoeConfig", "modeling_llada2_moe.LLaDA2MoeModelLM"),
}


def write(cfg: TrunkConfig, kind: str, like: Mapping[str, Any], size: int = 0) -> dict[str, Any]:
  """A config.json for `cfg` under a layout.

  Args:
    like: config.json of the source, or {}: of the same layout, it is kept, key by key, and only the size of
      the vocabulary follows the model; of another, its ids, context length and notes are taken over.
    size: window of local layers.

  Raises:
    ConfigError: the layout cannot say what this model computes; the fields are named.
  """
  own = layout(like) if like else ""
  family = {"diffullama": "llama", "diffugpt": "gpt2"}.get(kind, kind)
  if own == family:
    out = dict(like)
    out["embedding_size" if kind == "llada" and "embedding_size" in out else "vocab_size"] = cfg.vocab
  else:
    keep = (
      "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "initializer_range",
      "use_cache", "attention_dropout", "mask_token_id",
    )  # fmt: skip
    out = {k: like[k] for k in keep if k in like}
    model_type = next(t for t, name in MODEL_TYPES.items() if name == family)
    out |= {"model_type": model_type, "architectures": [ARCHITECTURES[kind]]}
    if kind in REMOTE:
      config, model = REMOTE[kind]
      out["auto_map"] = {"AutoConfig": config, "AutoModel": model, "AutoModelForCausalLM": model}
    out |= (
      _gpt2_fields(cfg) if family == "gpt2" else _llada_fields(cfg) if kind == "llada" else _fields(cfg, kind)
    )
    if size:
      out["sliding_window"] = size
  wrong = differences(trunk_config.from_section(section(out)), cfg)
  if wrong:
    raise ConfigError(
      f"layout {kind!r} cannot say what this model computes (the layout's, the model's): {'; '.join(wrong)}",
      key="layout", value=kind, fix="another layout (--layout), or the one the model was imported from",
    )  # fmt: skip
  return out


def _fields(cfg: TrunkConfig, kind: str) -> dict[str, Any]:
  gemma = kind.startswith("gemma")
  names = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
  if cfg.rope is None:
    raise ConfigError(f"layout {kind!r} rotates positions", key="model.rope", value=None, fix="layout gpt2")
  out = {
    "hidden_size": cfg.width,
    "num_hidden_layers": cfg.layers,
    "num_attention_heads": cfg.num_heads,
    "num_key_value_heads": cfg.num_kv_heads,
    "head_dim": cfg.head_dim,
    "intermediate_size": cfg.mlp,
    "vocab_size": cfg.vocab,
    "rms_norm_eps": cfg.eps,
    "hidden_activation" if gemma else "hidden_act": names[cfg.activation],
    "tie_word_embeddings": cfg.head("text").tied,
    "rope_theta": cfg.rope.base,
  }
  if cfg.rope.scaling is not None:
    out["rope_scaling"] = _scaling(cfg.rope.scaling)
  if kind in hf_moe.LAYOUTS:
    out |= hf_moe.fields(cfg, kind)
  if kind in ("llama", "qwen3", "sdar", "diffullama", "qwen3_moe", "sdar_moe", "llada_moe"):
    out["attention_bias"] = "o" in cfg.bias
  if kind in ("llama", "diffullama"):
    out["mlp_bias"] = "gate" in cfg.bias
  if kind == "dream":
    out["attention_bias"] = "q" in cfg.bias
  types = [_spec(cfg, i).mask == LOCAL for i in range(cfg.layers)]
  if any(types) and kind != "mistral":
    out["layer_types"] = ["sliding_attention" if t else "full_attention" for t in types]
  if kind in ("qwen2", "qwen3", "sdar", "dream", "fast_dllm_v2", *hf_moe.LAYOUTS):
    out["use_sliding_window"] = any(types)
  if kind == "mistral":
    out["sliding_window"] = None
  if kind in ("gemma2", "gemma3_text"):
    scale = cfg.head_dim**-0.5 if cfg.attn_scale is None else cfg.attn_scale
    out["query_pre_attn_scalar"] = round(scale**-2)
    out["attn_logit_softcapping"] = cfg.attn_soft_cap
    out["final_logit_softcapping"] = cfg.head("text").soft_cap
  if kind == "gemma3_text":
    near = [_spec(cfg, i).rope_base for i in range(cfg.layers) if types[i]]
    out["rope_local_base_freq"] = near[0] if near else 10000.0
  return out


def _spec(cfg: TrunkConfig, layer: int) -> LayerSpec:
  s, _, p = layer_path(cfg, layer)
  segment: Segment = cfg.segments[s]
  return segment.pattern[p]


def _scaling(s: Scaling) -> dict[str, Any]:
  out: dict[str, Any] = {"rope_type": s.kind, "factor": s.factor}
  if s.kind in ("yarn", "llama3"):
    out["original_max_position_embeddings"] = s.original_len
  if s.kind == "yarn":
    out |= {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow, "truncate": s.truncate}
    if s.attention_factor is not None:
      out["attention_factor"] = s.attention_factor
  if s.kind == "llama3":
    out |= {"low_freq_factor": s.low_freq_factor, "high_freq_factor": s.high_freq_factor}
  return out


def _llada_fields(cfg: TrunkConfig) -> dict[str, Any]:
  if cfg.rope is None:
    raise ConfigError("layout 'llada' rotates positions", key="model.rope", value=None, fix="layout gpt2")
  return {
    "d_model": cfg.width,
    "n_layers": cfg.layers,
    "n_heads": cfg.num_heads,
    "n_kv_heads": cfg.num_kv_heads,
    "mlp_hidden_size": cfg.mlp,
    "vocab_size": cfg.vocab,
    "embedding_size": cfg.vocab,
    "rms_norm_eps": cfg.eps,
    "activation_type": cfg.activation,
    "include_qkv_bias": "q" in cfg.bias,
    "rope_theta": cfg.rope.base,
    "weight_tying": cfg.head("text").tied,
    "block_type": "llama",
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "rope": True,
  } | {k: False for k in ("alibi", "attention_layer_norm", "include_bias", "input_emb_norm", "scale_logits")}


def _gpt2_fields(cfg: TrunkConfig) -> dict[str, Any]:
  return {
    "n_embd": cfg.width,
    "n_layer": cfg.layers,
    "n_head": cfg.num_heads,
    "n_inner": cfg.mlp,
    "vocab_size": cfg.vocab,
    "layer_norm_epsilon": cfg.eps,
    "activation_function": {"gelu": "gelu", "gelu_tanh": "gelu_new", "silu": "silu"}[cfg.activation],
    "n_positions": cfg.learned_pos,
    "tie_word_embeddings": cfg.head("text").tied,
  }
