"""genmodels: visual autoregressive, masked-diffusion and block-diffusion models on device meshes."""

__version__ = "0.1.0"
