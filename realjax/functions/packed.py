"""One forward pass over packed rows, and its results back as one row a sequence.

    batch [B, T] ──packing──▶ rows [R, S] ──model──▶ outputs [R, S] ──▶ outputs [M, T]

Rows are what the model is fast on; sequences are what losses are written for. All
shapes are fixed by (B, T, R, S, M), so one program serves every packing.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from realjax.core.arrays import Array, PyTree
from realjax.data.packing import Packing
from realjax.functions.function import Output
from realjax.models import heads, transformer
from realjax.models.config import ModelConfig
from realjax.rl import logprobs as logprobs_lib

Constrain = Callable[[Array, tuple[str | None, ...]], Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelProgram:
    """What a compiled function has to know of a model.

    Attributes:
        config: sizes and head.
        dtype: of matrix products and activations, "float32" or "bfloat16".
        remat: what the backward pass recomputes: "none", "block" or "dots".
        constrain: pins the sharding of an activation by its axes' names.
    """

    config: ModelConfig
    dtype: str = "float32"
    remat: str = "none"
    constrain: Constrain = lambda x, axes: x


def packing_arrays(packing: Packing) -> dict[str, np.ndarray]:
    """The index arrays of a packing, as a compiled function takes them."""
    return {
        field.name: getattr(packing, field.name)
        for field in dataclasses.fields(packing)
    }


def select_sequences(
    batch: Mapping[str, Array], packing: Mapping[str, Array]
) -> dict[str, Array]:
    """The microbatch's sequences, [M, …]; empty slots hold zeros and False."""
    rows = packing["sequences"]
    return {
        key: value.at[rows].get(mode="fill", fill_value=0)
        for key, value in batch.items()
        if key != "kept"  # Wide, and needed in packed form only.
    }


def forward(
    parameters: PyTree,
    program: ModelProgram,
    batch: Mapping[str, Array],
    packing: Mapping[str, Array],
    *,
    output: Output,
    temperature: float = 1.0,
) -> dict[str, Array]:
    """Runs the model on a microbatch.

    Args:
        parameters: of the model.
        program: what to compile.
        batch: holds tokens [B, T] and, where the sampler filtered, kept [B, T, C].
        packing: index arrays, see `data.packing`.
        output: which head to read.
        temperature: divides the logits.

    Returns:
        "logprobs" and "entropy" [M, T]; or "values" [M, T] and "bootstrap_values" [M];
        or "scores" [M]; zeros where a slot or a position is empty.
    """
    config, constrain = program.config, program.constrain
    rows = ("batch", "length")
    source = (packing["source_sequence"], packing["source_token"])
    tokens_RS = constrain(
        batch["tokens"].at[source].get(mode="fill", fill_value=0), rows
    )
    segment_ids_RS = constrain(packing["segment_ids"], rows)
    hidden_RSD = transformer.hidden_states(
        parameters,
        config,
        tokens_RS,
        constrain(packing["source_token"], rows),
        segment_ids_RS,
        dtype=jnp.dtype(program.dtype),
        remat=program.remat,
        constrain=constrain,
    )
    places_MT = packing["places"]

    def unpack(x_RS: Array) -> Array:
        return x_RS.reshape(-1).at[places_MT].get(mode="fill", fill_value=0)

    if output == "logprobs":
        with jax.named_scope("logprobs"):
            logprobs_RS, entropy_RS = logprobs_lib.token_logprobs(
                hidden_RSD,
                heads.language_kernel(parameters, config),
                tokens_RS,
                segment_ids_RS,
                temperature=temperature,
                kept=_kept_rows(batch.get("kept"), source),
                constrain_kernel=lambda kernel: constrain(kernel, (None, "vocab")),
            )
        return {"logprobs": unpack(logprobs_RS), "entropy": unpack(entropy_RS)}

    with jax.named_scope(output):
        scalars_RS = heads.scalars(parameters, hidden_RSD)
        num_places = scalars_RS.size
        lengths_M = jnp.sum(places_MT < num_places, axis=1)
        last_M = jnp.take_along_axis(
            places_MT, jnp.maximum(lengths_M - 1, 0)[:, None], axis=1
        )[:, 0]
        at_last_M = scalars_RS.reshape(-1).at[last_M].get(mode="fill", fill_value=0)
        if output == "scores":
            return {"scores": at_last_M}
        values_RS = logprobs_lib.token_values(scalars_RS, segment_ids_RS)
        return {"values": unpack(values_RS), "bootstrap_values": at_last_M}


def _kept_rows(kept_BTC: Array | None, source: tuple[Array, Array]) -> Array | None:
    """Kept sets in packed form; an empty set, which keeps all, on padding."""
    if kept_BTC is None:
        return None
    empty = -1 if jnp.issubdtype(kept_BTC.dtype, jnp.signedinteger) else 0
    return kept_BTC.at[source].get(mode="fill", fill_value=empty)
