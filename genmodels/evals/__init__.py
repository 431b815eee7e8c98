"""Evaluations: likelihood on held-out data by one estimator, in training and on the command line."""

from genmodels.evals import survey
from genmodels.evals.heldout import METRIC, EvalConfig, Evaluator
from genmodels.evals.likelihood import Likelihood, Tally, notes

__all__ = ["METRIC", "EvalConfig", "Evaluator", "Likelihood", "Tally", "notes", "survey"]
