"""What a call works with: activations, caches, gradients, keys and values in pages.

Estimated from the sizes of the model and the rows it takes at a time, without tracing
anything.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax

from pallas_kernels.paged_attention.reference import MOST_SCORES
from realjax.dataflow.plan import ExecutionPlan
from realjax.dataflow.schedule import Place
from realjax.functions.function import Generate, Train
from realjax.functions.role import Role
from realjax.models import pages
from realjax.models.config import ModelConfig
from realjax.models.partition import Partition
from realjax.parallel.allocation import Allocation
from realjax.planner.stored import (
    MOMENTS,
    MOST_LAYOUTS,
    abstract,
    cut_bytes,
    parameter_bytes,
)
from realjax.rl.sampling import kept_width
from realjax.rollout.scheduler import SHORTEST_CHUNK
from realjax.rollout.settings import Settings
from realjax.rollout.shard import Room, room_of

HEAD_CHUNK_TOKENS, CUT_HEAD_CHUNK_TOKENS = 2**13, 2**11
"""Tokens whose logits exist at the same time while log-probabilities are computed, by a
head that is whole on a device, and by one that is cut."""

FORWARD_SHARE = 0.65
"""What a pass without gradients holds of all that one layer computes."""

KEPT_SHARE = 1.2
"""What a backward pass without remat finds of it: norms and scores are in float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """The shapes of a step.

    Attributes:
        num_rows: of a batch of the data set.
        width: T, tokens of a sequence.
        prompt_width: tokens of a prompt; 0 where nothing is generated.
    """

    num_rows: int
    width: int
    prompt_width: int = 0


class Working(NamedTuple):
    """What a call works with on each device.

    Attributes:
        kept: what its programs hand to each other: sums of gradients, or completions.
        temporary: the most that one of its programs takes beside what it is given.
    """

    kept: int
    temporary: int


def working_bytes(
    plan: ExecutionPlan, name: str, role: Role, num_rows: int, work: Work
) -> Working:
    """Count what a call of a role needs beside parameters, moments and the batch.

    Args:
        plan: needs only this call's allocation.
        name: of the call.
        role: of the call, its model padded for the allocation.
        num_rows: sequences that the call takes.
        work: shapes of a step.
    """
    node, allocation = plan.graph.calls[name], plan.calls[name].allocation
    model, itemsize = role.model, jax.numpy.dtype(role.dtype).itemsize
    if isinstance(node.function, Generate):
        settings = plan.rollout_settings(name, num_rows=num_rows)
        rows = -(-num_rows // allocation.num_row_shards)
        return _generate_bytes(
            node.function, model, allocation, itemsize, rows, settings, work
        )
    if node.is_following:
        return Working(0, parameter_bytes(model, Place(allocation, "float32")))
    rows = plan.num_rows(name, max_rows=num_rows, row_length=work.width)
    num_tokens = rows // allocation.num_row_shards * work.width // allocation.stage
    layer = _layer_bytes(model, allocation, itemsize, num_tokens)
    kept, size = 0, int((2 if node.is_training else FORWARD_SHARE) * layer)
    size += _gathered_bytes(model, allocation, itemsize)
    size += _head_bytes(model, allocation, itemsize, num_tokens)
    if isinstance(node.function, Train):
        layers = -(-model.padded_num_layers // allocation.stage)
        remat = role.remat(plan.calls[name].remat)
        of_layer = _kept_bytes(model, allocation, itemsize, num_tokens, remat)
        # Every microbatch that is under way in a pipeline keeps its own.
        size += of_layer * layers * allocation.stage
        # The gradient of this microbatch; kept are the sums over the minibatch.
        kept = cut_bytes(model, allocation)
        size += kept
        if role.config.optimizer.offload:
            layer = MOMENTS * cut_bytes(model, allocation) // model.padded_num_layers
            size += 2 * layer
    return Working(kept, size)


def room(plan: ExecutionPlan, name: str, role: Role, num_rows: int, work: Work) -> Room:
    """Return what each row shard of a call that generates has room for."""
    return room_of(
        role.model,
        plan.rollout_settings(name, num_rows=num_rows),
        width=work.width,
        num_shards=plan.calls[name].allocation.num_row_shards,
    )


def pool_bytes(
    plan: ExecutionPlan, name: str, role: Role, num_rows: int, work: Work
) -> int:
    """Count the bytes of the keys and values that a call that generates keeps."""
    found = room(plan, name, role, num_rows, work)
    return found.num_pages * page_bytes(plan, name, role)


def page_bytes(plan: ExecutionPlan, name: str, role: Role) -> int:
    """Count the bytes of one page on each of the devices that have a part of it."""
    tensor = plan.calls[name].allocation.tensor
    settings = plan.rollout_settings(name, num_rows=1)
    size = pages.page_bytes(
        role.model,
        settings.page_size,
        settings.kv_dtype or role.dtype,
        Partition(num_head_parts=tensor),
    )
    return size // tensor


def _generate_bytes(
    spec, model, allocation, itemsize, rows, settings: Settings, work: Work
) -> Working:
    """Beside the pool: a step of decoding or a chunk of prompts, and the result."""
    tensor = allocation.tensor
    slots = -(-settings.slots // allocation.num_row_shards)
    # Keys and values of one row, gathered in one layer.
    kv_heads = math.lcm(model.num_kv_heads, tensor) // tensor
    gathered = 2 * work.width * kv_heads * model.head_dim * itemsize
    weights = _feed_forward_bytes(model, allocation, itemsize)
    # Of the whole vocabulary on every device, and their exponentials.
    sampling = 2 * 4 * slots * model.padded_vocab_size
    if allocation.fsdp > 1:
        sampling += model.padded_vocab_size * model.width * itemsize // tensor
    # One after the other in the same memory.
    decode = max(slots * gathered, weights, sampling)
    decode += int(FORWARD_SHARE * _layer_bytes(model, allocation, itemsize, slots))
    tokens = settings.chunk_tokens
    scores = min(tokens * work.width * model.num_heads // tensor, MOST_SCORES)
    prefill = min(slots, max(tokens // SHORTEST_CHUNK, 1)) * gathered
    prefill += (4 + itemsize) * scores + weights
    prefill += int(FORWARD_SHARE * _layer_bytes(model, allocation, itemsize, tokens))
    form = kept_width(spec.sampling, model.vocab_size)
    # Tokens, log-probabilities and entropy of all rows, and the sets they kept.
    result = 4 * rows * work.width * (3 + (form[1] if form else 0))
    return Working(result, max(decode, prefill))


def _layer_bytes(model, allocation, itemsize: int, num_tokens: int) -> int:
    """What one layer computes for some tokens: attention, then feed-forward."""
    heads = 2 * model.num_heads + 2 * model.num_kv_heads
    experts = model.moe.top_k if model.moe else 1
    mlp = experts * (3 if model.is_gated else 2) * model.mlp_width
    cut = (heads * model.head_dim + mlp) // allocation.tensor
    return num_tokens * (2 * experts * model.width + cut) * itemsize


def _kept_bytes(model, allocation, itemsize: int, num_tokens: int, remat: str) -> int:
    """What one layer keeps for its backward pass."""
    if remat == "none":
        layer = _layer_bytes(model, allocation, itemsize, num_tokens)
        return int(KEPT_SHARE * layer)
    values = {"block": model.width, "offload": 0}.get(remat)
    if values is None:  # "dots": what matrix products give.
        experts = model.moe.top_k if model.moe else 1
        heads = model.num_heads + 2 * model.num_kv_heads
        mlp = experts * (2 if model.is_gated else 1) * model.mlp_width
        values = (heads * model.head_dim + mlp) // allocation.tensor
        values += (1 + experts) * model.width
    return num_tokens * values * itemsize


def _gathered_bytes(model, allocation: Allocation, itemsize: int) -> int:
    """Two layers whose weights are gathered over fsdp, in the type of the products."""
    if allocation.fsdp == 1:
        return 0
    count = 2 * _num_of_layer(model, "")
    return count * itemsize // (allocation.tensor * allocation.expert)


def _feed_forward_bytes(model, allocation: Allocation, itemsize: int) -> int:
    """The feed-forward weights of one layer, out of the stack or gathered."""
    count = _num_of_layer(model, "moe" if model.moe else "mlp")
    return count * itemsize // (allocation.tensor * allocation.expert)


@functools.lru_cache(maxsize=MOST_LAYOUTS)
def _num_of_layer(model: ModelConfig, part: str) -> int:
    """Count the parameters of one layer, or of a part of it."""
    layers = abstract(model)["layers"]
    leaves = jax.tree.leaves(
        layers[part] if part else layers, is_leaf=lambda node: hasattr(node, "axes")
    )
    return sum(math.prod(leaf.shape[1:]) for leaf in leaves)


def _head_bytes(model, allocation: Allocation, itemsize: int, num_tokens: int) -> int:
    """Logits of a chunk and their gradient; the hidden states and theirs."""
    hidden = 2 * num_tokens * model.width * itemsize
    if model.head != "language":
        return hidden
    # Scoring cuts the vocabulary over fsdp, too.
    parts = allocation.tensor * allocation.stage * allocation.fsdp
    chunk = CUT_HEAD_CHUNK_TOKENS if parts > 1 else HEAD_CHUNK_TOKENS
    vocab = model.padded_vocab_size // parts
    return hidden + 2 * 4 * min(num_tokens, chunk) * vocab
