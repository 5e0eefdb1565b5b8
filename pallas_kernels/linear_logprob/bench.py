"""The shapes at which the head's log-probabilities are compiled, checked and timed.

Scoring reads a bfloat16 kernel, as inference has it; training a float32 one, and makes
its float32 gradient. The least work of training is taken to be four products: without
an array of all logits they are made twice.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _dispatch, _tuning
from pallas_kernels.linear_logprob import api, mosaic_sm90, reference
from pallas_kernels.linear_logprob.request import Request
from pallas_kernels.linear_logprob.tiles_sm90 import Blocks
from pallas_kernels.testing.cases import Case, Limits

MIB = 2**20

_OPERATION = "linear_logprob"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shape:
    """Sizes of a head, and what is asked of it."""

    num_tokens: int
    width: int
    num_columns: int
    is_training: bool = False
    dtype: Any = jnp.bfloat16
    sets: str = "none"
    num_padding: int = 0
    temperature: float = 1.0
    soft_cap: float | None = None
    scale: float = 1.0
    chunk_size: int | None = None
    block_size: int | None = None

    @property
    def vocab_size(self) -> int:
        return self.num_columns - self.num_padding

    @property
    def kernel_dtype(self) -> Any:
        return jnp.float32 if self.is_training else self.dtype

    @property
    def logits(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "soft_cap": self.soft_cap,
            "vocab_size": self.vocab_size,
        }


def cases() -> tuple[Case, ...]:
    """Return the heads of models people train, and tiny ones."""
    # Width, columns, and MiB of temporaries in training: at most those of a copied
    # block of columns, and of hidden states and of their gradient in float32.
    models = {
        "llama-3.2-1b": (2048, 128256, 150),
        "llama-3.1-8b": (4096, 128256, 230),
        "qwen-2.5-7b": (3584, 152064, 210),
    }
    found = []
    for name, (width, num_columns, temporary) in models.items():
        scoring = _Shape(num_tokens=16384, width=width, num_columns=num_columns)
        training = dataclasses.replace(scoring, num_tokens=8192, is_training=True)
        found.append(_case(f"{name} scores 16384 tokens", scoring, 3 * MIB))
        found.append(_case(f"{name} trains on 8192 tokens", training, temporary * MIB))
    tiny = {
        "tokens and columns that no tile divides": _Shape(
            num_tokens=100, width=64, num_columns=300, is_training=True
        ),
        "sets of ids, blocks that overlap, padding": _Shape(
            num_tokens=50,
            width=64,
            num_columns=320,
            is_training=True,
            sets="ids",
            num_padding=70,
            soft_cap=30.0,
            temperature=0.7,
            block_size=64,
            chunk_size=32,
        ),
        "sets of bits, some empty": _Shape(
            num_tokens=72, width=128, num_columns=200, sets="bits", is_training=True
        ),
        "large logits": _Shape(
            num_tokens=64, width=128, num_columns=330, scale=1000.0, is_training=True
        ),
        "equal logits": _Shape(num_tokens=8, width=64, num_columns=576, scale=0.0),
    }
    found.extend(_case(name, shape, MIB) for name, shape in tiny.items())
    return tuple(found)


def _case(name: str, shape: _Shape, temporary_bytes: int) -> Case:
    def implementation(kind: str) -> Callable[..., Any]:
        score = functools.partial(
            api.linear_logprob,
            implementation=kind,
            chunk_size=shape.chunk_size,
            block_size=shape.block_size,
            **shape.logits,
        )
        return _work(shape, score)

    def with_blocks(blocks: Blocks) -> Callable[..., Any]:
        return _work(shape, functools.partial(_score_with, shape, blocks))

    num_weights = shape.width * shape.num_columns
    num_hidden = shape.num_tokens * shape.width
    itemsize = jnp.dtype(shape.kernel_dtype).itemsize
    is_tiny = shape.num_tokens < 1024
    return Case(
        operation=_OPERATION,
        name=name,
        is_tiny=is_tiny,
        inputs=functools.partial(_inputs, shape),
        implementations={
            kind: implementation(kind) for kind in ("mosaic", "chunked", "dense")
        },
        reference=functools.partial(_reference, shape),
        # Gradients to the logits and to the hidden states are rounded to 16 bits.
        tolerance=1e-2 if shape.is_training else 1e-4,
        num_bytes=(2 if shape.is_training else 1) * (num_weights * itemsize)
        + (2 if shape.is_training else 1) * (num_hidden * 2),
        num_flops=(8 if shape.is_training else 2) * num_hidden * shape.num_columns,
        goal=None if is_tiny else 0.65,
        limits=Limits(temporary_bytes=temporary_bytes, num_wgmma=4),
        candidates=() if is_tiny else mosaic_sm90.candidates(_request(shape)),
        with_blocks=None if is_tiny else with_blocks,
        tuning_key=_tuning.key_of(*api.tuning_of(_request(shape))),
    )


def _request(shape: _Shape) -> Request:
    return Request(
        num_tokens=shape.num_tokens,
        width=shape.width,
        num_columns=shape.num_columns,
        dtype=shape.dtype,
        kernel_dtype=shape.kernel_dtype,
        device=_dispatch.H200,
        has_sets=shape.sets != "none",
    )


def _score_with(shape: _Shape, blocks: Blocks, hidden, kernel, targets, *, kept):
    static = api.make_static(shape.num_columns, **shape.logits)
    cuts = api.mosaic_cuts(_request(shape), blocks)
    scores = api.scores_of(static, cuts, hidden, kernel, targets, kept)
    return scores.logprobs, scores.entropy


def _work(shape: _Shape, score: Callable[..., Any]) -> Callable[..., Any]:
    """Return what is timed: the scores, and in training the gradients beside them."""

    def loss(hidden, kernel, targets, kept):
        logprobs, entropy = score(hidden, kernel, targets, kept=kept)
        # Of targets that are outside of their sets.
        possible = jnp.where(logprobs == -jnp.inf, 0.0, logprobs)
        return jnp.mean(possible) + 0.1 * jnp.mean(entropy), (possible, entropy)

    def scores(hidden, kernel, targets, kept=None):
        return score(hidden, kernel, targets, kept=kept)

    def train(hidden, kernel, targets, kept=None):
        gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
        grads, found = gradient(hidden, kernel, targets, kept)
        return *found, *grads

    return train if shape.is_training else scores


def _reference(shape: _Shape, hidden, kernel, *rest):
    kernel = kernel.astype(shape.dtype).astype(jnp.float32)
    score = functools.partial(reference.linear_logprob, **shape.logits)
    with jax.default_matmul_precision("highest"):
        return jax.jit(_work(shape, score))(hidden.astype(jnp.float32), kernel, *rest)


def _inputs(shape: _Shape, key: jax.Array) -> tuple[Any, ...]:
    keys = jax.random.split(key, 5)
    sizes = (shape.num_tokens, shape.width), (shape.width, shape.num_columns)
    hidden = shape.scale * jax.random.normal(keys[0], sizes[0])
    kernel = 2.0 * shape.width**-0.5 * jax.random.normal(keys[1], sizes[1])
    targets = jax.random.randint(keys[2], sizes[0][:1], 0, shape.vocab_size)
    arrays = (
        hidden.astype(shape.dtype),
        kernel.astype(shape.kernel_dtype),
        targets.astype(jnp.int32),
    )
    if shape.sets == "none":
        return arrays
    is_empty = jax.random.bernoulli(keys[3], 0.2, (shape.num_tokens, 1))
    if shape.sets == "ids":
        ids = jax.random.randint(
            keys[4], (shape.num_tokens, 20), -1, shape.vocab_size, jnp.int32
        )
        return *arrays, jnp.where(is_empty, -1, ids)
    num_words = -(-shape.vocab_size // 32)
    bits = jax.random.bits(keys[4], (shape.num_tokens, num_words), jnp.uint32)
    return *arrays, jnp.where(is_empty, jnp.uint32(0), bits)
