"""An imported folder: one safetensors file per leaf, read by the slices that the devices own.

  DST/
    import.json          what was imported, leaf by leaf with digests; without it nothing counts
    config.json          ours: model, objective, data; `train`, `eval` and `sample` read it
    hf_config.json       the checkpoint's own config.json
    leaves/*.safetensors one leaf each, the layers of a stack stacked; '/' of its path is '.' in the file name
    tokenizer.json …     tokenizer, chat template, generation config, as they were

`Folder` answers like a `Manager` whose only step is 0 and whose only tree is "model".
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np

from genmodels.checkpoint import tensors, verify
from genmodels.checkpoint.manager import RestoreError
from genmodels.parallel import multihost

MANIFEST = "import.json"
CONFIG = "config.json"
HF_CONFIG = "hf_config.json"
LEAVES = "leaves"
FORMAT = 1
PREFIX = "trees/model/"
# Of a source folder, taken along: what makes text of ids and says how the model wants to be used.
CARRIED = (
  "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
  "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "generation_config.json",
  "chat_template.jinja", "chat_template.json", "LICENSE", "LICENSE.txt", "NOTICE",
)  # fmt: skip
TEMPLATES = "additional_chat_templates"


def is_imported(path: str | os.PathLike) -> bool:
  """Whether `path` is a finished import."""
  return (pathlib.Path(path).expanduser() / MANIFEST).is_file()


def leaf_file(root: pathlib.Path, leaf: str) -> pathlib.Path:
  return root / LEAVES / (leaf.replace("/", ".") + ".safetensors")


@dataclasses.dataclass(frozen=True)
class Folder:
  """A finished import, for reading.

  Fields:
    directory: its path.
    manifest: content of import.json: format, layout, source, fingerprint, hf_dtypes {tensor: dtype},
      duplicates, leaves {leaf: {"shape", "dtype", "digest"}}.
  """

  directory: pathlib.Path
  manifest: dict

  @classmethod
  def open(cls, path: str | os.PathLike) -> Folder:
    """Raises RestoreError: not a finished import, or a damaged manifest."""
    root = pathlib.Path(path).expanduser().absolute()
    try:
      manifest = verify.unseal(json.loads((root / MANIFEST).read_text()), str(root / MANIFEST))
    except FileNotFoundError:
      raise RestoreError(f"{root} holds no {MANIFEST}: it is no (finished) import") from None
    except (json.JSONDecodeError, UnicodeDecodeError, verify.SealError) as e:
      raise RestoreError(f"{root / MANIFEST} is damaged: {e}; import again") from None
    if manifest.get("format") != FORMAT:
      raise RestoreError(
        f"{root}: format {manifest.get('format')}, this version reads {FORMAT}; import again"
      )
    return cls(root, manifest)

  def hf_config(self) -> dict:
    """The source's config.json."""
    return json.loads((self.directory / HF_CONFIG).read_text())

  def leaf(self, name: str) -> np.ndarray:
    """A leaf as a read-only memory map.

    Raises:
      RestoreError: its file is missing, damaged, or holds another tensor.
    """
    want = self.manifest["leaves"][name]
    try:
      found = tensors.header(leaf_file(self.directory, name))[0]
    except tensors.TensorError as e:
      raise RestoreError(f"{e} (an imported leaf: import again)") from None
    t = found.get(name)
    if t is None or list(t.shape) != want["shape"] or str(tensors.DTYPES[t.dtype]) != want["dtype"]:
      raise RestoreError(
        f"{leaf_file(self.directory, name)}: expected {name} {want['dtype']}{want['shape']}, got "
        + ", ".join(f"{n} {t.dtype}{list(t.shape)}" for n, t in found.items())
      )
    return t.open()

  # -- what a Manager answers -----------------------------------------------------------------------

  def latest(self) -> int:
    return 0

  def steps(self) -> list[int]:
    return [0]

  def recorded(self, step: int) -> dict[str, dict]:
    """{leaf: {"shape", "dtype", "digest"}}, named as in a checkpoint."""
    self._only(step)
    return {PREFIX + name: d for name, d in self.manifest["leaves"].items()}

  def read(self, step: int | None = None, shardings=None) -> tuple[dict[str, jax.Array], int, Any]:
    """As Manager.read: each process maps the files and copies only the slices of its own devices.

    Raises:
      RestoreError: a file is missing or damaged on any process, or the bits do not have their digest.
    """
    self._only(0 if step is None else step)
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = shardings or (lambda *_: one)
    values, error = {}, ""
    try:
      for name, d in self.recorded(0).items():
        sharding = shardings(name, tuple(d["shape"]))
        if sharding is not None:
          values[name] = _place(self.leaf(name.removeprefix(PREFIX)), sharding)
      jax.block_until_ready(values)
    except (RestoreError, OSError) as e:
      error = str(e)
    # One process may read what another cannot: nobody goes on alone.
    errors = multihost.gather_text(error)
    if any(errors):
      where = next(i for i, e in enumerate(errors) if e)
      raise RestoreError(errors[where] + (f" (process {where})" if len(errors) > 1 else ""))
    sums, recorded = verify.digest(values), self.recorded(0)
    wrong = [name for name, got in sums.items() if tuple(recorded[name]["digest"]) != got]
    if wrong:
      raise RestoreError(
        f"{self.directory}: {tensors.some(n.removeprefix(PREFIX) for n in wrong)}: the bits read do not have "
        "the digest taken at the import; the files were changed or damaged: import again"
      )
    return values, 0, {}

  def restore(self, abstract_state, step: int | None = None):
    """An import holds parameters and no training state: always a RestoreError."""
    raise RestoreError(
      f"{self.directory} is an imported folder, parameters without optimizer state: use init.kind='workdir'"
    )

  def _only(self, step: int) -> None:
    if step != 0:
      raise RestoreError(f"{self.directory} is an imported folder: its only step is 0, asked for {step}")


def _place(leaf: np.ndarray, sharding) -> jax.Array:
  """The array whose shards are copied out of the memory map, one device's slice at a time."""
  return jax.make_array_from_callback(leaf.shape, sharding, lambda index: np.array(leaf[index]))
