"""Shapes of what programs take, as arrays of them would lie on described devices."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from realjax.core.arrays import PyTree
from realjax.dataflow.graph import DataflowGraph
from realjax.functions.packed import ModelProgram
from realjax.functions.routers import RouterInputs
from realjax.functions.train import TrainProgram, TrainState
from realjax.models import quantized, transformer
from realjax.models.config import ModelConfig
from realjax.parallel.sharding import parameter_shardings, rows_sharding

Shapes = dict[str, jax.ShapeDtypeStruct]


def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """Return an array's shape and type."""
    return jax.ShapeDtypeStruct(shape, dtype)


def placed(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    """Return an array's shape and type, laid as a sharding says."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def on_mesh(mesh: Mesh, arrays: Shapes) -> Shapes:
    """Lay the rows of batch keys over a mesh."""
    return {
        key: placed(value, rows_sharding(mesh, value.shape[0]))
        for key, value in arrays.items()
    }


def _abstract(program: ModelProgram, dtype: Any, weights: str = "") -> PyTree:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype or dtype),
        quantized.abstract(transformer.abstract_parameters(program.config), weights),
        is_leaf=lambda node: hasattr(node, "axes"),
    )


def parameters(
    program: ModelProgram, mesh: Mesh, dtype: Any, weights: str = ""
) -> PyTree:
    """Return the parameters of a model on a mesh.

    Args:
        program: the model.
        mesh: of the call.
        dtype: of the parameters.
        weights: of the matrices, if of 8 bits.
    """
    abstract = transformer.abstract_parameters(program.config)
    shardings = parameter_shardings(
        quantized.abstract(abstract, weights), mesh, options=program.options
    )
    return jax.tree.map(placed, _abstract(program, dtype, weights), shardings)


def train_state(train: TrainProgram, program: ModelProgram) -> TrainState:
    """Return masters and moments of a model that is trained."""
    masters = _abstract(program, jnp.float32)
    trained = train.trained(TrainState(masters, None)).parameters
    moments = jax.eval_shape(train.optimizer.init, trained)
    return jax.tree.map(placed, TrainState(masters, moments), train.shardings)


def router_inputs(config: ModelConfig) -> RouterInputs | None:
    """Return what the routers of a mixture of experts, and dropout, need to know."""
    moe = config.moe
    if moe is None and not config.draws_noise:
        return None
    has_losses = moe is not None and (moe.aux_loss_coef or moe.z_loss_coef)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return RouterInputs(
        scale=array((), jnp.float32) if has_losses else None,
        noise_key=key if config.draws_noise else None,
    )


def data_shapes(
    graph: DataflowGraph, size: int, prompt_width: int, width: int
) -> Shapes:
    """Give the shapes of what the data set holds."""
    of_tokens = {
        "tokens": jnp.int32,
        "completion_mask": jnp.bool_,
        "ref_logprobs": jnp.float32,
        "mismatched_tokens": jnp.int32,
        "mismatched_ref_logprobs": jnp.float32,
    }
    of_rows = {
        "pair_weights": jnp.float32,
        "is_desirable": jnp.bool_,
        "mismatched_lengths": jnp.int32,
    }
    known = {"prompts": array((size, prompt_width), jnp.int32)}
    known |= {key: array((size, width), dtype) for key, dtype in of_tokens.items()}
    known |= {key: array((size,), dtype) for key, dtype in of_rows.items()}
    for key in graph.inputs:
        if key not in known:
            raise ValueError(
                f"The graph reads {key!r} from the data set. Compiled without data can"
                f" be what reads {', '.join(known)}."
            )
    return {key: known[key] for key in graph.inputs}
