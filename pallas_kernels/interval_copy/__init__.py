"""Blocks of arrays into one buffer, and from buffers to their places in an array."""

from pallas_kernels.interval_copy.api import pack, unpack
from pallas_kernels.interval_copy.blocks import Block

__all__ = ["Block", "pack", "unpack"]
