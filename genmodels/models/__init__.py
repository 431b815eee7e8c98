"""The transformer: one trunk for every model class, its heads, cache, adapters and presets.

The only package (with latents/) that knows flax; outside of it parameters are nested dicts of arrays.
See docs/models.md.
"""

from genmodels.models import joint, lora
from genmodels.models.accounting import active_experts, attention_sizes, head_paths
from genmodels.models.cache import (
  Cache,
  crop_cache,
  fork_cache,
  init_cache,
  relabel_cache,
  value_similarity,
  write_cache,
)
from genmodels.models.config import (
  Cond,
  Head,
  LayerSpec,
  Lora,
  Moe,
  Remat,
  Rope,
  Scaling,
  Segment,
  TrunkConfig,
  layer_index,
  layer_path,
)
from genmodels.models.debugging import debug
from genmodels.models.drafts import drafting_cache
from genmodels.models.model import Model, build, count
from genmodels.models.nets import NETS

__all__ = [
  "NETS",
  "Cache",
  "Cond",
  "Head",
  "LayerSpec",
  "Lora",
  "Model",
  "Moe",
  "Remat",
  "Rope",
  "Scaling",
  "Segment",
  "TrunkConfig",
  "active_experts",
  "attention_sizes",
  "build",
  "count",
  "crop_cache",
  "debug",
  "drafting_cache",
  "fork_cache",
  "head_paths",
  "init_cache",
  "joint",
  "layer_index",
  "layer_path",
  "lora",
  "relabel_cache",
  "value_similarity",
  "write_cache",
]
