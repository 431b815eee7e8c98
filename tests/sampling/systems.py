"""Tiny systems that the sampling tests share: objectives of every kind, one small trunk, prompts."""

from __future__ import annotations

import functools

import jax
import numpy as np

from genmodels import models, sampling
from genmodels.objectives import Objective

V, MASK, EOS = 11, 11, 10  # ids 0 … 10 are tokens, 11 is the mask
N = 14


def ar() -> Objective:
  return Objective(terms={"text": {"align": "shift"}})


def mdm(align="same", **corruption) -> Objective:
  return Objective(
    corruption={"kind": "absorb", **corruption},
    layout={"kind": "streams", "streams": ("n",)},
    masks={"full": "full"},
    terms={"text": {"stream": "n", "on": "hit", "weight": "nelbo", "align": align}},
    mask_id=MASK,
  )


def bd(block=4, mask="bd3", align="same", anchor="document") -> Objective:
  return Objective(
    corruption={"kind": "absorb", "unit": "block", "blocks": {"size": block, "anchor": anchor}},
    layout={"kind": "streams", "streams": ("n", "c")},
    masks={"full": mask},
    terms={"text": {"stream": "n", "on": "hit", "weight": "nelbo", "align": align}},
    mask_id=MASK,
  )


def single_stream(block=4, align="same") -> Objective:
  """One noisy stream under a block-causal mask: D2F's student, xAR."""
  return Objective(
    corruption={"kind": "absorb", "unit": "block", "blocks": {"size": block}},
    layout={"kind": "streams", "streams": ("n",)},
    masks={"full": "block_causal"},
    terms={"text": {"stream": "n", "on": "hit", "weight": "nelbo", "align": align}},
    mask_id=MASK,
  )


@functools.cache
def model(layers=2):
  return models.build(
    {
      "width": 32, "layers": layers, "num_heads": 4, "num_kv_heads": 2, "mlp": 48, "vocab": V + 1,
      "init_std": 0.4, "heads": {"text": {}},
    }
  )  # fmt: skip


@functools.cache
def params(layers=2):
  with jax.ensure_compile_time_eval():  # the first caller may be tracing
    return jax.jit(model(layers).init)(jax.random.key(3))


def sampler(objective, **section):
  return sampling.build({"eos": -2, **section}, objective, model())


def prompts(seed=0, lengths=(1, 3, 6, 9)):
  rng = np.random.default_rng(seed)
  return [rng.integers(0, V - 1, n) for n in lengths]


def row(lengths=(1, 3, 6, 9), new=N, seed=0, **kw):
  return sampling.prompt_row(prompts(seed, lengths), N, new, **kw)
