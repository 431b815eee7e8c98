"""The objective: from a row and its noise to inputs, targets, denominators and sums.

  prepare = draw → view → targets          loss: outputs, targets → {term: sum}
  run     = prepare → nets["model"] → loss   (overridden where a loss needs several passes)

A loss is Σ_terms scale · sum / denominator. Denominators are known before the forward pass, so the step
reduces them over the whole global batch first and any number of micro-batches gives the same gradient.

Legend: B rows · C copies · N clean tokens · S slots · D documents.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from genmodels import config, corruption, layouts, metrics, rows
from genmodels.config import ConfigError, Schedule
from genmodels.contracts import CLEAN, Inputs, Noise, Outputs, Row, Slots, Target
from genmodels.corruption.base import eligible
from genmodels.masks import DenseMask
from genmodels.objectives import relations
from genmodels.objectives import router as routers
from genmodels.parallel import current_mesh

Array = jax.Array

ALIGNMENTS = ("same", "shift", "shift_clean_boundary")
WEIGHTS = ("one", "inverse_marginal", "nelbo", "cart", "decay")
NORMALISERS = ("all_valid", "masked", "answer_len", "weight_sum", "batch")
MEASURES = ("nll", "entropy_correct")


@dataclasses.dataclass(frozen=True)
class Term:
  """One loss term.

  Fields:
    head: the head that predicts.
    stream: the stream whose slots predict.
    align: which slot predicts token n: "same" slot n, "shift" slot n−1 of the stream (an AR head's
      semantics), "shift_clean_boundary" as shift, but the first token of a block is read from the
      clean stream's last slot before it, as block decoders with a shifted head do at inference.
    ahead: with "shift", tokens between the slot that predicts and the one it is asked for: slot n − 1 − ahead
      predicts token n (a draft head).
    given: tokens right before the predicted one that the head is fed, see `models.Head.given`.
    on: "hit" scores corrupted tokens only, "all" every TEXT token.
    weight: "one", "inverse_marginal" = 1/P(hit), "nelbo" = the corruption's bound weight, "cart" = by the
      distance of the tokens that are shown, see `rows.geometric_context`; "decay" = exp(−(k − 1)/decay) for
      the k-th token of a block (0 the first), as a draft is worth less the more must be right before it.
    cart_p: decay of "cart". decay: of "decay".
    normaliser: "all_valid" every TEXT token, masked or not · "masked" scored tokens · "answer_len"
      mean over documents of per-document means · "weight_sum" Σ weights · "batch" documents.
    measure: what is summed: "nll", or "entropy_correct", the entropy of predictions whose likeliest class is
      the token, 0 elsewhere (LLaDA2's confidence-aware loss). Which ones are right is not known before the
      forward pass, so the normaliser counts all that are asked.
    scale: λ of the term, a number or a schedule; reports stay unscaled.
  """

  head: str = "text"
  stream: str = CLEAN
  align: str = "same"
  ahead: int = 0
  given: int = 0
  on: str = "all"
  weight: str = "one"
  cart_p: float = 0.1
  decay: float = 7.0
  normaliser: str = "all_valid"
  measure: str = "nll"
  scale: Schedule = 1.0

  def __post_init__(self):
    object.__setattr__(self, "scale", Schedule.of(self.scale))
    for name, allowed in (
      ("align", ALIGNMENTS),
      ("on", ("hit", "all")),
      ("weight", WEIGHTS),
      ("normaliser", NORMALISERS),
      ("measure", MEASURES),
    ):
      if getattr(self, name) not in allowed:
        raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
    if self.ahead and self.align != "shift" or self.ahead < 0:
      raise ValueError(
        f"ahead is {self.ahead} with align {self.align!r}; it is at least 0, and 0 without 'shift'"
      )
    if not 0 <= self.given <= self.ahead + 1 or self.given and self.align != "shift":
      raise ValueError(
        f"given is {self.given}; a shifted head is fed at most the {self.ahead + 1} tokens since its slot"
      )
    if self.decay <= 0:
      raise ValueError(f"decay is {self.decay}; it must be positive")
    if not 0 < self.cart_p < 1:
      raise ValueError(f"cart_p is {self.cart_p}; it must lie between 0 and 1")

  @property
  def reads(self) -> tuple:
    """What decides which predictions a term asks for; terms that agree share a pass over the logits."""
    own = ("normaliser", "measure", "scale")
    return tuple(getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in own)


@dataclasses.dataclass(frozen=True)
class Nets(Mapping):
  """The networks of a step as functions: name → fn(inputs, targets, **kw) → Outputs.

  Fields:
    fns: bound by the trainer; trees outside the player being trained are gradient-stopped.
    trees: the parameter trees themselves.
    latent: the Latent bound to its tree, or None.
    player: name of the player being trained.
  """

  fns: Mapping[str, Callable[..., Outputs]]
  trees: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  latent: Any = None
  player: str = "model"

  def __getitem__(self, name):
    if name not in self.fns:
      raise KeyError(f"no network {name!r}; the config's `trees` defines {', '.join(self.fns)}")
    return self.fns[name]

  def __iter__(self):
    return iter(self.fns)

  def __len__(self):
    return len(self.fns)


@dataclasses.dataclass(frozen=True)
class Objective:
  """A corruption, a layout, masks and terms, composed; most systems are nothing but such a config.

  Fields:
    corruption, layout: config sections with a `kind`, or built objects.
    masks: {pattern: rule}, see relations.table.
    terms: {name: Term}.
    likelihood: name of the term whose sum under `bound` draws is the reported likelihood, and with which
      samplers decode; to be named where there are several.
    mask_id: id of the absorbing state; −1 takes it from the data's tokenizer.
    router: losses of a mixture of experts, terms "router_balance" and "router_z"; see objectives.router.
    reproduction: permits a weight that is not the corruption's true marginal; every report says so.
    adapters: where adapters act: at "all" slots, or at "masked" ones only (needs `model.lora.gated`; every
      other slot computes the base model's bits).
  """

  corruption: Any = dataclasses.field(default_factory=lambda: {"kind": "clean"})
  layout: Any = dataclasses.field(default_factory=lambda: {"kind": "streams"})
  masks: dict = dataclasses.field(default_factory=lambda: {"full": "causal"})
  terms: dict = dataclasses.field(default_factory=lambda: {"text": Term()})
  likelihood: str = ""
  mask_id: int = -1
  router: routers.Router = routers.Router()
  reproduction: bool = False
  adapters: str = "all"

  def __post_init__(self):
    put = lambda name, value: object.__setattr__(self, name, value)
    put("corruption", _built(corruption.REGISTRY, self.corruption, "corruption"))
    put("layout", _built(layouts.REGISTRY, self.layout, "layout"))
    terms = {
      k: v if isinstance(v, Term) else config.build(Term, v, f"terms.{k}") for k, v in self.terms.items()
    }
    put("terms", terms)
    put("relations", {p: relations.table(rule, self.layout.streams) for p, rule in self.masks.items()})
    if self.adapters not in ("all", "masked"):
      raise ValueError(f"adapters is {self.adapters!r}; it must be 'all' or 'masked'")
    if self.corruption.dense:
      if len(self.layout.streams) > 1:
        raise ValueError(f"layout.streams is {self.layout.streams}; a random mask is of one stream")
      put("least", relations.table({f"{s}>{s}": "POS_LE" for s in self.layout.streams}, self.layout.streams))
    if len(terms) == 1:
      put("likelihood", self.likelihood or next(iter(terms)))
    if not self.likelihood:
      raise ConfigError(
        f"several terms ({', '.join(terms)}) and nobody says which one is reported and decoded with",
        key="likelihood", value="", fix=f"likelihood={next(iter(terms))!r}",
      )  # fmt: skip
    if self.likelihood not in terms:
      raise ValueError(f"likelihood is {self.likelihood!r}; the terms are {', '.join(terms)}")
    if terms[self.likelihood].measure != "nll":
      raise ValueError(
        f"likelihood is {self.likelihood!r}, which measures {terms[self.likelihood].measure!r}: no likelihood"
      )
    for name, t in terms.items():
      if t.stream not in self.layout.streams:
        raise ValueError(
          f"terms.{name}.stream is {t.stream!r}; the layout's streams are {self.layout.streams}"
        )
      if t.align == "shift_clean_boundary" and CLEAN not in self.layout.streams:
        raise ValueError(
          f"terms.{name}.align is 'shift_clean_boundary'; it needs a clean stream 'c' in the layout"
        )
    kept, longest = self.layout.whole_blocks, self.corruption.longest
    if kept and (longest is None or longest > kept):
      size = "all tokens of a document" if longest is None else f"{longest} tokens"
      raise ConfigError(
        f"a block can have {size}, more than context shards are to keep whole",
        key="layout.whole_blocks", value=kept,
        fix="0: blocks are cut and the noisy keys travel" if longest is None else f"whole_blocks={longest}",
      )  # fmt: skip
    if len(self.layout.noisy) > self.corruption.copies:
      raise ValueError(
        f"layout.streams has {len(self.layout.noisy)} noisy copies, the corruption draws "
        f"{self.corruption.copies}; set corruption.complement=True or drop a stream"
      )
    copied = self.layout.longest_block
    if copied and (longest is None or longest > copied):
      raise ConfigError(
        f"the longest block has {longest or 'all'} tokens of a document",
        key="layout.longest_block", value=copied, fix=f"longest_block={longest}" if longest else "copy='all'",
      )  # fmt: skip

  # -- statistics: what no gradient moves -----------------------------------------------------------

  def stats(self) -> dict[str, Any]:
    """Initial statistics that the training state keeps, {} for most objectives."""
    return self.corruption.stats()

  def bind(self, stats: Mapping[str, Any]) -> Objective:
    """This objective, drawing by the statistics of a state. Likelihoods and samplers use it unbound."""
    corruption = self.corruption.bind(dict(stats))
    if corruption is self.corruption:
      return self
    bound = copy.copy(self)
    object.__setattr__(bound, "corruption", corruption)
    return bound

  def update(self, stats: Mapping[str, Any], sums: Mapping[str, Any]) -> dict[str, Any]:
    """New statistics from sums over a global batch, those of `run` (aux["stats"]) or of a survey."""
    return self.corruption.update(dict(stats), sums)

  def survey(self, nets: Nets, row: Row, key: Array, step, draw: tuple) -> dict[str, Any]:
    """Sums for `update` over a held-out batch: draw (r, R) of the likelihood bound, at a training step."""
    noise = self.corruption.draw(row, key, step, nets.latent, draw)
    inputs, targets, _ = self.prepare(row, key, step, nets.latent, draw)
    _, aux = self.loss(nets["model"](inputs, targets), targets)
    return self.corruption.survey(row, noise, aux["per_token"][self.likelihood])

  # -- view: the one place where a slot's input, mask and read-out are made, in training and sampling --

  def view(
    self, row: Row, noise: Noise, only: Array | None = None, latent=None
  ) -> tuple[Inputs, dict[str, Array]]:
    """Inputs of the slots, and {term: int32[B, N]} the slot that predicts each token (−1: none).

    Args:
      only: int32[B, A, 2], (stream, token) pairs to compute now; default: every slot.
    """
    slots = self.slots(row, noise, only)
    inputs = self.inputs(row, noise, slots, latent)
    return inputs, {name: self.read(row, noise, slots, t) for name, t in self.terms.items()}

  def slots(self, row: Row, noise: Noise, only: Array | None = None) -> Slots:
    """Where the tokens sit; all of them together (`only` is None) are placed over the context shards."""
    slots = self.layout.arrange(row, noise, only)
    mesh = current_mesh()
    if only is not None or mesh is None:
      return slots
    pairs = lambda: sum(r.mask(slots).pairs() for r in self.relations.values())
    return self.layout.place(slots, mesh.shape["context"], pairs)

  def inputs(self, row: Row, noise: Noise, slots: Slots, latent=None) -> Inputs:
    """Token ids, positions and masks of the slots; subclasses add features and conditions."""
    src = jnp.maximum(slots.src, 0)
    ids = jnp.where(slots.src >= 0, self.shown(row, noise, slots), -1)
    A = row.pos.shape[-1]
    pos = jnp.take_along_axis(row.pos, jnp.broadcast_to(src[..., None], src.shape + (A,)), 1)
    masks = {p: r.mask(slots) for p, r in self.relations.items()}
    if noise.pairs is not None:
      least = self.least.mask(slots)
      masks = {p: DenseMask(least, most, noise.pairs) for p, most in masks.items()}
    route = self.hits(noise, slots).astype(jnp.int32) if self.adapters == "masked" else None
    return Inputs(ids=ids[..., None], pos=pos, doc=slots.doc, masks=masks, route=route)

  def shown(self, row: Row, noise: Noise, slots: Slots) -> Array:
    """int32[B, S]: the token that each slot shows (mask id, replacement, or the clean token)."""
    B, N = row.tokens.shape
    src = jnp.maximum(slots.src, 0)
    token = jnp.take_along_axis(row.tokens, src, 1)
    if not self.layout.noisy:
      return token
    copy = jnp.asarray(self.layout.copy_of())[slots.stream]
    at = jnp.maximum(copy, 0) * N + src
    value = self.mask_id if noise.value is None else jnp.take_along_axis(noise.value.reshape(B, -1), at, 1)
    return jnp.where(self.hits(noise, slots), value, token)

  def hits(self, noise: Noise, slots: Slots) -> Array:
    """bool[B, S]: slots whose token is corrupted; no clean slot, no empty one."""
    B, _, N = noise.hit.shape
    copy = jnp.asarray(self.layout.copy_of())[slots.stream]
    at = jnp.maximum(copy, 0) * N + jnp.maximum(slots.src, 0)
    return jnp.take_along_axis(noise.hit.reshape(B, -1), at, 1) & (copy >= 0) & (slots.src >= 0)

  def carries(self, row: Row, noise: Noise, slots: Slots) -> Array:
    """bool[B, S, N]: the tokens that a slot's input holds something of. Quadratic: for the leak law."""
    shown = (slots.src >= 0) & ~self.hits(noise, slots)  # a noisy slot shows its token where that was not hit
    return shown[..., None] & (slots.src[..., None] == rows.coordinates(row.doc)[:, None])

  def read(self, row: Row, noise: Noise, slots: Slots, term: Term) -> Array:
    """int32[B, N]: the slot whose hidden state predicts token n under the term's alignment."""
    streams = self.layout.streams
    own = slots.where[:, streams.index(term.stream)]
    if term.align == "same":
      return own
    n = rows.coordinates(row.doc)
    doc_lo, _ = rows.doc_bounds(row.doc)
    before = own
    if term.align == "shift_clean_boundary":
      clean = slots.where[:, streams.index(CLEAN)]
      # Slot n−1 of the clean stream where token n opens a block, of the noisy one elsewhere.
      opens = jnp.roll(n == noise.blk_lo, -1, axis=1)
      before = jnp.where(opens, clean, own)
    return jnp.where(n - term.ahead > doc_lo, jnp.roll(before, 1 + term.ahead, axis=1), -1)

  # -- training -------------------------------------------------------------------------------------

  def prepare(self, row: Row, key: Array, step, latent=None, bound: tuple | None = None):
    """Draws, places, and says what is asked.

    Args:
      bound: (r, R), draw r of R of the likelihood bound (exact counts, unclipped levels); see
        Corruption.draw. Only the likelihood term is then asked.

    Returns:
      (inputs, {term: Target}, {term: float32 denominator}).
    """
    row = self.corruption.trimmed(row, key, step, bound)
    return self.asked(row, self.corruption.draw(row, key, step, latent, bound), latent, bound)

  def asked(self, row: Row, noise: Noise, latent=None, bound: tuple | None = None):
    """`prepare` for noise that is drawn already."""
    inputs, read = self.view(row, noise, latent=latent)
    targets, denominators = {}, {}
    for name, term in self.terms.items():
      if bound is not None:
        if name != self.likelihood:
          continue
        # No noise reaches the clean stream: its cross-entropy is the likelihood, whatever a noisy copy drew.
        weight = "one" if term.stream == CLEAN else "nelbo"
        term = dataclasses.replace(term, weight=weight, normaliser="all_valid")
      targets[name], denominators[name] = self.target(self.of_term(row, name), noise, read[name], term)
    return inputs, targets, denominators

  def of_term(self, row: Row, name: str) -> Row:
    """The row with what the term never asks given (CONTEXT): here the row as it is."""
    del name
    return row

  def target(self, row: Row, noise: Noise, read: Array, term: Term) -> tuple[Target, Array]:
    """The Target of one term and its denominator."""
    share = 1.0 if noise.share is None else noise.share
    valid = eligible(row) & (read >= 0)
    doc_lo, doc_hi = rows.doc_bounds(row.doc)
    copy = max(int(self.layout.copy_of()[self.layout.streams.index(term.stream)]), 0)
    scored = valid & noise.hit[:, copy] if term.on == "hit" else valid
    weight = scored * jnp.float32(share)
    if term.weight == "nelbo":
      weight = weight * noise.nelbo[:, copy]
    elif term.weight == "inverse_marginal":
      weight = weight / jnp.maximum(noise.marginal[:, copy], 1e-6)
    elif term.weight == "cart":
      shown = (row.doc >= 0) & ~noise.hit[:, copy]
      weight = weight * rows.geometric_context(row.doc, shown, term.cart_p)
    elif term.weight == "decay":
      place = rows.coordinates(row.doc) - noise.blk_lo
      weight = weight * jnp.exp(-(place - 1) / term.decay)
    if self.layout.copy_slots:
      # The laws leave one reason for a token without a slot: a row that no packer made. Loud, not dropped.
      lost = eligible(row) & (read < 0) & (rows.coordinates(row.doc) > doc_lo)
      weight = jnp.where(jnp.any(lost), jnp.nan, weight)
    if term.normaliser == "answer_len":
      weight = weight / jnp.maximum(rows.sum_in(doc_lo, doc_hi, valid * share), 1)
    documents = (rows.coordinates(row.doc) == doc_lo) & (row.doc >= 0)
    denominator = {
      "all_valid": valid * share,
      "masked": scored * share,
      "weight_sum": weight,
      "answer_len": documents & (rows.count_in(doc_lo, doc_hi, valid) > 0),
      "batch": documents,
    }[term.normaliser]
    given = None
    if term.given:
      given = {"ids": jnp.stack([jnp.roll(row.tokens, j, axis=1) for j in range(term.given, 0, -1)], -1)}
    target = Target(term.head, jnp.where(scored, read, -1), row.tokens, weight, given)
    return target, jnp.sum(denominator.astype(jnp.float32))

  def loss(self, outputs: Outputs, targets: dict[str, Target]) -> tuple[dict[str, Array], dict]:
    """Sums by term, and metrics.

    Returns:
      ({term: float32 sum of weight·nll}, {"per_token": {term: float32[B, M] weight·nll},
      "ratios": {name: (sum, count)}}); `run` adds "work" {net: counts of the call}, and may add "stats", sums
      that `update` takes.
    """
    per_token, ratios = {}, {}
    for name, value in self.measured(outputs, targets).items():
      weight = targets[name].weight
      asked = (weight > 0).astype(jnp.float32)
      per_token[name] = weight * value
      label = "ce" if self.terms[name].measure == "nll" else self.terms[name].measure
      ratios[f"{label}/{name}"] = (jnp.sum(asked * value), jnp.sum(asked))
    return {k: jnp.sum(v) for k, v in per_token.items()}, {"per_token": per_token, "ratios": ratios}

  def measured(self, outputs: Outputs, targets: dict[str, Target]) -> dict[str, Array]:
    """{term: float32[B, M]}, what each term measures of its predictions."""
    groups, values = {}, {}
    for name in targets:
      groups.setdefault(self.terms[name].reads, []).append(name)
    for names in groups.values():
      if all(self.terms[n].measure == "nll" for n in names):
        values |= {n: outputs.dists[n].nll(targets[n].value) for n in names}
        continue
      both = outputs.dists[names[0]].map(_nll_and_confidence, targets[names[0]].value)
      values |= {n: both[self.terms[n].measure] for n in names}
    return {name: values[name] for name in targets}

  def run(self, nets: Nets, row: Row, key: Array, step):
    """One evaluation of the loss: ({term: sum}, {term: denominator}, metrics)."""
    inputs, targets, denominators = self.prepare(row, key, step, nets.latent)
    outputs = nets["model"](inputs, targets)
    sums, aux = self.loss(outputs, targets)
    aux |= {"work": {"model": work(outputs, targets)}}
    return self.routed(outputs, sums, denominators, aux)

  def routed(self, outputs: Outputs, sums: dict, denominators: dict, aux: dict):
    """A run's results with the router's terms (no ratios of sums, see objectives.router) and metrics."""
    aux = aux | {"ratios": aux["ratios"] | routers.ratios(outputs)}
    if found := self.router.stats(outputs):
      aux["stats"] = aux.get("stats", {}) | found
    return sums | self.router.sums(outputs), denominators | self.router.denominators(), aux

  def denominators(self, row: Row, key: Array, step, latent=None) -> dict[str, Array]:
    """The denominators alone; XLA drops the rest of `prepare`."""
    return self.prepare(row, key, step, latent)[2] | self.router.denominators()

  @property
  def exact(self) -> bool:
    """The term of the likelihood is read from the clean stream, which no noise reaches: every draw of `bound`
    is the likelihood itself."""
    return self.terms[self.likelihood].stream == CLEAN

  @property
  def measures(self) -> str:
    """What `bound` is of where it is no likelihood of texts, for people; "" where it is one, or its bound."""
    return ""

  def of_texts(self) -> Objective:
    """This objective with `bound` a likelihood of texts, or a bound of it."""
    return self

  @property
  def scales(self) -> dict[str, Schedule]:
    """{term: λ} of everything that `run` sums."""
    return {name: t.scale for name, t in self.terms.items()} | self.router.scales

  def bound(self, nets: Nets, row: Row, key: Array, r, R) -> tuple[Array, Array]:
    """Draw r of R of the negative log-likelihood (bound) in nats, and tokens, per document [B, D]."""
    if self.layout.copy_slots:  # rows to evaluate need not come from a packer: room for the worst case
      layout = dataclasses.replace(self.layout, copy_slots=0)
      return dataclasses.replace(self, layout=layout).bound(nets, row, key, r, R)
    inputs, targets, _ = self.prepare(row, key, 0, nets.latent, bound=(r, R))
    _, aux = self.loss(nets["model"](inputs, targets), targets)
    D = row.docs.occurrence.shape[1]
    predicted = eligible(row)
    if self.terms[self.likelihood].align != "same":  # a document's first token has no slot before it
      predicted &= rows.coordinates(row.doc) > rows.doc_bounds(row.doc)[0]
    nll = aux["per_token"][self.likelihood]
    return rows.per_doc(row.doc, nll, D), rows.per_doc(row.doc, predicted.astype(jnp.float32), D)


def _nll_and_confidence(logits: Array, value: Array) -> dict[str, Array]:
  """The measures of predictions float32[c, V] of classes int32[c], each [c]."""
  logp = jax.nn.log_softmax(logits, -1)
  p = jnp.exp(logp)
  entropy = -jnp.where(p > 0, p * jnp.where(p > 0, logp, 0), 0).sum(-1)
  return {
    "nll": -jnp.take_along_axis(logp, value[:, None], 1)[:, 0],
    "entropy_correct": jnp.where(logits.argmax(-1) == value, entropy, 0),
  }


def work(outputs: Outputs, targets: dict[str, Target]) -> dict:
  """What a network call executed, as sums that add up over micro-batches; see metrics.step_flops.

  Returns:
    {"slots": int32, "pairs": {pattern: int32[5] limbs}, "reads": {head: int32}}, and "overflow" {pattern:
    int32} where tile lists may be too short; {} for a network that does not count.
  """
  if not outputs.work:
    return {}
  reads = {}
  for t in targets.values():
    reads[t.head] = reads.get(t.head, 0) + jnp.sum(t.slot >= 0)
  pairs = {pattern: metrics.limbs(count) for pattern, count in outputs.work["pairs"].items()}
  more = {"overflow": outputs.work["overflow"]} if "overflow" in outputs.work else {}
  return {"slots": jnp.asarray(outputs.work["slots"], jnp.int32), "pairs": pairs, "reads": reads} | more


def _built(registry, section, where):
  if dataclasses.is_dataclass(section):
    return section
  return config.build_kind(registry, section, where)


def registry() -> dict[str, type]:
  """Kinds of objectives by name."""
  from genmodels.objectives.anchor import Anchored  # here: they import this module
  from genmodels.objectives.consistency import Consistency
  from genmodels.objectives.distill import BlockDistill
  from genmodels.objectives.drafts import BlockDraft, MultiToken, Taught
  from genmodels.objectives.energy import EnergyNCE
  from genmodels.objectives.esoteric import Esoteric
  from genmodels.objectives.flow import TextImageFlow
  from genmodels.objectives.image import NextScale, NextTokenImage
  from genmodels.objectives.infill import Infill
  from genmodels.objectives.insertion import Insertion
  from genmodels.objectives.marginal import Marginal
  from genmodels.objectives.policy import BlockPolicy
  from genmodels.objectives.through_time import ThroughTime
  from genmodels.objectives.uniform import Canvas, UniformDiffusion, Unrolled

  return {
    "tokens": Objective,
    "block_distill": BlockDistill,
    "multi_token": MultiToken,
    "block_draft": BlockDraft,
    "taught": Taught,
    "block_policy": BlockPolicy,
    "anchored": Anchored,
    "consistency": Consistency,
    "energy_nce": EnergyNCE,
    "esoteric": Esoteric,
    "next_token_image": NextTokenImage,
    "next_scale": NextScale,
    "text_image_flow": TextImageFlow,
    "uniform": UniformDiffusion,
    "unrolled": Unrolled,
    "canvas": Canvas,
    "insertion": Insertion,
    "infill": Infill,
    "marginal": Marginal,
    "through_time": ThroughTime,
  }


@functools.cache
def class_at(kind: str) -> type:
  """The class that a kind "path/file.py:Class" or "package.module:Class" names: an objective kept elsewhere.

  Raises:
    ConfigError: no such file, module or objective class.
  """
  place, _, name = kind.rpartition(":")
  wrong = lambda why: ConfigError(why, key="objective.kind", value=kind, fix="'path/file.py:Class'")
  try:
    if place.endswith(".py"):
      spec = importlib.util.spec_from_file_location(f"genmodels_objective_{abs(hash(place))}", place)
      module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look it up
      spec.loader.exec_module(module)
    else:
      module = importlib.import_module(place)
  except (FileNotFoundError, ModuleNotFoundError) as e:
    raise wrong(str(e)) from e
  cls = getattr(module, name, None)
  if not (isinstance(cls, type) and issubclass(cls, Objective)):
    raise wrong(f"{place} has no class {name} derived from genmodels.objectives.Objective")
  return cls


def _registry_for(section) -> dict[str, type]:
  kind = section.get("kind", "tokens") if isinstance(section, Mapping) or hasattr(section, "get") else ""
  return registry() | ({kind: class_at(kind)} if ":" in kind else {})


def layout(section):
  """The layout of an objective's config section: the packer asks it for costs before there is data."""
  kinds, kind = _registry_for(section), section.get("kind", "tokens")
  if kind not in kinds:
    raise ConfigError(
      "unknown kind", key="objective.kind", value=kind, fix=config.did_you_mean(str(kind), list(kinds))
    )
  default = {f.name: f for f in dataclasses.fields(kinds[kind])}["layout"]
  return _built(layouts.REGISTRY, section.get("layout") or default.default_factory(), "objective.layout")


def build(section, meta: Mapping[str, Any] | None = None) -> Objective:
  """The objective of a config section.

  Args:
    meta: facts of the data, {"mask_id": int, …}; fills what the section leaves open (−1).

  Raises:
    ConfigError: unknown key, wrong type, or a broken law, with key, value, reason and fix.
  """
  objective = config.build_kind(_registry_for(section), section, "objective")
  absorbing = getattr(objective.corruption, "absorbing", True)
  if objective.mask_id < 0 and objective.layout.noisy and (absorbing or (meta or {}).get("mask_id", -1) >= 0):
    if not meta or meta.get("mask_id", -1) < 0:
      raise ConfigError(
        "the layout has a noisy stream but nobody names a mask id",
        key="objective.mask_id", value=objective.mask_id, fix="set it, or use a tokenizer that has one",
      )  # fmt: skip
    objective = dataclasses.replace(objective, mask_id=meta["mask_id"])
  if getattr(objective.corruption, "eos_id", 0) < 0:
    if not meta or meta.get("eos", -1) < 0:
      raise ConfigError(
        "the corruption treats EOS as a unit but nobody names its id",
        key="objective.corruption.eos_id", value=-1, fix="set it, or use a tokenizer that has one",
      )  # fmt: skip
    corruption = dataclasses.replace(objective.corruption, eos_id=meta["eos"])
    objective = dataclasses.replace(objective, corruption=corruption)
  if hasattr(objective.corruption, "vocab"):
    objective = _with_states(objective, meta or {})
  return objective


def _with_states(objective: Objective, meta) -> Objective:
  """The objective with the ids that its corruption draws from: the data's vocabulary but the mask id."""
  c = objective.corruption
  vocab = meta.get("vocab", -1) if c.vocab < 0 else c.vocab
  if vocab < 1:
    raise ConfigError(
      "random tokens are drawn from a vocabulary that nobody names",
      key="objective.corruption.vocab", value=c.vocab, fix="set it, or use data with a tokenizer",
    )  # fmt: skip
  never = set(c.exclude) | ({objective.mask_id} if 0 <= objective.mask_id < vocab else set())
  return dataclasses.replace(
    objective, corruption=dataclasses.replace(c, vocab=vocab, exclude=tuple(sorted(never)))
  )
