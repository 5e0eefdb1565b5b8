"""Records of JSON files, and the prompts and completions they mean.

    kind            fields, ReaL's and TRL's                          completions
    prompt_answer   prompt, answer | prompt, completion | messages    1
    pairs           prompt, pos_answers, neg_answers |                2, 4, ... better
                    prompt?, chosen, rejected                         and worse in turn
    labels          the fields of prompt_answer, and label: true if   1
                    the completion is desirable, false if not
    prompts         prompt | messages                                 0

A prompt, completion, chosen or rejected may be a text, or a conversation: a list of
{"role", "content"} that the chat template renders. Without `prompt`, what `chosen` and
`rejected` begin with alike is the prompt. All other fields of a record are extras.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from realjax.data.tokenizer import Message, Tokenizer

__all__ = ["KINDS", "Example", "load_records", "read_examples"]

KINDS = ("prompt_answer", "pairs", "labels", "prompts")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One record as text; record numbers count from 0."""

    index: int
    prompt: str
    completions: tuple[str, ...]
    """To be encoded after the prompt; of a conversation, with the template's ending."""
    texts: tuple[str, ...]
    """The completions as people read them."""
    is_chat: bool
    extras: dict[str, Any]
    is_desirable: bool | None = None
    """What the label says of the completion; None without one."""


def load_records(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads the objects of a .jsonl file (one a line) or a .json file (one list).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is of another kind, malformed or empty, or holds non-objects.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"The data file {str(path)!r} {what}. Give the path of a .jsonl or .json "
            "file."
        )
    if path.suffix not in (".jsonl", ".json"):
        raise ValueError(
            f"The data file {str(path)!r} ends with {path.suffix!r}. Give a .jsonl "
            "file (one JSON object a line) or a .json file (one list of objects)."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8 text: {error}.") from error
    is_lines = path.suffix == ".jsonl"
    records = _parse_lines(path, text) if is_lines else _parse_list(path, text)
    if not records:
        raise ValueError(f"{str(path)!r} has no record. Give a file with at least one.")
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(
                f"Record {number} of {str(path)!r} is a {type(record).__name__}. "
                "A record is a JSON object with named fields."
            )
    return records


def _parse_lines(path: pathlib.Path, text: str) -> list[Any]:
    records = []
    # Not `splitlines`: JSON strings may hold other line separators, such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"Line {number} of {str(path)!r} is not JSON: {error}. "
                f"It reads {line[:60]!r}. Correct or remove it."
            ) from error
    return records


def _parse_list(path: pathlib.Path, text: str) -> list[Any]:
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{str(path)!r} is not JSON: {error}. Correct it, or name it .jsonl if it "
            "has one object a line."
        ) from error
    if not isinstance(records, list):
        raise ValueError(
            f"{str(path)!r} holds a {type(records).__name__}. A .json file holds one "
            "list of objects."
        )
    return records


def read_examples(
    records: Sequence[dict[str, Any]], kind: str, tokenizer: Tokenizer
) -> list[Example]:
    """Reads records as examples of a kind; errors name the record and the field."""
    readers = {
        "prompt_answer": _read_prompt_answer,
        "pairs": _read_pairs,
        "labels": _read_label,
        "prompts": _read_prompt,
    }
    examples = []
    for index, record in enumerate(records):
        try:
            example = readers[kind](index, _Fields(record), tokenizer)
            if not example.prompt:
                raise ValueError(
                    "its prompt is empty; the first token needs one before"
                )
        except ValueError as error:
            raise ValueError(
                f"Record {index} (counting from 0) cannot be read as {kind!r}: {error}."
            ) from error
        examples.append(example)
    return examples


class _Fields:
    """Fields of a record, which remembers those that were read."""

    def __init__(self, record: dict[str, Any]):
        self._record = record
        self._read: set[str] = set()

    def has(self, name: str) -> bool:
        return self._record.get(name) is not None

    def first(self, *names: str) -> Any:
        """The first of several fields that the record has."""
        for name in names:
            if self.has(name):
                self._read.add(name)
                return self._record[name]
        wanted = " or ".join(f"`{name}`" for name in names)
        raise ValueError(f"it has no field {wanted}, but {sorted(self._record)}")

    def extras(self) -> dict[str, Any]:
        return {k: v for k, v in self._record.items() if k not in self._read}


def _read_prompt(index: int, fields: _Fields, tokenizer: Tokenizer) -> Example:
    prompt = fields.first("prompt", "messages")
    if not isinstance(prompt, str):
        turns = _conversation("prompt", prompt)
        if not fields.has("prompt") and turns[-1]["role"] == "assistant":
            turns = turns[:-1]
        return _chat_example(index, fields, tokenizer, turns, [])
    return _text_example(index, fields, prompt, [])


def _read_prompt_answer(index: int, fields: _Fields, tokenizer: Tokenizer) -> Example:
    if fields.has("messages") and not fields.has("prompt"):
        turns = _conversation("messages", fields.first("messages"))
        if turns[-1]["role"] != "assistant":
            raise ValueError(
                f"`messages` ends with the role {turns[-1]['role']!r}; the last turn "
                "is the answer to learn, of the role 'assistant'"
            )
        return _chat_example(index, fields, tokenizer, turns[:-1], [turns[-1:]])
    prompt = fields.first("prompt", "messages")
    answer = fields.first("answer", "completion")
    if isinstance(prompt, str):
        return _text_example(index, fields, prompt, [_text("answer", answer)])
    turns = _conversation("prompt", prompt)
    answer = _conversation("answer", answer)
    return _chat_example(index, fields, tokenizer, turns, [answer])


def _read_label(index: int, fields: _Fields, tokenizer: Tokenizer) -> Example:
    label = fields.first("label")
    if not isinstance(label, bool):
        raise ValueError(
            f"`label` is {label!r:.60}; needed is true for a desirable completion or "
            "false for an undesirable one"
        )
    example = _read_prompt_answer(index, fields, tokenizer)
    return dataclasses.replace(example, is_desirable=label)


def _read_pairs(index: int, fields: _Fields, tokenizer: Tokenizer) -> Example:
    if not fields.has("chosen"):
        prompt = _text("prompt", fields.first("prompt"))
        better = _texts("pos_answers", fields.first("pos_answers", "chosen"))
        worse = _texts("neg_answers", fields.first("neg_answers"))
        if len(better) != len(worse):
            raise ValueError(
                f"it has {len(better)} pos_answers and {len(worse)} neg_answers, which "
                "are pairs: the counts must be equal"
            )
        both = [text for pair in zip(better, worse, strict=True) for text in pair]
        return _text_example(index, fields, prompt, both)
    chosen, rejected = fields.first("chosen"), fields.first("rejected")
    prompt = fields.first("prompt") if fields.has("prompt") else None
    if isinstance(chosen, str):
        both = [chosen, _text("rejected", rejected)]
        if prompt is None:
            size = _shared_text(*both)
            prompt, both = chosen[:size], [text[size:] for text in both]
        return _text_example(index, fields, _text("prompt", prompt), both)
    both = [_conversation("chosen", chosen), _conversation("rejected", rejected)]
    if prompt is None:
        size = _shared_turns(*both)
        turns, both = both[0][:size], [turns[size:] for turns in both]
    else:
        turns = _conversation("prompt", prompt)
    return _chat_example(index, fields, tokenizer, turns, both)


def _text_example(
    index: int, fields: _Fields, prompt: str, completions: list[str]
) -> Example:
    return Example(
        index=index,
        prompt=prompt,
        completions=tuple(completions),
        texts=tuple(completions),
        is_chat=False,
        extras=fields.extras(),
    )


def _chat_example(
    index: int,
    fields: _Fields,
    tokenizer: Tokenizer,
    prompt: list[Message],
    completions: list[list[Message]],
) -> Example:
    if not prompt:
        raise ValueError("the conversation has no turn before the answer")
    opening = tokenizer.render_chat(prompt, add_generation_prompt=True)
    endings = []
    for completion in completions:
        whole = tokenizer.render_chat([*prompt, *completion])
        if not whole.startswith(opening):
            raise ValueError(
                f"the chat template renders the prompt as {opening[-80:]!r}, and the "
                f"whole conversation, {whole[-160:]!r}, does not begin with that"
            )
        endings.append(whole[len(opening) :])
    return Example(
        index=index,
        prompt=opening,
        completions=tuple(endings),
        texts=tuple(
            "\n".join(turn["content"] for turn in turns) for turns in completions
        ),
        is_chat=True,
        extras=fields.extras(),
    )


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"`{name}` is a {type(value).__name__}, needed is a string")
    return value


def _texts(name: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"`{name}` is {value!r:.60}, needed is a list of strings")
    return [_text(f"{name}[{i}]", text) for i, text in enumerate(value)]


def _conversation(name: str, value: Any) -> list[Message]:
    is_turns = isinstance(value, list) and all(
        isinstance(turn, dict)
        and isinstance(turn.get("role"), str)
        and isinstance(turn.get("content"), str)
        for turn in value
    )
    if not value or not is_turns:
        raise ValueError(
            f"`{name}` is a {type(value).__name__}, {value!r:.60}; needed is a string, "
            'or a list of {"role": string, "content": string} where the others are too'
        )
    return value


def _shared_text(left: str, right: str) -> int:
    """Length of the prompt two texts share: whole words, the space left to answers."""
    size = _num_shared(left, right, lambda a, b: a == b)
    while size and not left[size - 1].isspace():
        size -= 1
    while size and left[size - 1].isspace():
        size -= 1
    return size


def _shared_turns(left: list[Message], right: list[Message]) -> int:
    """Turns two conversations share; the last turn of each is always the answer."""
    return _num_shared(
        left[:-1],
        right[:-1],
        lambda a, b: (a["role"], a["content"]) == (b["role"], b["content"]),
    )


def _num_shared(
    left: Sequence[Any], right: Sequence[Any], equal: Callable[[Any, Any], bool]
) -> int:
    size = 0
    # The shorter one may end first: then all of it is shared.
    for a, b in zip(left, right, strict=False):
        if not equal(a, b):
            break
        size += 1
    return size
