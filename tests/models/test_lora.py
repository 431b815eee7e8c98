"""Adapters beside the kernel: identity when fresh, off by absence, merge, gating, axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import models
from genmodels.models import lora

from . import cases

FIELDS = dict(lora=dict(rank=3, alpha=6, targets=r"stack/.*/(q|o|down)|heads/.*"))


def test_fresh_adapters_are_the_identity_and_change_no_draw():
  model, base = models.build({**cases.BASE, **FIELDS}), models.build(cases.BASE)
  with_lora, plain = jax.jit(model.init)(jax.random.key(7)), jax.jit(base.init)(jax.random.key(7))
  jax.tree.map(np.testing.assert_array_equal, lora.strip(with_lora), plain)
  x = cases.inputs(cases.tokens(1, 6))
  want = cases.run(base, plain, x)
  np.testing.assert_array_equal(cases.run(model, with_lora, x), want)
  np.testing.assert_array_equal(cases.run(model, lora.strip(with_lora), x), want)
  paths = {p for p in lora.sites(with_lora) if "lora_a" in _at(with_lora, p)}
  assert paths == {"stack/s0/l0/attn/q", "stack/s0/l0/attn/o", "stack/s0/l0/mlp/down", "heads/text"}


def _at(tree, path):
  for key in path.split("/"):
    tree = tree[key]
  return tree


def test_merge_equals_adapters_and_route_switches_them():
  model, _ = cases.build(**FIELDS)
  params = cases.draw(model.abstract_params())
  x = cases.inputs(cases.tokens(2, 6))
  on = cases.run(model, params, x)
  base, _ = cases.build()
  merged = lora.merge(params, model.cfg)
  assert jax.tree.structure(merged) == jax.tree.structure(base.abstract_params())
  np.testing.assert_allclose(cases.run(base, merged, x), on, atol=2e-4)
  off = cases.run(model, lora.strip(params), x)
  assert np.abs(np.asarray(on - off)).max() > 1e-2
  trunk_only = dict(params, heads=lora.strip(params)["heads"])  # route gates slots, not the head
  gate = jax.jit(
    lambda r: cases.logits(model.apply(trunk_only, x.replace(route=r), cases.everywhere(x.ids)).dists["t"])
  )
  np.testing.assert_allclose(gate(jnp.zeros((2, 6), jnp.int32)), off, atol=1e-6)
  half = gate(jnp.asarray([[0, 0, 0, 1, 1, 1]] * 2))
  np.testing.assert_allclose(half[:, :3], off[:, :3], atol=1e-6)  # causal: earlier slots are base only
  assert np.abs(np.asarray(half - off))[:, 3:].max() > 1e-2


def test_axes_fit_the_adapters():
  model, _ = cases.build(**FIELDS)
  shapes, axes = model.abstract_params(), model.logical_axes()
  is_axes = lambda a: isinstance(a, tuple)
  jax.tree.map(lambda s, a: (len(a) == s.ndim) or pytest.fail(f"{s} {a}"), shapes, axes, is_leaf=is_axes)
  o = axes["stack"]["s0"]["l0"]["attn"]["o"]
  assert o["lora_a"] == ("layers", "heads", "head_dim", "lora") and o["lora_b"] == ("layers", "lora", "embed")
  assert shapes["stack"]["s0"]["l0"]["attn"]["o"]["lora_b"].shape == (2, 3, 16)


def test_adapter_errors():
  model, params = cases.build(**FIELDS)
  nowhere = models.build({**cases.BASE, "lora": dict(rank=1, targets="nothing")})
  with pytest.raises(ValueError, match="matches no linear site"):
    lora.add(params, nowhere.cfg, jax.random.key(0))
  with pytest.raises(ValueError, match="model.lora is None"):
    cases.build()[0].apply(params, cases.inputs(cases.tokens(1, 4)), {})
