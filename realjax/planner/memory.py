"""How much memory an execution plan takes, from shapes alone.

What roles keep and copies of it are counted exactly: they are arrays whose shardings
are known. What a call works with (activations, caches, gradients) is estimated from
the sizes of the model, to a quarter of what XLA takes for 8B programs on H200s.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence

import jax
import numpy as np

from pallas_kernels.paged_attention.reference import MOST_SCORES
from realjax.dataflow import schedule as schedule_lib
from realjax.dataflow.account import Account, Sizes, account
from realjax.dataflow.graph import DataflowGraph
from realjax.dataflow.plan import ExecutionPlan
from realjax.functions.function import Generate, Train
from realjax.functions.role import Role
from realjax.models import pages, quantized, transformer
from realjax.models.config import ModelConfig
from realjax.models.partition import Partition
from realjax.parallel.allocation import Allocation
from realjax.parallel.mesh import abstract_mesh
from realjax.parallel.sharding import bytes_per_device, padded_for
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

PIECES = 0.25
"""The most that is on its way at the same time, of a copy: reallocation keeps to it."""

MOMENTS = 2
"""Arrays like the masters that the optimizer keeps: Adam's two."""


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


def memory_account(
    graph: DataflowGraph,
    plan: ExecutionPlan,
    roles: Mapping[str, Role],
    work: Work,
    *,
    limit_bytes: int = 0,
) -> Account:
    """Make a plan's schedule and count what every device holds at every step of it.

    Nothing is refused here: ask `Account.fits`, or let `Account.check` say why not.

    Args:
        graph: of the algorithm.
        plan: allocations.
        roles: models, types and optimizers, by name.
        work: shapes of a step.
        limit_bytes: of a device. The schedule issues copies as early as it allows; 0
            is not known.
    """
    count = account_counter(graph, plan, roles, work, limit_bytes=limit_bytes)
    steps = schedule_lib.make_schedule(
        graph,
        plan,
        {name: role.dtype for name, role in roles.items()},
        streamed=streamed_roles(roles),
        fits=(lambda steps: count(steps).fits) if limit_bytes else None,
    )
    return count(steps)


def account_counter(
    graph: DataflowGraph,
    plan: ExecutionPlan,
    roles: Mapping[str, Role],
    work: Work,
    *,
    limit_bytes: int = 0,
) -> Callable[[Sequence[schedule_lib.Step]], Account]:
    """Return the function that counts for any schedule of a plan; see above."""
    sizes = memory_sizes(graph, plan, roles, work)
    dtypes = {name: role.dtype for name, role in roles.items()}
    homes = schedule_lib.home_places(graph, plan, dtypes)
    return lambda steps: account(
        steps, graph, plan, homes, sizes, limit_bytes=limit_bytes
    )


def fit_pools(
    graph: DataflowGraph,
    plan: ExecutionPlan,
    roles: Mapping[str, Role],
    work: Work,
    *,
    limit_bytes: int,
) -> ExecutionPlan:
    """Give pools of keys and values what the rest of a plan leaves free.

    A pool that the plan gives no pages gets as many as any completions take, or if
    those do not fit as many as do. With fewer, rows give way to others and come back.
    One that would be too small for a single row is left as it is, for
    `Account.check` to refuse.

    Args:
        graph: of the algorithm.
        plan: allocations.
        roles: models, types and optimizers, by name.
        work: shapes of a step.
        limit_bytes: of a device.
    """
    found = memory_account(graph, plan, roles, work, limit_bytes=limit_bytes)
    if found.fits:
        return plan
    sizes, calls = memory_sizes(graph, plan, roles, work), dict(plan.calls)
    open_pools = {n: s for n, s in sizes.pools.items() if not plan.calls[n].pages}
    left = _shares(open_pools, plan, found)
    num_rows = work.num_rows
    for name in graph.order():
        node = graph.calls[name]
        if not isinstance(node.function, Generate) or name not in calls:
            continue
        num_rows *= node.function.completions_per_prompt
        if name not in open_pools:
            continue
        role = roles[node.role]  # pyright: ignore[reportArgumentType]: it generates
        num_pages = left[name] // _page_bytes(plan, name, role)
        room = _room(plan, name, role.model, num_rows, work)
        is_less = left[name] < open_pools[name]
        if is_less and num_pages >= room.needed_pages(work.width):
            shards = calls[name].allocation.num_row_shards
            calls[name] = dataclasses.replace(calls[name], pages=num_pages * shards)
    return dataclasses.replace(plan, calls=calls)


def _shares(
    pools: Mapping[str, int], plan: ExecutionPlan, found: Account
) -> dict[str, int]:
    """Return what is left of pools when those of a device share what is too much."""
    left = dict(pools)
    for group, peak in zip(found.groups, found.peak_bytes.tolist(), strict=True):
        here = [n for n in pools if group[0] in plan.calls[n].allocation.devices]
        excess, total = max(peak - found.limit_bytes, 0), sum(pools[n] for n in here)
        for name in here:
            share = pools[name] - math.ceil(excess * pools[name] / total)
            left[name] = min(left[name], share)
    return left


def memory_sizes(
    graph: DataflowGraph, plan: ExecutionPlan, roles: Mapping[str, Role], work: Work
) -> Sizes:
    """Count the bytes of everything a plan's schedule moves or works with.

    Args:
        graph: of the algorithm.
        plan: allocations.
        roles: models, types and optimizers, by name.
        work: shapes of a step.
    """
    dtypes = {name: role.dtype for name, role in roles.items()}
    homes = schedule_lib.home_places(graph, plan, dtypes)
    parts, copies, moving, arriving = {}, {}, {}, {}
    working, batch, pools = {}, {}, {}
    for name, home in homes.items():
        parts[name, "parameters"] = _parameter_bytes(roles[name].model, home)
        parts[name, "optimizer"] = MOMENTS * _cut_bytes(
            roles[name].model, home.allocation
        )
    num_rows = work.num_rows
    for name in graph.order():
        node = graph.calls[name]
        if name not in plan.calls:
            continue
        allocation = plan.calls[name].allocation
        if isinstance(node.function, Generate):
            num_rows *= node.function.completions_per_prompt
        batch[name] = _batch_bytes(graph, name, roles, num_rows, work, allocation)
        if node.role is None:
            continue
        place = schedule_lib.place_of(graph, plan, dtypes, name)
        if place.key != homes[node.role].key:
            key = (node.role, place.key)
            model = roles[node.role].model
            whole = _parameter_bytes(model, dataclasses.replace(place, weights=""))
            copies[key] = _parameter_bytes(model, place)
            moving[key] = int(PIECES * whole)
            # It arrives whole, and is quantized matrix by matrix.
            arriving[key] = whole - copies[key]
        working[name] = _working_bytes(plan, name, node, roles, num_rows, work)
        if isinstance(node.function, Generate):
            pools[name] = _pool_bytes(plan, name, roles[node.role], num_rows, work)
    return Sizes(
        parts=parts,
        copies=copies,
        moving=moving,
        arriving=arriving,
        working=working,
        batch=batch,
        pools=pools,
        streamed=streamed_roles(roles),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallBytes:
    """What a call takes on each of its devices, wherever those are.

    Attributes:
        masters: parameters of its role in float32, with the optimizer's moments if the
            call trains.
        copy: parameters in the type it computes in.
        working: while it runs, beside parameters.
        pool: keys and values that stay, of a call that generates.
        batch: keys of the batch that it reads and writes.
    """

    masters: int = 0
    copy: int = 0
    working: int = 0
    pool: int = 0
    batch: int = 0


def call_bytes(
    graph: DataflowGraph,
    plan: ExecutionPlan,
    name: str,
    roles: Mapping[str, Role],
    num_rows: int,
    work: Work,
) -> CallBytes:
    """Count the bytes of one call alone.

    Args:
        graph: of the algorithm.
        plan: needs only this call's allocation.
        name: of the call.
        roles: models, types and optimizers, by name.
        num_rows: sequences that it takes.
        work: shapes of a step.
    """
    node, allocation = graph.calls[name], plan.calls[name].allocation
    batch = _batch_bytes(graph, name, roles, num_rows, work, allocation)
    if node.role is None:
        return CallBytes(batch=batch)
    padded = padded_for(roles[node.role].model, [allocation])
    role = dataclasses.replace(roles[node.role], model=padded)
    roles = {**roles, role.name: role}
    masters = _parameter_bytes(role.model, schedule_lib.Place(allocation, "float32"))
    if node.is_training:
        masters += MOMENTS * _cut_bytes(role.model, allocation)
    dtypes = {name: role.dtype for name, role in roles.items()}
    pool = 0
    if isinstance(node.function, Generate):
        pool = _pool_bytes(plan, name, role, num_rows, work)
    return CallBytes(
        masters=masters,
        copy=_parameter_bytes(
            role.model, schedule_lib.place_of(graph, plan, dtypes, name)
        ),
        working=_working_bytes(plan, name, node, roles, num_rows, work),
        pool=pool,
        batch=batch,
    )


def streamed_roles(roles: Mapping[str, Role]) -> frozenset[str]:
    """Roles whose moments stay in host memory all the time."""
    return frozenset(
        name
        for name, role in roles.items()
        if role.is_trained and role.config.optimizer.offload
    )


def _parameter_bytes(model: ModelConfig, place: schedule_lib.Place) -> int:
    return bytes_per_device(
        quantized.abstract(transformer.abstract_parameters(model), place.weights),
        abstract_mesh(place.allocation),
        dtype=jax.numpy.dtype(place.dtype),
        options=place.allocation.options,
    )


def _cut_bytes(model: ModelConfig, allocation: Allocation) -> int:
    """Of float32 arrays like the parameters, cut over fsdp also with zero1."""
    tree, mesh = transformer.abstract_parameters(model), abstract_mesh(allocation)
    return bytes_per_device(tree, mesh, dtype=np.float32)


def _batch_bytes(graph, name, roles, num_rows, work, allocation: Allocation) -> int:
    node = graph.calls[name]
    shards = allocation.num_row_shards
    num_tokens = -(-num_rows // shards) * work.width
    keys: Collection[str] = {*node.reads, *node.writes}
    size = 4 * num_tokens * len(keys)
    for writer in graph.calls.values():
        if isinstance(writer.function, Generate) and writer.key("kept") in keys:
            vocab_size = roles[writer.role].model.vocab_size
            form = kept_width(writer.function.sampling, vocab_size)
            size += 4 * num_tokens * (form[1] if form else 0)
    return size


def _working_bytes(plan, name, node, roles, num_rows: int, work: Work) -> int:
    """What a call of a role needs beside parameters, moments and the batch."""
    role, allocation = roles[node.role], plan.calls[name].allocation
    model, itemsize = role.model, jax.numpy.dtype(role.dtype).itemsize
    if isinstance(node.function, Generate):
        settings = plan.rollout_settings(name, num_rows=num_rows)
        rows = -(-num_rows // allocation.num_row_shards)
        return _generate_bytes(
            node.function, model, allocation, itemsize, rows, settings, work
        )
    if node.is_following:
        return _parameter_bytes(model, schedule_lib.Place(allocation, "float32"))
    rows = plan.num_rows(name, max_rows=num_rows, row_length=work.width)
    num_tokens = rows // allocation.num_row_shards * work.width // allocation.stage
    layer = _layer_bytes(model, allocation, itemsize, num_tokens)
    size = int((2 if node.is_training else FORWARD_SHARE) * layer)
    size += _gathered_bytes(model, allocation, itemsize)
    size += _head_bytes(model, allocation, itemsize, num_tokens)
    if isinstance(node.function, Train):
        layers = -(-model.padded_num_layers // allocation.stage)
        remat = role.remat(plan.calls[name].remat)
        kept = _kept_bytes(model, allocation, itemsize, num_tokens, remat)
        # Every microbatch that is under way in a pipeline keeps its own.
        size += kept * layers * allocation.stage
        # The sums over the minibatch, and the gradient of this microbatch.
        size += 2 * _cut_bytes(model, allocation)
        if role.config.optimizer.offload:
            layer = MOMENTS * _cut_bytes(model, allocation) // model.padded_num_layers
            size += 2 * layer
    return size


def _room(plan, name, model, num_rows: int, work: Work) -> Room:
    return room_of(
        model,
        plan.rollout_settings(name, num_rows=num_rows),
        width=work.width,
        num_shards=plan.calls[name].allocation.num_row_shards,
    )


def _pool_bytes(plan, name, role: Role, num_rows: int, work: Work) -> int:
    room = _room(plan, name, role.model, num_rows, work)
    return room.num_pages * _page_bytes(plan, name, role)


def _page_bytes(plan, name, role: Role) -> int:
    """Of one page on each of the devices that have a part of it."""
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
) -> int:
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
    return max(decode, prefill) + result


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
    layers = transformer.abstract_parameters(model)["layers"]
    count = 2 * _count_of_layer(layers)
    return count * itemsize // (allocation.tensor * allocation.expert)


def _feed_forward_bytes(model, allocation: Allocation, itemsize: int) -> int:
    """The feed-forward weights of one layer, out of the stack or gathered."""
    layers = transformer.abstract_parameters(model)["layers"]
    count = _count_of_layer(layers["moe" if model.moe else "mlp"])
    return count * itemsize // (allocation.tensor * allocation.expert)


def _count_of_layer(stacks) -> int:
    leaves = jax.tree.leaves(stacks, is_leaf=lambda node: hasattr(node, "axes"))
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
