"""The order of training data: every record once an epoch, in another order each time.

Batches run across the ends of epochs, so all have the same size and no record is ever
dropped. The order is a function of (seed, epoch) alone; where the loader stands is one
number, which is all a checkpoint has to hold.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from realjax.core.batch import Batch
from realjax.data.datasets import Dataset

__all__ = ["Loader", "evaluation_batches"]


class Loader:
    """Gives out the batches of a data set; see the module for their order."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        num_epochs: int = 0,
        rows: np.ndarray | None = None,
    ):
        """Starts at the first record of epoch 0.

        Args:
            dataset: What to give out.
            batch_size: Records of a batch.
            seed: Of the order.
            shuffle: Whether records are permuted; else every epoch is in file order.
            num_epochs: Where to stop, with a padded last batch; 0 means never.
            rows: Whether the tokens of each row of a batch are needed in this process;
                None needs all.
        """
        if batch_size < 1:
            raise ValueError(f"`batch_size` is {batch_size}. It must be at least 1.")
        self._dataset = dataset
        self._batch_size = batch_size
        self._seed, self._shuffle = seed, shuffle
        self._num_epochs, self._rows = num_epochs, rows
        self._position = 0  # records given out since the start of epoch 0
        self._orders: dict[int, np.ndarray] = {}
        self._peeked: tuple[tuple[Batch, int, bool], int] | None = None

    def steps_for(self, epochs: int) -> int:
        """Batches that give out every record `epochs` times."""
        return -(-len(self._dataset) * epochs // self._batch_size)

    def next_batch(self) -> tuple[Batch, int, bool]:
        """Gives out the next records.

        Returns:
            The batch, of static size; the epoch of its first record, counted from 0;
            whether the last record of an epoch is in it.
        """
        found, self._position = self._read()
        self._peeked = None
        return found

    def peek_batch(self) -> Batch:
        """The batch that comes next, which stays the next one."""
        return self._read()[0][0]

    def _read(self) -> tuple[tuple[Batch, int, bool], int]:
        """What `next_batch` gives out, read once, and where the loader is after it."""
        if self._peeked is None:
            self._peeked = self._read_next()
        return self._peeked

    def _read_next(self) -> tuple[tuple[Batch, int, bool], int]:
        size = len(self._dataset)
        start, stop = self._position, self._position + self._batch_size
        if self._num_epochs:
            stop = min(stop, size * self._num_epochs)
            if start >= stop:
                raise ValueError(
                    f"All {self._num_epochs} epochs were given out. Ask for no more "
                    f"than {self.steps_for(self._num_epochs)} batches."
                )
        epochs, places = np.divmod(np.arange(start, stop), size)
        indices = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            indices[here] = self._order(epoch)[places[here]]
        batch = self._dataset.batch(indices, epochs, rows=self._rows)
        batch = batch.pad_to(self._batch_size * self._dataset.rows_per_record)
        return (batch, int(epochs[0]), stop // size > start // size), stop

    def state(self) -> dict[str, int | str]:
        """What `restore` needs to continue with the next batch."""
        return {
            "position": self._position,
            "seed": self._seed,
            "shuffle": int(self._shuffle),
            "dataset": self._dataset.fingerprint(),
        }

    def restore(self, state: Mapping[str, int | str]) -> None:
        """Continues where the loader that gave `state` stood.

        Raises:
            ValueError: That loader had other data, or another order.
        """
        for name, here in self.state().items():
            if name != "position" and state.get(name) != here:
                raise ValueError(
                    f"The saved data order has {name} {state.get(name)!r}, this one "
                    f"{here!r}. Continue with the data, limits and seed of the "
                    "checkpoint, or start a new run."
                )
        self._position, self._peeked = int(state["position"]), None

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            size = len(self._dataset)
            rng = np.random.default_rng([self._seed, epoch])
            order = rng.permutation(size) if self._shuffle else np.arange(size)
            # A batch rarely spans more than two epochs.
            recent = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders = {**recent, epoch: order}
        return self._orders[epoch]


def evaluation_batches(
    dataset: Dataset, batch_size: int, rows: np.ndarray | None = None
) -> Iterator[Batch]:
    """Gives every record once, in file order; the last batch is padded.

    Args:
        dataset: What to give out.
        batch_size: Records of a batch.
        rows: As in `Loader`.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}. It must be at least 1.")
    for start in range(0, len(dataset), batch_size):
        indices = range(start, min(start + batch_size, len(dataset)))
        batch = dataset.batch(indices, rows=rows)
        yield batch.pad_to(batch_size * dataset.rows_per_record)
