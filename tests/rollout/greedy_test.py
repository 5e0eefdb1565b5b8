"""Greedy completions are those of a loop of full forward passes, token for token."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from tests.rollout.engines import (
    completions,
    greedy_loop,
    host_settings,
    inputs_of,
    make_engine,
    parameters_at,
)
from tests.tiny_families import FAMILIES

GROUP, WIDTH = 3, 88
EOS = (1, 31, 57)
LIMITS = np.array([16, 1, 9, 40, 5, 30], np.int32)
LEAST_PAGES = {2: 44, 4: 23, 16: 7}
"""By page size: those with which a row of 86 tokens can end."""


def longer(family):
    """The family's model, with positions for rows longer than a chunk."""
    return dataclasses.replace(FAMILIES[family], max_positions=128)


def some_prompts(num_common: int = 11) -> list[list[int]]:
    """Prompts that begin alike, from hardly longer than that to over two chunks."""
    generator = np.random.default_rng(2)
    common = generator.integers(0, 61, num_common).tolist()
    sizes = (59, 1, 24, 2, 35, 6)
    return [common + generator.integers(0, 61, size).tolist() for size in sizes]


@functools.cache
def expected(family):
    found = greedy_loop(longer(family), some_prompts(), LIMITS, EOS, WIDTH)
    # Some go on for long: the comparison is worth something.
    assert len(set(map(len, found))) >= 3
    assert max(map(len, found)) >= 14
    return [tokens for tokens in found for _ in range(GROUP)]


def check(family, engine, place="d1"):
    """Compare one rollout of an engine."""
    rollout = engine(
        parameters_at(longer(family), place),
        inputs_of(some_prompts(), place=place),
        jax.random.key(0),
        completions_per_prompt=GROUP,
        max_new_tokens=LIMITS,
    )
    assert completions(rollout) == expected(family)


def engine_of(family, **options):
    return make_engine(longer(family), width=WIDTH, eos=EOS, **options)


FAST = ("mixtral",)  # The others are much the same; llama is on a mesh.
EACH = [
    pytest.param(family, marks=() if family in FAST else pytest.mark.slow)
    for family in FAMILIES
]


@pytest.mark.parametrize("family", EACH)
def test_every_family_continues_as_a_loop_without_a_cache(family):
    # Hardly enough pages for two rows; windows of 5 to 7 tokens slide over pages of 4.
    engine = engine_of(family, pages=LEAST_PAGES[4])
    check(family, engine)
    refilled = engine.work.num_prefilled
    with host_settings(engine, is_refilling=False, is_sharing=False):
        check(family, engine)
    assert engine.work.num_prefilled > refilled
    assert engine.num_pools == 1


SHAPES = {
    "one slot": {"slots": 1},
    "two slots of small pages": {"slots": 2, "page_size": 2, "steps": 1},
    "few small pages": {"page_size": 2, "pages": LEAST_PAGES[2], "steps": 5},
    "four slots": {"slots": 4, "steps": 8, "chunk_tokens": 128},
    "five slots of large pages": {"slots": 5, "page_size": 16},
    "few large pages": {"slots": 5, "page_size": 16, "pages": LEAST_PAGES[16]},
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_slots_pages_and_steps_do_not_matter(family, shape):
    engine = engine_of(family, **SHAPES[shape])
    for is_refilling in (True, False):
        for is_sharing in (True, False):
            with host_settings(
                engine, is_refilling=is_refilling, is_sharing=is_sharing
            ):
                check(family, engine)


def places(family):
    """Ways to cut a model; experts where there are some."""
    return ("d4t2", "t4", "f2e2") if longer(family).moe else ("d4t2", "t4")


@pytest.mark.parametrize(
    "family, place",
    [
        pytest.param(
            family,
            place,
            marks=() if (family, place) == ("llama", "d4t2") else pytest.mark.slow,
        )
        for family in FAMILIES
        for place in places(family)
    ],
)
def test_a_mesh_continues_as_one_device(family, place):
    # Eight slots on four shards of rows; 18 rows do not divide over four.
    pages = LEAST_PAGES[4] * (4 if place != "t4" else 1)
    engine = engine_of(family, place=place, slots=8, pages=pages)
    check(family, engine, place)


# -- random schedules ------------------------------------------------------------------

NUM_PROMPTS, LONGEST, MOST_NEW, RANDOM_WIDTH = 6, 44, 14, 58
END_SETS = ((1,), tuple(range(0, 61, 9)))


@functools.cache
def random_engine(index):
    return make_engine(
        longer("qwen2"), width=RANDOM_WIDTH, eos=END_SETS[index], steps=4, slots=4
    )


def check_schedules(seeds):
    config, seen = longer("qwen2"), set()
    for seed in seeds:
        generator = np.random.default_rng(seed)
        common = generator.integers(0, 61, generator.integers(0, 20)).tolist()
        common *= int(generator.random() < 0.5)
        prompts = [
            common + generator.integers(0, 61, size).tolist()
            for size in generator.integers(1, LONGEST - len(common), NUM_PROMPTS)
        ]
        if generator.random() < 0.5:
            prompts[generator.integers(NUM_PROMPTS)] = []
        limits = generator.integers(1, MOST_NEW + 1, NUM_PROMPTS).astype(np.int32)
        index = seed % len(END_SETS)
        engine = random_engine(index)
        least = max(
            engine.room.needed_pages(len(p) + n)
            for p, n in zip(prompts, limits.tolist(), strict=True)
        )
        with host_settings(
            engine,
            # The host uses some of the pool.
            num_pages=int(generator.integers(least, engine.room.num_pages + 1)),
            is_refilling=bool(generator.random() < 0.8),
            is_sharing=bool(generator.random() < 0.8),
        ):
            rollout = engine(
                parameters_at(config),
                inputs_of(prompts, longest=LONGEST),
                jax.random.key(0),
                completions_per_prompt=2,
                max_new_tokens=limits,
            )
        loop = greedy_loop(config, prompts, limits, END_SETS[index], RANDOM_WIDTH)
        assert completions(rollout) == [t for t in loop for _ in range(2)], seed
        seen |= {len(tokens) for tokens in loop}
    assert len(seen) > MOST_NEW // 2


def test_random_schedules_continue_as_a_loop_without_a_cache():
    check_schedules(range(1, 15, 2))  # With one of the engines.


@pytest.mark.slow
def test_a_hundred_random_schedules_continue_as_a_loop_without_a_cache():
    check_schedules(range(100))
