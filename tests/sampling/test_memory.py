"""The decode step's working memory against its cache: lowered and compiled for shapes, nothing is run."""

import dataclasses

import jax
import pytest

from genmodels import models, sampling
from tests.sampling import systems as S


@pytest.mark.parametrize("name", ["ar", pytest.param("bd", marks=pytest.mark.slow)])
def test_decode_temporaries_are_small(name):
  """32 layers, 8 rows of 4,096 tokens: temporaries stay under a tenth of the cache (a layer's keys and
  values are sliced out of the scan's cache, so they are of order 1/layers), and the cache is updated in
  place."""
  section = {
    "width": 1024,
    "layers": 32,
    "num_heads": 8,
    "num_kv_heads": 8,
    "mlp": 2048,
    "vocab": 4096,
    "heads": {"text": {}},
  }
  model = models.build(section)
  objective = dataclasses.replace(S.ar() if name == "ar" else S.bd(16), mask_id=4095)
  sampler = sampling.build({"eos": -2}, objective, model)
  B, N = 8, 4096
  row = jax.eval_shape(lambda: sampling.prompt_row([[1, 2]] * B, N, N))
  key = jax.eval_shape(lambda: jax.random.key(0))
  params = model.abstract_params()
  state = jax.eval_shape(lambda p, r: sampler.start(p, r, 0), params, row)
  cache = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.caches))
  assert cache > 8 * 2**30
  compiled = jax.jit(sampler.step, donate_argnums=2).lower(params, row, state, key).compile()
  memory = compiled.memory_analysis()
  assert memory.temp_size_in_bytes < 0.1 * cache, f"{memory.temp_size_in_bytes / cache:.1%} of the cache"
  assert memory.alias_size_in_bytes >= cache, "the cache is copied, not updated in place"
