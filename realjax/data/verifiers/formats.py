"""Verifiers of form: patterns, lengths, JSON."""

import functools
import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jsonschema
import jsonschema.validators

from realjax.data.verifiers.columns import needed_column

_UNITS = {"characters": len, "words": lambda text: len(text.split())}
_FENCED = re.compile(r"```[ \t]*(?:json)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)


def matches_pattern(
    prompts: Sequence[str],
    completions: Sequence[str | None],
    *,
    pattern: str,
    is_whole: bool = True,
    **columns: Sequence[Any],
) -> list[float]:
    r"""Scores 1 where a completion has the form of a regular expression, else 0.

    The form of answers that think first is r"<think>.*</think>\s*<answer>.*</answer>".
    A pattern that takes exponential time meets the time limit of its reward function.

    Args:
        prompts: not read.
        completions: to be matched; spaces around them do not count.
        pattern: of Python's `re`; a dot also stands for a line break.
        is_whole: whether the whole completion must match; else some part of it.
        **columns: not read.

    Raises:
        ValueError: the pattern is none.
    """
    del prompts, columns
    compiled = _compiled(pattern)
    match = compiled.fullmatch if is_whole else compiled.search
    return [float(bool(match((text or "").strip()))) for text in completions]


def length_near(
    prompts: Sequence[str],
    completions: Sequence[str | None],
    *,
    target: float,
    unit: str = "words",
    **columns: Sequence[Any],
) -> list[float]:
    """Scores 1 at the target length, and less in proportion to the distance from it.

        max(0, 1 - |n - target| / target)

    Args:
        prompts: not read.
        completions: to be measured.
        target: length that is best, above 0.
        unit: "words" or "characters".
        **columns: not read.
    """
    del prompts, columns
    if not target > 0:
        raise ValueError(f"target is {target}; it must be above 0.")
    lengths = _lengths(completions, unit)
    return [max(0.0, 1 - abs(n - target) / target) for n in lengths]


def length_at_most(
    prompts: Sequence[str],
    completions: Sequence[str | None],
    *,
    maximum: float,
    margin: float = 0.0,
    unit: str = "words",
    **columns: Sequence[Any],
) -> list[float]:
    """Scores 1 up to the maximum length, then falls to 0 over the margin.

    Args:
        prompts: not read.
        completions: to be measured.
        maximum: longest that is not too long.
        margin: how much longer a completion is that scores 0; 0 is a step.
        unit: "words" or "characters".
        **columns: not read.
    """
    del prompts, columns
    if margin < 0:
        raise ValueError(f"margin is {margin}; it must be at least 0.")
    over = [n - maximum for n in _lengths(completions, unit)]
    if not margin:
        return [float(excess <= 0) for excess in over]
    return [min(1.0, max(0.0, 1 - excess / margin)) for excess in over]


def valid_json(
    prompts: Sequence[str],
    completions: Sequence[str | None],
    *,
    schema: Any = None,
    json_schema: Any = None,
    parsed_score: float = 0.0,
    **columns: Sequence[Any],
) -> list[float]:
    """Scores 1 where a completion is JSON of a schema, else 0.

    A completion is one JSON value, or has it in a block fenced by ```; NaN and
    infinities are not JSON. Schemas are those of json-schema.org, of the draft that
    their "$schema" names, the newest by default; `format` is not checked, and
    references to other documents are refused.

    Args:
        prompts: not read.
        completions: to be parsed.
        schema: the option: one schema for all, as an object or its text.
        json_schema: the column: one for each completion, where there is no option;
            without either any JSON is right.
        parsed_score: what JSON gets that breaks its schema.
        **columns: not read.

    Raises:
        ValueError: a schema is none, or refers to another document.
    """
    del prompts, columns
    if schema is None and json_schema is not None:
        schemas = needed_column("valid_json", "json_schema", json_schema, completions)
    else:
        schemas = [True if schema is None else schema] * len(completions)
    scores = []
    for completion, wanted in zip(completions, schemas, strict=True):
        text = wanted if isinstance(wanted, str) else json.dumps(wanted)
        validator = _validator(text)
        try:
            value = _parsed(completion or "")
        except (ValueError, RecursionError):
            scores.append(0.0)
            continue
        try:
            is_valid = validator.is_valid(value)
        except (
            RecursionError,
            OverflowError,
        ):  # Too deep, or too large, to be checked.
            is_valid = False
        scores.append(1.0 if is_valid else parsed_score)
    return scores


@functools.lru_cache(maxsize=64)
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is none: {error}.") from error


def _lengths(completions: Sequence[str | None], unit: str) -> list[int]:
    if unit not in _UNITS:
        raise ValueError(f"unit is {unit!r}; it must be one of {', '.join(_UNITS)}.")
    return [_UNITS[unit](text or "") for text in completions]


def _parsed(text: str) -> Any:
    """The JSON value of a completion.

    Raises:
        ValueError: it is none.
    """
    fenced = _FENCED.findall(text)

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is not JSON.")

    def number(digits: str) -> float:
        value = float(digits)
        return value if math.isfinite(value) else refuse(digits)

    source = fenced[-1] if fenced else text
    return json.loads(source, parse_constant=refuse, parse_float=number)


@functools.lru_cache(maxsize=256)
def _validator(text: str) -> Any:
    """What checks values against a schema."""
    try:
        schema = json.loads(text)
        kind = jsonschema.validators.validator_for(schema)
        kind.check_schema(schema)
    except (ValueError, jsonschema.SchemaError, RecursionError) as error:
        found = getattr(error, "message", error)
        raise ValueError(f"The JSON schema {text:.80} is none: {found}") from error
    for reference in _references(schema):
        if not reference.startswith("#"):
            raise ValueError(
                f"The JSON schema {text:.80} refers to {reference!r}, another document."
                " Put what it means under $defs, and refer to that."
            )
    return kind(schema)


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for name, child in node.items():
            if name in ("$ref", "$dynamicRef") and isinstance(child, str):
                yield child
            else:
                yield from _references(child)
    elif isinstance(node, list):
        for child in node:
            yield from _references(child)
