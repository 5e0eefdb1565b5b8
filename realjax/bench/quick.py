"""A quick bench of one device: SFT, generation and PPO of a small Llama.

    python -m realjax.bench.quick

Five million parameters: vocabulary 4096, width 256, 4 layers, 8 heads, 4 key and value
heads, float32. SFT on 8 x 256 tokens; generation of 64 tokens after 16 prompts of 64;
PPO of the same size with a reference, a reward model and a critic. Two processes
measure one after the other: the first starts from an empty compilation cache, the
second finds it filled.
The last line is one JSON object: medians, and the spread over the repetitions.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from realjax.algorithms import ppo, sft
from realjax.bench.environment import describe
from realjax.core.batch import Batch
from realjax.core.timing import peak_host_bytes
from realjax.data.tokenizer import Tokenizer
from realjax.dataflow.graph import DataflowGraph, call
from realjax.dataflow.plan import make_plan
from realjax.dataflow.schedule import home_places
from realjax.functions.function import Generate
from realjax.functions.role import Role, RoleConfig
from realjax.models import transformer
from realjax.models.config import ModelConfig
from realjax.rl.sampling import Sampling
from realjax.runtime.executor import Executor
from realjax.runtime.parameters import ParameterStore

MODEL = ModelConfig(
    vocab_size=4096,
    width=256,
    num_layers=4,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    mlp_width=768,
    max_positions=512,
)
NO_EOS = (-1,)  # Completions run to their full length, so that all do equal work.
REPETITIONS = 7


def make_executor(graph: DataflowGraph, width: int, texts: Tokenizer) -> Executor:
    """An executor of one device with new models for every role."""
    plan = make_plan(graph, num_devices=1, microbatch_tokens=2048)
    heads: dict[str, Any] = {"policy": "language", "reference": "language"}
    roles = {
        name: Role(
            name=name,
            config=RoleConfig(),
            model=dataclasses.replace(MODEL, head=heads.get(name, "scalar")),
            eos_ids=NO_EOS,
            dtype="float32",
            is_trained=name in graph.trained_roles,
        )
        for name in graph.roles
    }
    models = {name: role.model for name, role in roles.items()}
    dtypes = dict.fromkeys(roles, "float32")
    store = ParameterStore(models, home_places(graph, plan, dtypes))
    executor = Executor(
        graph,
        plan,
        roles,
        store,
        tokenizer=texts,
        optimizer_steps=dict.fromkeys(graph.calls, 1000),
        seed=0,
        width=width,
    )
    init = jax.jit(transformer.init_parameters, static_argnums=0)
    for name, model in models.items():
        store.set_initial(name, init(model, jax.random.key(0)))
    for role in graph.trained_roles:
        program = executor.programs.train_program(role)
        store.set_train_state(role, program.init_optimizer(store.at_home(role)))
    return executor


def sft_batch(generator: np.random.Generator) -> Batch:
    """Eight full rows of 256 tokens."""
    tokens = generator.integers(2, MODEL.vocab_size, (8, 256)).astype(np.int32)
    mask = np.ones_like(tokens, bool)
    mask[:, 0] = False
    return Batch.create(
        {"tokens": tokens, "completion_mask": mask}, lengths=np.full(8, 256, np.int32)
    )


def prompt_batch(generator: np.random.Generator) -> Batch:
    """Sixteen prompts of 64 tokens."""
    prompts = generator.integers(2, MODEL.vocab_size, (16, 64)).astype(np.int32)
    return Batch.create({"prompts": prompts}, lengths=np.full(16, 64, np.int32))


def timed(work: Callable[[int], Any], repetitions: int) -> tuple[float, list[float]]:
    """Seconds of the first call, which compiles, and of the ones after it."""
    seconds = []
    for index in range(repetitions + 1):
        begin = time.perf_counter()
        jax.block_until_ready(work(index))
        seconds.append(time.perf_counter() - begin)
    return seconds[0], seconds[1:]


def measure(repetitions: int) -> dict[str, Any]:
    """Everything once, in this process."""
    generator = np.random.default_rng(0)
    tokenizer = Tokenizer.train(["a b c"], vocab_size=300)
    sampling = Sampling(max_new_tokens=64)
    tuning = make_executor(sft.graph(sft.SFT()), 256, tokenizer)
    hp = ppo.PPO(sampling=sampling, minibatches=2, value_norm="none")
    learning = make_executor(ppo.graph(hp), 128, tokenizer)
    rollout = DataflowGraph(rollout=call("policy", Generate(sampling=sampling)))
    writing = make_executor(rollout, 128, tokenizer)
    batches = [sft_batch(generator) for _ in range(repetitions + 1)]
    prompts = [prompt_batch(generator) for _ in range(repetitions + 1)]

    def tune(index):
        tuning.run(batches[index], step=index + 1)
        return tuning.store.train_state("policy")

    def generate(index):
        _, buffer = writing.run(prompts[index], step=index + 1)
        return buffer.host("old_logprobs")

    def learn(index):
        learning.run(prompts[index], step=index + 1)
        learning.watch.wait()
        return learning.store.train_state("policy")

    first_tune, tune_seconds = timed(tune, repetitions)
    first_generate, generate_seconds = timed(generate, repetitions)
    first_learn, learn_seconds = timed(learn, repetitions)
    calls = learning.watch.timeline.medians(kind="call", skip_steps=1)
    tuning.close()
    learning.close()
    writing.close()
    compile_seconds = {
        "sft": first_tune - statistics.median(tune_seconds),
        "generation": first_generate - statistics.median(generate_seconds),
        "ppo": first_learn - statistics.median(learn_seconds),
    }
    return {
        "sft_tokens_per_second": rates(8 * 256, tune_seconds),
        "generation_tokens_per_second": rates(16 * 64, generate_seconds),
        "ppo_step_seconds": spread(learn_seconds),
        "ppo_seconds_by_call": {k: round(v, 4) for k, v in calls.items()},
        "compile_seconds": {k: round(v, 2) for k, v in compile_seconds.items()},
        "peak_memory_bytes": peak_memory_bytes(),
    }


def rates(tokens: int, seconds: list[float]) -> dict[str, float]:
    """Tokens per second: median, slowest, fastest."""
    return spread([tokens / s for s in seconds], digits=0)


def spread(values: list[float], digits: int = 4) -> dict[str, float]:
    """Median, least and most."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
    }


def peak_memory_bytes() -> int:
    """Of the device where it says so, else of the process."""
    stats = jax.devices()[0].memory_stats() or {}
    return int(stats.get("peak_bytes_in_use", 0)) or peak_host_bytes()


def child(repetitions: int, cache: str) -> dict[str, Any]:
    """Measures in a new process with a given compilation cache."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, "-m", "realjax.bench.quick", "--child"]
    command += ["--repetitions", str(repetitions)]
    found = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(found.stdout.splitlines()[-1])


def main(arguments: Sequence[str] | None = None) -> None:
    """Two processes, then one line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        print(json.dumps(measure(options.repetitions)))
        return
    with tempfile.TemporaryDirectory() as cache:
        cold = child(options.repetitions, cache)
        warm = child(options.repetitions, cache)
    result = {"bench": "quick", **describe(), "repetitions": options.repetitions}
    result["parameters"] = MODEL.num_parameters
    result |= cold
    result["compile_seconds"] = {
        "cold": cold["compile_seconds"],
        "warm": warm["compile_seconds"],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
