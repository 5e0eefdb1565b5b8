"""What the processes of `ahead_test.py` do: process 0 draws, process 1 trains."""

import io
import json
import pathlib
import shutil

import jax

from realjax.data.datasets import DataConfig
from realjax.functions.optimizer import OptimizerConfig
from realjax.runtime import cluster, trainer
from realjax.runtime.checkpoint import CheckpointConfig
from realjax.runtime.console import Console
from realjax.runtime.measures import to_numbers
from tests.runtime import small_runs
from tests.runtime.small_rollouts import (
    ALGORITHM,
    Even,
    graph,
    make_executor,
    run_steps,
)

NUM_STEPS, NEW_TOKENS = 5, 48


def traced_steps(staleness, folder):
    """Steps of the smallest algorithm; the events of this process, and its tokens.

    The clock of events is one for all of a host.
    """
    # So large that a training takes longer than it takes to begin one.
    hp = Even(staleness=staleness, new_tokens=NEW_TOKENS, completions_per_prompt=8)
    sizes = {"width": 256, "num_layers": 4, "mlp_width": 1024, "head_dim": 64}
    executor = make_executor(
        graph(hp), rollout="d1@0", train="d1@1", new_tokens=NEW_TOKENS, **sizes
    )
    tokens = []

    def after_step(buffer):
        found = executor.calls.fetch(buffer, "tokens")["tokens"]
        tokens.append(found.sum(axis=1).tolist())

    metrics = run_steps(executor, NUM_STEPS, after_step)
    numbers = [
        cluster.merge(f"numbers/{step}", to_numbers(one))
        for step, one in enumerate(metrics)
    ]
    timeline = executor.watch.timeline
    path = pathlib.Path(folder) / f"timeline{jax.process_index()}.json"
    timeline.write_trace(path)
    executor.close()
    cluster.barrier("done")
    return {
        "events": [
            [event.name, event.step, event.start, event.end]
            for event in timeline.events
            if event.kind == "call"
        ],
        "num_runs": executor.calls.num_runs,
        "tokens": tokens,
        "numbers": numbers,
        "staleness": [one["completions/staleness"] for one in numbers]
        if staleness
        else [],
    }


def stopped_and_resumed(folder):
    """A run of four steps; the same from its second checkpoint."""
    folder = pathlib.Path(folder)
    if jax.process_index() == 0:
        small_runs.write_data(folder)
        records = [{"prompt": f"the cat {i}"} for i in range(7)]
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / "prompts.jsonl").write_text(text)
    cluster.barrier("data")
    optimizer = OptimizerConfig(learning_rate=3e-2, schedule="constant")
    config = small_runs.sft_config(
        folder,
        algorithm="",
        hp={"staleness": 1},
        roles={"policy": small_runs.new_role(folder, optimizer)},
        data=DataConfig(
            path=str(folder / "prompts.jsonl"),
            kind="prompts",
            max_prompt_length=8,
            batch_size=4,
        ),
        allocation="d1@1",
        allocations={"rollout": "d1@0"},
        steps=4,
        checkpoint=CheckpointConfig(every_steps=1, keep=20, export=False),
    )
    found = [run(config, folder / "run")]
    if jax.process_index() == 0:
        for step in (3, 4):
            shutil.rmtree(folder / "run" / "checkpoints" / str(step))
    cluster.barrier("halfway")
    return [*found, run(config, folder / "run")]


def run(config, workdir):
    """What this process knows of a run; durations left out."""
    text = io.StringIO()
    console = Console(file=text, width=200)
    result = trainer.train(config, workdir, algorithm=ALGORITHM, console=console)
    return {
        "is_finished": result.is_finished,
        "text": text.getvalue(),
        "metrics": {
            name: values.tolist()
            for name, values in result.metrics.items()
            if not name.startswith(("timing_s/", "perf/"))
        },
    }
