"""What a call works with: activations, caches, gradients, keys and values in pages.

Estimated from the sizes of the model and the rows it takes at a time, without tracing
anything.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax

from pallas_kernels.paged_attention.reference import MOST_SCORES
from realjax.dataflow.graph import DataflowGraph, ModelFunctionCall
from realjax.dataflow.plan import ExecutionPlan
from realjax.dataflow.schedule import Place
from realjax.functions.function import Generate, Infer, Train
from realjax.functions.role import Role
from realjax.models import pages
from realjax.models.config import ModelConfig
from realjax.models.partition import Partition
from realjax.parallel.allocation import Allocation
from realjax.parallel.pipeline import num_pieces
from realjax.planner.layers import (
    cut_weights,
    feed_forward_weights,
    largest_weights,
    layer_values,
    layer_weights,
)
from realjax.planner.stored import MOMENTS, base_bytes, cut_bytes, parameter_bytes
from realjax.rl.sampling import kept_width
from realjax.rollout.scheduler import SHORTEST_CHUNK
from realjax.rollout.settings import Settings
from realjax.rollout.shard import Room, room_of

HEAD_BYTES = 2**27
"""Logits of some tokens and columns, or the sets of tokens kept, while a head scores:
what `pallas_kernels.linear_logprob` holds at most."""

HOPPER = ("h100", "h200", "h20", "h800", "gh200")
"""Kinds of devices whose kernels attend over pages where they lie; elsewhere those of a
layer are gathered first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """The shapes of a step.

    Attributes:
        num_rows: of a batch of the data set.
        width: T, tokens of a sequence.
        prompt_width: tokens of a prompt; 0 where nothing is generated.
        device_kind: as the driver calls it; "" is not known.
    """

    num_rows: int
    width: int
    prompt_width: int = 0
    device_kind: str = ""

    @property
    def reads_pages(self) -> bool:
        """Whether the devices attend over pages where they lie."""
        words = self.device_kind.lower().split()
        return any(kind in words for kind in HOPPER)


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
    passes = _Passes(model, allocation, itemsize, rows, work.width)
    size = passes.copies + _turned_bytes(passes, node)
    size += _head_bytes(passes, node, plan.graph)
    if not isinstance(node.function, Train):
        return Working(0, int(size + passes.forward))
    cut = cut_bytes(model, allocation)
    remat = role.remat(plan.calls[name].remat)
    accumulate = size + passes.backward(remat) + _gradient_bytes(passes)
    return Working(cut, int(max(accumulate, _update_bytes(role, allocation))))


class _Passes:
    """The bytes of layers, for the rows of a microbatch on one device.

    Attributes:
        num_tokens: of all its rows.
        copies: of the residual stream, around the stages.
    """

    def __init__(
        self,
        model: ModelConfig,
        allocation: Allocation,
        itemsize: int,
        rows: int,
        width: int,
    ):
        self.model, self.allocation, self.itemsize = model, allocation, itemsize
        is_cut = "sequence" in allocation.options
        self.layer = layer_values(model, allocation.tensor, allocation.expert, is_cut)
        self.num_tokens = rows // allocation.num_row_shards * width
        stages = allocation.stage
        pieces = num_pieces(rows, allocation.num_row_shards, stages)
        self._piece = self.num_tokens // (pieces if stages > 1 else 1)
        # A stage works, if only on what is thrown away, in every tick.
        self._num_ticks = pieces + stages - 1 if stages > 1 else 1
        self._num_layers = model.padded_num_layers // stages
        stream = self.layer.stream * itemsize
        whole = self.num_tokens + self._num_ticks * self._piece
        self.copies = stream * whole if stages > 1 else 0

    @property
    def forward(self) -> float:
        """One layer of one piece, beside its feed-forward weights."""
        layer = self._piece * self.layer.forward
        return (layer + feed_forward_weights(self.model, self.allocation)) * (
            self.itemsize
        )

    def backward(self, remat: str) -> float:
        """What layers keep, and one that is differentiated beside its weights."""
        layer, itemsize = self.layer, self.itemsize
        kept = layer.kept(remat) * self._num_layers * self._num_ticks
        values = self._piece * (kept + layer.backward(remat))
        values += layer_weights(self.model, self.allocation)
        # The gradients of the copies around the stages; that of the residual stream,
        # where it meets the embedding, and of the largest matrix, are in float32.
        size = values * itemsize + self.copies
        if self.model.adapters is not None:
            # Only adapters have gradients, and none of them is large.
            return size + 4 * self.num_tokens * layer.stream
        whole = largest_weights(self.model, self.allocation)
        if self.model.moe is not None and self.allocation.fsdp > 1:
            # Experts come in float32, and their gradients leave together.
            whole += feed_forward_weights(self.model, self.allocation)
        return size + 4 * (self.num_tokens * layer.stream + whole)


def num_kept(
    graph: DataflowGraph, node: ModelFunctionCall, vocab_size: Callable[[str], int]
) -> int:
    """Count the values of a token in the sets of tokens that a call has.

    Those that a sampler kept, and the likeliest ones by another model.

    Args:
        graph: of the algorithm.
        node: the call.
        vocab_size: of the role that samples.
    """
    keys, found = {*node.reads, *node.writes}, 0
    for writer in graph.calls.values():
        if isinstance(writer.function, Generate) and writer.key("kept") in keys:
            assert writer.role is not None  # It generates.
            form = kept_width(writer.function.sampling, vocab_size(writer.role))
            found += form[1] if form else 0
        if isinstance(writer.function, Infer):
            width = writer.function.num_top
            found += sum(width - 1 for key in writer.writes if width and key in keys)
    return found


def _head_bytes(
    passes: _Passes, node: ModelFunctionCall, graph: DataflowGraph
) -> float:
    """The head's matrix as it is used, and logits or sets of some tokens."""
    model, allocation = passes.model, passes.allocation
    if model.head != "language":
        return 0
    logits = 4.0 * passes.num_tokens * model.padded_vocab_size
    size = min(logits, HEAD_BYTES)
    # Sets in the order of the rows, and as the head reads them.
    kept = num_kept(graph, node, lambda _: model.vocab_size)
    size += 2 * 4 * passes.num_tokens * kept
    if node.needs_masters or allocation.fsdp > 1:
        # In the type of the products, and turned so that fsdp cuts the vocabulary.
        parts = allocation.tensor * allocation.stage * allocation.fsdp
        size += model.padded_vocab_size * model.width * passes.itemsize / parts
    return size


def _turned_bytes(passes: _Passes, node: ModelFunctionCall) -> float:
    """The experts of all layers, turned once before the loop over them.

    Gathers over fsdp and products with transposed matrices read what is adjacent.
    """
    model, allocation = passes.model, passes.allocation
    if model.moe is None or not (node.is_training or allocation.fsdp > 1):
        return 0
    layers = model.padded_num_layers // allocation.stage
    count = layers * feed_forward_weights(model, allocation) / allocation.fsdp
    return count * (4 if node.needs_masters else passes.itemsize)


def _gradient_bytes(passes: _Passes) -> float:
    """The gradient of a microbatch."""
    model, allocation = passes.model, passes.allocation
    size = cut_bytes(model, allocation)
    if allocation.stage > 1:
        # That of the layers, once as summed so far and once of this tick.
        is_whole = model.adapters is None
        size += 4 * cut_weights(model, allocation) if is_whole else size
    return size


def _update_bytes(role: Role, allocation: Allocation) -> float:
    """What an optimizer step takes beside what it replaces."""
    model, cut = role.model, cut_bytes(role.model, allocation)
    if role.config.optimizer.offload:
        # The moments of two layers: one comes, and one goes.
        return 2 * MOMENTS * cut / model.padded_num_layers
    if "zero1" in allocation.options:
        # Cut updates are gathered before they are added to whole parameters.
        place = Place(allocation, "float32")
        return cut + parameter_bytes(model, place) - base_bytes(model, place)
    return 0


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
    is_cut = "sequence" in allocation.options
    layer = layer_values(model, tensor, allocation.expert, is_cut)
    weights = layer_weights(model, allocation) * itemsize
    # Logits of the whole vocabulary on every device, after those of its own part.
    parts = 1 if tensor == 1 else 1 + 1 / tensor
    head = 4 * slots * model.padded_vocab_size * parts
    if allocation.fsdp > 1:
        matrix = model.padded_vocab_size * model.width * itemsize / tensor
        head += matrix + matrix / allocation.fsdp
    tokens = settings.chunk_tokens
    decode = weights + slots * layer.forward * itemsize
    prefill = weights + tokens * layer.forward * itemsize
    if not work.reads_pages:
        decode = max(decode, decode - weights + slots * gathered)
        scores = min(tokens * work.width * model.num_heads // tensor, MOST_SCORES)
        rows_of_chunk = min(slots, max(tokens // SHORTEST_CHUNK, 1))
        prefill += rows_of_chunk * gathered + (4 + itemsize) * scores
    form = kept_width(spec.sampling, model.vocab_size)
    # Tokens, log-probabilities and entropy of all rows, and the sets they kept.
    result = 4 * rows * work.width * (3 + (form[1] if form else 0))
    # One after the other in the same memory.
    return Working(result, int(max(decode, prefill, head)))
