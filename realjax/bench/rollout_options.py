"""What the rollout bench is asked for: sizes of its work, a model, and flags."""

import argparse
import dataclasses
import math
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from realjax.bench.layout_pairs import parse_model
from realjax.bench.quick import MODEL
from realjax.core.arrays import Int
from realjax.models.config import ModelConfig

SECTIONS = (
    "lengths",
    "sharing",
    "equal",
    "host",
    "hf",
    "compilations",
    "roofline",
)
MODELS = {"1b": "llama-3.2-1b", "8b": "llama-3.1-8b"}
"""Published shapes by short names; `quick` is the model of `realjax.bench.quick`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much work the sections do.

    Attributes:
        slots: of the engine, and rows of a static batch.
        num_prompts: of `lengths`.
        prompt: tokens of a prompt, but for `sharing`.
        mean: of the lengths of completions.
        longest: completion.
        sigma: of the logarithm of a length, before it is cut to the longest.
        group: completions of a prompt that share it.
        num_shared: prompts of `sharing`.
        shared_prompt: its tokens.
        shared_completion: tokens of each of its completions.
        equal: tokens of completions that are all as long.
        num_batches: random batches of `compilations`.
        batches: rows at the same time, of `roofline`.
    """

    slots: int = 16
    num_prompts: int = 64
    prompt: int = 64
    mean: int = 272
    longest: int = 512
    sigma: float = 0.6
    group: int = 8
    num_shared: int = 8
    shared_prompt: int = 256
    shared_completion: int = 64
    equal: int = 256
    num_batches: int = 200
    batches: tuple[int, ...] = (16, 64, 256)


TINY = Sizes(
    slots=4,
    num_prompts=8,
    prompt=8,
    mean=12,
    longest=24,
    group=2,
    num_shared=4,
    shared_prompt=16,
    shared_completion=8,
    equal=16,
    num_batches=3,
    batches=(2, 4),
)
"""To see that everything runs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The flags of `realjax.bench.rollout`.

    Attributes:
        model: that generates; its parameters are random.
        model_name: what the flag called it.
        dtype: of parameters, activations and the pool.
        sections: of `SECTIONS`, to measure.
        repetitions: of every measurement.
        sizes: of the work.
        engine: settings of the engine that differ from its defaults.
        hf_python: an interpreter that has PyTorch and transformers.
        bandwidth: of the device's memory in GB/s; 0 measures it.
    """

    model: ModelConfig = MODEL
    model_name: str = "quick"
    dtype: str = "float32"
    sections: tuple[str, ...] = SECTIONS
    repetitions: int = 7
    sizes: Sizes = Sizes()
    engine: dict[str, Any] = dataclasses.field(default_factory=dict)
    hf_python: pathlib.Path | None = None
    bandwidth: float = 0.0


def parse(arguments: Sequence[str] | None, description: str) -> Options:
    """Read the flags.

    Raises:
        ValueError: there is no such section, or no such model.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--sections", help=f"some of {','.join(SECTIONS)}")
    parser.add_argument(
        "--model", default="quick", help="quick, 1b, 8b, llama-3.2-3b or width=64,…"
    )
    parser.add_argument("--dtype", help="float32 on CPUs, else bfloat16")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="tiny work, to see it run")
    parser.add_argument("--batches", help="rows of roofline, as in 16,64,256")
    parser.add_argument("--steps", type=int, help="tokens that a launch decodes")
    parser.add_argument("--page_size", type=int, help="tokens of a page")
    parser.add_argument("--chunk_tokens", type=int, help="of a chunk of prefill")
    parser.add_argument("--kv_dtype", help="of keys and values; by default the model's")
    parser.add_argument(
        "--hf_python",
        type=pathlib.Path,
        help="an interpreter with PyTorch and transformers",
    )
    parser.add_argument(
        "--bandwidth", type=float, default=0.0, help="GB/s; measured by default"
    )
    flags = parser.parse_args(arguments)
    is_cpu = jax.default_backend() == "cpu"
    # A CPU's caches hold a small model: its share of a bandwidth says nothing.
    usual = [name for name in SECTIONS if name != "roofline" or not is_cpu]
    sections = tuple(flags.sections.split(",") if flags.sections else usual)
    if unknown := set(sections) - set(SECTIONS):
        raise ValueError(
            f"--sections={flags.sections}: {', '.join(sorted(unknown))} cannot be"
            f" measured. Choose from {', '.join(SECTIONS)}."
        )
    sizes = TINY if flags.tiny else Sizes()
    if flags.batches:
        batches = tuple(int(size) for size in flags.batches.split(","))
        sizes = dataclasses.replace(sizes, batches=batches)
    of_engine = ("steps", "page_size", "chunk_tokens", "kv_dtype")
    return Options(
        model=_model(flags.model, sizes),
        model_name=flags.model,
        dtype=flags.dtype or ("float32" if is_cpu else "bfloat16"),
        sections=sections,
        repetitions=flags.repetitions,
        sizes=sizes,
        engine={k: v for k in of_engine if (v := getattr(flags, k)) is not None},
        hf_python=flags.hf_python,
        bandwidth=flags.bandwidth,
    )


def _model(name: str, sizes: Sizes) -> ModelConfig:
    found = MODEL if name == "quick" else parse_model(MODELS.get(name, name))
    needed = max(
        sizes.prompt + max(sizes.longest, 2 * sizes.equal),
        sizes.shared_prompt + sizes.shared_completion,
    )
    return dataclasses.replace(found, max_positions=max(found.max_positions, needed))


def log_normal_lengths(sizes: Sizes, seed: int) -> Int[np.ndarray, " B"]:
    """Lengths of completions, log-normal and cut to the longest, in random order.

    They are quantiles, so that any order has the mean asked for:

        length_i = min(exp(mu + sigma x_i), longest),  x_i = Phi^-1((i + 1/2) / B)

    Raises:
        ValueError: there are none of that mean.
    """
    normal = statistics.NormalDist()
    count = sizes.num_prompts
    quantiles = [normal.inv_cdf((i + 0.5) / count) for i in range(count)]

    def lengths(mu: float) -> np.ndarray:
        drawn = np.exp(mu + sizes.sigma * np.array(quantiles))
        return np.clip(np.round(drawn), 1, sizes.longest).astype(np.int32)

    low, high = 0.0, 2 * math.log(sizes.longest)
    for _ in range(60):  # The mean rises with mu.
        middle = (low + high) / 2
        is_short = lengths(middle).mean() < sizes.mean
        low, high = (middle, high) if is_short else (low, middle)
    found = lengths(high)
    if abs(found.mean() - sizes.mean) > 0.01 * sizes.mean + 0.5:
        raise ValueError(
            f"Lengths up to {sizes.longest} with sigma {sizes.sigma} have a mean of"
            f" {found.mean():.1f} at best, not {sizes.mean}. Ask for a lower mean."
        )
    return np.random.default_rng(seed).permutation(found)
