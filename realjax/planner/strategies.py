"""Which allocations a call may have: aligned ranges of devices, and splits of them.

    8 devices     0-7   0-3 4-7   0-1 2-3 4-5 6-7   0 1 2 … 7
    of 4          d4  f4  t4  d2t2  f2t2  d2f2  s2t2  …

A range is a power of two devices of a node, or whole nodes, again a power of two of
them (or all there are), and begins at a multiple of its own size: two ranges are then
one within the other, or apart.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from realjax.models.config import ModelConfig
from realjax.parallel.allocation import Allocation
from realjax.parallel.sharding import check_fit
from realjax.planner.cluster import Cluster

Range = tuple[int, int]
"""First device, and how many."""

AXES = ("data", "fsdp", "tensor", "stage", "expert")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """Which allocations are looked at.

    Attributes:
        axes: of strategies.
        smallest_range: devices that a call has at least.
        generates_in_stages: also where a call generates; every stage then waits for the
            others at every token, and no run takes such a plan.
        varies: whether the rows of microbatches and what is computed anew are part of
            an option.
        offloads: whether waiting in host memory is, if they are.
    """

    axes: tuple[str, ...] = AXES
    smallest_range: int = 1
    generates_in_stages: bool = False
    varies: bool = True
    offloads: bool = True


REAL = Rules(
    axes=("data", "tensor", "stage"),
    smallest_range=4,
    generates_in_stages=True,
    varies=False,
)
"""Those of ReaL's search: halves of a node of 8 or whole nodes, and its three axes."""


def range_sizes(cluster: Cluster) -> tuple[int, ...]:
    """Return the sizes of ranges, the smallest first."""
    of_node = cluster.devices_per_node
    sizes = {size for size in _powers(of_node)} | {of_node}
    sizes |= {of_node * count for count in _powers(cluster.num_nodes)}
    return tuple(sorted(sizes | {cluster.num_devices}))


def ranges(cluster: Cluster, rules: Rules | None = None) -> tuple[Range, ...]:
    """Return all ranges of a cluster, the largest first."""
    found = []
    for size in reversed(range_sizes(cluster)):
        if rules is not None and size < rules.smallest_range:
            continue
        if size >= cluster.devices_per_node:
            starts = range(0, cluster.num_devices - size + 1, size)
        else:
            # Within each node, from its own first device on.
            starts = (
                node + start
                for node in range(0, cluster.num_devices, cluster.devices_per_node)
                for start in range(0, cluster.devices_per_node - size + 1, size)
            )
        found += [(start, size) for start in starts]
    return tuple(found)


def strategies(
    num_devices: int,
    model: ModelConfig,
    cluster: Cluster,
    *,
    num_rows: int,
    is_generating: bool = False,
    rules: Rules | None = None,
) -> Iterator[Allocation]:
    """Go over the strategies of a call on the first devices of a cluster.

    Args:
        num_devices: of the call.
        model: of its role.
        cluster: the machine; tensor and expert stay within a node.
        num_rows: sequences it has at a time, at least one for every row shard.
        is_generating: leaves out stages, which would wait for each other at every
            token, if the rules do.
        rules: None is `Rules()`.
    """
    rules = rules or Rules()
    for sizes in factorizations(num_devices, len(rules.axes)):
        named: dict[str, Any] = dict.fromkeys(AXES, 1)
        named |= dict(zip(rules.axes, sizes, strict=True))
        if named["tensor"] * named["expert"] > cluster.devices_per_node:
            continue
        if is_generating and named["stage"] > 1 and not rules.generates_in_stages:
            continue
        if named["stage"] > model.num_layers:
            continue
        allocation = Allocation(**named)
        if allocation.num_row_shards > num_rows:
            continue
        try:
            check_fit(allocation, model)
        except ValueError:
            continue
        yield allocation


def factorizations(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """Go over the ways to write a number as a product of so many factors, in order.

    Example:
        >>> list(factorizations(4, 2))
        [(1, 4), (2, 2), (4, 1)]
    """
    if count == 1:
        yield (number,)
        return
    for first in _divisors(number):
        for rest in factorizations(number // first, count - 1):
            yield (first, *rest)


def _powers(limit: int) -> Iterator[int]:
    return itertools.takewhile(lambda n: n <= limit, (2**k for k in itertools.count()))


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
