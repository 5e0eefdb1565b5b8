"""The optimizer of a trained role: AdamW over float32 masters, as an optax chain."""

import dataclasses
from typing import Any

import jax
import optax

from realjax.core.arrays import Array, PyTree
from realjax.core.config import check_choice

SCHEDULES = ("constant", "linear", "cosine")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with warm-up, a learning-rate schedule and global-norm clipping.

    Attributes:
        learning_rate: reached at the end of the warm-up.
        schedule: "constant", "linear" or "cosine" decay after it.
        warmup_fraction: share of all optimizer steps that warm up.
        final_fraction: share of the learning rate that the decay has come down to
            when the run has ended. The last update is one step of the decay above it.
        beta1, beta2, epsilon: of Adam.
        weight_decay: decoupled; norms and biases have none.
        clip_norm: largest global norm of a gradient; 0 turns clipping off.
        offload: moments stay in pinned host memory, and an update brings them to the
            devices layer by layer: 8 bytes a parameter for the time that takes.
    """

    learning_rate: float = 1e-5
    schedule: str = "cosine"
    warmup_fraction: float = 0.02
    final_fraction: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-5
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    offload: bool = False

    def __post_init__(self):
        """Refuses what no optimizer could do."""
        check_choice("schedule", self.schedule, SCHEDULES)
        for name, is_possible, needed in (
            ("learning_rate", self.learning_rate >= 0, "not be negative"),
            ("warmup_fraction", 0 <= self.warmup_fraction <= 1, "be from 0 to 1"),
            ("final_fraction", 0 <= self.final_fraction <= 1, "be from 0 to 1"),
            ("beta1", 0 <= self.beta1 < 1, "be at least 0 and below 1"),
            ("beta2", 0 <= self.beta2 < 1, "be at least 0 and below 1"),
            ("epsilon", self.epsilon > 0, "be positive"),
            ("weight_decay", self.weight_decay >= 0, "not be negative"),
            ("clip_norm", self.clip_norm >= 0, "be positive, or 0 for no clipping"),
        ):
            if not is_possible:
                raise ValueError(
                    f"{name}={getattr(self, name)} of the optimizer must {needed}."
                )


def learning_rate_schedule(config: OptimizerConfig, num_updates: int) -> optax.Schedule:
    """Learning rate by the number of updates already made.

    Update k = 1, 2, … of the warm-up's w has k/w of the full rate, so the first one
    already learns (ReaL made its first two at a rate of 0 and stretched the decay over
    a multiple of the run).

    Args:
        config: the shape of the schedule.
        num_updates: optimizer steps in the whole run: steps × epochs × minibatches.
    """
    if num_updates < 1:
        raise ValueError(
            f"A run of {num_updates} optimizer steps has no learning rates; it needs "
            "at least 1."
        )
    warmup = round(config.warmup_fraction * num_updates)
    decay = max(num_updates - warmup, 1)
    rate, last = config.learning_rate, config.learning_rate * config.final_fraction
    after = {
        "constant": lambda: optax.constant_schedule(rate),
        "linear": lambda: optax.linear_schedule(rate, last, decay),
        "cosine": lambda: optax.cosine_decay_schedule(
            rate, decay, alpha=config.final_fraction
        ),
    }[config.schedule]()
    if warmup == 0:
        return after
    rise = optax.linear_schedule(rate / warmup, rate, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(
    config: OptimizerConfig, num_updates: int
) -> optax.GradientTransformationExtraArgs:
    """Clipping, AdamW and the schedule, as one optax chain.

    With `update(…, norm=…)`, the global norm of all gradients, what becomes of one
    element depends on no other one: the chain then updates any part of the parameters,
    with that part of the state, as it would within the whole.
    """
    chain = optax.chain(
        clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=_decays),
        optax.scale_by_learning_rate(learning_rate_schedule(config, num_updates)),
    )
    return optax.with_extra_args_support(chain)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """Scale gradients down to a largest global norm, as optax's function of this name.

    Args:
        max_norm: the largest norm. The update takes the norm there is as `norm`, where
            it is given a part of the gradients only.
    """

    def init(params: PyTree) -> optax.OptState:
        del params
        return optax.EmptyState()

    def update(
        updates: PyTree,
        state: optax.OptState,
        params: PyTree | None = None,
        *,
        norm: Array | None = None,
        **others: Any,
    ) -> tuple[PyTree, optax.OptState]:
        del params, others
        found = optax.tree.norm(updates) if norm is None else norm

        def clip(leaf: Array) -> Array:
            scaled = leaf / found.astype(leaf.dtype) * max_norm
            return jax.lax.select(found < max_norm, leaf, scaled)

        return jax.tree.map(clip, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _decays(parameters: PyTree) -> PyTree:
    """True for matrices; norms' scales and biases are pulled nowhere."""

    def is_matrix(path, _) -> bool:
        return path[-1].key not in ("scale", "bias")

    return jax.tree_util.tree_map_with_path(is_matrix, parameters)


def state_shardings(
    optimizer: optax.GradientTransformation,
    abstract: PyTree,
    shardings: PyTree,
    replicated: jax.sharding.Sharding,
) -> PyTree:
    """Moments lie as their parameters do; counters are replicated.

    Args:
        optimizer: whose state is meant.
        abstract: parameters as `ShapeDtypeStruct`s.
        shardings: of the parameters.
        replicated: the sharding of everything that is not shaped like a parameter.
    """
    state = jax.eval_shape(optimizer.init, abstract)
    return optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        state,
        shardings,
        transform_non_params=lambda _: replicated,
    )
