"""How far a sampler of 8 bits is from its trainer.

    python -m realjax.bench.precision

The five million parameters of `realjax.bench.quick`, twice: as drawn, and after some
steps of SFT on chains of 64 tokens, each of which has 8 that may follow. 32
completions of 64 tokens are sampled at temperature 1 with weights, and keys and values,
of each type; the trainer, in float32 throughout, scores them. Reported are the mean and
the largest |Δ log-probability| of a token and the KL of the sampler from the trainer
(k3). The last line is one JSON object. On one device; nothing is timed.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from realjax.algorithms import sft
from realjax.bench.environment import describe
from realjax.bench.quick import MODEL, NO_EOS
from realjax.core.arrays import Array, Int, PyTree
from realjax.data.packing import Packing, pack
from realjax.functions.function import Generate, Infer, Train
from realjax.functions.generate import GenerateProgram
from realjax.functions.infer import InferProgram
from realjax.functions.optimizer import OptimizerConfig
from realjax.functions.packed import ModelProgram
from realjax.functions.train import TrainProgram
from realjax.models import quantized, transformer
from realjax.models.config import ModelConfig
from realjax.parallel.allocation import Allocation
from realjax.parallel.mesh import make_mesh
from realjax.parallel.partition import partition_for
from realjax.rl import importance
from realjax.rl.sampling import Sampling
from realjax.rollout.settings import Settings

NUM_TOKENS = 64
"""Of the vocabulary that are in chains."""

NEXT = 8
"""Tokens that may follow one of a chain, the k-th with a probability as of 1 / k."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Types of a sampler.

    Attributes:
        dtype: of its products.
        weights: of its matrices; "" is `dtype`.
        kv_dtype: of its keys and values; "" is `dtype`.
    """

    dtype: str = "float32"
    weights: str = ""
    kv_dtype: str = ""


CASES = (
    Case(),
    Case(dtype="bfloat16"),
    *(Case(kv_dtype=kv) for kv in ("bfloat16", "int8", "float8_e4m3fn")),
    *(Case(weights=weights) for weights in quantized.DTYPES),
    *(Case(weights=both, kv_dtype=both) for both in quantized.DTYPES),
    Case(dtype="bfloat16", weights="int8", kv_dtype="int8"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the bench.

    Attributes:
        model: whose numbers are drawn.
        num_prompts, prompt_length, new_tokens: of the rollout.
        sft_steps: before the second rollout.
    """

    model: ModelConfig = MODEL
    num_prompts: int = 32
    prompt_length: int = 64
    new_tokens: int = 64
    sft_steps: int = 120

    @property
    def width(self) -> int:
        """Tokens of a row."""
        return self.prompt_length + self.new_tokens


def measure(sizes: Sizes, cases: Sequence[Case] = CASES) -> dict[str, Any]:
    """Every case for drawn and for tuned parameters."""
    mesh, chain = make_mesh(Allocation.parse("d1")), Chain()
    init = jax.jit(transformer.init_parameters, static_argnums=0)
    drawn = init(sizes.model, jax.random.key(0))
    tuned, losses = tune(sizes, drawn, chain, mesh)
    found: dict[str, Any] = {"sft_loss": {"first": losses[0], "last": losses[-1]}}
    found |= {"drawn": [], "tuned": []}
    for case in cases:
        compare = comparison(sizes, case, chain, mesh)
        for name, parameters in (("drawn", drawn), ("tuned", tuned)):
            entry = dataclasses.asdict(case) | compare(parameters)
            print(name, entry, file=sys.stderr)
            found[name].append(entry)
    return found


class Chain:
    """Texts: each token is followed by one of a few, drawn once for all texts."""

    def __init__(self):
        """Draws what may follow each token."""
        generator = np.random.default_rng(0)
        self.following = generator.integers(2, NUM_TOKENS, (NUM_TOKENS, NEXT))
        self.odds = 1 / np.arange(1, NEXT + 1)
        self.odds /= self.odds.sum()

    def draw(self, seed: int, num_rows: int, length: int) -> Int[np.ndarray, "B T"]:
        """Texts of one length."""
        generator = np.random.default_rng((1, seed))
        picks = generator.choice(NEXT, (num_rows, length), p=self.odds)
        tokens = np.empty((num_rows, length), np.int32)
        tokens[:, 0] = generator.integers(2, len(self.following), num_rows)
        for place in range(1, length):
            tokens[:, place] = self.following[tokens[:, place - 1], picks[:, place]]
        return tokens


def program_of(sizes: Sizes, dtype: str, mesh: jax.sharding.Mesh) -> ModelProgram:
    """The model in a type of products."""
    return ModelProgram(config=sizes.model, dtype=dtype, partition=partition_for(mesh))


def packings_of(lengths: np.ndarray, width: int) -> list[Packing]:
    """Microbatches of 8 rows."""
    return pack(lengths, row_length=width, num_rows=8, max_sequences=8, width=width)


def tune(
    sizes: Sizes, parameters: PyTree, chain: Chain, mesh: jax.sharding.Mesh
) -> tuple[PyTree, list[float]]:
    """Some steps on 8 texts each; also the losses."""
    spec = Train(loss=sft.loss, reads=("tokens", "completion_mask"))
    config = OptimizerConfig(learning_rate=3e-3)
    model = program_of(sizes, "float32", mesh)
    train = TrainProgram(spec, model, mesh, config, sizes.sft_steps)
    state = train.init_optimizer(jax.tree.map(jnp.copy, parameters))
    lengths, losses = np.full(8, sizes.width, np.int32), []
    mask = np.ones((8, sizes.width), bool)
    mask[:, 0] = False
    for step in range(sizes.sft_steps):
        tokens = chain.draw(step, 8, sizes.width)
        batch = jax.device_put({"tokens": tokens, "completion_mask": mask})
        state, reports = train(state, batch, [packings_of(lengths, sizes.width)])
        losses.append(round(float(reports[0]["loss"].value()), 4))
        print(f"SFT {step + 1}/{sizes.sft_steps}: {losses[-1]}", file=sys.stderr)
    return state.parameters, losses


def comparison(
    sizes: Sizes, case: Case, chain: Chain, mesh: jax.sharding.Mesh
) -> Callable[[PyTree], dict[str, float]]:
    """What samples in the types of a case, scores in float32, and compares."""
    sampling = Sampling(max_new_tokens=sizes.new_tokens)
    generate = GenerateProgram(
        Generate(sampling=sampling),
        program_of(sizes, case.dtype, mesh),
        mesh,
        eos_ids=NO_EOS,
        width=sizes.width,
        settings=Settings(slots=sizes.num_prompts, kv_dtype=case.kv_dtype),
    )
    prompts = {
        "prompts": chain.draw(sizes.sft_steps, sizes.num_prompts, sizes.prompt_length),
        "lengths": np.full(sizes.num_prompts, sizes.prompt_length, np.int32),
        "ids": np.arange(sizes.num_prompts, dtype=np.uint32),
    }
    infer = InferProgram(Infer(), program_of(sizes, "float32", mesh), mesh)

    def compare(parameters: PyTree) -> dict[str, float]:
        copy = jax.tree.map(lambda leaf: leaf.astype(case.dtype), parameters)
        if case.weights:
            copy = jax.jit(quantized.quantize, static_argnums=1)(copy, case.weights)
        rollout = generate(copy, prompts, jax.random.key(1))
        packings = packings_of(np.asarray(rollout.lengths), sizes.width)
        found = infer(parameters, {"tokens": rollout.tokens}, packings)
        return compared(
            found["logprobs"], rollout.old_logprobs, rollout.completion_mask
        )

    return compare


def compared(logprobs: Array, old_logprobs: Array, mask: Array) -> dict[str, float]:
    """Gaps, to four digits, and how likely the tokens are, for their scale."""
    means = importance.gap(logprobs, old_logprobs, mask)
    largest = importance.largest_gap(logprobs, old_logprobs, mask)
    numbers = {
        "mean": means["rollout_gap/logprob"].value(),
        "largest": largest,
        "kl": means["rollout_gap/kl"].value(),
        "mean_logprob": jnp.mean(logprobs, where=mask),
    }
    return {name: float(f"{float(value):.4g}") for name, value in numbers.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints what is found as it is found, then one line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--num_prompts", type=int, default=Sizes.num_prompts)
    parser.add_argument("--sft_steps", type=int, default=Sizes.sft_steps)
    options = parser.parse_args(arguments)
    sizes = Sizes(num_prompts=options.num_prompts, sft_steps=options.sft_steps)
    result = {"bench": "precision", **describe(), "parameters": MODEL.num_parameters}
    shapes = dataclasses.asdict(sizes)
    del shapes["model"]
    print(json.dumps(result | shapes | measure(sizes)))


if __name__ == "__main__":
    main()
