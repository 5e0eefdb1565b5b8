"""What the processes of `lora_test.py` do."""

import pathlib

import jax
import numpy as np

from realjax.models import hf, lora_files
from realjax.models.lora import merged, with_adapters
from realjax.models.parameters import split, without_adapters
from realjax.runtime import cluster
from realjax.runtime.agreement import Agreement
from realjax.runtime.measures import to_numbers
from tests.e2e import tiny_ppo

MODEL = with_adapters(tiny_ppo.MODEL, rank=4, alpha=16.0, targets=("all-linear",))
ROLES = ("policy", "critic", "reference", "reward")


def adapted_steps(folder):
    """Two steps of the tiny PPO with adapters, which are saved, loaded and merged."""
    executor = tiny_ppo.make_executor(
        tiny_ppo.hyperparameters(), tiny_ppo.PLAN, model=MODEL, basing=ROLES
    )
    found = []
    for step in (1, 2):
        metrics, buffer = executor.run(tiny_ppo.prompts_of(step), step=step)
        executor.watch.wait()
        numbers = cluster.merge(f"numbers/{step}", to_numbers(metrics))
        tokens = executor.calls.fetch(buffer, "tokens")["tokens"]
        moved = sum(executor.traffic.bytes.values())
        found.append({"numbers": numbers, "tokens": tokens.tolist(), "moved": moved})
    store, path = executor.store, pathlib.Path(folder)
    config, parameters = store.models["policy"], store.at_home("policy")
    lora_files.save_adapters(
        path / "adapters", config, parameters, agreement=Agreement("adapters")
    )
    hf.save(
        path / "merged",
        without_adapters(config),
        merged(parameters, config),
        agreement=Agreement("merged"),
    )
    trained, _ = split(parameters, config)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, trained)
    again = lora_files.load_adapters(path / "adapters", config, shardings=shardings)
    same = jax.tree.map(_is_same, again, trained)
    executor.close()
    cluster.barrier("done")
    return {"steps": found, "is_same": all(jax.tree.leaves(same))}


def _is_same(found, wanted):
    """Whether this process's parts of two arrays are equal."""
    parts = zip(found.addressable_shards, wanted.addressable_shards, strict=True)
    return all(np.array_equal(a.data, b.data) for a, b in parts)
