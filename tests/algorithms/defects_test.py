"""Two defects that ReaL's algorithms had, and the tests that find them.

W3  DPO's reference log-probabilities were wrong with more than one microbatch or stage:
    results of a microbatch were looked up at places of the whole batch.
W4  GRPO's prompts were corrupted where their lengths differ: the tokens were repeated
    for each completion, the lengths tiled.

Each test is also run on the defect, rebuilt here, and has to fail on it.
"""

import dataclasses
import types

import numpy as np
import pytest

from realjax.algorithms import dpo
from realjax.functions.infer import InferProgram
from tests.algorithms.equality import MICROBATCHES, WHOLE, Cut, run_step
from tests.algorithms.equality_test import pairs
from tests.functions.generate_test import LENGTHS, PROMPTS, generated, program_of

GROUP = 2


class PlacedByTheWholeBatch(InferProgram):
    """W3: slot i of a microbatch is taken for row i of the batch."""

    def _fill_outputs(self, parameters, outputs, batch, packing):
        rows = np.arange(packing["sequences"].shape[0], dtype=np.int32)
        return super()._fill_outputs(
            parameters, outputs, batch, packing | {"sequences": rows}
        )


def check_reference(cut, infer_program=InferProgram):
    """The reference's log-probabilities are those of one microbatch and device."""
    batch, lengths = pairs()
    hp = dpo.DPO(stores_reference=True)
    alone = types.SimpleNamespace(graph=dpo.stored_graph)  # The reference, and no more.
    found = run_step(alone, hp, batch, lengths, cut, infer_program=infer_program)
    whole = run_step(alone, hp, batch, lengths, WHOLE)
    mask = batch["completion_mask"]
    expected = np.where(mask, whole.made["ref_logprobs"], 0).sum(axis=1)
    np.testing.assert_allclose(
        np.where(mask, found.made["ref_logprobs"], 0).sum(axis=1), expected, rtol=1e-4
    )
    assert (expected[mask.any(axis=1)] < 0).all()


CUTS = {
    "2 microbatches": MICROBATCHES,
    "a pair each": dataclasses.replace(MICROBATCHES, max_sequences=2),
    "stages": Cut("s2", num_rows=4),
    "stages and microbatches": Cut("s2", num_rows=4, max_sequences=2),
}


@pytest.mark.parametrize(
    "cut",
    [
        CUTS["2 microbatches"],
        *(pytest.param(CUTS[c], marks=pytest.mark.slow) for c in list(CUTS)[1:]),
    ],
)
def test_w3_reference_logprobs_are_the_same_however_the_batch_is_cut(cut):
    check_reference(cut)


def test_w3_the_test_fails_on_the_defect():
    check_reference(WHOLE, PlacedByTheWholeBatch)  # Which one microbatch hides.
    with pytest.raises(AssertionError, match="Not equal"):
        check_reference(MICROBATCHES, PlacedByTheWholeBatch)


def check_prompts(rollout, group):
    """Every completion follows its own prompt, whole and nothing else."""
    for row, tokens in enumerate(rollout.tokens):
        prompt = PROMPTS[row // group][: LENGTHS[row // group]]
        assert tokens[: len(prompt)].tolist() == prompt.tolist()
        assert rollout.completion_mask[row].argmax() == len(prompt)


def test_w4_completions_of_a_group_follow_their_own_prompt_of_its_own_length():
    assert len(set(LENGTHS.tolist())) > 2
    rollout = generated(program_of(group=GROUP))
    assert len(rollout.tokens) == GROUP * len(PROMPTS)
    check_prompts(rollout, GROUP)
    # Completions of a group are other draws.
    firsts = rollout.tokens[0::GROUP] != rollout.tokens[1::GROUP]
    assert firsts.any()


def test_w4_the_test_fails_on_the_defect():
    rollout = generated(
        program_of(),
        prompts=np.repeat(PROMPTS, GROUP, axis=0),
        lengths=np.tile(LENGTHS, GROUP),
        ids=np.arange(GROUP * len(PROMPTS), dtype=np.uint32),
    )
    with pytest.raises(AssertionError):
        check_prompts(rollout, GROUP)
