"""The buffer: each key once on every mesh that needs it."""

import jax
import numpy as np
import pytest

from realjax.core.batch import Batch
from realjax.dataflow.buffer import Buffer
from realjax.parallel.allocation import Allocation

TWO, FOUR = Allocation.parse("d2@0-1"), Allocation.parse("f4@4-7")


def make_buffer():
    arrays = {
        "prompts": np.arange(8, dtype=np.int32).reshape(4, 2),
        "difficulty": np.array([1.0, 2.0, 3.0, 4.0], np.float32),
    }
    lengths = np.array([2, 1, 2, 2], np.int32)
    return Buffer(Batch.create(arrays, lengths=lengths, columns={"id": list("abcd")}))


def no_host():
    return jax.transfer_guard_host_to_device("disallow_explicit")


def test_a_key_of_the_data_set_goes_up_once_a_mesh():
    buffer = make_buffer()
    first = buffer.get("prompts", TWO)
    assert buffer.get("prompts", TWO) is first
    assert first.addressable_shards[0].data.shape == (2, 2)
    buffer.get("prompts", FOUR)
    assert buffer.traffic.uploaded_bytes == 2 * 8 * 4
    assert set(buffer.sends.values()) == {1}


def test_what_a_call_made_stays_where_it_is_and_travels_without_the_host():
    buffer = make_buffer()
    made = buffer.get("difficulty", TWO)
    buffer.put("scores", made)
    assert buffer.get("scores", TWO) is made
    with no_host():
        moved = buffer.get("scores", FOUR)
    assert moved.addressable_shards[0].data.shape == (1,)
    np.testing.assert_array_equal(moved, [1, 2, 3, 4])
    # Four devices that hold nothing of it get a float32 each.
    assert buffer.traffic.sent_bytes == 4 * 4
    assert buffer.sends == {
        ("difficulty", TWO.layout_key): 1,
        ("scores", FOUR.layout_key): 1,
    }


def test_rows_that_do_not_divide_are_whole_on_every_device():
    buffer = Buffer(Batch.create({"scores": np.ones(3, np.float32)}))
    assert buffer.get("scores", TWO).addressable_shards[0].data.shape == (3,)


def test_completions_of_a_prompt_are_adjacent_rows():
    buffer = make_buffer()
    buffer.repeat(2)
    assert buffer.ids.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert buffer.samples.tolist() == [0, 1] * 4
    assert buffer.columns["id"] == list("aabbccdd")
    assert buffer.host("difficulty").tolist() == [1, 1, 2, 2, 3, 3, 4, 4]
    # Prompts are what the completions are drawn for; they stay single.
    assert buffer.host("prompts").shape == (4, 2)
    assert buffer.lengths["prompts"].tolist() == [2, 1, 2, 2]


@pytest.mark.parametrize("key", ["difficulty", "scores"])
def test_a_key_sent_before_rows_were_repeated_is_not_used_any_more(key):
    buffer = make_buffer()
    buffer.put("scores", buffer.get("difficulty", TWO))
    assert buffer.get(key, FOUR).shape == (4,)
    buffer.repeat(2)
    with no_host() if key == "scores" else jax.transfer_guard("allow"):
        moved = buffer.get(key, FOUR)
    assert moved.addressable_shards[0].data.shape == (2,)
    np.testing.assert_array_equal(moved, [1, 1, 2, 2, 3, 3, 4, 4])
