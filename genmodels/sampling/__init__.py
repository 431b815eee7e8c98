"""Sampling: one loop over the objective's own view, for every model. See docs/sampling.md."""

from genmodels.sampling.cache import POLICIES, CachePolicy
from genmodels.sampling.config import Guidance, SamplerConfig, at_step, build
from genmodels.sampling import quota
from genmodels.sampling.loop import Result, Sampler, State, prompt_row

__all__ = [
  "POLICIES",
  "CachePolicy",
  "Guidance",
  "Result",
  "Sampler",
  "SamplerConfig",
  "State",
  "at_step",
  "build",
  "prompt_row",
  "quota",
]
