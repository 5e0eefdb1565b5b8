"""Attention from new tokens to pages of keys and values."""

from pallas_kernels.paged_attention.api import (
    explain,
    paged_attention,
    paged_attention_in_part,
)
from pallas_kernels.paged_attention.partials import Partials, combine

__all__ = [
    "Partials",
    "combine",
    "explain",
    "paged_attention",
    "paged_attention_in_part",
]
