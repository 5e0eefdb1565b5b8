"""Draws of the next token from what top-k, top-p and min-p leave, without a sort."""

from pallas_kernels.sampling.api import explain, greedy, sample
from pallas_kernels.sampling.filters import LARGEST_ID_SET, Draw, Form
from pallas_kernels.sampling.sharded import sharded_sample

__all__ = [
    "LARGEST_ID_SET",
    "Draw",
    "Form",
    "explain",
    "greedy",
    "sample",
    "sharded_sample",
]
