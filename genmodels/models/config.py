"""What a trunk is made of: frozen, hashable dataclasses, built from a config section.

A section is nested dicts (plain or ml_collections). Fields that map names to things (`tables`, `cond`,
`heads`) may be a dict, taken in alphabetical order because ConfigDict keeps no other, or a sequence of
(name, value) pairs, taken as written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from genmodels import config

Site = Literal["q", "k", "v", "o", "gate", "up", "down", "norm", "features"]
Preset = Literal["none", "full", "dots", "attn_out"]
Tensor = Literal["q", "k", "v", "attn_out", "attn_lse", "attn_proj", "mlp_gate", "mlp_up", "mlp_out", "mod"]


@dataclasses.dataclass(frozen=True)
class Scaling:
  """RoPE frequency scaling, by the formulas of the checkpoints that use it.

  Fields:
    kind: "linear" (f/factor), "ntk" (base·factor^(d/(d−2))), "yarn" (arXiv:2309.00071), "llama3".
    factor: context extension factor.
    original_len: pretraining context length (yarn, llama3).
    beta_fast, beta_slow: yarn's rotations per context at the ends of the ramp.
    attention_factor: yarn's factor on cos and sin; None is 0.1·ln(factor)+1.
    truncate: yarn, round the ends of the ramp to whole dimensions.
    low_freq_factor, high_freq_factor: llama3's band.
  """

  kind: Literal["linear", "ntk", "yarn", "llama3"]
  factor: float
  original_len: int = 0
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  attention_factor: float | None = None
  truncate: bool = True
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0

  def __post_init__(self):
    if self.factor <= 0:
      raise ValueError(f"factor={self.factor}: a context extension factor is positive")
    if self.kind in ("yarn", "llama3") and self.original_len < 1:
      raise ValueError(f"kind={self.kind!r} needs original_len, the context length of pretraining")


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary position embedding in one to three axes.

  Fields:
    base: frequency base.
    pairing: "half" (dimension i with i + d/2) or "interleaved" (2i with 2i + 1).
    axes: dimensions given to each axis of `Inputs.pos`, even, in order; empty is the whole head on
      axis 0. Dimensions beyond their sum are not rotated.
    scaling: frequency scaling or None.
    zero_prefix: slots with pos[..., 0] < 0 get cos = sin = 0, so that their rotated q and k are the
      zero vector: every query gives them the logit 0 (LlamaGen's class and text slots).
  """

  base: float = 10000.0
  pairing: Literal["half", "interleaved"] = "half"
  axes: tuple[int, ...] = ()
  scaling: Scaling | None = None
  zero_prefix: bool = False

  def __post_init__(self):
    if isinstance(self.scaling, Mapping):
      object.__setattr__(self, "scaling", config.build(Scaling, self.scaling, "scaling"))
    if len(self.axes) > 3 or any(d < 2 or d % 2 for d in self.axes):
      raise ValueError(f"axes={self.axes}: at most three, each an even number of dimensions")


@dataclasses.dataclass(frozen=True)
class LayerSpec:
  """One layer of a repeating pattern.

  Fields:
    mask: the mask pattern of `Inputs.masks` it attends under ("full", "local").
    rope_base: overrides `Rope.base`.
    rope_scaling: False leaves `Rope.scaling` out in this layer.
    mlp: "dense" (`TrunkConfig.mlp`) or "moe" (`TrunkConfig.moe`).
    remat: overrides the preset of `Remat`.
  """

  mask: str = "full"
  mlp: Literal["dense", "moe"] = "dense"
  rope_base: float | None = None
  rope_scaling: bool = True
  remat: Preset | None = None


@dataclasses.dataclass(frozen=True)
class Moe:
  """A mixture of experts in place of an MLP: a slot goes through `top_k` of `experts` MLPs, none is dropped.

  Scores s = softmax or sigmoid of the router's logits, in float32. Chosen are the top_k of s (+ bias), within
  the `top_groups` best groups of experts; a group's rank is the sum of its two best. Weights are s of the
  chosen, divided by their sum if `normalise`, times `scale`.

  Fields:
    experts, top_k: how many there are, and how many a slot takes.
    mlp: hidden size of an expert.
    score: "softmax" (Qwen3-MoE, LLaDA-MoE) or "sigmoid" (DeepSeek-V3, LLaDA2).
    normalise: divide the chosen scores by their sum (`norm_topk_prob`).
    groups, top_groups: group-limited choice (DeepSeek-V3, arXiv:2412.19437); 1 and 1 for none.
    bias: a leaf "expert_bias" is added to the scores to choose with, not to the weights; it has no gradient.
    scale: factor of the routed experts' sum (`routed_scaling_factor`).
    shared: hidden size of an MLP that every slot passes through besides, 0 for none.
  """

  experts: int
  top_k: int
  mlp: int
  score: Literal["softmax", "sigmoid"] = "softmax"
  normalise: bool = False
  groups: int = 1
  top_groups: int = 1
  bias: bool = False
  scale: float = 1.0
  shared: int = 0

  def __post_init__(self):
    if min(self.experts, self.mlp, self.groups) < 1 or self.shared < 0:
      raise ValueError(
        f"experts={self.experts}, mlp={self.mlp}, groups={self.groups} are at least 1, shared={self.shared} "
        "at least 0"
      )
    if self.experts % self.groups or not 1 <= self.top_groups <= self.groups:
      raise ValueError(
        f"groups={self.groups} must divide experts={self.experts}, and top_groups={self.top_groups} lie in "
        f"1..{self.groups}"
      )
    room = self.top_groups * (self.experts // self.groups)
    if not 1 <= self.top_k <= room:
      raise ValueError(f"top_k={self.top_k}: between 1 and the {room} experts that may be chosen")
    if self.groups > 1 and self.experts // self.groups < 2:
      raise ValueError(
        f"groups={self.groups} of experts={self.experts}: a group is ranked by its two best experts"
      )


@dataclasses.dataclass(frozen=True)
class Segment:
  """`pattern` scanned `repeats` times."""

  pattern: tuple[LayerSpec, ...]
  repeats: int

  def __post_init__(self):
    if self.repeats < 1 or not self.pattern:
      raise ValueError(f"a segment needs layers and repeats ≥ 1, got {len(self.pattern)} × {self.repeats}")


@dataclasses.dataclass(frozen=True)
class Remat:
  """What the backward pass recomputes.

  Fields:
    preset: "none" saves everything; "full" saves only each layer's input; "dots" saves the results
      of the weight matmuls; "attn_out" saves the attention output.
    save, offload: names of tensors to save, or to move to host memory, besides: "q", "k", "v",
      "attn_out", "attn_lse", "attn_proj", "mlp_gate", "mlp_up", "mlp_out", "mod".
  """

  preset: Preset = "none"
  save: tuple[Tensor, ...] = ()
  offload: tuple[Tensor, ...] = ()


@dataclasses.dataclass(frozen=True)
class Cond:
  """A condition table: kind "class" (int32 ids < size), "time" (float32 level, multiplied by
  `time_scale`, `size` sinusoids, an MLP) or "vector" (float[size]). A class table whose name is also an
  id table shares it."""

  kind: Literal["class", "time", "vector"] = "class"
  size: int = 0
  time_scale: float = 1000.0

  def __post_init__(self):
    if self.size < 1 or (self.kind == "time" and self.size % 2):
      raise ValueError(f"size={self.size}: kind {self.kind!r} needs a positive (time: even) size")


@dataclasses.dataclass(frozen=True)
class Head:
  """From hidden states to a distribution.

  Fields:
    kind: "categorical", "flow" (a velocity field on float[size], conditioned on the hidden state), "draft" (a
      categorical one over a transformed hidden state), "block" (layers of its own draft a block from hidden
      states of the trunk's) or "latent" (no distribution: the squared distance of two hidden states); see
      models/drafts.py. "joint": a categorical one over the state beside that of another network, see
      models/joint.py.
    size: number of classes, or features of a flow head; None is the vocabulary.
    tied: use the token table as output weight.
    bias: add a bias to the logits.
    forbid: ids of probability 0 in every Dist of this head (the mask id: SUBS parametrisation).
    soft_cap: logits ← cap·tanh(logits/cap); None leaves them.
    zero_init: output weight starts at zero.
    chunk: read positions whose logits exist at one time.
    width, depth: flow: the MLP's width (None: the trunk's) and residual blocks. draft: blocks. block: layers.
      joint: width of the other network (None: the trunk's).
    given: draft only: tokens before the predicted one whose embeddings are fed besides the hidden state.
    block: draft only: "residual" h + silu(W·[h; e]), W starting at 0, or "mlp" norm(silu(W·[h; e])).
    like: draft, block, joint: the head whose output weight it starts from, or uses if `shared` (a block
      always does, a joint one never).
    taps: block only: layers of the trunk whose outputs it reads.
    beside: joint only: the network of the section `trees` whose states it reads.
    time_scale: flow only: levels in [0, 1] are multiplied by it before the sinusoids.
  """

  kind: Literal["categorical", "flow", "draft", "block", "latent", "joint"] = "categorical"
  size: int | None = None
  tied: bool = False
  bias: bool = False
  forbid: tuple[int, ...] = ()
  soft_cap: float | None = None
  zero_init: bool = False
  chunk: int = 1024
  width: int | None = None
  depth: int = 3
  time_scale: float = 1000.0
  given: int = 0
  block: Literal["residual", "mlp"] = "residual"
  like: str = "text"
  shared: bool = False
  taps: tuple[int, ...] = ()
  beside: str = ""

  @property
  def added(self) -> bool:
    """Whether it stands beside the model's own heads, which compute the same without it: drafts, and joint
    heads. No published layout has tensors for it."""
    return self.kind in ("draft", "block", "latent", "joint")

  def __post_init__(self):
    if (self.kind == "joint") != bool(self.beside):
      raise ValueError(
        f"beside={self.beside!r} of kind {self.kind!r}: a joint head names a second network, others none"
      )
    if self.kind in ("draft", "block", "joint") and (
      self.size is not None or self.tied or self.bias or self.depth < 1
    ):
      raise ValueError(
        f"a {self.kind} head has the vocabulary's size, depth ≥ 1 and the output weight of `like`: leave out "
        "size, tied and bias"
      )
    if (self.kind == "block") != bool(self.taps):
      raise ValueError(
        f"taps={self.taps} of kind {self.kind!r}: a block head names layers to read, others none"
      )
    if self.given and self.kind != "draft" or self.given < 0:
      raise ValueError(f"given={self.given} of kind {self.kind!r}: a draft head is fed 0 or more embeddings")
    if self.kind == "flow" and (self.size is None or self.tied or self.forbid):
      raise ValueError("a flow head needs size (its features) and takes neither tied nor forbid")
    if self.tied and self.size is not None:
      raise ValueError(f"size={self.size} with tied=True: a tied head has the size of the vocabulary")


@dataclasses.dataclass(frozen=True)
class Lora:
  """Low-rank adapters: `targets` is a regex that a linear site's path must match in full
  ("stack/.*/(q|v)"); the update is alpha/rank·A·B (arXiv:2106.09685). With `gated` it acts only at slots
  whose `Inputs.route` is not 0, which must be given then (arXiv:2507.11851)."""

  rank: int
  alpha: float = 16.0
  targets: str = r"stack/.*/(q|k|v|o)"
  gated: bool = False

  def __post_init__(self):
    if self.rank < 1:
      raise ValueError(f"rank={self.rank}: at least 1")


@dataclasses.dataclass(frozen=True)
class TrunkConfig:
  """One transformer: Llama, Mistral, Qwen2, Qwen3, Gemma, GPT-2, LlamaGen and VAR class models.

  Fields:
    width: model dimension D.
    num_heads, num_kv_heads (None: num_heads), head_dim (None: width/num_heads).
    mlp: hidden size of the MLP. activation: "silu", "gelu", "gelu_tanh". gated: SwiGLU/GeGLU form.
    moe: experts of the layers whose LayerSpec.mlp is "moe", None without any. expert_matmul: their grouped
      product, "auto", "pallas_tpu", "ragged" or "blocks", see `kernels.grouped`.
    vocab: size of the token table, 0 for none; vocab_multiple: pad it to a multiple (padded entries
      have probability 0 and no gradient).
    tables: further id tables, name → size; channel k of `Inputs.ids` indexes `channels[k]`.
    features: width of `Inputs.features`, 0 for none.
    layers, pattern: shorthand for `segments`: `pattern` repeated, and a remainder segment.
    segments: the stack.
    norm: "rms" or "layer"; eps; norm_offset: weight is 1 + w (Gemma); norm_affine: has weights.
    post_norm: a second norm behind attention and MLP, before the residual sum (Gemma 2 and 3).
    qk_norm: "none", "rms" (per head, learned weight: Qwen3) or "l2" (unit q and k, learned
      temperature per head: VAR).
    bias: sites with a bias, see `Site`.
    rope: None for none. learned_pos: size of a learned table indexed by pos[..., 0], 0 for none.
    embed_scale: embeddings are multiplied by it. attn_scale: None is head_dim^−1/2.
    attn_soft_cap: soft cap of attention logits.
    adaln: "none" or "zero": shift, scale and gate per slot from `Inputs.cond`.
    cond: condition tables; cond_width: their width (None: width).
    heads: output heads, name → Head.
    dropout: on embeddings and both residual branches; only when `apply` gets a key.
    dtype, param_dtype: compute and master types. remat: see Remat.
    init_std: of every normal draw; init_out_scale: residual output weights are divided by √(2·layers).
    attention: implementation of attention ("auto", see `kernels.resolve`); attention_tiles: (queries, keys)
      of its tiles, None for the kernel's own choice; attention_capacity: share of the worst case that its
      tile lists have room for in training, None for all of it; attention_deterministic: the same bits every
      time; attention_safe: operands through shared memory on GPUs with an old ptxas. See docs/models.md.
    context: how attention runs over a context mesh axis: "gather" the keys, or pass them round in a "ring".
    lora: adapters or None.
    anchor: layers of a network before this one on the same embeddings, whose head "anchor" predicts tokens; a
      matrix, 0 at first, of the mean embedding under its prediction is added to this one's input (ADLM).
    prefix: layers behind the trunk whose output draft heads read in place of the trunk's (Hydra++).
    watch: layers whose outputs a call with a cache returns (`Outputs.layers["taps"]`) besides those that
      heads read.
  """

  width: int
  num_heads: int
  mlp: int
  vocab: int = 0
  moe: Moe | None = None
  expert_matmul: Literal["auto", "pallas_tpu", "ragged", "blocks"] = "auto"
  num_kv_heads: int | None = None
  head_dim: int | None = None
  vocab_multiple: int = 1
  tables: Any = ()
  features: int = 0
  layers: int = 0
  pattern: tuple[LayerSpec, ...] = (LayerSpec(),)
  segments: tuple[Segment, ...] = ()
  norm: Literal["rms", "layer"] = "rms"
  eps: float = 1e-6
  norm_offset: bool = False
  norm_affine: bool = True
  post_norm: bool = False
  qk_norm: Literal["none", "rms", "l2"] = "none"
  activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
  gated: bool = True
  bias: tuple[Site, ...] = ()
  rope: Rope | None = Rope()
  learned_pos: int = 0
  embed_scale: float = 1.0
  attn_scale: float | None = None
  attn_soft_cap: float | None = None
  adaln: Literal["none", "zero"] = "none"
  cond: Any = ()
  cond_width: int | None = None
  heads: Any = (("text", Head()),)
  dropout: float = 0.0
  dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
  param_dtype: Literal["float32", "bfloat16", "float64"] = "float32"
  remat: Remat = Remat()
  init_std: float = 0.02
  init_out_scale: bool = False
  attention: str = "auto"
  attention_tiles: tuple[int, ...] | None = None
  attention_capacity: float | None = None
  attention_deterministic: bool = True
  attention_safe: bool = False
  context: Literal["gather", "ring"] = "gather"
  lora: Lora | None = None
  anchor: int = 0
  watch: tuple[int, ...] = ()
  prefix: int = 0

  def __post_init__(self):
    put = lambda name, value: object.__setattr__(self, name, value)
    put("tables", _named(int, self.tables, "tables"))
    put("cond", _named(Cond, self.cond, "cond"))
    put("heads", _named(Head, self.heads, "heads"))
    if self.num_kv_heads is None:
      put("num_kv_heads", self.num_heads)
    if self.head_dim is None:
      if self.width % self.num_heads:
        raise ValueError(f"width={self.width} is no multiple of num_heads={self.num_heads}: set head_dim")
      put("head_dim", self.width // self.num_heads)
    if self.cond_width is None:
      put("cond_width", self.width)
    if not self.segments:
      put("segments", segments(self.layers, self.pattern))
    put("layers", sum(s.repeats * len(s.pattern) for s in self.segments))
    put("pattern", ())
    self._check()

  def _check(self):
    if self.num_heads % self.num_kv_heads:
      raise ValueError(f"num_heads={self.num_heads} is no multiple of num_kv_heads={self.num_kv_heads}")
    if self.rope is not None and sum(self.rope_axes) > self.head_dim:
      raise ValueError(f"rope axes {self.rope.axes} need more dimensions than head_dim={self.head_dim}")
    if self.rope is not None and not self.rope.axes and self.head_dim % 2:
      raise ValueError(f"head_dim={self.head_dim} is odd: name the rotated dimensions in rope.axes")
    if (self.adaln != "none") != bool(self.cond):
      raise ValueError(f"adaln={self.adaln!r} with cond={dict(self.cond)}: one needs the other")
    tables = dict(self.tables)
    if "tokens" in tables:
      raise ValueError("tables: 'tokens' is the name of the vocabulary's own table, set `vocab`")
    for name, cond in self.cond:
      if (
        cond.kind == "class" and name in tables and (cond.size, self.cond_width) != (tables[name], self.width)
      ):
        raise ValueError(
          f"cond {name!r} shares the id table of that name: expected size {tables[name]} and cond_width "
          f"{self.width}, got {cond.size} and {self.cond_width}"
        )
    for name, head in self.heads:
      if head.kind in ("draft", "block", "joint"):
        other = dict(self.heads).get(head.like)
        if other is None or (other.kind, other.size, other.bias) != ("categorical", None, False):
          raise ValueError(
            f"head {name!r}: like={head.like!r} must name a categorical head over the vocabulary without bias"
          )
      if head.kind == "block" and self.rope is None:
        raise ValueError(f"head {name!r} places its tokens by rotary positions: rope is None")
      if any(not 0 <= i < self.layers for i in head.taps):
        raise ValueError(f"head {name!r}: taps={head.taps} are outside of the {self.layers} layers")
      if head.kind in ("categorical", "draft", "block", "joint") and head.size is None and not self.vocab:
        raise ValueError(f"head {name!r} has the size of the vocabulary, but vocab=0: set its size")
      size = head.size or self.vocab
      if any(not 0 <= i < size for i in head.forbid):
        raise ValueError(f"head {name!r}: forbid={head.forbid} is outside of 0..{size - 1}")
    if self.prefix < 0 or self.prefix and not any(head.kind == "draft" for _, head in self.heads):
      raise ValueError(f"prefix={self.prefix}: layers, for draft heads to read")
    if self.prefix and (self.adaln != "none" or self.anchor):
      raise ValueError(f"prefix={self.prefix}: for unconditioned models of one network")
    if any(not 0 <= i < self.layers for i in self.watch):
      raise ValueError(f"watch={self.watch} is outside of the {self.layers} layers")
    if self.attention_tiles is not None and (
      len(self.attention_tiles) != 2
      or min(self.attention_tiles) < 8
      or any(t % 8 for t in self.attention_tiles)
    ):
      raise ValueError(f"attention_tiles={self.attention_tiles}: two multiples of 8, queries and keys")
    if self.attention_capacity is not None and not 0 < self.attention_capacity <= 1:
      raise ValueError(
        f"attention_capacity={self.attention_capacity}: a share of the worst case, in (0, 1], or None"
      )
    mixed = any(spec.mlp == "moe" for s in self.segments for spec in s.pattern)
    if mixed != (self.moe is not None):
      raise ValueError(
        f"moe={self.moe} and {'a layer' if mixed else 'no layer'} with mlp='moe': set both "
        "(pattern=({'mlp': 'moe'},)), or neither"
      )
    if mixed and (sites := sorted({"gate", "up", "down"} & set(self.bias))):
      raise ValueError(f"bias={self.bias}: experts have no biases; leave out {', '.join(sites)}")
    head = dict(self.heads).get("anchor")
    whole = head is not None and (head.kind, head.size) == ("categorical", None)
    if self.anchor < 0 or bool(self.anchor) != whole and (self.anchor or head is not None):
      raise ValueError(
        f"anchor={self.anchor} with heads {[n for n, _ in self.heads]}: its layers and a categorical head "
        "'anchor' over the vocabulary need each other"
      )
    if self.anchor and (self.moe or self.features or self.adaln != "none"):
      raise ValueError(f"anchor={self.anchor}: for dense, unconditioned models of tokens")
    if not 0 <= self.dropout < 1:
      raise ValueError(f"dropout={self.dropout} is outside of [0, 1)")

  @property
  def anchored(self) -> TrunkConfig:
    """The configuration of the anchor's layers: those of the first segment's kind."""
    kind = self.segments[0].pattern
    return dataclasses.replace(
      self, segments=segments(self.anchor, kind), heads=(("text", Head()),), lora=None, anchor=0
    )

  @property
  def prefixed(self) -> TrunkConfig:
    """The configuration of the layers behind the trunk: those of the first segment's kind, dense."""
    kind = tuple(dataclasses.replace(spec, mlp="dense") for spec in self.segments[0].pattern)
    layers = segments(self.prefix, kind)
    return dataclasses.replace(
      self, segments=layers, heads=(("text", Head()),), lora=None, moe=None, watch=(), prefix=0
    )

  @property
  def channels(self) -> tuple[str, ...]:
    """Names of the tables that the channels of `Inputs.ids` index, in order."""
    return (("tokens",) if self.vocab else ()) + tuple(name for name, _ in self.tables)

  @property
  def vocab_padded(self) -> int:
    return -(-self.vocab // self.vocab_multiple) * self.vocab_multiple

  @property
  def rope_axes(self) -> tuple[int, ...]:
    """Dimensions rotated by each position axis."""
    return self.rope.axes or (self.head_dim,)

  @property
  def taps(self) -> tuple[int, ...]:
    """Layers whose outputs heads read, or `watch` names, ascending."""
    return tuple(sorted({i for _, head in self.heads for i in head.taps} | set(self.watch)))

  @property
  def patterns(self) -> tuple[str, ...]:
    """Mask patterns that the layers name, sorted."""
    return tuple(sorted({spec.mask for s in self.segments for spec in s.pattern}))

  def head(self, name: str) -> Head:
    heads = dict(self.heads)
    if name not in heads:
      raise ValueError(f"head {name!r} does not exist: the model has {sorted(heads)}")
    return heads[name]


def segments(layers: int, pattern: tuple[LayerSpec, ...]) -> tuple[Segment, ...]:
  """`layers` layers of a repeating pattern: whole repeats, then the remainder (26 = 4 × 6 + 2)."""
  if layers < 1:
    raise ValueError(f"layers={layers}: set layers ≥ 1 or segments")
  whole, rest = divmod(layers, len(pattern))
  out = (Segment(pattern, whole),) if whole else ()
  return out + ((Segment(pattern[:rest], 1),) if rest else ())


def layer_path(cfg: TrunkConfig, layer: int) -> tuple[int, int, int]:
  """Layer index → (segment, repeat, position in the pattern). The inverse is `layer_index`.

  The parameters of the layer are row `repeat` of the leaves under "stack/s<segment>/l<position>".

  Raises:
    ValueError: no such layer.
  """
  if not 0 <= layer < cfg.layers:
    raise ValueError(f"layer {layer} does not exist: the model has {cfg.layers}")
  for i, s in enumerate(cfg.segments):
    n = s.repeats * len(s.pattern)
    if layer < n:
      return i, layer // len(s.pattern), layer % len(s.pattern)
    layer -= n
  raise AssertionError


def layer_index(cfg: TrunkConfig, segment: int, repeat: int, position: int) -> int:
  """(segment, repeat, position) → layer index. The inverse is `layer_path`."""
  before = sum(s.repeats * len(s.pattern) for s in cfg.segments[:segment])
  s = cfg.segments[segment]
  if not (0 <= repeat < s.repeats and 0 <= position < len(s.pattern)):
    raise ValueError(f"segment {segment} is {len(s.pattern)} × {s.repeats}, got {(repeat, position)}")
  return before + repeat * len(s.pattern) + position


def from_section(section) -> TrunkConfig:
  """A TrunkConfig from a config section (or one that is built already).

  Raises:
    ConfigError: unknown key (with the nearest known one), a wrong type, or a broken law.
  """
  return config.build(TrunkConfig, section, "model")


def _named(cls, value, where: str) -> tuple:
  """Dict (alphabetical) or pairs (as written) as a tuple of (name, built value)."""
  items = sorted(value.items()) if isinstance(value, Mapping) else [tuple(v) for v in value]
  names = [name for name, _ in items]
  if len(set(names)) < len(names):
    raise config.ConfigError("repeated name", key=where, value=names, fix="give every entry its own name")
  if cls is int:
    return tuple((str(name), int(v)) for name, v in items)
  return tuple((str(name), config.build(cls, v, f"{where}.{name}")) for name, v in items)
