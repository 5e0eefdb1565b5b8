r"""Seconds of the steps that ReaL's paper shows, and of others like them.

    python -m realjax.bench.published_steps
    python -m realjax.bench.published_steps --policy=13 --critic=7 --new_tokens=384 \
      --batch=256 --gpus=16 --plan=template
    python -m realjax.bench.published_steps --sweep=docs

The first fits the eight coefficients of `planner/cost.py` to the 15 steps of
`published_steps.json`, says how well each is predicted from the other 14, and each size
of models from the other sizes, and writes `published_coefficients.json`.

The second predicts one step of PPO with these: sizes of the policy and the reference,
and of the critic and the reward model (7, 13, 34 or 70, in billions: Llama 2 and Code
Llama), tokens of prompts (128) and completions, sequences of a step (by default those
of 2^17 tokens), H100s in nodes of eight, and the plan:

    template     ReaL's heuristic: tensor over a node, stages over nodes, one call after
                 another; every completion decoded at once, log-probabilities from the
                 sampler, a minibatch in twice as many parts as stages, full recompute,
                 reference and reward model in host memory between their calls
    symmetric    the fastest strategy that all calls can have on all devices
    searched     the best plan of two searches: among our options, as our runs take
                 them, and among ReaL's (data, tensor and stage, halves of a node, also
                 generation in stages), as ReaL runs them; says which, and gives both

The third does so for all sizes on 8 to 128 GPUs, where they fit, and draws how much
shorter steps of searched plans are than the template's. All prints end in one line of
JSON. Nothing is measured here: seconds are those of the model, whose coefficients come
from the paper's figure.
"""

import argparse
import dataclasses
import functools
import json
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from realjax.algorithms import ppo
from realjax.dataflow.graph import DataflowGraph
from realjax.functions.function import Generate, Infer, Train
from realjax.functions.role import Role, RoleConfig
from realjax.models.config import ModelConfig
from realjax.models.families import llama
from realjax.parallel.allocation import Allocation
from realjax.planner.cluster import Cluster
from realjax.planner.coefficients import DATA_SHEET, fit
from realjax.planner.cost import CallWork, Coefficients, Quantities, quantities
from realjax.planner.heuristic import template_plan
from realjax.planner.memory import Work
from realjax.planner.search import search
from realjax.planner.space import Lengths, Space, make_space, table
from realjax.planner.strategies import REAL, Rules
from realjax.planner.symmetric import symmetric_plans
from realjax.rl import Sampling

FOLDER = pathlib.Path(__file__).parent
COEFFICIENTS = FOLDER / "published_coefficients.json"
COMMAND = "python -m realjax.bench.published_steps"
TRUST = 0.01
"""In the default coefficients: of those tried, from 0.002 to 0.05, the one with the
least errors of sizes of models that are left out."""

SIZES = {7: "2-7b", 13: "2-13b", 34: "code-34b", 70: "2-70b"}
PLANS = ("template", "symmetric", "searched")
MINIBATCHES = 4
TOKENS_OF_A_STEP = 2**17
GPUS_OF_A_NODE = 8
MICROBATCH_TOKENS = 8192
"""For each device, where a plan does not say."""

MOVES = 2048
"""Of each chain of a search, whose result so depends on its seed alone."""

MOST_STARTS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedStep:
    """A step of PPO as the paper has them.

    Attributes:
        policy: billions of parameters of policy and reference.
        critic: of critic and reward model.
        prompt_tokens, new_tokens: of every sequence.
        batch: sequences of a step; 0 takes 2^17 tokens.
        gpus: H100s, in nodes of eight.
    """

    policy: int
    critic: int
    prompt_tokens: int = 128
    new_tokens: int = 384
    batch: int = 0
    gpus: int = 8

    def __post_init__(self):
        """Refuses sizes that the paper has none of, and parts of a node."""
        for name in ("policy", "critic"):
            if getattr(self, name) not in SIZES:
                raise ValueError(
                    f"The {name} has {getattr(self, name)} billion parameters; give"
                    f" one of {', '.join(map(str, SIZES))}."
                )
        if self.gpus < 1 or self.gpus % GPUS_OF_A_NODE:
            raise ValueError(
                f"There are {self.gpus} GPUs, and nodes of {GPUS_OF_A_NODE}. Give a"
                " multiple of it."
            )
        if min(self.prompt_tokens, self.new_tokens) < 1:
            raise ValueError("Prompts and completions need at least one token each.")
        if not self.batch:
            tokens = self.prompt_tokens + self.new_tokens
            object.__setattr__(self, "batch", TOKENS_OF_A_STEP // tokens)

    @property
    def cluster(self) -> Cluster:
        """The machine."""
        return Cluster.load(f"{self.gpus // GPUS_OF_A_NODE}x{GPUS_OF_A_NODE}xh100")

    @property
    def template(self) -> Allocation:
        """What all calls have in ReaL's heuristic plan."""
        return Allocation(tensor=GPUS_OF_A_NODE, stage=self.gpus // GPUS_OF_A_NODE)

    @property
    def lengths(self) -> Lengths:
        """No completion ends early."""
        return Lengths(
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens,
            most_new_tokens=self.new_tokens,
        )

    def model(self, role: str) -> ModelConfig:
        """Return the model of a role."""
        is_scalar = role in ("critic", "reward")
        config = llama.size(SIZES[self.critic if is_scalar else self.policy])
        head = "scalar" if is_scalar else "language"
        return dataclasses.replace(config, head=head)


def read_rows(path: pathlib.Path | None = None) -> list[tuple[PublishedStep, float]]:
    """Read the steps of the paper and their seconds.

    Args:
        path: of a file like `published_steps.json`; None is that.
    """
    rows = json.loads((path or FOLDER / "published_steps.json").read_text())["rows"]
    return [
        (
            PublishedStep(
                policy=row["policy_reference_size_b"],
                critic=row["critic_reward_size_b"],
                prompt_tokens=row["prompt_tokens"],
                new_tokens=row["generated_tokens"],
                batch=row["batch_sequences"],
                gpus=row["gpus"],
            ),
            row["heuristic_seconds"],
        )
        for row in rows
    ]


@functools.cache
def graph(new_tokens: int) -> DataflowGraph:
    """Return the six calls."""
    sampling = Sampling(max_new_tokens=new_tokens)
    return ppo.graph(ppo.PPO(sampling=sampling, minibatches=MINIBATCHES))


def reals_call(
    step: PublishedStep, name: str, allocation: Allocation, *, reloads: bool = True
) -> Quantities:
    """Return what a call takes as ReaL runs it.

    Args:
        step: sizes and lengths.
        name: of the call.
        allocation: its devices and strategy.
        reloads: whether it brings back a role that waits in host memory.
    """
    node = graph(step.new_tokens).calls[name]
    assert node.role is not None
    kinds = {Generate: "generate", Infer: "infer", Train: "train"}
    kind: Any = kinds[type(node.function)]
    is_training = kind == "train"
    updates = MINIBATCHES if is_training else 1
    work = CallWork(
        kind=kind,
        model=step.model(node.role),
        num_rows=step.batch,
        num_updates=updates,
        remat="block" if is_training else "none",
        **dataclasses.asdict(step.lengths),
    )
    if kind != "generate":
        # A pipeline for every minibatch, which is drained before the next.
        tokens = step.batch * work.length / updates / allocation.num_row_shards
        pieces = allocation.stage * (2 if is_training else 1)
        work = dataclasses.replace(
            work, microbatch_tokens=math.ceil(tokens), pieces=pieces
        )
    found = quantities(work, allocation, step.cluster)
    if reloads and node.role not in graph(step.new_tokens).trained_roles:
        held = work.itemsize * work.model.num_parameters * allocation.data
        rate = allocation.size * step.cluster.device.host_bytes_per_second
        found = found.plus(Quantities(host=held / rate))
    return found


def template_quantities(step: PublishedStep) -> Quantities:
    """Return what ReaL's heuristic plan takes: its calls one after another."""
    total = Quantities()
    for name, node in graph(step.new_tokens).calls.items():
        if node.role is not None:
            total = total.plus(reals_call(step, name, step.template))
    return total


def space_of(
    step: PublishedStep, coefficients: Coefficients, rules: Rules | None = None
) -> Space:
    """List the plans of a step, with what a run would have of rows and recompute.

    Args:
        step: sizes and lengths.
        coefficients: of the machine.
        rules: which allocations are looked at; None is all.

    Raises:
        ValueError: a call fits nowhere.
    """
    dataflow, is_real = graph(step.new_tokens), rules == REAL
    roles = {
        name: Role(
            name=name,
            config=RoleConfig(
                remat="block",
                offload=is_real and name not in dataflow.trained_roles,
            ),
            model=step.model(name),
            eos_ids=(2,),
            dtype="bfloat16",
            is_trained=name in dataflow.trained_roles,
        )
        for name in dataflow.roles
    }
    work = Work(
        num_rows=step.batch,
        width=step.prompt_tokens + step.new_tokens,
        prompt_width=step.prompt_tokens,
    )
    # ReaL's pipelines never hold more than half of a minibatch's pieces.
    half = step.batch * work.width // (2 * MINIBATCHES)
    space = make_space(
        *(dataflow, roles, work, step.lengths, step.cluster, coefficients),
        microbatch_tokens=half if is_real else MICROBATCH_TOKENS * step.gpus,
        rules=rules,
    )
    return space


def reals_space(step: PublishedStep, coefficients: Coefficients) -> Space:
    """List the plans of ReaL's options, their calls priced as ReaL runs them.

    Raises:
        ValueError: a call fits nowhere.
    """
    space = space_of(step, coefficients, REAL)
    found = []
    for name, options in zip(space.names, space.options, strict=True):
        shapes = {}
        for size, of_size in options.shapes.items():
            priced = []
            for option in of_size:
                # What comes back from the host is priced with the plan.
                needs = reals_call(step, name, option.allocation, reloads=False)
                seconds = coefficients.seconds(needs)
                priced.append(
                    dataclasses.replace(option, quantities=needs, seconds=seconds)
                )
            shapes[size] = tuple(sorted(priced, key=lambda option: option.seconds))
        found.append(dataclasses.replace(options, shapes=shapes))
    problem = space.problem._replace(options=table(found))
    return dataclasses.replace(space, options=tuple(found), problem=problem)


@dataclasses.dataclass(frozen=True)
class Predictor:
    """Predicts the seconds of one step with several plans.

    Attributes:
        step: sizes and lengths.
        coefficients: of the machine.
        moves: of each chain of a search.
        seed: of a search.
    """

    step: PublishedStep
    coefficients: Coefficients
    moves: int = MOVES
    seed: int = 0

    @functools.cached_property
    def space(self) -> Space:
        """All plans."""
        return space_of(self.step, self.coefficients)

    @functools.cached_property
    def reals(self) -> Space:
        """Those of ReaL's options, as ReaL runs them."""
        return reals_space(self.step, self.coefficients)

    def template(self) -> dict[str, Any]:
        """Predict ReaL's heuristic plan, whether it fits or not."""
        found = self.coefficients.seconds(template_quantities(self.step))
        return {"seconds": found, "allocation": str(self.step.template)}

    def symmetric(self) -> dict[str, Any]:
        """Predict the fastest strategy of all calls, of both kinds of options.

        Raises:
            ValueError: none fits.
        """
        found = [
            (seconds, space.chosen(plan))
            for space in (self.space, self.reals)
            for plan, seconds in symmetric_plans(space)
        ]
        if not found:
            raise ValueError(
                f"No single allocation of {self.step} fits the memory. Give more GPUs,"
                " or --plan=searched."
            )
        best, chosen = min(found, key=lambda item: item[0])
        return {"seconds": best, "allocation": next(iter(chosen.values())).strategy}

    def searched(self) -> dict[str, Any]:
        """Predict the better one of the best plans of two searches.

        Raises:
            ValueError: none fits.
        """
        found, errors = {}, []
        for name in ("ours", "reals"):
            try:
                space = self.space if name == "ours" else self.reals
                found[name] = self._searched(space)
            except ValueError as error:
                errors.append(error)
        if not found:
            raise errors[0]
        best = min(found, key=lambda name: found[name]["seconds"])
        of_each = {f"of_{name}": one for name, one in found.items()}
        return {"seconds": found[best]["seconds"], "options": best} | of_each

    def _searched(self, space: Space) -> dict[str, Any]:
        """Search from what rules of thumb give."""
        starts = [plan for plan, _ in symmetric_plans(space)[:MOST_STARTS]]
        thumb = template_plan(space)
        starts += [thumb[0]] if thumb else []
        found = search(space, most_moves=self.moves, seed=self.seed, starts=starts)
        chosen = space.chosen(found.plan)
        return {
            "seconds": found.seconds,
            "memory_bytes": found.memory_bytes,
            "allocations": {name: str(place) for name, place in chosen.items()},
        }


def load_coefficients(path: pathlib.Path | None = None) -> Coefficients:
    """Read stored coefficients.

    Args:
        path: of the file; None is the one beside this module.
    """
    stored = json.loads((path or COEFFICIENTS).read_text())
    return Coefficients(**stored["coefficients"])


def fitted(rows: Sequence[tuple[PublishedStep, float]]) -> dict[str, Any]:
    """Fit, and say how well steps are predicted that were not fitted to.

    Args:
        rows: steps and their seconds.
    """
    steps = [(template_quantities(step), seconds) for step, seconds in rows]
    sizes = [(step.policy, step.critic, step.gpus) for step, _ in rows]
    alone = _errors(steps, list(range(len(steps))))
    groups = _errors(steps, sizes)
    found = fit(steps, trust=TRUST, least=DATA_SHEET)
    return {
        "command": COMMAND,
        "source": "published_steps.json",
        "coefficients": dataclasses.asdict(found),
        "errors_of_steps_left_out": _summary(alone),
        "errors_of_sizes_left_out": _summary(groups),
    }


def _errors(steps: Sequence[tuple[Quantities, float]], keys: Sequence) -> list[float]:
    """Return relative errors of steps from a fit to those with other keys."""
    found = []
    for (needs, seconds), key in zip(steps, keys, strict=True):
        others = [s for s, k in zip(steps, keys, strict=True) if k != key]
        predicted = fit(others, trust=TRUST, least=DATA_SHEET).seconds(needs)
        found.append(predicted / seconds - 1)
    return found


def _summary(errors: Sequence[float]) -> dict[str, Any]:
    size = np.abs(errors)
    return {
        "mean": round(float(size.mean()), 4),
        "worst": round(float(size.max()), 4),
        "of_each": [round(float(error), 4) for error in errors],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as the module says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", type=int, default=0, help="Billions.")
    parser.add_argument("--critic", type=int, default=0, help="Billions.")
    parser.add_argument("--prompt_tokens", type=int, default=128)
    parser.add_argument("--new_tokens", type=int, default=384)
    parser.add_argument("--batch", type=int, default=0, help="Sequences of a step.")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--plan", choices=PLANS, default="template")
    parser.add_argument("--rows", type=pathlib.Path, help="To fit, instead of ours.")
    parser.add_argument("--coefficients", type=pathlib.Path, help="Instead of ours.")
    parser.add_argument("--sweep", type=pathlib.Path, help="Folder for its results.")
    parser.add_argument("--moves", type=int, default=MOVES, help="Of a search.")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.sweep is not None:
        from realjax.bench import published_sweep  # matplotlib takes a second.

        report = published_sweep.sweep(
            load_coefficients(options.coefficients),
            options.sweep,
            moves=options.moves,
            seed=options.seed,
        )
    elif options.policy or options.critic:
        step = PublishedStep(
            policy=options.policy or options.critic,
            critic=options.critic or options.policy,
            prompt_tokens=options.prompt_tokens,
            new_tokens=options.new_tokens,
            batch=options.batch,
            gpus=options.gpus,
        )
        predictor = Predictor(
            step,
            load_coefficients(options.coefficients),
            moves=options.moves,
            seed=options.seed,
        )
        found = getattr(predictor, options.plan)()
        report = dataclasses.asdict(step) | {"plan": options.plan} | found
    else:
        report = fitted(read_rows(options.rows))
        if options.rows is None:
            COEFFICIENTS.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
