"""The periodic evaluation of a run: the fixed held-out set, by the estimator of `genmodels eval`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from genmodels import system
from genmodels.config import ConfigError
from genmodels.evals.likelihood import Likelihood, Tally, notes
from genmodels.parallel import multihost, rules
from genmodels.sampling import at_step

METRIC = "bits_per_token"


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """Section `eval`.

  Fields:
    every: training steps between evaluations (and one at the end); 0 never evaluates.
    documents: held-out documents (pieces, where long ones are cut), the first so many; 0 takes all.
    draws: R, draws of the likelihood bound per document, the same for every step and every run. An
      exact likelihood takes one.
    batch_size: rows of an evaluation batch; 0 takes the training batch.
  """

  every: int = 0
  documents: int = 256
  draws: int = 16
  batch_size: int = 0

  def __post_init__(self):
    if self.draws < 1:
      raise ValueError(f"draws is {self.draws}; it must be at least 1")
    if min(self.every, self.documents, self.batch_size) < 0:
      raise ValueError("every, documents and batch_size must be at least 0")


class Evaluator:
  """evaluator(trees, step) → the report of Tally, over the held-out set of a system.

  Args:
    cfg: EvalConfig. parts: system.System. mesh: where rows are spread. key: of the run.
  """

  def __init__(self, cfg: EvalConfig, parts: system.System, mesh, key):
    self.cfg, self.parts, self.mesh, self.key = cfg, parts, mesh, key
    self.batch_size = cfg.batch_size or int(parts.cfg.batch_size)
    self.data = parts.data.heldout(self.batch_size)
    self._made: dict[int, Likelihood] = {}

  def likelihood(self, step: int, block: int = 0) -> Likelihood:
    """The estimator at the block size of a training step, or at `block`; compiled once for each size."""
    objective, trained = at_step(self.parts.objective, step, block)
    size = block or trained
    if size not in self._made:
      with rules.use_mesh(self.mesh):
        fns = system.functions(self.parts.cfg, self.parts.exact)
        self._made[size] = Likelihood(objective, fns, self.parts.latent, self.cfg.draws)
    return self._made[size]

  def __call__(self, trees, step: int = 0, block: int = 0) -> dict:
    """Evaluates `trees` ({"model": …}); `step` fixes what the objective schedules.

    Returns:
      Tally.report, "draws", "exact", and "notes" that belong beside the number.
    """
    batches = (self.data.batch(i) for i in range(self.data.plan.steps))
    return self._over(batches, trees, step, block, self.cfg.documents or 1 << 62)

  def of_texts(self, trees, texts: Sequence[str], step: int = 0, block: int = 0) -> dict:
    """The same for texts, each one a document, cut into rows as training cuts them.

    Raises:
      ConfigError: the data have no tokenizer.
    """
    if self.data.tokenizer is None:
      raise ConfigError(
        "these data have no tokenizer, so no text can be evaluated", key="data", fix="leave --file out"
      )
    return self._over(self._text_batches(texts), trees, step, block, 1 << 62)

  def of_published(self, trees, texts: Sequence[str], length: int = 0, step: int = 0, block: int = 0) -> dict:
    """The same for texts as the publisher of the tokenizer encodes them: BOS where its post-processor puts
    it, no EOS, and what lies behind `length` tokens cut off (0: the data's seq_len). One text is one row.

    Raises:
      ConfigError: no tokenizer, a text without a token to predict, or `length` beyond learned positions.
    """
    tokenizer = self.data.tokenizer
    if not hasattr(tokenizer, "encode_published"):
      raise ConfigError(
        "no tokenizer.json, so no text can be evaluated as its publisher would", key="data",
        value=type(tokenizer).__name__, fix="a folder with a tokenizer.json, or --file",
      )  # fmt: skip
    limit = self.parts.model.cfg.learned_pos
    if length and limit and length > limit:
      raise ConfigError(
        f"the model has {limit} positions", key="--length", value=length, fix=f"at most {limit}"
      )
    length = length or self.data.meta.seq_len
    whole = [tokenizer.encode_published(text) for text in texts]
    rows = [ids[:length] for ids in whole]
    for i, ids in enumerate(rows):
      if len(ids) < 2:
        raise ConfigError(
          "a text of one token has nothing to predict", key="--text", value=i, fix="a longer text"
        )
      if int(ids.max()) >= self.data.meta.vocab_size:
        raise ConfigError(
          f"the tokenizer makes id {int(ids.max())}", key="model.vocab", value=self.data.meta.vocab_size,
          fix="the tokenizer of this checkpoint",
        )  # fmt: skip
    size = max(map(len, rows))
    bos = self.data.meta.specials.get(
      "bos", -1
    )  # given, as in training: a diffusion model does not pay for it
    pieces = [(i, 0, ids, int(ids[0] == bos)) for i, ids in enumerate(rows)]
    shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
    batches = piece_batches(pieces, size, shards, self.data.meta)
    result = self._over(batches, trees, step, block, 1 << 62)
    if lost := [len(ids) - length for ids in whole if len(ids) > length]:
      what = f"{len(lost)} of {len(whole)} texts cut at {length} tokens"
      result["notes"].append(f"{what}: {sum(lost)} tokens were not read")
    return result

  def _over(self, batches, trees, step, block, limit) -> dict:
    """Evaluates whole batches (every process needs the bytes of all documents)."""
    likelihood = self.likelihood(step, block)
    tally = Tally()
    with rules.use_mesh(self.mesh):
      for batch in batches:
        if tally.documents >= limit:
          break
        size = self.data.bytes_of(batch).reshape(-1)
        row = system.row_of(multihost.whole_batch(batch, self.mesh))
        nll, tokens = likelihood(trees, row, self.key)
        left = limit - tally.documents
        keep = np.cumsum(tokens > 0) <= left
        tally.add(nll[:, keep], tokens[keep], size[keep])
    remarks = notes(likelihood.objective)
    return {**tally.report(), "draws": likelihood.draws, "exact": likelihood.exact, "notes": remarks}

  def _text_batches(self, texts):
    """Batches of one piece a row; a piece begins with the last token of the one before it, as CONTEXT."""
    meta = self.data.meta
    N, special = meta.seq_len, meta.specials
    pieces = []
    for i, text in enumerate(texts):
      ids = np.asarray(self.data.tokenizer.encode(text), np.int32)
      ends = [np.asarray([special[k]] if special.get(k, -1) >= 0 else [], np.int32) for k in ("bos", "eos")]
      ids = np.concatenate([ends[0], ids, ends[1]])
      starts = range(0, max(len(ids) - 1, 1), N - 1)
      pieces += [(i, j, ids[a : a + N], len(ends[0]) if a == 0 else 1) for j, a in enumerate(starts)]
    return piece_batches(pieces, N, self.batch_size, meta)


def piece_batches(pieces, N: int, B: int, meta):
  """Batches [B, N] of pieces (text, index, ids, tokens given), one a row; the given ones are CONTEXT.

  Args:
    meta: data.Meta: the padding id and the number of position axes.
  """
  for first in range(0, len(pieces), B):
    tokens = np.full((B, N), max(meta.specials.get("pad", 0), 0), np.int32)
    doc, role = np.full((B, N), -1, np.int32), np.zeros((B, N), np.int32)
    example = np.zeros((B, 1, 2), np.uint32)
    for b, (i, j, ids, given) in enumerate(pieces[first : first + B]):
      tokens[b, : len(ids)], doc[b, : len(ids)], role[b, given : len(ids)] = ids, 0, 1
      example[b, 0] = i, j
    zero = np.zeros((B, 1), np.int32)
    yield {
      "tokens": tokens, "doc": doc, "role": role,
      "modality": np.zeros_like(doc), "index": np.full_like(doc, -1),
      "pos": np.tile(np.arange(N, dtype=np.float32)[None, :, None], (B, 1, meta.axes)),
      "example_id": example, "occurrence": zero, "mode": zero, "source": zero,
      "rank": np.stack([np.arange(B), np.full(B, B)], -1)[:, None].astype(np.int32),
    }  # fmt: skip
