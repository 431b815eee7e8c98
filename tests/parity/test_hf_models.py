"""Logits against transformers, on random weights: no norm at one, no bias at zero.

Every case goes through the reader a user's checkpoint takes, and back.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genmodels import models
from genmodels.checkpoint import hf_config, hf_names
from genmodels.config import ConfigError
from genmodels.models import Scaling
from genmodels.models.rope import inv_freq
from tests.models import cases

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

LLAMA3 = dict(
  rope_type="llama3",
  rope_theta=1000.0,
  factor=4.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=16,
)
YARN = dict(rope_type="yarn", rope_theta=1000.0, factor=4.0, original_max_position_embeddings=16)
DEFAULT = dict(rope_type="default", rope_theta=10000.0)
TRUNK = dict(
  hidden_size=24, intermediate_size=40, num_hidden_layers=3, vocab_size=33, max_position_embeddings=64
)

CASES = {
  "llama_llama3_untied": (
    "Llama",
    dict(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False, rope_parameters=LLAMA3),
  ),
  "llama_yarn_biases_tied": (
    "Llama",
    dict(
      num_attention_heads=6,
      num_key_value_heads=2,
      tie_word_embeddings=True,
      attention_bias=True,
      mlp_bias=True,
      rope_parameters=YARN,
    ),
  ),
  "qwen2_odd_gqa_tied": (
    "Qwen2",
    dict(num_attention_heads=6, num_key_value_heads=3, tie_word_embeddings=True, rope_parameters=DEFAULT),
  ),
  "qwen2_untied": (
    "Qwen2",
    dict(num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=False, rope_parameters=DEFAULT),
  ),
  "qwen3_head_dim": (
    "Qwen3",
    dict(
      num_attention_heads=5,
      num_key_value_heads=1,
      head_dim=16,
      tie_word_embeddings=False,
      rope_parameters=DEFAULT,
    ),
  ),
  "gpt2": ("GPT2", dict(n_embd=24, n_layer=3, n_head=4, vocab_size=33, n_positions=64)),
}


def reference(kind, fields):
  """A transformers model with every parameter random, and its config.json."""
  torch.manual_seed(0)
  fields = fields if kind == "GPT2" else {**TRUNK, **fields}
  config = getattr(transformers, f"{kind}Config")(**fields, attn_implementation="eager")
  head = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
  model = getattr(transformers, head)(config).eval().float()
  with torch.no_grad():
    for name, p in model.named_parameters():
      p.copy_(0.25 * torch.randn_like(p) + (1.0 if "norm" in name or ".ln_" in name else 0.0) * (p.ndim == 1))
  return model, config.to_dict()


@pytest.mark.parametrize("name", CASES)
def test_logits_and_round_trip(name):
  kind, fields = CASES[name]
  hf, config = reference(kind, fields)
  state = {k: v.numpy() for k, v in hf.state_dict().items()}
  section = hf_config.section(config)
  model = models.build({**section, "vocab_multiple": 8})
  params = hf_names.read(model.cfg, config["model_type"], state)
  assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda x: x.shape, model.abstract_params())

  ids = cases.tokens(2, 40, 33)  # beyond the scaled models' original length of 16
  with torch.no_grad():
    want = hf(torch.tensor(np.asarray(ids[..., 0], np.int64))).logits.numpy()
  got = np.asarray(cases.run(model, params, cases.inputs(ids)))
  assert np.abs(want).max() > 1
  assert np.abs(got - want).max() <= 1e-4

  tied = model.cfg.head("text").tied
  back = hf_names.write(model.cfg, config["model_type"], params)
  assert set(back) == set(state) - ({"lm_head.weight"} if tied else set())
  for key, value in back.items():
    np.testing.assert_array_equal(value, state[key], err_msg=key)

  # Strict both ways: nothing missing, nothing left over, no other shape.
  first = next(iter(back))
  with pytest.raises(ValueError, match="missing tensors"):
    hf_names.read(model.cfg, config["model_type"], {k: v for k, v in state.items() if k != first})
  with pytest.raises(ValueError, match="no parameter takes: model.extra"):
    hf_names.read(model.cfg, config["model_type"], {**state, "model.extra": np.zeros(1)})
  with pytest.raises(ValueError, match="expected shape"):
    hf_names.read(model.cfg, config["model_type"], {**state, first: state[first][:-1]})


def test_what_is_not_computed_is_refused():
  _, config = reference("Llama", dict(num_attention_heads=4, rope_parameters=DEFAULT))
  for change in (
    dict(model_type="mamba"),
    dict(hidden_act="relu"),
    dict(rope_parameters=dict(rope_type="longrope", factor=2.0)),
    dict(partial_rotary_factor=0.5),
    dict(layer_types=["chunked_attention"] * 3),
  ):
    with pytest.raises(ConfigError):
      hf_config.section({**config, **change})


ROPES = {
  "linear": (dict(rope_type="linear", factor=4.0), Scaling("linear", 4.0), None),
  "llama3": (LLAMA3, Scaling("llama3", 4.0, 16), None),
  "yarn": (YARN, Scaling("yarn", 4.0, 16), None),
  "yarn_betas": (
    dict(YARN, beta_fast=8.0, beta_slow=2.0, truncate=False),
    Scaling("yarn", 4.0, 16, beta_fast=8.0, beta_slow=2.0, truncate=False),
    None,
  ),
  # Dynamic NTK at length L is the static one of factor·L/max − (factor − 1): here 2·96/64 − 1 = 2.
  "ntk": (dict(rope_type="dynamic", factor=2.0), Scaling("ntk", 2.0), 96),
}


@pytest.mark.parametrize("name", ROPES)
def test_frequencies(name):
  from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

  fields, scaling, length = ROPES[name]
  parameters = {"rope_theta": 1000.0, **fields}
  config = transformers.LlamaConfig(
    **{**TRUNK, "hidden_size": 64}, num_attention_heads=2, rope_parameters=dict(parameters)
  )
  want, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu", seq_len=length)
  got, ours = inv_freq(32, 1000.0, scaling)
  np.testing.assert_allclose(got, want.numpy(), rtol=2e-6)
  assert ours == pytest.approx(factor)
  assert np.abs(got - inv_freq(32, 1000.0)[0]).max() > 1e-3 * got.max()  # the scaling does something
  assert jnp.isfinite(got).all()
