"""Objectives: row and noise → inputs, targets, denominators → sums. They import no model."""

from genmodels.objectives.base import Nets, Objective, Term, build, layout

__all__ = ["Nets", "Objective", "Term", "build", "layout"]
