"""Experiments on real text that anyone can run again: `python -m genmodels.studies.conversion`."""
