"""realjax: RLHF in JAX, every model function call on its own mesh.

A reading order for one PPO step:

    algorithms/ppo.py        what is computed: hyperparameters, losses, the graph
    dataflow/graph.py        calls joined by the keys they share
    dataflow/plan.py         where each call runs
    dataflow/schedule.py     calls, and the reallocations between them
    runtime/trainer.py       the loop over steps
    runtime/executor.py      one step: dispatches the schedule
    functions/generate.py    completions            functions/infer.py, train.py
    realloc/transfer.py      parameters from mesh to mesh
    models/transformer.py    the model              rl/   the arithmetic

The Python API:

    load(folder, allocation=None, …)             a model on a mesh
    sample(model, prompts, **options)            completions
    train(config, workdir)                       a run
    plan(config, cluster=None)                   the execution plan it would have
    load_config("ppo.py:debug")                  a shipped config, to be changed
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from realjax.runtime.model import Model, load
    from realjax.runtime.recipe import load_config, plan, train
    from realjax.runtime.sample import Completion, sample
    from realjax.runtime.trainer import TrainResult

_HOMES = {
    "Completion": "realjax.runtime.sample",
    "Model": "realjax.runtime.model",
    "TrainResult": "realjax.runtime.trainer",
    "load": "realjax.runtime.model",
    "load_config": "realjax.runtime.recipe",
    "plan": "realjax.runtime.recipe",
    "sample": "realjax.runtime.sample",
    "train": "realjax.runtime.recipe",
}

__all__ = [
    "Completion",
    "Model",
    "TrainResult",
    "load",
    "load_config",
    "plan",
    "sample",
    "train",
]


def __getattr__(name: str) -> Any:
    # Imported on first use: a reward function's worker process needs no JAX.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'realjax' has no attribute {name!r}")
