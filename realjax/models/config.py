"""The configuration of a model: sizes, rotary scaling, head."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched to contexts longer than the pretraining's.

    Attributes:
        kind: "linear" divides every frequency by `factor`; "llama3" divides only the
            slow ones and blends in between (Llama 3.1, 3.2 and 3.3).
        factor: how many times longer the context became.
        low_frequency_factor: "llama3" only; frequencies with fewer than this many
            turns in the original context are divided by `factor`.
        high_frequency_factor: "llama3" only; frequencies with more than this many
            turns in the original context stay as they are.
        original_max_positions: "llama3" only; tokens of the original context.
    """

    kind: str
    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self):
        """Refuse what rotary embeddings here cannot express."""
        if self.kind not in ("linear", "llama3"):
            raise ValueError(
                f"Rotary scaling of kind {self.kind!r} is not supported. Known kinds"
                " are 'linear' and 'llama3'."
            )
        if self.factor < 1:
            raise ValueError(
                f"Rotary scaling has factor {self.factor}; it must be at least 1."
            )
        if self.kind == "llama3" and not (
            self.low_frequency_factor < self.high_frequency_factor
        ):
            raise ValueError(
                "Rotary scaling 'llama3' needs low_frequency_factor <"
                f" high_frequency_factor, found {self.low_frequency_factor} and"
                f" {self.high_frequency_factor}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that decides the parameter tree and the arithmetic of a model.

    Attributes:
        family: the module of `realjax.models.families` that reads and writes it.
        vocab_size: V, rows of the embedding.
        width: D, of the residual stream.
        num_layers: L.
        num_heads: H, query heads.
        num_kv_heads: N, key and value heads; divides `num_heads`.
        head_dim: K, width of one head; need not be `width / num_heads`.
        mlp_width: F.
        norm_epsilon: added to the mean square in every norm.
        rope_theta: base of the rotary wavelengths.
        rope_scaling: how they are stretched, if they are.
        tie_embeddings: the embedding is also the language head.
        head: "language" scores the vocabulary; "scalar" gives one number per token,
            for reward models and critics.
        max_positions: tokens the model was made for; kept for export.
        bos_id: beginning-of-sequence id, kept for export.
        eos_ids: end-of-sequence ids, kept for export.
        pad_id: padding id, kept for export.
    """

    family: str = "llama"
    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    norm_epsilon: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    head: str = "language"
    max_positions: int = 2048
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    def __post_init__(self):
        """Check that the sizes fit each other."""
        for name in (
            *("vocab_size", "width", "num_layers", "num_heads", "num_kv_heads"),
            *("head_dim", "mlp_width", "max_positions"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be at least 1."
                )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} query heads do not split over"
                f" {self.num_kv_heads} key and value heads. num_heads must be a"
                " multiple of num_kv_heads."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim is {self.head_dim}; rotary embeddings turn pairs of"
                " coordinates, so it must be even."
            )
        if self.head not in ("language", "scalar"):
            raise ValueError(
                f"head is {self.head!r}; it must be 'language' or 'scalar'."
            )

    @property
    def num_layer_parameters(self) -> int:
        """Parameters of one layer, its two norms included."""
        attention = 2 * self.width * (self.num_heads + self.num_kv_heads)
        return (
            attention * self.head_dim + 3 * self.width * self.mlp_width + 2 * self.width
        )

    @property
    def num_head_parameters(self) -> int:
        """Parameters of the head; 0 where the embedding is the head."""
        if self.head == "scalar":
            return self.width
        return 0 if self.tie_embeddings else self.width * self.vocab_size

    @property
    def num_parameters(self) -> int:
        """All parameters, embedding and head included."""
        return (
            self.vocab_size * self.width
            + self.num_layers * self.num_layer_parameters
            + self.width
            + self.num_head_parameters
        )

    def flops_per_token(self, context: float) -> float:
        """Count the floating point operations of one token's forward pass.

        Two per weight of a matrix product, and four per coordinate of a query head
        and key it sees (scores, then the weighted sum of values). The embedding is a
        lookup and norms are not counted.

        Args:
            context: keys a token sees; about half the length for a causal row.

        Returns:
            Operations of a forward pass; a backward pass takes twice as many.
        """
        matrices = self.num_layers * (self.num_layer_parameters - 2 * self.width)
        outputs = 1 if self.head == "scalar" else self.vocab_size
        attention = 4 * self.num_layers * self.num_heads * self.head_dim * context
        return 2 * (matrices + self.width * outputs) + attention
