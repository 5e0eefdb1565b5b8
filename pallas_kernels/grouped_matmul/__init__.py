"""Rows times the matrix of the group they belong to, as experts need it."""

from pallas_kernels.grouped_matmul.api import grouped_matmul

__all__ = ["grouped_matmul"]
