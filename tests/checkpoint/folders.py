"""Random Hugging Face folders, made without torch: a config.json per layout, and tensors under the names written
out by hand in `KEYS` (from the publishers' files), not by the code that is tested."""

import json
import math

import ml_dtypes
import numpy as np

from genmodels.checkpoint import hf_import, tensors

SMALL = dict(
  hidden_size=24, intermediate_size=40, num_hidden_layers=3, vocab_size=300, num_attention_heads=6,
  num_key_value_heads=2, head_dim=16, max_position_embeddings=64, rms_norm_eps=1e-6, rope_theta=10000.0,
  hidden_act="silu", tie_word_embeddings=False,
)  # fmt: skip
QWEN2 = {k: v for k, v in SMALL.items() if k != "head_dim"}
LLADA = dict(
  model_type="llada", architectures=["LLaDAModelLM"], d_model=24, n_layers=3, n_heads=6, n_kv_heads=2,
  mlp_hidden_size=40, vocab_size=300, embedding_size=304, max_sequence_length=64, rms_norm_eps=1e-5,
  rope_theta=500000.0, mask_token_id=299, weight_tying=False, include_bias=False, include_qkv_bias=False,
  activation_type="silu", block_type="llama", layer_norm_type="rms", layer_norm_with_affine=True,
  attention_layer_norm=False, bias_for_layer_norm=False, rope=True, alibi=False, scale_logits=False,
  input_emb_norm=False, block_group_size=1, multi_query_attention=None,
)  # fmt: skip
GEMMA = dict(SMALL, hidden_activation="gelu_pytorch_tanh", tie_word_embeddings=True)
GEMMA.pop("hidden_act")
GPT2 = dict(
  model_type="gpt2", architectures=["GPT2LMHeadModel"], n_embd=24, n_layer=3, n_head=4, n_inner=None,
  vocab_size=300, n_positions=64, layer_norm_epsilon=1e-5, activation_function="gelu_new",
)  # fmt: skip

MOE = dict(SMALL, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=20)

CONFIGS = {
  "llama": dict(SMALL, model_type="llama", attention_bias=True, mlp_bias=True),
  "llama_tied": dict(
    SMALL, model_type="llama", tie_word_embeddings=True,
    rope_scaling=dict(
      rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
      original_max_position_embeddings=16,
    ),
  ),
  "mistral": dict(SMALL, model_type="mistral", sliding_window=5),
  "qwen2": dict(QWEN2, model_type="qwen2"),
  "qwen2_window": dict(QWEN2, model_type="qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=2),
  "qwen3": dict(SMALL, model_type="qwen3"),
  "qwen3_tied": dict(SMALL, model_type="qwen3", tie_word_embeddings=True),
  "gpt2": GPT2,
  "gemma": dict(GEMMA, model_type="gemma"),
  "gemma2": dict(
    GEMMA, model_type="gemma2", query_pre_attn_scalar=20, sliding_window=5, attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0,
  ),
  "gemma3_text": dict(
    GEMMA, model_type="gemma3_text", num_hidden_layers=5, sliding_window_pattern=3, sliding_window=5,
    query_pre_attn_scalar=20, rope_theta=1e6, rope_local_base_freq=1e4, rope_scaling=dict(rope_type="linear", factor=8.0),
  ),
  "llada": LLADA,
  "dream": dict(QWEN2, model_type="Dream", architectures=["DreamModel"], mask_token_id=299),
  "sdar": dict(SMALL, model_type="sdar", architectures=["SDARForCausalLM"], mask_token_id=299, block_size=4),
  "fast_dllm_v2": dict(
    QWEN2, model_type="Fast_dLLM_Qwen", architectures=["Fast_dLLM_QwenForCausalLM"], mask_token_id=299, bd_size=8,
  ),
  # Layer 1 is dense; what transformers writes today says num_local_experts.
  "qwen3_moe": dict(MOE, model_type="qwen3_moe", norm_topk_prob=True, mlp_only_layers=[1], decoder_sparse_step=1),
  "sdar_moe": dict(
    MOE, model_type="sdar_moe", architectures=["SDARMoeForCausalLM"], norm_topk_prob=True, mask_token_id=299,
    block_size=4,
  ),
  "llada_moe": dict(
    {k: v for k, v in SMALL.items() if k != "intermediate_size"}, model_type="llada", architectures=["LLaDAMoEModelLM"],
    num_key_value_heads=6, num_experts=6, num_experts_per_tok=2, expert_intermediate_size=20,
    dense_intermediate_size=40, moe_layer_freq=[1, 1, 1], norm_topk_prob=None, moe_router_score_function="softmax",
    moe_router_enable_expert_bias=False, shared_expert_intermediate_size=None, router_num_group=None,
    router_topk_group=None, routed_scaling_factor=1, qk_layernorm=True, attention_bias=False, clip_qkv=None,
    mask_token_id=299,
  ),
  "llada2_moe": dict(
    MOE, model_type="llada2_moe", architectures=["LLaDA2MoeModelLM"], num_experts=8, num_experts_per_tok=3,
    num_shared_experts=2, first_k_dense_replace=1, n_group=4, topk_group=2, routed_scaling_factor=2.5,
    score_function="sigmoid", norm_topk_prob=True, moe_router_enable_expert_bias=True, partial_rotary_factor=0.5,
    use_qk_norm=True, use_qkv_bias=False, use_bias=False, mask_token_id=299,
  ),
  "diffullama": dict(QWEN2, model_type="llama", mask_token_id=299),
  "diffugpt": dict(GPT2, mask_token_id=299),
}  # fmt: skip

_LLAMA_LAYER = (
  "input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.q_proj.weight", "self_attn.k_proj.weight",
  "self_attn.v_proj.weight", "self_attn.o_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight",
  "mlp.down_proj.weight",
)  # fmt: skip
_QKV_BIAS = ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")
_QK_NORM = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
_POST = ("pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight")
_GPT2_LAYER = tuple(
  f"{n}.{p}"
  for n in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
  for p in ("weight", "bias")
)
_LLADA_LAYER = tuple(
  f"{n}.weight"
  for n in ("attn_norm", "ff_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
)
_LLADA2_LAYER = (
  "input_layernorm.weight", "post_attention_layernorm.weight", "attention.query_key_value.weight",
  "attention.dense.weight", "attention.query_layernorm.weight", "attention.key_layernorm.weight",
)  # fmt: skip
_MLP = tuple(f"{n}_proj.weight" for n in ("gate", "up", "down"))
_LLAMA_OUT = ("model.embed_tokens.weight", "model.norm.weight")
_HEAD = ("lm_head.weight",)

# layout case → (names outside of the layers, prefix of layer {i}, names in a layer)
KEYS = {
  "llama": (
    _LLAMA_OUT + _HEAD, "model.layers.{i}.",
    _LLAMA_LAYER + _QKV_BIAS + ("self_attn.o_proj.bias", "mlp.gate_proj.bias", "mlp.up_proj.bias", "mlp.down_proj.bias"),
  ),
  "llama_tied": (_LLAMA_OUT, "model.layers.{i}.", _LLAMA_LAYER),
  "mistral": (_LLAMA_OUT + _HEAD, "model.layers.{i}.", _LLAMA_LAYER),
  "qwen2": (_LLAMA_OUT + _HEAD, "model.layers.{i}.", _LLAMA_LAYER + _QKV_BIAS),
  "qwen2_window": (_LLAMA_OUT + _HEAD, "model.layers.{i}.", _LLAMA_LAYER + _QKV_BIAS),
  "qwen3": (_LLAMA_OUT + _HEAD, "model.layers.{i}.", _LLAMA_LAYER + _QK_NORM),
  "qwen3_tied": (_LLAMA_OUT, "model.layers.{i}.", _LLAMA_LAYER + _QK_NORM),
  "gpt2": (
    ("transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight", "transformer.ln_f.bias"),
    "transformer.h.{i}.", _GPT2_LAYER,
  ),
  "gemma": (_LLAMA_OUT, "model.layers.{i}.", _LLAMA_LAYER),
  "gemma2": (_LLAMA_OUT, "model.layers.{i}.", _LLAMA_LAYER + _POST),
  "gemma3_text": (_LLAMA_OUT, "model.layers.{i}.", _LLAMA_LAYER + _POST + _QK_NORM),
  "llada": (
    ("model.transformer.wte.weight", "model.transformer.ln_f.weight", "model.transformer.ff_out.weight"),
    "model.transformer.blocks.{i}.", _LLADA_LAYER,
  ),
  "dream": (_LLAMA_OUT + _HEAD, "model.layers.{i}.", _LLAMA_LAYER + _QKV_BIAS),
  "sdar": (_LLAMA_OUT + _HEAD, "model.layers.{i}.", _LLAMA_LAYER + _QK_NORM),
  "fast_dllm_v2": (_LLAMA_OUT + _HEAD, "model.layers.{i}.", _LLAMA_LAYER + _QKV_BIAS),
  "qwen3_moe": (_LLAMA_OUT + _HEAD, "model.layers.{i}.", _LLAMA_LAYER[:-3] + _QK_NORM),
  "sdar_moe": (_LLAMA_OUT + _HEAD, "model.layers.{i}.", _LLAMA_LAYER[:-3] + _QK_NORM),
  "llada_moe": (_LLAMA_OUT + _HEAD, "model.layers.{i}.", _LLAMA_LAYER[:-3] + _QK_NORM),
  "llada2_moe": (("model.word_embeddings.weight", "model.norm.weight") + _HEAD, "model.layers.{i}.", _LLADA2_LAYER),
  "diffullama": (
    ("embed_tokens.weight", "denoise_model.norm.weight", "lm_head.weight"), "denoise_model.layers.{i}.", _LLAMA_LAYER,
  ),
  "diffugpt": (
    ("embed_tokens.weight", "denoise_model.wpe.weight", "denoise_model.ln_f.weight", "denoise_model.ln_f.bias"),
    "denoise_model.h.{i}.", _GPT2_LAYER,
  ),
}  # fmt: skip
BF16 = np.dtype(ml_dtypes.bfloat16)


def keys(case, config=None):
  """All tensor names of a case."""
  outer, prefix, inner = KEYS[case]
  config = config or CONFIGS[case]
  layers = config.get("num_hidden_layers") or config.get("n_layer") or config.get("n_layers")
  return [*outer, *(prefix.format(i=i) + n for i in range(layers) for n in (*inner, *_mlp_keys(config, i)))]


def _mlp_keys(c, layer):
  """Names in layer `layer` of a model with experts, of its MLP: dense, or a router and its experts."""
  if not (experts := c.get("num_experts")):
    return []
  if layer in c.get("mlp_only_layers", ()) or layer < c.get("first_k_dense_replace", 0):
    return [f"mlp.{n}" for n in _MLP]
  shared = [f"mlp.shared_experts.{n}" for n in _MLP] if c.get("num_shared_experts") else []
  bias = ["mlp.gate.expert_bias"] if c.get("moe_router_enable_expert_bias") else []
  return ["mlp.gate.weight", *bias, *(f"mlp.experts.{e}.{n}" for e in range(experts) for n in _MLP), *shared]


def shape(case, name, config=None):
  """Shape of a tensor, from the sizes of the config: [out, in], GPT-2 [in, out]."""
  c = config or CONFIGS[case]
  D = c.get("hidden_size") or c.get("d_model") or c.get("n_embd")
  F = c.get("intermediate_size") or c.get("mlp_hidden_size") or 4 * D
  H = c.get("num_attention_heads") or c.get("n_heads") or c.get("n_head")
  G = c.get("num_key_value_heads") or c.get("n_kv_heads") or H
  K = c.get("head_dim") or D // H
  V = c.get("embedding_size") or c["vocab_size"]
  *_, site, kind = name.split(".")
  if site == "gate":
    return (c["num_experts"], D) if kind == "weight" else (c["num_experts"],)
  if ".experts." in name:
    F = c.get("moe_intermediate_size") or c["expert_intermediate_size"]
  elif ".shared_experts." in name:
    F = c["moe_intermediate_size"] * c["num_shared_experts"]
  if site == "query_key_value":
    return ((H + 2 * G) * K, D)
  if "_norm" in name.replace("layernorm", "_norm") or site in ("norm", "ln_1", "ln_2", "ln_f"):
    return (K,) if site in ("q_norm", "k_norm", "query_layernorm", "key_layernorm") else (D,)
  if (
    site in ("embed_tokens", "word_embeddings", "wte", "lm_head") or name == "model.transformer.ff_out.weight"
  ):
    return (V, D)
  if site == "wpe":
    return (c["n_positions"], D)
  if site == "c_attn":
    return (D, 3 * D) if kind == "weight" else (3 * D,)
  if site == "c_proj":
    return ((D, D) if ".attn." in name else (F, D)) if kind == "weight" else (D,)
  if site == "c_fc":
    return (D, F) if kind == "weight" else (F,)
  out = {"q_proj": H * K, "k_proj": G * K, "v_proj": G * K, "o_proj": D, "attn_out": D, "dense": D}.get(site)
  out = out or {"gate_proj": F, "up_proj": F, "ff_proj": F, "down_proj": D, "ff_out": D}[site]
  into = {"o_proj": H * K, "attn_out": H * K, "dense": H * K, "down_proj": F, "ff_out": F}.get(site, D)
  return (out, into) if kind == "weight" else (out,)


def values(case, dtype=np.float32, config=None, seed=0):
  """Random tensors of a case: norms around one (Gemma: around zero), biases not zero."""
  rng = np.random.default_rng(seed)
  out = {}
  for name in keys(case, config):
    s = shape(case, name, config)
    x = 0.25 * rng.standard_normal(s, np.float32)
    if len(s) == 1 and "norm" in name and not case.startswith("gemma") and name.endswith("weight"):
      x = x + 1
    out[name] = x.astype(dtype)
  return out


def write(path, config, named, shards=1, index=None):
  """A folder with these tensors, in `shards` files."""
  path.mkdir(parents=True, exist_ok=True)
  (path / "config.json").write_text(json.dumps(config))
  names = list(named)
  per = math.ceil(len(names) / shards)
  where = {}
  for i in range(shards):
    mine = names[i * per : (i + 1) * per]
    file = tensors.SINGLE if shards == 1 else f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
    tensors.create(
      path / file, {n: (tensors.NAMES[named[n].dtype], named[n].shape) for n in mine}, {"format": "pt"}
    )
    for n, t in tensors.header(path / file)[0].items():
      if named[n].size:
        t.open("r+")[...] = named[n]
      where[n] = file
  if shards > 1:
    (path / tensors.INDEX).write_text(json.dumps(index or {"metadata": {}, "weight_map": where}))
  return path


def make(path, case, dtype=np.float32, shards=1, **changes):
  """The folder of a case. Returns (path, its tensors)."""
  config = {**CONFIGS[case], **changes}
  named = values(case, dtype, config)
  return write(path, config, named, shards), named


TEXT = "the cat sat on the mat, and the dog sat on the cat; it was a fine day for both of them. " * 3


def tokenizer(path, vocab=290, specials=("<s>", "</s>"), bos=True):
  """A tiny byte-level BPE trained here, as tokenizer.json of a folder."""
  import tokenizers as hf

  t = hf.Tokenizer(hf.models.BPE())
  t.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
  t.decoder = hf.decoders.ByteLevel()
  alphabet = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
  trainer = hf.trainers.BpeTrainer(
    vocab_size=vocab, show_progress=False, initial_alphabet=alphabet, special_tokens=list(specials)
  )
  t.train_from_iterator([TEXT] * 4, trainer)
  if bos:
    t.post_processor = hf.processors.TemplateProcessing(
      single=f"{specials[0]} $A", special_tokens=[(specials[0], 0)]
    )
  t.save(str(path / "tokenizer.json"))
  (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
  (path / "chat_template.jinja").write_text("{{ messages }}")
  return t


def imported(tmp_path, case="qwen3", dtype=np.float32, **changes):
  """A case in tmp_path/src with a tokenizer, imported as tmp_path/dst. (source, its tensors, Folder)."""
  src, named = make(tmp_path / "src", case, dtype, **changes)
  tokenizer(src)
  return src, named, hf_import.import_folder(str(src), str(tmp_path / "dst"))
