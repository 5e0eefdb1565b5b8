"""The profiler: how the devices at hand do beside their data sheets.

    draw a call ─▶ measure it ─▶ … ─▶ fit ─▶ draw others ─▶ measure them ─▶ errors
                                       │
                                       └─▶ `Coefficients`, with versions and errors

Calls are the project's own programs (`probes`) of models, batches and strategies drawn
at random from a `Scale`; with them go copies of parameters between two strategies, of
an array between devices and to the host, and sums over devices. The errors are those
of calls that the fit has not seen.
"""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from realjax.dataflow.schedule import Place
from realjax.models import transformer
from realjax.models.config import ModelConfig
from realjax.parallel.allocation import Allocation
from realjax.parallel.mesh import make_mesh
from realjax.parallel.sharding import padded_for, parameter_shardings
from realjax.planner.cluster import Cluster
from realjax.planner.coefficients import Checked, Profile, fit, versions
from realjax.planner.copies import copy_quantities, num_arrays_of
from realjax.planner.cost import Coefficients, Kind, Quantities, in_turns, quantities
from realjax.planner.probes import Probe, Runner, make_runner, parameters_on
from realjax.planner.stored import parameter_bytes
from realjax.planner.strategies import range_sizes, strategies
from realjax.realloc.crossing import upload
from realjax.realloc.offload import HostCopy
from realjax.realloc.transfer import reallocate

FIT_SHARE = 0.7
"""Of the time for what is fitted; the rest is for calls that are drawn afterwards."""

FEWEST_CHECKED = 3
"""Calls that are drawn after the fit, however long they take."""

TRUST = 0.02
"""In the default coefficients, beside a measured call."""

RUNS, RUN_SECONDS = 7, 1.0
"""Most runs of a call after those that compile, and about their seconds in all."""

Progress = Callable[[float, int, str], None]
"""Told the share of the time that is over, calls measured so far, and the next one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of the calls that are drawn.

    Attributes:
        widths: of models, whose heads are of `head_dim` each.
        num_layers, vocab_size, head_dim: of models.
        num_rows: sequences.
        prompt_tokens, new_tokens: of each.
        dtype: of products.
        copy_bytes: of arrays that are copied or summed.
    """

    widths: tuple[int, ...]
    num_layers: tuple[int, ...]
    vocab_size: int
    head_dim: int
    num_rows: tuple[int, ...]
    prompt_tokens: tuple[int, ...]
    new_tokens: tuple[int, ...]
    dtype: str
    copy_bytes: tuple[int, ...]


CPU_SCALE = Scale(
    widths=(128, 256, 384),
    num_layers=(2, 4, 6),
    vocab_size=512,
    head_dim=32,
    num_rows=(8, 16, 32),
    prompt_tokens=(16, 32),
    new_tokens=(16, 32, 48),
    dtype="float32",
    copy_bytes=(2**20, 2**23),
)
"""Models of up to ten million parameters, and calls of a second."""

GPU_SCALE = Scale(
    widths=(1024, 2048, 4096),
    num_layers=(2, 4, 8),
    vocab_size=32768,
    head_dim=128,
    num_rows=(32, 64, 128),
    prompt_tokens=(128, 512),
    new_tokens=(128, 256),
    dtype="bfloat16",
    copy_bytes=(2**24, 2**28),
)


class Measurable(NamedTuple):
    """Something to be measured: its name, what it takes, and what prepares it."""

    name: str
    quantities: Quantities
    make: Callable[[], Runner]


def scale_of(cluster: Cluster) -> Scale:
    """Return the scale for a cluster's devices."""
    return CPU_SCALE if cluster.device.kind == "cpu" else GPU_SCALE


def profile(
    cluster: Cluster,
    *,
    minutes: float,
    seed: int = 0,
    scale: Scale | None = None,
    progress: Progress | None = None,
) -> Profile:
    """Measure the devices of this process, and fit coefficients to what they did.

    Args:
        cluster: these devices, one node.
        minutes: about as long; a few calls are measured in any case.
        seed: of what is drawn.
        scale: of the calls; None is that of the devices.
        progress: told before every call.

    Raises:
        ValueError: the cluster is not what this process has.
    """
    if cluster.num_devices != len(jax.local_devices()):
        raise ValueError(
            f"The cluster has {cluster.num_devices} devices and this process"
            f" {len(jax.local_devices())}. Measure on one node, and describe it by"
            " `Cluster.detect()`."
        )
    scale = scale or scale_of(cluster)
    begin, seconds = time.perf_counter(), 60 * minutes
    measured: list[tuple[Measurable, float]] = []

    def measure(drawn: Iterator[Measurable], until: float, fewest: int) -> list:
        found = []
        while len(found) < fewest or time.perf_counter() - begin < until:
            one = next(drawn)
            if progress is not None:
                passed = (time.perf_counter() - begin) / seconds
                progress(min(passed, 1.0), len(measured), one.name)
            found.append((one, run_seconds(one.make())))
            measured.append(found[-1])
        return found

    generator = np.random.default_rng(seed)
    links = list(copies(cluster, scale))
    calls = draw_calls(cluster, scale, generator)
    fewest = len(links) + len(CALL_KINDS)
    fitted = measure(itertools.chain(links, calls), FIT_SHARE * seconds, fewest=fewest)
    coefficients = fit([(one.quantities, s) for one, s in fitted], trust=TRUST)
    checked = measure(calls, seconds, fewest=FEWEST_CHECKED)
    return Profile(
        coefficients=coefficients,
        cluster=cluster,
        num_fitted=len(fitted),
        checked=tuple(
            Checked(
                name=one.name,
                seconds=taken,
                predicted_seconds=coefficients.seconds(one.quantities),
            )
            for one, taken in checked
        ),
        **versions(),
    )


def run_seconds(run: Runner) -> float:
    """Return the median seconds of a call, once it is compiled."""
    run()
    run()  # Programs for what the first run has given back.
    seconds: list[float] = []
    while len(seconds) < 3 or (len(seconds) < RUNS and sum(seconds) < RUN_SECONDS):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


CALL_KINDS: tuple[Kind, ...] = ("generate", "infer", "train")


def draw_calls(
    cluster: Cluster, scale: Scale, generator: np.random.Generator
) -> Iterator[Measurable]:
    """Draw calls without end, of all kinds in turn, and copies of parameters.

    Args:
        cluster: on which they run.
        scale: of their sizes.
        generator: of what is drawn.
    """
    for kind in itertools.cycle(CALL_KINDS):
        probe = draw_probe(kind, cluster, scale, generator)
        needs = quantities(probe.work, probe.allocation, cluster)
        yield Measurable(str(probe), needs, lambda probe=probe: make_runner(probe))
        if kind == CALL_KINDS[-1]:
            other = _draw_allocation(
                *(probe.model, cluster, generator), num_rows=probe.num_rows
            )
            if generator.random() < 0.5:
                last = range(cluster.num_devices - other.size, cluster.num_devices)
                other = dataclasses.replace(other, devices=tuple(last))
            yield _moved(probe, other, cluster)


def draw_probe(
    kind: Kind, cluster: Cluster, scale: Scale, generator: np.random.Generator
) -> Probe:
    """Draw one call.

    Args:
        kind: of the call.
        cluster: on which it runs.
        scale: of its sizes.
        generator: of what is drawn.
    """

    def pick(values):
        return values[generator.integers(len(values))]

    width, num_rows = int(pick(scale.widths)), int(pick(scale.num_rows))
    num_heads = width // scale.head_dim
    model = ModelConfig(
        vocab_size=scale.vocab_size,
        width=width,
        num_layers=int(pick(scale.num_layers)),
        num_heads=num_heads,
        num_kv_heads=num_heads // int(pick((1, 2))),
        head_dim=scale.head_dim,
        mlp_width=width * int(pick((2, 4))),
        head="language" if kind == "generate" else pick(("language", "scalar")),
    )
    limits = {"num_rows": num_rows, "is_generating": kind == "generate"}
    return Probe(
        kind=kind,
        model=model,
        allocation=_draw_allocation(model, cluster, generator, **limits),
        num_rows=num_rows,
        prompt_tokens=int(pick(scale.prompt_tokens)),
        new_tokens=int(pick(scale.new_tokens)),
        rows=num_rows // int(pick((1, 2, 4))),
        num_updates=int(pick((1, 2, 4))) if kind == "train" else 1,
        dtype=scale.dtype,
    )


def _draw_allocation(
    model: ModelConfig, cluster: Cluster, generator: np.random.Generator, **limits: Any
) -> Allocation:
    """Draw a number of devices and a strategy of the model, on the first of them."""
    size = int(generator.choice(range_sizes(cluster)))
    found = list(strategies(size, model, cluster, **limits))
    return found[generator.integers(len(found))]


def _moved(source: Probe, destination: Allocation, cluster: Cluster) -> Measurable:
    """Return the copy of a call's parameters to another allocation."""
    ends = source.allocation, destination
    model = padded_for(source.model, ends)
    needs = copy_quantities(
        *ends,
        copy_bytes=parameter_bytes(model, Place(destination, "float32")),
        num_arrays=num_arrays_of(model),
        cluster=cluster,
    )
    text = f"copy of {model.num_layers} x {model.width} from {ends[0]} to {ends[1]}"
    return Measurable(text, needs, lambda: _moving(model, *ends))


def copies(cluster: Cluster, scale: Scale) -> Iterator[Measurable]:
    """Go over copies between devices and to the host, and sums over devices."""
    devices = jax.local_devices()
    for size in scale.copy_bytes:
        on_host = np.zeros(size // 4, np.float32)
        text = f"{size / 2**20:g} MiB"
        touched = 2 * size / cluster.device.bytes_per_second
        to_host = size / cluster.device.host_bytes_per_second
        yield Measurable(
            f"{text} to the host and back",
            Quantities(host=2 * to_host, programs=2.0),
            lambda array=on_host: _offloading(array, devices[0]),
        )
        if len(devices) == 1:
            continue
        link = size / cluster.link_bytes_per_second
        yield Measurable(
            f"{text} from one device to another",
            Quantities(memory=touched, link=link, hops=1.0),
            lambda array=on_host: _copying(array, devices[0], devices[1]),
        )
        count = len(devices)
        ring = 2 * (count - 1) / count * link
        summed = Quantities(memory=touched, link=ring, hops=1.0, programs=1.0)
        yield Measurable(
            f"{text} summed over {count} devices",
            in_turns(summed, count, cluster),
            lambda array=on_host: _summing(array, devices),
        )


def _moving(model: ModelConfig, source: Allocation, destination: Allocation) -> Runner:
    parameters = parameters_on(model, source)
    axes = transformer.abstract_parameters(model)
    places = parameter_shardings(axes, make_mesh(destination))
    return lambda: jax.block_until_ready(reallocate(parameters, places))


def _offloading(array: np.ndarray, device: Any) -> Runner:
    tree = {"array": upload(array, SingleDeviceSharding(device))}

    def run() -> None:
        copy = HostCopy(tree)
        jax.block_until_ready(copy.tree)
        jax.block_until_ready(copy.reload())

    return run


def _copying(array: np.ndarray, first: Any, second: Any) -> Runner:
    source = upload(array, SingleDeviceSharding(first))
    place = SingleDeviceSharding(second)
    return lambda: jax.block_until_ready(reallocate(source, place))


def _summing(array: np.ndarray, devices: Sequence) -> Runner:
    mesh = Mesh(np.asarray(devices), ("all",))
    whole = NamedSharding(mesh, PartitionSpec())
    rows = NamedSharding(mesh, PartitionSpec("all"))
    parts = upload(np.stack([array] * len(devices)), rows)
    total = jax.jit(lambda x: jnp.sum(x, axis=0), out_shardings=whole)
    return lambda: jax.block_until_ready(total(parts))


def describe(found: Profile) -> list[str]:
    """Say what was found, a line each."""
    defaults = dataclasses.asdict(Coefficients())
    lines = [
        f"{name:16} {value:10.4g}   default {defaults[name]:.4g}"
        for name, value in dataclasses.asdict(found.coefficients).items()
    ]
    lines.append(
        f"fitted to {found.num_fitted} calls and copies; {len(found.checked)} drawn"
        f" after the fit have a mean error of {100 * found.mean_error:.1f} %"
    )
    if found.worst is not None:
        worst = found.worst
        lines.append(
            f"the worst, {100 * worst.error:+.0f} %: {worst.name}, measured"
            f" {worst.seconds:.3g} s, predicted {worst.predicted_seconds:.3g} s"
        )
    return lines
