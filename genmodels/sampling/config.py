"""What a config says about sampling, and how it becomes a Sampler.

Legend: B rows.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, Literal

import jax.numpy as jnp

from genmodels import config
from genmodels.config import ConfigError, Schedule
from genmodels.contracts import CLEAN, Array
from genmodels.sampling import active, cache, commit, drafting, draw, quota
from genmodels.sampling.loop import Sampler


@dataclasses.dataclass(frozen=True)
class Guidance:
  """Classifier-free guidance: logits u + s·(c − u), u with every condition dropped.

  s = 1 takes no second pass. Papers that write (1 + w)·c − w·u have s = 1 + w.

  Fields:
    scale: s at full strength.
    schedule: "constant"; "linear" 1 → scale over the progress (VAR, RandAR); "cosine"
      1 + (scale − 1)·(1 − cos(π·r^power))/2 (RAR).
    power: of the cosine schedule.
    over: progress counts committed "tokens" or finished "units" (scales: k/(K − 1)).
    interval: guidance acts where lo ≤ progress < hi, or up to the end with hi = 1.
  """

  scale: float = 1.0
  schedule: Literal["constant", "linear", "cosine"] = "constant"
  power: float = 1.0
  over: Literal["tokens", "units"] = "tokens"
  interval: tuple[float, float] = (0.0, 1.0)

  def __post_init__(self):
    lo, hi = self.interval
    if not 0 <= lo < hi <= 1:
      raise ValueError(f"interval is {self.interval}; expected 0 <= lo < hi <= 1")
    if self.scale < 0:
      raise ValueError(f"scale is {self.scale}; it must be at least 0 (1: off, 0: unconditional)")

  @property
  def off(self) -> bool:
    return self.scale == 1

  def __call__(self, r: Array) -> Array:
    """s float32[B] at progress float32[B]."""
    ramp = jnp.ones_like(r)
    if self.schedule == "linear":
      ramp = r
    elif self.schedule == "cosine":
      ramp = (1 - jnp.cos(jnp.pi * r**self.power)) / 2
    lo, hi = self.interval
    on = (r >= lo) & ((r < hi) | (hi == 1))
    return jnp.where(on, 1 + (self.scale - 1) * ramp, 1.0)


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
  """Section `sampler`.

  Fields:
    quota: section with a `kind`: linear, cosine, threshold, all, first_hitting, ancestral.
    score: confidence that ranks tokens: "prob" of the drawn token, "margin" of the two likeliest,
      "neg_entropy", "random". Of the model's own distribution in float32, before temperature and filters.
    temperature: 0 takes the likeliest token. top_k: 0 keeps all. top_p: nucleus.
    sub_block: tokens of a unit that are open at one time, left to right (LLaDA's block length); 0: all.
      Steps of a quota are per sub-block.
    block: block size to decode with; 0 is the trained one, anything else warns.
    cache: "auto", "none", "causal_exact", "block_exact".
    guidance: see Guidance.
    eos: id that ends a row; −1 takes the tokenizer's, −2 none.
    forbid: ids never drawn, besides the mask id.
    term: the term whose head decodes; "" is the one of the likelihood.
    length: tokens of a generated row, prompt included, where the caller does not say; 0: a row of the data.
    draft: speculative decoding: a section with a `kind` of drafting.DRAFTERS, or a kind; "" is none.
    verify: "auto", or a section with a `kind` of verify.REGISTRY, or a kind.

  `quota="threshold"` and `guidance=1.5` are short for sections with nothing but a kind, or a scale.
  """

  quota: Any = dataclasses.field(default_factory=lambda: {"kind": "threshold"})
  score: Literal["prob", "margin", "neg_entropy", "random"] = "prob"
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  sub_block: int = 0
  block: int = 0
  cache: str = "auto"
  guidance: Any = dataclasses.field(default_factory=dict)
  eos: int = -1
  forbid: tuple[int, ...] = ()
  term: str = ""
  length: int = 0
  draft: Any = ""
  verify: Any = "auto"

  def __post_init__(self):
    section = {"kind": self.quota} if isinstance(self.quota, str) else self.quota
    object.__setattr__(self, "quota", config.build_kind(quota.REGISTRY, section, "quota"))
    section = {"scale": self.guidance} if isinstance(self.guidance, (int, float)) else self.guidance
    object.__setattr__(self, "guidance", config.build(Guidance, section, "guidance"))
    if self.draft:
      object.__setattr__(self, "draft", drafting.drafter(self.draft))
    if self.verify != "auto":
      object.__setattr__(self, "verify", drafting.rule(self.verify))
    if self.temperature < 0:
      raise ValueError(f"temperature is {self.temperature}; it must be at least 0")
    if not 0 < self.top_p <= 1:
      raise ValueError(f"top_p is {self.top_p}; expected a mass in (0, 1]")
    for name in ("top_k", "sub_block", "block", "length"):
      if getattr(self, name) < 0:
        raise ValueError(f"{name} is {getattr(self, name)}; 0 turns it off")


def at_step(objective, step: int, block: int = 0):
  """The objective with its block size as it is at a training step (or `block`), constant from then on.

  What is trained with a block-size curriculum is sampled and evaluated at the size it has reached.

  Returns:
    The objective, and the trained block size (0: whole documents, or ragged blocks).
  """
  blocks = objective.corruption.blocks
  if blocks.whole or blocks.sizes:
    if block and not blocks.whole:
      raise ConfigError(
        "the objective has ragged blocks", key="sampler.block", value=block, fix="sampler.block=0"
      )
    if not block:
      return objective, 0
  trained = 0 if blocks.whole else int(blocks.size(int(step)))
  if not block and blocks.size.is_constant:
    return objective, trained
  frozen = dataclasses.replace(blocks, size=Schedule.of(block or trained))
  return dataclasses.replace(
    objective, corruption=dataclasses.replace(objective.corruption, blocks=frozen)
  ), trained


def build(section, objective, model, *, latent=None, meta=None, step: int = 0, load=None) -> Sampler:
  """The sampler of an objective and a model.

  Args:
    section: SamplerConfig or a config section.
    latent: the bound latent that the objective's view needs.
    meta: facts of the data, {"eos": id or −1, "forbid": ids that data never contain}.
    step: training step of the parameters: fixes what the objective schedules (the block size).
    load: workdir → (Sampler of that run, its parameters), for drafts of another model.

  Raises:
    ConfigError: a setting that does not fit the objective: key, value, reason, fix.
  """
  cfg = config.build(SamplerConfig, section, "sampler")
  meta = meta or {}
  objective, trained = at_step(objective, step, cfg.block)
  if cfg.block and cfg.block != trained:
    warnings.warn(
      f"sampler.block={cfg.block}, but the model was trained with blocks of {trained or 'whole documents'}",
      stacklevel=2,
    )
  name = cfg.term or objective.likelihood
  if name not in objective.terms:
    raise ConfigError(
      "no such term", key="sampler.term", value=name, fix=f"one of {', '.join(objective.terms)}"
    )
  term = objective.terms[name]
  streams, blocks = objective.layout.streams, objective.corruption.blocks
  store_name = cache.store_stream(objective)
  denoises = term.stream in objective.layout.noisy
  single = not denoises and term.align != "same"
  found = cache.reach(objective, model.cfg.patterns, term.stream, store_name, single)
  # Blocks may be a matter of the noise alone: where every slot sees the whole document, it is one unit.
  whole = not single and (blocks.whole or not found.stored and CLEAN not in streams)
  if whole:
    found = dataclasses.replace(found, stored="")
  policy = cache.resolve(cfg.cache, found)
  cut = not single and not whole
  store = None if whole else store_name  # a document that is one unit has nothing behind its front
  if single and found.stored != "causal":
    raise ConfigError(
      "a next-token head on a stream that sees later tokens has no left-to-right decoder",
      key=f"objective.terms.{name}.align", value=term.align, fix="masks={'full': 'causal'}",
    )  # fmt: skip
  if cut and (not found.stored or not found.predicts):
    raise ConfigError(
      "blocks cannot be decoded one after another: a slot sees uncommitted tokens beyond its block",
      key="objective.masks", value=dict(objective.masks),
      fix="a block mask such as 'bd3', 'context_causal', 'block_causal'",
    )  # fmt: skip
  if cut and term.align == "shift" and term.stream != store_name:
    raise ConfigError(
      "the first token of a block is predicted by a noisy slot of the block before, which decoding does not "
      "compute", key=f"objective.terms.{name}.align", value="shift", fix="align='shift_clean_boundary'",
    )  # fmt: skip
  if model.cfg.head(term.head).kind != "categorical":
    raise ConfigError(
      "the sampler draws ids; this head has none", key=f"objective.terms.{name}.head", value=term.head,
      fix="sampler.term=<a term with a categorical head>",
    )  # fmt: skip
  chosen = cfg.quota
  if hasattr(chosen, "schedule") and not chosen.schedule:
    chosen = dataclasses.replace(chosen, schedule=getattr(objective.corruption, "schedule", "linear"))
  eos = int(meta.get("eos", -1)) if cfg.eos == -1 else max(cfg.eos, -1)
  forbid = (
    set(cfg.forbid)
    | set(meta.get("forbid", ()))
    | ({objective.mask_id} if objective.layout.noisy and objective.mask_id >= 0 else set())
  )
  if single:
    capacity = 1
  elif blocks.sizes and not whole:
    capacity = max(blocks.sizes)
  else:
    capacity = 0 if whole else int(blocks.size(0))
  sampler = Sampler(
    cfg=dataclasses.replace(cfg, eos=eos),
    objective=objective,
    model=model,
    latent=latent,
    term=name,
    stream=streams.index(term.stream),
    store=None if store is None else streams.index(store),
    single=single,
    whole=whole,
    capacity=capacity,
    denoises=denoises,
    policy=policy,
    active=active.Units(),
    choice=draw.Choice(cfg.temperature, cfg.top_k, cfg.top_p, cfg.score, tuple(sorted(forbid))),
    quota=chosen,
    commit=commit.Anywhere(),
  )
  return drafting.attach(sampler, cfg.draft, cfg.verify, load) if cfg.draft else sampler
