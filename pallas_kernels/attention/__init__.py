"""Causal attention over packed rows and over the slots of a cache."""

from pallas_kernels.attention.api import attention, cached_attention, explain

__all__ = ["attention", "cached_attention", "explain"]
