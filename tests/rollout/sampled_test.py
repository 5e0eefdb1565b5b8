"""What is sampled depends on a row's prompt, key and place alone; the pool stays."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.rl.sampling import History, Sampling, is_kept, sample
from realjax.testing import tiny_model
from tests.functions.plain import plain_logits
from tests.rollout.engines import (
    completions,
    host_settings,
    inputs_of,
    make_engine,
    parameters_at,
    to_host,
)
from tests.tiny_families import FAMILIES

CONFIG = tiny_model()
NUM_PROMPTS, GROUP, LONGEST, LIMIT, WIDTH = 64, 2, 14, 18, 32
EOS = (1, 20, 40)
GENERATOR = np.random.default_rng(4)
# Half of them begin alike.
PROMPTS = [
    [7, 3, 9, 11, 2, 30] * (index % 2) + GENERATOR.integers(0, 64, size).tolist()
    for index, size in enumerate(GENERATOR.integers(1, LONGEST - 5, NUM_PROMPTS))
]
IDS = GENERATOR.integers(0, 1000, NUM_PROMPTS)
SAMPLING = Sampling(temperature=0.9, top_k=20, top_p=0.95, max_new_tokens=LIMIT)
KEY = functools.cache(lambda: jax.random.key(5))


def engine_of(place="d1", config=CONFIG, **options):
    """One engine for each kind."""
    return _engine_of(place, config, **{"sampling": SAMPLING, "slots": 8} | options)


@functools.cache
def _engine_of(place, config, **options):
    return make_engine(config, width=WIDTH, eos=EOS, place=place, **options)


def sampled(engine, rows=range(NUM_PROMPTS), *, place="d1", config=CONFIG, **options):
    """A rollout of some of the prompts, in NumPy."""
    inputs = inputs_of(
        [PROMPTS[row] for row in rows],
        IDS[list(rows)],
        longest=LONGEST,
        place=place,
    )
    parameters = parameters_at(config, place)
    options = {"completions_per_prompt": GROUP} | options
    return to_host(engine(parameters, inputs, KEY(), **options))


@functools.cache
def expected(rows=range(7), config=CONFIG):
    """What one device samples in full slots."""
    found = sampled(engine_of(config=config), rows, config=config)
    lengths = found.completion_mask.sum(axis=1)
    assert len(set(lengths.tolist())) >= min(len(rows), 5)
    return found


def assert_same(found, expected):
    """Equal tokens and sets; numbers up to rounding."""
    for name in ("tokens", "completion_mask", "is_truncated", "lengths", "kept"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    for name in ("old_logprobs", "entropy"):
        np.testing.assert_allclose(
            getattr(found, name), getattr(expected, name), atol=5e-5, err_msg=name
        )


# -- what a row depends on -------------------------------------------------------------


@pytest.mark.parametrize(
    "rows", [range(7), pytest.param(range(5, 6), marks=pytest.mark.slow)]
)
def test_rows_of_a_large_batch_are_those_of_a_small_one(rows):
    large = expected(range(NUM_PROMPTS))
    places = [row * GROUP + sample for row in rows for sample in range(GROUP)]
    assert_same(expected(rows), jax.tree.map(lambda x: x[places], large))
    assert (large.kept >= 0).any()


@pytest.mark.parametrize("is_sharing", [True, False])
def test_a_third_of_the_pages_gives_the_same_completions(is_sharing):
    engine = engine_of()
    third = engine.room.num_pages // 3
    for is_refilling in (True, False):
        with host_settings(
            engine, third, is_sharing=is_sharing, is_refilling=is_refilling
        ):
            assert_same(sampled(engine, range(7)), expected())
            assert engine.work.num_preempted > 0
            assert engine.work.most_pages <= third


@pytest.mark.parametrize(
    "place",
    ["d4t2", *(pytest.param(p, marks=pytest.mark.slow) for p in ("t4", "f4", "d2f2"))],
)
def test_a_mesh_samples_as_one_device(place):
    # 14 rows do not divide over four shards.
    assert_same(sampled(engine_of(place), range(7), place=place), expected())


@pytest.mark.slow
@pytest.mark.parametrize("place", ["e2", "d2e2", "e2t2"])
def test_experts_on_a_mesh_sample_as_on_one_device(place):
    config = dataclasses.replace(FAMILIES["mixtral"], vocab_size=CONFIG.vocab_size)
    found = sampled(engine_of(place, config), range(7), place=place, config=config)
    assert_same(found, expected(config=config))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"slots": 1, "steps": 8},
        {"slots": 5, "page_size": 1},
        {"slots": 16, "steps": 1, "chunk_tokens": 256},
        {"slots": 3, "page_size": 32, "steps": 20},
        {"slots": 8, "pages": 9, "chunk_tokens": 16},
    ],
)
def test_no_setting_changes_a_completion(settings):
    assert_same(sampled(engine_of(**settings), range(7)), expected())


def test_limits_are_those_of_each_prompt():
    limits = np.array([1, 18, 2, 7, 4, 1, 11], np.int32)
    found = sampled(engine_of(), range(7), max_new_tokens=limits)
    whole = completions(expected())
    cut = [c[:n] for c, n in zip(whole, np.repeat(limits, GROUP), strict=True)]
    assert completions(found) == cut
    is_cut = [c[-1] not in EOS for c in cut]
    np.testing.assert_array_equal(found.is_truncated, is_cut)
    assert len(set(is_cut)) == 2


# -- stops, failures and the pool ------------------------------------------------------


def test_least_lengths_are_those_of_each_prompt():
    sampling = dataclasses.replace(SAMPLING, min_new_tokens=LIMIT)
    least = np.array([0, LIMIT, 3, 0, 5, 0, 2], np.int32)
    engine = engine_of(sampling=sampling)
    found = sampled(engine, range(7), min_new_tokens=least)
    plain, of_rows = expected(), np.repeat(least, GROUP)
    assert (found.completion_mask.sum(axis=1) >= of_rows).all()
    rows = of_rows == 0  # As if there were no least length.
    np.testing.assert_array_equal(found.tokens[rows], plain.tokens[rows])
    assert (plain.completion_mask.sum(axis=1) < of_rows).any()
    with pytest.raises(ValueError, match=r"min_new_tokens has .*at most the"):
        sampled(engine, range(7), min_new_tokens=least + LIMIT)


def reading_engine():
    return engine_of(is_read=True)


@pytest.mark.parametrize("pages", [72, 12])
def test_rows_end_where_the_host_has_found_a_stop(pages):
    # Any of these tokens ends a row, itself left out.
    stops, told = {50, 55, 59, 60, 62}, {}

    def on_tokens(row, new):
        told.setdefault(row, []).extend(new.ids)
        found = [i for i, token in enumerate(told[row]) if token in stops]
        return found[0] if found else None

    engine = reading_engine()
    with host_settings(engine, pages):
        found = sampled(engine, range(7), on_tokens=on_tokens)
        assert (engine.work.num_preempted > 0) == (pages == 12)
    num_cut = 0
    for row, whole in enumerate(completions(expected())):
        place = next((i for i, t in enumerate(whole) if t in stops), len(whole))
        assert completions(found)[row] == whole[:place]
        is_cut = place < len(whole)
        num_cut += is_cut
        assert told[row][: place + 1] == whole[: place + 1]
        if is_cut:
            assert not found.is_truncated[row]
    assert 3 < num_cut
    mask = found.completion_mask
    logprobs = np.where(mask, expected().old_logprobs, 0.0)
    np.testing.assert_allclose(found.old_logprobs, logprobs, atol=5e-5)
    assert (found.kept[~mask] == -1).all()


def addresses(engine):
    return {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(engine._pool)}


def test_the_pool_stays_where_it_is_while_parameters_change():
    engine = engine_of()
    sampled(engine, range(7))
    before, num_pools = addresses(engine), engine.num_pools
    inputs = inputs_of(PROMPTS[:7], IDS[:7], longest=LONGEST)
    for seed in range(1, 4):
        parameters = parameters_at(CONFIG, seed=seed)
        engine(parameters, inputs, KEY(), completions_per_prompt=GROUP)
        assert addresses(engine) == before
    assert engine.num_pools == num_pools
    # Nothing is left of what the others wrote.
    assert_same(sampled(engine, range(7)), expected())


def test_an_interrupted_rollout_leaves_an_engine_that_works():
    engine, calls = reading_engine(), []

    def interrupt(*progress):
        calls.append(progress)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampled(engine, range(7), on_progress=interrupt)
    found, progress = [], []
    found = sampled(engine, range(7), on_progress=lambda *p: progress.append(p))
    assert_same(found, expected())
    assert progress[-1] == (14, 14, found.completion_mask.sum())
    assert progress == sorted(progress)


def test_numbers_that_are_none_do_not_outlive_their_parameters():
    engine = reading_engine()
    inputs = inputs_of(PROMPTS[:7], IDS[:7], longest=LONGEST)
    broken = jax.tree.map(lambda x: x * np.nan, parameters_at(CONFIG))
    engine(broken, inputs, KEY(), completions_per_prompt=GROUP)
    assert_same(sampled(engine, range(7)), expected())


# -- options against a loop of full passes ---------------------------------------------

BAD_WORDS = ((5,), (17,), (30, 31), (9, 11, 12))
OPTIONS = {
    "all": Sampling(
        temperature=0.8,
        top_k=30,
        min_p=0.02,
        repetition_penalty=1.3,
        presence_penalty=0.4,
        bad_words=BAD_WORDS,
        min_new_tokens=4,
        max_new_tokens=LIMIT,
    ),
    "repetition": Sampling(repetition_penalty=1.5, max_new_tokens=LIMIT),
    "presence": Sampling(presence_penalty=0.9, max_new_tokens=LIMIT),
    "bad words": Sampling(bad_words=BAD_WORDS, max_new_tokens=LIMIT),
    "min-p": Sampling(min_p=0.05, max_new_tokens=LIMIT),
    "least length": Sampling(min_new_tokens=9, max_new_tokens=LIMIT),
    "greedy with penalties": Sampling(
        greedy=True,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        bad_words=BAD_WORDS,
        min_new_tokens=3,
        max_new_tokens=LIMIT,
    ),
}


def sampled_loop(prompts, ids, sampling):
    """Tokens, log-probabilities and entropies, by a full pass for each token."""
    keys = jnp.stack([jax.random.fold_in(jax.random.fold_in(KEY(), i), 0) for i in ids])
    rows, found = [list(prompt) for prompt in prompts], [[] for _ in prompts]
    for place in range(sampling.max_new_tokens):
        tokens = np.zeros((len(rows), WIDTH), np.int32)
        for line, row in zip(tokens, rows, strict=True):
            line[: len(row)] = row
        ends = np.array([len(row) - 1 for row in rows])
        logits = plain_logits(parameters_at(CONFIG), CONFIG, tokens)
        forbidden = np.zeros((len(rows), CONFIG.vocab_size), bool)
        both, new = np.zeros_like(forbidden), np.zeros_like(forbidden)
        for index, row in enumerate(rows):
            both[index, row] = True
            new[index, row[len(prompts[index]) :]] = True
            if place < sampling.min_new_tokens:
                forbidden[index, list(EOS)] = True
            for *before, last in sampling.bad_words:
                if row[len(row) - len(before) :] == before:
                    forbidden[index, last] = True
        can_forbid = sampling.min_new_tokens or sampling.bad_words
        draw = sample(
            jnp.take_along_axis(logits, ends[:, None, None], axis=1)[:, 0],
            jax.vmap(jax.random.fold_in, (0, None))(keys, place),
            sampling,
            forbidden=jnp.asarray(forbidden) if can_forbid else None,
            history=History(jnp.asarray(both), jnp.asarray(new)),
        )
        for index, row in enumerate(rows):
            if place == 0 or (len(found[index]) == place and row[-1] not in EOS):
                values = (draw.tokens[index], draw.logprobs[index], draw.entropy[index])
                found[index].append(tuple(float(value) for value in values))
                row.append(int(draw.tokens[index]))
    return found


@pytest.mark.parametrize(
    "name",
    [n if n == "all" else pytest.param(n, marks=pytest.mark.slow) for n in OPTIONS],
)
def test_options_do_as_a_loop_without_a_cache(name):
    sampling = OPTIONS[name]
    engine = engine_of(sampling=sampling)
    # Each more than once: few slots are refilled, few pages taken back.
    rows, pages = range(12), engine.room.num_pages
    loop = sampled_loop([PROMPTS[row] for row in rows], IDS[list(rows)], sampling)
    for num_pages in (pages, pages // 3):
        with host_settings(engine, num_pages):
            found = sampled(engine, rows, completions_per_prompt=1)
        for row, of_row in enumerate(loop):
            tokens, logprobs, entropy = np.array(of_row).T
            mask = found.completion_mask[row]
            assert found.tokens[row][mask].tolist() == tokens.tolist()
            for values, right in (
                (found.old_logprobs, logprobs),
                (found.entropy, entropy),
            ):
                np.testing.assert_allclose(values[row][mask], right, atol=1e-4)
    assert (engine.work.num_preempted > 0) or name != "all"
    if sampling.bad_words:
        check_bad_words(found)
    lengths = found.completion_mask.sum(axis=1)
    assert lengths.min() >= min(sampling.min_new_tokens, LIMIT)
    assert len(set(lengths.tolist())) >= 3


def check_bad_words(found):
    """None is there, and none of their last ids in a set where it would be."""
    sets = np.asarray(is_kept(jnp.asarray(found.kept), CONFIG.vocab_size))
    for row, mask in enumerate(found.completion_mask):
        for place in np.flatnonzero(mask):
            for *before, last in BAD_WORDS:
                if found.tokens[row, place - len(before) : place].tolist() == before:
                    assert found.tokens[row, place] != last
                    assert not sets[row, place, last]
