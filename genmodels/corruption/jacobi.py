"""States of Jacobi trajectories in place of clean tokens: what a model makes of a guess before it is right.

Consistency language models (Kou et al., "CLLMs", arXiv:2403.00835) and Jacobi Forcing (Hu et al., "Fast and
Accurate Causal Parallel Decoding using Jacobi Forcing", arXiv:2512.14681). `genmodels collect` decodes texts
in spans of n tokens and keeps every state of a span on its way to the fixed point, which is the text; a row
carries them as codes of its positions, `docs.side["codes"]` int32[B, N, 1 + n]: the token, then the states in
their order, and the token again where the span had fewer.

Legend: B rows · N clean tokens · K states of a position (n).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp

from genmodels import rows
from genmodels.config import ConfigError
from genmodels.contracts import Array, Noise, Row
from genmodels.corruption import rng
from genmodels.corruption.base import Corruption, eligible


@dataclasses.dataclass(frozen=True)
class JacobiState(Corruption):
  """Each span shows one state of its trajectory; a token is hit where that state is wrong.

  `blocks` are the windows of the attention mask, each of one or more spans: a noisy slot sees the noise of
  its own window, and the text before it.

  Fields:
    span: n, tokens of a trajectory, as collected.
    law: which state. "uniform": one of those that are not the fixed point yet, all alike. "progressive": the
      one whose share of wrong tokens is nearest to a target that rises from span to span of a window, and
      begins anew in the next window; the fixed point is a state too, of equal ones the earliest is taken.
    wrong: share of wrong tokens that a window's first span, and its last, are to have ("progressive").
  """

  span: int = 16
  law: Literal["uniform", "progressive"] = "uniform"
  wrong: tuple[float, float] = (0.0, 1.0)

  absorbing = False

  def __post_init__(self):
    super().__post_init__()
    window = 0 if self.blocks.whole or self.blocks.sizes else self.blocks.size.table
    if self.blocks.anchor != "response" or not window or len(window) > 1:
      raise ValueError(
        "windows have one size and begin where the answer does: blocks={'size': n, 'anchor': 'response'}"
      )
    if self.span < 2 or int(window[0]) % self.span:
      raise ValueError(
        f"span is {self.span}, blocks.size {int(window[0])}; at least 2 tokens, and a multiple of the span"
      )
    if not all(0 <= x <= 1 for x in self.wrong):
      raise ValueError(f"wrong is {self.wrong}; the shares lie in [0, 1]")
    if self.law == "progressive" and int(window[0]) == self.span:
      raise ValueError(
        "law is 'progressive', but a window has one span: nothing rises; blocks.size=16 * span, or 'uniform'"
      )

  @property
  def window(self) -> int:
    """Spans of a window."""
    return int(self.blocks.size.table[0]) // self.span

  def spans(self, row: Row, step=0) -> tuple[Array, Array]:
    """The span [lo, hi) of every token, two int32[B, N]; of given tokens it means nothing."""
    lo, hi = self.blocks.bounds(row, step)
    return rows.block_bounds(lo, hi, self.span, lo)

  def symbolic(self, row: Row) -> Row:
    codes = jnp.ones((*row.tokens.shape, 1 + self.span), row.tokens.dtype).at[..., 0].set(0)
    return row.replace(
      tokens=codes[..., 0], docs=dataclasses.replace(row.docs, side={**row.docs.side, "codes": codes})
    )

  def draw(self, row: Row, key: Array, step, latent=None, bound: tuple | None = None) -> Noise:
    lo, hi = self.blocks.bounds(row, step)
    if bound is not None:  # likelihoods are of the clean stream
      value = row.tokens
      level = jnp.zeros(value.shape, jnp.float32)
    else:
      value, level = self.shown(row, key, step, *self.spans(row, step))
    hit = eligible(row) & (value != row.tokens)
    ones = jnp.ones_like(level[:, None])
    drop = self.dropped(row, key, step, bound)
    return self.noise(row, lo, hi, hit[:, None], level[:, None], ones, value=value[:, None], drop=drop)

  def shown(self, row: Row, key: Array, step, lo: Array, hi: Array) -> tuple[Array, Array]:
    """The state of every span [lo, hi): tokens int32[B, N], and its share of wrong ones float32[B, N].

    Raises:
      ConfigError: rows without trajectories, or with those of another span.
    """
    codes = row.docs.side.get("codes")
    if codes is None or codes.shape[-1] != 1 + self.span:
      found = "no trajectories" if codes is None else f"trajectories of {codes.shape[-1] - 1} tokens"
      raise ConfigError(
        f"the data hold {found}", key="objective.corruption.span", value=self.span,
        fix="data.path=<what `genmodels collect` wrote>, with its --span",
      )  # fmt: skip
    ok = eligible(row)
    states = codes[..., 1:]
    wrong = jnp.stack(
      [rows.count_in(lo, hi, ok & (states[..., k] != row.tokens)) for k in range(self.span)], -1
    )
    share = wrong / jnp.maximum(rows.count_in(lo, hi, ok), 1)[..., None]
    if self.law == "uniform":
      unsettled = (wrong > 0).sum(-1)  # they come first
      doc_lo, _ = rows.doc_bounds(row.doc)
      u = rng.token_uniform(row, key, step, 0, rng.WHICH, at=lo - doc_lo)
      choice = jnp.minimum((u * unsettled).astype(jnp.int32), jnp.maximum(unsettled - 1, 0))
    else:
      window_lo, _ = self.blocks.bounds(row, step)
      first, last = self.wrong
      place = (lo - window_lo) // self.span
      target = first + (last - first) * place / (self.window - 1)
      states = jnp.concatenate([states, row.tokens[..., None]], -1)
      share = jnp.concatenate([share, jnp.zeros_like(share[..., :1])], -1)
      choice = jnp.argmin(jnp.abs(share - target[..., None]), -1)
    pick = lambda x: jnp.take_along_axis(x, choice[..., None], -1)[..., 0]
    return pick(states), pick(share).astype(jnp.float32)
