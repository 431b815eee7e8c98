"""Layouts: where each token of each stream sits. Deterministic; a layout draws no random number."""

from genmodels.layouts.streams import Streams

REGISTRY = {"streams": Streams}

__all__ = ["REGISTRY", "Streams"]
