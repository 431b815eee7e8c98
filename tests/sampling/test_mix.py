"""Embedding mixtures: what masked slots show (language.md §4.5, §4.11), and longer contexts (§4.10)."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import models, sampling
from genmodels.config import ConfigError
from genmodels.models import rope
from tests.sampling import systems as S

QUOTA = {"kind": "linear", "steps": 4}


@functools.cache
def run(**section):
  section = {k: dict(v) if isinstance(v, tuple) else v for k, v in section.items()}
  result = S.sampler(S.mdm(), quota=QUOTA, **section)(S.params(), S.row(), jax.random.key(1))
  return jax.tree.map(np.asarray, result)


@pytest.mark.slow
def test_embed_is_what_a_slot_adds():
  """x with embed(b) − embed(a) added is x with b in place of a."""
  objective, row, model = S.mdm(), S.row(), S.model()
  inputs, _ = objective.view(row, objective.corruption.state(row, row.role == 0))
  other = jnp.full(inputs.ids.shape[:2], 3)

  @jax.jit
  def hidden(inputs):
    return model.apply(S.params(), inputs, {}).layers["hidden"]

  delta = model.embed(S.params(), other) - model.embed(S.params(), inputs.ids[..., 0])
  swapped = hidden(inputs.replace(ids=other[..., None], add_embed=0 * delta))
  np.testing.assert_allclose(hidden(inputs.replace(add_embed=delta)), swapped, atol=1e-4)


@pytest.mark.slow
def test_weightless_mixtures_are_the_mask():
  """LRD: α ≡ 1 is the baseline, bit by bit; with a weight the predictions change."""
  plain = run()
  off = run(mix=(("kind", "refine"), ("strength", 0.0)))
  np.testing.assert_array_equal(plain.tokens, off.tokens)
  np.testing.assert_array_equal(plain.committed_at, off.committed_at)
  on = run(mix=(("kind", "smooth"), ("start", 0.9), ("cap", 0.9)))
  assert (on.tokens != plain.tokens).any() and on.done.all()


@pytest.mark.slow
def test_the_first_phase_commits_nothing():
  """LRD's phase 1 takes at most `refine` steps of a unit, then the quota's steps follow."""
  plain, held = run(), run(mix=(("kind", "refine"), ("refine", 3), ("tol", 0.0), ("strength", 0.5)))
  first = np.where(held.committed_at >= 0, held.committed_at, 99).min(1)
  assert (first == 3).all() and held.done.all()
  assert (held.calls["denoise"] == plain.calls["denoise"] + 3).all()
  soon = run(mix=(("kind", "refine"), ("refine", 3), ("tol", 1e9), ("strength", 0.5)))
  assert (
    np.where(soon.committed_at >= 0, soon.committed_at, 99).min(1) == 1
  ).all()  # there is no step before


def test_mixture_weights():
  spread, k = jnp.array([[0.0, 0.5, 1.0]]), jnp.array([[5]])
  weight, out = sampling.mix.Refine(strength=0.4).weights(spread, k)
  np.testing.assert_allclose(weight, [[0.4, 0.2, 0.0]], atol=1e-6)
  np.testing.assert_array_equal(weight, out)
  np.testing.assert_allclose(sampling.mix.Smooth().weights(spread, k)[0], [[0.25] * 3])
  np.testing.assert_allclose(sampling.mix.Smooth().weights(spread, k + 9)[0], [[0.3] * 3])
  weight, out = sampling.mix.SelfCondition(scale=0.7).weights(spread, k)
  np.testing.assert_allclose(weight, [[0.7] * 3])
  assert not np.asarray(out).any()


# -- context ----------------------------------------------------------------------------------------

SECTION = {
  "width": 32,
  "layers": 2,
  "num_heads": 4,
  "num_kv_heads": 2,
  "mlp": 48,
  "vocab": 12,
  "heads": {"text": {}},
}


def test_an_extension_of_one_is_the_model():
  plain = models.build(SECTION).cfg
  for kind in ("theta", "ntk", "linear"):
    assert models.build({**SECTION, "extend": {"kind": kind, "factor": 1.0}}).cfg == plain
  # How attention runs over a context axis is another key.
  assert models.build({**SECTION, "context": "ring", "extend": {"factor": 2.0}}).cfg.context == "ring"
  with pytest.raises(ConfigError, match="model.extend"):
    models.build({**SECTION, "extend": {"kind": "theta", "factor": -1.0}})
  with pytest.raises(ConfigError, match="no rotary positions"):
    models.build({**SECTION, "rope": None, "learned_pos": 8, "extend": {"factor": 2.0}})
  with pytest.raises(ConfigError, match="scaled already"):
    scaled = {"scaling": {"kind": "linear", "factor": 2.0}}
    models.build({**SECTION, "rope": scaled, "extend": {"kind": "ntk", "factor": 2.0}})


def test_an_extension_scales_the_base():
  cfg = models.build({**SECTION, "extend": {"factor": 4.0}}).cfg
  assert {spec.rope_base for s in cfg.segments for spec in s.pattern} == {4 * cfg.rope.base}
  ntk = models.build({**SECTION, "extend": {"kind": "ntk", "factor": 4.0}}).cfg
  np.testing.assert_array_equal(
    rope.inv_freq(8, ntk.rope.base, ntk.rope.scaling)[0], rope.inv_freq(8, ntk.rope.base * 4 ** (8 / 6))[0]
  )
  # Local layers, which take no scaling, keep their base.
  local = {"mask": "local", "rope_base": 100.0, "rope_scaling": False}
  both = models.build({**SECTION, "pattern": (local, {"mask": "full"}), "extend": {"factor": 4.0}}).cfg
  assert [spec.rope_base for s in both.segments for spec in s.pattern] == [100.0, 4 * both.rope.base]


@pytest.mark.parametrize("base, dim", [(500000.0, 128), (10000.0, 64)])
def test_critical_dimension_turns_once(base, dim):
  """The wavelength of the critical dimension reaches the wanted length, and in training it was no longer."""
  trained, length = 4096, 16384
  factor = rope.critical_factor(base, dim, trained, length)
  critical = 2 * math.ceil(dim / 2 * math.log(trained / (2 * math.pi), base))
  wave = lambda b: 2 * math.pi * b ** (critical / dim)
  assert wave(base) >= trained * 0.999 and wave(base * factor) == pytest.approx(length, rel=1e-6)
  assert rope.critical_factor(base, dim, trained, trained) == pytest.approx(1.0, abs=0.5)
  cfg = models.build({**SECTION, "extend": {"factor": 0.0, "original_len": 4096, "length": 65536}}).cfg
  assert cfg.segments[0].pattern[0].rope_base > 2 * cfg.rope.base
