"""From a config to the objects of a system: data, latent, objective, model. Nothing is compiled here.

Every room checks its own section; what one section leaves open and another one knows (the vocabulary,
the mask id) is filled in here, once, for training, sampling and evaluation alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from genmodels import config, data, kernels, latents, models, objectives
from genmodels.config import ConfigError
from genmodels.contracts import Documents, Row
from genmodels.objectives import laws
from genmodels.parallel import rules

CLASSES = ("categorical", "draft", "block", "joint")  # kinds of heads over the vocabulary


@dataclasses.dataclass(frozen=True)
class System:
  """What a config describes.

  Fields:
    cfg: the ConfigDict.
    data: the Data room's object; latent: a bound Latent or None.
    objective, model: built and checked against each other; the model's attention is resolved.
    fns: {name: fn(trees, …) -> Outputs, or what the network gives}; the model, views of its tree, and `nets`.
    nets: {name: network with a tree of its own}: init, abstract_params, logical_axes, apply as of a Model.
    copies: {name: steps} of those whose tree is a copy of the model's, made anew at every so many-th step.
    attention: the implementation of attention and why, for people.
    notes: warnings for people, printed once.
  """

  cfg: Any
  data: Any
  latent: Any
  objective: Any
  model: Any
  fns: dict[str, Callable]
  attention: str = ""
  notes: tuple[str, ...] = ()
  nets: dict[str, Any] = dataclasses.field(default_factory=dict)
  copies: dict[str, int] = dataclasses.field(default_factory=dict)

  @property
  def exact(self):
    """The model with tile lists for the worst case: for evaluation and sampling."""
    return models.build(dataclasses.replace(self.model.cfg, attention_capacity=None))


def build(cfg, *, workdir: str = "", mesh=None) -> System:
  """Builds and checks a system.

  Args:
    workdir: keeps the data plan, and shards of a data section that prepares its own.
    mesh: where it will run, for the choice of "auto" attention: it is made here, once. None: the default
      devices.

  Raises:
    ConfigError: names the key, the value, the reason and the fix; a pinned attention that cannot run there,
      before any data are read.
    DataError: what is wrong with the data on disk.
  """
  implementation, why = _attention(config.plain(cfg.model), mesh)
  layout = objectives.layout(cfg.objective)
  section = _with_rooms(cfg.data, layout.rooms())
  options = dict(batch_size=int(cfg.batch_size), seed=int(cfg.seed), workdir=workdir)
  source = data.build(section, layout.cost, **options)
  latent = latents.build(cfg.latent) if cfg.get("latent") else None
  specials = source.meta.specials
  meta = {"vocab": source.meta.vocab_size, "mask_id": specials["mask"], "eos": specials["eos"]}
  if latent is not None:
    meta |= latent.meta
  objective = objectives.build(cfg.objective, meta)
  section = _with_vocabulary(cfg.model, meta, objective) | {"attention": implementation}
  model = models.build(section)
  _agree(objective, model)
  notes = list(laws.check(objective))
  if objective.corruption.dense:
    notes += [_dense(objective, source.meta.seq_len, mesh)]
  if model.cfg.attention_capacity is not None and not kernels.bounded(implementation):
    notes += [f"model.attention_capacity is without effect: lists of {implementation} hold the worst case"]
  if warning := kernels.caution(implementation, model.cfg.attention_safe):
    notes += [f"{warning} (model.attention_safe=True)"]
  attention = f"{implementation} ({why})"
  nets = networks(cfg, model)
  models.joint.check(model.cfg, nets)
  fns, made = functions(cfg, model), copies(cfg)
  return System(cfg, source, latent, objective, model, fns, attention, tuple(notes), nets, made)


def row_of(batch: dict) -> Row:
  """The Row of a batch dict (arrays by name, as the data room yields them)."""
  side = {k.removeprefix("side/"): v for k, v in batch.items() if k.startswith("side/")}
  docs = Documents(*(batch[k] for k in ("example_id", "occurrence", "rank", "mode", "source")), side)
  return Row(*(batch[k] for k in ("tokens", "doc", "pos", "role", "modality", "index")), docs)


def _dense(objective, length: int, mesh) -> str:
  """What to say of a random mask, or ConfigError: it is for short rows on one context shard."""
  slots, shards = length * len(objective.layout.streams), 1 if mesh is None else mesh.shape["context"]
  kind = getattr(objective.corruption, "_config_kind", type(objective.corruption).__name__)
  if slots > kernels.dense.LIMIT:
    raise ConfigError(
      f"corruption {kind!r} draws a mask of all pairs, for at most {kernels.dense.LIMIT} slots",
      key="data.seq_len", value=length, fix="shorter rows, or blocks that grow (configs/language/nbdiff.py)",
    )  # fmt: skip
  if shards > 1:
    raise ConfigError(
      f"corruption {kind!r} draws a mask of all pairs, which does not split over context shards",
      key="mesh.context", value=shards, fix="1",
    )  # fmt: skip
  return f"masks {', '.join(objective.masks)} are no intervals: dense attention over {slots} × {slots} pairs"


def _attention(section, mesh) -> tuple[str, str]:
  """The implementation of attention on `mesh`, and why it is that one."""
  wanted = section.get("attention", "auto")
  try:
    with rules.use_mesh(mesh or rules.current_mesh()):
      return kernels.explain(wanted)
  except ValueError as e:
    raise ConfigError(str(e), key="model.attention", value=wanted, fix="'auto', or 'xla'") from None


def _with_vocabulary(section, meta, objective) -> dict:
  """The model section with the data's vocabulary, and the mask id forbidden in heads over it."""
  section = config.plain(section)
  if "vocab" not in section and "preset" not in section and meta.get("vocab"):
    section["vocab"] = int(meta["vocab"])
  heads = section.setdefault("heads", {"text": {}})
  for head in heads.values():
    whole = head.get("kind", "categorical") in CLASSES and head.get("size") is None
    if (
      whole and 0 <= objective.mask_id < section.get("vocab", objective.mask_id + 1) and "forbid" not in head
    ):
      head["forbid"] = (objective.mask_id,)
  return section


def _with_rooms(section, rooms: dict[str, int]):
  """The data section with the layout's capacities: rows are packed for the slots that there are."""
  if not rooms:
    return section
  section = config.plain(section)
  given = dict(section.get("budgets") or {})
  for name, room in rooms.items():
    if given.get(name, room) != room:
      raise ConfigError(
        f"the layout has {room} slots a row for it", key=f"data.budgets.{name}", value=given[name],
        fix=f"leave it out; objective.layout.{name}_slots says how many there are",
      )  # fmt: skip
  return section | {"budgets": given | rooms}


def _agree(objective, model) -> None:
  """Laws between the objective and the model."""
  heads = dict(model.cfg.heads)
  for name, term in objective.terms.items():
    if term.head not in heads:
      raise ConfigError(
        "the model has no such head", key=f"objective.terms.{name}.head", value=term.head,
        fix=f"one of {', '.join(heads)}, or add it to model.heads",
      )  # fmt: skip
    if term.given != heads[term.head].given:
      raise ConfigError(
        f"its head takes {heads[term.head].given} tokens", key=f"objective.terms.{name}.given",
        value=term.given, fix=f"{heads[term.head].given}, or model.heads.{term.head}.given={term.given}",
      )  # fmt: skip
    if term.measure != "nll" and heads[term.head].kind != "categorical":
      raise ConfigError(
        "its head has no classes", key=f"objective.terms.{name}.measure", value=term.measure, fix="'nll'"
      )
  if objective.router.scales and model.cfg.moe is None:
    raise ConfigError(
      f"the model has no experts for {', '.join(objective.router.scales)}", key="objective.router",
      value=None, fix="leave it out, or set model.moe",
    )  # fmt: skip
  if objective.router.bias and (model.cfg.moe is None or not model.cfg.moe.bias):
    raise ConfigError(
      "no expert of the model has a bias", key="objective.router.bias", value=objective.router.bias,
      fix="model.moe.bias=True, or 0",
    )  # fmt: skip
  for pattern in model.cfg.patterns:
    if pattern not in objective.masks:
      raise ConfigError(
        "a layer attends under a mask pattern that the objective does not define", key="model.pattern",
        value=pattern, fix=f"add it to objective.masks (it has {', '.join(objective.masks)})",
      )  # fmt: skip
  gated, masked = bool(model.cfg.lora and model.cfg.lora.gated), objective.adapters == "masked"
  if gated != masked:
    raise ConfigError(
      "a gated adapter needs an objective that says where it acts, and the other way round",
      key="model.lora.gated", value=gated, fix=f"objective.adapters={'masked' if gated else 'all'!r}",
    )  # fmt: skip
  if objective.layout.noisy and objective.mask_id >= model.cfg.vocab > 0:
    raise ConfigError(
      f"the mask id lies outside of the vocabulary of {model.cfg.vocab}", key="objective.mask_id",
      value=objective.mask_id, fix="use a reserved id below model.vocab, or enlarge model.vocab",
    )  # fmt: skip


def networks(cfg, model) -> dict[str, Any]:
  """Networks beside the model: `trees.<name> = {"kind": …}`, one of models.NETS, with a tree of its own.

  Raises:
    ConfigError: unknown kind, a wrong key, or a name that is taken.
  """
  nets = {}
  for name, spec in sorted((config.plain(cfg.get("trees")) or {}).items()):
    if not isinstance(spec, dict) or "kind" not in spec:
      continue
    if name in ("model", "ema"):
      raise ConfigError("the name is taken", key="trees", value=name, fix="another name")
    nets[name] = config.build_kind(models.NETS, spec, f"trees.{name}").network(model)
  return nets


def copies(cfg) -> dict[str, int]:
  """{name: steps}: the networks of `trees` that are copies of the model, made anew at every so many-th step.

  Raises:
    ConfigError: somebody else would move one.
  """
  sections = (config.plain(cfg.get("trees")) or {}).items()
  found = {n: s["refresh"] for n, s in sections if isinstance(s, dict) and s.get("refresh")}
  players, init = config.plain(cfg.get("players")) or {}, config.plain(cfg.get("init")) or {}
  for name, every in found.items():
    trained = any(name in (p.get("trees") or (player,)) for player, p in players.items())
    if trained or name in init.get("beside", {}):
      other = "a player trains it" if trained else "init.beside loads another"
      raise ConfigError(
        f"the tree is a copy of the model; {other}", key=f"trees.{name}.refresh", value=every, fix="refresh=0"
      )
  return found


def functions(cfg, model) -> dict[str, Callable]:
  """Networks by name: "model", `networks`, and `trees.<name> = {"view": "no_lora"}`: the model's tree without
  adapters."""
  nets = networks(cfg, model)
  fns = {"model": models.joint.function(model, nets)}
  for name, net in nets.items():
    fns[name] = lambda trees, *a, name=name, net=net, **kw: net.apply(trees[name], *a, **kw)
  for name, spec in config.plain(cfg.get("trees", {}) or {}).items():
    if name in fns:
      continue
    view = spec.get("view") if isinstance(spec, dict) else spec
    if view != "no_lora":
      raise ConfigError(
        "unknown view", key=f"trees.{name}.view", value=view,
        fix=f"the known view is 'no_lora'; a network of its own has a kind: {', '.join(models.NETS)}",
      )  # fmt: skip
    fns[name] = lambda trees, *a, **kw: model.apply(models.lora.strip(trees["model"]), *a, **kw)
  return fns
