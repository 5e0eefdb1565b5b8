"""Every family under every strategy: the numbers of one device, from parts of it.

One optimizer step on a mesh is compared with one device in float32, in one microbatch
and in three, and the strategy is held to what it promises: the bytes a device keeps of
parameters and moments, and the collectives of the program.
"""

import dataclasses
import functools
import math
import re
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from optax import tree_utils

from realjax.algorithms import sft
from realjax.functions.optimizer import OptimizerConfig
from realjax.functions.train import TrainProgram
from realjax.models.transformer import abstract_parameters
from realjax.parallel import Allocation, padded_for, replicated
from realjax.testing import tiny_batch
from tests.functions.plain import (
    batch_on,
    mesh_of,
    model_on,
    pack_groups,
    parameters_on,
    sharp_parameters,
)
from tests.tiny_families import FAMILIES

SIZE, WIDTH = 16, 24
BATCH = tiny_batch(SIZE, WIDTH, vocab_size=61)
ARRAYS = {name: np.asarray(BATCH[name]) for name in ("tokens", "completion_mask")}
SPEC = sft.graph(sft.SFT()).calls["train_policy"].function
# Adam divides a gradient by its size: of entries near epsilon, a millionth of the norm
# here, the rounding of their sums shows in the update, as some 1e-4 of this rate.
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_fraction=0.0, epsilon=1e-5)

STRATEGIES = {
    # What a program must hold; a bar is "or": XLA writes a reduce-scatter as it likes.
    "d8": ("all-reduce",),
    "f8": ("all-gather", "reduce-scatter|all-reduce"),
    "f8+zero1": ("reduce-scatter|all-reduce",),
    "t2": ("all-reduce",),
    "t8": ("all-reduce",),
    "d2t4": ("all-reduce",),
    "f4t2": ("all-gather", "all-reduce"),
    "s2": ("collective-permute",),
    "s4t2": ("collective-permute", "all-reduce"),
    "d2s2t2": ("collective-permute", "all-reduce"),
    "t4+sequence": ("all-gather", "reduce-scatter|all-reduce"),
}
EXPERT_STRATEGIES = {
    "e4": ("all-to-all", "all-reduce"),
    "e2t2": ("all-to-all", "all-reduce"),
}


class Step(NamedTuple):
    """One optimizer step, on the host and without padding."""

    loss: float
    gradients: Any
    parameters: Any


@functools.cache
def config_of(family, num_kv_heads=None):
    config = FAMILIES[family]
    if num_kv_heads is None:
        return config
    return dataclasses.replace(config, num_kv_heads=num_kv_heads)


def padded(config, text):
    return padded_for(config, [Allocation.parse(text)])


class Program:
    """The compiled step of one model on one mesh."""

    def __init__(self, config, text):
        self.text, self.config = text, padded(config, text)
        model = model_on(text, self.config)
        self.program = TrainProgram(SPEC, model, mesh_of(text), OPTIMIZER, 10)
        self.batch = batch_on(text, ARRAYS)
        parameters = sharp_parameters(self.config)
        parameters = parameters_on(text, self.config, parameters)
        self.state = self.program.init_optimizer(parameters)
        packing = vars(microbatches(1)[0])
        whole = replicated(mesh_of(text))
        abstract = jax.tree.map(abstract_of, parameters), means_of(config)
        self.zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), abstract)
        self.shardings = (
            self.program._cut,
            jax.tree.map(lambda _: whole, abstract[1]),
        )
        sums = jax.device_put(self.zeros, self.shardings)
        self.accumulate = self.program._accumulate.lower(
            parameters, sums, self.batch, packing, self.router(1)
        ).compile()
        self.apply = self.program._apply.lower(self.state, sums).compile()

    def router(self, count):
        packings = microbatches(count)
        arrays = [vars(packing) for packing in packings]
        return self.program._router_inputs(self.batch, packings, arrays, None, 0)

    def sums(self, count):
        sums, router = jax.device_put(self.zeros, self.shardings), self.router(count)
        for packing in microbatches(count):
            arrays = vars(packing)
            sums = self.accumulate(
                self.state.parameters, sums, self.batch, arrays, router
            )
        return sums

    def step(self, count):
        sums = self.sums(count)
        gradients = unpadded(self.config, sums[0])
        # It is consumed. (Copies on the devices would be a program for every leaf.)
        state = jax.device_put(jax.device_get(self.state), self.program.shardings)
        new, report = self.apply(state, sums)
        assert float(report["skipped"].value()) == 0
        loss = float(report["loss"].value())
        return Step(loss, gradients, unpadded(self.config, new.parameters))


def abstract_of(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


@functools.cache
def means_of(config):
    """Shapes of what is summed beside the gradients: the same on every mesh."""
    program = TrainProgram(SPEC, model_on("d1", config), mesh_of("d1"), OPTIMIZER, 10)
    packing, batch = vars(microbatches(1)[0]), batch_on("d1", ARRAYS)
    parameters = jax.tree.map(abstract_of, sharp_parameters(config))
    return jax.eval_shape(program._zeros, parameters, batch, packing)[1]


@functools.cache
def microbatches(count):
    """All sequences in so many microbatches of one shape, each place of a row used."""
    groups = np.array_split(np.arange(SIZE)[::-1], count)
    return pack_groups(BATCH.lengths, groups, num_shards=8, width=WIDTH)


def unpadded(config, tree):
    def cut(parameter, array):
        array = np.asarray(array)
        real = tuple(slice(size) for size in parameter.real_shape)
        outside = array.copy()
        outside[real] = 0
        assert not outside.any(), "Padding has changed."
        return array[real]

    abstract = abstract_parameters(config)
    is_leaf = lambda node: hasattr(node, "axes")
    return jax.tree.map(cut, abstract, tree, is_leaf=is_leaf)


@functools.cache
def one_device(family, num_kv_heads):
    return Program(config_of(family, num_kv_heads), "d1").step(1)


def assert_close(gradients, expected):
    """Each leaf within 1e-5 of its norm, or of a thousandth of that of all."""
    norms = [np.linalg.norm(leaf) for leaf in jax.tree.leaves(expected)]
    floor = 1e-3 * math.sqrt(sum(norm**2 for norm in norms))
    for (path, leaf), other in zip(
        jax.tree_util.tree_leaves_with_path(gradients),
        jax.tree.leaves(expected),
        strict=True,
    ):
        error = np.linalg.norm(leaf - other) / max(np.linalg.norm(other), floor)
        assert error <= 1e-5, f"gradient {jax.tree_util.keystr(path)}: {error:.1e}"


def assert_equal_steps(found, expected):
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert_close(found.gradients, expected.gradients)
    for (path, leaf), other in zip(
        jax.tree_util.tree_leaves_with_path(found.parameters),
        jax.tree.leaves(expected.parameters),
        strict=True,
    ):
        error = np.abs(leaf - other).max() / np.abs(other).max()
        assert error <= 1e-5, f"parameter {jax.tree_util.keystr(path)}: {error:.1e}"


def promised_bytes(config, text, *, has_moments):
    """Float32 bytes of a device, from the degrees of the strategy alone."""
    size = Allocation.parse(text)
    is_cut = has_moments or "zero1" not in size.options
    parts = {
        "vocab": size.stage * size.tensor,
        "heads": size.tensor,
        "kv_heads": size.tensor if config.num_kv_heads % size.tensor == 0 else 1,
        "mlp": size.tensor,
        "mlp_in": size.tensor * (size.fsdp if is_cut else 1),
        "embed": size.fsdp if is_cut else 1,
        "layer": size.stage,
        "expert": size.expert,
    }
    leaves = jax.tree.leaves(
        abstract_parameters(config), is_leaf=lambda node: hasattr(node, "axes")
    )
    return sum(
        4 * math.prod(leaf.shape) // math.prod(parts.get(name, 1) for name in leaf.axes)
        for leaf in leaves
    )


def held_bytes(tree):
    leaves = jax.tree.leaves(tree)
    held = {
        sum(leaf.addressable_shards[index].data.nbytes for leaf in leaves)
        for index in range(len(leaves[0].addressable_shards))
    }
    assert len(held) == 1, "Devices hold unlike amounts."
    return held.pop()


def assert_promises_are_kept(program, collectives):
    config, text, state = program.config, program.text, program.state
    whole = promised_bytes(config, text, has_moments=False)
    assert held_bytes(state.parameters) == whole
    cut = promised_bytes(config, text, has_moments=True)
    for moment in ("mu", "nu"):
        assert held_bytes(tree_utils.tree_get(state.optimizer, moment)) == cut
    assert held_bytes(program.sums(1)[0]) == cut
    text = program.accumulate.as_text() + program.apply.as_text()
    for names in collectives:
        pattern = rf"= \S+ (?:{names})(?:-start)?\("
        assert re.search(pattern, text) or re.search(rf" (?:{names})\(", text), names


CELLS = [
    (family, text, None)
    for family in FAMILIES
    for text in (
        *STRATEGIES,
        *(EXPERT_STRATEGIES if FAMILIES[family].moe is not None else ()),
    )
]
# Llama has 2 key heads in the cells above.
CELLS += [("llama", text, count) for text in STRATEGIES for count in (1, 8)]


def is_sample(family, text, num_kv_heads):
    every = family in ("llama", "qwen3_moe") and num_kv_heads is None
    return every or (text in ("f4t2", "s2") and num_kv_heads is None)


@pytest.mark.parametrize(
    ("family", "text", "num_kv_heads"),
    [
        pytest.param(*cell, marks=() if is_sample(*cell) else pytest.mark.slow)
        for cell in CELLS
    ],
)
def test_a_step_is_that_of_one_device_from_parts_of_it(family, text, num_kv_heads):
    program = Program(config_of(family, num_kv_heads), text)
    for count in (1, 3):
        assert_equal_steps(program.step(count), one_device(family, num_kv_heads))
    assert_promises_are_kept(program, (STRATEGIES | EXPERT_STRATEGIES)[text])


@pytest.mark.slow
@pytest.mark.parametrize(("family", "text"), [("llama", "f4t2"), ("qwen3_moe", "f4e2")])
def test_no_device_has_the_embedding_s_gradient_in_its_full_width(family, text):
    # A number of ids that no other array has.
    config = dataclasses.replace(config_of(family), vocab_size=97)
    program = Program(config, text)
    rows, width = program.config.padded_vocab_size, program.config.width
    # Nor half of it, which gradients of other cuts could be brought through.
    for part in (width, width // 2):
        assert f"f32[{rows},{part}]" not in program.accumulate.as_text()
