"""Evaluations: likelihood on held-out data by one estimator, in training and on the command line."""

from genmodels.evals.likelihood import METRIC, EvalConfig, Evaluator

__all__ = ["METRIC", "EvalConfig", "Evaluator"]
