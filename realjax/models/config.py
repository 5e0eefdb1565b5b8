"""The configuration of a model: sizes, positions, experts, head.

One decoder serves every family: what they differ in is a field here, and a family's
module says which fields its checkpoints need.
"""

import dataclasses
import math
from typing import Literal

from realjax.core.config import check_choice
from realjax.models.rope_scaling import RopeScaling

__all__ = ["ACTIVATIONS", "Adapters", "MoEConfig", "ModelConfig", "RopeScaling"]

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
NORMS = ("rms", "gemma", "layer")
PROJECTIONS = ("query", "key", "value", "output", "gate", "up", "down")
"""Those that may have an adapter."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A mixture of experts in the place of every feed-forward layer.

    Attributes:
        num_experts: E.
        top_k: experts that each token goes to.
        is_normalized: the weights of a token's experts are divided by their sum.
        aux_loss_coef: of the load-balancing loss, added to the loss in training.
        z_loss_coef: of the mean squared log-normaliser of the router.
        jitter: in training the router's input is multiplied by uniform noise from
            1 - jitter to 1 + jitter.
        capacity_factor: an expert takes at most this many times its even share of a
            sequence's tokens, the rest is dropped; 0 drops nothing.
        drop_policy: whom a full expert drops: "probs" the least probable, "position"
            the last in the sequence.
    """

    num_experts: int
    top_k: int
    is_normalized: bool = True
    aux_loss_coef: float = 0.0
    z_loss_coef: float = 0.0
    jitter: float = 0.0
    capacity_factor: float = 0.0
    drop_policy: str = "probs"

    def __post_init__(self):
        """Check that the router has something to choose."""
        check_choice("drop_policy", self.drop_policy, ("probs", "position"))
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"top_k is {self.top_k} of {self.num_experts} experts; it must be from"
                " 1 to their number."
            )
        for name in ("aux_loss_coef", "z_loss_coef", "capacity_factor"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be >= 0.")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter is {self.jitter}; it must be in [0, 1).")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapters:
    """Low-rank adapters beside projections; they are trained, and nothing else.

    y = x W + scale (dropout(x) A) B        A [inputs, rank], B [rank, outputs]

    A scalar head is trained with them.

    Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685, eq. 3.

    Attributes:
        rank: of A B.
        alpha: the scale is alpha / rank.
        targets: the projections, of `PROJECTIONS`.
        dropout: in training, the share of the inputs of A that are zero.
        is_rank_stabilized: the scale is alpha / sqrt(rank) (Kalajdzievski 2023,
            https://arxiv.org/abs/2312.03732).
        shares_input: query, key and value have one A, as where a checkpoint holds them
            in one tensor.
        base_dtype: in memory, of what is not trained; "" is that of the adapters.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float = 0.0
    is_rank_stabilized: bool = False
    shares_input: bool = False
    base_dtype: str = ""

    def __post_init__(self):
        """Check that there is something to train."""
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank} of adapters; it must be at least 1.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be in [0, 1).")
        for name in self.targets:
            check_choice("targets", name, PROJECTIONS)
        if not self.targets:
            raise ValueError("targets is empty: adapters stand beside projections.")
        shared = {"query", "key", "value"}
        if self.shares_input and shared & {*self.targets} not in (set(), shared):
            raise ValueError(
                f"targets is {self.targets}, and query, key and value share their"
                " input's adapter. Name all three or none."
            )

    @property
    def scale(self) -> float:
        """The factor of A B."""
        return self.alpha / (self.rank**0.5 if self.is_rank_stabilized else self.rank)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that decides the parameter tree and the arithmetic of a model.

    Attributes:
        family: the module of `realjax.models.families` that reads and writes it, or the
            dotted name of a user's own module.
        vocab_size: V, ids of the vocabulary.
        width: D, of the residual stream.
        num_layers: L.
        num_heads: H, query heads.
        num_kv_heads: N, key and value heads; divides `num_heads`.
        head_dim: K, width of one head; need not be `width / num_heads`.
        mlp_width: F, of a feed-forward layer, or of one expert.
        norm: "rms"; "gemma", whose scale is 1 + its parameter; "layer" with a bias.
        norm_epsilon: added to the mean square (or variance) in every norm.
        activation: of the feed-forward layers, one of `ACTIVATIONS`.
        is_gated: down(activation(gate) × up); otherwise down(activation(up)).
        has_qkv_bias: query, key and value projections have biases.
        has_output_bias: the projection that ends the attention has one.
        has_mlp_bias: the projections of feed-forward layers have biases.
        has_query_key_norm: queries and keys are normalised, head by head.
        has_post_norms: also the output of attention and of the feed-forward layer is
            normalised, before it joins the residual stream.
        positions: "rotary", or "learned" vectors added to the embedding.
        rope_theta: base of the rotary wavelengths.
        rope_scaling: how they are stretched, if they are.
        local_rope_theta: base in the layers with a window, unstretched; None: the same
            as in the others.
        window: a token sees so many tokens of its sequence, itself included; None: all.
        windowed_layers: for each layer, whether the window is there; () means in all.
        attention_scale: scores are multiplied by it; None is `head_dim ** -0.5`.
        is_scaled_by_layer: they are also divided by the layer's number, from 1.
        attention_soft_cap: c, scores become c tanh(score / c); None leaves them.
        logit_soft_cap: the same of the logits of the language head.
        is_embedding_scaled: the embedding is multiplied by sqrt(width).
        moe: experts, if the model has them.
        adapters: low-rank ones, if they are all that is trained.
        tie_embeddings: the embedding is also the language head.
        head: "language" scores the vocabulary; "scalar" gives one number per token,
            for reward models and critics.
        max_positions: tokens the model was made for; the rows of learned positions.
        bos_id: beginning-of-sequence id, kept for export.
        eos_ids: end-of-sequence ids, kept for export.
        pad_id: padding id, kept for export.
        vocab_multiple: in memory the vocabulary is padded to a multiple of this, for
            strategies whose parts it does not divide into.
        layer_multiple: in memory the stack of layers is padded likewise.
    """

    family: str = "llama"
    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    norm: str = "rms"
    norm_epsilon: float = 1e-5
    activation: str = "silu"
    is_gated: bool = True
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    has_mlp_bias: bool = False
    has_query_key_norm: bool = False
    has_post_norms: bool = False
    positions: str = "rotary"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None
    window: int | None = None
    windowed_layers: tuple[bool, ...] = ()
    attention_scale: float | None = None
    is_scaled_by_layer: bool = False
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    is_embedding_scaled: bool = False
    moe: MoEConfig | None = None
    adapters: Adapters | None = None
    tie_embeddings: bool = False
    head: Literal["language", "scalar"] | str = "language"
    max_positions: int = 2048
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    vocab_multiple: int = 1
    layer_multiple: int = 1

    def __post_init__(self):
        """Check that the sizes fit each other."""
        for name in (
            *("vocab_size", "width", "num_layers", "num_heads", "num_kv_heads"),
            *("head_dim", "mlp_width", "max_positions"),
            *("vocab_multiple", "layer_multiple"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be at least 1."
                )
        check_choice("head", self.head, ("language", "scalar"))
        check_choice("norm", self.norm, NORMS)
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("positions", self.positions, ("rotary", "learned"))
        self._check_heads()
        self._check_windows()
        if self.moe is not None and (self.has_mlp_bias or not self.is_gated):
            raise ValueError(
                "Experts here are gated and have no biases; the config has"
                f" is_gated={self.is_gated} and has_mlp_bias={self.has_mlp_bias}."
            )
        if self.adapters is not None:
            self._check_adapters(self.adapters)

    def _check_adapters(self, adapters: Adapters) -> None:
        missing = {"gate"} if not self.is_gated else set()
        if self.moe is not None:
            missing = {"gate", "up", "down"}
        if wrong := [name for name in adapters.targets if name in missing]:
            why = "are experts'" if self.moe is not None else "are not there"
            raise ValueError(
                f"Adapters have the targets {', '.join(wrong)}, which {why} in this"
                " model. Targets may be"
                f" {', '.join(p for p in PROJECTIONS if p not in missing)}."
            )

    def _check_heads(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} query heads do not split over"
                f" {self.num_kv_heads} key and value heads. num_heads must be a"
                " multiple of num_kv_heads."
            )
        if self.head_dim % 2 and self.positions == "rotary":
            raise ValueError(
                f"head_dim is {self.head_dim}; rotary embeddings turn pairs of"
                " coordinates, so it must be even."
            )
        if self.rope_scaling is not None:
            self.rope_scaling.check_head_dim(self.head_dim)

    def _check_windows(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(
                f"window is {self.window}; a token sees at least itself, so it must be"
                " at least 1, or None for no window."
            )
        if self.windowed_layers and len(self.windowed_layers) != self.num_layers:
            raise ValueError(
                f"windowed_layers has {len(self.windowed_layers)} entries for"
                f" {self.num_layers} layers. Give one for each, or none for all alike."
            )
        if self.window is None and any(self.windowed_layers):
            raise ValueError(
                "windowed_layers names layers with a window, and `window` is None."
            )

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding in memory."""
        return _padded(self.vocab_size, self.vocab_multiple)

    @property
    def padded_num_layers(self) -> int:
        """Layers of the stack in memory; those past `num_layers` do nothing."""
        return _padded(self.num_layers, self.layer_multiple)

    @property
    def draws_noise(self) -> bool:
        """Whether training draws random numbers: jitter of routers, or dropout."""
        has_jitter = self.moe is not None and self.moe.jitter > 0
        return has_jitter or (self.adapters is not None and self.adapters.dropout > 0)

    def longest_sequence(self, *, is_sampled: bool) -> int:
        """Return how many tokens a sequence may have.

        Where rotations depend on a sequence's length, a token that is sampled is
        rotated for the length so far, and in training for that of the whole sequence.
        Log-probabilities would then differ, so what is sampled stays within the
        original context, where all lengths are alike.

        Args:
            is_sampled: the model generates its sequences, and is trained or asked for
                their log-probabilities afterwards.
        """
        scaling = self.rope_scaling
        if scaling is None or not scaling.depends_on_length:
            return self.max_positions
        if is_sampled:
            return min(self.max_positions, scaling.original_max_positions)
        stretched = scaling.factor * scaling.original_max_positions
        return max(self.max_positions, int(stretched))

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """The window of each layer."""
        windowed = self.windowed_layers or (True,) * self.num_layers
        return tuple(self.window if is_windowed else None for is_windowed in windowed)

    @property
    def num_layer_parameters(self) -> int:
        """Parameters of one layer, its norms and biases included."""
        heads, kv_heads = self.num_heads, self.num_kv_heads
        return (
            self._num_layer_weights
            + self.has_qkv_bias * (heads + 2 * kv_heads) * self.head_dim
            + self.has_output_bias * self.width
            + self.has_mlp_bias * ((1 + self.is_gated) * self.mlp_width + self.width)
            + (2 + 2 * self.has_post_norms) * self._num_norm_parameters
            + 2 * self.has_query_key_norm * self.head_dim
        )

    @property
    def _num_norm_parameters(self) -> int:
        return (2 if self.norm == "layer" else 1) * self.width

    @property
    def _num_layer_weights(self) -> int:
        """Entries of a layer's matrices."""
        attention = 2 * self.width * (self.num_heads + self.num_kv_heads)
        weights = attention * self.head_dim
        if self.moe is None:
            return weights + self._num_mlp_weights
        experts = self.moe.num_experts
        return weights + experts * self._num_mlp_weights + self.width * experts

    @property
    def _num_mlp_weights(self) -> int:
        """Entries of the matrices of a feed-forward layer, or of an expert."""
        return (2 + self.is_gated) * self.width * self.mlp_width

    @property
    def num_adapter_parameters(self) -> int:
        """Parameters of the adapters of all layers; 0 without."""
        if self.adapters is None:
            return 0
        heads, kv_heads = (
            n * self.head_dim for n in (self.num_heads, self.num_kv_heads)
        )
        width, mlp = self.width, self.mlp_width
        sides = {
            **{"query": (width, heads), "output": (heads, width), "down": (mlp, width)},
            **dict.fromkeys(("key", "value"), (width, kv_heads)),
            **dict.fromkeys(("gate", "up"), (width, mlp)),
        }
        size = sum(sum(sides[name]) for name in self.adapters.targets)
        if self.adapters.shares_input and "query" in self.adapters.targets:
            size -= 2 * width
        return self.num_layers * self.adapters.rank * size

    @property
    def num_head_parameters(self) -> int:
        """Parameters of the head; 0 where the embedding is the head."""
        if self.head == "scalar":
            return self.width
        return 0 if self.tie_embeddings else self.width * self.vocab_size

    @property
    def num_parameters(self) -> int:
        """All parameters, embedding and head included; no padding, no adapters."""
        rows = self.vocab_size
        if self.positions == "learned":
            rows += self.max_positions
        return (
            rows * self.width
            + self.num_layers * self.num_layer_parameters
            + self._num_norm_parameters
            + self.num_head_parameters
        )

    def flops_per_token(self, context: float) -> float:
        """Count the floating point operations of one token's forward pass.

        Two per weight of a matrix product (of the experts a token goes to), and four
        per coordinate of a query head and key it sees (scores, then the weighted sum of
        values). The embedding is a lookup and norms are not counted.

        Args:
            context: keys a token sees without a window; about half the length for a
                causal row.

        Returns:
            Operations of a forward pass; a backward pass takes twice as many.
        """
        weights = self._num_layer_weights
        if self.moe is not None:
            idle = self.moe.num_experts - self.moe.top_k
            weights -= idle * self._num_mlp_weights
        outputs = 1 if self.head == "scalar" else self.vocab_size
        keys = sum(
            context if window is None else min(context, window)
            for window in self.layer_windows
        )
        attention = 4 * self.num_heads * self.head_dim * keys
        return 2 * (self.num_layers * weights + self.width * outputs) + attention


def _padded(size: int, multiple: int) -> int:
    return math.ceil(size / multiple) * multiple
