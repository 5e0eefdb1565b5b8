"""Log-probabilities and entropies of a linear layer over the vocabulary."""

from pallas_kernels.linear_logprob.api import default_chunk_size, linear_logprob
from pallas_kernels.linear_logprob.reference import (
    capped_logits,
    is_kept,
    kept_logits,
    scaled_logits,
)
from pallas_kernels.linear_logprob.sharded import sharded_linear_logprob

__all__ = [
    "capped_logits",
    "default_chunk_size",
    "is_kept",
    "kept_logits",
    "linear_logprob",
    "scaled_logits",
    "sharded_linear_logprob",
]
