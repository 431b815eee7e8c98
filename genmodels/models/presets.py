"""Model classes by name: fields of TrunkConfig that a config section starts from (`preset="qwen3-0.6b"`).

Sizes are those of the published checkpoints; the HF reader (`genmodels.checkpoint.hf_config`) derives the
same fields from a config.json.
"""

from __future__ import annotations

from typing import Any


def llama(width, layers, num_heads, kv_heads, mlp, vocab, **fields) -> dict[str, Any]:
  """Llama 2 and 3 class: RMSNorm, SwiGLU, half-split RoPE, no biases."""
  return dict(
    width=width,
    layers=layers,
    num_heads=num_heads,
    num_kv_heads=kv_heads,
    mlp=mlp,
    vocab=vocab,
    eps=1e-5,
    **fields,
  )


def gpt2(width, layers, heads) -> dict[str, Any]:
  """GPT-2: LayerNorm, learned positions, tanh GELU, biases, tied output."""
  return dict(
    width=width,
    layers=layers,
    num_heads=heads,
    mlp=4 * width,
    vocab=50257,
    norm="layer",
    eps=1e-5,
    activation="gelu_tanh",
    gated=False,
    bias=("q", "k", "v", "o", "up", "down", "norm"),
    rope=None,
    learned_pos=1024,
    heads={"text": dict(tied=True)},
    init_out_scale=True,
  )


def llamagen(width, layers, heads, vocab=16384, classes=1001) -> dict[str, Any]:
  """LlamaGen (arXiv:2406.06525), class-conditional: interleaved two-axis RoPE, zero at the class slot
  (pos < 0), whose id comes from the table "class". MLP = 8/3 width, rounded up to 256."""
  head_dim = width // heads
  return dict(
    width=width,
    layers=layers,
    num_heads=heads,
    mlp=-(-int(8 * width / 3) // 256) * 256,
    vocab=vocab,
    tables=(("class", classes),),
    eps=1e-5,
    rope=dict(pairing="interleaved", axes=(head_dim // 2, head_dim // 2), zero_prefix=True),
    heads={"text": dict(zero_init=True)},
    dropout=0.1,
  )


def var(depth, *, vocab=4096, channels=32, tokens=680, scales=10, classes=1001) -> dict[str, Any]:
  """VAR (arXiv:2404.02905): width 64·depth, AdaLN-zero by class, l2-normalised q and k, learned
  positions and scale levels as id tables, inputs from the latent as features.

  Id channels: class and start (first slot only, −1 elsewhere), level, pos. VAR's bias on the feature
  input stands on every slot but the first, so it is part of the level table (levels ≥ 1).
  """
  return dict(
    width=64 * depth,
    layers=depth,
    num_heads=depth,
    mlp=256 * depth,
    tables=(("class", classes), ("start", 1), ("level", scales), ("pos", tokens)),
    features=channels,
    norm="layer",
    norm_affine=False,
    eps=1e-6,
    qk_norm="l2",
    activation="gelu_tanh",
    gated=False,
    bias=("q", "v", "o", "up", "down"),
    rope=None,
    adaln="zero",
    cond={"class": dict(kind="class", size=classes)},
    heads={"text": dict(size=vocab, bias=True)},
    init_out_scale=True,
  )


_LLAMA3 = dict(kind="llama3", factor=8.0, original_len=8192, low_freq_factor=1.0, high_freq_factor=4.0)
_LLAMA32 = dict(_LLAMA3, factor=32.0)


def _qwen2(width, layers, heads, kv_heads, mlp, vocab, tied):
  return {
    **llama(width, layers, heads, kv_heads, mlp, vocab),
    "eps": 1e-6,
    "rope": dict(base=1e6),
    "bias": ("q", "k", "v"),
    "heads": {"text": dict(tied=tied)},
  }


def _qwen3(width, layers, heads, kv_heads, mlp, tied):
  return {
    **llama(width, layers, heads, kv_heads, mlp, 151936),
    "eps": 1e-6,
    "head_dim": 128,
    "qk_norm": "rms",
    "rope": dict(base=1e6),
    "heads": {"text": dict(tied=tied)},
  }


def _qwen3_moe(width, layers, heads, kv_heads, mlp, *, experts, top_k, expert_mlp):
  moe = dict(experts=experts, top_k=top_k, mlp=expert_mlp, normalise=True)
  return {**_qwen3(width, layers, heads, kv_heads, mlp, False), "moe": moe, "pattern": ({"mlp": "moe"},)}


def _llada2(width, layers, heads, kv_heads, mlp, *, expert_mlp):
  """LLaDA2: a dense first layer, then 256 experts in 8 groups with a bias, and one shared expert."""
  return {
    **llama(width, 0, heads, kv_heads, mlp, 157184),
    "eps": 1e-6,
    "head_dim": 128,
    "qk_norm": "rms",
    "rope": dict(base=6e5, axes=(64,)),
    "moe": dict(
      experts=256, top_k=8, mlp=expert_mlp, score="sigmoid", normalise=True, groups=8, top_groups=4,
      bias=True, scale=2.5, shared=expert_mlp,
    ),
    "segments": (dict(pattern=({},), repeats=1), dict(pattern=({"mlp": "moe"},), repeats=layers - 1)),
  }  # fmt: skip


PRESETS: dict[str, dict[str, Any]] = {
  "llama2-7b": llama(4096, 32, 32, 32, 11008, 32000),
  "llama2-13b": llama(5120, 40, 40, 40, 13824, 32000),
  "llama3-8b": llama(4096, 32, 32, 8, 14336, 128256, rope=dict(base=5e5)),
  "llama3.1-8b": llama(4096, 32, 32, 8, 14336, 128256, rope=dict(base=5e5, scaling=_LLAMA3)),
  "llama3.1-70b": llama(8192, 80, 64, 8, 28672, 128256, rope=dict(base=5e5, scaling=_LLAMA3)),
  "llama3.2-1b": llama(
    2048, 16, 32, 8, 8192, 128256, rope=dict(base=5e5, scaling=_LLAMA32), heads={"text": dict(tied=True)}
  ),
  "llama3.2-3b": llama(
    3072, 28, 24, 8, 8192, 128256, rope=dict(base=5e5, scaling=_LLAMA32), heads={"text": dict(tied=True)}
  ),
  "qwen2.5-0.5b": _qwen2(896, 24, 14, 2, 4864, 151936, True),
  "qwen2.5-1.5b": _qwen2(1536, 28, 12, 2, 8960, 151936, True),
  "qwen2.5-7b": _qwen2(3584, 28, 28, 4, 18944, 152064, False),
  "qwen3-0.6b": _qwen3(1024, 28, 16, 8, 3072, True),
  "qwen3-1.7b": _qwen3(2048, 28, 16, 8, 6144, True),
  "qwen3-4b": _qwen3(2560, 36, 32, 8, 9728, True),
  "qwen3-8b": _qwen3(4096, 36, 32, 8, 12288, False),
  "qwen3-30b-a3b": _qwen3_moe(2048, 48, 32, 4, 6144, experts=128, top_k=8, expert_mlp=768),
  "qwen3-235b-a22b": _qwen3_moe(4096, 94, 64, 4, 12288, experts=128, top_k=8, expert_mlp=1536),
  "llada-moe-7b-a1b": {
    **llama(2048, 16, 16, 16, 8192, 157184, rope=dict(base=5e4)),
    "qk_norm": "rms",
    "moe": dict(experts=64, top_k=8, mlp=1024),
    "pattern": ({"mlp": "moe"},),
  },
  "llada2-mini": _llada2(2048, 20, 16, 4, 5120, expert_mlp=512),
  "gpt2": gpt2(768, 12, 12),
  "gpt2-medium": gpt2(1024, 24, 16),
  "gpt2-large": gpt2(1280, 36, 20),
  "gpt2-xl": gpt2(1600, 48, 25),
  "llamagen-b": llamagen(768, 12, 12),
  "llamagen-l": llamagen(1024, 24, 16),
  "llamagen-xl": llamagen(1280, 36, 20),
  "llamagen-xxl": llamagen(1536, 48, 24),
  "llamagen-xxxl": llamagen(2560, 48, 40),
  "llamagen-1b": llamagen(2048, 22, 32),
  "llamagen-3b": llamagen(3200, 24, 32),
  "llamagen-7b": llamagen(4096, 32, 32),
  "var-d16": var(16),
  "var-d20": var(20),
  "var-d24": var(24),
  "var-d30": var(30),
}


def preset(name: str) -> dict[str, Any]:
  """A copy of the fields of `PRESETS[name]`.

  Raises:
    ConfigError: no such preset (with the nearest one).
  """
  from genmodels.config import ConfigError, did_you_mean

  if name not in PRESETS:
    raise ConfigError("unknown preset", key="model.preset", value=name, fix=did_you_mean(name, list(PRESETS)))
  return dict(PRESETS[name])
