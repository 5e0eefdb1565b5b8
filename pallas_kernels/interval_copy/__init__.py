"""Blocks of arrays into one buffer, and from buffers to their places in an array."""

from pallas_kernels.interval_copy.api import pack, unpack
from pallas_kernels.interval_copy.blocks import Block
from pallas_kernels.interval_copy.slices import average

__all__ = ["Block", "average", "pack", "unpack"]
