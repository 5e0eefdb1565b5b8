"""A small verifiable task: sort the digits of a number.

    prompt    4071=
    right     0147
    half      0417        two of four digits are where they belong

The answers to imitate are right half of the time and else in any order, so a model
trained on them scores about 0.6, and what learns from scores has all the way to 1.
"""

import itertools
import json
import pathlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

from realjax.data.tokenizer import Tokenizer

__all__ = ["score_all", "sorted_digits", "sorting_score", "write_sorting"]

_NUM_DIGITS = 4
_HELD_OUT = 7  # One of so many numbers.
_VOCAB_SIZE = 260


def sorted_digits(prompt: str) -> str:
    """Return the right answer to a prompt."""
    return "".join(sorted(prompt.removesuffix("=")))


def sorting_score(prompt: str, completion: str) -> float:
    """Return the share of places that hold the right digit; longer answers lose more.

    Args:
        prompt: a number and "=".
        completion: any text.
    """
    right = sorted_digits(prompt)
    hits = sum(a == b for a, b in zip(right, completion, strict=False))
    return hits / max(len(right), len(completion))


def score_all(
    prompts: Sequence[str], completions: Sequence[str | None], **columns: Sequence[Any]
) -> list[float]:
    """Score completions, as a reward function does; see `sorting_score`."""
    del columns
    pairs = zip(prompts, completions, strict=True)
    return [sorting_score(prompt, completion or "") for prompt, completion in pairs]


def write_sorting(
    folder: str | pathlib.Path,
    *,
    seed: int = 0,
    num_train: int = 4096,
    num_valid: int = 256,
) -> pathlib.Path:
    """Write the task's files, as `reviews.write_reviews` does.

    Args:
        folder: for "tokenizer", and for each of sft, right (the right answers alone),
            pairs, labels and prompts a file {name}_train.jsonl and _valid.jsonl.
        seed: of what is drawn.
        num_train: records of each file.
        num_valid: of each held-out file, with other numbers.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    makers = {
        "sft": _imitated,
        "right": lambda rng, prompt: {
            "prompt": prompt,
            "answer": sorted_digits(prompt),
        },
        "pairs": _pair,
        "labels": _label,
        "prompts": lambda rng, prompt: {"prompt": prompt},
    }
    for split, size in (("train", num_train), ("valid", num_valid)):
        for name, make in makers.items():
            rng = random.Random(f"{seed} {name} {split}")
            prompts = _prompts(rng, is_held_out=split == "valid")
            records = [make(rng, one) for one in itertools.islice(prompts, size)]
            lines = "".join(json.dumps(record) + "\n" for record in records)
            (folder / f"{name}_{split}.jsonl").write_text(lines)
    texts = [f"{number:04}=" for number in range(100)]
    Tokenizer.train(texts, _VOCAB_SIZE).save(folder / "tokenizer")
    return folder


def _prompts(rng: random.Random, *, is_held_out: bool) -> Iterator[str]:
    """All numbers of a split in a random order, then in another, and so on."""
    numbers = [
        number
        for number in range(10**_NUM_DIGITS)
        if (number % _HELD_OUT == 0) == is_held_out
    ]
    while True:
        for number in rng.sample(numbers, len(numbers)):
            yield f"{number:0{_NUM_DIGITS}}="


def _shuffled(rng: random.Random, prompt: str) -> str:
    digits = list(sorted_digits(prompt))
    rng.shuffle(digits)
    return "".join(digits)


def _imitated(rng: random.Random, prompt: str) -> dict[str, Any]:
    is_right = rng.random() < 0.5
    answer = sorted_digits(prompt) if is_right else _shuffled(rng, prompt)
    return {"prompt": prompt, "answer": answer}


def _pair(rng: random.Random, prompt: str) -> dict[str, Any]:
    """The right answer, and another order; of equal digits there is a wrong digit."""
    right = sorted_digits(prompt)
    wrong = _wrong(rng, prompt)
    return {"prompt": prompt, "pos_answers": [right], "neg_answers": [wrong]}


def _label(rng: random.Random, prompt: str) -> dict[str, Any]:
    is_right = rng.random() < 0.5
    answer = sorted_digits(prompt) if is_right else _wrong(rng, prompt)
    return {"prompt": prompt, "completion": answer, "label": is_right}


def _wrong(rng: random.Random, prompt: str) -> str:
    right = sorted_digits(prompt)
    if len(set(right)) == 1:
        return right[:-1] + str((int(right[-1]) + 1) % 10)
    while (answer := _shuffled(rng, prompt)) == right:
        pass
    return answer
