"""Nothing is compiled while batches of any lengths, limits and ends are sampled."""

import contextlib

import jax
import numpy as np
import pytest

from realjax.functions.packed import ModelProgram
from realjax.parallel import Allocation, make_mesh, partition_for
from realjax.rl.sampling import Sampling
from realjax.rollout.engine import Engine
from realjax.rollout.settings import Settings
from realjax.testing import tiny_model, tiny_parameters

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
NUM_PROMPTS, PROMPT, LONGEST, GROUP = 6, 40, 24, 2
CONFIG = tiny_model()
# A sixteenth of the vocabulary ends a completion.
EOS = (1, 17, 33, 49)


@contextlib.contextmanager
def compiled():
    """Yields a list of what is compiled in between, by whomever."""
    found = []

    def listen(event, _, **__):
        if event == COMPILE_EVENT:
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def make_engine(**settings) -> Engine:
    mesh = make_mesh(Allocation.parse("d1"))
    return Engine(
        ModelProgram(config=CONFIG, partition=partition_for(mesh)),
        mesh,
        Sampling(max_new_tokens=LONGEST),
        eos_ids=EOS,
        width=PROMPT + LONGEST,
        settings=Settings(slots=4, steps=4, chunk_tokens=64, **settings),
    )


def random_batch(generator: np.random.Generator) -> tuple[dict, np.ndarray]:
    """Prompts, some of which are padding or begin alike, and their limits."""
    tokens = generator.integers(2, CONFIG.vocab_size, (NUM_PROMPTS, PROMPT))
    if generator.random() < 0.3:
        tokens[:, :20] = tokens[0, :20]
    lengths = generator.integers(1, PROMPT + 1, NUM_PROMPTS)
    lengths[generator.random(NUM_PROMPTS) < 0.1] = 0
    prompts = {
        "prompts": tokens.astype(np.int32),
        "lengths": lengths.astype(np.int32),
        "ids": generator.integers(0, 1000, NUM_PROMPTS).astype(np.uint32),
    }
    limits = generator.integers(1, LONGEST + 1, NUM_PROMPTS).astype(np.int32)
    return prompts, limits


def check_batches(engine: Engine, count: int) -> None:
    """Compile by `warm_up` alone; then sample, and see that this compiles nothing."""
    parameters, generator = tiny_parameters(CONFIG), np.random.default_rng(0)
    prompts, limits = random_batch(generator)
    with compiled() as before:
        engine.warm_up(parameters, prompts, completions_per_prompt=GROUP)
    keys = list(jax.random.split(jax.random.key(0), count))
    num_programs, lengths = engine.programs.num_compiled, []
    assert num_programs >= 5
    assert before
    with compiled() as after:
        for key in keys:
            prompts, limits = random_batch(generator)
            rollout = engine(
                parameters,
                prompts,
                key,
                completions_per_prompt=GROUP,
                max_new_tokens=limits,
            )
            lengths.append(np.asarray(rollout.lengths))
    assert engine.programs.num_compiled == num_programs
    assert not after, f"{len(after)} programs were compiled"
    # The batches differed, and completions ended at tokens and at limits.
    assert len(np.unique(np.concatenate(lengths))) > PROMPT // 2
    assert engine.num_pools == 1


def test_nothing_is_compiled_after_the_warm_up():
    check_batches(make_engine(), 20)


@pytest.mark.slow
def test_nothing_is_compiled_where_rows_have_to_give_way():
    engine = make_engine(pages=8)  # One row of 64 tokens needs 5.
    check_batches(engine, 10)
    parameters = tiny_parameters(CONFIG)
    prompts, _ = random_batch(np.random.default_rng(1))
    num_programs = engine.programs.num_compiled
    engine(parameters, prompts, jax.random.key(3), completions_per_prompt=GROUP)
    assert engine.programs.num_compiled == num_programs


@pytest.mark.slow
def test_nothing_is_compiled_in_two_hundred_batches():
    check_batches(make_engine(), 200)
