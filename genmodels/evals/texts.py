"""A model that answers about texts: how likely a continuation is, and what it would write itself.

The likelihood is that of `genmodels eval`: exact for next-token models, the exact-count bound for diffusion
models (an upper bound of the negative log-likelihood, so scores are lower bounds of log p). Texts are made
by the run's sampler, whatever it is.

Legend: B rows · N tokens of a row.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genmodels import config, system
from genmodels.config import ConfigError
from genmodels.evals.heldout import piece_batches
from genmodels.evals.likelihood import Likelihood
from genmodels.parallel import multihost, rules
from genmodels.rows import per_doc
from genmodels.sampling import at_step
from genmodels.sampling import run as runs
from genmodels.sampling.state import prompt_row
from genmodels.step import bind

SHORTEST = 32  # tokens of the smallest row: every length is a power of two times it, and compiles once


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """How texts are scored and made.

  Fields:
    batch_size: rows of a batch; rounded up to what the mesh divides.
    draws: R, draws of the likelihood bound; an exact likelihood takes one.
    block: block size to evaluate and decode with; 0 is the trained one.
    length: tokens of a row at most, prompt included; 0 takes the data's seq_len.
    new: tokens to generate where the caller does not say.
    bos: "auto" begins a text as the tokenizer's publisher does, or, where he adds nothing, with BOS if the
      vocabulary of the data has one; "always", "never".
    greedy: for a bound, decode at temperature 0 to say whether a continuation is the greedy one; without it
      the answer is no. An exact model knows from the pass that scores.
    sampler: changes to the run's sampler section.
    seed: of the draws and of what is generated.
  """

  batch_size: int = 8
  draws: int = 32
  block: int = 0
  length: int = 0
  new: int = 256
  bos: str = "auto"
  greedy: bool = False
  sampler: dict = dataclasses.field(default_factory=dict)
  seed: int = 0

  def __post_init__(self):
    for name in ("batch_size", "draws", "new"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
    if self.bos not in ("auto", "always", "never"):
      raise ValueError(f"bos is {self.bos!r}; expected 'auto', 'always' or 'never'")


@dataclasses.dataclass(frozen=True)
class Score:
  """The likelihood of a continuation.

  Fields:
    nats: log p, at most 0; a lower bound of it where the model's likelihood is bounded.
    stderr: of `nats`, from the finite number of draws; 0 if exact.
    tokens: scored.
    greedy: it is what greedy decoding writes.
    cut: tokens of the context that did not fit.
  """

  nats: float
  stderr: float
  tokens: int
  greedy: bool
  cut: int


@dataclasses.dataclass
class Speed:
  """What generation took.

  Fields:
    tokens, forwards: generated tokens; forwards that their rows took part in, the prompts' left out: tokens
      per forward is 1 for a next-token model.
    seconds, timed_tokens: of the batches of a shape seen before, so that compilation is left out.
  """

  tokens: int = 0
  forwards: float = 0.0
  seconds: float = 0.0
  timed_tokens: int = 0

  def report(self) -> dict:
    """{"tokens", "tokens_per_forward", "tokens_per_second"}; what was not measured is None."""
    return {
      "tokens": self.tokens,
      "tokens_per_forward": self.tokens / self.forwards if self.forwards else None,
      "tokens_per_second": self.timed_tokens / self.seconds if self.seconds else None,
    }


class TextModel:
  """A run, asked about texts.

  Args:
    run: sampling.run.Run.
    cfg: TextConfig.

  Raises:
    ConfigError: the data have no tokenizer, or the model has fewer positions than `cfg.length`.
  """

  def __init__(self, run: runs.Run, cfg: TextConfig = TextConfig()):
    self.run, self.cfg = run, cfg
    self.tokenizer, self.meta = run.parts.data.tokenizer, run.parts.data.meta
    if self.tokenizer is None:
      raise ConfigError(
        "these data have no tokenizer, so no text can be evaluated", key="data", fix="a text run"
      )
    self.length = cfg.length or self.meta.seq_len
    limit = run.parts.model.cfg.learned_pos
    if 0 < limit < self.length:
      raise ConfigError(
        f"the model has {limit} learned positions", key="length", value=self.length, fix=f"at most {limit}"
      )
    shards = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
    self.rows = -(-cfg.batch_size // shards) * shards
    self.speed = Speed()
    self._seen: set = set()
    objective = at_step(run.parts.objective, run.step, cfg.block)[0].of_texts()
    with rules.use_mesh(run.mesh):
      fns = system.functions(run.parts.cfg, run.parts.exact)
      self.likelihood = Likelihood(objective, fns, run.parts.latent, cfg.draws)
      self._exact = jax.jit(self._exactly, out_shardings=rules.replicated(run.mesh))

  @property
  def exact(self) -> bool:
    """Scores are log-likelihoods, not bounds."""
    return self.likelihood.exact

  # -- tokens ---------------------------------------------------------------------------------------

  def encode(self, text: str, *, start: bool = True) -> np.ndarray:
    """Ids int32[n] of a text; with `start` as the beginning of a document, see `TextConfig.bos`."""
    published = getattr(self.tokenizer, "encode_published", None)
    ids = np.asarray(published(text) if published else self.tokenizer.encode(text), np.int32)
    added = np.asarray(published("") if published else [], np.int32)
    if added.size and (not start or self.cfg.bos == "never"):
      ids = ids[len(added) :]
    bos = self.meta.specials.get("bos", -1)
    wanted = start and bos >= 0 and {"auto": not added.size, "always": True, "never": False}[self.cfg.bos]
    if wanted and not (ids.size and ids[0] == bos):
      ids = np.concatenate([np.asarray([bos], np.int32), ids])
    if ids.size and int(ids.max()) >= self.meta.vocab_size:
      raise ConfigError(
        f"the tokenizer makes id {int(ids.max())}", key="model.vocab", value=self.meta.vocab_size,
        fix="the tokenizer of this checkpoint",
      )  # fmt: skip
    return ids

  def pair(self, context: str, continuation: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a context and of what follows, cut where the context's own tokens end.

    White space at the end of the context goes to the continuation, as a tokenizer would have it.
    """
    bare = context.rstrip()
    continuation = context[len(bare) :] + continuation
    head, whole = self.encode(bare), self.encode(bare + continuation)
    if not head.size:  # nothing to start from: what separates documents does
      special = self.meta.specials
      prefix = next((special[k] for k in ("bos", "eos") if special.get(k, -1) >= 0), None)
      if prefix is None:
        raise ConfigError("an empty context, and no BOS or EOS to start from", key="context", fix="a context")
      return np.asarray([prefix], np.int32), whole
    return whole[: len(head)], whole[len(head) :]

  # -- likelihood -----------------------------------------------------------------------------------

  def score(self, pairs: Sequence[tuple[str, str]]) -> list[Score]:
    """The likelihood of each continuation given its context; long contexts lose their beginning.

    Raises:
      ConfigError: an empty continuation, or one that leaves no room for a token of context.
    """
    return self.score_ids([self.pair(*p) for p in pairs])

  def score_ids(self, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[Score]:
    """`score` of ids."""
    pieces = []
    for i, (context, rest) in enumerate(pairs):
      if not 0 < len(rest) < self.length:
        raise ConfigError(
          f"continuation {i} has {len(rest)} tokens, rows have {self.length} and one of them is context",
          key="length", value=self.length, fix="a continuation of at least one token, or longer rows",
        )  # fmt: skip
      kept = context[max(0, len(context) + len(rest) - self.length) :]
      pieces.append((i, 0, np.concatenate([kept, rest]), len(kept)))
    out: dict[int, Score] = {}
    for N, group in _by_length(pieces, self.length):
      for at, batch in zip(range(0, len(group), self.rows), piece_batches(group, N, self.rows, self.meta)):
        nats, spread, tokens, greedy = self._score(batch)
        for b, (i, *_, given) in enumerate(group[at : at + self.rows]):
          cut = len(pairs[i][0]) - given
          out[i] = Score(-float(nats[b]), float(spread[b]), int(tokens[b]), bool(greedy[b]), cut)
    if not self.exact and self.cfg.greedy:
      drafts = self._greedy([p for p, _ in pairs], [len(r) for _, r in pairs])
      for i, (_, rest) in enumerate(pairs):
        same = len(drafts[i]) >= len(rest) and (drafts[i][: len(rest)] == rest).all()
        out[i] = dataclasses.replace(out[i], greedy=bool(same))
    return [out[i] for i in range(len(pairs))]

  def rolling(self, texts: Sequence[str]) -> list[Score]:
    """The likelihood of whole texts: every token once, in windows of full length; the last window keeps as
    many tokens of context as fit. An empty text has likelihood one."""
    windows, owner = [], []
    for i, text in enumerate(texts):
      head, rest = self.pair("", text)
      ids, first = np.concatenate([head, rest]), len(head)
      while first < len(ids):
        end = min(first + self.length - 1, len(ids))
        windows.append((ids[max(0, end - self.length) : first], ids[first:end]))
        owner.append(i)
        first = end
    total = [Score(0.0, 0.0, 0, True, 0) for _ in texts]
    for i, s in zip(owner, self.score_ids(windows)):
      t = total[i]
      spread = float(np.hypot(t.stderr, s.stderr))
      total[i] = Score(t.nats + s.nats, spread, t.tokens + s.tokens, t.greedy and s.greedy, 0)
    return total

  def _score(self, batch):
    """(negative log-likelihood, its standard error, tokens, greedy), [B] each."""
    run, key = self.run, jax.random.key(self.cfg.seed)
    with rules.use_mesh(run.mesh):
      row = system.row_of(multihost.whole_batch(batch, run.mesh))
      if self.exact:
        nll, tokens, greedy = jax.device_get(self._exact(run.trees, row, key))
        return nll[:, 0].astype(np.float64), np.zeros(len(nll)), tokens[:, 0], greedy[:, 0]
      nll, tokens = self.likelihood(run.trees, row, key)
    R = len(nll)
    spread = np.sqrt(nll.var(0, ddof=1) / R) if R > 1 else np.zeros(nll.shape[1])
    return nll.mean(0), spread, tokens, np.zeros(nll.shape[1], bool)

  def _exactly(self, trees, row, key):
    """(nll, tokens, greedy) [B, D] of one pass over the clean stream."""
    objective = self.likelihood.objective
    nets = bind(self.likelihood.fns, trees, self.run.parts.latent, player="")
    inputs, targets, _ = objective.prepare(row, key, 0, nets.latent, bound=(0, 1))
    dist = nets["model"](inputs, targets).dists[objective.likelihood]
    target = targets[objective.likelihood]

    def one(z, value):
      taken = jnp.take_along_axis(z, value[..., None], -1)[..., 0]
      return jax.nn.logsumexp(z, -1) - taken, jnp.argmax(z, -1) != value

    nll, wrong = dist.map(one, target.value)
    asked = target.slot >= 0
    D = row.docs.occurrence.shape[1]
    nll, tokens, wrong = (
      per_doc(row.doc, jnp.where(asked, x, 0).astype(jnp.float32), D) for x in (nll, asked, wrong)
    )
    return nll, tokens, wrong == 0

  # -- generation -----------------------------------------------------------------------------------

  def generate(
    self,
    prompts: Sequence[str],
    new: int = 0,
    until: Sequence[str] = (),
    sampler: Mapping[str, Any] | None = None,
  ) -> list[str]:
    """What the model writes behind each prompt; long prompts lose their beginning.

    Args:
      new: tokens at most; 0 takes `TextConfig.new`.
      until: strings that end a text; they are cut off.
      sampler: changes to the sampler section for this call.
    """
    ids = self.write([self.encode(p) for p in prompts], [new or self.cfg.new] * len(prompts), sampler)
    return [self._until(self.tokenizer.decode(x), until) for x in ids]

  def _greedy(self, prompts, lengths):
    return self.write(prompts, lengths, {"temperature": 0.0}, timed=False)

  def write(self, prompts, lengths, section=None, timed=True) -> list[np.ndarray]:
    """Ids generated behind each prompt, at most `lengths` of them; EOS is not among them."""
    sampler = self.sampler(section)
    pieces = []
    for i, (prompt, new) in enumerate(zip(prompts, lengths)):
      if new >= self.length:
        raise ConfigError(
          f"{new} new tokens leave no room for a prompt in rows of {self.length}", key="new", value=new,
          fix=f"at most {self.length - 1}",
        )  # fmt: skip
      kept = prompt[max(0, len(prompt) + new - self.length) :]
      pieces.append((i, new, np.concatenate([kept, np.zeros(new, np.int32)]), len(kept)))
    out: dict[int, np.ndarray] = {}
    for N, group in _by_length(pieces, self.length):
      for at in range(0, len(group), self.rows):
        part = group[at : at + self.rows]
        for (i, *_), ids in zip(part, self._batch(sampler, part, N, timed)):
          out[i] = ids
    return [out[i] for i in range(len(prompts))]

  def _batch(self, sampler, part, N, timed):
    full = part + [part[-1]] * (self.rows - len(part))  # rows that repeat: shapes stay
    row = prompt_row(
      [ids[:given] for *_, ids, given in full], N, max(new for _, new, *_ in full),
      example_ids=np.asarray([(0, i) for i, *_ in full], np.uint32),
      pad=max(self.meta.specials.get("pad", 0), 0), axes=self.meta.axes,
    )  # fmt: skip
    # A row ends where its own length says, not where the longest of the batch does.
    ends = np.asarray([len(ids) for *_, ids, _ in full])[:, None]
    row = row.replace(doc=jnp.where(np.arange(N)[None] < ends, row.doc, -1))
    shape = id(sampler), N, sampler.prefill_width(row)
    with rules.use_mesh(self.run.mesh):
      start = time.perf_counter()
      got = sampler(runs.parameters(self.run.parts, self.run.trees), row, jax.random.key(self.cfg.seed))
      got = jax.device_get(jax.block_until_ready(got))
      seconds = time.perf_counter() - start
    out = []
    for b, (_, _, _, given) in enumerate(part):
      ids = got.tokens[b, given : int(got.lengths[b])]
      eos = np.flatnonzero(ids == sampler.cfg.eos)
      out.append(ids[: eos[0]] if eos.size else ids)
    if timed:
      self._count(sampler, got, part, shape, seconds)
    return out

  def _count(self, sampler, got, part, shape, seconds):
    generated = sum(int(got.lengths[b]) - given for b, (*_, given) in enumerate(part))
    self.speed.tokens += generated
    calls = sum(n for kind, n in got.calls.items() if kind != "prefill")
    self.speed.forwards += int(calls[: len(part)].sum())
    if shape in self._seen and len(part) == self.rows:
      self.speed.seconds += seconds
      self.speed.timed_tokens += generated
    self._seen.add(shape)

  def sampler(self, section: Mapping[str, Any] | None = None):
    """The run's sampler with the changes of the config and of this call; made once for each."""
    whole = config.plain(self.run.cfg.get("sampler")) or {}
    whole = config.merged(config.merged(whole, self.cfg.sampler), section or {})
    if self.cfg.block:
      whole["block"] = self.cfg.block
    with rules.use_mesh(self.run.mesh), warnings.catch_warnings():
      warnings.filterwarnings("ignore", message="sampler.block")  # it was asked for
      return runs.sampler_of(self.run.parts, self.run.step, whole)

  @staticmethod
  def _until(text: str, until: Sequence[str]) -> str:
    ends = [text.index(u) for u in until if u and u in text]
    return text[: min(ends)] if ends else text


def _by_length(pieces, longest: int):
  """(row length, pieces) by the smallest row that holds them: a power of two times SHORTEST, or `longest`."""
  groups: dict[int, list] = {}
  for piece in sorted(pieces, key=lambda p: len(p[2])):
    N = SHORTEST
    while N < len(piece[2]):
      N *= 2
    groups.setdefault(min(N, longest), []).append(piece)
  return sorted(groups.items())
