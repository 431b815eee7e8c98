"""Conditioning: AdaLN-zero by table and index, unmodulated slots, shared class table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import models
from genmodels.models.layers import modulation

from . import cases

COND = dict(
  adaln="zero", norm="layer", norm_affine=False, cond={"class": dict(size=5), "t": dict(kind="time", size=8)}
)


def cond(B=2, E=2):
  rng = np.random.default_rng(0)
  return {
    "class": jnp.asarray(rng.integers(0, 5, (B, E)), jnp.int32),
    "t": jnp.asarray(rng.random((B, E)), jnp.float32),
  }


def test_entries_modulate_their_slots():
  """Two entries a row against two passes, each with the one entry everywhere (mask: each slot alone)."""
  model, params = cases.build(**COND)
  at = jnp.arange(6, dtype=jnp.int32)[None]
  alone = {"full": models.model.AttnMask(at, at[:, None], at[:, None] + 1)}
  ids, table = cases.tokens(2, 6), cond()
  index = jnp.asarray([[0, 1, 1, 0, -1, 1]] * 2)
  got = cases.run(model, params, cases.inputs(ids, alone, cond=table, cond_index=index))
  for e in (0, 1):
    one = {n: v[:, e : e + 1] for n, v in table.items()}
    want = cases.run(model, params, cases.inputs(ids, alone, cond=one))
    np.testing.assert_allclose(got[:, index[0] == e], want[:, index[0] == e], atol=1e-5)
    assert np.abs(np.asarray(got - want)[:, 4]).max() > 1e-3


def test_an_unmodulated_slot_is_a_layer_without_adaln():
  model, params = cases.build(**COND)
  x = cases.inputs(cases.tokens(2, 6), cond=cond(), cond_index=jnp.full((2, 6), -1))
  plain, _ = cases.build(norm="layer", norm_affine=False)
  strip = lambda t: {
    k: strip(v) if isinstance(v, dict) else v for k, v in t.items() if k not in ("mod", "final_mod", "cond")
  }
  bare = strip(params)
  assert jax.tree.structure(bare) == jax.tree.structure(plain.abstract_params())
  np.testing.assert_allclose(cases.run(model, params, x), cases.run(plain, bare, x), atol=1e-5)


def test_adaln_zero_starts_as_the_identity():
  model = models.build({**cases.BASE, **COND})
  params = jax.jit(model.init)(jax.random.key(0))
  x = cases.inputs(cases.tokens(2, 6), cond=cond(), cond_index=jnp.zeros((2, 6), jnp.int32))
  hidden, want = jax.jit(
    lambda p: (model.apply(p, x, {}).layers["hidden"], p["embed"]["tokens"]["embedding"][x.ids[..., 0]])
  )(params)
  want = want - want.mean(-1, keepdims=True)
  np.testing.assert_allclose(
    hidden, want / jnp.sqrt(jnp.square(want).mean(-1, keepdims=True) + 1e-6), atol=1e-4
  )


def test_the_class_table_is_shared_with_the_ids():
  shared = dict(COND, cond={"class": dict(size=5)}, tables={"class": 5})
  model, params = cases.build(**shared)
  assert "cond" not in params and params["embed"]["class"]["embedding"].shape == (5, 16)
  with pytest.raises(ValueError, match="cond_index"):
    modulation(jnp.zeros((1, 2, 6, 4)), None, (1,) * 6)
  with pytest.raises(ValueError, match="conditioned on"):
    model.apply(params, cases.inputs(cases.tokens(1, 4, channels=2, vocab=5)), {})


def test_no_product_per_slot():
  """The modulation is projected from the table: FLOPs grow with entries, not with slots times 6·D²."""
  D, S = 64, 128
  model, params = cases.build(
    **{**COND, "width": D, "mlp": 8, "num_heads": 2, "num_kv_heads": 2, "layers": 1}
  )
  plain, bare = cases.build(width=D, mlp=8, num_heads=2, num_kv_heads=2, layers=1)
  ids = cases.tokens(1, S)

  def flops(model, params, **more):
    x = cases.inputs(ids, **more)
    f = jax.jit(lambda p: model.apply(p, x, {}).layers["hidden"])
    return f.lower(params).compile().cost_analysis()["flops"]

  extra = flops(model, params, cond=cond(1), cond_index=jnp.zeros((1, S), jnp.int32)) - flops(plain, bare)
  assert extra < 0.2 * 2 * S * 6 * D * D
