"""The sections of the rollout bench that compare rates; each returns its figures.

Before anything is timed, the sides are run once, which compiles them, and what they
wrote is compared.
"""

from typing import Any

import numpy as np

from realjax.bench.quick import rates, spread
from realjax.bench.rollout_options import log_normal_lengths
from realjax.bench.rollout_subject import (
    NO_EOS,
    Subject,
    check_equal_rows,
    compilations,
    ratio,
)
from realjax.bench.static_loop import StaticLoop
from realjax.rl.sampling import Sampling
from realjax.rollout.engine import Engine


def lengths(subject: Subject) -> dict[str, Any]:
    """Log-normal lengths: slots that are refilled, against batches."""
    sizes, parameters = subject.options.sizes, subject.parameters
    width = sizes.prompt + sizes.longest
    limits = log_normal_lengths(sizes, seed=0)
    prompts = subject.prompts(sizes.num_prompts, sizes.prompt)
    sampling = Sampling(max_new_tokens=sizes.longest)
    refilled = subject.engine(width, sampling)
    batched = subject.engine(width, sampling, is_refilling=False)
    loop = StaticLoop(subject.program, sampling, width=width)

    def engine(engine: Engine):
        return engine(parameters, prompts, subject.key, max_new_tokens=limits).tokens

    def static():
        found = []
        for first in range(0, len(limits), sizes.slots):
            rows = slice(first, first + sizes.slots)
            chosen = {name: array[rows] for name, array in prompts.items()}
            found.append(loop(parameters, chosen, subject.key, limits[rows])[0])
        return found

    sides = {
        "refilled": lambda: engine(refilled),
        "batched": lambda: engine(batched),
        "static": static,
    }
    expected = np.asarray(sides["refilled"]())
    alike = {
        "batched": check_equal_rows(
            "batched", np.asarray(sides["batched"]()), expected
        ),
        "static": check_equal_rows("static", np.concatenate(static()), expected),
    }
    useful = int(limits.sum())
    for name, one in (("refilled", refilled), ("batched", batched)):
        _check_useful(name, one, useful)
    seconds = subject.interleaved("log-normal lengths", sides)
    batches = limits.reshape(-1, sizes.slots)
    static_steps = int(batches.max(axis=1).sum()) * sizes.slots
    return {
        "sigma": sizes.sigma,
        "mean_length": round(float(limits.mean()), 1),
        "longest": int(limits.max()),
        "useful_tokens": useful,
        "tokens_per_second": {name: rates(useful, s) for name, s in seconds.items()},
        "useful_over_computed": {
            "refilled": round(useful / refilled.work.num_steps, 3),
            "batched": round(useful / batched.work.num_steps, 3),
            "static": round(useful / static_steps, 3),
        },
        "kv_bytes": {
            "refilled": _kv_bytes(refilled),
            "batched": _kv_bytes(batched),
            "static": loop.cache_bytes(sizes.slots),
        },
        "rows_alike": alike,
        "times_batched": ratio(seconds["batched"], seconds["refilled"]),
        "times_static": ratio(seconds["static"], seconds["refilled"]),
    }


def sharing(subject: Subject) -> dict[str, Any]:
    """Several completions of a prompt, which they share or not."""
    sizes, parameters = subject.options.sizes, subject.parameters
    width = sizes.shared_prompt + sizes.shared_completion
    prompts = subject.prompts(sizes.num_shared, sizes.shared_prompt)
    sampling = Sampling(max_new_tokens=sizes.shared_completion)
    engines = {
        "shared": subject.engine(width, sampling),
        "alone": subject.engine(width, sampling, is_sharing=False),
    }

    def run(engine: Engine):
        return engine(
            parameters, prompts, subject.key, completions_per_prompt=sizes.group
        ).tokens

    sides = {name: lambda one=one: run(one) for name, one in engines.items()}
    expected = np.asarray(sides["shared"]())
    alike = check_equal_rows("alone", np.asarray(sides["alone"]()), expected)
    useful = sizes.num_shared * sizes.group * sizes.shared_completion
    for name, one in engines.items():
        _check_useful(name, one, useful)
    seconds = subject.interleaved("shared prompts", sides)
    return {
        "prompts": sizes.num_shared,
        "completions_per_prompt": sizes.group,
        "prompt": sizes.shared_prompt,
        "completion": sizes.shared_completion,
        "tokens_per_second": {name: rates(useful, s) for name, s in seconds.items()},
        "prefilled_tokens": {n: e.work.num_prefilled for n, e in engines.items()},
        "kv_bytes": {name: _kv_bytes(one) for name, one in engines.items()},
        "rows_alike": alike,
        "times_alone": ratio(seconds["alone"], seconds["shared"]),
    }


def equal(subject: Subject) -> dict[str, Any]:
    """Equal lengths, as many rows as slots: nothing to gain from slots and pages."""
    sizes, parameters = subject.options.sizes, subject.parameters
    prompts, sampling, width = greedy_work(subject)
    engine = subject.engine(width, sampling)
    loop = StaticLoop(subject.program, sampling, width=width)
    limits = np.full(sizes.slots, sizes.equal, np.int32)
    sides = {
        "engine": lambda: engine(parameters, prompts, subject.key).tokens,
        "static": lambda: loop(parameters, prompts, subject.key, limits)[0],
    }
    alike = subject.check_tokens(
        "static", np.asarray(sides["static"]()), np.asarray(sides["engine"]())
    )
    useful = sizes.slots * sizes.equal
    _check_useful("engine", engine, useful)
    seconds = subject.interleaved("equal lengths", sides)
    return {
        "rows": sizes.slots,
        "prompt": sizes.prompt,
        "completion": sizes.equal,
        "tokens_per_second": {name: rates(useful, s) for name, s in seconds.items()},
        "rows_alike": alike,
        "times_static": ratio(seconds["static"], seconds["engine"]),
    }


def greedy_work(subject: Subject) -> tuple[dict[str, np.ndarray], Sampling, int]:
    """Prompts for all slots, greedy completions of one length, and their width."""
    sizes = subject.options.sizes
    prompts = subject.prompts(sizes.slots, sizes.prompt)
    sampling = Sampling(greedy=True, max_new_tokens=sizes.equal)
    return prompts, sampling, sizes.prompt + sizes.equal


def host(subject: Subject) -> dict[str, Any]:
    """Time of Python for a step of decoding, beyond what it waits for the device."""
    sizes, parameters = subject.options.sizes, subject.parameters
    equal_prompts, greedy, equal_width = greedy_work(subject)
    work = {
        "equal": (equal_width, greedy, equal_prompts, None),
        "lengths": (
            sizes.prompt + sizes.longest,
            Sampling(max_new_tokens=sizes.longest),
            subject.prompts(sizes.num_prompts, sizes.prompt),
            log_normal_lengths(sizes, seed=0),
        ),
    }
    found: dict[str, list[float]] = {name: [] for name in work}
    engines = {name: subject.engine(w, s) for name, (w, s, _, _) in work.items()}
    sides = {}
    for name, (_, _, prompts, limits) in work.items():

        def run(name=name, prompts=prompts, limits=limits):
            engine = engines[name]
            engine(parameters, prompts, subject.key, max_new_tokens=limits)
            steps = engine.work.num_launches * engine.settings.steps
            found[name].append(1e3 * engine.work.host_seconds / steps)

        run()  # Compiles.
        sides[name] = run
    subject.interleaved("host", sides)
    return {
        "slots": sizes.slots,
        "steps_of_a_launch": engines["equal"].settings.steps,
        "milliseconds_per_step": {
            name: spread(times[-subject.options.repetitions :])
            for name, times in found.items()
        },
    }


def recompilations(subject: Subject) -> dict[str, Any]:
    """Programs compiled while batches of random lengths and ends are sampled."""
    sizes, vocab_size = subject.options.sizes, subject.options.model.vocab_size
    num_prompts, group = sizes.slots, 2
    longest = min(sizes.longest, 64)
    sampling = Sampling(max_new_tokens=longest)
    # One token of 32 ends a completion.
    eos_ids = tuple(range(0, vocab_size, 32)) or NO_EOS
    engine = subject.engine(sizes.prompt + longest, sampling, eos_ids=eos_ids)
    generator = np.random.default_rng(0)

    def sample(seed: int) -> None:
        prompts = subject.prompts(num_prompts, sizes.prompt, seed)
        lengths = generator.integers(1, sizes.prompt + 1, num_prompts)
        limits = generator.integers(1, longest + 1, num_prompts)
        engine(
            subject.parameters,
            prompts | {"lengths": lengths.astype(np.int32)},
            subject.key,
            completions_per_prompt=group,
            max_new_tokens=limits.astype(np.int32),
        )

    with compilations() as warming:
        prompts = subject.prompts(num_prompts, sizes.prompt)
        engine.warm_up(subject.parameters, prompts, completions_per_prompt=group)
        sample(0)
    before, tokens = engine.programs.num_compiled, 0
    what = "batches of random lengths"
    with (
        compilations() as compiled,
        subject.console.progress(what, sizes.num_batches, unit="batches") as advance,
    ):
        for seed in range(1, sizes.num_batches + 1):
            sample(seed)
            tokens += engine.work.num_tokens
            advance()
    return {
        "batches": sizes.num_batches,
        "rows": num_prompts * group,
        "tokens": tokens,
        "programs_before": before,
        "compilations_before": warming.count,
        "programs": engine.programs.num_compiled - before,
        "compilations": compiled.count,
    }


def _kv_bytes(engine: Engine) -> dict[str, int]:
    """Of the whole pool, and of the pages that were held at the same time at most."""
    page = engine.pool_bytes // (engine.room.num_pages * engine.num_shards)
    return {"pool": engine.pool_bytes, "held": page * engine.work.most_pages}


def _check_useful(name: str, engine: Engine, useful: int) -> None:
    """Check that an engine sampled what it was asked for.

    Raises:
        RuntimeError: it did not.
    """
    if engine.work.num_tokens != useful:
        raise RuntimeError(
            f"{name} sampled {engine.work.num_tokens} tokens, and {useful} were asked"
            " for. Its time says nothing."
        )
