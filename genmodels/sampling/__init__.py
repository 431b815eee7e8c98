"""Sampling: one loop over the objective's own view, for every model. See docs/sampling.md."""

from genmodels.sampling import active, commit, draw, mix, quota, remask, stop
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
  "active",
  "at_step",
  "build",
  "commit",
  "draw",
  "during_training",
  "load_run",
  "mix",
  "prompt_row",
  "quota",
  "remask",
  "sampler_of",
  "stop",
]
