"""Tests of `realjax/planner/cost.py`."""

import dataclasses
from typing import Any

import pytest

from realjax.models.families import llama
from realjax.parallel.allocation import Allocation
from realjax.planner.cluster import Cluster
from realjax.planner.cost import CallWork, quantities

CLUSTER = Cluster.load("8xh100")
MODEL = llama.size("3.1-8b")


def train(strategy, cluster=CLUSTER, model=MODEL, **changes):
    work = CallWork(
        kind="train",
        model=model,
        num_rows=256,
        prompt_tokens=1024,
        **changes,
    )
    return quantities(work, Allocation.parse(strategy), cluster)


def test_products_are_those_of_the_papers():
    # 6 N T and 12 L H K T context / 2 for a causal mask.
    config, tokens = llama.size("3.1-8b"), 256 * 1024
    matrices = config.num_parameters - 2 * config.vocab_size * config.width
    norms = (2 * 32 + 1) * 4096
    head = config.vocab_size * config.width
    flops = 6 * (matrices - norms + head) * tokens
    flops += 12 * 32 * 4096 * tokens * 1024 / 2
    found = train("d1").products * CLUSTER.device.flops_per_second
    assert found == pytest.approx(flops, rel=1e-6)
    # The forward pass again.
    assert train("d1", remat="block").products == pytest.approx(
        train("d1").products * 4 / 3
    )


def test_devices_share_the_products():
    whole = train("d1").products
    for strategy in ("d8", "f8", "t8", "d2f2t2"):
        assert train(strategy).products == pytest.approx(whole / 8)
    # Two stages and four microbatches: a fifth of the time one of them waits.
    assert train("s2").products == pytest.approx(whole / 2 * 5 / 4)


def test_a_pipeline_reads_its_weights_in_every_tick():
    # Two microbatches of a row shard, each in 4 pieces through 2 stages: 5 ticks.

    def train_in_pieces(strategy):
        return train(strategy, microbatch_tokens=128 * 1024, pieces=4)

    found = train_in_pieces("s2")
    assert found.products == pytest.approx(train("d1").products / 2 * 5 / 4)
    # Forward, and twice as much backward; half of 32 layers.
    assert found.layers == 3 * 2 * 5 * 16
    assert found.hops == 2 * 2 * 5  # There, and back.
    # With one stage there is nothing to cut for.
    assert train_in_pieces("d1") == train("d1", microbatch_tokens=128 * 1024)


def test_devices_that_take_turns_take_as_many_times_as_long_and_wait_for_each_other():
    shared = dataclasses.replace(CLUSTER, concurrent_devices=2)
    for strategy, turns in (("d8", 4.2), ("t4", 2.2), ("d2", 1.2)):
        found, alone = train(strategy, cluster=shared), train(strategy)
        assert tuple(found) == pytest.approx(tuple(alone.times(turns)))


def test_one_device_has_all_cores_for_its_products_and_some_of_its_traffic():
    shared = dataclasses.replace(CLUSTER, concurrent_devices=2)
    alone = train("d1")
    assert train("d1", cluster=shared) == alone._replace(
        products=alone.products / 2, memory=alone.memory * 3 / 4
    )


def test_stages_run_as_many_layers_as_the_longest_of_them():
    odd = dataclasses.replace(llama.size("3.1-8b"), num_layers=5)
    padded = dataclasses.replace(odd, num_layers=8)
    assert train("s4", model=odd) == train("s4", model=padded)
    assert train("d4", model=odd) != train("d4", model=padded)


def test_what_is_kept_for_the_backward_pass_is_written_and_read():
    kept, some, none = (train("d1", remat=name) for name in ("none", "dots", "block"))
    assert kept.products < some.products < none.products
    # Everything goes in and out; or half of it, and a pass is run anew; or only that.
    assert kept.memory > none.memory
    assert some.memory == pytest.approx(kept.memory, rel=0.05)


def test_each_axis_sends_what_it_must():
    config = llama.size("3.1-8b")
    assert train("d1").link == 0
    # float32 gradients around the ring, of every microbatch.
    matrices = config.num_parameters - (2 * 32 + 1) * 4096
    rate = CLUSTER.link_bytes_per_second
    once = 2 * 7 / 8 * 4 * matrices / rate
    assert train("d8").link == pytest.approx(once, rel=1e-6)
    assert train("d8", microbatch_tokens=4096).link == pytest.approx(8 * once)
    # Parameters gathered forward and backward, and gradients scattered, in each.
    pieces = (2 + 2 + 4) * 7 / 8 * matrices / rate
    assert train("f8").link == pytest.approx(pieces, rel=1e-6)
    assert train("f8", microbatch_tokens=4096).link == pytest.approx(8 * pieces)
    # Sums of hidden states: twice a layer, forward and backward.
    sums = 4 * 32 * 2 * 7 / 8 * 256 * 1024 * 4096 * 2 / rate
    assert train("t8").link == pytest.approx(sums, rel=1e-6)
    assert train("d8").network == train("t8").network == 0
    assert train("d16", cluster=Cluster.load("2x8xh100")).network > 0


def generate(strategy, **changes):
    work: dict[str, Any] = {
        "num_rows": 64,
        "prompt_tokens": 0,
        "new_tokens": 100,
        "most_new_tokens": 100,
    }
    work = CallWork(kind="generate", model=llama.size("3.1-8b"), **(work | changes))
    return quantities(work, Allocation.parse(strategy), CLUSTER)


def test_a_step_of_decoding_reads_the_weights_and_the_cache():
    config = llama.size("3.1-8b")
    matrices = config.num_parameters - (2 * 32 + 1) * 4096
    weights = 2 * (matrices - config.vocab_size * config.width)
    cache = 2 * 8 * 128 * 2 * 32 * 50 * 64
    found = generate("d1").memory * CLUSTER.device.bytes_per_second
    assert found == pytest.approx(100 * (weights + cache), rel=1e-6)
    # Tensor cuts both; data the cache alone.
    assert generate("t8").memory == pytest.approx(generate("d1").memory / 8)
    assert generate("d8").memory > generate("t8").memory * 6
    assert generate("d1").layers == 100 * 32


def test_slots_are_refilled():
    # 64 rows in 16 slots take four times the steps; with a longest row, some more.
    assert generate("d1", slots=16).layers == 4 * generate("d1").layers
    longer = generate("d1", slots=16, most_new_tokens=300)
    assert longer.layers == (400 + 200) * 32


def test_prompts_are_prefilled_in_whole_chunks():
    # 64 rows of 100 tokens in chunks of 4 x 128; one row alone has its own shape.
    prompts = {"prompt_tokens": 100, "new_tokens": 0, "most_new_tokens": 0}
    assert generate("d1", **prompts).programs == 16
    assert generate("d8", **prompts).programs == 2
    one, four = (generate("d1", num_rows=n, **prompts) for n in (1, 4))
    assert one.products == pytest.approx(four.products / 4)
    assert generate("d1", num_rows=2, **prompts) == four


def test_stages_that_generate_read_their_weights_for_every_group():
    one, two = generate("s1"), generate("s2")
    # Half the layers, for two groups of rows: nothing is won.
    assert two.layers == one.layers
    # Two a token.
    assert two.hops == 200
