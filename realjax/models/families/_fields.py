"""Reading a config.json: fields are taken out one by one, and what is left is refused.

So no field that would change what a model computes is ever passed over: it is read, or
its name is in the error.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from realjax.models.labels import label_names

# Fields that do not change what a forward pass computes. Dropout is among them: it is
# never applied here, in training neither.
HARMLESS_FIELDS = frozenset(
    (
        *("architectures", "transformers_version", "torch_dtype", "dtype"),
        *("use_cache", "initializer_range", "pretraining_tp", "tokenizer_class"),
        *("id2label", "label2id", "num_labels", "problem_type", "return_dict"),
        *("unk_token_id", "sep_token_id", "max_length", "min_length", "do_sample"),
        *("temperature", "top_k", "top_p", "max_sequence_length", "model_max_length"),
        *("attention_dropout", "hidden_dropout", "cache_implementation"),
    )
)

# Names of activations in configs, and ours.
ACTIVATION_NAMES = {
    **{"silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu"},
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}

_REQUIRED = object()


class Fields:
    """The fields of a config.json that nobody has taken yet.

    Args:
        fields: of the parsed file.
        label: the family's name in errors.
        model_type: what the field of this name has to be.
    """

    def __init__(self, fields: Mapping[str, Any], label: str, model_type: str):
        """Copies the mapping."""
        self._left, self.label = dict(fields), label
        self.only("model_type", model_type)

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        """Take a field out.

        Without a default it must be there and not null; with one, null stays None.

        Raises:
            ValueError: if it is missing and has no default.
        """
        if default is not _REQUIRED:
            return self._left.pop(name, default)
        if self._left.get(name) is None:
            raise ValueError(
                f"The field {name!r} is missing; a {self.label} model needs it."
            )
        return self._left.pop(name)

    def count(self, name: str, *default: int) -> int:
        """Take a field out that counts something; null is the default, if any.

        Raises:
            ValueError: if it is missing and has no default, or is not a whole number
                from 1.
        """
        if default and self._left.get(name) is None:
            self._left.pop(name, None)
            return default[0]
        found = self.take(name)
        if type(found) is not int or found < 1:
            raise ValueError(
                f"The field {name!r} is {found!r}; it must be a whole number from 1."
            )
        return found

    def only(self, name: str, *supported: Any) -> None:
        """Take a field out, refusing any value but those supported (or none).

        Raises:
            ValueError: if it has another value.
        """
        found = self._left.pop(name, None)
        if found is None or found in supported:
            return
        needed = " or ".join(map(repr, supported)) or "null"
        raise ValueError(
            f"The field {name!r} is {found!r}; for {self.label} models only {needed} is"
            " supported."
        )

    def activation(self, name: str, default: str) -> str:
        """Take the name of an activation out and return ours.

        Raises:
            ValueError: if there is no such activation here.
        """
        found = self._left.pop(name, None) or default
        if found not in ACTIVATION_NAMES:
            raise ValueError(
                f"The field {name!r} is {found!r}; supported activations are:"
                f" {', '.join(ACTIVATION_NAMES)}."
            )
        return ACTIVATION_NAMES[found]

    def head(self, language: str, scalar: str) -> str:
        """Take 'architectures' out and return which head the model has.

        Args:
            language: transformers' class with a language head.
            scalar: its class for sequence classification.

        Raises:
            ValueError: for another class, and for more labels than one.
        """
        architectures = self._left.pop("architectures", None) or [language]
        if architectures == [language]:
            return "language"
        if architectures != [scalar]:
            raise ValueError(
                f"The field 'architectures' is {architectures!r}; supported are"
                f" [{language!r}] and [{scalar!r}]."
            )
        names = label_names(self._left)
        if len(names) != 1:
            raise ValueError(
                f"The config has {len(names)} labels ({', '.join(names)}); a reward"
                " model or critic has one. Say which is the score: `label`."
            )
        return "scalar"

    def ids(self) -> dict[str, Any]:
        """Take the special ids out; they are fields of `ModelConfig`.

        Raises:
            ValueError: if one is not an id.
        """
        return {
            "bos_id": self._id("bos_token_id"),
            "eos_ids": read_ids("eos_token_id", self._left.pop("eos_token_id", None)),
            "pad_id": self._id("pad_token_id"),
        }

    def layer_types(self, num_layers: int) -> tuple[bool, ...] | None:
        """Take 'layer_types' out and return which layers have a window, if it says.

        Raises:
            ValueError: for another kind of layer, or another number of them.
        """
        types = self._left.pop("layer_types", None)
        if types is None:
            return None
        known = {"sliding_attention": True, "full_attention": False}
        if unknown := [kind for kind in types if kind not in known]:
            raise ValueError(
                f"The field 'layer_types' has {unknown[0]!r}; supported are:"
                f" {', '.join(known)}."
            )
        if len(types) != num_layers:
            raise ValueError(
                f"The field 'layer_types' has {len(types)} entries for {num_layers}"
                " layers."
            )
        return tuple(known[kind] for kind in types)

    def _id(self, name: str) -> int | None:
        return next(iter(read_ids(name, self._left.pop(name, None))), None)

    def refuse_rest(self, harmless: Sequence[str] = ()) -> None:
        """Check that what is left does not matter.

        Args:
            harmless: fields of this family that change nothing.

        Raises:
            ValueError: naming the first field that might.
        """
        for name, value in self._left.items():
            is_harmless = name in HARMLESS_FIELDS or name in harmless
            if is_harmless or name.startswith("_") or not value:
                continue
            raise ValueError(
                f"The field {name!r} ({value!r}) is not supported for {self.label}"
                " models. If it does not change what the model computes, take it out"
                " of config.json."
            )


def written_ids(
    bos_id: int | None, eos_ids: Sequence[int], pad_id: int | None
) -> dict[str, Any]:
    """Return the fields of the special ids."""
    eos = None if not eos_ids else eos_ids[0] if len(eos_ids) == 1 else list(eos_ids)
    return {"bos_token_id": bos_id, "eos_token_id": eos, "pad_token_id": pad_id}


def written_head(head: str, language: str, scalar: str) -> dict[str, Any]:
    """Return the fields that say which head a model has."""
    if head == "language":
        return {"architectures": [language]}
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return {"architectures": [scalar], **labels}


def written_activation(name: str, *, tanh: str = "gelu_pytorch_tanh") -> str:
    """Return a config's name of one of our activations."""
    return tanh if name == "gelu_tanh" else name


def read_ids(name: str, value: Any) -> tuple[int, ...]:
    """Return the ids of a field that has one, several or none.

    Args:
        name: of the field.
        value: of the field.

    Raises:
        ValueError: if it holds anything else.
    """
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if wrong := [one for one in ids if type(one) is not int]:
        raise ValueError(f"The field {name!r} has {wrong[0]!r}; ids are whole numbers.")
    return tuple(ids)
