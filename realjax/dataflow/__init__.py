"""Algorithms as graphs of model function calls, and the plans that run them."""

from realjax.dataflow.graph import DataflowGraph, ModelFunctionCall, call, following

__all__ = ["DataflowGraph", "ModelFunctionCall", "call", "following"]
