"""Block distillation: a student that reads blocks left to right from a teacher that sees everything (D2F).

Wang et al., "Diffusion LLMs Can Do Faster-Than-AR Inference via Discrete Diffusion Forcing", 2508.09192 §4:
the same noisy row is seen twice, by the student under a block-causal mask and by the teacher (the same
weights with the adapter off) under a full one; the loss is the cross-entropy of the student against the
teacher's distribution at the masked tokens, weighted by 1/p and averaged over them. The code of the
authors uses the forward KL (teacher ‖ student) up to the teacher's entropy; so does this file.

Legend: B rows · N clean tokens · V classes.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from genmodels.objectives import relations
from genmodels.objectives.base import Objective, work


@dataclasses.dataclass(frozen=True)
class BlockDistill(Objective):
  """The composed objective with a second, gradient-stopped pass.

  Fields:
    teacher: network of the second pass (config section `trees`).
    teacher_masks: {pattern: rule} of the second pass.
  """

  teacher: str = "teacher"
  teacher_masks: dict = dataclasses.field(default_factory=lambda: {"full": "full"})

  def __post_init__(self):
    super().__post_init__()
    seen = {p: relations.table(rule, self.layout.streams) for p, rule in self.teacher_masks.items()}
    object.__setattr__(self, "teacher_relations", seen)

  def run(self, nets, row, key, step):
    noise = self.corruption.draw(row, key, step, nets.latent)
    inputs, read = self.view(row, noise, latent=nets.latent)
    slots = self.slots(row, noise)
    targets, denominators = {}, {}
    for name, term in self.terms.items():
      targets[name], denominators[name] = self.target(row, noise, read[name], term)
    seen = {p: r.mask(slots) for p, r in self.teacher_relations.items()}
    taught = jax.lax.stop_gradient(nets[self.teacher](dataclasses.replace(inputs, masks=seen), targets))
    student = nets["model"](inputs, targets)

    sums, aux = {}, {"per_token": {}, "ratios": {}, "weighted_kl": {}}
    for name, t in targets.items():
      cross = student.dists[name].cross_entropy(taught.dists[name])
      entropy = taught.dists[name].entropy()
      asked = (t.weight > 0).astype(jnp.float32)
      aux["per_token"][name] = t.weight * cross
      aux["ratios"][f"kl/{name}"] = (jnp.sum(asked * (cross - entropy)), jnp.sum(asked))
      aux["weighted_kl"][name] = jnp.sum(t.weight * (cross - entropy))
      sums[name] = jnp.sum(t.weight * cross)
    aux["work"] = {"model": work(student, targets), self.teacher: work(taught, targets)}
    return self.routed(student, sums, denominators, aux)
