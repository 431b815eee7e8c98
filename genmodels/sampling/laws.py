"""Is a cache exact? Decided by running it: small generations through the sampler's own loop, with it and not.

The sampler keeps its objective's masks, layout, alignment and noise, its active set and its cache policy;
rows, blocks and windows shrink to a few tokens, and the network is a *probe*: a few layers that mix what each
slot sees, under every mask pattern of the model. The relations know no sizes, so a few tokens show what they
allow; and whatever a slot sees moves the probe's output, so a stale, missing or doubled entry shows.

Legend: B rows · S slots · Lc cache entries · M asked tokens · V ids of the probe.
"""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from genmodels.config import ConfigError
from genmodels.contracts import CLEAN, CONTEXT, TEXT, Inputs, Outputs, token_row
from genmodels.masks import CODE_HIDDEN, AttnMask
from genmodels.models import Cache
from genmodels.sampling import draw, mix, partial, remask
from genmodels.sampling.quota import Linear

N, PROMPTS = 8, (1, 2, 4)
V = 8
TOLERANCE = 1e-3  # of logits in [−1, 1]; a stale entry moves them by more than 1e-2


@dataclasses.dataclass(frozen=True, eq=False)
class Probe:
  """A network without parameters, behind the Model interface."""

  patterns: tuple[str, ...]

  @property
  def cfg(self):
    return SimpleNamespace(patterns=self.patterns, head=lambda name: SimpleNamespace(kind="categorical"))

  def init_cache(self, batch: int, capacity: int) -> Cache:
    code = {p: jnp.full((batch, capacity), CODE_HIDDEN, jnp.int32) for p in self.patterns}
    layers = {"x": jnp.zeros((2 * len(self.patterns), batch, capacity, 1))}
    return Cache(code, jnp.zeros((batch,), jnp.int32), layers)

  def apply(self, params, inputs, targets, *, cache=None, key=None) -> Outputs:
    x = jnp.sin(2.3 * inputs.ids[..., 0] + 0.7 * inputs.pos[..., 0])
    new = []
    for i, p in enumerate(2 * self.patterns):
      new.append(x)
      mask = inputs.masks[p]
      keys = [(mask.to_dense(), x)]
      if cache is not None:
        keys.append((AttnMask(cache.code[p], mask.lo, mask.hi).to_dense(), cache.layers["x"][i, ..., 0]))
      total = sum(jnp.einsum("bqk,bk->bq", seen, jnp.cos(3 * k)) for seen, k in keys)
      x = jnp.sin(1.9 * x + 2 * total / jnp.maximum(sum(seen.sum(-1) for seen, _ in keys), 1))
    dists = {}
    for name, t in targets.items():
      read = jnp.take_along_axis(x, jnp.maximum(t.slot, 0), 1)[..., None]
      v = jnp.arange(V)
      dists[name] = SimpleNamespace(map=functools.partial(_map, jnp.sin(2 * (1 + v) * read + v)))
    code = {p: jnp.broadcast_to(inputs.masks[p].code, x.shape) for p in self.patterns}
    return Outputs(dists, {"code": code, "layers": {"x": jnp.stack(new)[..., None]}})


def _map(logits, fn, *xs):
  B, M = logits.shape[:2]
  out = fn(logits.reshape(B * M, V), *(x.reshape(B * M, *x.shape[2:]) for x in xs))
  return jax.tree.map(lambda y: y.reshape(B, M, *y.shape[1:]), out)


def _view(objective, row, noise, only):
  """`Objective.view` without what an objective feeds besides ids: a slot shows its token, if committed."""
  slots = objective.layout.arrange(row, noise, only)
  at = jnp.maximum(slots.src, 0)
  take = lambda x: jnp.take_along_axis(x, at, 1)
  clean = jnp.asarray([s == CLEAN for s in objective.layout.streams])[slots.stream]
  ids = jnp.where(take(noise.hit[:, 0]) & ~clean, V, take(row.tokens))
  masks = {p: r.mask(slots) for p, r in objective.relations.items()}
  pos = jnp.take_along_axis(row.pos, at[..., None], 1)
  inputs = Inputs(ids=ids[..., None], pos=pos, doc=slots.doc, masks=masks)
  return inputs, {name: objective.read(row, noise, slots, t) for name, t in objective.terms.items()}


def small_row():
  """Rows of unequal prompts, one document each; the last one is padded."""
  at = np.arange(N)
  role = np.stack([np.where(at < n, CONTEXT, TEXT) for n in PROMPTS])
  doc = np.where(at < np.array([N] * (len(PROMPTS) - 1) + [N - 1])[:, None], 0, -1)
  tokens = np.random.default_rng(0).integers(0, V, doc.shape)
  return token_row(tokens, doc, role=jnp.asarray(role, jnp.int32))


def shrink(sampler):
  """The sampler over a probe, with blocks, windows and policy of a few tokens."""
  objective, blocks = sampler.objective, sampler.objective.corruption.blocks
  if int(blocks.size(0)):
    blocks = dataclasses.replace(blocks, size=4)
    corruption = dataclasses.replace(objective.corruption, blocks=blocks)
    objective = dataclasses.replace(objective, corruption=corruption)
  policy = sampler.policy
  if policy.partial is not None:
    policy = dataclasses.replace(policy, partial=policy.partial.small())
  foresees = policy.partial is not None and policy.partial.foresees
  score = "random" if foresees else "prob"
  kind = type(sampler)

  class Small(kind):
    def view(self, row, noise, only, branch):
      return _view(self.objective, row, noise, only)

  values = {f.name: getattr(sampler, f.name) for f in dataclasses.fields(sampler)}
  cut = not sampler.single and not sampler.whole and sampler.capacity
  cfg = dataclasses.replace(
    sampler.cfg,
    eos=-2,
    forbid=(),
    guidance=1.0,
    remask="never",
    mix="mask",
    stop=(),
    quota=Linear(steps=N),
    sub_block=min(sampler.cfg.sub_block, 2),
  )
  return Small(**values | {
    "cfg": cfg, "objective": objective, "model": Probe(tuple(sampler.model.cfg.patterns)), "latent": None,
    "capacity": 4 if cut else sampler.capacity, "policy": policy, "quota": Linear(steps=N),
    "choice": draw.Choice(temperature=0.0, score=score), "remask": remask.Never(), "mix": mix.Mask(),
    "stops": (),
  })  # fmt: skip


_FOUND: dict[str, bool] = {}


def exact(sampler) -> bool:
  """True where decoding with the sampler's cache is decoding without: the logits of every step agree.

  Compiles a small program, once for all samplers that shrink to the same one."""
  small, row = shrink(sampler), small_row()
  o, cfg = small.objective, small.cfg
  said = o.corruption, o.layout, o.relations, o.terms[small.term], small.model, small.capacity
  key = repr((type(sampler), small.policy, cfg.sub_block, small.active, small.commit, said))
  if key not in _FOUND:
    _FOUND[key] = _exact(small, row)
  return _FOUND[key]


def _exact(small, row) -> bool:
  with jax.ensure_compile_time_eval():
    off, _ = partial.drift(small, {}, row, jax.random.key(0), 2 * N)
    return bool(off.max() < TOLERANCE)


def judged(sampler):
  """The sampler, its policy tagged with what was found.

  Raises:
    ConfigError: exactness is demanded, and the policy is not exact under the objective's masks.
  """
  policy = dataclasses.replace(sampler.policy, exact=exact(sampler))
  if policy.partial is not None and policy.partial.exact and not policy.exact:
    raise ConfigError(
      "what is read from this cache sees tokens that are committed after it was computed: it is not exact",
      key="sampler.cache", value=policy.name, fix="sampler.cache='auto', or exact=False",
    )  # fmt: skip
  return dataclasses.replace(sampler, policy=policy)
