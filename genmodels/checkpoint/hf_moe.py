"""Mixture-of-experts keys of a config.json ↔ our `moe` section, for each layout that has them.

What a configuration asks for and the router does not compute is refused, by key, as in `hf_config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from genmodels.config import ConfigError
from genmodels.models import TrunkConfig, layer_path

LAYOUTS = ("qwen3_moe", "sdar_moe", "llada_moe", "llada2_moe")


def refuse(hf: Mapping, key: str, accepted: tuple) -> None:
  """ConfigError unless hf[key] is one of `accepted`, the first of which is what a missing key means."""
  if hf.get(key, accepted[0]) not in accepted:
    raise ConfigError(
      "this trunk does not compute it", key=key, value=hf[key], fix=f"expected one of {accepted}"
    )


def section(hf: Mapping[str, Any], kind: str) -> dict[str, Any]:
  """The `moe` section, with the defaults of the layout's configuration class where a key is missing."""
  experts = hf["num_local_experts"] if "num_local_experts" in hf else hf["num_experts"]
  base = dict(experts=experts, top_k=hf["num_experts_per_tok"])
  if kind in ("qwen3_moe", "sdar_moe"):
    return base | dict(mlp=hf["moe_intermediate_size"], normalise=bool(hf.get("norm_topk_prob", False)))
  if kind == "llada_moe":
    for key, accepted in (
      ("moe_router_score_function", ("softmax",)), ("moe_router_enable_expert_bias", (False, None)),
      ("router_num_group", (None, 1)), ("router_topk_group", (None, 1)),
      ("shared_expert_intermediate_size", (None, 0)), ("routed_scaling_factor", (1, None)),
    ):  # fmt: skip
      refuse(hf, key, accepted)
    return base | dict(mlp=hf["expert_intermediate_size"], normalise=bool(hf.get("norm_topk_prob")))
  for key, accepted in (
    ("score_function", ("sigmoid",)),
    ("norm_topk_prob", (True, None)),
    ("norm_head", (False,)),
  ):
    refuse(hf, key, accepted)
  return base | dict(
    mlp=hf["moe_intermediate_size"],
    score="sigmoid",
    normalise=hf["num_experts_per_tok"] > 1,  # a single choice keeps its score
    groups=hf.get("n_group", 8),
    top_groups=hf.get("topk_group", 4),
    bias=bool(hf.get("moe_router_enable_expert_bias", True)),
    scale=float(hf.get("routed_scaling_factor", 2.5)),
    shared=(hf.get("num_shared_experts") or 0) * hf["moe_intermediate_size"],
  )


def mixed(hf: Mapping[str, Any], kind: str) -> list[bool]:
  """Which layers have experts; the others have a dense MLP."""
  n = hf["num_hidden_layers"]
  if kind == "llada2_moe":
    return [i >= hf.get("first_k_dense_replace", 0) for i in range(n)]
  if kind == "llada_moe":
    on = hf.get("moe_layer_freq") or [1] * n
    if not isinstance(on, list) or len(on) != n or set(on) - {0, 1}:
      raise ConfigError(f"expected 0 or 1 for each of {n} layers", key="moe_layer_freq", value=on)
    return [bool(x) for x in on]
  every, dense = hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or []
  return [i not in dense and (i + 1) % every == 0 for i in range(n)]


def fields(cfg: TrunkConfig, kind: str) -> dict[str, Any]:
  """The keys of a config.json that `section` and `mixed` read back as this model.

  Raises:
    ConfigError: the model has no experts, or the layout cannot say where they are.
  """
  moe = cfg.moe
  if moe is None:
    raise ConfigError(
      f"layout {kind!r} has experts", key="model.moe", value=None, fix=f"layout {kind.removesuffix('_moe')!r}"
    )
  on = []
  for i in range(cfg.layers):
    s, _, p = layer_path(cfg, i)
    on.append(cfg.segments[s].pattern[p].mlp == "moe")
  out: dict[str, Any] = {"num_experts": moe.experts, "num_experts_per_tok": moe.top_k}
  if kind == "llada_moe":
    return out | {
      "expert_intermediate_size": moe.mlp,
      "dense_intermediate_size": cfg.mlp,
      "norm_topk_prob": moe.normalise,
      "moe_layer_freq": [int(x) for x in on],
      "moe_router_score_function": moe.score,
      "moe_router_enable_expert_bias": moe.bias,
      "routed_scaling_factor": moe.scale,
      "shared_expert_intermediate_size": moe.shared or None,
      "router_num_group": None if moe.groups == 1 else moe.groups,
      "router_topk_group": None if moe.top_groups == 1 else moe.top_groups,
      "qk_layernorm": cfg.qk_norm == "rms",
    }
  out["moe_intermediate_size"] = moe.mlp
  if kind != "llada2_moe":
    return out | {
      "norm_topk_prob": moe.normalise,
      "decoder_sparse_step": 1,
      "mlp_only_layers": [i for i, x in enumerate(on) if not x],
    }
  first = on.index(True)
  if not all(on[first:]):
    raise ConfigError(
      "layout 'llada2_moe' has dense layers before those with experts only", key="model.segments",
      value=[i for i, x in enumerate(on) if not x], fix="layout 'qwen3_moe', if its routing is the model's",
    )  # fmt: skip
  return out | {
    "first_k_dense_replace": first,
    "score_function": moe.score,
    "norm_topk_prob": moe.normalise,
    "n_group": moe.groups,
    "topk_group": moe.top_groups,
    "moe_router_enable_expert_bias": moe.bias,
    "routed_scaling_factor": moe.scale,
    "num_shared_experts": moe.shared // moe.mlp,
    "use_qk_norm": cfg.qk_norm == "rms",
    "use_qkv_bias": "q" in cfg.bias,
    "use_bias": "o" in cfg.bias,
    "partial_rotary_factor": (cfg.rope_axes[0] / cfg.head_dim) if cfg.rope else 1.0,
  }
