"""What the reallocation bench moves: model shapes, and pairs of layouts."""

import dataclasses
import math
import pathlib
import re
from collections.abc import Sequence
from typing import Literal

from realjax.models import families
from realjax.models.config import ModelConfig
from realjax.parallel.allocation import Allocation
from realjax.parallel.sharding import padded_for

GIGABYTE = ModelConfig(
    vocab_size=32768,
    width=1024,
    num_layers=12,
    num_heads=16,
    num_kv_heads=8,
    head_dim=64,
    mlp_width=4480,
)
"""A Llama of 1 GiB in float32."""

ALIASES = {"llama-8b": "llama-3.1-8b", "llama-70b": "llama-3.3-70b"}

PAIRS = (
    # Whole shards move: to other devices, to more of them, in another order.
    "f4@0-3:f4@4-7",
    "t4@0-3:d2t4",
    "t4@0-3:t4@3,2,1,0",
    "t4@0-3:t4@2-5",
    # The same devices, other cuts.
    "f8:t8",
    "f8:d2t4",
    "d2f2t2:t8",
    "s2t4:f4t2",
    "f2t4:s2d2t2",
    # Other devices, and other cuts.
    "t2@0-1:t4@0-3",
    "t4@0-3:t2@4-5",
    "f4@0-3:t4@4-7",
)
"""Twelve pairs on eight devices."""

LARGE_PAIRS = ("f512t8:t8d512", "t8d512:s8f64t8", "s8f64t8:f512t8", "f4096:d64f8t8")
"""Pairs on 4096 devices, for planning."""

Rival = Literal["device_put", "jit"]

RIVALS: tuple[Rival, ...] = ("device_put", "jit")
"""What moves arrays, too: slices through the host, or on one set of devices only."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """From one allocation to another."""

    source: Allocation
    destination: Allocation

    @classmethod
    def parse(cls, text: str) -> "Pair":
        """Read `f8:t8`.

        Raises:
            ValueError: text that is not two allocations.
        """
        source, colon, destination = text.partition(":")
        if not colon:
            raise ValueError(
                f"{text!r} is no pair. Write two allocations and a colon between them,"
                " as in f8:t8."
            )
        return cls(
            source=Allocation.parse(source), destination=Allocation.parse(destination)
        )

    @property
    def num_devices(self) -> int:
        """The devices that a machine must have for it."""
        return max(*self.source.devices, *self.destination.devices) + 1

    def __str__(self) -> str:
        """Write the notation."""
        return f"{self.source}:{self.destination}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The flags of `realjax.bench.reallocation`.

    Attributes:
        model: Whose parameters move.
        model_name: What the flag called it.
        layers: Numbers of layers to plan it with; empty takes its own.
        pairs: The moves.
        devices: How many there are.
        devices_per_host: For planning; None puts all on one host.
        processes: Over how many the devices are spread when something is measured.
        dry: Plan only.
        against: What else is measured.
        repetitions: Of every measurement.
        dtype: Of the parameters.
        draw: A folder for pictures of what was planned.
    """

    model: ModelConfig
    model_name: str
    layers: tuple[int, ...]
    pairs: tuple[Pair, ...]
    devices: int
    devices_per_host: int | None
    processes: int
    dry: bool
    against: tuple[Rival, ...]
    repetitions: int
    dtype: str
    draw: pathlib.Path | None


def parse_pairs(text: str) -> tuple[Pair, ...]:
    """Read pairs with commas between them, as in `f8:t8,t2@0,3:t4@0-3`."""
    # A comma before a digit stands between devices.
    return tuple(Pair.parse(part) for part in re.split(r",(?=\D)", text))


def parse_model(text: str) -> ModelConfig:
    """Read a model: `1gib`, a published size, or sizes.

    Args:
        text: `1gib` is `GIGABYTE`; `llama-3.1-8b` a family and one of its sizes;
            `width=64,num_layers=2` changes fields of `GIGABYTE`.

    Raises:
        ValueError: no such family, size or field.
    """
    if text == "1gib":
        return GIGABYTE
    if "=" in text:
        return dataclasses.replace(GIGABYTE, **_sizes(text))
    family, _, size = ALIASES.get(text, text).partition("-")
    return families.family(family).size(size)


def fitted(config: ModelConfig, pairs: Sequence[Pair]) -> ModelConfig:
    """Round vocabulary, layers and feed-forward width up to what all pairs divide."""
    allocations = [side for pair in pairs for side in (pair.source, pair.destination)]
    parts = math.lcm(*(side.tensor * side.fsdp for side in allocations))
    width = -(-config.mlp_width // parts) * parts
    padded = padded_for(config, allocations)
    return dataclasses.replace(padded, mlp_width=width)


def _sizes(text: str) -> dict[str, int]:
    changes = {
        part.partition("=")[0]: part.partition("=")[2] for part in text.split(",")
    }
    fields = [f.name for f in dataclasses.fields(GIGABYTE)]
    known = {name for name in fields if type(getattr(GIGABYTE, name)) is int}
    wrong = [k for k, v in changes.items() if k not in known or not v.isdigit()]
    if wrong:
        raise ValueError(
            f"{', '.join(wrong)} in {text!r}: no such sizes. Write whole numbers for"
            f" some of {', '.join(sorted(known))}."
        )
    return {name: int(value) for name, value in changes.items()}
