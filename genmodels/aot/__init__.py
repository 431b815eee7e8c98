"""Compiling for TPU pods ahead of time, on a machine without one."""

from genmodels.aot.step import program
from genmodels.aot.topology import Chip, chip, devices, target

__all__ = ["Chip", "chip", "devices", "program", "target"]
