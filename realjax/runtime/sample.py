"""Completions of prompts by one model: text in, ids, log-probabilities and text out."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from realjax.core.batch import Batch
from realjax.core.config import to_dataclass
from realjax.dataflow.buffer import Buffer
from realjax.functions.function import Generate
from realjax.functions.generate import GenerateProgram
from realjax.functions.packed import ModelProgram
from realjax.parallel.partition import partition_for
from realjax.rl.sampling import Sampling
from realjax.runtime.model import Model, check_ids


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """One completion.

    Attributes:
        prompt: index of its prompt in the list that was given.
        ids: tokens, the end-of-sequence token included.
        logprobs: of each token, under the distribution it was drawn from; nats.
        finish_reason: "stop" at an end-of-sequence token, else "length".
        text: decoded without special tokens; "" without a tokenizer.
    """

    prompt: int
    ids: list[int]
    logprobs: list[float]
    finish_reason: str
    text: str


def sample(
    model: Model,
    prompts: Sequence[str | Sequence[int] | np.ndarray],
    *,
    completions_per_prompt: int = 1,
    rows: int = 0,
    seed: int = 0,
    on_wave: Callable[[int, int], None] | None = None,
    **options,
) -> list[Completion]:
    """Samples completions.

    A completion depends on the seed, its prompt's place in the list and its own number,
    not on `rows` or the model's allocation.

    Args:
        model: with a language head.
        prompts: texts, or lists of ids.
        completions_per_prompt: of each.
        rows: completions sampled at the same time; 0 means all.
        seed: of the draws.
        on_wave: told (waves done, waves in all).
        **options: fields of `Sampling`: temperature, top_k, top_p, max_new_tokens, …

    Returns:
        In order: the completions of the first prompt, then of the second, …

    Raises:
        ValueError: a model with a scalar head or over stages, no prompts, an empty one,
            text without a tokenizer, an unknown option, or a prompt and completion
            longer than the model was made for.
    """
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
    sampling = to_dataclass(Sampling, options, path="sample")
    if completions_per_prompt < 1 or rows < 0:
        raise ValueError(
            f"completions_per_prompt is {completions_per_prompt} and rows {rows}; give "
            "at least 1 completion per prompt, and 0 rows for all at the same time."
        )
    ids = _prompt_ids(model, prompts)
    longest = max(map(len, ids))
    needed = longest + sampling.max_new_tokens
    limit = model.config.longest_sequence(is_sampled=False)
    if needed > limit:
        raise ValueError(
            f"The longest prompt has {longest} tokens; with {sampling.max_new_tokens} "
            f"new ones that is {needed}, and the model was made for {limit}. Shorten "
            "prompts or lower max_new_tokens."
        )
    total = len(ids) * completions_per_prompt
    shards = model.allocation.num_row_shards
    program = _program(
        model,
        Generate(sampling=sampling, completions_per_prompt=completions_per_prompt),
        num_rows=-(-min(rows or total, total) // shards) * shards,
        width=-(-needed // 8) * 8,
    )
    padded = np.zeros((len(ids), -(-longest // 8) * 8), np.int32)
    for row, prompt in zip(padded, ids, strict=True):
        row[: len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in ids], np.int32)
    buffer = Buffer(Batch.create({"prompts": padded}, lengths=lengths))
    inputs = {
        "prompts": buffer.get("prompts", model.allocation),
        "lengths": lengths,
        "ids": np.arange(len(ids), dtype=np.uint32),
    }
    key, waves = jax.random.key(seed), program.num_waves(len(ids))
    parts = []
    for index in range(waves):
        parts.append(program.wave(model.parameters, inputs, key, index))
        if on_wave is not None:
            jax.block_until_ready(parts[-1])
            on_wave(index + 1, waves)
    rollout = program.join(parts, len(ids))
    return [
        _completion(model, row // completions_per_prompt, *values)
        for row, values in enumerate(
            zip(
                np.asarray(rollout.tokens),
                np.asarray(rollout.completion_mask),
                np.asarray(rollout.old_logprobs),
                np.asarray(rollout.is_truncated),
                strict=True,
            )
        )
    ]


def _program(
    model: Model, spec: Generate, *, num_rows: int, width: int
) -> GenerateProgram:
    """The compiled form of a call, which the model keeps for the next one like it."""
    key = (spec.sampling, spec.completions_per_prompt, num_rows, width)
    if key not in model.programs:
        model.programs[key] = GenerateProgram(
            spec,
            ModelProgram(
                config=model.config,
                dtype=model.dtype,
                partition=partition_for(model.mesh, options=model.allocation.options),
            ),
            model.mesh,
            eos_ids=_eos_ids(model),
            num_rows=num_rows,
            width=width,
        )
    return model.programs[key]


def _eos_ids(model: Model) -> tuple[int, ...]:
    ids = model.tokenizer.eos_ids if model.tokenizer else ()
    return tuple(dict.fromkeys((*ids, *model.config.eos_ids)))


def _prompt_ids(model: Model, prompts) -> list[list[int]]:
    if isinstance(prompts, str):
        raise ValueError(f"prompts is one text, {prompts!r:.60}. Give a list of them.")
    if len(prompts) == 0:
        raise ValueError("There are no prompts. Give at least one.")
    found = []
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            if model.tokenizer is None:
                raise ValueError(
                    "The prompts are text and the model's folder has no tokenizer. "
                    "Give lists of ids, or a folder with tokenizer.json."
                )
            prompt = model.tokenizer.encode(prompt)
        if not len(prompt):
            raise ValueError(f"Prompt {index} has no tokens. Give it at least one.")
        check_ids(np.asarray(prompt), model.config, f"Prompt {index}")
        found.append([int(token) for token in prompt])
    return found


def _completion(model, prompt, tokens, mask, logprobs, is_truncated) -> Completion:
    ids = tokens[mask].tolist()
    return Completion(
        prompt=prompt,
        ids=ids,
        logprobs=logprobs[mask].tolist(),
        finish_reason="length" if is_truncated else "stop",
        text=model.tokenizer.decode(ids) if model.tokenizer else "",
    )
