"""Allocations: the notation, what equals what, and what is refused."""

import pytest

from realjax.parallel.allocation import Allocation


@pytest.mark.parametrize(
    "text, sizes, devices",
    [
        ("d2f2t2@0-7", (2, 2, 2), (0, 1, 2, 3, 4, 5, 6, 7)),
        ("t4@4-7", (1, 1, 4), (4, 5, 6, 7)),
        ("f2t2@0,2,4-5", (1, 2, 2), (0, 2, 4, 5)),
        ("t2d3", (3, 1, 2), (0, 1, 2, 3, 4, 5)),  # any order; devices by default
        ("d1@6", (1, 1, 1), (6,)),
        ("d2s1e1@1-2", (2, 1, 1), (1, 2)),
    ],
)
def test_parse_reads_sizes_and_devices(text, sizes, devices):
    allocation = Allocation.parse(text)
    assert (allocation.data, allocation.fsdp, allocation.tensor) == sizes
    assert allocation.devices == devices
    assert allocation.size == len(devices)


@pytest.mark.parametrize(
    "text",
    [
        "d2f2t2@0-7+sequence",
        "d1@3",
        "f8@0-7",
        "t4@3,2,1,0",  # the order of devices is part of the layout
        "d2t2@0-1,4-5",
        "t2@0,7",
    ],
)
def test_str_writes_what_parse_reads(text):
    assert str(Allocation.parse(text)) == text


def test_str_is_canonical():
    assert str(Allocation.parse("t2f1d2@0,1,2,3")) == "d2t2@0-3"
    assert str(Allocation(tensor=2)) == "t2@0-1"
    assert str(Allocation()) == "d1@0"


def test_equal_allocations_are_one_key_however_written():
    keys = {
        Allocation.parse("d2t2"),
        Allocation(data=2, tensor=2, devices=(0, 1, 2, 3)),
    }
    assert len(keys) == 1


def test_options_change_the_allocation_and_not_the_layout():
    plain, split = Allocation.parse("t4@0-3"), Allocation.parse("t4@0-3+sequence")
    assert plain != split
    assert plain.layout_key == split.layout_key


def test_zero1_is_another_layout():
    plain, cut = Allocation.parse("f4@0-3"), Allocation.parse("f4@0-3+zero1")
    assert plain.layout_key != cut.layout_key


def test_rows_are_split_over_data_fsdp_and_expert():
    assert Allocation.parse("d2f3t5s7e11@0-2309").num_row_shards == 2 * 3 * 11


@pytest.mark.parametrize("other", ["d2t2@4-7", "t4@0-3", "d2t2@3,2,1,0"])
def test_layouts_differ_by_devices_order_and_strategy(other):
    allocation = Allocation.parse("d2t2@0-3")
    assert allocation.layout_key != Allocation.parse(other).layout_key


@pytest.mark.parametrize(
    "text, message",
    [
        ("x2@0-1", "unknown letter 'x'. Letters are d \\(data\\)"),
        ("d2@0-3", "d2 needs 2 devices and @0-3 names 4"),
        ("d2d2@0-3", "'d' appears twice"),
        ("d@0", "'d' has no size"),
        ("t0", "tensor=0; every size"),
        ("", "must begin with sizes"),
        ("@0-3", "must begin with sizes"),
        ("2d", "must begin with sizes"),
        ("d2@", "no devices after the @"),
        ("d2@0-x", "'0-x' is no device range"),
        ("d2@1-0", "runs backwards. Write 0-1"),
        ("d2@0,0", "\\[0\\] appear more than once"),
        (
            "d2@0-1+zero1",
            "\\+zero1 cuts the optimizer's state over fsdp, and fsdp is 1",
        ),
        ("f2@0-1+fast", "unknown option \\+fast. Options are: \\+sequence"),
    ],
)
def test_parse_refuses_and_says_why(text, message):
    with pytest.raises(ValueError, match=message) as error:
        Allocation.parse(text)
    assert repr(text) in str(error.value)


def test_negative_devices_are_refused():
    with pytest.raises(ValueError, match="device -1 is negative"):
        Allocation(data=2, devices=(-1, 0))
