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
from genmodels.objectives.infill import Infill
from genmodels.objectives.insertion import Insertion
from genmodels.sampling import (
  active,
  cache,
  commit,
  credit,
  drafting,
  draw,
  energy,
  guide,
  infilling,
  insertion,
  laws,
  mix,
  ordered,
  partial,
  quota,
  remask,
  sizes,
  stop,
)
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


PLUGINS = {
  "quota": quota.REGISTRY,
  "commit": commit.REGISTRY,
  "remask": remask.REGISTRY,
  "active": active.REGISTRY,
  "mix": mix.REGISTRY,
  "stop": stop.REGISTRY,
}


def _kind(registry, section, where: str):
  """The plug-in of a section, or of its kind alone."""
  return config.build_kind(registry, {"kind": section} if isinstance(section, str) else section, where)


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
  """Section `sampler`.

  Fields:
    quota: how many tokens, or which, a step commits; a section with a `kind` of quota.REGISTRY.
    score: confidence that ranks tokens, see draw.Score.
    commit: from where they are taken, see commit.REGISTRY. remask: what is opened again, see remask.REGISTRY.
    active: what one call is over, see active.REGISTRY. mix: what masked slots show, see mix.REGISTRY.
    credit: logits remember earlier predictions: a section of credit.Credit; "": they do not.
    stop: one or several sections with a `kind` of stop.REGISTRY.
    temperature: 0 takes the likeliest token. top_k: 0 keeps all. top_p: nucleus.
    sub_block: tokens of a unit that are open at one time, left to right (LLaDA's block length); 0: all.
      Steps of a quota are per sub-block.
    block: block size to decode with; 0 is the trained one, anything else warns.
    cache: "auto", "none", "causal_exact", "block_exact", or a section with a `kind` for what a step may read
      inside the front unit: prefix, dual, vicinity, free, delayed, delayed_greedy,
      logit_selective, value_similarity (see partial.py).
    guidance: see Guidance.
    eos: id that ends a row; −1 takes the tokenizer's, −2 none.
    forbid: ids never drawn, besides the mask id.
    term: the term whose head decodes; "" is the one of the likelihood.
    length: tokens of a generated row, prompt included, where the caller does not say; 0: a row of the data.
    draft: speculative decoding: a section with a `kind` of drafting.DRAFTERS, or a kind; "" is none.
    verify: "auto", or a section with a `kind` of verify.REGISTRY, or a kind.
    sizes: a policy that chooses the sizes of blocks: a section of sizes.Sizes, or a path; "": equal ones.
    guide: an autoregressive run that decides what is committed: guide.Guide, or a path; "": none.
    energy: which of several drafts of a whole text is taken: a section with a `kind` of energy.REGISTRY; "":
      none.

  `quota="threshold"` and `guidance=1.5` are short for sections with nothing but a kind, or a scale.
  """

  quota: Any = dataclasses.field(default_factory=lambda: {"kind": "threshold"})
  score: Any = dataclasses.field(default_factory=dict)
  commit: Any = "anywhere"
  remask: Any = "never"
  active: Any = "units"
  mix: Any = "mask"
  credit: Any = ""
  stop: Any = ()
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  sub_block: int = 0
  block: int = 0
  cache: Any = "auto"
  guidance: Any = dataclasses.field(default_factory=dict)
  eos: int = -1
  forbid: tuple[int, ...] = ()
  term: str = ""
  length: int = 0
  draft: Any = ""
  verify: Any = "auto"
  sizes: Any = ""
  guide: Any = ""
  energy: Any = ""

  def __post_init__(self):
    put = lambda name, value: object.__setattr__(self, name, value)
    for name, registry in PLUGINS.items():
      if name != "stop":
        put(name, _kind(registry, getattr(self, name), name))
    rules = self.stop if isinstance(self.stop, (tuple, list)) else (self.stop,)
    put("stop", tuple(_kind(PLUGINS["stop"], rule, f"stop[{i}]") for i, rule in enumerate(rules)))
    if len({type(rule) for rule in self.stop}) < len(self.stop):
      raise ValueError("stop names a rule twice")
    section = {"kind": self.cache} if self.cache in tuple(partial.REGISTRY) else self.cache
    if not isinstance(section, str):
      put("cache", config.build_kind(partial.REGISTRY, section, "cache"))
    section = {"kind": self.score} if isinstance(self.score, str) else self.score
    put("score", config.build(draw.Score, section, "score"))
    section = {"scale": self.guidance} if isinstance(self.guidance, (int, float)) else self.guidance
    put("guidance", config.build(Guidance, section, "guidance"))
    if self.draft:
      put("draft", drafting.drafter(self.draft))
    if self.verify != "auto":
      put("verify", drafting.rule(self.verify))
    if self.credit:
      put("credit", config.build(credit.Credit, self.credit, "credit"))
    if self.sizes:
      put("sizes", sizes.section(self.sizes))
    if self.guide:
      put("guide", guide.section(self.guide))
    if self.energy:
      put("energy", energy.section(self.energy))
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
  layout = objective.layout
  if layout.longest_block:
    layout = dataclasses.replace(layout, longest_block=max(layout.longest_block, block))
  corruption = dataclasses.replace(objective.corruption, blocks=frozen)
  return dataclasses.replace(objective, corruption=corruption, layout=layout), trained


def build(
  section, objective, model, *, latent=None, meta=None, step: int = 0, load=None, nets=None
) -> Sampler:
  """The sampler of an objective and a model.

  Args:
    section: SamplerConfig or a config section.
    latent: the bound latent that the objective's view needs.
    meta: facts of the data, {"eos": id or −1, "forbid": ids that data never contain}.
    step: training step of the parameters: fixes what the objective schedules (the block size).
    load: workdir → (Sampler of that run, its parameters), for drafts of another model, and (workdir, tree) →
      (network beside that run's model, its parameters), for energies.
    nets: {name: network beside this model}.

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
  eos = int(meta.get("eos", -1)) if cfg.eos == -1 else max(cfg.eos, -1)
  forbid = (
    set(cfg.forbid)
    | set(meta.get("forbid", ()))
    | ({objective.mask_id} if objective.layout.noisy and objective.mask_id >= 0 else set())
  )
  extras, top = wants(cfg)
  choice = draw.Choice(
    cfg.temperature, cfg.top_k, cfg.top_p, cfg.score.kind, tuple(sorted(forbid)), extras, top,
    cfg.credit or None,
  )  # fmt: skip
  drafts = cfg.draft and not isinstance(cfg.draft, drafting.Plain)
  if cfg.credit and (isinstance(objective, Insertion) or hasattr(objective.corruption, "plan") or drafts):
    raise ConfigError(
      "each token is predicted once, or verified: no earlier prediction earns credit", key="sampler.credit",
      value=cfg.credit, fix="credit=''",
    )  # fmt: skip
  if isinstance(objective, Insertion):
    return insertion.build(cfg, objective, model, choice)
  if hasattr(objective.corruption, "plan") and not cfg.draft:
    return ordered.build(dataclasses.replace(cfg, eos=eos), objective, model, name, choice)
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
  if getattr(model.cfg, "anchor", 0) and policy.stores:
    raise ConfigError(
      "a model with an anchor keeps no keys and values: both its networks see the whole text",
      key="sampler.cache", value=policy.name, fix="sampler.cache='none', or model.anchor=0",
    )  # fmt: skip
  if policy.partial is not None and (single or not denoises):
    raise ConfigError(
      "each step computes its unit for the first time, so there is nothing to read inside it",
      key="sampler.cache", value=policy.name, fix="sampler.cache='auto'",
    )  # fmt: skip
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
  if cut and objective.layout.copy == "text" and blocks.anchor == "document":
    raise ConfigError(
      "noisy slots of the block where the answer begins read the prompt's part of it from the clean stream, "
      "which a decoder writes in whole blocks", key="objective.layout.copy", value="text",
      fix="corruption.blocks.anchor='response', or layout.copy='blocks'",
    )  # fmt: skip
  if model.cfg.head(term.head).kind not in ("categorical", "joint"):
    raise ConfigError(
      "the sampler draws ids; this head has none", key=f"objective.terms.{name}.head", value=term.head,
      fix="sampler.term=<a term with a categorical head>",
    )  # fmt: skip
  chosen = cfg.quota
  if hasattr(chosen, "schedule") and not chosen.schedule:
    chosen = dataclasses.replace(chosen, schedule=getattr(objective.corruption, "schedule", "linear"))
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
    stored=found.stored,
    active=cfg.active,
    choice=choice,
    quota=chosen,
    commit=cfg.commit,
    remask=cfg.remask,
    mix=cfg.mix,
    stops=cfg.stop,
  )
  check(sampler)
  helpers = [name for name in ("sizes", "guide", "energy") if getattr(cfg, name)]
  helpers += ["draft"] * bool(drafts)
  if len(helpers) > 1:
    raise ConfigError(
      "one helper at a time decides what happens to a row", key=f"sampler.{helpers[1]}",
      value=helpers, fix=f"one of {', '.join(helpers)}",
    )  # fmt: skip
  if cfg.sizes:
    return sizes.build(sampler, cfg.sizes, load)
  guided = guide.build(sampler, cfg.guide, load) if cfg.guide else None
  if policy.partial is not None:
    sampler = laws.judged(sampler)
  if guided is not None:
    sampler = dataclasses.replace(guided, policy=sampler.policy)
  if isinstance(objective, Infill):
    if cfg.draft or cfg.energy:
      raise ConfigError(
        "two networks fill masks one by one", key="sampler.draft" if cfg.draft else "sampler.energy",
        value=type(cfg.draft or cfg.energy).__name__, fix="neither draft nor energy",
      )  # fmt: skip
    return infilling.build(sampler, nets)
  if cfg.energy:
    sampler = energy.build(sampler, cfg.energy, load)
  return drafting.attach(sampler, cfg.draft, cfg.verify, load) if cfg.draft else sampler


def wants(cfg: SamplerConfig) -> tuple[tuple[str, ...], int]:
  """(fields of draw.Picked that the plug-ins read, how many of the likeliest tokens)."""
  users = (cfg.mix, *cfg.stop)
  extras = tuple(sorted({name for x in users for name in x.extras}))
  return extras, max(getattr(x, "top", 0) for x in users)


def check(sampler: Sampler) -> None:
  """The laws between plug-ins, and between them and the objective.

  Raises:
    ConfigError: key, value, reason, fix.
  """
  cfg, q = sampler.cfg, sampler.quota

  def law(broken: bool, reason: str, key: str, fix: str):
    if broken:
      value = getattr(cfg, key)
      parts = value if isinstance(value, tuple) else (value,)
      name = ", ".join(getattr(x, "_config_kind", type(x).__name__) for x in parts)
      raise ConfigError(reason, key=f"sampler.{key}", value=name, fix=fix)

  law(
    bool(q.scores) and cfg.score.kind not in q.scores,
    f"the rule is about scores of the kind {' or '.join(q.scores)}, the config has {cfg.score.kind!r}",
    "quota", f"score={q.scores[0]!r}" if q.scores else "",
  )  # fmt: skip
  law(
    q.timed and type(cfg.commit) is not commit.Anywhere,
    "the quota reveals every masked token with the probability of the reverse process, so no rule may choose "
    "among them", "commit", "commit='anywhere', or a quota that ranks tokens",
  )  # fmt: skip
  if cfg.remask.active:
    law(
      not sampler.denoises,
      "every call stores what it commits, and the cache has seen it: nothing can be opened again",
      "remask", "remask='never'",
    )  # fmt: skip
    law(
      type(cfg.commit) is not commit.Anywhere, "remasking chooses among all tokens of the unit", "commit",
      "commit='anywhere', or remask='never'",
    )  # fmt: skip
    law(
      any(type(x).flush is not stop.Stop.flush for x in cfg.stop),
      "a rule that commits the rest and one that opens it again never end", "stop", "one of them",
    )  # fmt: skip
    law(
      getattr(cfg.remask, "rule", "") == "conf" and cfg.score.kind != "prob",
      "tokens are opened again by their probability when they were committed", "remask", "score='prob'",
    )  # fmt: skip
    cfg.remask.check(q)
  if cfg.mix.active:
    model = sampler.model.cfg
    law(
      not sampler.denoises or sampler.objective.mask_id < 0 or not getattr(model, "vocab", 0),
      "mixtures are with the embedding of a mask, and no slot of this sampler shows one", "mix", "mix='mask'",
    )  # fmt: skip
  if cfg.credit:
    law(
      not sampler.denoises or bool(cfg.energy), "each token is predicted once, or as one of several texts",
      "credit", "credit=''",
    )  # fmt: skip
    law(
      sampler.policy.partial is not None and sampler.policy.partial.keeps,
      "the cache lets old predictions stand, which would earn credit again", "credit",
      "another sampler.cache",
    )  # fmt: skip
  cfg.active.check(sampler)
  if sampler.policy.partial is not None and type(cfg.active) is not active.Units:
    raise ConfigError(
      "what a step may read is said of one unit at a time", key="sampler.cache", value=sampler.policy.name,
      fix="active='units', or cache='auto', which is exact",
    )  # fmt: skip
  if sampler.policy.partial is not None and sampler.policy.partial.foresees:
    law(
      not q.timed and cfg.score.kind != "random", "the cache computes what a step is going to commit: known "
      "before the predictions only where the order is random", "score", "score='random'",
    )  # fmt: skip
    law(
      cfg.score.eos != 1, "which token is an EOS is not known before the predictions", "score", "score.eos=1"
    )
    law(
      bool(sampler.choice.extras) or sampler.choice.top > 0 or bool(cfg.credit),
      "the cache computes what a step is going to commit, and these rules decide that by the predictions",
      "credit" if cfg.credit else "stop" if cfg.stop else "mix", "stop=(), mix='mask', credit=''",
    )  # fmt: skip
  if isinstance(q, quota.Threshold) and cfg.score.kind == "neg_entropy" and q.tau >= 0:
    warnings.warn(
      f"sampler.quota.tau={q.tau}: the score is −H, never above it, so every step commits one token; for "
      "H < h set tau=-h",
      stacklevel=3,
    )
