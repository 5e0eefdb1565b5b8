"""Counts of what reallocations moved."""

import dataclasses

from realjax.realloc.routes import KINDS, Kind


@dataclasses.dataclass(kw_only=True)
class Traffic:
    """Counts what reallocations moved.

    Attributes:
        leaves: Arrays, by kind of route.
        bytes: Their bytes (whole arrays, in the type they travel in), by kind.
        sent_bytes: Bytes that went from device to device by put and slice.
        crossed_bytes: Those of them that went from process to process.
        collective_bytes: Bytes that the collectives of jit had to move at least.
        uploaded_bytes: Bytes of host arrays that were put on devices.
    """

    leaves: dict[Kind, int] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(KINDS, 0)
    )
    bytes: dict[Kind, int] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(KINDS, 0)
    )
    sent_bytes: int = 0
    crossed_bytes: int = 0
    collective_bytes: int = 0
    uploaded_bytes: int = 0

    def merge(self, other: "Traffic") -> None:
        """Add another's counts to these."""
        for kind in KINDS:
            self.leaves[kind] += other.leaves[kind]
            self.bytes[kind] += other.bytes[kind]
        self.sent_bytes += other.sent_bytes
        self.crossed_bytes += other.crossed_bytes
        self.collective_bytes += other.collective_bytes
        self.uploaded_bytes += other.uploaded_bytes

    def as_dict(self, prefix: str = "realloc/") -> dict[str, int]:
        """Return the counts as metrics, as in `realloc/bytes_slice`."""
        return {
            **{f"{prefix}leaves_{kind}": self.leaves[kind] for kind in KINDS},
            **{f"{prefix}bytes_{kind}": self.bytes[kind] for kind in KINDS},
            f"{prefix}sent_bytes": self.sent_bytes,
            f"{prefix}crossed_bytes": self.crossed_bytes,
            f"{prefix}collective_bytes": self.collective_bytes,
            f"{prefix}uploaded_bytes": self.uploaded_bytes,
        }
