"""Data: records, tokenizers, the plan and the pipeline that reads it.

`build(section, cost)` gives a `Data`: what the trainer needs and all it needs. Nothing here imports jax: the
plan's workers stay light, and the packer asks the layout for costs through a callable that it is handed.
"""

from genmodels.data.pipeline import Data, Loader, Meta, build, meta, tokenizer
from genmodels.data.records import DataError

__all__ = ["Data", "DataError", "Loader", "Meta", "build", "meta", "tokenizer"]
