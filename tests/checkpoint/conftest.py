"""fsync is most of a small import's time, and no test loses power."""

import pytest

from genmodels.checkpoint import tensors


@pytest.fixture(autouse=True)
def no_sync(monkeypatch):
  monkeypatch.setattr(tensors, "sync", lambda path: None)
