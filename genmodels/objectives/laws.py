"""Laws of an objective, checked on a small symbolic row before anything compiles.

Leak: no slot that predicts a token may reach, through any number of layers, a slot that carries the
token's clean identity. Purity: no clean slot reaches a noisy one, or the clean stream would not be the
training image of the KV cache.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from genmodels.config import ConfigError
from genmodels.contracts import CLEAN, CONTEXT, TEXT, token_row
from genmodels.masks import laws as mask_laws

# Two texts behind one and two given tokens, and a conversation: prompt, answer, prompt, answer.
_DOC = np.repeat([0, 1, 2, -1], (11, 7, 12, 2))[None]
_GIVEN = (0, 11, 12, 18, 19, 20, 24, 25)


def check(objective) -> list[str]:
  """Checks an objective.

  Returns:
    Warnings for people (one noisy stream, reproduction weights).

  Raises:
    ConfigError: a leak, an impure clean stream, or a weight that is not the corruption's marginal.
  """
  notes = _weights(objective)
  if terms := list(objective.router.scales):
    notes.append(f"{', '.join(terms)}: no ratios of sums, taken over each global micro-batch and averaged")
  role = np.full(_DOC.shape, TEXT)
  role[0, _GIVEN] = CONTEXT
  row = objective.corruption.symbolic(token_row(np.zeros(_DOC.shape), _DOC, role=role, capacity=3))
  copy_of = objective.layout.copy_of()
  layout = dataclasses.replace(objective.layout, copy_slots=0)  # room enough: rows are the packer's matter

  @jax.jit  # one small program; op by op it would be a hundred
  def symbolic(step):
    noise = objective.corruption.draw(row, jax.random.key(0), step)
    slots = layout.arrange(row, noise)
    read = {name: objective.read(row, noise, slots, t) for name, t in objective.terms.items()}
    dense = jnp.any(jnp.stack([r.mask(slots).to_dense()[0] for r in objective.relations.values()]), 0)
    return noise.hit[0], slots.src[0], slots.stream[0], read, dense, objective.carries(row, noise, slots)[0]

  for step in _steps(objective):
    hit, src, stream, read, dense, carries = jax.tree.map(np.asarray, symbolic(jnp.int32(step)))
    copy = copy_of[stream]
    for name, term in objective.terms.items():
      c = max(int(copy_of[objective.layout.streams.index(term.stream)]), 0)
      asked = (role[0] == TEXT) & (_DOC[0] >= 0) & (hit[c] if term.on == "hit" else True)
      slot = np.where(asked, read[name][0], -1)
      opens = np.diff(_DOC[0], prepend=-1) != 0  # a document's first token may have nothing before it
      if layout.copy != "all" and (unread := asked & ~opens & (slot < 0)).any():
        raise ConfigError(
          f"{int(unread.sum())} tokens of a symbolic row would be learnt by no slot: the one that predicts "
          "them holds a prompt token, which is not copied",
          key=f"objective.terms.{name}.align", value=term.align,
          fix="align='shift_clean_boundary' with corruption.blocks.anchor='response', or layout.copy='all'",
        )  # fmt: skip
      targets = [(int(s), n) for n, s in enumerate(slot) if s >= 0]
      leaks = mask_laws.leak_closure(dense, carries, targets)
      if leaks:
        _, _, n = leaks[0]
        raise ConfigError(
          f"the slot that predicts token {n} reaches that token's clean identity ({len(leaks)} paths "
          "on a symbolic row)",
          key=f"objective.terms.{name}", value=dataclasses.asdict(term) | {"scale": term.scale.to_json()},
          fix="a shifted loss needs a causal stream; noisy queries see clean tokens of earlier blocks only"
          + ("" if layout.copy != "text" else "; a block that straddles prompt and response wants "
             "corruption.blocks.anchor='response', layout.copy='blocks' or a causal clean stream"),
        )  # fmt: skip
    clean = copy < 0
    if mask_laws.purity(dense, ~clean & (src >= 0), clean & (src >= 0)):
      raise ConfigError(
        "a clean slot sees a noisy one, so changing the noise changes the clean stream",
        key="objective.masks", value=dict(objective.masks), fix="remove the clean → noisy relation",
      )  # fmt: skip
  if (
    len(objective.layout.noisy) == 1
    and CLEAN not in objective.layout.streams
    and not objective.corruption.blocks.whole
  ):
    notes.append(
      "one noisy stream: blocks condition on noisy earlier blocks, unlike a decoder that caches clean ones"
    )
  return notes


def _weights(objective) -> list[str]:
  """weight = 1/p needs the true marginal, or the reproduction flag."""
  c = objective.corruption
  biased = getattr(c, "count", "exact") == "round" or getattr(c, "retries", 0) > 0
  for name, term in objective.terms.items():
    if getattr(c, "bias", 0) > 0 and term.weight == "nelbo" and not objective.reproduction:
      raise ConfigError(
        "tokens that are not masked uniformly have no bound weight",
        key=f"objective.terms.{name}.weight", value=term.weight,
        fix="weight='inverse_marginal' (the true marginal of each token) or 'one', or corruption.bias=0",
      )  # fmt: skip
    if biased and term.weight != "one" and not objective.reproduction:
      raise ConfigError(
        "the weight is not the inverse of the corruption's true marginal (rounded counts or redraws)",
        key=f"objective.terms.{name}.weight", value=term.weight,
        fix="use corruption.count='exact', or set objective.reproduction=True to reproduce a paper knowingly",
      )  # fmt: skip
    # Two copies that share a count r·n have the weights {1/r, 1/(1 − r)}, or none; a bound's weight belongs
    # to one copy.
    curved = getattr(c, "count", "exact") == "exact" and getattr(c, "schedule", "linear") == "cosine"
    if getattr(c, "complement", False) and term.weight == "nelbo" and curved:
      raise ConfigError(
        "a complementary pair takes weight 1 or the inverse marginals {1/r, 1/(1 − r)}; under a cosine "
        "schedule the bound's weight is neither", key=f"objective.terms.{name}.weight", value=term.weight,
        fix="weight='inverse_marginal' or 'one', or a linear schedule",
      )  # fmt: skip
  if objective.reproduction:
    return [
      "reproduction: the training loss is not a likelihood bound; reported likelihoods use the exact one"
    ]
  return []


def _steps(objective) -> tuple[int, ...]:
  """Steps at which the block size takes each of its values."""
  size = objective.corruption.blocks.size
  return size.at if size.kind == "steps" else (0,)
