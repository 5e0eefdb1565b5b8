"""Calls that are measured alone: the project's own programs on made sequences.

    Probe(kind="train", model=…, allocation=d2t2@0-3, num_rows=16, …)
        .work          what `cost.quantities` takes
    run = make_runner(probe)
    run()              runs the call once and waits for it

What a run of the trainer adds to a call (packing, arrays of the packing, hand-over of
its inputs) is part of it here, too.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from realjax.core.arrays import Array, PyTree
from realjax.data.packing import pack
from realjax.functions.function import Generate, Infer, Train
from realjax.functions.generate import GenerateProgram
from realjax.functions.infer import InferProgram
from realjax.functions.optimizer import OptimizerConfig
from realjax.functions.role import Role, RoleConfig
from realjax.functions.train import TrainProgram
from realjax.models import transformer
from realjax.models.config import ModelConfig
from realjax.parallel.allocation import Allocation
from realjax.parallel.mesh import make_mesh
from realjax.parallel.pipeline import num_pieces
from realjax.parallel.sharding import padded_for, parameter_shardings, rows_sharding
from realjax.planner.cost import CallWork, Kind
from realjax.realloc.crossing import upload
from realjax.rl.masking import Mean
from realjax.rl.sampling import Sampling
from realjax.rollout.settings import Settings

SEQUENCES_PER_ROW = 8
"""Slots of a microbatch for each of its rows, as the trainer has them."""

Runner = Callable[[], None]
"""Runs a call once, and waits until it is done."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
    """One call to be measured.

    Attributes:
        kind: of the call.
        model: of its role, as it is without padding.
        allocation: devices and strategy.
        num_rows: B, sequences; all are of the same length.
        prompt_tokens, new_tokens: of each.
        rows: of a microbatch, over all row shards.
        num_updates: optimizer steps, where it trains.
        dtype: of the products.
        remat: what the backward pass computes anew.
    """

    kind: Kind
    model: ModelConfig
    allocation: Allocation
    num_rows: int
    prompt_tokens: int
    new_tokens: int
    rows: int
    num_updates: int = 1
    dtype: str = "float32"
    remat: str = "none"

    @property
    def width(self) -> int:
        """Tokens of a sequence."""
        return self.prompt_tokens + self.new_tokens

    @property
    def microbatch_rows(self) -> int:
        """Rows of a microbatch, so that they divide over the row shards."""
        shards = self.allocation.num_row_shards
        return math.ceil(min(self.rows, self.num_rows) / shards) * shards

    @property
    def work(self) -> CallWork:
        """What the call has to do."""
        shards = self.allocation.num_row_shards
        tokens = self.microbatch_rows // shards * self.width
        return CallWork(
            kind=self.kind,
            model=self.model,
            num_rows=self.num_rows,
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens,
            most_new_tokens=self.new_tokens,
            num_updates=self.num_updates,
            microbatch_tokens=0 if self.kind == "generate" else tokens,
            pieces=num_pieces(self.microbatch_rows, shards, self.allocation.stage),
            itemsize=np.dtype(self.dtype).itemsize,
            remat=self.remat,
        )

    def __str__(self) -> str:
        """As in "train of 4 x 256 on d2t2@0-3: 16 x 64 tokens in rows of 8"."""
        sizes = f"{self.model.num_layers} x {self.model.width}"
        text = f"{self.kind} of {sizes} on {self.allocation}: {self.num_rows} x "
        if self.kind == "generate":
            return f"{text}{self.prompt_tokens} + {self.new_tokens} tokens"
        return f"{text}{self.width} tokens in {self.microbatch_rows} rows"


def make_runner(probe: Probe) -> Runner:
    """Prepare a call: parameters and inputs on its devices, nothing compiled.

    Args:
        probe: what to run.
    """
    role = Role(
        name="probe",
        config=RoleConfig(remat=probe.remat),
        model=padded_for(probe.model, [probe.allocation]),
        eos_ids=(0,),
        dtype=probe.dtype,
        is_trained=probe.kind == "train",
    )
    make = {"generate": _generating, "infer": _inferring, "train": _training}
    return make[probe.kind](probe, role, make_mesh(probe.allocation))


def parameters_on(
    model: ModelConfig, allocation: Allocation, dtype: str = "float32"
) -> PyTree:
    """Make parameters of a model where an allocation has them.

    Args:
        model: padded for the allocation.
        allocation: devices and strategy.
        dtype: of the parameters.
    """
    axes = transformer.abstract_parameters(model)
    generator = np.random.default_rng(0)

    def make(leaf: Any, sharding: Any) -> Array:
        drawn = generator.standard_normal(leaf.shape, np.float32) / 50
        return upload(drawn.astype(dtype), sharding)

    shardings = parameter_shardings(axes, make_mesh(allocation))
    is_leaf = lambda node: hasattr(node, "axes")
    return jax.tree.map(make, axes, shardings, is_leaf=is_leaf)


def _generating(probe: Probe, role: Role, mesh: jax.sharding.Mesh) -> Runner:
    shards = probe.allocation.num_row_shards
    sampling = Sampling(
        min_new_tokens=probe.new_tokens, max_new_tokens=probe.new_tokens
    )
    program = GenerateProgram(
        Generate(sampling=sampling),
        role.program(probe.allocation),
        mesh,
        eos_ids=role.eos_ids,
        width=probe.width,
        settings=Settings(slots=math.ceil(probe.num_rows / shards) * shards),
    )
    parameters = parameters_on(role.model, probe.allocation, probe.dtype)
    shape = (probe.num_rows, probe.prompt_tokens)
    prompts = {
        "prompts": _tokens(probe, shape),
        "lengths": np.full(probe.num_rows, probe.prompt_tokens, np.int32),
        "ids": np.arange(probe.num_rows, dtype=np.uint32),
    }
    key = jax.random.key(0)
    return lambda: jax.block_until_ready(program(parameters, prompts, key).lengths)


def _inferring(probe: Probe, role: Role, mesh: jax.sharding.Mesh) -> Runner:
    output = "logprobs" if role.model.head == "language" else "values"
    model = role.program(probe.allocation)
    program = InferProgram(Infer(output=output), model, mesh)
    parameters = parameters_on(role.model, probe.allocation, probe.dtype)
    batch = _batch(probe, mesh)
    everything = np.arange(probe.num_rows)

    def run() -> None:
        jax.block_until_ready(program(parameters, batch, _packings(probe, everything)))

    return run


def _training(probe: Probe, role: Role, mesh: jax.sharding.Mesh) -> Runner:
    is_language = role.model.head == "language"
    spec = Train(
        loss=_loss,
        output="logprobs" if is_language else "values",
        minibatches=probe.num_updates,
    )
    program = TrainProgram(
        spec,
        role.program(probe.allocation),
        mesh,
        OptimizerConfig(learning_rate=0.0),
        num_updates=1,
    )
    state = program.init_optimizer(parameters_on(role.model, probe.allocation))
    batch = _batch(probe, mesh)
    parts = np.array_split(np.arange(probe.num_rows), probe.num_updates)

    def run() -> None:
        nonlocal state
        minibatches = [_packings(probe, part) for part in parts]
        state, reports = program(state, batch, minibatches)
        jax.block_until_ready((state, reports))

    return run


def _loss(output: Array, batch: dict[str, Array]) -> tuple[Mean, dict[str, Mean]]:
    """The mean square: any output, and nothing else to compute."""
    return Mean.over(output**2, batch["mask"]), {}


def _tokens(probe: Probe, shape: tuple[int, int]) -> np.ndarray:
    generator = np.random.default_rng(1)
    return generator.integers(1, probe.model.vocab_size, shape).astype(np.int32)


def _batch(probe: Probe, mesh: jax.sharding.Mesh) -> dict[str, Array]:
    shape = (probe.num_rows, probe.width)
    rows = rows_sharding(mesh, probe.num_rows)
    arrays = {"tokens": _tokens(probe, shape), "mask": np.ones(shape, bool)}
    return {key: upload(array, rows) for key, array in arrays.items()}


def _packings(probe: Probe, members: np.ndarray) -> list:
    lengths = np.zeros(probe.num_rows, np.int32)
    lengths[members] = probe.width
    return pack(
        lengths,
        row_length=probe.width,
        num_rows=probe.microbatch_rows,
        max_sequences=min(probe.num_rows, SEQUENCES_PER_ROW * probe.microbatch_rows),
        width=probe.width,
        num_shards=probe.allocation.num_row_shards,
    )
