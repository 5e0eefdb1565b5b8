"""Tests of `realjax/core/batch.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realjax.core.batch import Batch


def example(size: int, *, seed: int = 0, width: int = 6) -> Batch:
    """Rows of random lengths with arrays of every rank, one absent, and text."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, width + 1, size)
    return Batch.create(
        {
            "tokens": rng.integers(0, 9, (size, width), dtype=np.int32),
            "completion_mask": np.arange(width) < lengths[:, None],
            "scores": rng.normal(size=size).astype(np.float32),
            "kept": rng.integers(0, 9, (size, width, 2), dtype=np.int32),
            "prompts": rng.integers(0, 9, (size, 3), dtype=np.int32),
            "ref_logprobs": None,
        },
        ids=100 * seed + np.arange(size),
        lengths=lengths,
        columns={"prompt": [f"text {i}" for i in range(size)]},
    )


def on_devices(batch: Batch) -> Batch:
    arrays = {k: None if x is None else jnp.asarray(x) for k, x in batch.arrays.items()}
    return batch.with_arrays(**arrays)


def assert_same(left: Batch, right: Batch):
    np.testing.assert_array_equal(left.ids, right.ids)
    np.testing.assert_array_equal(left.samples, right.samples)
    np.testing.assert_array_equal(left.lengths, right.lengths)
    assert left.columns == right.columns
    assert set(left.keys) == set(right.keys)
    for key in left.keys:
        if left[key] is None or right[key] is None:
            assert left[key] is right[key]
        else:
            assert left[key].dtype == right[key].dtype
            np.testing.assert_array_equal(left[key], right[key])


def test_create_fills_ids_samples_and_lengths():
    batch = Batch.create({"tokens": np.zeros((3, 5), np.int32)})
    np.testing.assert_array_equal(batch.ids, [0, 1, 2])
    np.testing.assert_array_equal(batch.samples, [0, 0, 0])
    np.testing.assert_array_equal(batch.lengths, [5, 5, 5])
    assert batch.ids.dtype == np.int64
    assert batch.lengths.dtype == batch.samples.dtype == np.int32
    assert (batch.size, batch.num_tokens, batch.keys) == (3, 15, ("tokens",))


def test_create_numbers_the_samples_of_an_id():
    batch = Batch.create({"scores": np.zeros(6)}, ids=[7, 9, 7, -1, 7, -1])
    np.testing.assert_array_equal(batch.samples, [0, 0, 1, 0, 2, 1])
    np.testing.assert_array_equal(batch.lengths, np.zeros(6))


def test_lengths_of_a_prompt_batch_are_those_of_the_prompts():
    batch = Batch.create({"prompts": np.zeros((2, 4), np.int32)})
    np.testing.assert_array_equal(batch.lengths, [4, 4])


# ReaL's grid: gathering what was split gives back every key exactly.
@pytest.mark.parametrize("num_parts", [1, 2, 3, 4, 8, 15, 16])
@pytest.mark.parametrize("place", ["host", "device"])
def test_concatenate_undoes_split(num_parts, place):
    batch = example(16)
    if place == "device":
        batch = on_devices(batch)
    parts = batch.split(num_parts)
    assert len(parts) == num_parts
    assert min(part.size for part in parts) >= 1
    assert_same(Batch.concatenate(parts), batch)


def test_concatenate_undoes_the_finest_split_of_several_batches():
    batches = [example(5, seed=seed) for seed in range(3)]
    together = Batch.concatenate(batches)
    rows = together.split(15)
    assert [part.size for part in rows] == [1] * 15
    for seed, batch in enumerate(batches):
        assert_same(Batch.concatenate(rows[5 * seed : 5 * seed + 5]), batch)


def test_split_balances_tokens_not_rows():
    batch = Batch.create({"scores": np.zeros(6)}, lengths=[6, 1, 2, 1, 1, 1])
    assert [part.num_tokens for part in batch.split(2)] == [6, 6]
    assert [part.size for part in batch.split(2)] == [1, 5]
    assert [part.size for part in batch.split(2, min_size=3)] == [3, 3]


def test_split_keeps_the_rows_of_a_unit_together():
    # Pairs of 10, 2, 2 and 6 tokens: the even cut of rows would tear the first pair.
    lengths = [9, 1, 1, 1, 1, 1, 3, 3]
    batch = Batch.create({"scores": np.zeros(8)}, lengths=lengths)
    assert [part.size for part in batch.split(2, unit=2)] == [2, 6]
    with pytest.raises(ValueError, match="8 rows do not divide into units of 3"):
        batch.split(2, unit=3)
    with pytest.raises(ValueError, match="4 items do not make 5 parts"):
        batch.split(5, unit=2)


@pytest.mark.parametrize("place", ["host", "device"])
def test_select_takes_rows_in_the_order_given(place):
    batch = example(4)
    expected = batch["kept"][[3, 0]]
    if place == "device":
        batch = on_devices(batch)
    chosen = batch.select([3, 0])
    np.testing.assert_array_equal(chosen["kept"], expected)
    np.testing.assert_array_equal(chosen.ids, [3, 0])
    assert chosen.columns["prompt"] == ["text 3", "text 0"]
    assert isinstance(chosen["kept"], type(batch["kept"]))


def test_select_refuses_rows_that_are_not_there():
    for row in (4, -1):
        with pytest.raises(IndexError, match="4 rows"):
            on_devices(example(4)).select([row])


def test_selecting_a_row_twice_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 0\) appears more than once"):
        example(4).select([2, 2])


def test_restrict_rename_and_with_arrays_change_names_only():
    batch = example(3)
    small = batch.restrict(["tokens", "scores"])
    assert small.keys == ("tokens", "scores")
    assert small.columns == batch.columns
    renamed = small.rename({"tokens": "greedy_tokens"})
    assert renamed.keys == ("greedy_tokens", "scores")
    assert renamed["greedy_tokens"] is batch["tokens"]
    scores = np.ones(3, np.float32)
    assert small.with_arrays(scores=scores, values=None).keys == (*small.keys, "values")
    assert small.with_arrays(scores=scores)["scores"] is scores


def test_rename_can_swap_but_not_collide():
    batch = example(3).restrict(["tokens", "scores", "completion_mask"])
    swapped = batch.rename({"tokens": "old", "scores": "tokens"})
    assert swapped["old"] is batch["tokens"] and swapped["tokens"] is batch["scores"]
    with pytest.raises(ValueError, match=r"two arrays the names \['tokens'\]"):
        batch.rename({"scores": "tokens"})


def test_an_absent_array_stays_absent_everywhere():
    batch = example(4)
    assert batch["ref_logprobs"] is None
    for changed in (
        batch.select([0]),
        batch.pad_to(6),
        batch.split(2)[1],
        Batch.concatenate(batch.split(2)),
        batch.merge(batch),
        batch.rename({"scores": "rewards"}),
    ):
        assert changed["ref_logprobs"] is None


def test_metadata_travels_without_arrays():
    batch = example(3)
    metadata = batch.without_arrays()
    assert metadata.keys == batch.keys
    assert all(metadata[key] is None for key in metadata.keys)
    np.testing.assert_array_equal(metadata.lengths, batch.lengths)
    assert_same(metadata.merge(batch), batch)
    assert_same(batch.merge(metadata), batch)


@pytest.mark.parametrize("place", ["host", "device"])
def test_padding_adds_rows_that_do_not_count(place):
    batch = example(3) if place == "host" else on_devices(example(3))
    padded = batch.pad_to(5)
    assert padded.size == 5 and padded.num_tokens == batch.num_tokens
    np.testing.assert_array_equal(padded.ids, [0, 1, 2, -1, -1])
    np.testing.assert_array_equal(padded["kept"][3:], 0)
    assert not padded["completion_mask"][3:].any()
    assert padded.columns["prompt"][3:] == [None, None]
    assert_same(padded.select([0, 1, 2]), batch)
    assert padded["tokens"].dtype == batch["tokens"].dtype
    assert batch.pad_to(3) is batch
    with pytest.raises(ValueError, match="3 rows cannot be padded to 2"):
        batch.pad_to(2)


def test_concatenate_refuses_batches_of_other_keys_or_widths():
    batch = example(2)
    with pytest.raises(ValueError, match="Batch 1 has the arrays"):
        Batch.concatenate([batch, example(2, seed=1).restrict(["scores"])])
    with pytest.raises(ValueError, match=r"'tokens' has the shapes"):
        Batch.concatenate([batch, example(2, seed=1, width=7)])
    with pytest.raises(ValueError, match="'scores' is absent in 1 of 2"):
        Batch.concatenate([batch, example(2, seed=1).with_arrays(scores=None)])
    with pytest.raises(ValueError, match="no batch"):
        Batch.concatenate([])


def test_concatenating_host_and_device_arrays_gives_device_arrays():
    together = Batch.concatenate([example(2), on_devices(example(2, seed=1))])
    assert isinstance(together["tokens"], jax.Array)


def test_merge_joins_the_arrays_of_the_same_rows():
    batch = example(3)
    new = Batch.create(
        {"values": np.ones((3, 6), np.float32), "scores": np.ones(3, np.float32)},
        ids=batch.ids,
        lengths=batch.lengths,
        columns={"judge": ["a", "b", "c"]},
    )
    merged = batch.merge(new)
    assert set(merged.keys) == {*batch.keys, "values"}
    assert merged["scores"] is new["scores"]
    assert set(merged.columns) == {"prompt", "judge"}
    with pytest.raises(ValueError, match="different rows cannot merge: ids"):
        batch.merge(new.select([2, 1, 0]))


def test_merging_a_rollout_into_its_prompts_takes_the_longer_lengths():
    prompts = Batch.create({"prompts": np.zeros((2, 4), np.int32)}, lengths=[4, 2])
    rollout = Batch.create({"tokens": np.zeros((2, 9), np.int32)}, lengths=[8, 9])
    for merged in (prompts.merge(rollout), rollout.merge(prompts)):
        np.testing.assert_array_equal(merged.lengths, [8, 9])
        assert set(merged.keys) == {"prompts", "tokens"}


def test_an_unknown_key_lists_the_keys_and_the_nearest():
    batch = example(2)
    with pytest.raises(KeyError, match=r"no array 'score'. Did you mean 'scores'"):
        batch["score"]
    with pytest.raises(KeyError, match=r"Keys: .*completion_mask"):
        batch.restrict(["zzz"])
    with pytest.raises(KeyError, match=r"It is a column: read"):
        batch["prompt"]


def test_changing_the_mapping_given_does_not_change_the_batch():
    arrays: dict = {"scores": np.zeros(2)}
    batch = Batch.create(arrays)
    arrays["other"] = np.zeros(3)
    assert batch.keys == ("scores",)


GOOD = {
    "ids": np.arange(2),
    "samples": np.zeros(2, np.int32),
    "lengths": np.array([3, 2]),
    "arrays": {"tokens": np.zeros((2, 4), np.int32)},
    "columns": {},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": np.array([1, 1])}, r"\(1, 0\) appears more than once"),
        ({"ids": np.array([0, -2])}, "at least 0"),
        ({"ids": np.array([0, -1])}, "gives tokens to padding rows"),
        ({"lengths": np.array([3.0, 2.0])}, "`lengths` .* list of integers"),
        ({"lengths": np.array([[3, 2]])}, "`lengths` .* list of integers"),
        ({"lengths": np.array([3, 5])}, "reaches 5, but the arrays have 4 tokens"),
        ({"lengths": np.array([3, -1])}, "at least 0"),
        ({"lengths": np.array([3])}, "`lengths` has 1 entries for 2 ids"),
        ({"samples": np.zeros(3, np.int32)}, "`samples` has 3 entries for 2 ids"),
        ({"arrays": {"scores": np.zeros(3)}}, r"'scores' has shape \(3,\) .* 2 rows"),
        ({"arrays": {"scores": np.zeros(())}}, r"'scores' has shape \(\)"),
        ({"arrays": {"a": np.zeros((2, 4)), "b": np.zeros((2, 5))}}, "'b' has 5 tok"),
        ({"arrays": {"loss_mask": np.ones((2, 4))}}, "'loss_mask' has dtype float64"),
        ({"arrays": {"mask": np.ones((2, 4), bool)}}, "marks token 3 of row 0"),
        ({"columns": {"prompt": ["a"]}}, "'prompt' is a list of 1 for 2 rows"),
    ],
)
def test_bad_batches_are_refused_by_name(changes, message):
    Batch(**GOOD)
    with pytest.raises(ValueError, match=message):
        Batch(**{**GOOD, **changes})


def test_a_batch_needs_something_that_tells_its_size():
    with pytest.raises(ValueError, match="Nothing tells the number of rows"):
        Batch.create({"scores": None})


def test_a_batch_may_be_empty():
    batch = Batch.create({"scores": np.zeros(0)})
    assert batch.size == batch.num_tokens == 0
    assert batch.pad_to(2).size == 2
