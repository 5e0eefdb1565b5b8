"""How many bytes of a model's parameters a device keeps, and of arrays like them.

They are arrays whose shardings are known, and counted exactly. A search asks for the
same few layouts many times: data parallelism changes nothing, nor do the devices.
"""

import functools
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from realjax.core.arrays import PyTree
from realjax.dataflow.graph import DataflowGraph
from realjax.dataflow.plan import ExecutionPlan
from realjax.dataflow.schedule import Place
from realjax.models import quantized, transformer
from realjax.models.config import ModelConfig
from realjax.models.parameters import split
from realjax.parallel.allocation import Allocation
from realjax.parallel.mesh import abstract_mesh
from realjax.parallel.sharding import bytes_per_device, padded_for

MOMENTS = 2
"""Arrays like what is trained that the optimizer keeps: Adam's two."""

MOST_LAYOUTS = 2**14
"""That are remembered."""


def fitted(model: ModelConfig, allocation: Allocation) -> ModelConfig:
    """Return a model padded for an allocation; one that is already comes back as it is.

    Args:
        model: of the role.
        allocation: of the call.
    """
    parts = allocation.stage * allocation.tensor * allocation.fsdp
    is_even = model.padded_vocab_size % parts == 0
    if is_even and model.padded_num_layers % allocation.stage == 0:
        return model
    return _padded(model, _layout(allocation))


def parameter_bytes(model: ModelConfig, place: Place) -> int:
    """Count the bytes of a model's parameters on each device of a place.

    Args:
        model: padded for it.
        place: layout and type.
    """
    layout, weights = _layout(place.allocation), place.weights
    return _parameter_bytes(model, layout, place.dtype, weights)


def base_bytes(model: ModelConfig, place: Place) -> int:
    """Count those of what stands beside adapters; 0 for a model that has none.

    Args:
        model: padded for it.
        place: layout and type.
    """
    layout, weights = _layout(place.allocation), place.weights
    return _parameter_bytes(model, layout, place.dtype, weights, "base")


def cut_bytes(model: ModelConfig, allocation: Allocation) -> int:
    """Count float32 arrays like what is trained, cut over fsdp also with zero1.

    Args:
        model: padded for the allocation.
        allocation: of the call.
    """
    layout = _layout(allocation, is_cut=True)
    return _parameter_bytes(model, layout, "float32", "", "trained")


def bases_kept(
    graph: DataflowGraph, plan: ExecutionPlan, models: Mapping[str, ModelConfig]
) -> frozenset[str]:
    """Return the roles whose bases stay where their calls are, beside adapters.

    Those of which no call's allocation has `+offload`, which asks for room.

    Args:
        graph: of the algorithm.
        plan: allocations.
        models: of each role.
    """
    offloading = {
        graph.calls[name].role
        for name, call in plan.calls.items()
        if "offload" in call.allocation.options
    }
    return frozenset(
        role
        for role, model in models.items()
        if model.adapters is not None and role not in offloading
    )


@functools.lru_cache(maxsize=MOST_LAYOUTS)
def abstract(model: ModelConfig) -> PyTree:
    """Return `transformer.abstract_parameters`; not to be written to."""
    return transformer.abstract_parameters(model)


def _layout(allocation: Allocation, *, is_cut: bool = False) -> Allocation:
    """Return what of an allocation decides how parameters lie, or what fsdp cuts."""
    is_zero1 = "zero1" in allocation.options and not is_cut
    sizes = (allocation.fsdp, allocation.tensor, allocation.stage, allocation.expert)
    return _layout_of(*sizes, is_zero1)


@functools.lru_cache(maxsize=MOST_LAYOUTS)
def _layout_of(
    fsdp: int, tensor: int, stage: int, expert: int, is_zero1: bool
) -> Allocation:
    return Allocation(
        fsdp=fsdp,
        tensor=tensor,
        stage=stage,
        expert=expert,
        options=frozenset({"zero1"} if is_zero1 else ()),
    )


@functools.lru_cache(maxsize=MOST_LAYOUTS)
def _padded(model: ModelConfig, layout: Allocation) -> ModelConfig:
    return padded_for(model, [layout])


@functools.lru_cache(maxsize=MOST_LAYOUTS)
def _parameter_bytes(
    model: ModelConfig, layout: Allocation, dtype: str, weights: str, part: str = "all"
) -> int:
    tree = abstract(model)
    if part != "all":
        tree = split(tree, model)[part == "base"]
    return bytes_per_device(
        quantized.abstract(tree, weights) if weights else tree,
        abstract_mesh(layout),
        dtype=np.dtype(jnp.dtype(dtype)),
        options=layout.options,
    )
