"""Latents: what an image token carries, and the way back from tokens to pixels."""

from genmodels import config
from genmodels.latents.base import Latent
from genmodels.latents.grid import Patches, Raster
from genmodels.latents.pyramid import Pyramid

REGISTRY = {"raster": Raster, "patches": Patches, "pyramid": Pyramid}


def build(section) -> Latent:
  """The latent of a config section, dict(kind="raster" | "patches" | "pyramid", …).

  Raises:
    ConfigError: unknown kind or key, a wrong type, or sizes that do not fit each other.
  """
  return config.build_kind(REGISTRY, section, "latent")


__all__ = ["REGISTRY", "Latent", "Patches", "Pyramid", "Raster", "build"]
