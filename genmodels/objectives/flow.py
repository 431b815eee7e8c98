"""Discrete tokens and continuous image tokens in one causal row: cross-entropy and flow matching.

After NextStep-1 (arXiv:2508.10711 §2): the modality of the next token selects the head, and the slot before a
token predicts it, so the begin-of-image token's slot predicts the first patch.

Legend: B rows · N clean tokens · S slots · D documents · F features of a patch · R draws per patch.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from genmodels.contracts import Inputs, Noise, Row, Slots, Target
from genmodels.corruption import rng
from genmodels.objectives.base import Objective, Term
from genmodels.objectives.image import at_slots, needs, ordinal, to_tokens

Array = jax.Array

WORDS, IMAGE = 0, 1  # modalities of a token


@dataclasses.dataclass(frozen=True)
class TextImageFlow(Objective):
  """Captions and images: cross-entropy on words, flow matching on patches.

  The j-th token of modality IMAGE in a document carries patch j of its image (`latent.encode_side`). The
  path is z = (1 − t)·x + t·ε with velocity ε − x, t logit-normal; the R draws of a patch share its hidden
  state. Both terms are per-token means over the global batch, each over its own tokens.

  Fields:
    text, image: names of the two terms; `image`'s head is a flow head.
    draws: R, noise draws per patch and step (NextStep-1: 4).
    t_mean, t_std: t = sigmoid(t_mean + t_std·normal).
  """

  terms: dict = dataclasses.field(
    default_factory=lambda: {
      "text": {"head": "text", "align": "shift", "scale": 0.1},
      "image": {"head": "image", "align": "shift", "scale": 1.0},
    }
  )
  text: str = "text"
  image: str = "image"
  draws: int = 4
  t_mean: float = 0.0
  t_std: float = 1.0

  def __post_init__(self):
    if not self.likelihood:
      object.__setattr__(self, "likelihood", self.text)
    super().__post_init__()
    if set(self.terms) != {self.text, self.image}:
      raise ValueError(
        f"terms has {sorted(self.terms)}; it must have the names text={self.text!r}, image={self.image!r}"
      )
    if self.likelihood != self.text:
      raise ValueError(
        f"likelihood is {self.likelihood!r}; only {self.text!r} has one, flow matching is no bound here"
      )
    if self.terms[self.text].head == self.terms[self.image].head:
      raise ValueError(
        f"terms read the same head {self.terms[self.text].head!r}; words and patches need one each"
      )
    if self.draws < 1:
      raise ValueError(f"draws is {self.draws}; it must be at least 1")

  def prepare(self, row: Row, key: Array, step, latent=None, bound: tuple | None = None):
    """As Objective.prepare, plus the noised patches that the flow head is fed."""
    inputs, targets, denominators = super().prepare(row, key, step, latent, bound)
    if self.image in targets:
      targets[self.image] = self.noised(targets[self.image], row, key, step, latent)
    return inputs, targets, denominators

  def noised(self, target: Target, row: Row, key: Array, step, latent) -> Target:
    """The target with its clean patches as value and R draws (z, t) of each as `given`."""
    if latent.encode_side(row.docs.side) is None:
      raise ValueError(f"side table {latent.table!r} is missing; the row has {sorted(row.docs.side)}")
    x = self.patches(row, latent)  # [B, N, F]
    F, R = x.shape[-1], self.draws
    u = rng.token_normal(row, key, step, 0, rng.LEVEL, R)
    t = jax.nn.sigmoid(self.t_mean + self.t_std * u)  # [B, N, R]
    eps = rng.token_normal(row, key, step, 0, rng.NOISE, R * F).reshape(*x.shape[:2], R, F)
    z = (1 - t[..., None]) * x[:, :, None] + t[..., None] * eps
    return target.replace(value=x, given={"z": z, "t": t})

  def patches(self, row: Row, latent) -> Array:
    """float32[B, N, F], the patch of each IMAGE token, 0 elsewhere and where a row has no images yet.

    Raises:
      ValueError: no latent.
    """
    table = needs(latent, "TextImageFlow").encode_side(row.docs.side)
    if table is None:  # words are being sampled
      return jnp.zeros((*row.tokens.shape, latent.features), jnp.float32)
    flag = (row.modality == IMAGE) & (row.doc >= 0)
    return jnp.where(flag[..., None], to_tokens(table, row.doc, ordinal(flag, row.doc)), 0.0)

  def inputs(self, row: Row, noise: Noise, slots: Slots, latent=None) -> Inputs:
    base = super().inputs(row, noise, slots, latent)
    words = (at_slots(row.modality, slots) != IMAGE) & (slots.src >= 0)
    x = self.patches(row, latent)
    features = jnp.take_along_axis(x, jnp.maximum(slots.src, 0)[..., None], 1)
    return base.replace(
      ids=jnp.where(words[..., None], base.ids, -1),
      features=jnp.where((slots.src >= 0)[..., None], features, 0.0),
    )

  def target(self, row: Row, noise: Noise, read: Array, term: Term) -> tuple[Target, Array]:
    mine = IMAGE if term.head == self.terms[self.image].head else WORDS
    return super().target(self.only_modality(row, mine), noise, read, term)

  def bound(self, nets, row: Row, key: Array, r, R) -> tuple[Array, Array]:
    """As Objective.bound, of the words alone."""
    return super().bound(nets, self.only_modality(row, WORDS), key, r, R)

  @staticmethod
  def only_modality(row: Row, modality: int) -> Row:
    """The row with every token of another modality given (CONTEXT)."""
    return row.replace(role=jnp.where(row.modality == modality, row.role, 0))
