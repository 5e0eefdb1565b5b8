"""Engines of tiny models, their rollouts as lists, and the loop without a cache."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from realjax.models.config import ModelConfig
from realjax.parallel import Allocation, padded_for
from realjax.rl.sampling import Sampling
from realjax.rollout.engine import Engine
from realjax.rollout.rows import Rollout
from realjax.rollout.settings import Settings
from tests.functions.plain import (
    batch_on,
    mesh_of,
    model_on,
    parameters_on,
    plain_logits,
    sharp_parameters,
)


def make_engine(
    config: ModelConfig,
    *,
    width: int,
    eos: Sequence[int],
    place: str = "d1",
    sampling: Sampling | None = None,
    is_read: bool = False,
    **settings,
) -> Engine:
    """An engine of a model on an allocation; greedy unless told otherwise."""
    settings = {"slots": 3, "page_size": 4, "steps": 3, "chunk_tokens": 32} | settings
    return Engine(
        model_on(place, padded(config, place)),
        mesh_of(place),
        sampling or Sampling(greedy=True, max_new_tokens=width),
        eos_ids=tuple(eos),
        width=width,
        settings=Settings(**settings),
        is_read=is_read,
    )


def padded(config: ModelConfig, place: str) -> ModelConfig:
    """The config with a vocabulary that an allocation divides."""
    return padded_for(config, [Allocation.parse(place)])


@functools.cache
def parameters_at(config: ModelConfig, place: str = "d1", seed: int = 0):
    """Parameters by which a continuation rambles; the same numbers everywhere."""
    config = padded(config, place)
    parameters = sharp_parameters(config, seed)
    louder = lambda leaf: leaf if leaf.ndim < 3 else 4 * leaf
    parameters["layers"] = jax.tree.map(louder, parameters["layers"])
    return parameters_on(place, config, parameters)


@contextlib.contextmanager
def host_settings(engine: Engine, num_pages: int = 0, **changes) -> Iterator[None]:
    """Let the host decide otherwise for a while, with the same programs and pool."""
    settings, room = engine.settings, engine.room
    with engine._borrowed_pool():
        pass  # It is there as a whole from now on.
    engine.settings = dataclasses.replace(settings, **changes)
    if num_pages:
        engine.room = dataclasses.replace(room, num_pages=num_pages)
    try:
        yield
    finally:
        engine.settings, engine.room = settings, room


def inputs_of(
    prompts: Sequence[Sequence[int]],
    ids: Sequence[int] | None = None,
    *,
    longest: int = 0,
    place: str = "d1",
) -> dict:
    """Prompts as an engine takes them; an empty one is padding."""
    lengths = np.array([len(p) for p in prompts], np.int32)
    tokens = np.zeros((len(prompts), max(longest, *lengths.tolist(), 1)), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    ids = np.arange(len(prompts)) if ids is None else ids
    return {
        "lengths": lengths,
        "ids": np.asarray(ids, np.uint32),
        **batch_on(place, {"prompts": tokens}),
    }


def to_host(rollout: Rollout) -> Rollout:
    """A rollout in NumPy."""
    return jax.tree.map(np.asarray, rollout)


def completions(rollout: Rollout) -> list[list[int]]:
    """Ids of each row's completion."""
    return [
        tokens[mask].tolist()
        for tokens, mask in zip(
            np.asarray(rollout.tokens), np.asarray(rollout.completion_mask), strict=True
        )
    ]


def greedy_loop(
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    eos: Sequence[int],
    width: int,
) -> list[list[int]]:
    """One forward pass over all tokens for each new one, the most likely chosen."""
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    begin = np.array([len(prompt) for prompt in prompts])
    ends = begin.copy()
    goes_on = begin > 0
    while goes_on.any():
        logits = np.asarray(plain_logits(parameters_at(config), config, tokens))
        for row in np.flatnonzero(goes_on):
            chosen = int(logits[row, ends[row] - 1].argmax())
            tokens[row, ends[row]] = chosen
            ends[row] += 1
            goes_on[row] = chosen not in eos and ends[row] - begin[row] < limits[row]
    return [
        row[start:end].tolist()
        for row, start, end in zip(tokens, begin, ends, strict=True)
    ]
