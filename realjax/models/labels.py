"""Labels of a sequence classifier: which of its outputs is the score.

transformers' `LlamaForSequenceClassification` and its like have a matrix `score.weight`
[labels, D], without a bias, and read a text's output at its last token. A reward model
has one label. Of a classifier with several (helpful, harmless, …) a role takes one: its
row of the matrix is the scalar head, its logit the score.
"""

from collections.abc import Mapping
from typing import Any

from realjax.core.config import suggest


def label_names(fields: Mapping[str, Any]) -> list[str]:
    """Return the names of a classifier's labels, in the order of its outputs.

    Args:
        fields: of a parsed config.json. Without names they are those transformers
            gives, LABEL_0 and so on; without a number there are two.
    """
    names = fields.get("id2label")
    if names:
        return [str(names[key]) for key in sorted(names, key=int)]
    return [f"LABEL_{number}" for number in range(fields.get("num_labels") or 2)]


def label_index(fields: Mapping[str, Any], label: str) -> int:
    """Return the place of a label among a classifier's outputs.

    Args:
        fields: of a parsed config.json.
        label: its name, or its number as text.

    Raises:
        ValueError: there is no such label, or the model is no classifier.
    """
    names = label_names(fields)
    architecture = next(iter(fields.get("architectures") or ()), "a language model")
    if "Classification" not in architecture:
        raise ValueError(
            f"The label {label!r} was asked for, and the model is {architecture}, which"
            " has none. Leave `label` out, or give a sequence classifier."
        )
    if label in names:
        return names.index(label)
    if label.isdecimal() and int(label) < len(names):
        return int(label)
    raise ValueError(
        f"The classifier has no label {label!r}: it has {', '.join(names)}."
        f" {suggest(label, names)}"
    )


def with_one_label(fields: Mapping[str, Any], label: str) -> dict[str, Any]:
    """Return the fields of a classifier that has this label alone.

    Args:
        fields: of a parsed config.json.
        label: as for `label_index`.

    Raises:
        ValueError: as `label_index` does.
    """
    name = label_names(fields)[label_index(fields, label)]
    return {**fields, "id2label": {"0": name}, "label2id": {name: 0}, "num_labels": 1}


def label_part(fields: Mapping[str, Any], label: str) -> tuple[int, int, int] | None:
    """Return which part of the stored head is a label's; see `layout.Stored.part`.

    Args:
        fields: of a parsed config.json.
        label: as for `label_index`; "" is the only one.

    Returns:
        None where it is all of it.
    """
    count = len(label_names(fields))
    if not label or count == 1:
        return None
    return 0, label_index(fields, label), count
