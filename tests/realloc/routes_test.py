"""Routes: every block arrives once, from a device that has it, and none travels twice.

Nothing here touches a device; layouts are plain numbers.
"""

import collections
import math
import random

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from realjax.models.config import ModelConfig
from realjax.models.transformer import abstract_parameters
from realjax.parallel import Allocation, make_mesh, parameter_shardings
from realjax.realloc.hosts import Hosts
from realjax.realloc.routes import Layout, route

SHAPE = (8, 16, 24)


def layout(mesh_shape, spec, devices=None):
    devices = range(math.prod(mesh_shape)) if devices is None else devices
    return Layout(devices=tuple(devices), mesh_shape=mesh_shape, spec=spec)


def random_layout(rng, num_devices=20):
    mesh_shape = tuple(rng.choice([1, 2, 4]) for _ in range(2))
    devices = rng.sample(range(num_devices), math.prod(mesh_shape))
    axes = rng.choice([[], [(0,)], [(1,)], [(0,), (1,)], [(1,), (0,)], [(1, 0)]])
    spec = [()] * len(SHAPE)
    for entry, dimension in zip(
        axes, rng.sample(range(len(SHAPE)), len(axes)), strict=True
    ):
        spec[dimension] = entry
    return layout(mesh_shape, tuple(spec), devices)


def random_pairs(number):
    rng = random.Random(0)
    return [(random_layout(rng), random_layout(rng)) for _ in range(number)]


def indices(box):
    return tuple(slice(*interval) for interval in box)


def held_bytes(found, shape=SHAPE, itemsize=4):
    """The least that must move: what each device needs and does not have."""
    source, destination = (side.boxes(shape) for side in found)
    least = 0
    for device, wanted in destination.items():
        need, have = np.zeros(shape, bool), np.zeros(shape, bool)
        need[indices(wanted)] = True
        if device in source:
            have[indices(source[device])] = True
        least += int((need & ~have).sum()) * itemsize
    return least


def test_a_dimension_is_cut_where_either_layout_cuts_it():
    # 12 rows in 3 parts of 4 become 2 parts of 6: cuts at 4, 6 and 8.
    found = route(layout((3,), ((0,),)), layout((2,), ((0,),)), (12,), np.float32)
    assert found.boxes[:, 0].tolist() == [[0, 4], [4, 6], [6, 8], [8, 12]]
    assert list(found.moves) == [
        (0, 0, ((0, 4),)),
        (1, 0, ((4, 6),)),
        (1, 1, ((6, 8),)),
        (2, 1, ((8, 12),)),
    ]
    # Device 0 misses rows 4 and 5; device 1 has 6 and 7 and misses 8 to 11.
    assert found.bytes_moved == (2 + 4) * 4
    assert found.max_received_bytes == 4 * 4
    assert found.max_sent_bytes == 4 * 4


@pytest.mark.parametrize("pair", random_pairs(60))
def test_every_block_arrives_once_from_a_device_that_has_it(pair):
    source, destination = pair
    held, wanted = source.boxes(SHAPE), destination.boxes(SHAPE)
    painted = {device: np.zeros(SHAPE, int) for device in destination.devices}
    for giver, taker, box in route(source, destination, SHAPE, np.float32).moves:
        inside = zip(box, held[giver], strict=True)
        assert all(
            low <= start and stop <= high for (start, stop), (low, high) in inside
        )
        painted[taker][indices(box)] += 1
    for device, counts in painted.items():
        assert (counts[indices(wanted[device])] == 1).all()
        assert counts.sum() == counts[indices(wanted[device])].size


@pytest.mark.parametrize("pair", random_pairs(60))
def test_bytes_moved_is_the_least_possible_and_what_the_moves_add_up_to(pair):
    found = route(*pair, SHAPE, np.float32)
    sources, destinations, pieces = found.device_moves
    crossing = found.piece_bytes[pieces] * (sources != destinations)
    assert found.bytes_moved == held_bytes(pair) == crossing.sum()
    received = np.bincount(destinations, weights=crossing)
    assert found.max_received_bytes == received.max()
    # Shares are equal to within one piece.
    sent = np.bincount(sources, weights=crossing)
    assert sent.max() <= found.max_sent_bytes + found.piece_bytes.max()


def test_the_copies_of_a_tile_share_the_sending():
    # Four copies on 0-3, four new devices: each old device serves one new one.
    found = route(
        layout((4,), ()), layout((2, 2), ((), (1,)), range(4, 8)), SHAPE, np.float32
    )
    senders = collections.Counter(giver for giver, _, _ in found.moves)
    assert senders == {0: 1, 1: 1, 2: 1, 3: 1}


def test_bytes_count_the_type_on_the_way():
    pair = layout((2,), ((0,),)), layout((2,), ((1,),) * 0, (2, 3))
    whole = route(*pair, SHAPE, np.float32).bytes_moved
    assert route(*pair, SHAPE, jax.numpy.bfloat16).bytes_moved == whole // 2


def test_a_route_is_worked_out_once():
    pair = layout((2,), ((0,),)), layout((2,), ((0,),), (1, 2))
    again = layout((2,), ((0,),)), layout((2,), ((0,),), (1, 2))
    assert route(*pair, SHAPE, np.float32) is route(*again, SHAPE, np.float32)


@pytest.mark.parametrize(
    "source, destination, kind",
    [
        ("d2f2t2", "d2f2t2", "none"),
        ("f8", "t8", "jit"),  # all-to-all
        ("t4@4-7", "f4@4-7", "jit"),
        ("f4t2", "d4t2", "slice"),  # gather
        ("d8", "f2t4", "slice"),  # slice in place
        ("t8", "d8", "slice"),
        ("f4@0-3", "f4@4-7", "put"),
        ("t2@0-1", "t2@6,7", "put"),
        ("f4@0-3", "t4@4-7", "slice"),
        ("t2@0-1", "t4@0-3", "slice"),
        ("t4@0-3", "t4@3,2,1,0", "slice"),  # the same devices in another order
        ("f2@0-1", "f2@1-2", "slice"),  # device 1 in both
        ("f8", "f4t2", "slice"),  # two dimensions
        # The compiler would build whole arrays on every device.
        ("d2f2t2", "t8", "slice"),
        ("f8", "d2t4", "slice"),
        ("d4f2", "d2t4", "slice"),
    ],
)
def test_the_cheapest_way_is_taken(source, destination, kind):
    axes, shape = ("embed", "mlp"), (16, 32)
    layouts = [
        Layout.of(parameter_shardings(axes, make_mesh(Allocation.parse(text))))
        for text in (source, destination)
    ]
    assert route(*layouts, shape, np.float32).kind == kind


def test_one_layout_under_two_names_is_no_move():
    rows = PartitionSpec(("data", "fsdp"))
    by_data, by_fsdp, by_both = (
        Layout.of(NamedSharding(make_mesh(Allocation.parse(text)), rows))
        for text in ("d4", "f4", "d2f2")
    )
    assert route(by_data, by_fsdp, (8,), np.int32).kind == "none"
    assert route(by_both, by_fsdp, (8,), np.int32).kind == "none"


def test_replicated_kv_heads_stay_home_when_tensor_grows():
    # 8 query heads, 2 kv heads: t8 keeps whole keys everywhere, so from d8 nothing
    # moves, and from t2 each device lacks the half it did not have.
    config = ModelConfig(
        vocab_size=64,
        width=16,
        num_layers=2,
        num_heads=8,
        num_kv_heads=2,
        head_dim=4,
        mlp_width=32,
    )
    key = abstract_parameters(config)["layers"]["attention"]["key"]["kernel"]
    d8, t2, t8 = (
        Layout.of(parameter_shardings(key, make_mesh(Allocation.parse(text))))
        for text in ("d8", "t2@0-1", "t8")
    )
    size = math.prod(key.shape) * 4
    assert route(d8, t8, key.shape, np.float32).kind == "none"
    # Devices 0 and 1 lack a half each, the other six all of it.
    assert route(t2, t8, key.shape, np.float32).bytes_moved == 2 * size // 2 + 6 * size


def test_pieces_do_not_grow_with_devices_layers_or_size():
    # 4096 devices: d64f8t8 to d256t16, [layer, embed, heads, head_dim].
    spec = ((), (1,), (2,))
    source = layout((64, 8, 8), spec)
    destination = layout((256, 1, 16), spec, range(2048, 2048 + 4096))
    found = route(source, destination, (80, 8192, 64, 128), np.float32)
    assert len(found.boxes) == 8 * 16
    assert found.kind == "slice"
    # Each of 4096 devices takes 1/16 of the array; half of them have 1/8 of a half.
    size = 80 * 8192 * 64 * 128 * 4
    assert found.bytes_moved <= 4096 * size // 16
    assert found.max_received_bytes == size // 16
    assert len(found.device_moves[0]) == 4096 * 8


def test_scalars_and_empty_arrays_have_routes():
    pair = layout((2,), ()), layout((2,), (), (2, 3))
    assert route(*pair, (), np.int32).bytes_moved == 2 * 4
    pair = layout((2,), ((0,),)), layout((4,), ((0,),))
    empty = route(*pair, (0, 3), np.float32)
    assert empty.bytes_moved == empty.max_received_bytes == empty.max_sent_bytes == 0
    assert list(empty.moves) == []


def test_parts_must_be_equal():
    with pytest.raises(ValueError, match=r"shape \(6, 4\) does not divide into 4×1"):
        route(layout((4,), ((0,),)), layout((1,), ()), (6, 4), np.float32)
    with pytest.raises(ValueError, match="names 2 dimensions"):
        route(layout((2,), ((0,), ())), layout((1,), ()), (6,), np.float32)


def test_a_mesh_counts_its_devices():
    with pytest.raises(ValueError, match="has 4 places and 3 devices"):
        layout((2, 2), (), (0, 1, 2))


@pytest.mark.parametrize("devices_per_host", [1, 8, 512])
def test_totals_of_thousands_of_devices_list_no_hops(devices_per_host):
    # Every one of 4096 devices needs what 512 hold: two million hops.
    spec = ((), (0,), (1,))
    source = layout((512, 8), spec)
    destination = layout((512, 8), ((), (), (1,)), range(4095, -1, -1))
    hosts = Hosts.uniform(devices_per_host)
    found = route(source, destination, (32, 4096, 8), np.float32, hosts)
    loads, sizes = found.loads, found.phase_bytes
    assert "hops" not in vars(found)
    tile_bytes = 32 * 4096 * 4
    assert sum(sizes.values()) == 4096 * tile_bytes
    # Device n is wanted as 4095 - n, of the other parity: nobody keeps anything.
    assert sizes["on_device"] == 0
    # A host needs its tiles less what it has of them: of each of its m tiles m / 8 of
    # the 4096 columns where m = 8, and all of what 64 rows of devices hold for 512.
    held = {1: 0, 8: 8 * tile_bytes // 512, 512: 8 * tile_bytes // 8}[devices_per_host]
    needed = min(devices_per_host, 8) * tile_bytes
    assert sizes["across"] == 4096 // devices_per_host * (needed - held)
    assert loads.sent_across.sum() == loads.received_across.sum() == sizes["across"]


def test_layers_do_not_change_what_is_worked_out():
    spec = ((), (1,), (2,))
    source, destination = layout((4, 8, 8), spec), layout((16, 1, 16), spec)
    shallow, deep = (
        route(source, destination, (layers, 64, 16), np.float32, Hosts.uniform(8))
        for layers in (32, 128)
    )
    assert (deep.piece_bytes == 4 * shallow.piece_bytes).all()
    assert deep.phase_bytes == {k: 4 * v for k, v in shallow.phase_bytes.items()}
    for name in ("sources", "destinations", "pieces", "phases", "is_relay"):
        assert (getattr(deep.hops, name) == getattr(shallow.hops, name)).all()


def test_a_device_holds_what_it_had_and_gets_and_what_flies():
    # Two halves of 64 bytes on 0 and 1 become one whole on 1 and one on 2.
    found = route(layout((2,), ((0,),)), layout((2,), (), (1, 2)), (128,), np.int8)
    devices, peaks = found.peak_bytes()
    assert devices.tolist() == [0, 1, 2]
    # 0 has 64 and sends 128; 1 has 64, gets 64 and sends 64 and needs 128; 2 gets 128.
    assert peaks.tolist() == [64 + 128, 64 + 128 + 128, 128 + 128]
    # In chunks of a quarter, a quarter flies at a time.
    assert found.peak_bytes(32)[1].tolist() == [64 + 32, 64 + 128 + 32, 128 + 32]
    assert found.peak_bytes(1000)[1].tolist() == peaks.tolist()


def test_shard_by_shard_is_for_shards_that_enter_a_host_once():
    whole = layout((2,), ()), layout((2,), (), (2, 3))
    assert route(*whole, (8,), np.int8).kind == "put"
    assert route(*whole, (8,), np.int8, Hosts.uniform(4)).kind == "put"
    # Both copies would enter the host of 2 and 3.
    assert route(*whole, (8,), np.int8, Hosts.uniform(2)).kind == "slice"
    halves = layout((2,), ((0,),)), layout((2,), ((0,),), (2, 3))
    assert route(*halves, (8,), np.int8, Hosts.uniform(2)).kind == "put"
