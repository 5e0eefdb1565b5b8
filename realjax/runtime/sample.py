"""Completions of prompts by one model: text in, ids, log-probabilities and text out.

prompts ──▶ requests ──▶ portions ──▶ engine ──▶ completions, a group a prompt
└ what is wrong with one is its completions' `error`
"""

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from realjax.core.config import check_choice, to_dataclass
from realjax.functions.packed import ModelProgram
from realjax.models.pages import DTYPES as KV_DTYPES
from realjax.parallel.partition import partition_for
from realjax.rl.sampling import Sampling
from realjax.rollout.engine import Engine
from realjax.rollout.session import New, OnProgress
from realjax.rollout.settings import Settings
from realjax.runtime.model import Model
from realjax.runtime.requests import Prompt, Request, read_requests, word_ids
from realjax.runtime.stops import StopFinder, check_stops, special_id, text_before

MOST_SLOTS = 64
"""Completions decoded at the same time, where the caller does not say."""

_PORTION = 64
"""Completions for every slot that the engine is given at once. Their buffers take
memory, and what is compiled is compiled for their number."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """One completion.

    Attributes:
        prompt: index of its prompt in the list that was given.
        ids: tokens, with the one that ended it.
        logprobs: of each token, under the distribution it was drawn from; nats.
        entropy: of each of these distributions; nats.
        finish_reason: "stop" at an end-of-sequence token or a stop string, "length" at
            its most tokens, "error" where there is nothing.
        text: decoded without special tokens, up to the stop string; "" without a
            tokenizer.
        error: what is wrong with the prompt; "" if nothing is.
        seconds: from the beginning of the call until it had ended.
    """

    prompt: int
    ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    entropy: list[float] = dataclasses.field(default_factory=list)
    finish_reason: str
    text: str = ""
    error: str = ""
    seconds: float = dataclasses.field(default=0.0, compare=False)


def sample(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    completions_per_prompt: int = 1,
    max_new_tokens: int | Sequence[int] = Sampling.max_new_tokens,
    min_new_tokens: int | Sequence[int] = Sampling.min_new_tokens,
    seed: int | Sequence[int] = 0,
    stop: str | Sequence[str] = (),
    bad_words: Sequence[str | Sequence[int]] = (),
    slots: int = 0,
    pages: int = 0,
    kv_dtype: str = "",
    is_strict: bool = False,
    on_progress: OnProgress | None = None,
    on_completion: Callable[[int, Completion], None] | None = None,
    **options,
) -> list[Completion]:
    """Samples completions.

    A completion depends on the seed, its prompt, the prompt's place in the list and its
    own number; with a seed for each prompt not on the place. It does not depend on the
    other prompts, on `slots`, `pages` or the model's allocation.

    What the model needs for this, compiled programs and a pool of keys and values, it
    keeps for the next call.

    Args:
        model: with a language head.
        prompts: texts, or lists of ids.
        completions_per_prompt: of each.
        max_new_tokens: most tokens of a completion; one number, or one for each prompt.
        min_new_tokens: end-of-sequence tokens are forbidden before as many; the same.
        seed: of the draws; one, or one for each prompt, from 0.
        stop: strings that end a completion, which keeps the ids up to the one that
            completes the string, and the text before it; also before `min_new_tokens`.
            The name of a special token stands for its id, as an end of sequence.
        bad_words: texts or lists of ids that are never completed. A text stands for the
            ids the tokenizer gives it, with a space before it and without.
        slots: completions decoded at the same time; 0 means all, up to `MOST_SLOTS`.
        pages: of 32 tokens that the pool has; 0 is enough for any completions.
        kv_dtype: of keys and values in the pool, "int8" or "float8_e4m3fn" say; by
            default the model's.
        is_strict: whether a prompt that cannot be continued is an exception, and not an
            `error` of its own completions.
        on_progress: told completions done, completions in all, and tokens sampled.
        on_completion: given each completion as it ends, with its place in the list that
            is returned.
        **options: other fields of `Sampling`: temperature, top_k, top_p, min_p, …

    Returns:
        In order: the completions of the first prompt, then of the second, …

    Raises:
        ValueError: what is wrong with all: a model with a scalar head or over stages,
            no prompts, text without a tokenizer, an unknown option, values out of
            range, a stop string that cannot occur.
    """
    _check_model(model)
    if completions_per_prompt < 1 or slots < 0 or pages < 0:
        raise ValueError(
            f"completions_per_prompt is {completions_per_prompt}, slots {slots} and "
            f"pages {pages}; give at least 1 completion per prompt, and 0 slots or "
            "pages for as many as are needed."
        )
    check_choice("kv_dtype", kv_dtype, ("", *KV_DTYPES))
    sampling = _sampling(model, max_new_tokens, min_new_tokens, bad_words, options)
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    eos_ids = _eos_ids(model, stop)
    requests = read_requests(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        seed=seed,
    )
    _check_limit(model, sampling)
    call = _Call(
        model,
        sampling,
        requests,
        completions_per_prompt=completions_per_prompt,
        eos_ids=eos_ids,
        stop=stop,
        settings=Settings(slots=slots, pages=pages, kv_dtype=kv_dtype),
    )
    failed = next((one for one in call.requests if one.error), None)
    if is_strict and failed is not None:
        raise ValueError(failed.error)
    # Seeds of prompts take the part of their places, under one key.
    one_seed = int(seed) if isinstance(seed, int | np.integer) else 0
    return call.run(one_seed, on_progress, on_completion)


class _Call:
    """Requests, and the engine that fulfils those without an error."""

    def __init__(
        self,
        model: Model,
        sampling: Sampling,
        requests: Sequence[Request],
        *,
        completions_per_prompt: int,
        eos_ids: tuple[int, ...],
        stop: tuple[str, ...],
        settings: Settings,
    ):
        self.model, self.stop, self.eos_ids = model, stop, eos_ids
        self.group_size = completions_per_prompt
        self.num_shards = model.allocation.num_row_shards
        self.requests = list(requests)
        good = [one for one in requests if not one.error]
        if not good:
            return
        self.portion, num_slots = self._sizes(len(good), settings.slots)
        self.engine = _engine(
            model,
            sampling,
            eos_ids=eos_ids,
            width=_rounded(max(one.width for one in good)),
            settings=dataclasses.replace(settings, slots=num_slots),
        )
        self.requests = [self._checked(one) for one in requests]

    def _sizes(self, num_prompts: int, slots: int) -> tuple[int, int]:
        """Prompts of a portion, and slots; of few sizes, as each is compiled for."""
        total = num_prompts * self.group_size
        slots = min(slots or MOST_SLOTS, _power_of_two(total))
        slots = _multiple(slots, self.num_shards)
        most = max(_PORTION * slots // self.group_size, 1)
        if num_prompts < self.num_shards:
            return min(num_prompts, most), slots
        portion = min(_power_of_two(num_prompts), most)
        return _multiple(portion, self.num_shards), slots

    def _checked(self, request: Request) -> Request:
        """The request, with an error if it does not fit into the pool."""
        if request.error:
            return request
        try:
            self.engine.check(len(request.ids), request.max_new_tokens)
        except ValueError as error:
            text = f"Prompt {request.place}: {error}"
            return dataclasses.replace(request, error=text)
        return request

    def run(
        self,
        seed: int,
        on_progress: OnProgress | None,
        on_completion: Callable[[int, Completion], None] | None,
    ) -> list[Completion]:
        """Tell what ends as it ends; return all in order."""
        began = time.perf_counter()
        found: dict[int, Completion] = {}

        def note(place: int, completion: Completion) -> None:
            seconds = time.perf_counter() - began
            found[place] = dataclasses.replace(completion, seconds=seconds)
            if on_completion is not None:
                on_completion(place, found[place])

        for one in self.requests:
            for place in self._places(one) if one.error else ():
                note(place, _failed(one))
        good = [one for one in self.requests if not one.error]
        if good:
            self._sample_all(good, jax.random.key(seed), on_progress, note)
        return [found[place] for place in range(len(found))]

    def _sample_all(
        self, requests: Sequence[Request], key, on_progress: OnProgress | None, note
    ) -> None:
        """Sample portion by portion; `note` is told a place and its completion."""
        num_before = num_tokens = 0

        def tell(done: int, _, tokens: int) -> None:
            if on_progress is not None:
                total = len(requests) * self.group_size
                on_progress(num_before + done, total, num_tokens + tokens)

        for first in range(0, len(requests), self.portion):
            portion = requests[first : first + self.portion]
            self._sample(portion, key, tell, note)
            num_before += len(portion) * self.group_size
            num_tokens += self.engine.work.num_tokens

    def _places(self, request: Request) -> range:
        """Of a prompt's completions among all."""
        first = request.place * self.group_size
        return range(first, first + self.group_size)

    def _sample(self, portion: Sequence[Request], key, on_progress, note) -> None:
        """Sample a portion of the requests."""
        shape = (self.portion, self.engine.width)
        tokens, ids = np.zeros(shape, np.int32), np.zeros(self.portion, np.uint32)
        lengths, limits, minimums = np.zeros((3, self.portion), np.int32)
        rows: dict[int, _Row] = {}
        for line, one in zip(self._lines(len(portion)), portion, strict=True):
            tokens[line, : len(one.ids)] = one.ids
            lengths[line], limits[line] = len(one.ids), one.max_new_tokens
            ids[line], minimums[line] = one.data_id, one.min_new_tokens
            for number, place in enumerate(self._places(one)):
                rows[line * self.group_size + number] = self._row(one, place)

        def on_tokens(row: int, new: New) -> int | None:
            kept = rows[row].add(new)
            if kept is not None or new.has_ended:
                done = rows.pop(row)
                note(done.place, self._completion(done, kept))
            return kept

        with self.engine.session(
            self.model.parameters,
            {"prompts": tokens, "lengths": lengths, "ids": ids},
            key,
            completions_per_prompt=self.group_size,
            max_new_tokens=limits,
            min_new_tokens=minimums,
            on_progress=on_progress,
            on_tokens=on_tokens,
        ) as session:
            while not session.is_done:
                session.advance()

    def _lines(self, count: int) -> list[int]:
        """Lines of a portion for so many prompts: as many on each row shard."""
        if self.portion % self.num_shards:
            return list(range(count))
        size = self.portion // self.num_shards
        return [i % self.num_shards * size + i // self.num_shards for i in range(count)]

    def _row(self, request: Request, place: int) -> "_Row":
        tokenizer, finder = self.model.tokenizer, None
        if self.stop:
            assert tokenizer is not None
            finder = StopFinder(tokenizer, self.stop)
        return _Row(prompt=request.place, place=place, finder=finder)

    def _completion(self, row: "_Row", kept: int | None) -> Completion:
        ids, tokenizer = row.ids[:kept], self.model.tokenizer
        text = "" if tokenizer is None else tokenizer.decode(ids)
        is_complete = kept is not None or ids[-1] in self.eos_ids
        return Completion(
            prompt=row.prompt,
            ids=ids,
            logprobs=row.logprobs[:kept],
            entropy=row.entropy[:kept],
            finish_reason="stop" if is_complete else "length",
            text=text_before(text, self.stop),
        )


@dataclasses.dataclass(kw_only=True)
class _Row:
    """A completion that is being sampled, for its place among all."""

    prompt: int
    place: int
    finder: StopFinder | None
    ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    entropy: list[float] = dataclasses.field(default_factory=list)

    def add(self, new: New) -> int | None:
        """Take tokens; return how many are kept in all, if a stop string ends them."""
        self.ids += new.ids
        self.logprobs += new.logprobs
        self.entropy += new.entropy
        return None if self.finder is None else self.finder.add(new.ids)


def _failed(request: Request) -> Completion:
    """What a request with an error gets."""
    return Completion(prompt=request.place, finish_reason="error", error=request.error)


def _check_model(model: Model) -> None:
    if model.config.head != "language":
        raise ValueError(
            "The model has a scalar head (a reward model or critic) and cannot sample. "
            "Load a language model."
        )
    if model.allocation.stage > 1:
        raise ValueError(
            f"The model lies on {model.allocation}, over stages, which would wait for "
            "each other at every token. Load it with data, fsdp, tensor or expert."
        )


def _check_limit(model: Model, sampling: Sampling) -> None:
    """Refuse a limit that leaves no room for any prompt."""
    limit = sampling.max_new_tokens
    longest = model.config.longest_sequence(is_sampled=False)
    if limit >= longest:
        raise ValueError(
            f"max_new_tokens is {limit}, and the model was made for {longest} tokens "
            "of prompt and completion together. Lower it."
        )


def _sampling(
    model: Model,
    max_new_tokens: int | Sequence[int],
    min_new_tokens: int | Sequence[int],
    bad_words,
    options: dict,
) -> Sampling:
    """How tokens are drawn; limits of single prompts are checked with these."""
    words = word_ids(model.tokenizer, bad_words)
    values = {**options, "bad_words": words}
    longest = model.config.longest_sequence(is_sampled=False)
    is_one = isinstance(max_new_tokens, int | np.integer)
    values["max_new_tokens"] = int(max_new_tokens) if is_one else longest - 1
    values["min_new_tokens"] = (
        min_new_tokens
        if isinstance(min_new_tokens, int | np.integer)
        else max(0, *(one for one in min_new_tokens if isinstance(one, int)), 0)
    )
    sampling = to_dataclass(Sampling, values, path="sample")
    largest = max((max(word) for word in sampling.bad_words), default=-1)
    if largest >= model.config.vocab_size:
        raise ValueError(
            f"bad_words has the id {largest}, and the model's vocabulary has "
            f"{model.config.vocab_size} ids, from 0. Is the tokenizer another model's?"
        )
    return sampling


def _eos_ids(model: Model, stop: tuple[str, ...]) -> tuple[int, ...]:
    """Ids that end a completion; also checks the stop strings."""
    found: tuple[int | None, ...] = ()
    if stop:
        if model.tokenizer is None:
            raise ValueError(
                "Stop strings are looked for in text, and the model's folder has no "
                "tokenizer. Leave `stop` out, or give a folder with tokenizer.json."
            )
        tokenizer = model.tokenizer
        found = tuple(special_id(tokenizer, one) if one else None for one in stop)
        check_stops(
            tokenizer, [s for s, i in zip(stop, found, strict=True) if i is None]
        )
    own = model.tokenizer.eos_ids if model.tokenizer else ()
    ids = (*own, *model.config.eos_ids, *(i for i in found if i is not None))
    return tuple(dict.fromkeys(ids))


def _engine(
    model: Model,
    sampling: Sampling,
    *,
    eos_ids: tuple[int, ...],
    width: int,
    settings: Settings,
) -> Engine:
    """The engine for a call, which the model keeps for the next one like it."""
    # Rows have limits of their own.
    sampling = dataclasses.replace(sampling, max_new_tokens=width)
    key = (sampling, eos_ids, width, settings)
    for other, engine in model.programs.items():
        if other != key:
            engine.drop_pool()
    if key not in model.programs:
        model.programs[key] = Engine(
            ModelProgram(
                config=model.config,
                dtype=model.dtype,
                partition=partition_for(model.mesh, options=model.allocation.options),
            ),
            model.mesh,
            sampling,
            eos_ids=eos_ids,
            width=width,
            settings=settings,
            is_read=True,
            has_kept=False,
        )
    return model.programs[key]


def _power_of_two(number: int) -> int:
    """The next one."""
    return 1 << (number - 1).bit_length()


def _multiple(number: int, unit: int) -> int:
    """The next one."""
    return -(-number // unit) * unit


def _rounded(width: int) -> int:
    """The next of few widths: multiples of 16, and of an eighth of a power of two."""
    return _multiple(width, max(16, _power_of_two(width) // 8))
