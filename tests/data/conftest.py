"""Small data sets."""

import numpy as np
import pytest

from genmodels.data import packing, records


def ids(document: int, n: int, vocab: int = 1000) -> np.ndarray:
  """Ids of a document, the same on every machine."""
  return (packing.hash64(np.uint64(document), np.arange(n)) % np.uint64(vocab)).astype(np.int64)


def length(document: int, top: int) -> int:
  return 2 + int(packing.hash64(document, 99)) % top


@pytest.fixture
def dataset(tmp_path):
  """write(name="d", n=60, top=150, shard_bytes=…) -> (path, [ids of each document])."""

  def write(name="d", n=60, top=150, shard_bytes=2000, salt=0, vocab=1000, tokenizer=None, **kw):
    path = str(tmp_path / name)
    docs = [ids(i + salt, length(i + salt, top), vocab) for i in range(n)]
    with records.Writer(path, vocab_size=vocab, shard_bytes=shard_bytes, tokenizer=tokenizer) as w:
      for i, d in enumerate(docs):
        w.write(records.Document(d, context=1, source_bytes=2 * len(d), label=i % 7, **kw))
    return path, docs

  return write
