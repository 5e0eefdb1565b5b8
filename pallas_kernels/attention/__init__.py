"""Causal attention over packed rows."""

from pallas_kernels.attention.api import attention, explain

__all__ = ["attention", "explain"]
