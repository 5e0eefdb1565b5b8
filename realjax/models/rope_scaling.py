"""How rotary frequencies are stretched to contexts longer than the pretraining's."""

import dataclasses

KINDS = ("linear", "dynamic", "yarn", "llama3", "longrope")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """One of the context extensions in use.

    Attributes:
        kind: "linear" divides every frequency by `factor`; "dynamic" raises the base
            for sequences longer than the original context; "yarn" and "llama3" divide
            only the slow frequencies and blend in between; "longrope" divides each by a
            factor of its own.
        factor: how many times longer the context became.
        original_max_positions: tokens of the original context; all but "linear".
        low_frequency_factor: "llama3"; frequencies with fewer than this many turns in
            the original context are divided by `factor`.
        high_frequency_factor: "llama3"; frequencies with more than this many turns in
            the original context stay as they are.
        slow_turns, fast_turns: "yarn"; the same two limits, its beta_slow and
            beta_fast.
        is_truncated: "yarn"; the limits are rounded to whole pairs of coordinates.
        attention_factor: "yarn" and "longrope"; queries and keys are multiplied by it.
        short_factors: "longrope"; for sequences within the original context, one for
            each pair of coordinates.
        long_factors: "longrope"; for longer sequences.
    """

    kind: str
    factor: float = 1.0
    original_max_positions: int = 8192
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    slow_turns: float = 1.0
    fast_turns: float = 32.0
    is_truncated: bool = True
    attention_factor: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def __post_init__(self):
        """Refuse what rotary embeddings here cannot express."""
        if self.kind not in KINDS:
            raise ValueError(
                f"Rotary scaling of kind {self.kind!r} is not supported. Known kinds"
                f" are: {', '.join(KINDS)}."
            )
        if self.factor < 1:
            raise ValueError(
                f"Rotary scaling has factor {self.factor}; it must be at least 1."
            )
        if self.original_max_positions < 1:
            raise ValueError(
                "Rotary scaling has original_max_positions"
                f" {self.original_max_positions}; it must be at least 1."
            )
        for kind, low, high in (
            ("llama3", "low_frequency_factor", "high_frequency_factor"),
            ("yarn", "slow_turns", "fast_turns"),
        ):
            found = getattr(self, low), getattr(self, high)
            if self.kind == kind and not found[0] < found[1]:
                raise ValueError(
                    f"Rotary scaling {kind!r} needs {low} < {high}, found {found[0]}"
                    f" and {found[1]}."
                )

    @property
    def depends_on_length(self) -> bool:
        """Whether a token's rotation depends on how long its sequence is."""
        return self.kind in ("dynamic", "longrope")

    def check_head_dim(self, head_dim: int) -> None:
        """Refuse factors that are not one for each pair of coordinates."""
        if self.kind == "dynamic" and head_dim < 4:
            raise ValueError(
                f"Rotary scaling 'dynamic' needs heads wider than 2, found {head_dim}."
            )
        for name in ("short_factors", "long_factors"):
            count = len(getattr(self, name))
            if self.kind == "longrope" and count != head_dim // 2:
                raise ValueError(
                    f"Rotary scaling 'longrope' has {count} {name} for heads of width"
                    f" {head_dim}, which have {head_dim // 2} pairs of coordinates."
                )
