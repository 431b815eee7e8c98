"""A network that predicts important tokens in series with a masked denoiser (ADLM)."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import models, sampling
from genmodels import rows as rows_lib
from genmodels.config import ConfigError
from genmodels.objectives import Nets, laws
from genmodels.objectives.anchor import Anchored
from tests.objectives.test_text import KEY, MASK, diffusion, rows, trunk


@functools.cache
def anchored():
  """(model with an anchor of one layer, parameters that share the tiny trunk's)."""
  plain, params = trunk()
  head = {"forbid": (MASK,)}
  cfg = dataclasses.replace(plain.cfg, anchor=1, heads={"text": head, "anchor": head})
  model = models.Model(cfg)
  fresh = jax.jit(model.init)(jax.random.key(2))
  shared = {k: v for k, v in params.items() if k != "heads"}
  return model, {**fresh, **shared, "heads": {**fresh["heads"], **params["heads"]}}


@pytest.fixture(scope="module")
def parameters():
  trunk()
  anchored()


def objective(scale=3e-3, rare=5):
  plain = diffusion()
  term = {"head": "anchor", "stream": "n", "on": "hit", "weight": "nelbo", "scale": scale}
  kept = {f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)}
  return Anchored(**kept | {"terms": plain.terms | {"anchor": term}, "likelihood": "diffusion", "rare": rare})


def nets(params):
  model = anchored()[0]
  return Nets({"model": lambda inputs, targets, **kw: model.apply(params, inputs, targets, **kw)})


def loud(params):
  """An anchor that says something to the denoiser."""
  kernel = params["anchor_in"]["kernel"]
  return {**params, "anchor_in": {"kernel": jnp.eye(len(kernel)) * 0.5}}


@functools.cache
def grads():
  """params, row → (denoiser's and anchor's loss apart, the gradients of each)."""
  obj = objective()

  def one(name):
    def loss(params, row):
      sums, dens, _ = obj.run(nets(params), row, KEY, 3)
      return sums[name] / dens[name]

    return jax.value_and_grad(loss)

  return jax.jit(lambda params, row: {name: one(name)(params, row) for name in obj.terms})


def largest(tree):
  return max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))


def test_repeats_are_counted_by_document():
  row = rows((13, 6), B=2, N=24)
  row = row.replace(tokens=row.tokens % 4)
  got = np.asarray(rows_lib.repeats(row.doc, row.tokens))
  for b in range(2):
    count = collections.Counter(zip(row.doc[b].tolist(), row.tokens[b].tolist()))
    assert got[b].tolist() == [count[x] for x in zip(row.doc[b].tolist(), row.tokens[b].tolist())]


@pytest.mark.slow
@pytest.mark.strict
def test_an_identity_anchor_is_mdlm_bit_by_bit(parameters):
  row, plain = rows((13, 6), B=2), diffusion()
  (small, base), (_, params) = trunk(), anchored()
  mdlm = Nets({"model": lambda *a, **kw: small.apply(base, *a, **kw)})
  want = jax.jit(lambda: plain.run(mdlm, row, KEY, 3))()
  run = jax.jit(lambda params: objective(scale=0.0).run(nets(params), row, KEY, 3))
  got = run(params)
  np.testing.assert_array_equal(got[2]["per_token"]["diffusion"], want[2]["per_token"]["diffusion"])
  assert float(got[0]["diffusion"]) == float(want[0]["diffusion"])
  assert float(got[1]["diffusion"]) == float(want[1]["diffusion"])
  assert float(objective(scale=0.0).scales["anchor"](0)) == 0 and laws.check(objective()) == []
  # Control: with a matrix that is not 0 the denoiser hears the anchor.
  other = run(loud(params))
  assert abs(float(other[0]["diffusion"]) - float(want[0]["diffusion"])) > 1e-3


@pytest.mark.slow
def test_the_anchor_is_asked_for_rare_tokens():
  row = rows((13, 6), B=2)
  row = row.replace(tokens=row.tokens % 5)
  often = np.asarray(rows_lib.repeats(row.doc, row.tokens))
  noise = objective().corruption.draw(row, KEY, 3)
  for rare in (1, 2, 99):
    targets = objective(rare=rare).asked(row, noise)[1]
    own, all_ = targets["anchor"], targets["diffusion"]
    np.testing.assert_array_equal(own.weight, np.where(often <= rare, all_.weight, 0))
    np.testing.assert_array_equal(own.slot, np.where(often <= rare, all_.slot, -1))
  assert (np.asarray(all_.weight) > 0).any() and (often > 2).any() and (often == 1).any()
  # The bound asks the denoiser alone, for every token.
  assert set(objective().prepare(row, KEY, 3, bound=(0, 1))[1]) == {"diffusion"}


@pytest.mark.slow
def test_both_losses_train_the_anchor(parameters):
  row, (_, params) = rows((13, 6), B=2), anchored()
  out = grads()(loud(params), row)
  (_, of_denoiser), (_, of_anchor) = out["diffusion"], out["anchor"]
  # The denoiser's loss reaches the anchor through what it predicts, and the anchor's own never the denoiser.
  assert largest(of_denoiser["anchor"]) > 1e-5 and largest(of_denoiser["heads"]["anchor"]) > 1e-6
  assert largest(of_anchor["anchor"]) > 1e-5 and largest(of_anchor["heads"]["anchor"]) > 1e-5
  assert largest(of_anchor["stack"]) == 0 and largest(of_anchor["heads"]["text"]) == 0
  # At first the matrix is 0: it learns, and nothing comes back through it yet.
  first = grads()(params, row)["diffusion"][1]
  assert largest(first["anchor_in"]) > 1e-6 and largest(first["anchor"]) == 0


def test_refusals():
  with pytest.raises(ValueError, match="anchor's own loss"):
    dataclasses.replace(objective(), terms={"diffusion": {"stream": "n", "on": "hit"}})
  with pytest.raises(ValueError, match="at least 1 occurrence"):
    objective(rare=0)
  section = {"width": 8, "layers": 1, "num_heads": 1, "mlp": 8, "vocab": 4}
  with pytest.raises(ConfigError, match="need each other"):
    models.build({**section, "anchor": 1})
  with pytest.raises(ConfigError, match="need each other"):
    models.build({**section, "heads": {"text": {}, "anchor": {}}})
  made = objective()
  model = models.build({**section, "vocab": MASK + 1, "anchor": 1, "heads": {"text": {}, "anchor": {}}})
  with pytest.raises(ConfigError, match="keeps no keys"):
    sampling.build({"cache": "dual", "quota": {"kind": "linear", "steps": 2}}, made, model)
