"""Seconds of a call on an allocation, from what it computes, reads and sends.

    seconds = c_products x FLOPs / (FLOP/s)       of the device's data sheet
            + c_memory   x bytes / (byte/s)       of its memory
            + c_link     x bytes / (byte/s)       between devices of a node
            + c_network  x bytes / (byte/s)       between nodes
            + c_host     x bytes / (byte/s)       to and from host memory
            + s_layer    x layers run one after another
            + s_hop      x hand-overs between stages, and rounds of collectives
            + s_program  x programs launched

The first factor of each line is one of eight `Coefficients`; the rest, `Quantities`,
follows from the model, the lengths and the strategy. As the sum is linear, a few
measured calls or steps are enough to find the coefficients (`coefficients.fit`).
"""

import dataclasses
import math
from typing import Literal, NamedTuple

from realjax.models.config import ModelConfig
from realjax.parallel.allocation import Allocation
from realjax.planner.cluster import Cluster
from realjax.rollout.scheduler import chunk_shapes
from realjax.rollout.settings import Settings

Kind = Literal["generate", "infer", "train"]

# Bytes a parameter of an update of Adam reads and writes: parameter and two moments in
# and out, and the gradient in, all float32.
UPDATE_BYTES = 28
# The same of adding a microbatch's gradient to the sum: two read, one written.
ADD_BYTES = 12

# Numbers of a layer that a forward pass writes and reads again, for a token: of the
# hidden width by norms and sums, of each width that tensor cuts by what is between two
# products. The backward pass has three times as many: what it finds, the gradients that
# come and those that go.
RESIDUAL_NUMBERS, CUT_NUMBERS = 10, 2
BACKWARD_TRAFFIC = 3
# What is kept for it, instead of computed anew, also goes into a stack of all layers
# and out of it again: everything, or about half of it.
KEPT_TRAFFIC = {"none": 2.0, "dots": 1.0}

# Of devices that take turns on the cores of a machine, see `in_turns`.
IDLE_TURNS = 0.2

_ENGINE = Settings(slots=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallWork:
    """What a call has to do, wherever it runs.

    Attributes:
        kind: of the call.
        model: of its role.
        num_rows: B, sequences.
        prompt_tokens: mean of a sequence.
        new_tokens: mean of a sequence; 0 where prompt and completion are not told
            apart.
        most_new_tokens: of any sequence.
        num_updates: optimizer steps, each on as many of the rows.
        num_epochs: times each row is trained on.
        microbatch_tokens: of a row shard; 0 takes a minibatch at once, or with stages
            in twice as many parts as stages.
        pieces: that stages cut a microbatch into; 0 has microbatches themselves go
            through the stages, one behind the other.
        itemsize: bytes of a number in the products.
        remat: as of a role.
        slots: completions a row shard decodes at a time; 0 is all.
    """

    kind: Kind
    model: ModelConfig
    num_rows: int
    prompt_tokens: float
    new_tokens: float = 0.0
    most_new_tokens: int = 0
    num_updates: int = 1
    num_epochs: int = 1
    microbatch_tokens: int = 0
    pieces: int = 0
    itemsize: int = 2
    remat: str = "none"
    slots: int = 0

    @property
    def length(self) -> float:
        """Mean tokens of a sequence."""
        return self.prompt_tokens + self.new_tokens


class Quantities(NamedTuple):
    """What a call takes of the devices it runs on: of the busiest one of them.

    Attributes:
        products: seconds of its matrix products at the data sheet's rate.
        memory: seconds of its traffic with device memory, likewise.
        link: seconds of its traffic between devices of a node.
        network: seconds of its traffic between nodes.
        host: seconds of its traffic with host memory.
        layers: layers run one after another, each by its own few programs of a device.
        hops: hand-overs between stages, and rounds of collectives.
        programs: programs launched one after another.
    """

    products: float = 0.0
    memory: float = 0.0
    link: float = 0.0
    network: float = 0.0
    host: float = 0.0
    layers: float = 0.0
    hops: float = 0.0
    programs: float = 0.0

    def plus(self, other: "Quantities") -> "Quantities":
        """Add up, one after the other."""
        return Quantities(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, factor: float) -> "Quantities":
        """Repeat."""
        return Quantities(*(factor * a for a in self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coefficients:
    """How a kind of device does beside its data sheet.

    Attributes:
        products: times slower than the data sheet's matrix rate; at least 1 on a real
            machine.
        memory: the same of memory.
        link: the same of links within a node.
        network: the same of those between nodes.
        host: the same of links to host memory.
        layer_seconds: of a layer beside its products and traffic: of one decode step,
            or of the forward pass of a microbatch.
        hop_seconds: of a hand-over between stages, or a round of a collective.
        program_seconds: of a program beside its work.
    """

    products: float = 1.8
    memory: float = 1.4
    link: float = 1.5
    network: float = 1.5
    host: float = 1.3
    layer_seconds: float = 40e-6
    hop_seconds: float = 20e-6
    program_seconds: float = 1e-3

    def seconds(self, quantities: Quantities) -> float:
        """Return the seconds of some work."""
        return math.fsum(
            a * b for a, b in zip(dataclasses.astuple(self), quantities, strict=True)
        )


def quantities(work: CallWork, allocation: Allocation, cluster: Cluster) -> Quantities:
    """Return what a call takes on an allocation.

    Generation over stages is priced, as ReaL's plans have it, though no plan of ours
    does: every stage then waits for the others at every token.

    Args:
        work: of the call.
        allocation: its sizes and devices.
        cluster: the machine.
    """
    model = _Model(work.model, allocation, work.itemsize)
    of_kind = _generate if work.kind == "generate" else _packed
    return in_turns(of_kind(work, model, cluster), allocation.size, cluster)


def in_turns(found: Quantities, num_devices: int, cluster: Cluster) -> Quantities:
    """Return what devices take that share the cores of a machine.

    Each waits for the others with all it does: products and copies, and also the rounds
    and launches, which threads of a core take up; and a core is idle where all that
    take turns on it wait for those of another one, the fewer the more often. A program
    on one device spreads its products over all cores, of its traffic about half, and
    nothing else.

    Args:
        found: what one device takes on a core of its own.
        num_devices: that work at the same time.
        cluster: whose devices they are.
    """
    turns = cluster.turns(num_devices)
    if not cluster.concurrent_devices:
        return found
    if num_devices > 1:
        return found.times(max(turns, 1.0) + IDLE_TURNS)
    return found._replace(
        products=turns * found.products, memory=(1 + turns) / 2 * found.memory
    )


class _Model:
    """Counts of a model as one device has it."""

    def __init__(self, config: ModelConfig, allocation: Allocation, itemsize: int):
        self.config, self.allocation, self.itemsize = config, allocation, itemsize
        heads = config.num_heads + config.num_kv_heads
        self.attention = 2 * heads * config.head_dim * config.width
        matrices = 3 if config.is_gated else 2
        self.mlp = matrices * config.width * config.mlp_width
        self.num_experts = config.moe.num_experts if config.moe else 1
        self.top_k = config.moe.top_k if config.moe else 1
        is_language = config.head == "language"
        self.head = config.vocab_size * config.width if is_language else config.width
        self.embedding = config.vocab_size * config.width
        # The stack is padded so that every stage has as many layers.
        self.stage_layers = math.ceil(config.num_layers / allocation.stage)
        self.num_layers = allocation.stage * self.stage_layers
        self.num_matrices = 4 + matrices

    @property
    def used(self) -> float:
        """Parameters that one token is multiplied with, of all layers."""
        layer = self.attention + self.top_k * self.mlp
        return self.num_layers * layer + self.head

    @property
    def stored(self) -> float:
        """All parameters in matrices."""
        layer = self.attention + self.num_experts * self.mlp
        tied = self.embedding if self.config.tie_embeddings else 0
        return self.num_layers * layer + self.head + self.embedding - tied

    @property
    def trained(self) -> float:
        """Those that have gradients and moments."""
        if self.config.adapters is None:
            return self.stored
        head = self.head if self.config.head == "scalar" else 0
        return self.config.num_adapter_parameters + head

    @property
    def parts(self) -> int:
        """Devices over which one token's products are spread at the same time."""
        return self.allocation.tensor * self.allocation.stage

    def flops(self, num_tokens: float, context: float) -> float:
        """Of a forward pass over some tokens that each see `context` others."""
        config = self.config
        width = config.num_heads * config.head_dim
        scores = 4 * self.num_layers * width * context
        return num_tokens * (2 * self.used + scores)

    def read_bytes(self, num_tokens: float) -> float:
        """Of the parameters that a pass over some tokens reads, on one device."""
        seen = min(1.0, num_tokens * self.top_k / self.num_experts)
        layer = self.attention + seen * self.num_experts * self.mlp
        all_layers = self.num_layers * layer + self.head
        return self.itemsize * all_layers / (self.parts * self.allocation.expert)

    def activation_bytes(self, num_tokens: float) -> float:
        """Of hidden states that a forward pass writes and reads, on one device."""
        config = self.config
        heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
        mlp = self.top_k * self.mlp / config.width
        cut = CUT_NUMBERS * (heads + mlp) / self.allocation.tensor
        numbers = RESIDUAL_NUMBERS * config.width + cut
        return self.itemsize * num_tokens * self.stage_layers * numbers

    def cache_bytes(self, num_tokens: float) -> float:
        """Of keys and values of some tokens, of this device's layers and heads."""
        tensor = self.allocation.tensor
        heads = math.lcm(self.config.num_kv_heads, tensor) / tensor
        one = 2 * heads * self.config.head_dim * self.itemsize
        return num_tokens * self.stage_layers * one


def _generate(work: CallWork, model: _Model, cluster: Cluster) -> Quantities:
    allocation = model.allocation
    rows = work.num_rows / allocation.num_row_shards
    prompt = work.prompt_tokens
    chunks, size = _chunks(rows, prompt)
    prefill = Quantities()
    if chunks:
        prefill = _forward(work, model, cluster, chunks * size, prompt / 2, chunks)
    groups = min(allocation.stage, max(1, math.floor(rows)))
    slots = min(rows, work.slots or rows)
    # Slots are refilled as rows end; only the last rows leave some empty.
    longest = max(work.most_new_tokens, work.new_tokens)
    steps = rows * work.new_tokens / slots + (longest - work.new_tokens)
    context = prompt + work.new_tokens / 2
    tokens = rows * work.new_tokens
    # Stages: each reads its weights once for every group of rows.
    read = steps * groups * model.read_bytes(slots / groups)
    read += model.cache_bytes(tokens * context)
    flops = model.flops(tokens, context) / model.parts
    rounds = _rounds(model) * model.stage_layers * steps * groups
    # Where fsdp or expert cut the weights, every step gathers those of all layers.
    gathered = steps * groups * _gather_bytes(model)
    decode = Quantities(
        products=flops / cluster.device.flops_per_second,
        memory=read / cluster.device.bytes_per_second,
        layers=steps * groups * model.stage_layers,
        hops=rounds + (steps * groups if allocation.stage > 1 else 0),
        programs=steps / _ENGINE.steps,
    )
    hidden = tokens * model.config.width * model.itemsize
    decode = decode.plus(
        _sent(cluster, allocation.tensor, _reduced(allocation.tensor, hidden)).times(
            2 * model.stage_layers
        )
    )
    decode = decode.plus(_sent(cluster, _row_span(allocation), gathered))
    return prefill.plus(decode)


def _packed(work: CallWork, model: _Model, cluster: Cluster) -> Quantities:
    allocation = model.allocation
    tokens = work.num_rows * work.length * work.num_epochs / allocation.num_row_shards
    context = work.length / 2
    first = Quantities(programs=1.0)  # Makes what the others fill.
    if work.kind == "infer":
        passes = _num_microbatches(work, allocation, tokens)
        return _forward(work, model, cluster, tokens, context, passes).plus(first)
    updates = work.num_updates * work.num_epochs
    microbatches = updates * _num_microbatches(work, allocation, tokens / updates)
    forward = _forward(work, model, cluster, tokens, context, microbatches)
    # Backward is twice the work of forward; with remat forward runs again.
    again = 1.0 if work.remat in ("block", "offload") else 0.0
    if work.remat == "dots":  # All but the products with weights.
        again = 1 - model.flops(1, 0) / model.flops(1, context)
    touched_again = 0.0 if work.remat == "none" else 1.0
    # Beside adapters there are gradients of activations and none of weights.
    products = 2 if work.model.adapters is None else 1
    # Parameters are gathered again, and sums over tensor are as in the forward pass.
    backward = forward._replace(
        products=forward.products * (products + again),
        memory=forward.memory * (BACKWARD_TRAFFIC + touched_again),
        layers=forward.layers * (2 + again),
        link=forward.link * (1 + again),
        network=forward.network * (1 + again),
        hops=forward.hops * (1 + again),
        programs=0.0,
    )
    owned = model.trained / (model.parts * allocation.expert)
    cut = owned / allocation.fsdp
    # float32 gradients of every microbatch: scattered over fsdp, summed over data.
    scattered = 4 * owned * _kept_share(allocation.fsdp)
    summed = _reduced(allocation.data, 4 * cut)
    # Gradients are added up in every tick.
    bubble, ticks = _pipelined(work, allocation.stage, microbatches)
    touched = (ticks * ADD_BYTES + updates * UPDATE_BYTES) * cut
    touched += (
        KEPT_TRAFFIC.get(work.remat, 0.0)
        * bubble
        * model.activation_bytes(_padded_tokens(work, tokens, microbatches))
    )
    rounds = (allocation.fsdp > 1) * model.stage_layers + (allocation.data > 1)
    update = Quantities(
        memory=touched / cluster.device.bytes_per_second,
        hops=microbatches * model.num_matrices * rounds,
        programs=2 * updates,
    )
    sent = microbatches * (scattered + summed)
    gradients = _sent(cluster, _row_span(allocation), sent)
    return forward.plus(backward).plus(gradients).plus(update)


def _forward(
    work: CallWork,
    model: _Model,
    cluster: Cluster,
    tokens: float,
    context: float,
    passes: float,
) -> Quantities:
    """Return what a forward pass over one row shard's tokens takes.

    Args:
        work: of the call.
        model: as one device has it.
        cluster: the machine.
        tokens: of a row shard, in all microbatches.
        context: others that a token sees, in the mean.
        passes: microbatches.
    """
    allocation = model.allocation
    stage = allocation.stage
    passes = max(passes, 1.0)
    tokens = _padded_tokens(work, tokens, passes)
    bubble, ticks = _pipelined(work, stage, passes)
    hidden = tokens * model.config.width * model.itemsize
    sums = 2 * model.stage_layers * _reduced(allocation.tensor, hidden)
    found = Quantities(
        products=bubble
        * model.flops(tokens, context)
        / (model.parts * cluster.device.flops_per_second),
        memory=(
            ticks * model.read_bytes(tokens / passes)
            + bubble * model.activation_bytes(tokens)
        )
        / cluster.device.bytes_per_second,
        layers=ticks * model.stage_layers,
        hops=ticks * (_rounds(model) * model.stage_layers + (stage > 1)),
        programs=passes,
    )
    found = found.plus(_sent(cluster, allocation.tensor, bubble * sums))
    if stage > 1:
        # Stages are the slowest axis: the next one is on another node as soon as a
        # stage fills one.
        span = allocation.size
        found = found.plus(_sent(cluster, span, bubble * hidden))
    gathered = passes * _gather_bytes(model)
    found = found.plus(_sent(cluster, _row_span(allocation), gathered))
    if allocation.expert > 1:
        routed = 2 * model.stage_layers * model.top_k * hidden
        share = _kept_share(allocation.expert)
        found = found.plus(_sent(cluster, _row_span(allocation), routed * share))
    return found


def _padded_tokens(work: CallWork, tokens: float, passes: float) -> float:
    """Return the tokens of microbatches that all have one shape, also if not full."""
    return passes * work.microbatch_tokens if work.microbatch_tokens else tokens


def _pipelined(work: CallWork, stage: int, passes: float) -> tuple[float, float]:
    """Return how much longer than its own work a pipeline takes, and its ticks.

    The first and last stage idle while it fills and drains. In a tick every stage goes
    through its layers once; with one stage that is a microbatch.

    Args:
        work: of the call.
        stage: stages.
        passes: microbatches.
    """
    if stage > 1 and work.pieces:
        ticks = work.pieces + stage - 1
        return ticks / work.pieces, passes * ticks
    return (passes + stage - 1) / passes, passes + stage - 1


def _num_microbatches(work: CallWork, allocation: Allocation, tokens: float) -> float:
    if work.microbatch_tokens:
        return max(1.0, math.ceil(tokens / work.microbatch_tokens))
    if allocation.stage == 1:
        return 1.0
    return allocation.stage * (2.0 if work.kind == "train" else 1.0)


def _chunks(rows: float, prompt: float) -> tuple[float, int]:
    """Return the chunks in which a row shard's prompts are prefilled, and their size.

    Chunks have few shapes, and the work of one that is not full is that of a full one.

    Args:
        rows: of the row shard.
        prompt: tokens of each.
    """
    if not prompt:
        return 0.0, 0
    shapes = chunk_shapes(math.ceil(prompt), _ENGINE.chunk_tokens)
    width = shapes[-1][0]
    fitting = [count for size, count in shapes if size == width]
    count = next((n for n in fitting if n >= rows), fitting[-1])
    return math.ceil(rows / count) * math.ceil(prompt / width), width * count


def _rounds(model: _Model) -> int:
    """Return the rounds of collectives in a forward pass through one layer."""
    gathers = model.num_matrices if model.allocation.fsdp > 1 else 0
    return gathers + (2 if model.allocation.tensor > 1 else 0)


def _gather_bytes(model: _Model) -> float:
    """Of the weights of all of a device's layers that fsdp gathers in one pass."""
    share = _kept_share(model.allocation.fsdp)
    of_device = model.stored / (model.parts * model.allocation.expert)
    return model.itemsize * of_device * share


def _kept_share(parts: int) -> float:
    """Of an array in equal parts, what a device gets of the others or gives them."""
    return (parts - 1) / parts


def _reduced(parts: int, num_bytes: float) -> float:
    """Bytes a device sends when an array is summed over devices by a ring."""
    return 2 * _kept_share(parts) * num_bytes


def _row_span(allocation: Allocation) -> int:
    """Devices among which the axes of rows reach; tensor is within."""
    return allocation.num_row_shards * allocation.tensor


def _sent(cluster: Cluster, span: int, num_bytes: float) -> Quantities:
    """Return what it takes each device of a range to send some bytes to the others."""
    if span <= cluster.devices_per_node:
        return Quantities(link=num_bytes / cluster.link_bytes_per_second)
    return Quantities(network=num_bytes / cluster.network_bytes_per_second)
