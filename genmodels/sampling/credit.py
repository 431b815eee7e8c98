"""Credit: tokens that were a slot's likeliest one in earlier steps get larger logits (dInfer, 2510.08666).

  C_v ← β·C_v                         in every step that predicts the slot
  C_v ← C_v + (max p)^γ               for the likeliest token v of the model
  z_v ← z_v + α·log(1 + C_v)          what is drawn, and how sure it is, is of the fused logits

(inclusionAI/dInfer, the credit decoder: α = .7, γ = .2, β = .8.) A slot has credit for as many tokens as were
its likeliest one, so that a table of R entries a slot replaces one of the size of the vocabulary: the same
numbers while no more than R tokens have had credit; then the least credit is forgotten.

Legend: B rows · N tokens of a row · c tokens of a chunk · V vocabulary · R entries.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from genmodels.contracts import Array
from genmodels.sampling.state import Ask, put


@dataclasses.dataclass(frozen=True)
class Credit:
  """Section `sampler.credit`.

  Fields:
    alpha: α; 0 leaves the logits as they are, bit by bit. gamma: γ. decay: β.
    top: R, tokens of a slot that may have credit.
  """

  alpha: float = 0.7
  gamma: float = 0.2
  decay: float = 0.8
  top: int = 8

  def __post_init__(self):
    if self.alpha < 0 or self.gamma < 0 or not 0 <= self.decay <= 1 or self.top < 1:
      raise ValueError(
        f"alpha is {self.alpha}, gamma {self.gamma}, decay {self.decay}, top {self.top}; expected alpha and "
        "gamma at least 0, decay in [0, 1], at least 1 entry"
      )

  def fused(self, z: Array, ids: Array, value: Array) -> tuple[Array, tuple[Array, Array]]:
    """Logits with credit, float32[c, V], and the table after this step.

    Args:
      z: float32[c, V], the model's. ids: int32[c, R]; value: float32[c, R], 0 where an entry is empty.
    """
    best = jnp.argmax(z, -1).astype(jnp.int32)
    gain = jnp.exp(self.gamma * jax.nn.log_softmax(z, -1).max(-1))
    value = self.decay * value
    same = (ids == best[:, None]) & (value > 0)
    known = same.any(1)
    index = jnp.where(known, jnp.argmax(same, 1), jnp.argmin(value, 1))
    here = jnp.arange(value.shape[1]) == index[:, None]
    ids = jnp.where(here, best[:, None], ids)
    value = jnp.where(here, jnp.where(known[:, None], value, 0.0) + gain[:, None], value)
    z = z.at[jnp.arange(z.shape[0])[:, None], ids].add(self.alpha * jnp.log1p(value))
    return z, (ids, value)

  def memory(self, shape: tuple[int, int]) -> dict[str, Array]:
    """No credit yet, of B rows of N tokens."""
    full = (*shape, self.top)
    return {"ids": jnp.zeros(full, jnp.int32), "value": jnp.zeros(full, jnp.float32)}

  def remember(self, memory: dict[str, Array], a: Ask, table: tuple[Array, Array]) -> dict[str, Array]:
    """The table after a step, by coordinate."""
    return {name: put(memory[name], a.at, x, a.can) for name, x in zip(("ids", "value"), table, strict=True)}
