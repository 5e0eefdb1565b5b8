"""Experts on meshes: the numbers of one device, and who holds and sends what."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax import tree_utils

from pallas_kernels.testing import hlo
from realjax.algorithms import sft
from realjax.functions.optimizer import OptimizerConfig
from realjax.functions.train import TrainProgram
from realjax.models import pages
from realjax.models.config import MoEConfig
from realjax.models.experts import Choice, ExpertKernels, apply_experts
from realjax.parallel import (
    Allocation,
    make_mesh,
    padded_for,
    parameter_shardings,
    rows_sharding,
)
from realjax.parallel.experts import experts_for, room
from realjax.testing import tiny_batch, tiny_model
from tests.functions.plain import (
    batch_on,
    mesh_of,
    model_on,
    pack_groups,
    parameters_on,
    sharp_parameters,
)
from tests.models.paged import extend

B, T, D, F, E, TOP_K = 8, 32, 16, 24, 8, 2
FAST = ("e4", "f2e2t2+sequence")
SLOW = (
    *("d8", "f8", "t8", "d2t4", "f4t2", "e2", "e8", "e2t2", "f2e2t2", "d2f2e2"),
    *("d2e2t2", "e2t2+sequence", "f4t2+sequence", "t4+sequence", "f4e2+zero1"),
)


WIDE, TALL = ("expert", "embed", "mlp"), ("expert", "mlp", "embed")
AXES_OF_KERNELS = ExpertKernels._make((WIDE, WIDE, TALL))


def slow(cases):
    tuples = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=pytest.mark.slow) for case in tuples]


@functools.cache
def numbers(dtype="float32", shape=(B, T), num_experts=E):
    """Tokens, weights, kernels and a cotangent of the output."""
    generator = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(generator.standard_normal(shape, np.float32))

    kernels = ExpertKernels(
        gate=draw(num_experts, D, F) / 4,
        up=draw(num_experts, D, F) / 4,
        down=draw(num_experts, F, D) / 5,
    )
    weights = jnp.asarray(generator.uniform(0.1, 1, (*shape, TOP_K)), jnp.float32)
    tokens, bar = draw(*shape, D), draw(*shape, D)
    return tokens.astype(dtype), weights, kernels, bar.astype(dtype)


def chosen(name, shape=(B, T), num_experts=E):
    """Experts of every token, [B, T, k]."""
    generator = np.random.default_rng(1)
    scores = generator.standard_normal((*shape, num_experts))
    even = np.argsort(scores, axis=-1)[..., :TOP_K]
    first = np.zeros((*shape, 1), int)
    return {
        "any": even,
        # Of 128 pairs on a shard of e4, 40 find room in a round: 4 rounds. The other
        # expert of the pair is none.
        "all on one": np.concatenate([first + 1, first + num_experts], axis=-1),
        "two experts": np.concatenate([first + num_experts - 1, first], axis=-1),
        "some none": np.where(
            generator.uniform(size=even.shape) < 0.4, num_experts, even
        ),
        "none": np.full_like(even, num_experts),
    }[name].astype(np.int32)


@functools.cache
def program(place, num_rows=B):
    """Output and gradients of tokens, weights and kernels, compiled for a mesh."""
    allocation = Allocation.parse(place)
    mesh, options = make_mesh(allocation), allocation.options
    apply = experts_for(mesh, options=options) if mesh.size > 1 else apply_experts

    def run(tokens, weights, kernels, bar, experts):
        def out(tokens, weights, kernels):
            return apply(tokens, Choice(experts, weights), kernels, "silu")

        out, backward = jax.vjp(out, tokens, weights, kernels)
        return out, backward(bar)

    rows = rows_sharding(mesh, num_rows)
    kernels = parameter_shardings(AXES_OF_KERNELS, mesh, options=options)
    return jax.jit(
        run,
        in_shardings=(rows, rows, kernels, rows, rows),
        out_shardings=(rows, (rows, rows, kernels)),
    )


@functools.cache
def compiled(place, dtype="float32"):
    return program(place).lower(*numbers(dtype), chosen("any")).compile()


def run(place, case, dtype="float32", **sizes):
    arrays = numbers(dtype, **sizes)
    return program(place, len(arrays[0]))(*arrays, chosen(case, **sizes))


def assert_equal(found, expected, tolerance=2e-6):
    """Each array to a part of its largest entry."""
    leaves = jax.tree_util.tree_leaves_with_path(found)
    for (path, a), b in zip(leaves, jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        size, name = np.abs(b).max(), jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, atol=tolerance * size, rtol=0, err_msg=name)


# -- the numbers of one device -----------------------------------------------------


@pytest.mark.parametrize("place", [*FAST, *slow(SLOW)])
@pytest.mark.parametrize(
    "case", ["any", "all on one", "two experts", "some none", "none"]
)
def test_outputs_and_gradients_are_those_of_one_device(place, case):
    assert_equal(run(place, case), run("d1", case))


def test_a_round_takes_a_quarter_more_than_the_even_share():
    # Of 800 pairs 200 go to each of 4 shards.
    assert room(800, 4) == 250
    # Small shares are uneven: 10 of 40 pairs, and 32 find room.
    assert room(40, 4) == 32
    # Nor is there more to send than there is.
    assert room(5, 4) == 5


@pytest.mark.parametrize("place", ["e4", *slow(["e2t2", "f2e2t2"])])
def test_rows_that_the_expert_axis_does_not_divide_are_worked_on_by_every_shard(place):
    # As in the last steps of a generation: one token in each of a few rows.
    sizes = {"shape": (1, 1)}
    assert_equal(run(place, "any", **sizes), run("d1", "any", **sizes))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["any", "all on one"])
def test_a_shard_may_have_one_expert(case):
    sizes = {"num_experts": 4}
    assert_equal(run("e4", case, **sizes), run("d1", case, **sizes))


@pytest.mark.parametrize("place", slow(["f2e2", "f4t2+sequence", "d2e2t2", "e4"]))
def test_gradients_of_kernels_are_summed_in_float32_where_products_are_bfloat16(place):
    out, bars = run(place, "any", "bfloat16")
    assert {leaf.dtype for leaf in (out, bars[0])} == {jnp.dtype("bfloat16")}
    for leaf in (*bars[1:2], *bars[2]):
        assert leaf.dtype == jnp.float32
        # The lower half is zero where a number went through bfloat16.
        low = np.asarray(leaf).view(np.uint32) & 0xFFFF
        assert (low != 0).mean() > 0.9
    # Of sums of 8 bits' products.
    assert_equal((out, bars), run("d1", "any"), tolerance=2e-2)


# -- who holds and sends what ------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "part"),
    [
        ("e4", (E // 4, D, F)),
        ("f2e2t2+sequence", (E // 2, D // 2, F // 2)),
        *slow([("d2e2t2", (E // 2, D, F // 2))]),
        *slow([("f4e2+zero1", (E // 2, D, F))]),
    ],
)
def test_gradients_of_kernels_lie_as_the_kernels_do(place, part):
    _, (_, _, kernels) = run(place, "any")
    for leaf in (kernels.gate, kernels.up, kernels.down.swapaxes(1, 2)):
        assert {shard.data.shape for shard in leaf.addressable_shards} == {part}


@pytest.mark.parametrize("place", ["e4", *slow(["d2e2t2", "f2e2t2", "e8"])])
def test_no_device_ever_has_the_kernels_of_all_experts(place):
    # Nor those of one matrix of all of them, in any dtype.
    text = compiled(place).as_text()
    whole = {f"[{E},{D},{F}]", f"[{E},{F},{D}]", f"[{E},{D},{F // 2}]"}
    assert f"[{E // Allocation.parse(place).expert},{D}," in text
    assert not {shape for shape in whole if shape in text}


def test_tokens_go_to_the_shards_of_their_experts_and_back():
    found = hlo.collectives(compiled("e4").as_text())
    exchanges = [c for c in found if c.kind == "all-to-all" and c.num_bytes]
    # Tokens there, outputs back, and the gradients of both; of a round 4 times the room
    # for 32 of 128 pairs, 40.
    first = [c for c in exchanges if not c.is_looped and "f32" in c.shape]
    assert [c.shape for c in first] == [f"4 x f32[40,{D}]"] * 4
    # Later rounds are loops of the same: forward, and both in the backward pass.
    later = [c for c in exchanges if c.is_looped and "f32" in c.shape]
    assert [c.shape for c in later] == [f"4 x f32[40,{D}]"] * 6
    # All shards need to know how many rounds there are; nothing else is moved.
    others = [c for c in found if c.kind != "all-to-all"]
    assert [(c.kind, c.shape) for c in others] == [("all-reduce", "s32[]")]


@pytest.mark.parametrize("place", ["t4", *slow(["d8"])])
def test_without_an_expert_axis_devices_only_sum(place):
    found = hlo.collectives(compiled(place).as_text())
    assert {c.kind for c in found} == {"all-reduce"}
    # Outputs, and gradients of tokens and of weights, over tensor; or those of kernels
    # over data. XLA joins them to one.
    sums = {
        "t4": [f"2 x f32[{B},{T},{D}] + f32[{B},{T},{TOP_K}]"],
        "d8": [f"2 x f32[{E},{D},{F}] + f32[{E},{F},{D}]"],
    }
    assert [c.shape for c in found] == sums[place]


@pytest.mark.parametrize("place", slow(["f4t2+sequence"]))
def test_split_sequences_are_gathered_and_scattered_again(place):
    found = hlo.collectives(compiled(place).as_text())
    tokens = f"f32[{B // 4},{T},{D}]"
    half = f"f32[{B // 4},{T // 2},{D}]"
    shapes = lambda kind: [c.shape for c in found if c.kind == kind]
    assert tokens in shapes("all-gather")
    assert half in shapes("reduce-scatter")
    assert tokens not in shapes("all-reduce")


# -- in a model --------------------------------------------------------------------


MODEL = tiny_model(
    num_layers=2,
    moe=MoEConfig(num_experts=4, top_k=2, aux_loss_coef=0.1, z_loss_coef=0.01),
)
BATCH = tiny_batch(8, 24)
SFT = sft.graph(sft.SFT()).calls["train_policy"].function
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_fraction=0.0, beta1=0.5)


@functools.cache
def trained(place, remat):
    """The gradient of a step."""
    model = padded_for(MODEL, [Allocation.parse(place)])
    program = model_on(place, model, remat=remat)
    train = TrainProgram(SFT, program, mesh_of(place), OPTIMIZER, 10)
    names = ("tokens", "completion_mask")
    batch = batch_on(place, {name: np.asarray(BATCH[name]) for name in names})
    state = train.init_optimizer(parameters_on(place, model, sharp_parameters(model)))
    packings = pack_groups(BATCH.lengths, [range(8)], num_shards=8)
    state, _ = train(state, batch, [packings])
    return jax.device_get(tree_utils.tree_get(state.optimizer, "mu"))


@pytest.mark.parametrize(
    ("place", "remat"),
    slow([("s2e2", "none"), ("s2e2t2", "dots"), ("e2t2", "dots"), ("f2e2", "block")]),
)
def test_layers_that_are_computed_again_give_the_same_gradient(place, remat):
    assert_equal(trained(place, remat), trained("d1", "none"), tolerance=1e-5)


@functools.cache
def generated(place):
    """Hidden states of eight tokens: seven at once, then one."""
    partition = model_on(place, MODEL).partition
    num_parts = Allocation.parse(place).num_row_shards
    tokens = np.maximum(np.asarray(BATCH["tokens"])[:, :8], 2)

    @jax.jit
    def run(parameters, tokens):
        pool, hidden = pages.empty(MODEL, 8, 8, "float32", partition), []
        for start, end in ((0, 7), (7, 8)):
            part, pool = extend(
                *(parameters, MODEL, tokens[:, start:end], pool),
                start=start,
                num_parts=num_parts,
                partition=partition,
            )
            hidden.append(part)
        return jnp.concatenate(hidden, axis=1)

    parameters = parameters_on(place, MODEL, sharp_parameters(MODEL))
    return jax.device_get(run(parameters, tokens))


@pytest.mark.parametrize("place", slow(["e2", "e2t2", "d2e4"]))
def test_generation_sends_each_token_to_its_experts(place):
    assert_equal(generated(place), generated("d1"), tolerance=1e-5)
