"""Tests of `realjax/data/loader.py`."""

import json
from collections import Counter

import numpy as np
import pytest

from realjax.data.datasets import DataConfig, Dataset, load_dataset
from realjax.data.loader import Loader, evaluation_batches
from realjax.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([], 257, special=("<eos>",))


@pytest.fixture
def dataset_of(tmp_path, tokenizer):
    """Makes a data set of so many records, all of different lengths."""

    def make(size: int, kind: str = "prompts", seed: int = 0) -> Dataset:
        records = [
            {
                "prompt": "a" * (i + 1),
                "pos_answers": ["b", "cc"][: 1 + i % 2],
                "neg_answers": ["d", "ee"][: 1 + i % 2],
            }
            for i in range(size)
        ]
        path = tmp_path / f"{kind}{size}.jsonl"
        path.write_text("\n".join(map(json.dumps, records)))
        config = DataConfig(path=str(path), kind=kind, max_pairs=2)
        return load_dataset(config, tokenizer, seed=seed)

    return make


def ids_of(loader: Loader, num_batches: int) -> list[list[int]]:
    return [loader.next_batch()[0].ids.tolist() for _ in range(num_batches)]


def test_every_record_is_given_once_an_epoch(dataset_of):
    # W18: 17 records do not divide into batches of 4, and none is dropped: four epochs
    # are 68 records, 17 batches.
    loader = Loader(dataset_of(17), batch_size=4, seed=0)
    assert loader.steps_for(4) == 17
    given = [i for ids in ids_of(loader, 17) for i in ids]
    for epoch in range(4):
        assert sorted(given[17 * epoch : 17 * epoch + 17]) == list(range(17))


def test_w13_batches_differ_from_epoch_to_epoch(dataset_of):
    # ReaL packs by length: with 96 different lengths and batches of 32, its three
    # batches of an epoch have the same members in every epoch.
    loader = Loader(dataset_of(96), batch_size=32, seed=0)
    epochs = [{frozenset(ids) for ids in ids_of(loader, 3)} for _ in range(5)]
    for epoch, batches in enumerate(epochs):
        for other in epochs[:epoch]:
            assert not batches & other
    # Neither are batches stratified: their lengths are spread like those of all.
    for batches in epochs:
        assert all(max(ids) - min(ids) > 64 for ids in batches)


def test_order_is_a_function_of_the_seed(dataset_of):
    dataset = dataset_of(20)
    first = ids_of(Loader(dataset, batch_size=8, seed=3), 5)
    assert ids_of(Loader(dataset, batch_size=8, seed=3), 5) == first
    assert ids_of(Loader(dataset, batch_size=8, seed=4), 5) != first


def test_order_does_not_depend_on_the_batch_size(dataset_of):
    dataset = dataset_of(20)
    small = np.ravel(ids_of(Loader(dataset, batch_size=4, seed=3), 10))
    large = np.ravel(ids_of(Loader(dataset, batch_size=20, seed=3), 2))
    np.testing.assert_array_equal(small, large)


def test_without_shuffling_records_come_in_file_order(dataset_of):
    loader = Loader(dataset_of(5), batch_size=3, seed=0, shuffle=False)
    assert ids_of(loader, 3) == [[0, 1, 2], [3, 4, 0], [1, 2, 3]]


def test_epochs_and_their_ends_are_told(dataset_of):
    loader = Loader(dataset_of(5), batch_size=3, seed=0)
    # Records 0-2, 3-5, 6-8, 9-11 of the endless order; epochs end at 4, 9, 14.
    told = [loader.next_batch()[1:] for _ in range(5)]
    assert told == [(0, False), (0, True), (1, False), (1, True), (2, True)]


def test_the_last_batch_of_a_run_is_padded_not_dropped(dataset_of):
    loader = Loader(dataset_of(5), batch_size=4, seed=0, num_epochs=2)
    batches = [loader.next_batch() for _ in range(loader.steps_for(2))]
    assert [batch.size for batch, *_ in batches] == [4, 4, 4]
    assert (batches[-1][0].ids == -1).sum() == 2
    given = Counter(i for batch, *_ in batches for i in batch.ids.tolist() if i >= 0)
    assert given == dict.fromkeys(range(5), 2)
    assert batches[-1][2]
    with pytest.raises(ValueError, match="All 2 epochs were given out"):
        loader.next_batch()


def test_a_batch_larger_than_the_data_numbers_its_repeats(dataset_of):
    loader = Loader(dataset_of(3), batch_size=8, seed=0)
    batch, epoch, is_epoch_end = loader.next_batch()
    assert (batch.size, epoch, is_epoch_end) == (8, 0, True)
    rows = set(zip(batch.ids.tolist(), batch.samples.tolist(), strict=True))
    assert len(rows) == 8
    assert Counter(batch.samples.tolist()) == {0: 3, 1: 3, 2: 2}


def test_a_restored_loader_continues_bit_for_bit(dataset_of):
    dataset = dataset_of(7, "pairs")
    loader = Loader(dataset, batch_size=3, seed=5)
    ids_of(loader, 4)
    state = json.loads(json.dumps(loader.state()))
    again = Loader(dataset_of(7, "pairs"), batch_size=3, seed=5)
    again.restore(state)
    for _ in range(4):
        (left, *told), (right, *told_again) = loader.next_batch(), again.next_batch()
        assert told == told_again
        np.testing.assert_array_equal(left["tokens"], right["tokens"])
        np.testing.assert_array_equal(left["pair_weights"], right["pair_weights"])
        assert left.columns == right.columns


def test_another_order_or_other_data_is_not_continued(dataset_of):
    dataset = dataset_of(7)
    state = Loader(dataset, batch_size=3, seed=5).state()
    with pytest.raises(ValueError, match="has seed 5, this one 6"):
        Loader(dataset, batch_size=3, seed=6).restore(state)
    with pytest.raises(ValueError, match="has shuffle 1, this one 0"):
        Loader(dataset, batch_size=3, seed=5, shuffle=False).restore(state)
    with pytest.raises(ValueError, match=r"has dataset '.*', this one"):
        Loader(dataset_of(8), batch_size=3, seed=5).restore(state)


def test_batches_of_pairs_have_one_size(dataset_of):
    loader = Loader(dataset_of(7, "pairs"), batch_size=3, seed=0)
    batches = [loader.next_batch()[0] for _ in range(7)]
    assert {batch["tokens"].shape for batch in batches} == {
        (12, batches[0]["tokens"].shape[1])
    }
    assert {int((batch.ids >= 0).sum()) for batch in batches} > {8}


def test_evaluation_gives_every_record_once_in_order(dataset_of):
    batches = list(evaluation_batches(dataset_of(7), 3))
    assert [batch.ids.tolist() for batch in batches] == [
        [0, 1, 2],
        [3, 4, 5],
        [6, -1, -1],
    ]
    pairs = list(evaluation_batches(dataset_of(7, "pairs"), 3))
    assert [batch.size for batch in pairs] == [12, 12, 12]
    assert sorted({int(i) for batch in pairs for i in batch.ids if i >= 0}) == [
        *range(7)
    ]


def test_a_batch_size_of_zero_is_refused(dataset_of):
    with pytest.raises(ValueError, match="`batch_size` is 0"):
        Loader(dataset_of(3), batch_size=0, seed=0)
    with pytest.raises(ValueError, match="`batch_size` is 0"):
        next(evaluation_batches(dataset_of(3), 0))


def test_a_batch_that_is_looked_at_stays_the_next_one(dataset_of):
    dataset = dataset_of(10)
    plain = ids_of(Loader(dataset, batch_size=4, seed=3), 4)
    loader = Loader(dataset, batch_size=4, seed=3)
    before = dataset.num_rows_read
    for ids in plain:
        state = loader.state()
        assert loader.peek_batch().ids.tolist() == ids
        assert loader.state() == state
        assert loader.next_batch()[0].ids.tolist() == ids
    # It is not read twice.
    assert dataset.num_rows_read == before + 16
    loader.peek_batch()
    loader.restore(state)
    assert loader.next_batch()[0].ids.tolist() == plain[-1]
