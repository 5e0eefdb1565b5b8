"""The choice among the implementations of an operation, and the reasons for it.

    choice = choose("attention", implementations, request, name=None)
    choice.name           'blocked'
    choice.explanation    "attention runs as 'blocked'. Not as 'cudnn': …"

Implementations stand in order of preference. Each looks at the request, an object of
the operation's own with shapes, types and the device, and says why it cannot serve it,
or why it would rather not; the first that says neither is chosen.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """What a program is compiled for.

    Attributes:
        platform: "cpu" or "gpu".
        kind: as the driver calls it, "NVIDIA H200"; None where it is not known.
        compute_capability: of an NVIDIA GPU, as (9, 0); None where it is not known.
        is_present: whether this process has such a device; it has none when it compiles
            ahead of time for another machine.
    """

    platform: str
    kind: str | None = None
    compute_capability: tuple[int, int] | None = None
    is_present: bool = True


H200 = Device(
    platform="gpu", kind="NVIDIA H200", compute_capability=(9, 0), is_present=False
)

_assumed: contextvars.ContextVar[Device | None] = contextvars.ContextVar(
    "assumed", default=None
)


@contextlib.contextmanager
def assuming(device: Device) -> Iterator[None]:
    """Let every choice in this block be the one for a device, for tests.

    JAX does not know of it: a function that was traced outside is not traced anew.
    """
    token = _assumed.set(device)
    try:
        yield
    finally:
        _assumed.reset(token)


def device() -> Device:
    """Describe the device that the code around is traced for."""
    if (assumed := _assumed.get()) is not None:
        return assumed
    here = jax.devices()[0]
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is None or described.device_kind == here.device_kind:
        return _of(here, is_present=True)
    # Ahead of time, the default device is the described one, which says more.
    config: Any = jax.config
    default = config.jax_default_device
    if getattr(default, "device_kind", None) == described.device_kind:
        return _of(default, is_present=False)
    return Device(
        platform=_platform(described), kind=described.device_kind, is_present=False
    )


def _of(device: Any, *, is_present: bool) -> Device:
    version, capability = getattr(device, "compute_capability", None), None
    if isinstance(version, str):
        major, minor = version.split(".")
        capability = int(major), int(minor)
    return Device(
        platform=_platform(device),
        kind=device.device_kind,
        compute_capability=capability,
        is_present=is_present,
    )


def _platform(device: Any) -> str:
    return "gpu" if device.platform == "cuda" else device.platform


def _nothing(request: Any) -> str | None:
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Implementation:
    """One way to compute an operation.

    Attributes:
        name: what callers ask for it by.
        function: computes it.
        unsupported: returns why a request cannot be served, or None.
        unwise: returns why another one should serve it, or None; who asks for this one
            by name gets it.
    """

    name: str
    function: Callable[..., Any]
    unsupported: Callable[[Any], str | None] = _nothing
    unwise: Callable[[Any], str | None] = _nothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """An implementation, and why it is this one."""

    name: str
    function: Callable[..., Any]
    explanation: str


def choose(
    operation: str,
    implementations: Sequence[Implementation],
    request: Any,
    *,
    name: str | None = None,
) -> Choice:
    """Return the first implementation that serves a request, or the one of that name.

    Args:
        operation: what is computed, for messages.
        implementations: in order of preference.
        request: what they look at.
        name: of the one that is wanted; None chooses.

    Raises:
        ValueError: no implementation has that name, or that one, or none of all, can
            serve the request.
    """
    if name is not None:
        return _named(operation, implementations, request, name)
    passed_over = []
    for one in implementations:
        reason = one.unsupported(request) or one.unwise(request)
        if reason is None:
            sentences = [f"{operation} runs as {one.name!r}.", *passed_over]
            return Choice(
                name=one.name, function=one.function, explanation=" ".join(sentences)
            )
        passed_over.append(f"Not as {one.name!r}: {reason}.")
    raise ValueError(
        f"No implementation of {operation} serves this call. {' '.join(passed_over)}"
    )


def _named(
    operation: str, implementations: Sequence[Implementation], request: Any, name: str
) -> Choice:
    found = {one.name: one for one in implementations}
    if name not in found:
        *names, last = (repr(one.name) for one in implementations)
        known = f"{', '.join(names)} and {last}" if names else last
        raise ValueError(
            f"{operation} has no implementation {name!r}; known are {known}, and None"
            " chooses."
        )
    one = found[name]
    reason = one.unsupported(request)
    if reason is not None:
        raise ValueError(
            f"{operation} cannot run as {name!r}: {reason}. implementation=None chooses"
            " one that can."
        )
    explanation = f"{operation} runs as {name!r}, as asked."
    return Choice(name=name, function=one.function, explanation=explanation)
