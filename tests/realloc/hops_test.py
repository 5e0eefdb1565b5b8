"""Hops: same device, same host, then across, once a host, in equal shares."""

import collections
import math
import random

import numpy as np

from realjax.realloc.hops import PHASES
from realjax.realloc.hosts import Hosts
from realjax.realloc.layouts import Layout
from realjax.realloc.routes import route

SHAPE = (24, 12, 36)
NUM_PAIRS = 300


def layout(mesh_shape, spec, devices=None):
    devices = range(math.prod(mesh_shape)) if devices is None else devices
    return Layout(devices=tuple(devices), mesh_shape=mesh_shape, spec=spec)


def random_layout(rng, num_devices):
    """Up to 40 devices in any order, up to three axes in any dimensions."""
    while True:
        mesh_shape = tuple(rng.choice([1, 2, 3, 4]) for _ in range(rng.randint(2, 3)))
        axes = rng.sample(range(len(mesh_shape)), len(mesh_shape))
        spec = [[] for _ in SHAPE]
        for axis in axes:
            if rng.random() < 0.6:
                spec[rng.choice([0, 0, 0, 1, 2])].append(axis)
        parts = [math.prod(mesh_shape[axis] for axis in entry) for entry in spec]
        divides = all(n % part == 0 for n, part in zip(SHAPE, parts, strict=True))
        size = math.prod(mesh_shape)
        if divides and size <= num_devices:
            devices = rng.sample(range(num_devices), size)
            if rng.random() < 0.5:
                devices.sort()
            return layout(mesh_shape, tuple(map(tuple, spec)), devices)


def random_case(seed):
    rng = random.Random(seed)
    num_devices = rng.choice([9, 20, 40])
    pair = random_layout(rng, num_devices), random_layout(rng, num_devices)
    if rng.random() < 0.5:
        return *pair, Hosts.uniform(rng.choice([1, 3, 4, 8]))
    num_hosts = rng.randint(1, 5)
    table = tuple((device, rng.randrange(num_hosts)) for device in range(num_devices))
    return *pair, Hosts(table=table)


def listed(hops):
    """The hops as (source, destination, piece, phase, is_relay)."""
    columns = (hops.sources, hops.destinations, hops.pieces, hops.phases, hops.is_relay)
    return [
        (source, destination, piece, PHASES[phase], is_relay)
        for source, destination, piece, phase, is_relay in zip(
            *(column.tolist() for column in columns), strict=True
        )
    ]


def mask(box):
    held = np.zeros(SHAPE, bool)
    held[tuple(slice(*interval) for interval in box)] = True
    return held


def union(boxes):
    return np.any([mask(box) for box in boxes] or [np.zeros(SHAPE, bool)], axis=0)


def on_hosts(found, hosts):
    """The boxes of a layout, by host."""
    boxes = collections.defaultdict(list)
    for device, box in found.boxes(SHAPE).items():
        boxes[hosts.of_device(device)].append(box)
    return boxes


def check(source, destination, hosts):
    """Compare a route with what masks of elements say."""
    found = route(source, destination, SHAPE, np.float32, hosts)
    held, wanted = source.boxes(SHAPE), destination.boxes(SHAPE)
    host_has = {h: union(boxes) for h, boxes in on_hosts(source, hosts).items()}
    host_needs = {h: union(boxes) for h, boxes in on_hosts(destination, hosts).items()}
    nothing = np.zeros(SHAPE, bool)
    least = {
        host: int((needs & ~host_has.get(host, nothing)).sum()) * 4
        for host, needs in host_needs.items()
    }
    came = {device: np.zeros(SHAPE, int) for device in destination.devices}
    entered, sizes = collections.Counter(), dict.fromkeys(PHASES, 0)
    hops = listed(found.hops)
    arrived = {(to, piece) for _, to, piece, phase, _ in hops if phase == "across"}
    for giver, taker, piece, phase, is_relay in hops:
        block = mask(found.box(piece))
        has = {d: (mask(held[d]) & block).any() for d in (giver, taker) if d in held}
        host = hosts.of_device(taker)
        came[taker] += block
        sizes[phase] += int(found.piece_bytes[piece])
        assert is_relay == (not has.get(giver, False))
        assert (phase == "on_device") == has.get(taker, False) == (giver == taker)
        assert (phase == "across") == (hosts.of_device(giver) != host)
        if is_relay:
            assert phase == "within" and (giver, piece) in arrived
        if phase == "across":
            assert not (host_has.get(host, nothing) & block).any()
            entered[piece, host] += 1
    for device, counts in came.items():
        assert (counts == mask(wanted[device])).all()
    assert max(entered.values(), default=1) == 1
    assert sizes == found.phase_bytes
    assert (
        found.phase_bytes["across"] == found.least_across_bytes == sum(least.values())
    )
    check_shares(found, hops)
    check_links(found, hops, hosts)


def check_shares(found, hops):
    """What devices send and receive is their share, to the pieces they deal."""
    names = ("sent_across", "received_across", "sent_within", "received_within")
    devices = found.loads.devices.tolist()
    sums = {name: dict.fromkeys(devices, 0) for name in names}
    for giver, taker, piece, phase, _ in hops:
        if phase != "on_device":
            size = int(found.piece_bytes[piece])
            sums[f"sent_{phase}"][giver] += size
            sums[f"received_{phase}"][taker] += size
    largest = int(found.piece_bytes.max())
    group = len(found.destination.devices)
    for name in names:
        shares = getattr(found.loads, name)
        # A relay sends its piece to all others of its group.
        slack = largest * (1 + group if name == "sent_within" else 1)
        assert (np.abs(shares - list(sums[name].values())) <= slack).all(), name
        assert 0 <= shares.sum() - sum(sums[name].values()) <= 2 * len(shares), name


def check_links(found, hops, hosts):
    by_link, by_host = collections.Counter(), collections.Counter()
    for giver, taker, piece, phase, _ in hops:
        if phase != "on_device":
            size = int(found.piece_bytes[piece])
            by_link[giver, taker] += size
            by_host[hosts.of_device(giver), hosts.of_device(taker)] += size
    for counted, columns in (
        (by_link, found.link_bytes()),
        (by_host, found.host_bytes()),
    ):
        rows = list(zip(*(column.tolist() for column in columns), strict=True))
        assert rows == sorted((*pair, size) for pair, size in counted.items())


def test_300_random_routes_agree_with_masks_of_elements():
    kinds = collections.Counter()
    for seed in range(NUM_PAIRS):
        source, destination, hosts = random_case(seed)
        check(source, destination, hosts)
        found = route(source, destination, SHAPE, np.float32, hosts)
        kinds["slice"] += found.kind == "slice"
        kinds["relay"] += bool(found.hops.is_relay.any())
        kinds["all"] += all(found.phase_bytes.values())
        kinds["unequal"] += len(np.unique(found.piece_bytes)) > 1
    # The cases are not the easy ones.
    assert min(kinds.values()) > 30 and kinds["slice"] > 200, kinds


def test_a_tile_enters_a_host_once_and_is_relayed():
    # One device of host 0 to four of host 1.
    found = route(
        layout((1,), ()), layout((4,), (), range(4, 8)), (8,), np.int8, Hosts.uniform(4)
    )
    assert listed(found.hops) == [
        (0, 4, 0, "across", False),
        (4, 5, 0, "within", True),
        (4, 6, 0, "within", True),
        (4, 7, 0, "within", True),
    ]
    assert found.phase_bytes == {"on_device": 0, "across": 8, "within": 24}


def test_devices_of_a_host_receive_for_each_other():
    # Four pieces for the two copies on host 1: each receives two and relays them.
    source = layout((4,), ((0,),))
    found = route(source, layout((2,), (), (4, 5)), (8,), np.int8, Hosts.uniform(4))
    assert [hop[:4] for hop in listed(found.hops)] == [
        (0, 4, 0, "across"),
        (4, 5, 0, "within"),
        (1, 4, 1, "across"),
        (4, 5, 1, "within"),
        (5, 4, 2, "within"),
        (2, 5, 2, "across"),
        (5, 4, 3, "within"),
        (3, 5, 3, "across"),
    ]
    assert found.loads.received_across.tolist() == [0, 0, 0, 0, 4, 4]


def test_a_holder_on_the_host_comes_before_others():
    # Copies on 0 and 4; 1 and 5 need them: each gets its own from its host.
    found = route(
        layout((2,), (), (0, 4)),
        layout((2,), (), (1, 5)),
        (8,),
        np.int8,
        Hosts.uniform(4),
    )
    assert [hop[:4] for hop in listed(found.hops)] == [
        (0, 1, 0, "within"),
        (4, 5, 0, "within"),
    ]


def test_copies_share_what_goes_across():
    # Four copies on host 0, one wanted on each of four other hosts.
    found = route(
        layout((4,), ()),
        layout((4,), (), (4, 8, 12, 16)),
        (8,),
        np.int8,
        Hosts.uniform(4),
    )
    assert [hop[:2] for hop in listed(found.hops)] == [(0, 4), (1, 8), (2, 12), (3, 16)]


def test_hops_group_by_link_in_sorted_order():
    found = route(layout((4,), ((0,),)), layout((2,), (), (9, 8)), (8,), np.int8)
    links = [
        (giver, taker, pieces.tolist()) for giver, taker, pieces in found.hops.by_link()
    ]
    assert links == [
        (device, taker, [device]) for device in range(4) for taker in (8, 9)
    ]
    relayed = route(
        layout((4,), ((0,),)), layout((2,), (), (4, 5)), (8,), np.int8, Hosts.uniform(4)
    ).hops
    relays = list(relayed.where(relayed.is_relay).by_link())
    assert [(*link[:2], link[2].tolist()) for link in relays] == [
        (4, 5, [0, 1]),
        (5, 4, [2, 3]),
    ]
    assert len(relayed.of("across")) == 4
    assert list(relayed.of("on_device").by_link()) == []
