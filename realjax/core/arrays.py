"""Array types and the dimension key used across the project.

Dimension key (jaxtyping names in signatures, suffixes in function bodies):

    B  sequences of a batch        T  tokens of a sequence, padded at its end
    R  packed rows                 S  tokens of a packed row
    M  sequences of a microbatch   P  tokens of a prompt
    V  vocabulary                  C  token ids kept by the sampler
    D  model width                 F  width of the feed-forward layer
    H  query heads                 N  key and value heads
    K  width of one head           L  layers

Index t of log-probabilities, values, rewards and masks is about token t; a value is
that of the state before token t is chosen. Index 0 never counts.
"""

from jaxtyping import Array, Bool, Float, Int, Key, PyTree, Scalar, Shaped, UInt

__all__ = [
    "Array",
    "Bool",
    "Float",
    "Int",
    "Key",
    "PyTree",
    "Scalar",
    "Shaped",
    "UInt",
]
