"""Low-rank adapters as leaves beside the kernel: dict code, no model class changes.

`Linear` adds lora_a · lora_b when it finds them, so a tree without them *is* the model without adapters
(`strip`), and adding them changes no draw of the base. (arXiv:2106.09685)

Legend: R adapter rank.
"""

from __future__ import annotations

import math
import re
import zlib

import jax
import jax.numpy as jnp

from genmodels.models.config import TrunkConfig

# Contracted dimensions of a site's kernel, where it is not one.
CONTRACTED = {"o": 2}


def add(params, cfg: TrunkConfig, key: jax.Array):
  """`params` with adapters of `cfg.lora` beside every matching kernel; a fresh adapter is the identity.

  lora_a is normal with standard deviation 1/√R, lora_b zero. Each site's key is folded from its path,
  so it does not depend on which other sites have adapters.

  Raises:
    ValueError: `cfg.lora` is None, or its regex matches no site.
  """
  if cfg.lora is None:
    raise ValueError("lora.add: cfg.lora is None; set model.lora=dict(rank=…)")
  R = cfg.lora.rank
  found = []

  def visit(site, path):
    if not _matches(site, path, cfg):
      return site
    found.append(path)
    kernel = site["kernel"]
    lead, n_in = split(path)
    stack, ins, outs = kernel.shape[:lead], kernel.shape[lead : lead + n_in], kernel.shape[lead + n_in :]
    draw = jax.random.normal(
      jax.random.fold_in(key, zlib.crc32(path.encode())), (*stack, *ins, R), jnp.float32
    )
    a = (draw / math.sqrt(R)).astype(kernel.dtype)
    return {**site, "lora_a": a, "lora_b": jnp.zeros((*stack, R, *outs), kernel.dtype)}

  out = _walk(params, "", visit)
  if not found:
    raise ValueError(f"lora.add: targets={cfg.lora.targets!r} matches no linear site; sites: {sites(params)}")
  return out


def axes(logical_axes, cfg: TrunkConfig):
  """Logical axes of the tree that `add` returns, from those of the base."""

  def visit(site, path):
    if not _matches(site, path, cfg):
      return site
    kernel = site["kernel"]
    lead, n_in = split(path)
    a, b = kernel[: lead + n_in] + ("lora",), kernel[:lead] + ("lora",) + kernel[lead + n_in :]
    return {**site, "lora_a": a, "lora_b": b}

  return _walk(logical_axes, "", visit)


def strip(params):
  """The tree without adapters; arrays are shared."""
  return _walk(params, "", lambda site, path: {k: v for k, v in site.items() if not k.startswith("lora_")})


def merge(params, cfg: TrunkConfig):
  """Adapters added into their kernels: kernel + alpha/R · lora_a · lora_b.

  Raises:
    ValueError: gated adapters: no single kernel is what both kinds of slots see.
  """
  if cfg.lora.gated:
    raise ValueError(
      "lora.merge: a gated adapter acts at some slots only, so it cannot become part of the kernel"
    )

  def visit(site, path):
    if "lora_a" not in site:
      return site
    a, b, kernel = site["lora_a"], site["lora_b"], site["kernel"]
    product = lambda a, b: jnp.tensordot(a.astype(jnp.float32), b.astype(jnp.float32), 1)
    for _ in range(split(path)[0]):
      product = jax.vmap(product)
    update = product(a, b)
    kernel = (kernel + cfg.lora.alpha / cfg.lora.rank * update).astype(kernel.dtype)
    return {k: v for k, v in {**site, "kernel": kernel}.items() if not k.startswith("lora_")}

  return _walk(params, "", visit)


def sites(tree) -> list[str]:
  """Paths of the linear sites of a tree."""
  found = []
  _walk(tree, "", lambda site, path: found.append(path) or site)
  return found


def _matches(site, path: str, cfg: TrunkConfig) -> bool:
  return re.fullmatch(cfg.lora.targets, path) is not None


def split(path: str) -> tuple[int, int]:
  """Leading stacked dimensions and contracted dimensions of a site's kernel."""
  stacked = path.startswith("stack/") + ("/experts/" in path)
  return stacked, CONTRACTED.get(path.rsplit("/", 1)[-1], 1)


def _walk(tree, path: str, visit):
  if not isinstance(tree, dict):
    return tree
  if "kernel" in tree:
    return visit(tree, path)
  return {k: _walk(v, f"{path}/{k}" if path else k, visit) for k, v in tree.items()}
