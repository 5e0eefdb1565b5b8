"""How near decoding comes to the bandwidth of the device's memory.

    share = (bytes of parameters + bytes of keys and values read) / (time x bandwidth)

The time of some steps is the difference of two rollouts, a long and a short one, so
that neither prefill nor what begins and ends a rollout is in it.
"""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from realjax.bench.quick import spread
from realjax.bench.rollout_subject import Subject
from realjax.models import pages
from realjax.rl.sampling import Sampling

ARRAY_BYTES = 2**31
"""Of the array that is read and written to find out the bandwidth."""

SMALL_ARRAY_BYTES = 2**28
"""The same on CPUs."""


def measured_bandwidth(repetitions: int) -> float:
    """Bytes a second of a large array that is read and written, in place.

    A copy would ask a CPU's system for new memory each time, which is slower.
    """
    is_cpu = jax.default_backend() == "cpu"
    size = SMALL_ARRAY_BYTES if is_cpu else ARRAY_BYTES
    add_one = jax.jit(lambda array: array + 1, donate_argnums=0)
    array = jax.block_until_ready(add_one(jnp.zeros(size // 4, jnp.float32)))
    seconds = []
    for _ in range(repetitions):
        begin = time.perf_counter()
        array = jax.block_until_ready(add_one(array))
        seconds.append(time.perf_counter() - begin)
    return 2 * size / statistics.median(seconds)


def roofline(subject: Subject) -> dict[str, Any]:
    """Decode steps of several batches, as shares of the bandwidth."""
    options = subject.options
    bandwidth = 1e9 * options.bandwidth or measured_bandwidth(options.repetitions)
    return {
        "bandwidth_gigabytes_per_second": round(bandwidth / 1e9, 1),
        "is_measured": not options.bandwidth,
        "parameter_bytes": read_parameter_bytes(subject),
        "batches": [_batch(subject, rows, bandwidth) for rows in options.sizes.batches],
    }


def read_parameter_bytes(subject: Subject) -> int:
    """Bytes of parameters that a step reads: of an embedding only if it is the head."""
    config, item = subject.options.model, jnp.dtype(subject.options.dtype).itemsize
    embedding = 0 if config.tie_embeddings else config.vocab_size * config.width
    return (config.num_parameters - embedding) * item


def _batch(subject: Subject, rows: int, bandwidth: float) -> dict[str, Any]:
    sizes, config = subject.options.sizes, subject.options.model
    short, long = sizes.equal // 2, sizes.equal
    engine = subject.engine(
        sizes.prompt + long,
        Sampling(greedy=True, max_new_tokens=long),
        slots=rows,
    )
    prompts = subject.prompts(rows, sizes.prompt)

    def run(limit: int):
        limits = np.full(rows, limit, np.int32)
        return engine(
            subject.parameters, prompts, subject.key, max_new_tokens=limits
        ).tokens

    sides = {"long": lambda: run(long), "short": lambda: run(short)}
    seconds = subject.interleaved(f"{rows} rows", sides)
    steps = long - short
    of_step = [
        (more - less) / steps
        for more, less in zip(seconds["long"], seconds["short"], strict=True)
    ]
    of_token = pages.page_bytes(config, 1, engine.kv_dtype)
    context = sizes.prompt + (short + long) / 2
    bytes_of_step = read_parameter_bytes(subject) + rows * context * of_token
    return {
        "rows": rows,
        "mean_context": context,
        "kv_bytes_of_step": round(rows * context * of_token),
        "milliseconds_per_step": spread([1e3 * s for s in of_step]),
        "tokens_per_second": round(rows / statistics.median(of_step)),
        "share_of_bandwidth": round(
            bytes_of_step / bandwidth / statistics.median(of_step), 3
        ),
    }
