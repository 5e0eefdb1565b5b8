"""Running Mosaic kernels on a CPU, with every access to memory checked.

    with interpreted() as checks:
        out = jax.jit(f)(x)
    assert not checks.has_races

Inside, Pallas interprets the GPU's threads, barriers and copies, and every operation
chooses its implementation as for an H200. The interpreter sees copies whose end nobody
awaits, and reads and writes out of bounds. It does not see a missing `wgmma_wait` or
`commit_smem`: it runs those at once.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

# The state of the interpreter has no public name in jax 0.11.2.
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as _gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _dispatch

_callbacks: Any = _gpu_callbacks

# With fewer threads than copies on their way, two share a clock, and what one of them
# races with is not seen.
_COPIES_AT_A_TIME = 64


@dataclasses.dataclass(kw_only=True)
class Checks:
    """What the interpreter has found in the kernels of a block.

    Attributes:
        has_races: two threads were at the same memory with nothing between them that
            orders them. Known at the end of the block.
        num_kernels: how many kernels were interpreted. Known at the end of the block.
    """

    has_races: bool = False
    num_kernels: int = 0


@contextlib.contextmanager
def interpreted(
    *, detect_races: bool = True, device: _dispatch.Device | None = None
) -> Iterator[Checks]:
    """Interpret the kernels that are traced and run in this block.

    Args:
        detect_races: look for races, which takes about twice the time.
        device: the GPU the operations choose for; None is an H200.
    """
    found: list[Any] = []
    checks = Checks()
    params = plgpu.InterpretGPUParams(
        detect_races=detect_races, num_tma_threads_per_device=_COPIES_AT_A_TIME
    )
    with (
        _recorded(found),
        _dispatch.assuming(device or _dispatch.H200),
        plgpu.force_gpu_interpret_mode(params),
    ):
        try:
            yield checks
            # What was launched and not awaited is still being interpreted.
            jax.effects_barrier()
        except BaseException:
            _callbacks.reset_gpu_interpret_mode_state()
            raise
        finally:
            checks.num_kernels = len(found)
            checks.has_races = any(races.races_found for races in found)


@contextlib.contextmanager
def _recorded(found: list[Any]) -> Iterator[None]:
    """Keep what is known of the races of each kernel: the next one starts anew."""
    make = _callbacks.GPURaceDetectionState

    def record(*args: Any, **kwargs: Any) -> Any:
        found.append(make(*args, **kwargs))
        return found[-1]

    _callbacks.GPURaceDetectionState = record
    try:
        yield
    finally:
        _callbacks.GPURaceDetectionState = make
