"""Parcels, as each of several processes works them out for itself.

Eight devices stand for two processes of four, or four of two.
"""

import collections
import contextlib

import jax
import numpy as np
import pytest

from realjax.realloc import parcel_plans, parcels
from realjax.realloc.hosts import Hosts
from realjax.realloc.requests import Request
from realjax.realloc.routes import Layout, route
from tests.processes.pairs import random_tree


@contextlib.contextmanager
def process(monkeypatch, index, devices_per_process, is_counted_by_all):
    of = lambda device: device // devices_per_process
    with monkeypatch.context() as patch:
        patch.setattr(parcels, "hosts", lambda: Hosts.uniform(devices_per_process))
        patch.setattr(parcels, "is_counted_by_all", lambda: is_counted_by_all)
        patch.setattr(parcel_plans, "process_of", of)
        patch.setattr(parcel_plans, "is_ours", lambda device: of(device) == index)
        patch.setattr(jax, "process_index", lambda: index)
        yield


def links_of(requests, chunk_bytes):
    """What goes over each link, in order."""
    found = collections.defaultdict(list)
    for steps in parcel_plans.plan_chunks.__wrapped__(requests, chunk_bytes, False):
        for source, target, numbers in steps.links:
            for parcel in (steps.parcels[number] for number in numbers):
                content = (parcel.dtype, parcel.shape, parcel.pieces)
                found[source, target].append(content)
    return found


@pytest.mark.parametrize("devices_per_process, chunk_bytes", [(2, 1 << 20), (4, 200)])
def test_both_ends_of_a_link_expect_the_same(
    devices_per_process, chunk_bytes, monkeypatch
):
    values, sources, destinations = random_tree(5, 12)
    requests = tuple(
        Request(source, destination, value.shape, value.dtype, value.dtype)
        for value, source, destination in zip(
            values, sources, destinations, strict=True
        )
    )
    num_processes = 8 // devices_per_process
    by_process = []
    for index in range(num_processes):
        with process(monkeypatch, index, devices_per_process, False):
            by_process.append(links_of(requests, chunk_bytes))
        with process(monkeypatch, index, devices_per_process, True):
            everything = links_of(requests, chunk_bytes)
    bytes_on_links = 0
    for (source, target), content in everything.items():
        for index, links in enumerate(by_process):
            ends = {source // devices_per_process, target // devices_per_process}
            assert links.get((source, target), []) == (content if index in ends else [])
        bytes_on_links += sum(
            int(np.prod(shape)) * dtype.itemsize for dtype, shape, _ in content
        )
    assert bytes_on_links == sum(
        route(
            Layout.of(request.source),
            Layout.of(request.destination),
            request.shape,
            request.dtype,
            Hosts.uniform(devices_per_process),
        ).phase_bytes["across"]
        for request in requests
    )
    assert bytes_on_links > 0
