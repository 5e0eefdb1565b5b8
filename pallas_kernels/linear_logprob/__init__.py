"""Log-probabilities, entropies and the likeliest tokens of a linear layer."""

from pallas_kernels.linear_logprob.api import (
    default_chunk_size,
    explain,
    linear_logprob,
    linear_scores,
)
from pallas_kernels.linear_logprob.blocks import Scores
from pallas_kernels.linear_logprob.reference import (
    capped_logits,
    is_kept,
    kept_logits,
    scaled_logits,
)
from pallas_kernels.linear_logprob.sharded import (
    sharded_linear_logprob,
    sharded_linear_top,
)
from pallas_kernels.linear_logprob.top import linear_top

__all__ = [
    "Scores",
    "capped_logits",
    "default_chunk_size",
    "explain",
    "is_kept",
    "kept_logits",
    "linear_logprob",
    "linear_scores",
    "linear_top",
    "scaled_logits",
    "sharded_linear_logprob",
    "sharded_linear_top",
]
