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
from realjax.functions.function import LANGUAGE_OUTPUTS, Output
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
        if key not in ("kept", "top_ids")  # Wide, and needed in packed form only.
    }


def forward(
    parameters: PyTree,
    program: ModelProgram,
    batch: Mapping[str, Array],
    packing: Mapping[str, Array],
    *,
    output: Output,
    temperature: float = 1.0,
    num_top: int = 0,
    noise_key: Array | None = None,
) -> dict[str, Any]:
    """Runs the model on a microbatch.

    Args:
        parameters: of the model.
        program: what to compile.
        batch: holds tokens [B, T] and, where the sampler filtered, kept [B, T, C]; of
            "top_logprobs", perhaps the tokens to score as top_ids [B, T, K].
        packing: index arrays, see `data.packing`.
        output: which head to read.
        temperature: divides the logits.
        num_top: K, tokens of "top_logprobs" where the batch does not say which.
        noise_key: of the jitter of routers and the dropout of adapters, in training;
            None is none.

    Returns:
        "logprobs" and "entropy" [M, T]; or "top_logprobs" and "top_ids" [M, T, K], and
        where the batch has the latter, the first two in their place; or "values"
        [M, T] and "bootstrap_values" [M]; or "scores" [M]; zeros where a slot or a
        position is empty. For a mixture of experts also "router", its `RouterSums`.
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
        flat = x_RS.reshape(-1, *x_RS.shape[2:])
        return flat.at[places_MT].get(mode="fill", fill_value=0)

    if output in LANGUAGE_OUTPUTS:
        head = {
            "temperature": temperature,
            "soft_cap": config.logit_soft_cap,
            "vocab_size": config.vocab_size,
        }
        kernel = heads.language_kernel(parameters, config)
        with jax.named_scope(output):
            if num_top:
                found = logprobs_lib.top_logprobs(
                    hidden_RSD,
                    kernel,
                    segment_ids_RS,
                    num_top=num_top,
                    linear_top=program.partition.linear_top,
                    **head,
                )
                found = dict(zip(("top_logprobs", "top_ids"), found, strict=True))
            else:
                targets = _targets(tokens_RS, batch.get("top_ids"), source)
                logprobs, entropy_RS = logprobs_lib.token_logprobs(
                    hidden_RSD,
                    kernel,
                    targets,
                    segment_ids_RS,
                    kept=_kept_rows(batch.get("kept"), source),
                    linear_logprob=program.partition.linear_logprob,
                    **head,
                )
                if targets.ndim == 3:
                    # A teacher's vocabulary may be padded further than this one.
                    is_beyond = targets >= config.vocab_size
                    is_scored = positions_RS[..., None] > 0
                    logprobs = jnp.where(is_beyond & is_scored, -jnp.inf, logprobs)
                found = _by_name(logprobs) | {"entropy": entropy_RS}
        return {name: unpack(value) for name, value in found.items()} | router

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


def _targets(
    tokens_RS: Array, top_ids_BTK: Array | None, source: tuple[Array, Array]
) -> Array:
    """What is scored at every place: its token, and what else the batch asks for."""
    if top_ids_BTK is None:
        return tokens_RS
    ids_RSK = top_ids_BTK.at[source].get(mode="fill", fill_value=0)
    return jnp.concatenate([tokens_RS[..., None], ids_RSK], axis=2)


def _by_name(logprobs: Array) -> dict[str, Array]:
    """Take the token's log-probability and those of others apart."""
    if logprobs.ndim == 2:
        return {"logprobs": logprobs}
    return {"logprobs": logprobs[..., 0], "top_logprobs": logprobs[..., 1:]}


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
