"""Rotary fields of a config.json, in each of their spellings.

transformers 4 has `rope_theta` and `rope_scaling` (whose kind is "type" in the oldest
files), transformers 5 has both in `rope_parameters`. Both are written, for readers of
either.
"""

import math
from collections.abc import Mapping
from typing import Any

from realjax.models.config import RopeScaling
from realjax.models.families._fields import Fields

_ORIGINAL = "original_max_position_embeddings"
# Of each kind: their field and ours. A kind needs all but those of _OPTIONAL.
_KINDS = {
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_frequency_factor",
        "high_freq_factor": "high_frequency_factor",
        _ORIGINAL: "original_max_positions",
    },
    "yarn": {
        "factor": "factor",
        _ORIGINAL: "original_max_positions",
        "beta_slow": "slow_turns",
        "beta_fast": "fast_turns",
        "truncate": "is_truncated",
        "attention_factor": "attention_factor",
    },
    "longrope": {
        "factor": "factor",
        _ORIGINAL: "original_max_positions",
        "short_factor": "short_factors",
        "long_factor": "long_factors",
        "attention_factor": "attention_factor",
    },
}
_OPTIONAL = ("beta_slow", "beta_fast", "truncate", "attention_factor")


def read_rope(
    fields: Fields,
    max_positions: int,
    default_theta: float = 10000.0,
    *,
    new: Mapping[str, Any] | None = None,
) -> tuple[float, RopeScaling | None]:
    """Take the rotary fields out: theta and scaling.

    Args:
        fields: of the config.
        max_positions: its 'max_position_embeddings'.
        default_theta: of the family.
        new: the newer spelling, where it is not simply 'rope_parameters'.

    Raises:
        ValueError: if the spellings contradict each other, for a kind of scaling that
            is not known, and for a field it lacks or does not know.
    """
    old = one_spelling(fields.take("rope_scaling", None))
    theta = fields.take("rope_theta", None)
    if theta is not None:
        old["rope_theta"] = theta
    new = new or fields.take("rope_parameters", None)
    rope = merged(old, one_spelling(new))
    fields.only("partial_rotary_factor", 1, 1.0)
    original = fields.take(_ORIGINAL, None)  # Beside the rotary fields in some files.
    if original is not None:
        rope = merged({_ORIGINAL: original}, rope)
    theta = float(rope.pop("rope_theta", default_theta))
    return theta, read_scaling(rope, max_positions)


def one_spelling(rope: Any) -> dict[str, Any]:
    """Drop what is null, and give the kind its newer name.

    Raises:
        ValueError: if it is not an object of fields.
    """
    if not isinstance(rope, Mapping | None):
        raise ValueError(
            f"The rotary fields are {rope!r}; they must be an object such as"
            ' {"rope_type": "linear", "factor": 2.0}, or null.'
        )
    result = {name: x for name, x in (rope or {}).items() if x is not None}
    oldest = result.pop("type", None)
    if oldest is not None:
        result.setdefault("rope_type", oldest)
    return result


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Join two spellings.

    Raises:
        ValueError: if they contradict each other.
    """
    for name in old.keys() & new.keys():
        if old[name] != new[name]:
            raise ValueError(
                f"The rotary field {name!r} is {old[name]!r} in one spelling and"
                f" {new[name]!r} in 'rope_parameters'. Remove the wrong one."
            )
    return {**old, **new}


def read_scaling(rope: Mapping[str, Any], max_positions: int) -> RopeScaling | None:
    """Read the fields of a scaling, theta left out.

    Raises:
        ValueError: for a kind that is not known, or a field it lacks or does not know.
    """
    rope = dict(rope)
    kind = rope.pop("rope_type", "default")
    if rope.get("partial_rotary_factor") == 1:  # All of each head, as always here.
        del rope["partial_rotary_factor"]
    if kind == "default":
        if further := sorted(rope.keys() - {_ORIGINAL}):
            raise ValueError(
                f"The rotary field {further[0]!r} has no meaning without scaling."
                " Give the 'rope_type' it belongs to, or remove the field."
            )
        return None
    if kind not in _KINDS:
        names = ", ".join(("default", *_KINDS))
        raise ValueError(
            f"Rotary scaling of type {kind!r} (field 'rope_type') is not supported."
            f" Known types are: {names}."
        )
    known = _KINDS[kind]
    if kind in ("yarn", "longrope") and "factor" not in rope and _ORIGINAL in rope:
        rope["factor"] = max_positions / rope[_ORIGINAL]
    if kind == "yarn":
        _read_mscale(rope)
    if _ORIGINAL in known:
        rope.setdefault(_ORIGINAL, max_positions)
    if unknown := sorted(rope.keys() - known.keys()):
        raise ValueError(
            f"Rotary scaling of type {kind!r} has the field {unknown[0]!r}, which is"
            " not supported."
        )
    if missing := [name for name in known if name not in (*rope, *_OPTIONAL)]:
        raise ValueError(f"Rotary scaling of type {kind!r} lacks {missing[0]!r}.")
    if "attention_factor" in known:
        rope.setdefault("attention_factor", _attention_factor(kind, rope))
    ours: dict[str, Any] = {
        known[name]: tuple(value) if isinstance(value, list) else value
        for name, value in rope.items()
    }
    if kind == "dynamic":
        ours["original_max_positions"] = max_positions
    return RopeScaling(kind=kind, **ours)


def write_rope(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """Return the rotary fields, in the old and the new spelling."""
    rope = written_scaling(scaling)
    return {
        "rope_theta": theta,
        "rope_scaling": rope if scaling else None,
        "rope_parameters": rope | {"rope_theta": theta},
    }


def written_scaling(scaling: RopeScaling | None) -> dict[str, Any]:
    """Return the fields of a scaling, theta left out."""
    if scaling is None:
        return {"rope_type": "default"}
    values = {theirs: getattr(scaling, ours) for theirs, ours in fields_of(scaling)}
    return {"rope_type": scaling.kind} | {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
    }


def fields_of(scaling: RopeScaling) -> tuple[tuple[str, str], ...]:
    """Return the fields that a scaling of this kind has, theirs and ours."""
    return tuple(_KINDS[scaling.kind].items())


def _read_mscale(rope: dict[str, Any]) -> None:
    """Make the attention factor of DeepSeek's two fields."""
    mscale, over_all = rope.pop("mscale", None), rope.pop("mscale_all_dim", None)
    if mscale and over_all and "factor" in rope:
        log = 0.1 * math.log(max(rope["factor"], 1.0))
        rope.setdefault("attention_factor", (mscale * log + 1) / (over_all * log + 1))


def _attention_factor(kind: str, rope: Mapping[str, Any]) -> float:
    """Return the factor the papers recommend.

    Sources: Peng et al. 2023, https://arxiv.org/abs/2309.00071, eq. 22; Ding et al.
    2024, https://arxiv.org/abs/2402.13753, section 3.
    """
    log = math.log(max(rope["factor"], 1.0))
    if kind == "yarn":
        return 0.1 * log + 1.0
    return math.sqrt(1 + log / math.log(rope[_ORIGINAL]))
