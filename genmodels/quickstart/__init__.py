"""`genmodels quickstart`: from this machine's own text to a trained, converted, evaluated, sampled model.

recipes.py   the configs of its runs        run.py     the stages, and the smoke run
report.py    summary.json as one HTML page  live.py    the lines a person watches
"""

from genmodels.quickstart.run import Options, main, quickstart

__all__ = ["Options", "main", "quickstart"]
