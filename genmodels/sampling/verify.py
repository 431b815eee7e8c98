"""Accepting drafts: rules that keep the target's law, and the walk along the accepted tokens.

Target p, draft x ~ q. Rejection (Leviathan et al. 2211.17192; Chen et al. 2302.01318) accepts x with
probability min(1, p(x)/q(x)) and else draws from (p − q)₊/‖(p − q)₊‖; the result has law p, and x is accepted
with probability 1 − TV(p, q). With k independent drafts, k-SEQ (SpecTr, Sun et al. 2310.15141) accepts each
in turn with min(1, p/(ρq)); with β(ρ) = Σ min(q, p/ρ) the residual is p − min(q, p/ρ)·(1 − (1 − β)^k)/β, a
distribution up to scale for every ρ with 1 − (1 − β)^k ≤ ρβ; the least such ρ lies in [1, k].

For a draft that is no draw (q one-hot at x), rejection is: draw y ~ p, accept if y = x, take y otherwise. As
`match`
it holds for any drafts, at any temperature and token by token: what comes out is what the target draws with
these keys, whatever was proposed. At temperature 0 that is greedy decoding.

The primitives work in the dtype of their arguments, over any leading dimensions; the loop passes float32.

Legend: B rows · R chains · K drafts of a chain · M nodes of a call · c nodes of a chunk · V vocabulary.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from genmodels.contracts import pytree
from genmodels.sampling import draw

Array = jax.Array


# -- primitives -------------------------------------------------------------------------------------


def at(p: Array, token: Array) -> Array:
  """p[..., V] at token int32[...] or int32[..., R] (the leading dimensions of p, and R)."""
  index = token if token.ndim == p.ndim else token[..., None]
  found = jnp.take_along_axis(p, jnp.clip(index, 0, p.shape[-1] - 1), -1)
  return found if token.ndim == p.ndim else found[..., 0]


def normalised(weight: Array, otherwise: Array) -> Array:
  """Weights [..., V] ≥ 0 scaled to sum 1; `otherwise` where they are all 0 (p = q up to rounding: no mass is
  left, and the event that would draw from it has probability 0)."""
  total = weight.sum(-1, keepdims=True)
  return jnp.where(total > 0, weight / jnp.where(total > 0, total, 1), otherwise)


def accept_probability(p: Array, q: Array, token: Array, rho=1.0) -> Array:
  """min(1, p(x)/(ρ·q(x))) of a token drawn from q; [...] or [..., R] as `token`.

  Args:
    p, q: [..., V]. rho: ≥ 1, broadcast against the result.
  """
  tiny = jnp.finfo(p.dtype).tiny
  return jnp.minimum(1, at(p, token) / jnp.maximum(rho * at(q, token), tiny))


def residual(p: Array, q: Array) -> Array:
  """(p − q)₊/‖(p − q)₊‖ [..., V]: the law after a rejection."""
  return normalised(jnp.maximum(p - q, 0), p)


def one_of(beta: Array, k) -> Array:
  """1 − (1 − β)^k, the probability that one of k drafts is accepted, without cancellation."""
  return -jnp.expm1(k * jnp.log1p(-jnp.minimum(beta, 1 - jnp.finfo(beta.dtype).epsneg)))


def overlap(p: Array, q: Array, rho: Array) -> Array:
  """β(ρ) = Σ_v min(q, p/ρ), [...]: the probability that one draft is accepted."""
  return jnp.minimum(q, p / rho[..., None]).sum(-1)


def solve_rho(p: Array, q: Array, k: int, steps: int = 24) -> Array:
  """ρ [...] of k-SEQ: the root of 1 − (1 − β)^k = ρβ in [1, k], by bisection.

  The upper end of the bracket is returned. It satisfies 1 − (1 − β)^k ≤ ρβ, so the law is p to rounding
  however few steps are taken; they only cost acceptance.
  """
  lo = jnp.ones(p.shape[:-1], p.dtype)
  if k == 1:
    return lo

  def halve(_, ends):
    lo, hi = ends
    mid = (lo + hi) / 2
    beta = overlap(p, q, mid)
    valid = one_of(beta, k) <= mid * beta
    return jnp.where(valid, lo, mid), jnp.where(valid, mid, hi)

  return jax.lax.fori_loop(0, steps, halve, (lo, lo * k))[1]


def kseq_residual(p: Array, q: Array, rho: Array, k: int) -> Array:
  """The law [..., V] after all k drafts of q were rejected at ρ."""
  if k == 1:
    return residual(p, q)
  beta = overlap(p, q, rho)
  scale = one_of(beta, k) / jnp.where(beta > 0, beta, 1)
  return normalised(jnp.maximum(p - jnp.minimum(q, p / rho[..., None]) * scale[..., None], 0), p)


def recursive(p: Array, q: Array, candidates: Array) -> tuple[list[Array], list[Array]]:
  """Rejection of candidates that were drawn from q one after another without replacement (recursive rejection
  sampling, Jeon et al. 2402.14160 §3.1): after a rejection p becomes the residual, q loses the candidate.

  Args:
    p, q: [..., V]. candidates: int32[..., C]; −1 behind the last one.

  Returns:
    C times [...], the probability that a candidate is accepted once those before it were not, and C + 1 times
    [..., V], the law after 0 … C rejections.
  """
  accept, laws = [], [p]
  for i in range(candidates.shape[-1]):
    x = candidates[..., i]
    there = (x >= 0)[..., None]
    accept.append(jnp.where(there[..., 0], accept_probability(p, q, x), 0))
    p = jnp.where(there, residual(p, q), p)
    left = jnp.where(jnp.arange(q.shape[-1]) == x[..., None], 0, q)
    q = jnp.where(there, normalised(left, left), q)
    laws.append(p)
  return accept, laws


def typical(p: Array, token: Array, epsilon: float, delta: float) -> Array:
  """bool: p(x) > min(ε, δ·exp(−H(p))) (Medusa, Cai et al. 2401.10774 §3.3.1). Does not keep the law p."""
  entropy = -jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0).sum(-1)
  limit = jnp.minimum(epsilon, delta * jnp.exp(-entropy))
  return at(p, token) > (limit[..., None] if token.ndim == p.ndim else limit)


# -- rules --------------------------------------------------------------------------------------------


@pytree()
class Verdict:
  """What a rule says about each node: a place in a chain whose next token is asked.

  Fields:
    accept: float32[c, R, R]: [k−1, r] is the probability that the candidate of chain r is accepted when it is
      tried, if k chains are still alive.
    token: int32[c, R+1]: [k], the token taken when none of k candidates is accepted; [0] is a draw of the
      target.
  """

  accept: Array
  token: Array


@dataclasses.dataclass(frozen=True)
class Rule:
  """Base. `exact`: the law of the output is the target's for any drafts."""

  exact = True
  needs_logits = False  # of stochastic drafts

  def __call__(
    self, choice: draw.Choice, logits: Array, candidates: Array, q: Array | None, k0, k1
  ) -> Verdict:
    """Verdicts of c nodes.

    Args:
      choice: how the target draws. logits: float32[c, V], raw, of the target.
      candidates: int32[c, R], the next token of each chain.
      q: float32[c, V], logits that they were drawn from; None: they are no draws.
      k0, k1: uint32[c], keys of the target's draw at each node.
    """
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Match(Rule):
  """The target draws, a draft is accepted if it is that token: exact for any drafts, with the target's own
  ids."""

  def __call__(self, choice, logits, candidates, q, k0, k1):
    token = choice(logits, k0, k1).token
    R = candidates.shape[1]
    same = (candidates == token[:, None]).astype(jnp.float32)
    return Verdict(
      jnp.broadcast_to(same[:, None], (*same.shape[:1], R, R)),
      jnp.broadcast_to(token[:, None], (len(token), R + 1)),
    )


@dataclasses.dataclass(frozen=True)
class Rejection(Rule):
  """Rejection sampling of drafts that were drawn from q; k-SEQ where k chains are alive."""

  needs_logits = True

  def __call__(self, choice, logits, candidates, q, k0, k1):
    p = choice.law(logits)
    q = jax.nn.one_hot(candidates[:, 0], p.shape[-1]) if q is None else jax.nn.softmax(q, -1)
    g = draw.gumbel(k0, k1, p.shape[-1])
    pick = lambda law: jnp.argmax(jnp.log(law) + g, -1).astype(jnp.int32)
    accept, token = [], [pick(p)]
    for k in range(1, candidates.shape[1] + 1):
      rho = solve_rho(p, q, k)
      accept.append(accept_probability(p, q, candidates, rho[:, None]))
      token.append(pick(kseq_residual(p, q, rho, k)))
    return Verdict(jnp.stack(accept, 1), jnp.stack(token, 1))


@dataclasses.dataclass(frozen=True)
class Recursive(Rule):
  """Rejection sampling of a node's children, drawn from one law without replacement.

  q is (ids int32[c, k], float32[c, k] log-probabilities), the few tokens that a node's law is made of.
  """

  needs_logits = True

  def __call__(self, choice, logits, candidates, q, k0, k1):
    p, (ids, logq) = choice.law(logits), q
    rows = jnp.arange(len(ids))[:, None]
    dense = jnp.zeros_like(p).at[rows, ids].add(jnp.exp(logq))
    passes, laws = recursive(p, dense, candidates)
    g = draw.gumbel(k0, k1, p.shape[-1])
    token = [jnp.argmax(jnp.log(law) + g, -1).astype(jnp.int32) for law in laws]
    R = candidates.shape[1]
    accept = jnp.broadcast_to(jnp.stack(passes, 1)[:, None], (len(p), R, R))
    return Verdict(accept, jnp.stack(token, 1))


@dataclasses.dataclass(frozen=True)
class Typical(Rule):
  """Medusa's typical acceptance: what is likely enough passes. Not exact.

  Fields:
    epsilon, delta: hard and entropy-dependent thresholds.
  """

  epsilon: float = 0.3
  delta: float = 0.09

  exact = False

  def __call__(self, choice, logits, candidates, q, k0, k1):
    drawn = Match()(choice, logits, candidates, q, k0, k1)
    p = choice.law(logits)
    passes = typical(p, candidates, self.epsilon, self.delta).astype(jnp.float32)
    return drawn.replace(accept=jnp.broadcast_to(passes[:, None], drawn.accept.shape))


@dataclasses.dataclass(frozen=True)
class Rollback(Rule):
  """What surprises the target too much is taken back (BiLD, Kim et al. 2302.07863 §3.3). Not exact.

  A draft x passes if −ln p(x) ≤ limit, p the target's own distribution, and the first one that does not is
  replaced by what the target draws. Up to limit < ln 2 that is exact at temperature 0: what passes has more
  than half of the mass. ∞ takes nothing back.

  Fields:
    limit: α_RB, nats; the paper's values are per task (2.0 unverified).
  """

  limit: float = 2.0

  exact = False

  def __post_init__(self):
    if self.limit < 0:
      raise ValueError(f"limit is {self.limit}; nats, at least 0")

  def __call__(self, choice, logits, candidates, q, k0, k1):
    drawn = Match()(choice, logits, candidates, q, k0, k1)
    surprise = -at(jax.nn.log_softmax(choice.logits(logits), -1), candidates)
    passes = ((surprise <= self.limit) & (candidates >= 0)).astype(jnp.float32)
    return drawn.replace(accept=jnp.broadcast_to(passes[:, None], drawn.accept.shape))


REGISTRY = {
  "match": Match,
  "rejection": Rejection,
  "recursive": Recursive,
  "typical": Typical,
  "rollback": Rollback,
}


# -- the walk -----------------------------------------------------------------------------------------


@pytree()
class Walk:
  """What a verification commits.

  Fields:
    tokens: int32[B, K+1], the tokens of places 0 … K; taken: bool[B, K+1], those that are committed, a
      prefix.
    accepted: int32[B], how many of them are drafts. chain: int32[B], the chain that they lie on.
    node: int32[B, K+1], the node whose candidates are tried at each place.
  """

  tokens: Array
  taken: Array
  accepted: Array
  chain: Array
  node: Array


def walk(verdict: Verdict, candidates: Array, count: Array, u: Array, can: Array) -> Walk:
  """Follows the accepted drafts from the root.

  At each place the live chains (those that agree with all that was accepted) are tried in turn; the first
  accepted token is taken and keeps the chains that continue with it alive. If none is accepted, the rule's
  own token is taken and the walk ends.

  Args:
    verdict: of M = 1 + R·K nodes, leaves [B, M, …]: the root, then K nodes of each chain.
    candidates: int32[B, R, K]. count: int32[B, R], meant tokens of each chain.
    u: float32[B, K+1, R] uniforms of each place and chain.
    can: bool[B, K+1], places that exist (the row may end); a prefix.
  """
  B, R, K = candidates.shape
  chains = jnp.arange(R)[None]
  # Place K has no candidates.
  candidates = jnp.concatenate([candidates, jnp.full((B, R, 1), -1, candidates.dtype)], 2)

  def of(x, index):
    """x [B, n, …] at index int32[B]."""
    index = index.reshape(B, *(1,) * (x.ndim - 1))
    return jnp.take_along_axis(x, index, 1)[:, 0]

  def place(carry, i):
    active, alive, chain, accepted = carry
    node = jnp.where(i == 0, 0, chain * K + i)
    here = candidates[:, :, i]
    live = active & (i < count) & (i < K)
    k = live.sum(1, dtype=jnp.int32)
    accept = of(of(verdict.accept, node), jnp.maximum(k - 1, 0))
    ok = live & (u[:, i] < accept)
    some = ok.any(1)
    first = jnp.argmax(ok, 1)
    token = jnp.where(some, of(here, first), of(of(verdict.token, node), k))
    taken = alive & can[:, i]
    on = taken & some
    active = jnp.where(on[:, None], live & (here == token[:, None]), active)
    chain = jnp.where(on, jnp.argmax(active, 1), chain).astype(jnp.int32)
    return (active, on, chain, accepted + on), (token, taken)

  zero = jnp.zeros((B,), jnp.int32)
  start = jnp.broadcast_to(chains >= 0, (B, R)), jnp.ones((B,), bool), zero, zero
  (_, _, chain, accepted), (tokens, taken) = jax.lax.scan(place, start, jnp.arange(K + 1))
  at = np.arange(K + 1)
  node = jnp.where(at == 0, 0, chain[:, None] * K + at)
  return Walk(tokens.T, taken.T, accepted, chain, node)
