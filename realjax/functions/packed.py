"""One forward pass over packed rows, and its results back as one row a sequence.

    batch [B, T] ──packing──▶ rows [R, S] ──model──▶ outputs [R, S] ──▶ outputs [M, T]

Rows are what the model is fast on; sequences are what losses are written for. All
shapes are fixed by (B, T, R, S, M), so one program serves every packing.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from realjax.core.arrays import Array, PyTree
from realjax.data.packing import Packing
from realjax.functions.function import Output
from realjax.models import heads, transformer
from realjax.models.config import ModelConfig
from realjax.models.partition import WHOLE, Partition
from realjax.rl import logprobs as logprobs_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelProgram:
    """What a compiled function has to know of a model.

    Attributes:
        config: sizes and head.
        dtype: of matrix products and activations, "float32" or "bfloat16".
        remat: what the backward pass recomputes, one of `transformer.REMATS`.
        partition: how the work is split over the devices of the call.
        options: of its allocation.
    """

    config: ModelConfig
    dtype: str = "float32"
    remat: str = "none"
    partition: Partition = WHOLE
    options: frozenset[str] = frozenset()


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
    noise_key: Array | None = None,
) -> dict[str, Any]:
    """Runs the model on a microbatch.

    Args:
        parameters: of the model.
        program: what to compile.
        batch: holds tokens [B, T] and, where the sampler filtered, kept [B, T, C].
        packing: index arrays, see `data.packing`.
        output: which head to read.
        temperature: divides the logits.
        noise_key: of the jitter of routers, in training; None is none.

    Returns:
        "logprobs" and "entropy" [M, T]; or "values" [M, T] and "bootstrap_values" [M];
        or "scores" [M]; zeros where a slot or a position is empty. For a mixture of
        experts also "router", its `RouterSums`.
    """
    config, constrain = program.config, program.partition.constrain
    rows = ("batch", "length")
    source = (packing["source_sequence"], packing["source_token"])
    tokens_RS = constrain(
        batch["tokens"].at[source].get(mode="fill", fill_value=0), rows
    )
    segment_ids_RS = constrain(packing["segment_ids"], rows)
    positions_RS = constrain(packing["source_token"], rows)
    hidden_RSD, sums = transformer.run(
        parameters,
        config,
        tokens_RS,
        positions_RS,
        segment_ids_RS,
        noise_keys=_noise_keys(noise_key, tokens_RS, positions_RS, segment_ids_RS),
        dtype=jnp.dtype(program.dtype),
        remat=program.remat,
        partition=program.partition,
    )
    router = {} if sums is None else {"router": sums}
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
                soft_cap=config.logit_soft_cap,
                vocab_size=config.vocab_size,
                linear_logprob=program.partition.linear_logprob,
            )
        return {
            "logprobs": unpack(logprobs_RS),
            "entropy": unpack(entropy_RS),
            **router,
        }

    with jax.named_scope(output):
        scalars_RS = heads.scalars(parameters, hidden_RSD)
        num_places = scalars_RS.size
        lengths_M = jnp.sum(places_MT < num_places, axis=1)
        last_M = jnp.take_along_axis(
            places_MT, jnp.maximum(lengths_M - 1, 0)[:, None], axis=1
        )[:, 0]
        at_last_M = scalars_RS.reshape(-1).at[last_M].get(mode="fill", fill_value=0)
        if output == "scores":
            return {"scores": at_last_M, **router}
        values_RS = logprobs_lib.token_values(scalars_RS, segment_ids_RS)
        values_MT = unpack(values_RS)
        return {"values": values_MT, "bootstrap_values": at_last_M, **router}


def _noise_keys(
    key: Array | None, tokens_RS: Array, positions_RS: Array, segment_ids_RS: Array
) -> Array | None:
    """Return the data of a random key for each token, [R, S, W].

    It depends on the tokens of the sequence so far and on nothing else, so that rows,
    microbatches and devices may be anything.
    """
    if key is None:
        return None
    mixed = tokens_RS.astype(jnp.uint32) * jnp.uint32(2654435761)
    mixed = (mixed ^ (mixed >> 15)) * (2 * positions_RS.astype(jnp.uint32) + 1)
    # Sums of unsigned integers wrap around; those of a sequence are a difference.
    total = jnp.cumsum(mixed, axis=1, dtype=jnp.uint32)
    places = jnp.arange(tokens_RS.shape[1])[None, :]
    first = jnp.where(segment_ids_RS == 0, places, places - positions_RS)
    before = jnp.take_along_axis(total - mixed, first, axis=1)

    def make(prefix: Array, position: Array) -> Array:
        folded = jax.random.fold_in(jax.random.fold_in(key, prefix), position)
        return jax.random.key_data(folded)

    return jax.vmap(jax.vmap(make))(total - before, positions_RS)


def _kept_rows(kept_BTC: Array | None, source: tuple[Array, Array]) -> Array | None:
    """Kept sets in packed form; an empty set, which keeps all, on padding."""
    if kept_BTC is None:
        return None
    empty = -1 if jnp.issubdtype(kept_BTC.dtype, jnp.signedinteger) else 0
    return kept_BTC.at[source].get(mode="fill", fill_value=empty)
