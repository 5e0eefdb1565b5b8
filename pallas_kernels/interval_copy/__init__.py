"""Blocks of arrays into one buffer, and from buffers to their places in an array."""

from pallas_kernels.interval_copy.api import (
    copy,
    explain_pack,
    explain_unpack,
    pack,
    plan_copy,
    unpack,
)
from pallas_kernels.interval_copy.blocks import Aligned, Block
from pallas_kernels.interval_copy.plans import Plan
from pallas_kernels.interval_copy.slices import average

__all__ = [
    "Aligned",
    "Block",
    "Plan",
    "average",
    "copy",
    "explain_pack",
    "explain_unpack",
    "pack",
    "plan_copy",
    "unpack",
]
