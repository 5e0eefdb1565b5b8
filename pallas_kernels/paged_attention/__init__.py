"""Attention from new tokens to pages of keys and values."""

from pallas_kernels.paged_attention.api import explain, paged_attention

__all__ = ["explain", "paged_attention"]
