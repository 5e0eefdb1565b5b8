"""The shapes at which kernels are compiled, checked and timed.

Each operation has a list of them in its `bench`: those of models people train, and tiny
ones of the same kind for the interpreter. One list serves three readers: the
ahead-of-time check (`aot_check`), the measurement on a GPU (`measure`) and the sweep
over block sizes (`sweep`).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

# Of one H200, as in the measurements this project compares with: what copies reach of
# the 4.8 TB/s of the data sheet, and large matrix products of its 990 TFLOP/s.
BYTES_PER_SECOND = 4.3e12
FLOPS_PER_SECOND = 790e12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a compiled kernel must keep to; spilled registers are never allowed.

    Attributes:
        temporary_bytes: most of the whole program, beside inputs and outputs.
        num_wgmma: least number of matrix instructions in the program, on Hopper.
        least_access_bytes: what an access of global memory moves in a thread at least,
            but for `small_accesses` of them.
        small_accesses: most instructions that move less: tables, lengths and the like.
    """

    temporary_bytes: int
    num_wgmma: int = 0
    least_access_bytes: int = 0
    small_accesses: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One operation at one shape.

    Attributes:
        operation: the folder it is in.
        name: the shape in words, "llama-3.1-8b 64 rows of 1024 tokens".
        is_tiny: small enough to be interpreted in some seconds.
        inputs: makes random inputs from a key; may be traced, so that shapes alone
            serve the compiler.
        implementations: by name, what computes it from the inputs, all the same work.
            "mosaic" is the kernel.
        reference: computes what is right, in float32 or better, however slowly.
        tolerance: largest relative error of each floating output, in the L2 norm.
        num_bytes: least traffic with memory.
        num_flops: least number of operations of matrix units.
        goal: share of the floor's speed that is aimed at, and what for; None: no goal.
        limits: of the compiled kernel.
        gpus: names of `aot.describe` that it is compiled for.
        donated: numbers of inputs that are written in place.
        candidates: block sizes worth a try.
        with_blocks: returns the function that runs with some.
        tuning_key: of this shape in the tables of block sizes, `_tuning.key_of`.
    """

    operation: str
    name: str
    is_tiny: bool = False
    inputs: Callable[[jax.Array], tuple[Any, ...]]
    implementations: Mapping[str, Callable[..., Any]]
    reference: Callable[..., Any]
    tolerance: float
    num_bytes: int
    num_flops: int = 0
    goal: float | None = None
    limits: Limits
    gpus: Sequence[str] = ("h200",)
    donated: Sequence[int] = ()
    candidates: Sequence[Any] = ()
    with_blocks: Callable[[Any], Callable[..., Any]] | None = None
    tuning_key: str | None = None

    @property
    def floor_seconds(self) -> float:
        """The least time on an H200: the longer one of traffic and matrix products."""
        return max(self.num_bytes / BYTES_PER_SECOND, self.num_flops / FLOPS_PER_SECOND)

    def shapes(self) -> tuple[Any, ...]:
        """The inputs as `jax.ShapeDtypeStruct`s."""
        return jax.eval_shape(self.inputs, jax.random.key(0))
