"""Low-rank adapters of a model: what may have one, and their sum with the base.

`models.projection` has the arithmetic, `models.parameters` the leaves, `lora_files` the
folders.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from realjax.core.arrays import PyTree
from realjax.core.config import suggest
from realjax.models.config import PROJECTIONS, Adapters, ModelConfig
from realjax.models.families import family
from realjax.models.gathering import Merged
from realjax.models.layout import Stored
from realjax.models.parameters import LORA, divide, without_adapters

ALL_LINEAR = "all-linear"
"""Stands for every projection of the layers, in place of their names."""

HEADS = ("query", "key", "value")


class Place(NamedTuple):
    """A projection in the trees of a model and in its checkpoints.

    Attributes:
        group: "attention" or "mlp".
        kernel: as checkpoints store it.
    """

    group: str
    kernel: Stored

    @property
    def module(self) -> str:
        """Its module in transformers, as in "model.layers.{layer}.mlp.up_proj"."""
        return self.kernel.name.removesuffix(".weight")


def places(config: ModelConfig) -> dict[str, Place]:
    """Return every projection that may have an adapter, by its name of `PROJECTIONS`.

    Args:
        config: of the model, with adapters or without.
    """
    layers = _stored(config)["layers"]
    return {
        name: Place(group, layers[group][name]["kernel"])
        for name in PROJECTIONS
        for group in ("attention", "mlp")
        if name in layers.get(group, {})
    }


def stored_score(config: ModelConfig) -> Stored:
    """Return how checkpoints store a scalar head."""
    return _stored(config)["score"]["kernel"]


def is_fused(config: ModelConfig) -> bool:
    """Whether checkpoints hold query, key and value in one tensor, as GPT-2's do."""
    found = places(config)
    return len({found[name].kernel.name for name in HEADS}) == 1


def named_targets(config: ModelConfig, targets: Sequence[str]) -> tuple[str, ...]:
    """Return the projections that some names stand for, in the order of `PROJECTIONS`.

    Args:
        config: of the model.
        targets: names of `PROJECTIONS`; or those of transformers' modules, all of it
            or its end ("q_proj", "attn.c_proj"); or "all-linear".

    Raises:
        ValueError: for a name that stands for nothing here.
    """
    known, found = places(config), set()
    for target in targets:
        if target == ALL_LINEAR and config.moe is not None:
            raise ValueError(
                f"targets has {ALL_LINEAR!r}, and the model has experts, which have no"
                " adapters here. Name projections of its attention:"
                f" {', '.join(_ends(known))}."
            )
        if target in known:
            found.add(target)
            continue
        meant = {
            name
            for name, place in known.items()
            if target == ALL_LINEAR or f".{place.module}".endswith(f".{target}")
        }
        if not meant:
            raise ValueError(
                f"targets has {target!r}, which is no projection of the model that may"
                f" have an adapter. {suggest(target, [*_ends(known), ALL_LINEAR])}"
            )
        found |= meant
    return tuple(name for name in PROJECTIONS if name in found)


def module_ends(config: ModelConfig) -> list[str]:
    """Return ends of the names of the adapted modules, as PEFT's `target_modules`.

    The last part of a name where that says it ("q_proj"), else the last two: GPT-2 has
    a c_proj in its attention and another one behind it.
    """
    assert config.adapters is not None
    known, targets = places(config), config.adapters.targets
    others = {
        place.module.split(".")[-1] for n, place in known.items() if n not in targets
    }
    ends = set()
    for name in targets:
        parts = known[name].module.split(".")
        ends.add(".".join(parts[-2:]) if parts[-1] in others else parts[-1])
    return sorted(ends)


def merged(parameters: PyTree, config: ModelConfig) -> PyTree:
    """Return the parameters of the model without adapters that computes the same.

    Each adapted kernel is a `Merged`, for `hf.save` with `without_adapters(config)`.

    Args:
        parameters: of the model, on devices.
        config: of the model.
    """
    adapters = config.adapters
    if adapters is None:
        return parameters
    found, base = divide(parameters, LORA)
    layers: dict[str, Any] = dict(base["layers"])
    for name, (group, _) in places(config).items():
        if name not in adapters.targets:
            continue
        pair = found["layers"][group]
        merged_kernel = Merged(
            kernel=layers[group][name]["kernel"],
            first=_first(pair, name),
            second=pair[name]["lora_b"],
            scale=adapters.scale,
        )
        projection = {**layers[group][name], "kernel": merged_kernel}
        layers[group] = {**layers[group], name: projection}
    return {**base, "layers": layers}


def with_adapters(
    config: ModelConfig, *, targets: Sequence[str], **fields: Any
) -> ModelConfig:
    """Return a model with adapters beside its projections.

    Args:
        config: of the model.
        targets: as `named_targets` takes them.
        **fields: others of `Adapters`.

    Raises:
        ValueError: there are no such projections, or a field is out of range.
    """
    adapters = Adapters(
        targets=named_targets(config, targets), shares_input=is_fused(config), **fields
    )
    return dataclasses.replace(config, adapters=adapters)


def _first(pair: Mapping[str, Any], name: str) -> Any:
    """Return an adapter's A, its own or that of the query, key and value."""
    return pair[name].get("lora_a", pair.get("lora_a"))


def _stored(config: ModelConfig) -> PyTree:
    return family(config.family).stored_tensors(without_adapters(config))


def _ends(known: Mapping[str, Place]) -> list[str]:
    return sorted({place.module.split(".")[-1] for place in known.values()})
