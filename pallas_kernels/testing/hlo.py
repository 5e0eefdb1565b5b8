"""Reading the text of a compiled program: its collectives, loops and largest arrays.

    %body (p: …) -> … {                       a computation
      %x = bf16[8,16]{1,0} all-gather(…)      an instruction: type, then operation
    }
    ENTRY %main (…) -> … {
      %w = (…) while(…), condition=%c, body=%body, backend_config={"known_trip_count"…}

What is in the body of a loop runs as often as the loop turns; where the compiler knows
that number, it writes it down.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
"""Operations that move data between devices."""

_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8}

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(
    r"\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>\(.*?\)|\S+) (?P<op>[\w\-]+)\("
)
_REFERENCE = re.compile(
    r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
    r"|branch_computations=\{([^}]*)\}"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_SOURCE = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One instruction that moves data between devices.

    Attributes:
        kind: one of `KINDS`.
        shape: of what comes out on one device, as in "bf16[4096,14336]".
        num_bytes: of that.
        times: how often it runs; a loop without a known number of turns counts once.
        is_looped: it is in a loop.
        source: the operation it was made for, by its scopes.
    """

    kind: str
    shape: str
    num_bytes: int
    times: int
    is_looped: bool
    source: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Array:
    """One result of an instruction.

    Attributes:
        shape: as in "f32[4096,128256]".
        num_bytes: of one.
        operation: of the instruction.
        is_looped: it is in a loop.
        source: the operation it was made for, by its scopes.
    """

    shape: str
    num_bytes: int
    operation: str
    is_looped: bool
    source: str


@dataclasses.dataclass
class _Computation:
    lines: list[str]
    times: int = 0
    is_looped: bool = False


def collectives(text: str) -> tuple[Collective, ...]:
    """Find what moves data between devices in the text of a compiled program."""
    found = []
    for computation in _computations(text).values():
        for line, match in _instructions(computation):
            kind = match["op"].removesuffix("-start")
            if kind not in KINDS or not computation.times:
                continue
            shape, num_bytes = _result(match["type"], match["op"])
            found.append(
                Collective(
                    kind=kind,
                    shape=shape,
                    num_bytes=num_bytes,
                    times=computation.times,
                    is_looped=computation.is_looped,
                    source=_source(line),
                )
            )
    return tuple(found)


def largest_arrays(text: str, count: int) -> tuple[Array, ...]:
    """Find the largest results of a program's instructions, one of each shape.

    What is made inside a fusion never reaches memory and is not counted; arguments and
    what only passes values on are not either.
    """
    passing = ("parameter", "tuple", "get-tuple-element", "bitcast", "while", "call")
    best: dict[str, Array] = {}
    for computation in _computations(text).values():
        if not computation.times:
            continue
        for line, match in _instructions(computation):
            if match["op"] in passing or match["op"].endswith("-done"):
                continue
            for shape, num_bytes in _arrays(match["type"]):
                if shape not in best:
                    best[shape] = Array(
                        shape=shape,
                        num_bytes=num_bytes,
                        operation=match["op"],
                        is_looped=computation.is_looped,
                        source=_source(line),
                    )
    ordered = sorted(best.values(), key=lambda array: -array.num_bytes)
    return tuple(ordered[:count])


def _computations(text: str) -> dict[str, _Computation]:
    """Every computation, with how often it runs; 0 for those inside fusions."""
    computations: dict[str, _Computation] = {}
    current, entry = _Computation([]), ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = computations[match[2]] = _Computation([])
            entry = match[2] if match[1] else entry
        else:
            current.lines.append(line)
    if entry:
        _count_runs(computations, entry, times=1, is_looped=False)
    return computations


def _count_runs(
    computations: Mapping[str, _Computation], name: str, *, times: int, is_looped: bool
) -> None:
    computation = computations[name]
    computation.times += times
    computation.is_looped |= is_looped
    for line, match in _instructions(computation):
        if match["op"] in ("fusion", "reduce", "scatter", "sort", "reduce-window"):
            continue
        is_loop = match["op"] == "while"
        trips = _TRIPS.search(line) if is_loop else None
        for reference in _REFERENCE.finditer(line):
            for callee in re.findall(r"[\w.\-]+", reference[1] or reference[2]):
                if callee in computations:
                    _count_runs(
                        computations,
                        callee,
                        times=times * (int(trips[1]) if trips else 1),
                        is_looped=is_looped or is_loop,
                    )


def _instructions(computation: _Computation) -> Iterator[tuple[str, re.Match]]:
    for line in computation.lines:
        if match := _INSTRUCTION.match(line):
            yield line, match


def _arrays(type_text: str) -> list[tuple[str, int]]:
    """Shapes of a type, a tuple's one by one, and their bytes."""
    found = []
    for kind, sizes in _ARRAY.findall(type_text):
        elements = math.prod(int(size) for size in sizes.split(",") if size)
        bits = re.search(r"\d+$", kind)
        width = _BYTES.get(kind) or max(1, int(bits[0]) // 8 if bits else 1)
        found.append((f"{kind}[{sizes}]", elements * width))
    return found


def _result(type_text: str, operation: str) -> tuple[str, int]:
    """What a collective gives; a started one lists (inputs, results, context)."""
    arrays = _arrays(type_text)
    has_inputs = type_text.startswith("((") or operation in (
        "all-gather-start",
        "collective-permute-start",
    )
    if has_inputs:
        arrays = [array for array in arrays if not array[0].endswith("[]")]
        arrays = arrays[len(arrays) // 2 :]
    grouped = collections.Counter(shape for shape, _ in arrays)
    names = (f"{n} x {shape}" if n > 1 else shape for shape, n in grouped.items())
    return " + ".join(names), sum(size for _, size in arrays)


def _source(line: str) -> str:
    match = _SOURCE.search(line)
    return match[1] if match else ""
