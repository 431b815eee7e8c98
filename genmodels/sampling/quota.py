"""Quotas: how many, and which, of the masked tokens of a unit are committed in one step.

A *unit* is what is denoised together: a document, a block, or a sub-block of one (semi-autoregressive).

Legend: B rows · M tokens asked for.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from genmodels.contracts import pytree
from genmodels.corruption.absorb import level_of, masked_probability

Array = jax.Array


@pytree()
class Unit:
  """What a quota may look at.

  Fields:
    can: bool[B, M], masked tokens that this forward predicts; at: int32[B, M], where they are in the row.
    score: float32[B, M], how sure the model is of them.
    rank: float32[B, M], what orders them: the score, or what a commit rule puts in its place.
    least: int32[B], how many are committed at the least.
    k: int32[B], steps taken in this unit. size: int32[B], masked tokens at its start.
    level: float32[B], noise level t, 1 at the start of the unit.
    token_u: float32[B, M], row_u: float32[B], fresh uniforms.
    sigma: float32[B], probability that a committed token is opened again in this step (ReMDM); None: 0.
  """

  can: Array
  at: Array
  score: Array
  rank: Array
  least: Array
  k: Array
  size: Array
  level: Array
  token_u: Array
  row_u: Array
  sigma: Array | None = None

  @property
  def left(self) -> Array:
    """int32[B], masked tokens left."""
    return self.can.sum(1, dtype=jnp.int32)


def descending(unit: Unit, score: Array) -> tuple[Array, Array]:
  """int32[B, M] each: the tokens in the order of their score, candidates first and ties to the earlier one,
  and the rank of each token in it."""
  order = jnp.argsort(jnp.where(unit.can, -score, jnp.inf), axis=1, stable=True)
  return order, jnp.argsort(order, axis=1)


def best(unit: Unit, score: Array, count: Array) -> Array:
  """bool[B, M]: the `count` int32[B] candidates of highest score; ties go to the earlier token."""
  return unit.can & (descending(unit, score)[1] < count[:, None])


def share(unit: Unit, commit: Array) -> Array:
  """float32[B]: the part of the unit that is still masked after `commit`."""
  return (unit.left - commit.sum(1)) / jnp.maximum(unit.size, 1)


@dataclasses.dataclass(frozen=True)
class Quota:
  """Base. `select(unit)` gives (commit bool[B, M], the new level float32[B]).

  Class attributes, for the laws of `sampling.build`:
    reuse: a step may leave a row as it is, so that its predictions stay valid.
    timed: `level` is a time of its own, which a network may be conditioned on; else the share masked.
    stateless: looks at no step count and no size, so it serves several blocks, or a sliding window.
    counts: chooses a number of tokens by rank (else: tokens that pass a test of their own).
    scores: the kinds of score under which it means what its source says; empty: all.
  """

  reuse = False
  timed = False
  stateless = False
  counts = False
  scores = ()

  def bound(self, size: int) -> int:
    """The most steps a unit of `size` tokens takes."""
    raise NotImplementedError

  def select(self, unit: Unit) -> tuple[Array, Array]:
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Stepped(Quota):
  """`steps` steps a unit, each of a number of tokens.

  Fields:
    steps: of a unit, or of a sub-block.
  """

  steps: int = 32
  counts = True

  def __post_init__(self):
    if self.steps < 1:
      raise ValueError(f"steps is {self.steps}; a unit takes at least one step")

  def bound(self, size):
    return min(self.steps, size)

  def count(self, unit: Unit) -> Array:
    """int32[B]: tokens to commit now."""
    raise NotImplementedError

  def select(self, unit):
    commit = best(unit, unit.rank, self.count(unit))
    return commit, share(unit, commit)


@dataclasses.dataclass(frozen=True)
class Linear(Stepped):
  """Equal integer parts of the masked tokens, the remainder in the first steps (LLaDA, 2502.09992)."""

  def count(self, unit):
    return unit.size // self.steps + (unit.k < unit.size % self.steps)


@dataclasses.dataclass(frozen=True)
class Cosine(Stepped):
  """⌊size·cos(π(k+1)/2T)⌋ tokens stay masked after step k of T; at least one is committed (MaskGIT)."""

  def masked(self, r: Array) -> Array:
    """The share that stays masked at progress r in [0, 1]."""
    return jnp.cos(jnp.pi / 2 * r)

  def count(self, unit):
    r = (unit.k + 1) / self.steps
    stay = jnp.floor(unit.size * self.masked(jnp.minimum(r, 1.0)) + 1e-4).astype(jnp.int32)
    return jnp.clip(unit.left - jnp.where(r >= 1, 0, stay), 1, None)


@dataclasses.dataclass(frozen=True)
class Shifted(Cosine):
  """The share t' = αt/(1 + (α−1)t) stays masked at time t = 1 − (k+1)/T (LaViDa, 2505.16839 §3.3): α < 1
  commits more in the first steps, α = 1 is linear in time. At least one token a step.

  Fields:
    alpha: the shift.
  """

  alpha: float = 1 / 3

  def __post_init__(self):
    super().__post_init__()
    if self.alpha <= 0:
      raise ValueError(f"alpha is {self.alpha}; a time shift is positive, and 1 leaves time as it is")

  def masked(self, r):
    return self.alpha * (1 - r) / (1 + (self.alpha - 1) * (1 - r))


@dataclasses.dataclass(frozen=True)
class Share(Stepped):
  """⌊masked·(1 − s/t)⌋ tokens as t falls from 1 to `eps` in equal parts; the last step commits the rest
  (Dream, 2508.15487).

  Fields:
    eps: t after the last step.
    at_least: 1 commits a token in every step; 0 is the released rule, whose steps may commit none.
  """

  eps: float = 1e-3
  at_least: int = 1

  def bound(self, size):
    return self.steps

  def count(self, unit):
    time = lambda k: 1 - (1 - self.eps) * k / self.steps
    rate = 1 - time(unit.k + 1) / time(unit.k)
    count = jnp.maximum(jnp.floor(unit.left * rate).astype(jnp.int32), self.at_least)
    return jnp.where(unit.k + 1 >= self.steps, unit.left, count)


@dataclasses.dataclass(frozen=True)
class Doubling(Quota):
  """2^i tokens in step i of ⌊log₂ size⌋, the remainder in the last one (ASS: 2509.23924)."""

  counts = True

  def bound(self, size):
    return max(size.bit_length() - 1, 1)

  def select(self, unit):
    steps = 31 - jax.lax.clz(jnp.maximum(unit.size, 1))
    count = jnp.where(unit.k + 1 >= steps, unit.left, jnp.left_shift(1, jnp.minimum(unit.k, 30)))
    commit = best(unit, unit.rank, count)
    return commit, share(unit, commit)


@dataclasses.dataclass(frozen=True)
class RandomSizes(Stepped):
  """The sizes of the steps are a random composition of the unit: one token each, and uniform spacings of the
  rest (stick breaking: the next part is Beta(1, steps left − 1)). Randomised sizes adapt to the total
  correlation of the tokens (2602.20126); the law of the sizes there is another one (unverified)."""

  def count(self, unit):
    later = jnp.maximum(self.steps - 1 - unit.k, 0)  # steps after this one
    spare = jnp.maximum(unit.left - later - 1, 0)
    part = 1 - unit.row_u ** (1 / jnp.maximum(later, 1))
    count = 1 + jnp.round(spare * part).astype(jnp.int32)
    return jnp.where(later == 0, unit.left, count)


@dataclasses.dataclass(frozen=True)
class Threshold(Quota):
  """Every token whose score exceeds `tau`, and always the best one (Fast-dLLM, SDAR dynamic). Entropies are
  compared as −H > tau, so tau is negative there (WeDLM's H + λd < .4 is tau = −.4)."""

  tau: float = 0.9
  stateless = True

  def bound(self, size):
    return size

  def select(self, unit):
    commit = best(unit, unit.rank, unit.least) | (unit.can & (unit.score > self.tau))
    return commit, share(unit, commit)


@dataclasses.dataclass(frozen=True)
class Factor(Quota):
  """The n surest tokens, n the largest with (n+1)(1 − p₍ₙ₎) < f, and at least one (Fast-dLLM, 2505.22618
  §3.3: then the product of the marginals and the joint have the same argmax, for f ≤ 1).

  Fields:
    f: the factor.
  """

  f: float = 1.0
  stateless = True
  scores = ("prob",)

  def bound(self, size):
    return size

  def select(self, unit):
    order, rank = descending(unit, unit.score)
    p = jnp.take_along_axis(jnp.where(unit.can, unit.score, 0.0), order, 1)
    n = jnp.arange(1, p.shape[1] + 1)
    passes = ((n + 1) * (1 - p) < self.f) & (n <= unit.left[:, None])
    count = jnp.max(jnp.where(passes, n, 0), 1, initial=0)
    commit = (unit.can & (rank < count[:, None])) | best(unit, unit.rank, unit.least)
    return commit, share(unit, commit)


@dataclasses.dataclass(frozen=True)
class EntropyBudget(Quota):
  """The tokens of least entropy, as many as a budget of nats allows, and at least one.

  Fields:
    budget: nats.
    rule: "excess": Σ H − max H ≤ budget, a bound of the error of drawing them independently (EB-Sampler,
      2505.24857 eq. 8); "sum": up to and with the token at which Σ H reaches it (SDAR's entropy_bounded,
      .35).
  """

  budget: float = 0.1
  rule: str = "excess"
  stateless = True
  scores = ("neg_entropy",)

  def __post_init__(self):
    if self.rule not in ("excess", "sum"):
      raise ValueError(f"rule is {self.rule!r}; it must be 'excess' or 'sum'")

  def bound(self, size):
    return size

  def select(self, unit):
    order, rank = descending(unit, unit.score)
    H = jnp.take_along_axis(jnp.where(unit.can, -unit.score, 0.0), order, 1)
    before = jnp.cumsum(H, 1) - H  # in this order H is the largest so far, so this is Σ H − max H, too
    inside = before <= self.budget if self.rule == "excess" else before < self.budget
    count = jnp.sum(inside, 1, dtype=jnp.int32)
    commit = (unit.can & (rank < count[:, None])) | best(unit, unit.rank, unit.least)
    return commit, share(unit, commit)


@dataclasses.dataclass(frozen=True)
class All(Quota):
  """Everything at once: one step per unit (next-scale models, one-step drafts)."""

  stateless = True

  def bound(self, size):
    return 1

  def select(self, unit):
    return unit.can, jnp.zeros_like(unit.level)


@dataclasses.dataclass(frozen=True)
class FirstHitting(Quota):
  """One uniformly chosen token a step, at the time when the first of n masked tokens is revealed:
  p(t) ← p(t)·u^{1/n} (BD3-LM, 2503.09573 §B; Zheng et al. 2409.02908). Ancestral sampling with T → ∞.

  Fields:
    schedule: the corruption's; "" takes it from the objective.
  """

  schedule: str = ""
  timed = True

  def bound(self, size):
    return size

  def select(self, unit):
    commit = best(unit, unit.token_u, jnp.ones_like(unit.k))
    n = jnp.maximum(unit.left, 1)
    p = masked_probability(self.schedule, unit.level, 0.0) * unit.row_u ** (1 / n)
    level = level_of(self.schedule, p)
    return commit, jnp.where(unit.left > 0, level, unit.level)


@dataclasses.dataclass(frozen=True)
class Ancestral(Quota):
  """Each masked token is revealed with probability (p(t) − p(s))/p(t) as t falls from 1 to 0 in `steps`
  equal parts (MDLM's ddpm_cache; 2406.07524 eq. 7). The last step reveals what is left. With the linear
  schedule that is 1/(steps left), DiffuLLaMA's 1/(t+1) (2410.17891).

  Fields:
    reuse: keep the predictions while no row changes: the networks do not read t. The tokens are the
      same either way, only the number of forwards differs.
    schedule: the corruption's; "" takes it from the objective.
    hold: (t_on, t_off, α): the share α is reached at t_on, stays until t_off, and rises to 1 from there on
      (the times of ReMDM-loop, 2503.00307 §4.3: .55, .05, .9); empty: the schedule.
  """

  steps: int = 128
  reuse: bool = True
  schedule: str = ""
  hold: tuple[float, ...] = ()
  timed = True

  def __post_init__(self):
    if self.steps < 1:
      raise ValueError(f"steps is {self.steps}; a unit takes at least one step")
    if self.hold and not (len(self.hold) == 3 and 0 < self.hold[1] <= self.hold[0] < 1 > self.hold[2] > 0):
      raise ValueError(
        f"hold is {self.hold}; expected (t_on, t_off, α) with 0 < t_off <= t_on < 1, 0 < α < 1"
      )

  def bound(self, size):
    return self.steps

  def masked(self, t: Array) -> Array:
    """p(t), the probability that a token is masked."""
    if not self.hold:
      return masked_probability(self.schedule, t, 0.0)
    on, off, alpha = self.hold
    rise = jnp.minimum((1 - t) / (1 - on), 1.0) * alpha
    return 1 - jnp.where(t < off, 1 - (1 - alpha) * t / off, rise)

  def times(self, unit: Unit) -> tuple[Array, Array, Array]:
    """float32[B]: s, p(t) and p(s) of this step."""
    s = jnp.maximum(1 - (unit.k + 1) / self.steps, 0.0)
    return s, self.masked(1 - unit.k / self.steps), self.masked(s)

  def reveal(self, unit: Unit) -> Array:
    """float32[B]: the probability that a masked token is revealed. What is opened again with probability σ
    is made up for, so that the share of clean tokens is 1 − p(s) for every σ (ReMDM, 2503.00307 eq. 6)."""
    _, p_t, p_s = self.times(unit)
    gain = p_t - p_s if unit.sigma is None else p_t - p_s + unit.sigma * (1 - p_t)
    return jnp.where(unit.k + 1 >= self.steps, 1.0, gain / jnp.maximum(p_t, 1e-12))

  def select(self, unit):
    return unit.can & (unit.token_u < self.reveal(unit)[:, None]), self.times(unit)[0]


@dataclasses.dataclass(frozen=True)
class Binomial(Ancestral):
  """The number of tokens that ancestral sampling would reveal, a binomial draw, of those that rank highest
  (Eso-LM, 2506.01928 §4: the counts are drawn, then the tokens). With a random score: ancestral sampling."""

  counts = True

  def select(self, unit):
    revealed = unit.can & (unit.token_u < self.reveal(unit)[:, None])
    return best(unit, unit.rank, revealed.sum(1)), self.times(unit)[0]


REGISTRY = {
  "linear": Linear,
  "cosine": Cosine,
  "shifted": Shifted,
  "share": Share,
  "doubling": Doubling,
  "random_sizes": RandomSizes,
  "threshold": Threshold,
  "factor": Factor,
  "entropy_budget": EntropyBudget,
  "all": All,
  "first_hitting": FirstHitting,
  "ancestral": Ancestral,
  "binomial": Binomial,
}
