"""The numbers of a trunk that FLOPs follow from, for metrics.model_flops."""

from __future__ import annotations

import re

from genmodels.models.config import TrunkConfig


def attention_sizes(cfg: TrunkConfig) -> dict[str, int]:
  """{mask pattern: Σ over the layers that attend under it of heads · head_dim}."""
  sizes = {p: 0 for p in cfg.patterns}
  extra = (cfg.anchored.segments if cfg.anchor else ()) + (cfg.prefixed.segments if cfg.prefix else ())
  for segment in cfg.segments + extra:
    for spec in segment.pattern:
      sizes[spec.mask] += segment.repeats * cfg.num_heads * cfg.head_dim
  return sizes


def head_paths(cfg: TrunkConfig) -> dict[str, str]:
  """{head: regex of the paths of the weights that a read position passes through}; "" for none."""
  tied = r"^embed/tokens/"

  def weights(name: str) -> str:
    head = cfg.head(name)
    if head.kind == "latent":
      return ""
    own = tied if head.tied else rf"^heads/{re.escape(name)}/"
    return f"{own}|{weights(head.like)}" if head.shared or head.kind == "block" else own

  return {name: weights(name) for name, _ in cfg.heads}


def active_experts(cfg: TrunkConfig) -> dict[str, tuple[int, int]]:
  """{regex of the paths of stacked experts: (experts that a slot passes through, experts of the stack)}."""
  return {} if cfg.moe is None else {r"/mlp/experts/": (cfg.moe.top_k, cfg.moe.experts)}
