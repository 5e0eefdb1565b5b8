"""How many bytes of a model's parameters a device keeps, and of arrays like them.

They are arrays whose shardings are known, and counted exactly. A search asks for the
same few layouts many times: data parallelism changes nothing, nor do the devices.
"""

import functools

import jax.numpy as jnp
import numpy as np

from realjax.core.arrays import PyTree
from realjax.dataflow.schedule import Place
from realjax.models import quantized, transformer
from realjax.models.config import ModelConfig
from realjax.parallel.allocation import Allocation
from realjax.parallel.mesh import abstract_mesh
from realjax.parallel.sharding import bytes_per_device, padded_for

MOMENTS = 2
"""Arrays like the masters that the optimizer keeps: Adam's two."""

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


def cut_bytes(model: ModelConfig, allocation: Allocation) -> int:
    """Count float32 arrays like the parameters, cut over fsdp also with zero1.

    Args:
        model: padded for the allocation.
        allocation: of the call.
    """
    return _parameter_bytes(model, _layout(allocation, is_cut=True), "float32", "")


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
    model: ModelConfig, layout: Allocation, dtype: str, weights: str
) -> int:
    return bytes_per_device(
        quantized.abstract(abstract(model), weights) if weights else abstract(model),
        abstract_mesh(layout),
        dtype=np.dtype(jnp.dtype(dtype)),
        options=layout.options,
    )
