"""Sampling: one loop over the objective's own view, for every model. See docs/sampling.md."""

from genmodels.sampling import quota
from genmodels.sampling.cache import POLICIES, CachePolicy
from genmodels.sampling.config import Guidance, SamplerConfig, at_step, build
from genmodels.sampling.loop import Sampler
from genmodels.sampling.run import Run, during_training, load_run, sampler_of
from genmodels.sampling.state import Ask, Result, State, prompt_row

__all__ = [
  "POLICIES",
  "Ask",
  "CachePolicy",
  "Guidance",
  "Result",
  "Run",
  "Sampler",
  "SamplerConfig",
  "State",
  "at_step",
  "build",
  "during_training",
  "load_run",
  "prompt_row",
  "quota",
  "sampler_of",
]
