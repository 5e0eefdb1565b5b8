"""Heads: what is read off the hidden states."""

import jax.numpy as jnp

from realjax.core.arrays import Array, Float, PyTree
from realjax.models.axes import Constrain, unconstrained
from realjax.models.config import ModelConfig


def language_kernel(parameters: PyTree, config: ModelConfig) -> Float[Array, "D V"]:
    """Return the matrix that scores the vocabulary; the embedding's own if tied.

    Its columns past `config.vocab_size` are padding.

    Raises:
        ValueError: if the model has a scalar head.
    """
    if config.head != "language":
        raise ValueError(
            "This model has a scalar head and cannot score the vocabulary. Load it"
            " with head='language' if its checkpoint holds a language head."
        )
    if config.tie_embeddings:
        return parameters["embedding"].T
    return parameters["head"]["kernel"]


def logits(
    parameters: PyTree,
    config: ModelConfig,
    hidden: Float[Array, "*B D"],
    constrain: Constrain = unconstrained,
) -> Float[Array, "*B V"]:
    """Score every token of the vocabulary: float32 sums of products in hidden's dtype.

    Holds a float32 [..., V] array; for the log-probabilities of given tokens there is
    `realjax.rl.logprobs`.

    Args:
        parameters: of the model.
        config: of the model.
        hidden: states after the final norm.
        constrain: gives the logits the sharding of their logical axes.
    """
    if config.tie_embeddings and config.head == "language":
        # Contracted as it lies: a transposed copy would cost more than the product.
        kernel, contracted = parameters["embedding"], 1
    else:
        kernel, contracted = language_kernel(parameters, config), 0
    scores = jnp.tensordot(
        hidden,
        kernel.astype(hidden.dtype),
        axes=((-1,), (contracted,)),
        preferred_element_type=jnp.float32,
    )
    # First cut as the head is: the logits are gathered, and not the head.
    batch = ("batch", *(None for _ in scores.shape[1:-1]))
    scores = constrain(scores, (*batch, "vocab"))
    scores = constrain(scores, (*batch, None))[..., : config.vocab_size]
    if config.logit_soft_cap is None:
        return scores
    return config.logit_soft_cap * jnp.tanh(scores / config.logit_soft_cap)


def scalars(parameters: PyTree, hidden: Float[Array, "*B D"]) -> Float[Array, "*B"]:
    """Return one number per token, in float32: the reward or value head.

    Raises:
        ValueError: if the model has a language head.
    """
    if "score" not in parameters:
        raise ValueError(
            "This model has no scalar head. Load it with head='scalar', or make its"
            " config with head='scalar'."
        )
    # One column: float32 costs nothing, and its gradient is not rounded.
    return jnp.tensordot(
        hidden.astype(jnp.float32),
        parameters["score"]["kernel"][:, 0].astype(jnp.float32),
        axes=((-1,), (0,)),
    )
