"""The allocation of one model function call: devices, and the strategy on them.

    d2f2t2@0-7+sequence
    ──┬─── ─┬─ ───┬────
      │     │     └ options
      │     └ devices: indices into `jax.devices()`, as ranges and single numbers
      └ sizes: data 2 × fsdp 2 × tensor 2 (absent letters are 1)

The same text is used by flags, plans, metrics and messages.
"""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Hashable

SIZES = {"d": "data", "f": "fsdp", "t": "tensor", "s": "stage", "e": "expert"}
"""The letters of the notation and the mesh axes they size."""

OPTIONS = {
    "sequence": "activations between blocks are split over tensor along the tokens",
    "zero1": "fsdp cuts the optimizer's state and gradients, and no parameter",
    "offload": "what the role keeps between calls waits in host memory after this one",
}
"""The options an allocation may carry, and what each does."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocation:
    """The devices of one model function call and how the work is split over them.

    Equal allocations are equal keys: compiled functions are cached by them.

    Attributes:
        data: Copies of the model that see different rows.
        fsdp: Parts each parameter is cut into along its width; they also see
            different rows, and parameters are gathered where they are used.
        tensor: Parts of heads, mlp and vocabulary that work on the same rows.
        stage: Groups of layers, which work on different rows at a time.
        expert: Groups of experts; they also see different rows, and tokens are sent to
            the experts they chose.
        devices: Indices into `jax.devices()`, in mesh order (stage is the slowest
            axis, tensor the fastest). Left empty it becomes 0 … size - 1.
        options: Names from `OPTIONS`.

    Raises:
        ValueError: a size below 1, an unknown option, one that has nothing to split, or
            devices that repeat or do not count `size`.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    stage: int = 1
    expert: int = 1
    devices: tuple[int, ...] = ()
    options: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        """Fill the default devices and check the whole."""
        for name in SIZES.values():
            size = getattr(self, name)
            if size < 1:
                raise ValueError(f"{name}={size}; every size of an allocation is >= 1.")
        for option in sorted(self.options):
            if option not in OPTIONS:
                raise ValueError(
                    f"unknown option +{option}. Options are:"
                    f" {', '.join('+' + name for name in OPTIONS)}."
                )
        if "zero1" in self.options and self.fsdp == 1:
            raise ValueError(
                "option +zero1 cuts the optimizer's state over fsdp, and fsdp is 1."
                " Write f instead of d, as in f8+zero1."
            )
        if not self.devices:
            object.__setattr__(self, "devices", tuple(range(self.size)))
        self._check_devices()

    def _check_devices(self) -> None:
        devices = self.devices
        if min(devices) < 0:
            raise ValueError(
                f"device {min(devices)} is negative. Devices are indices into"
                " jax.devices(), counted from 0."
            )
        count = collections.Counter(devices)
        repeated = sorted(d for d, times in count.items() if times > 1)
        if repeated:
            raise ValueError(
                f"devices {repeated} appear more than once in"
                f" @{_format_devices(devices)}. Name each device once."
            )
        if len(devices) != self.size:
            raise ValueError(
                f"{self.strategy} needs {self.size} devices and"
                f" @{_format_devices(devices)} names {len(devices)}. Change the sizes"
                " or the devices so that their counts agree."
            )

    @classmethod
    def parse(cls, text: str) -> "Allocation":
        """Read the notation, as in `d2f2t2@0-7+sequence`.

        Args:
            text: Sizes, then optionally `@` devices, then optionally `+` options.

        Raises:
            ValueError: text that is not an allocation, or one that cannot be.
        """
        strategy, *options = text.strip().split("+")
        strategy, at, devices = strategy.partition("@")
        try:
            if at and not devices:
                raise ValueError("no devices after the @.")
            return cls(
                **_parse_sizes(strategy),
                devices=_parse_devices(devices),
                options=frozenset(options),
            )
        except ValueError as error:
            raise ValueError(f"Allocation {text!r}: {error}") from None

    @property
    def size(self) -> int:
        """The number of devices."""
        return math.prod(getattr(self, name) for name in SIZES.values())

    @property
    def strategy(self) -> str:
        """The sizes alone, as in `d2t4`; `d1` when all are 1."""
        sizes = {letter: getattr(self, name) for letter, name in SIZES.items()}
        return "".join(f"{k}{size}" for k, size in sizes.items() if size > 1) or "d1"

    @property
    def num_row_shards(self) -> int:
        """Parts that the rows of a batch are split into."""
        return self.data * self.fsdp * self.expert

    @property
    def layout_key(self) -> Hashable:
        """What two allocations share when parameters lie the same way on both.

        Of the options only zero1 is part of it; the others move no parameter.
        """
        sizes = tuple(getattr(self, name) for name in SIZES.values())
        return (*sizes, self.devices, "zero1" in self.options)

    def __str__(self) -> str:
        """Write the notation; `Allocation.parse` reads it back."""
        options = "".join(f"+{option}" for option in sorted(self.options))
        return f"{self.strategy}@{_format_devices(self.devices)}{options}"


def _parse_sizes(text: str) -> dict[str, int]:
    if not text or text[0].isdigit():
        raise ValueError("it must begin with sizes, as in d2t4@0-7.")
    sizes: dict[str, int] = {}
    for letter, number in re.findall(r"(\D)(\d*)", text):
        if letter not in SIZES:
            known = ", ".join(f"{k} ({name})" for k, name in SIZES.items())
            raise ValueError(f"unknown letter {letter!r}. Letters are {known}.")
        if not number:
            raise ValueError(f"{letter!r} has no size. Write it as in {letter}2.")
        if SIZES[letter] in sizes:
            raise ValueError(f"{letter!r} appears twice. Size each axis once.")
        sizes[SIZES[letter]] = int(number)
    return sizes


def _parse_devices(text: str) -> tuple[int, ...]:
    devices: list[int] = []
    for part in text.split(",") if text else ():
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise ValueError(
                f"{part!r} is no device range. Write devices as in @0-3 or @0,2,4-7."
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"the range {part} runs backwards. Write {last}-{first}.")
        devices.extend(range(first, last + 1))
    return tuple(devices)


def _format_devices(devices: tuple[int, ...]) -> str:
    """Write 0, 1, 2, 5 as `0-2,5`, keeping the order."""
    # Within a run of consecutive devices, device minus position is constant.
    runs = itertools.groupby(enumerate(devices), key=lambda pair: pair[1] - pair[0])
    ends = [[device for _, device in run] for _, run in runs]
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in ends)
