"""Dataclasses to `ml_collections.ConfigDict` and back.

Defaults stand once, in the dataclasses. A config file turns one into a `ConfigDict`,
so that every field can be overridden on the command line; the command turns it back,
and that is where unknown names and wrong types are refused:

    config.hp = config_dict(PPO(kl_coef=0.05))           # in configs/ppo.py
    --config.hp.kl_coef=0.1                              # on the command line
    hp = to_dataclass(PPO, config.hp, path="config.hp")  # in the command
"""

import collections.abc
import dataclasses
import difflib
import numbers
import pathlib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict, FieldReference

_SCALARS = (bool, int, float, str)


def config_dict(source: Any, **changes) -> ConfigDict:
    """All fields of a dataclass with `changes`, as a `ConfigDict`.

    Nested dataclasses become nested `ConfigDict`s; tuples stay tuples, with a plain
    dict for each dataclass inside. A field that may be None, or of several types,
    accepts those types when it is overridden.

    Args:
        source: an instance, or a class whose fields all have defaults.
        **changes: fields that differ.
    """
    if isinstance(source, type):
        source = source(**changes)
    elif changes:
        source = dataclasses.replace(source, **changes)
    return ConfigDict(_fields_as_data(source, typed=True))


def to_dataclass[T](cls: type[T], config: Any, *, path: str = "config") -> T:
    """The instance of `cls` that `config` describes.

    Fields that are missing keep their defaults, those of a nested dataclass as the
    outer one has them. A string stands for a dataclass that
    has a `parse` method, as in `allocation = "d2t4"`.

    Args:
        cls: a dataclass.
        config: a `ConfigDict`, a mapping, or an instance of `cls` (returned as it is).
        path: dotted name of `config`, for the errors.

    Raises:
        ValueError: an unknown field, or a value that the dataclass itself refuses.
        TypeError: a value of the wrong type.
    """
    if isinstance(config, cls):
        return config
    if isinstance(config, str) and hasattr(cls, "parse"):
        return _call(cls.parse, path, config)  # pyright: ignore[reportAttributeAccessIssue]
    if not isinstance(config, Mapping | ConfigDict):
        raise TypeError(f"{path} is {config!r}; it needs the fields of {cls.__name__}.")
    annotations = typing.get_type_hints(cls)
    defaults = {f.name: _default(f) for f in dataclasses.fields(cls) if f.init}  # pyright: ignore[reportArgumentType]
    values = {}
    for name, value in config.items():
        if name not in defaults:
            raise ValueError(
                f"{path}.{name}: {cls.__name__} has no field {name!r}. "
                + suggest(name, defaults)
            )
        if isinstance(value, Mapping | ConfigDict):
            value = _completed(value, defaults[name])
        values[name] = _convert(value, annotations[name], f"{path}.{name}")
    return _call(cls, path, **values)


def suggest(name: str, known: Iterable[str]) -> str:
    """A sentence that helps after a misspelt name: the nearest one, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"Did you mean {close[0]!r}?"
    return f"Known: {', '.join(known)}." if known else "There are none."


def check_choice(name: str, value: str, known: Iterable[str]) -> None:
    """Refuses a string that is not one of `known`; for `__post_init__`.

    Raises:
        ValueError: naming the field, the value and the nearest choice.
    """
    known = list(known)
    if value not in known:
        raise ValueError(
            f"{name}={value!r} is not one of {', '.join(map(repr, known))}. "
            + suggest(value, known)
        )


def check_least(config: Any, least: float, *names: str) -> None:
    """Refuses fields below a number; for `__post_init__`.

    Raises:
        ValueError: naming the field, its value and the least one.
    """
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(
                f"{name} is {getattr(config, name)}; it must be at least {least}."
            )


def _call(make, path: str, /, *args, **kwargs):
    """`make(…)`, with the path before the text of an error."""
    try:
        return make(*args, **kwargs)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{path}: {error}") from error


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _completed(value: Any, default: Any) -> dict[str, Any]:
    """The items of `value`, and the fields of the dataclass `default` it lacks."""
    items = dict(value.items())
    if not dataclasses.is_dataclass(default) or isinstance(default, type):
        return items
    fields = [field.name for field in dataclasses.fields(default) if field.init]
    for name in fields:
        nested = getattr(default, name)
        if name not in items:
            items[name] = nested
        elif isinstance(items[name], Mapping | ConfigDict):
            items[name] = _completed(items[name], nested)
    return items


def _fields_as_data(instance: Any, *, typed: bool) -> dict[str, Any]:
    annotations = typing.get_type_hints(type(instance))
    data = {}
    for field in dataclasses.fields(instance):
        value = _as_data(getattr(instance, field.name), typed=typed)
        data[field.name] = (
            _typed(value, annotations[field.name]) if typed and field.init else value
        )
    return data


def _as_data(value: Any, *, typed: bool = False) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _fields_as_data(value, typed=typed)
    if isinstance(value, list | tuple):
        return type(value)(_as_data(item) for item in value)
    if isinstance(value, Mapping):
        return {key: _as_data(item, typed=typed) for key, item in value.items()}
    return value


def _typed(value: Any, annotation: Any) -> Any:
    """A reference with the type that overrides must have, where `value` hides it.

    None and unions do: the type of `float | None = None` is float to a flag; that of
    `str | float` is `object`, which a flag reads as a Python literal.
    """
    arms = _arms(annotation)
    if value is not None and len(arms) == 1:
        return float(value) if arms[0] is float else value
    if isinstance(value, dict):
        return value
    single = [arm for arm in arms if arm is not types.NoneType]
    wanted = typing.get_origin(single[0]) or single[0] if len(single) == 1 else object
    return FieldReference(
        value, field_type=wanted if wanted in (*_SCALARS, tuple) else object
    )


def _arms(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type there is."""
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _convert(value: Any, annotation: Any, path: str) -> Any:
    """`value` as the type that `annotation` asks for, or an error naming `path`."""
    arms = _arms(annotation)
    if len(arms) == 1:
        return _convert_one(value, arms[0], path)
    if value is None and types.NoneType in arms:
        return None
    arms = [arm for arm in arms if arm is not types.NoneType]
    # An int is also a float: the exact type has precedence.
    arms.sort(key=lambda arm: type(value) is not arm)
    for arm in arms:
        try:
            return _convert_one(value, arm, path)
        except TypeError:
            continue
    raise _wrong_type(value, annotation, path)


def _convert_one(value: Any, wanted: Any, path: str) -> Any:
    origin, parts = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted is Any or wanted is object or isinstance(wanted, typing.TypeVar):
        return value.to_dict() if isinstance(value, ConfigDict) else value
    if origin is typing.Literal:
        return _convert_literal(value, parts, path)
    if dataclasses.is_dataclass(wanted):
        return to_dataclass(typing.cast(type, wanted), value, path=path)
    if wanted in _SCALARS:
        return _convert_scalar(value, wanted, path)
    container = origin or wanted
    if container is tuple or container is list:
        return _convert_items(value, wanted, path)
    if container in (dict, Mapping, collections.abc.MutableMapping):
        return _convert_mapping(value, wanted, path)
    if container is collections.abc.Callable:
        is_right = callable(value)
    elif wanted is pathlib.Path:
        value = pathlib.Path(value) if isinstance(value, str) else value
        is_right = isinstance(value, pathlib.Path)
    else:
        is_right = not isinstance(container, type) or isinstance(value, container)
    if not is_right:
        raise _wrong_type(value, wanted, path)
    return value


def _convert_literal(value: Any, choices: tuple, path: str) -> Any:
    if value not in choices:
        raise ValueError(
            f"{path}={value!r} is not one of {', '.join(map(repr, choices))}. "
            + suggest(str(value), map(str, choices))
        )
    return value


def _convert_scalar(value: Any, wanted: type, path: str) -> Any:
    is_bool = isinstance(value, bool)
    if wanted is float and isinstance(value, numbers.Real) and not is_bool:
        return float(value)
    if wanted is int and isinstance(value, numbers.Integral) and not is_bool:
        return int(value)
    if not isinstance(value, wanted) or (is_bool and wanted is not bool):
        raise _wrong_type(value, wanted, path)
    return value


def _convert_items(value: Any, wanted: Any, path: str) -> Any:
    container, parts = typing.get_origin(wanted) or wanted, typing.get_args(wanted)
    if not isinstance(value, list | tuple):
        raise _wrong_type(value, wanted, path)
    if not parts:
        return container(value)
    if container is tuple and parts[-1] is not Ellipsis:
        if len(parts) != len(value):
            raise TypeError(
                f"{path} is {value!r} with {len(value)} items; it needs {len(parts)}."
            )
    else:
        parts = (parts[0],) * len(value)
    return container(
        _convert(item, part, f"{path}[{i}]")
        for i, (item, part) in enumerate(zip(value, parts, strict=True))
    )


def _convert_mapping(value: Any, wanted: Any, path: str) -> dict:
    if not isinstance(value, Mapping | ConfigDict):
        raise _wrong_type(value, wanted, path)
    part = (typing.get_args(wanted) or (Any, Any))[1]
    return {key: _convert(item, part, f"{path}.{key}") for key, item in value.items()}


def _wrong_type(value: Any, wanted: Any, path: str) -> TypeError:
    name = wanted.__name__ if wanted in _SCALARS else str(wanted)
    return TypeError(
        f"{path} is {value!r}, of type {type(value).__name__}; it needs {name}."
    )
