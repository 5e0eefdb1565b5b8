"""Pack and unpack as one kernel, which reads what to copy where from a table.

    rows        0 1 2 3 4 5 | 6 7 | 8 9 10 11
    programs    [0 . . . .] [1 . . . . .] [2 …

Every program (a block of 128 threads) takes an equal share of all elements, one behind
the other, so that one large block and a thousand small ones are work of the same kind.
It finds its first row by bisection, and from there goes on granule by granule with
additions alone. It reads a few granules before it writes them, so that some accesses
are on their way at once.

Plain loads and stores of vectors: the kernel has no shared memory and no barriers, and
is the same for sm_80 and sm_90.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _tuning
from pallas_kernels.interval_copy import plans
from pallas_kernels.interval_copy.plans import Plan
from pallas_kernels.interval_copy.requests import Request
from pallas_kernels.interval_copy.slices import average

FEWEST_LAUNCHES = 4
FEWEST_PACKED = 128
"""For each pair of a source and a target, launches that XLA would make of an unpacking,
and in all, blocks that it would pack in one: from those on, this kernel is compiled in
less time than XLA's program. How fast either runs was not measured."""

LARGEST_GRANULE = 2048
"""Elements; larger ones would gain nothing, as several granules are read at once."""

DTYPES = ("float32", "bfloat16")

_PARAMS = plgpu.CompilerParams(
    # The layouts are all given, and looking for others takes longer than all the rest.
    lowering_semantics=plgpu.LoweringSemantics.Lane,
    # A thread reads and writes the same elements, and nothing of another thread.
    unsafe_no_auto_barriers=True,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """How the kernel is laid out.

    Attributes:
        elements: that a program reads before it writes.
        granules: that those are at most; each costs the compiler time.
        programs: that share the work.
    """

    elements: int
    granules: int
    programs: int


def default_blocks(request: Request) -> Blocks:
    """Return the layout where nothing was measured."""
    # An average holds what is new and what was there in registers.
    elements = 2048 if request.is_mixed else 4096
    # No kernel takes more than 128 registers: four programs fit on a multiprocessor,
    # so that all run at once.
    return Blocks(elements=elements, granules=4, programs=4 * _processors(request))


def candidates(request: Request) -> tuple[Blocks, ...]:
    """Return layouts worth a try."""
    return tuple(
        Blocks(
            elements=elements,
            granules=granules,
            programs=each * _processors(request),
        )
        for elements in (2048, 4096)
        for granules in (2, 4)
        for each in (4, 6, 8, 32)
    )


def _processors(request: Request) -> int:
    """Return the multiprocessors of an A100 or an H200."""
    return 108 if request.device.compute_capability == (8, 0) else 132


def unsupported(request: Request) -> str | None:
    """Return why the kernel cannot serve a request, or None."""
    return unsupported_types(request) or unsupported_shapes(request)


def unsupported_types(request: Request) -> str | None:
    """Return why the kernel cannot serve these types on this device, or None."""
    device = request.device
    if device.platform != "gpu" or device.compute_capability is None:
        return f"it needs an NVIDIA GPU, and the program is for {device.platform}"
    if device.compute_capability < (8, 0):
        found = ".".join(map(str, device.compute_capability))
        return f"it needs compute capability 8.0, and {device.kind} has {found}"
    dtypes = sorted({*request.source_dtypes, *request.target_dtypes} - set(DTYPES))
    if dtypes:
        return f"it copies {' and '.join(DTYPES)}, not {' and '.join(dtypes)}"
    return None


def unsupported_shapes(request: Request) -> str | None:
    """Return why the kernel cannot copy these blocks, or None."""
    if not request.rows:
        return "there is nothing to copy"
    if request.divisor % plans.UNIT:
        return (
            f"it moves {plans.UNIT} elements at once, and blocks, their places or"
            f" arrays are multiples of {request.divisor} only"
        )
    if request.num_outer > plans.MOST_OUTER:
        return (
            f"a block has {request.num_outer} dimensions beside what lies together,"
            f" more than {plans.MOST_OUTER}"
        )
    return None


def unwise(request: Request) -> str | None:
    """Return why other code should serve a request, or None."""
    launches, blocks = request.num_slices, len(request.rows)
    is_long = blocks >= max(FEWEST_PACKED, 4 * request.num_pairs)
    if launches >= FEWEST_LAUNCHES * request.num_pairs or is_long:
        return None
    return (
        f"there are {_counted(blocks, 'block')} between"
        f" {_counted(request.num_pairs, 'pair')} of arrays, which XLA copies in"
        f" {_counted(launches, 'fusion')} and compiles faster"
    )


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def tuning_of(request: Request, plan: Plan) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the types and the shape that layouts are measured for.

    The shape is the largest granule.
    """
    kind = "mixed" if request.is_mixed else "copied"
    granules = (granule for launch in plan.granules for granule in launch)
    return (request.source_dtypes[0], request.target_dtypes[0], kind), (max(granules),)


def _tuned_blocks(request: Request, plan: Plan) -> Blocks:
    dtypes, shape = tuning_of(request, plan)
    return _tuning.tuned(
        "interval_copy",
        default_blocks(request),
        device=request.device,
        dtypes=dtypes,
        shape=shape,
    )


def run(
    sources: Sequence[jax.Array],
    targets: Sequence[jax.Array],
    request: Request,
    *,
    eta: jax.Array | float | None = None,
    layout: Blocks | None = None,
) -> list[jax.Array]:
    """Copy blocks of sources to blocks of targets, in place where those are donated.

    Args:
        sources: of the request.
        targets: of the request.
        request: what is copied.
        eta: the weight of the blocks; None copies them.
        layout: of the kernel; None takes what was measured.
    """
    plan = plans.plan_of(request.rows, LARGEST_GRANULE)
    return copy(sources, targets, plan, request, eta=eta, layout=layout)


def copy(
    sources: Sequence[jax.Array],
    targets: Sequence[jax.Array],
    plan: Plan,
    request: Request,
    *,
    eta: jax.Array | float | None = None,
    layout: Blocks | None = None,
) -> list[jax.Array]:
    """Copy what a plan says, in place where targets are donated; see `api.copy`.

    Args:
        sources: what is read.
        targets: what is written.
        plan: what is copied where.
        request: says the types and the device.
        eta: the weight of the blocks; None copies them.
        layout: of the kernel; None takes what was measured.
    """
    layout = layout or _tuned_blocks(request, plan)
    units = sum(math.prod(target.shape) // plans.UNIT for target in targets)
    layout = dataclasses.replace(layout, programs=min(layout.programs, units))
    refs = {
        number: jax.new_ref(_in_units(targets[number]))
        for number in sorted({pair[1] for launch in plan.pairs for pair in launch})
    }
    weights = [] if eta is None else [jnp.asarray(eta, jnp.float32).reshape(1)]
    for table, pairs, granules in zip(
        plan.tables, plan.pairs, plan.granules, strict=True
    ):
        froms = sorted({source for source, _ in pairs})
        tos = sorted({target for _, target in pairs})
        body = functools.partial(
            _kernel,
            pairs=tuple((froms.index(s), tos.index(t)) for s, t in pairs),
            granules=granules,
            num_sources=len(froms),
            is_mixed=eta is not None,
            layout=layout,
        )
        plgpu.kernel(
            body,
            grid=(layout.programs,),
            grid_names=("program",),
            compiler_params=_PARAMS,
        )(
            jnp.asarray(table),
            *weights,
            *(_in_units(sources[number]) for number in froms),
            *(refs[number] for number in tos),
        )
    return [
        jax.freeze(refs[number]).reshape(target.shape) if number in refs else target
        for number, target in enumerate(targets)
    ]


def _in_units(array: jax.Array) -> jax.Array:
    # The compiler sees by the last dimension that accesses may be wide.
    return array.reshape(-1, plans.UNIT)


class _At(NamedTuple):
    """Where a program is in a row: in its run, in two dimensions, and in the arrays."""

    in_run: Any
    inner: Any
    middle: Any
    source: Any
    target: Any


class _Box(NamedTuple):
    """A row of the table, as a program needs it."""

    run: Any
    sizes: tuple[Any, Any]
    source_strides: tuple[Any, Any, Any]
    target_strides: tuple[Any, Any, Any]


def _kernel(
    table: Any,
    *refs: Any,
    pairs: tuple[tuple[int, int], ...],
    granules: tuple[int, ...],
    num_sources: int,
    is_mixed: bool,
    layout: Blocks,
) -> None:
    """Do one program's share."""
    weight, refs = (refs[0], refs[1:]) if is_mixed else (None, refs)
    sources, targets = refs[:num_sources], refs[num_sources:]
    copies = [
        _Copy(sources[source], targets[target], weight, granule, layout)
        for (source, target), granule in zip(pairs, granules, strict=True)
    ]
    start, stop = _share(table, layout)

    def copy_row(state: tuple[Any, Any]) -> tuple[Any, Any]:
        row, low = state
        high = jnp.minimum(stop, table[row + 1, plans.FIRST])
        branches = [functools.partial(one, table, row, low, high) for one in copies]
        if len(branches) == 1:
            branches[0]()
        else:
            lax.switch(table[row, plans.PAIR], branches)
        return row + 1, high

    lax.while_loop(
        lambda state: state[1] < stop, copy_row, (_row_of(table, start), start)
    )


def _share(table: Any, layout: Blocks) -> tuple[Any, Any]:
    """Return the first unit of this program, and the one behind its last."""
    total = table[table.shape[0] - 1, plans.FIRST]
    share = _ceil(total, layout.programs)
    # Whole groups, unless that would leave programs without any.
    group = max(1, layout.elements // plans.UNIT)
    share = jnp.where(share >= group, _ceil(share, group) * group, share)
    start = jnp.minimum(lax.axis_index("program") * share, total)
    return start, jnp.minimum(start + share, total)


def _ceil(number: Any, divisor: int) -> Any:
    return lax.div(number + jnp.int32(divisor - 1), jnp.int32(divisor))


def _row_of(table: Any, unit: Any) -> Any:
    """Return the last row that begins no later than a unit, by bisection."""
    num_rows = table.shape[0] - 1

    def halve(_: Any, bounds: tuple[Any, Any]) -> tuple[Any, Any]:
        low, high = bounds
        middle = lax.div(low + high, jnp.int32(2))
        is_later = table[middle, plans.FIRST] > unit
        return jnp.where(is_later, low, middle), jnp.where(is_later, middle, high)

    bounds = (jnp.int32(0), jnp.int32(num_rows))
    return lax.fori_loop(0, num_rows.bit_length(), halve, bounds)[0]


def _enter(table: Any, row: Any, granule: Any) -> tuple[_Box, _At]:
    """Find the place of a granule in its row, with the only divisions there are."""

    def read(columns: Sequence[int]) -> tuple[Any, ...]:
        return tuple(table[row, column] for column in columns)

    source, target, run = read((plans.SOURCE, plans.TARGET, plans.RUN))
    box = _Box(
        run, read(plans.SIZES), read(plans.SOURCE_STRIDES), read(plans.TARGET_STRIDES)
    )
    rest, in_run = _divide(granule, run)
    rest, inner = _divide(rest, box.sizes[0])
    outer, middle = _divide(rest, box.sizes[1])
    steps = (inner, middle, outer)

    def place(base: Any, strides: Sequence[Any]) -> Any:
        for step, stride in zip(steps, strides, strict=True):
            base = base + step * stride
        return base + in_run

    at = _At(
        in_run,
        inner,
        middle,
        place(source, box.source_strides),
        place(target, box.target_strides),
    )
    return box, at


def _divide(number: Any, divisor: Any) -> tuple[Any, Any]:
    return lax.div(number, divisor), lax.rem(number, divisor)


def _next(box: _Box, at: _At) -> _At:
    """Go on by one granule, and over the ends of dimensions."""
    run, (inner, middle) = box.run, box.sizes
    is_run_over = at.in_run + 1 == run
    is_inner_over = is_run_over & (at.inner + 1 == inner)
    is_middle_over = is_inner_over & (at.middle + 1 == middle)

    def moved(place: Any, strides: tuple[Any, Any, Any]) -> Any:
        place = place + 1 + jnp.where(is_run_over, strides[0] - run, 0)
        place = place + jnp.where(is_inner_over, strides[1] - inner * strides[0], 0)
        back = middle * strides[1]
        return place + jnp.where(is_middle_over, strides[2] - back, 0)

    return _At(
        in_run=jnp.where(is_run_over, 0, at.in_run + 1),
        inner=jnp.where(
            is_inner_over, 0, jnp.where(is_run_over, at.inner + 1, at.inner)
        ),
        middle=jnp.where(
            is_middle_over, 0, jnp.where(is_inner_over, at.middle + 1, at.middle)
        ),
        source=moved(at.source, box.source_strides),
        target=moved(at.target, box.target_strides),
    )


@dataclasses.dataclass(frozen=True)
class _Copy:
    """The code for one pair of arrays: granules of a row, some at once."""

    source: Any
    target: Any
    weight: Any
    granule: int
    layout: Blocks

    def __call__(self, table: Any, row: Any, low: Any, high: Any) -> None:
        """Copy what a row has between two units."""
        group = max(1, min(self.layout.granules, self.layout.elements // self.granule))
        # Shares may end within a granule: it belongs to the one that has its end.
        units, first = jnp.int32(self.granule // plans.UNIT), table[row, plans.FIRST]
        begin, end = lax.div(low - first, units), lax.div(high - first, units)
        box, at = _enter(table, row, begin)
        whole, rest = _divide(end - begin, jnp.int32(group))
        copy_group = functools.partial(self._copy_group, box, group)
        at = lax.fori_loop(0, whole, lambda _, at: copy_group(at), at)
        if group > 1:
            copy_one = functools.partial(self._copy_group, box, 1)
            lax.fori_loop(0, rest, lambda _, at: copy_one(at), at)

    def _copy_group(self, box: _Box, size: int, at: _At) -> _At:
        found = []
        for _ in range(size):
            found.append(at)
            at = _next(box, at)
        values = [self._load(self.source, one.source) for one in found]
        if self.weight is not None:
            old = [self._load(self.target, one.target) for one in found]
            values = [
                average(value, there, self.weight[0])
                for value, there in zip(values, old, strict=True)
            ]
        for one, value in zip(found, values, strict=True):
            place = self._place(one.target)
            self.target[place] = value.astype(self.target.dtype)
        return at

    def _load(self, ref: Any, place: Any) -> Any:
        # Accesses of 16 bytes on the wider side.
        width = max(self.source.dtype.itemsize, self.target.dtype.itemsize)
        shape = self.granule // plans.UNIT, plans.UNIT
        lanes = min(16 // width, shape[0])
        layout = plgpu.Layout.WG_STRIDED(shape, vec_size=lanes)
        return plgpu.load(ref.at[self._place(place)], layout=layout)

    def _place(self, granule: Any) -> Any:
        units = self.granule // plans.UNIT
        return pl.ds(granule * units, units)
