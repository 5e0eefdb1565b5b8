"""Checkpoints, data and configs of moments, and what a refusal must leave as it was."""

import contextlib
import hashlib
import io
import json
import pathlib

import jax
import numpy as np
import pytest

import realjax
from realjax.data.tokenizer import Tokenizer
from realjax.models import hf
from realjax.models.transformer import abstract_parameters
from realjax.runtime.console import Console
from realjax.testing import TINY, tiny_model, tiny_tokenizer

VOCAB_SIZE = 300
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
PROMPTS = ["the cat", "the dog", "a good day", "a bad day", "the mat and"]


def make_world(folder: pathlib.Path) -> pathlib.Path:
    """A policy, a reward model and prompts: all that `configs/ppo.py` asks for."""
    tokenizer = tiny_tokenizer()
    for name, head in (("policy", "language"), ("reward", "scalar")):
        config = tiny_model(VOCAB_SIZE, head=head, eos_ids=tokenizer.eos_ids)
        hf.save(folder / name, config, parameters(config), tokenizer=tokenizer)
    write_lines(folder / "train.jsonl", [{"prompt": text} for text in PROMPTS] * 4)
    answers = [{"prompt": text, "answer": " and ran"} for text in PROMPTS]
    write_lines(folder / "answers.jsonl", answers)
    return folder


def parameters(config, seed: int = 0):
    """Random ones, made without compiling anything."""
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: generator.normal(0, 0.1, leaf.shape).astype(np.float32),
        abstract_parameters(config),
        is_leaf=lambda node: hasattr(node, "axes"),
    )


def other_tokenizer() -> Tokenizer:
    """Of the same size; its ids mean other texts."""
    return Tokenizer.train(["zebras zigzag through the zoo"] * 9, VOCAB_SIZE)


def write_lines(path: pathlib.Path, records: list[dict]) -> pathlib.Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def ppo_config(world: pathlib.Path):
    """Two steps of configs/ppo.py on one device."""
    config = realjax.load_config("ppo.py")
    config.paths = {name: str(world / name) for name in ("policy", "reward")}
    config.data.path = str(world / "train.jsonl")
    config.data.valid_path = ""
    config.data.batch_size = 4
    config.hp.minibatches = 2
    config.hp.sampling.max_new_tokens = 8
    config.allocation = "d1"
    config.steps = 2
    config.tensorboard = False
    config.checkpoint.export = False
    return config


def sft_config(world: pathlib.Path, **sizes):
    """One step of configs/sft.py on one device, from new weights."""
    config = realjax.load_config("sft.py")
    new_role(config, world, "policy", **sizes)
    config.data.path = str(world / "answers.jsonl")
    config.data.valid_path = ""
    config.data.batch_size = 4
    config.allocation = "d1"
    config.steps = 1
    config.tensorboard = False
    config.checkpoint.export = False
    return config


def new_role(config, world: pathlib.Path, name: str, **sizes):
    """Lets a role begin from new weights."""
    config.roles[name].path = ""
    config.roles[name].tokenizer = str(world / "policy")
    config.roles[name].model = TINY | sizes


def train(config, workdir: pathlib.Path):
    """Runs a config silently."""
    return realjax.train(config, workdir, console=Console(file=io.StringIO()))


def contents(*folders: pathlib.Path) -> dict[str, str]:
    """A hash of every file, by its path; what a lock holds is nobody's work."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "run.lock"
    }


@contextlib.contextmanager
def nothing_compiles():
    """Fails if a program was compiled within."""
    found = []

    def listen(event, _, **__):
        if event == COMPILE_EVENT:
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not found, f"{len(found)} programs were compiled"


def refusal(config, workdir: pathlib.Path, *watched: pathlib.Path) -> str:
    """The message by which a run is refused, before it compiles or writes anything."""
    before = contents(workdir, *watched)
    with nothing_compiles(), pytest.raises(Exception) as caught:
        train(config, workdir)
    assert contents(workdir, *watched) == before
    return f"{caught.type.__name__}: {caught.value}"
