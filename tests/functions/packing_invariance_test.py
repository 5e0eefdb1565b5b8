"""A loss and its gradients do not depend on how sequences lie in rows.

For every family: windows, rotations by length, learned positions and the routers of
experts all have to start anew with each sequence.
"""

import functools

import jax
import numpy as np
import pytest

from realjax.data.packing import pack
from realjax.functions.train import TrainProgram
from realjax.testing import tiny_batch
from tests.functions.plain import batch_on, model_on, sharp_parameters
from tests.parallel.strategies_test import OPTIMIZER, SPEC, assert_close, mesh_of
from tests.tiny_families import FAMILIES

SIZE = 9
BATCH = tiny_batch(SIZE, 24, vocab_size=61)
LENGTHS = BATCH.lengths

# Rows of a microbatch, tokens of a row, most sequences of a microbatch.
LAYOUTS = {
    "a row each": (9, 24, 9),
    "packed": (3, 61, 9),
    "three microbatches": (1, 72, 4),
    "padded": (12, 40, 12),
}


@functools.cache
def program_of(family):
    model = model_on("d1", FAMILIES[family])
    return TrainProgram(SPEC, model, mesh_of("d1"), OPTIMIZER, 10)


@functools.cache
def gradients(family, layout, is_reversed=False):
    """Mean loss and its gradients, of one device."""
    num_rows, row_length, max_sequences = LAYOUTS[layout]
    config = FAMILIES[family]
    order = np.arange(SIZE)[:: -1 if is_reversed else 1]
    arrays = {
        name: np.asarray(BATCH[name])[order] for name in ("tokens", "completion_mask")
    }
    packings = pack(
        LENGTHS[order],
        row_length=row_length,
        num_rows=num_rows,
        max_sequences=max_sequences,
        width=24,
    )
    assert (len(packings) > 1) == (layout == "three microbatches")
    program = program_of(family)
    parameters, batch = sharp_parameters(config), batch_on("d1", arrays)
    each = [vars(packing) for packing in packings]
    router = program._router_inputs(batch, packings, each, None, 0)
    sums = program._zeros(parameters, batch, each[0])
    for packing in each:
        sums = program._accumulate(parameters, sums, batch, packing, router)
    loss = sums[1]["loss"]
    weight = float(loss.weight)
    return float(loss.value()), jax.tree.map(lambda g: np.asarray(g) / weight, sums[0])


def is_sample(family, layout):
    return family == "gemma2" and layout == "packed"


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        pytest.param(
            family, layout, marks=() if is_sample(family, layout) else pytest.mark.slow
        )
        for family in FAMILIES
        for layout in LAYOUTS
        if layout != "a row each"
    ],
)
def test_rows_and_microbatches_change_no_loss_and_no_gradient(family, layout):
    loss, found = gradients(family, layout)
    expected_loss, expected = gradients(family, "a row each")
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_close(found, expected)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if is_sample(name, "packed") else pytest.mark.slow)
        for name in FAMILIES
    ],
)
def test_the_order_of_sequences_changes_no_loss_and_no_gradient(family):
    loss, found = gradients(family, "packed", is_reversed=True)
    expected_loss, expected = gradients(family, "packed")
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_close(found, expected)
