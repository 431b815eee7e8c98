"""Tokenizers: bytes built in, Hugging Face `tokenizers` files, byte-level BPE training.

A tokenizer has `vocab_size`, `specials` {"bos", "eos", "mask", "pad"} → id, `encode`, `decode`, `hash` and
`token_bytes`. Special ids are never made from text and are left out of decoded text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers as hf
import xxhash

SPECIALS = ("bos", "eos", "mask", "pad")
# Names under which existing vocabularies keep each special; where none is found one is appended.
NAMES = {
  "bos": ("<bos>", "<s>", "<|begin_of_text|>", "[CLS]", "<|endoftext|>"),
  "eos": ("<eos>", "</s>", "<|end_of_text|>", "[SEP]", "<|endoftext|>"),
  "mask": ("<mask>", "[MASK]", "<|mask|>", "<|mdm_mask|>", "<|MASK|>"),
  "pad": ("<pad>", "[PAD]", "<|pad|>"),
}
FILE = "tokenizer.json"


class ByteTokenizer:
  """Ids 0 … 255 are UTF-8 bytes; 256 BOS, 257 EOS, 258 MASK, 259 PAD."""

  kind = "byte"
  vocab_size = 260
  specials = {"bos": 256, "eos": 257, "mask": 258, "pad": 259}
  hash = "byte-260"
  exact_bytes = True

  def encode(self, text: str) -> np.ndarray:
    """Ids uint8[bytes] of a text, without specials. Lone surrogates are replaced by '?'."""
    return np.frombuffer(text.encode("utf-8", "replace"), np.uint8)

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    return [self.encode(t) for t in texts]

  def encode_special(self, text: str) -> np.ndarray:
    """As `encode`: no text spells a special."""
    return self.encode(text)

  def special_names(self) -> tuple[str, ...]:
    return ()

  def decode(self, ids) -> str:
    """Text of ids; specials are skipped, invalid UTF-8 is replaced by U+FFFD."""
    ids = np.asarray(ids).ravel()
    return ids[(ids >= 0) & (ids < 256)].astype(np.uint8).tobytes().decode("utf-8", "replace")

  def vocabulary(self) -> dict[str, int]:
    """{token: id} without the four specials."""
    return {chr(i): i for i in range(256)}

  def token_bytes(self) -> np.ndarray:
    """int32[vocab_size]: bytes of source text that each id stands for (0 for specials)."""
    return (np.arange(self.vocab_size) < 256).astype(np.int32)

  def save(self, directory: str) -> None:
    _write(directory, {"genmodels": "byte", "vocab_size": self.vocab_size, "specials": self.specials})


class FileTokenizer:
  """A Hugging Face `tokenizers` JSON file.

  Args:
    text: content of the file.
    specials: {"bos": "<s>", …} names in the file; by default the usual names are looked for. A special that
      is not there is appended behind the vocabulary (an imported model then needs the extra embedding rows).
  """

  kind = "file"

  def __init__(self, text: str, specials: dict[str, str] | None = None):
    self._tokenizer = hf.Tokenizer.from_str(text)
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self._tokenizer.encode_special_tokens = True  # text that spells "<mask>" is text
    wanted, self.specials = dict(specials or {}), {}
    for key in SPECIALS:
      names = (wanted.pop(key),) if key in wanted else NAMES[key]
      ids = [i for i in map(self._tokenizer.token_to_id, names) if i is not None]
      if not ids:
        self._tokenizer.add_special_tokens([names[0]])
        ids = [self._tokenizer.token_to_id(names[0])]
      self.specials[key] = ids[0]
    if wanted:
      raise ValueError(f"tokenizer specials {sorted(wanted)}: unknown, expected some of {SPECIALS}")
    self.names = {k: self._tokenizer.id_to_token(i) for k, i in self.specials.items()}
    # Ids may have holes: the size that a model needs is the largest id + 1.
    self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    self._json = self._tokenizer.to_str()
    self.hash = xxhash.xxh3_64_hexdigest((self._json + json.dumps(self.specials, sort_keys=True)).encode())
    decoder = json.loads(self._json).get("decoder") or {}
    added = json.loads(self._json).get("added_tokens", ())
    self._special_names = tuple(t["content"] for t in added if t["special"])
    self._byte_level = "ByteLevel" in json.dumps(decoder)
    # Byte-level vocabularies name each byte by one character: counts are exact. Others are counted by their
    # text. self.exact_bytes = self._byte_level

  @classmethod
  def from_file(cls, path: str, specials: dict[str, str] | None = None) -> FileTokenizer:
    with open(path) as f:
      return cls(f.read(), specials)

  def encode(self, text: str) -> np.ndarray:
    """Ids int32[n] of a text, without specials."""
    return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

  def encode_published(self, text: str) -> np.ndarray:
    """Ids int32[n] as the file's publisher makes them: with the specials that its post-processor adds (BOS),
    and with special tokens that the text spells out taken as such."""
    self._tokenizer.encode_special_tokens = False
    try:
      return np.asarray(self._tokenizer.encode(text, add_special_tokens=True).ids, np.int32)
    finally:
      self._tokenizer.encode_special_tokens = True

  def encode_special(self, text: str) -> np.ndarray:
    """Ids int32[n] of a template's text: special tokens that it spells out are meant as such."""
    self._tokenizer.encode_special_tokens = False
    try:
      return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
    finally:
      self._tokenizer.encode_special_tokens = True

  def special_names(self) -> tuple[str, ...]:
    """Texts of the tokens that stand for no text."""
    return self._special_names

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.asarray(e.ids, np.int32) for e in encoded]

  def decode(self, ids) -> str:
    """Text of ids; specials and ids out of the vocabulary are skipped."""
    skip = set(self.specials.values())
    ids = [int(i) for i in np.asarray(ids).ravel() if 0 <= i < self.vocab_size and int(i) not in skip]
    return self._tokenizer.decode(ids, skip_special_tokens=True)

  def vocabulary(self) -> dict[str, int]:
    """{token: id} without the four specials."""
    known = self._tokenizer.get_vocab(with_added_tokens=True)
    return {t: i for t, i in known.items() if i not in self.specials.values()}

  def token_bytes(self) -> np.ndarray:
    """int32[vocab_size]: bytes of source text that each id stands for (0 for specials)."""
    out = np.zeros(self.vocab_size, np.int32)
    for token, i in self._tokenizer.get_vocab(with_added_tokens=True).items():
      if self._byte_level:
        out[i] = len(token)
      elif len(token) == 6 and token.startswith("<0x"):
        out[i] = 1
      else:
        out[i] = len(token.replace("\u2581", " ").removeprefix("##").encode())
    added = json.loads(self._json).get("added_tokens", ())
    for token in added:
      out[token["id"]] = 0 if token["special"] else len(token["content"].encode())
    return out

  def save(self, directory: str) -> None:
    _write(directory, {"genmodels": "file", "specials": self.names, "tokenizer": json.loads(self._json)})


def train_bpe(texts: Iterable[str], vocab_size: int) -> FileTokenizer:
  """A byte-level BPE of `vocab_size` ids (Sennrich et al. 2016, arXiv:1508.07909), the four specials
  included.

  Raises ValueError if vocab_size leaves no room for the 256 bytes and the specials.
  """
  if vocab_size < 256 + len(SPECIALS):
    raise ValueError(f"vocab_size={vocab_size}: a byte-level BPE needs at least {256 + len(SPECIALS)}")
  tokenizer = hf.Tokenizer(hf.models.BPE())
  tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = hf.decoders.ByteLevel()
  trainer = hf.trainers.BpeTrainer(
    vocab_size=vocab_size - len(SPECIALS), show_progress=False,
    initial_alphabet=sorted(hf.pre_tokenizers.ByteLevel.alphabet()),
  )  # fmt: skip
  tokenizer.train_from_iterator(texts, trainer)
  tokenizer.add_special_tokens([NAMES[k][0] for k in SPECIALS])
  return FileTokenizer(tokenizer.to_str())


def load(name: str, specials: dict[str, str] | None = None) -> ByteTokenizer | FileTokenizer:
  """A tokenizer by name: "byte", a `tokenizers` JSON file, or a directory that holds tokenizer.json.

  Raises ValueError if there is no such file.
  """
  if name == "byte":
    return ByteTokenizer()
  path = os.path.join(name, FILE) if os.path.isdir(name) else name
  if not os.path.isfile(path):
    raise ValueError(
      f"tokenizer {name!r}: expected 'byte', a tokenizer.json or a directory with one; {path} is missing"
    )
  with open(path) as f:
    tree = json.load(f)
  if tree.get("genmodels") == "byte":
    return ByteTokenizer()
  if tree.get("genmodels") == "file":
    return FileTokenizer(json.dumps(tree["tokenizer"]), specials or tree["specials"])
  return FileTokenizer(json.dumps(tree), specials)


def _write(directory, tree):
  os.makedirs(directory, exist_ok=True)
  with open(os.path.join(directory, FILE), "w") as f:
    json.dump(tree, f)
