"""Self-distillation through time: one step of the student predicts what several of its teacher would (SDTT).

Deschenaux and Gulcehre, "Beyond Autoregression: Fast LLMs via Self-Distillation Through Time", 2410.21035.
The teacher takes m steps of ancestral sampling from x_t, each over a time dt; the target of a masked token is
the teacher's distribution at the step that decided it, or at the last one where none did:

  loss = mean over documents of Σ_{i masked in x_t} KL( p_teacher(· | x_{t − s(i) dt}) ‖ p_student(· | x_t) )

Every so many steps the student becomes the teacher (`trees.<teacher>.refresh`), and dt doubles. The best
one-step student has the marginals of m teacher steps. The loss is the cross-entropy, the forward KL up to the
teacher's entropy, which has no gradient; "kl/<term>" in the metrics is the KL.

Legend: B rows · N clean tokens · D width.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from genmodels.config import Schedule
from genmodels.contracts import Array, Noise, Row, Target
from genmodels.corruption import rng
from genmodels.corruption.absorb import Absorb, masked_probability
from genmodels.objectives.base import Nets, Objective, work


@dataclasses.dataclass(frozen=True)
class ThroughTime(Objective):
  """The composed objective, its targets made by several steps of a teacher.

  Fields:
    teacher: network that takes them (config section `trees`).
    steps: m, its steps.
    dt: the time of one, a number or a schedule; time runs from 1, all masked, to 0.
  """

  teacher: str = "teacher"
  steps: int = 2
  dt: Schedule = 1 / 1024

  def __post_init__(self):
    super().__post_init__()
    object.__setattr__(self, "dt", Schedule.of(self.dt, "dt"))
    if self.steps < 1:
      raise ValueError(f"steps is {self.steps}; the teacher takes at least one")
    if not 0 < self.dt.min() <= self.dt.max() <= 1:
      raise ValueError(f"dt is {self.dt.to_json()}; a time in (0, 1]")
    absorbs = isinstance(self.corruption, Absorb) and not self.corruption.complement
    if not absorbs or self.layout.streams != ("n",) or len(self.terms) != 1:
      raise ValueError(
        "a teacher's steps unmask tokens of one noisy copy: corruption.kind='absorb' without complement, "
        "layout.streams=('n',), one term"
      )

  def run(self, nets: Nets, row: Row, key: Array, step):
    row = self.corruption.trimmed(row, key, step, None)
    noise = self.corruption.draw(row, key, step, nets.latent)
    inputs, targets, denominators = self.asked(row, noise, nets.latent)
    name, target = self.likelihood, targets[self.likelihood]
    taught, done = self.taught(nets, row, noise, target, key, step)
    student = nets["model"](inputs, targets)
    cross, entropy = student.dists[name].cross_entropy(taught), taught.entropy()
    asked = (target.weight > 0).astype(jnp.float32)
    aux = {
      "per_token": {name: target.weight * cross},
      "ratios": {f"kl/{name}": (jnp.sum(asked * (cross - entropy)), jnp.sum(asked))},
      "work": {"model": work(student, targets), self.teacher: done},
    }
    return self.routed(student, {name: jnp.sum(target.weight * cross)}, denominators, aux)

  def taught(self, nets: Nets, row: Row, noise: Noise, target: Target, key: Array, step):
    """The Dist of the targets, one a token, without gradient; and the work of all calls of the teacher."""
    name, teacher = self.likelihood, nets[self.teacher]
    tokens, still, t = row.tokens, noise.hit[:, 0], noise.level[:, 0]
    dt, at = self.dt(step), self.corruption
    masked = lambda t: masked_probability(at.schedule, t, at.eps)
    dist, done = None, None
    for i in range(self.steps):
      seen = self.view(row.replace(tokens=tokens), noise.replace(hit=still[:, None]), latent=nets.latent)[0]
      out = jax.lax.stop_gradient(teacher(seen, {name: target}))
      now, called = out.dists[name], work(out, {name: target})
      # Decided tokens keep the state that they were decided from; the head is applied to it later.
      dist = now if dist is None else now.replace(hidden=jnp.where(still[..., None], now.hidden, dist.hidden))
      done = called if done is None else jax.tree.map(jnp.add, done, called)
      if i == self.steps - 1:
        break
      s = jnp.maximum(t - dt, 0)
      reveal = still & (rng.token_uniform(row, key, step, i, rng.PAIR) * masked(t) < masked(t) - masked(s))
      tokens = jnp.where(reveal, now.sample(rng.token_keys(row, key, step, i, rng.VALUE)), tokens)
      still, t = still & ~reveal, s
    return dist, done
