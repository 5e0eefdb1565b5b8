"""One step of any algorithm from a batch that is given, however it is cut.

    whole = run_step(grpo, grpo.GRPO(…), rollout, lengths)
    assert_equal(run_step(grpo, grpo.GRPO(…), rollout, lengths, CUTS["f8"]), whole)

What the batch holds already stands for the calls that would have made it: a rollout,
scores. All other calls run, by the programs of `realjax.functions`: what infers, what
transforms, and the gradient of every training call over the whole batch.
"""

import dataclasses
import functools

import jax
import numpy as np

from realjax.data.packing import pack
from realjax.functions.function import Infer, Train, Transform
from realjax.functions.infer import InferProgram
from realjax.functions.optimizer import OptimizerConfig
from realjax.functions.train import TrainProgram
from realjax.models.config import ModelConfig
from realjax.testing import tiny_model
from tests.functions.plain import (
    batch_on,
    mesh_of,
    model_on,
    parameters_on,
    sharp_parameters,
)


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a batch is cut.

    Attributes:
        place: allocation of every call.
        num_rows: packed rows of a microbatch.
        row_length: tokens of a packed row; None is the width of the batch.
        max_sequences: most sequences of a microbatch; None is all of them.
    """

    place: str = "d1"
    num_rows: int = 8
    row_length: int | None = None
    max_sequences: int | None = None


WHOLE = Cut()
"""One device, one microbatch, a row for each of up to 8 sequences."""

MICROBATCHES = Cut(num_rows=2, max_sequences=4)
PACKED = Cut(num_rows=2, row_length=72)
CUTS = {
    "microbatches": MICROBATCHES,
    "packed": PACKED,
    "d2f2t2": Cut("d2f2t2"),
    "t4s2": Cut("t4s2", num_rows=4),
    "f8": Cut("f8"),
    "d2s2t2 microbatches": Cut("d2s2t2", num_rows=4, max_sequences=2),
}
"""Other ways, which must make no difference."""


@dataclasses.dataclass(frozen=True)
class Step:
    """What a step gave, in NumPy.

    Attributes:
        made: batch keys that calls wrote.
        numbers: mean metrics of transforms and training calls, by "call/name".
        gradients: of the mean loss of each training call, by call.
        num_microbatches: of each call, by name.
    """

    made: dict[str, np.ndarray]
    numbers: dict[str, float]
    gradients: dict[str, dict[str, np.ndarray]]
    num_microbatches: dict[str, int]


def run_step(
    algorithm,
    hp,
    batch,
    lengths,
    cut=WHOLE,
    *,
    models=None,
    infer_program=InferProgram,
) -> Step:
    """Run the calls of a graph that the batch does not stand for.

    Args:
        algorithm: module with `graph`.
        hp: its hyperparameters.
        batch: NumPy arrays, [B, …], of the data set and of calls that have run.
        lengths: tokens of each row, [B]; or of several keys of tokens, by key.
        cut: how the batch lies.
        models: by role, where it is not a tiny Llama of the head that is needed.
        infer_program: what `Infer` is compiled to.
    """
    graph, made = algorithm.graph(hp), {}
    step = Step(made, {}, {}, {})
    models = dict(models or {})
    all_lengths = dict(lengths) if isinstance(lengths, dict) else {"tokens": lengths}
    for role in graph.roles:
        models.setdefault(role, tiny_model(head=_head(graph, role)))
    for name in graph.order():
        node, spec = graph.calls[name], graph.calls[name].function
        if node.writes and set(node.writes) <= set(batch):
            continue
        arrays = batch | made
        inputs = {
            local: arrays[node.key(local)]
            for local in spec.reads
            if node.key(local) in arrays  # A set that kept everything is not there.
        }
        if isinstance(spec, Transform):
            state = () if spec.state is None else (spec.state(),)
            *_, outputs, metrics = jax.jit(spec.fn)(*state, inputs)
            made.update({node.key(k): np.asarray(v) for k, v in outputs.items()})
            for key, mean in metrics.items():
                step.numbers[f"{name}/{key}"] = float(mean.value())
        elif isinstance(spec, Infer | Train):
            given = all_lengths[node.key("tokens")]
            if isinstance(spec, Train) and spec.only:
                given = np.where(inputs[spec.only].any(axis=1), given, 0)
            packings = packings_of(given, cut, inputs, unit=getattr(spec, "unit", 1))
            step.num_microbatches[name] = len(packings)
            place, config = cut.place, models[node.role]
            parameters = parameters_for(place, config, node.role)
            inputs = batch_on(place, inputs)
            if isinstance(spec, Infer):
                program = infer_program(spec, model_on(place, config), mesh_of(place))
                outputs = program(parameters, inputs, packings)
                made.update({node.key(k): np.asarray(v) for k, v in outputs.items()})
            else:
                _train(step, name, spec, cut, config, parameters, inputs, packings)
        else:
            raise ValueError(f"Call {name!r} makes {node.writes}: give it in `batch`.")
    return step


def packings_of(lengths, cut, inputs, *, unit=1):
    """Microbatches as a cut has them; a row for every shard at least."""
    width, mesh = inputs["tokens"].shape[1], mesh_of(cut.place).shape
    num_shards = mesh["data"] * mesh["fsdp"]
    max_sequences = max(cut.max_sequences or len(lengths), unit)
    return pack(
        np.asarray(lengths),
        row_length=cut.row_length or width,
        num_rows=-(-max(cut.num_rows, unit) // num_shards) * num_shards,
        max_sequences=max_sequences - max_sequences % unit,
        width=width,
        num_shards=num_shards,
        unit=unit,
    )


def _train(step, name, spec, cut, config, parameters, inputs, packings):
    program = TrainProgram(
        spec, model_on(cut.place, config), mesh_of(cut.place), OptimizerConfig(), 10
    )
    each = [vars(packing) for packing in packings]
    sums = program._zeros(parameters, inputs, each[0])
    for packing in each:
        sums = program._accumulate(parameters, sums, inputs, packing, None)
    gradient_sum, means = sums
    weight = float(means["loss"].weight)
    assert weight > 0
    step.gradients[name] = {
        jax.tree_util.keystr(path): np.asarray(leaf) / weight
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradient_sum)
    }
    for key, mean in means.items():
        step.numbers[f"{name}/{key}"] = float(mean.value())


@functools.cache
def parameters_for(place: str, config: ModelConfig, role: str):
    """Others for every role, the same at every place."""
    seed = sum(role.encode())
    return parameters_on(place, config, sharp_parameters(config, seed))


def _head(graph, role: str):
    outputs = {getattr(node.function, "output", "logprobs") for node in graph.of(role)}
    return "scalar" if outputs & {"scores", "values"} else "language"


def assert_equal(found: Step, expected: Step) -> None:
    """Equal keys, metrics and gradients, up to rounding."""
    assert found.made.keys() == expected.made.keys()
    for key, value in expected.made.items():
        message = f"the batch's {key}"
        if value.dtype.kind == "f":
            np.testing.assert_allclose(
                found.made[key], value, rtol=2e-4, atol=2e-4, err_msg=message
            )
        else:
            np.testing.assert_array_equal(found.made[key], value, err_msg=message)
    assert found.numbers.keys() == expected.numbers.keys()
    for key, number in expected.numbers.items():
        np.testing.assert_allclose(
            found.numbers[key], number, rtol=3e-4, atol=1e-5, err_msg=key
        )
    for call, gradients in expected.gradients.items():
        for path, value in gradients.items():
            np.testing.assert_allclose(
                found.gradients[call][path],
                value,
                rtol=0,
                atol=3e-4 * max(np.abs(value).max(), 1e-6),
                err_msg=f"the gradient of {call} to {path}",
            )
