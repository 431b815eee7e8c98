"""Adapters on export: merged into their kernels, or in the files of PEFT.

Legend: D input width of a site · O its output width · R adapter rank.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np

from genmodels import config
from genmodels.checkpoint import hf_names, tensors
from genmodels.config import ConfigError
from genmodels.models import Lora, TrunkConfig, lora

CHOICES = ("merge", "drop", "peft")
A, B = "/lora_a", "/lora_b"
CONFIG, WEIGHTS, GATE = "adapter_config.json", "adapter_model.safetensors", "gate.json"
PREFIX = "base_model.model."  # of every tensor that PEFT saves


def sites(leaves: Iterable[str]) -> list[str]:
  """Paths of the sites with adapters among '/'-joined leaf names."""
  return sorted(n.removesuffix(A) for n in leaves if n.endswith(A))


def check(choice: str, cfg: TrunkConfig, adapted: Collection[str]) -> None:
  """Whether a model with adapters at the sites `adapted` can be exported that way.

  Raises:
    ConfigError: an unknown way, a gated adapter to be merged, or no adapters where those alone are asked for.
  """
  if choice not in CHOICES:
    raise ConfigError("unknown way", key="--adapters", value=choice, fix=", ".join(CHOICES))
  if choice == "peft" and not adapted:
    raise ConfigError("the run has no adapters", key="--adapters", value=choice, fix="leave it out")
  if choice == "merge" and adapted and cfg.lora.gated:
    raise ConfigError(
      f"the adapters of {len(adapted)} sites are gated: they act at masks alone, and no single weight is "
      "what both kinds of tokens see", key="--adapters", value=choice,
      fix="'peft' for the adapters alone, 'drop' for the base model, which they leave as it was",
    )  # fmt: skip


def merged(
  value: Callable[[str], np.ndarray], adapted: Iterable[str], spec: Lora
) -> Callable[[str], np.ndarray]:
  """`value` (leaf name → array) with adapters added into the kernels of the sites `adapted`.

  Layer by layer in float32, then rounded to the kernel's type: above the leaf itself one layer is in memory.
  """
  adapted = set(adapted)

  def read(name: str) -> np.ndarray:
    site = name.removesuffix("/kernel")
    if name == site or site not in adapted:
      return value(name)
    kernel = np.array(value(name))
    stacked, _ = lora.split(site)
    each = lambda x: x.reshape(-1, *x.shape[stacked:])  # one layer, or one expert of one, at a time
    for out, a, b in zip(each(kernel), each(value(site + A)), each(value(site + B)), strict=True):
      update = np.tensordot(np.asarray(a, np.float32), np.asarray(b, np.float32), 1)
      out[...] = (out.astype(np.float32) + spec.alpha / spec.rank * update).astype(out.dtype)
    return kernel

  return read


def write(
  work: pathlib.Path, cfg: TrunkConfig, layout: str, values: Callable[[str], np.ndarray],
  adapted: Collection[str], dtype: str, facts: Mapping[str, Any],
) -> dict[str, int]:  # fmt: skip
  """A PEFT folder: adapter_config.json and adapter_model.safetensors, one pair of tensors a site and layer.

  Names and shapes are those of PEFT's LoRA on torch Linear modules: `<prefix><module>.lora_A.weight` [R, D]
  and `….lora_B.weight` [O, R], scaled by lora_alpha/r. PEFT knows no gate: a gated adapter has gate.json
  beside it, which says at which tokens it acts.

  Args:
    values: leaf name → array. adapted: sites. dtype: of the tensors, "F32", "BF16" or "F16".
    facts: what gate.json says of the model besides (mask_token_id).

  Returns:
    {"tensors", "bytes", "files"}.

  Raises:
    ConfigError: a layout whose modules are no torch Linear, or a site without a name there.
  """
  if not hf_names.LAYOUTS[layout].transpose:
    raise ConfigError(
      "its modules hold q, k and v in one or store weights as [in, out]; our adapters are of single sites",
      key="--layout", value=layout, fix="--adapters merge",
    )  # fmt: skip
  stacked = [site for site in adapted if lora.split(site)[0] > 1]
  if stacked:
    raise ConfigError(
      f"adapters of stacked experts ({stacked[0]}) have no module of their own", key="model.lora.targets",
      value=cfg.lora.targets, fix="--adapters merge",
    )  # fmt: skip
  spec = cfg.lora
  bare = [e for e in hf_names.entries(cfg, layout) if e.leaf.endswith("/kernel")]
  modules = {e.name.removesuffix(".weight"): e for e in bare}
  mine = {m: e for m, e in modules.items() if e.leaf.removesuffix("/kernel") in set(adapted)}
  nameless = sorted(set(adapted) - {e.leaf.removesuffix("/kernel") for e in mine.values()})
  if nameless:
    raise ConfigError(
      f"{layout} has no module for the adapters of {', '.join(nameless[:4])}", key="model.lora.targets",
      value=spec.targets, fix="--adapters merge",
    )  # fmt: skip
  ends = sorted({m.rsplit(".", 1)[-1] for m in mine})
  exact = all(m in mine for m in modules if m.rsplit(".", 1)[-1] in ends)
  settings = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": None,
    "r": spec.rank,
    "lora_alpha": spec.alpha,
    "target_modules": ends if exact else sorted(mine),
    "lora_dropout": 0.0,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
  }
  named = {}
  for module, e in mine.items():
    site = e.leaf.removesuffix("/kernel")
    a, b = values(site + A), values(site + B)
    a, b = (a, b) if e.row is None else (a[e.row], b[e.row])
    named[f"{PREFIX}{module}.lora_A.weight"] = a.reshape(-1, spec.rank).T
    named[f"{PREFIX}{module}.lora_B.weight"] = b.reshape(spec.rank, -1).T
  tensors.create(work / WEIGHTS, {n: (dtype, x.shape) for n, x in named.items()}, {"format": "pt"})
  where = tensors.header(work / WEIGHTS)[0]
  for name, x in named.items():
    tensors.copy_into(where[name].open("r+"), x)
  config.write_json(work / CONFIG, settings)
  if spec.gated:
    config.write_json(work / GATE, {"gated": True, "acts_at": "masked tokens", **facts})
  return {"tensors": len(named), "bytes": sum(t.nbytes for t in where.values()), "files": 1}
