"""Where a role's parameters come from, and what it leaves behind.

a checkpoint's, or new ones  ─┐
adapters of a folder, or new ─┴▶ parameters ─▶ a checkpoint, merged, or adapters
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from realjax.core.arrays import Array, Key, PyTree
from realjax.data.tokenizer import Tokenizer
from realjax.dataflow.graph import DataflowGraph
from realjax.functions.function import Follow
from realjax.functions.role import Role, RoleConfig
from realjax.models import hf, lora_files
from realjax.models.config import ModelConfig
from realjax.models.lora import merged
from realjax.models.parameters import (
    LORA,
    divide,
    init_adapters,
    init_parameters,
    join,
    split,
    without_adapters,
)
from realjax.parallel.sharding import handles
from realjax.runtime.agreement import Agreement
from realjax.runtime.parameters import ParameterStore


def load_weights(role: Role, key: Key[Array, ""], shardings: PyTree) -> PyTree:
    """Load or draw a role's parameters, each straight to where it stays.

    Args:
        role: whose.
        key: of what is drawn.
        shardings: of all parameters.
    """
    model, config = role.model, role.config
    base_model = without_adapters(model)
    of_adapters, of_base = divide(shardings, LORA)
    if config.path:
        base = hf.load(
            config.path,
            config=base_model,
            shardings=of_base,
            head=model.head,
            label=config.label,
            key=key,
        )
    else:
        base = _drawn(functools.partial(init_parameters, base_model), key, of_base)
    if model.adapters is None:
        return base
    if config.lora.path:
        of_trained, _ = split(shardings, model)
        found = lora_files.load_adapters(config.lora.path, model, shardings=of_trained)
    else:
        found = _drawn(functools.partial(init_adapters, model), key, of_adapters)
    return join(found, base)


def save_weights(
    folder: pathlib.Path, role: Role, store: ParameterStore, tokenizer: Tokenizer
) -> None:
    """Write a role's folder in Hugging Face's format, or adapters in PEFT's.

    Args:
        folder: to make or replace; all processes call this.
        role: whose, and how its config exports adapters.
        store: has its parameters.
        tokenizer: saved into a whole model's folder.
    """
    model, agreement = role.model, Agreement(f"export of {role.name}")
    if model.adapters is None:
        parameters = store.saved_state(role.name)["parameters"]
    else:
        parameters = store.at_home(role.name)
    if model.adapters is not None and role.config.lora.export == "adapter":
        lora_files.save_adapters(
            folder, model, parameters, base=role.config.path, agreement=agreement
        )
    else:
        hf.save(
            folder,
            without_adapters(model),
            merged(parameters, model),
            tokenizer=tokenizer,
            role=role.name,
            agreement=agreement,
        )
    store.rest()


def check_lora(name: str, config: RoleConfig, graph: DataflowGraph) -> None:
    """Refuse adapters that nothing would train, or that cannot be followed.

    Args:
        name: of the role.
        config: of the role.
        graph: of the algorithm.

    Raises:
        ValueError: naming the role.
    """
    lora = config.lora
    if not lora.is_used:
        return
    if not lora.path and name not in graph.trained_roles:
        raise ValueError(
            f"Role {name!r} has lora.rank={lora.rank}, and no call trains it: new"
            " adapters change nothing. Set the rank to 0, or give the folder of"
            " trained ones as lora.path."
        )
    for node in graph.calls.values():
        spec = node.function
        if isinstance(spec, Follow) and name in (node.role, spec.source):
            raise ValueError(
                f"Role {name!r} has adapters, and {node.role!r} follows"
                f" {spec.source!r}: an average of adapters is not the adapter of the"
                " average. Train the role without lora, or let none follow."
            )


def has_score(config: RoleConfig, model: ModelConfig) -> bool:
    """Whether a language model gets a scalar head from the folder of its adapters."""
    scalar = dataclasses.replace(model, head="scalar")
    return bool(config.lora.path) and lora_files.has_score(config.lora.path, scalar)


def lasting(model: ModelConfig) -> dict[str, Any]:
    """Return what of a model the runs of one folder share.

    Padding follows the allocations, which may change, and so may types.
    """
    adapters = model.adapters and dataclasses.replace(model.adapters, base_dtype="")
    return dataclasses.asdict(
        dataclasses.replace(
            model, vocab_multiple=1, layer_multiple=1, adapters=adapters
        )
    )


def _drawn(draw: Callable, key: Key[Array, ""], shardings: PyTree) -> PyTree:
    """Random numbers, made where they shall lie."""
    first = jax.tree.leaves(shardings)[0]
    if first.addressable_devices:
        return jax.jit(draw, out_shardings=shardings)(key)
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    return handles(jax.tree.map(place, jax.eval_shape(draw, key), shardings))
