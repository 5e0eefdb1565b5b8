"""A PPO run of seconds, in this process or in one that can be killed.

Six calls on six allocations of 8 devices (the critic's values on the default one); the
policy and its reference come from one folder, the reward model and the critic from
another.
"""

import io
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import realjax
from realjax.core.config import to_dataclass
from realjax.models import hf
from realjax.runtime.console import Console
from realjax.runtime.run_config import RunConfig
from realjax.testing import tiny_model, tiny_parameters, tiny_tokenizer

NUM_PROMPTS, NUM_VALID, BATCH, SAVE_EVERY = 26, 6, 8, 2
RATE, UPDATES = 3e-3, 4  # Two minibatches, two epochs: four updates a step.

ALLOCATIONS = {
    "rollout": "d2t2@0-3",
    "reward": "d2@6-7",
    "reference": "d2@4-5",
    "train_policy": "d2f4",
    "train_critic": "f2t2@4-7",
}

SOURCES = {
    "policy": "language",
    "reference": "language",
    "reward": "scalar",
    "critic": "scalar",
}


def write_world(folder):
    """Two models with one tokenizer, and prompts of unlike lengths."""
    tokenizer = tiny_tokenizer()
    sizes = {"num_layers": 1, "width": 16, "eos_ids": tokenizer.eos_ids}
    for seed, (head, leaf) in enumerate(
        {"language": "head", "scalar": "score"}.items()
    ):
        config = tiny_model(tokenizer.vocab_size, head=head, **sizes)
        parameters = tiny_parameters(config, seed)
        # Predictions that are far from uniform, scores that are far from 0.
        parameters[leaf] = {"kernel": parameters[leaf]["kernel"] * 12}
        hf.save(folder / head, config, parameters, tokenizer=tokenizer)
    words = ("the cat", "a good day", "the dog sat on", "a bad")
    prompts = [
        {"prompt": f"{words[i % 4]} {i}"} for i in range(NUM_PROMPTS + NUM_VALID)
    ]
    for name, rows in {
        "train": prompts[:NUM_PROMPTS],
        "valid": prompts[NUM_PROMPTS:],
    }.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


def fields(world, *, epochs, **changes):
    """What differs from configs/ppo.py, by dotted name."""
    found = {
        "data.path": str(world / "train.jsonl"),
        "data.valid_path": str(world / "valid.jsonl"),
        "data.batch_size": BATCH,
        "data.max_prompt_length": 16,
        "epochs": epochs,
        "hp.sampling.top_k": 20,
        "hp.sampling.max_new_tokens": 12,
        "hp.minibatches": 2,
        "hp.epochs": UPDATES // 2,
        "hp.shuffle": True,
        "hp.max_ratio": 0.0,
        "hp.kl.adaptive": True,
        "hp.kl.horizon": 100.0,
        "checkpoint.every_minutes": 0.0,
        "checkpoint.every_steps": SAVE_EVERY,
        "checkpoint.keep": 3,
        "evaluation.every_steps": 3,
    }
    for role, folder in SOURCES.items():
        found[f"roles.{role}.path"] = str(world / folder)
    for role in ("policy", "critic"):
        found |= {
            f"roles.{role}.remat": "none",
            f"roles.{role}.optimizer.learning_rate": RATE,
            f"roles.{role}.optimizer.schedule": "linear",
            f"roles.{role}.optimizer.warmup_fraction": 0.0,
        }
    found |= {f"allocations.{call}": text for call, text in ALLOCATIONS.items()}
    return found | changes


def config(values):
    """The config as the command line would read it."""
    found = realjax.load_config("ppo.py")
    with found.unlocked():
        found.update_from_flattened_dict(values)
    return found


def run_config(values) -> RunConfig:
    """The same as the trainer takes it."""
    found = config(values).to_dict()
    del found["paths"]
    return to_dataclass(RunConfig, found)


def train(values, workdir):
    """Runs in this process; also returns what was printed."""
    text = io.StringIO()
    console = Console(file=text, width=200)
    result = realjax.train(config(values), workdir, console=console)
    return result, text.getvalue()


class Process:
    """The same command in a process of its own."""

    def __init__(self, values, workdir: pathlib.Path, *, cwd: pathlib.Path):
        self.workdir = workdir
        self._log = cwd / f"log{len(list(cwd.glob('log*')))}"
        flags = [f"--config.{name}={value}" for name, value in values.items()]
        command = ["--config=configs/ppo.py", f"--workdir={workdir}", *flags]
        # JAX writes entries of its compilation cache in place. A process that will be
        # killed only reads them.
        settings = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1000000"}
        root = str(pathlib.Path(realjax.__file__).parents[1])
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "realjax.cli.train", *command],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env=os.environ | settings | {"PYTHONPATH": root},
            )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._process.kill()
        self._process.wait()

    @property
    def text(self) -> str:
        """What it has printed so far."""
        return self._log.read_text()

    @property
    def step(self) -> int:
        """The last step that it has shown; 0 before the first."""
        found = re.findall(r"^step +(\d+)/", self.text, re.MULTILINE)
        return int(found[-1]) if found else 0

    @property
    def resumed(self) -> int:
        """The step that it says it goes on from; 0 if it says nothing."""
        match = re.search(r"resumed from the checkpoint of step (\d+)", self.text)
        return int(match[1]) if match else 0

    def wait_until(self, is_so, seconds: float = 300.0) -> None:
        """Looks every other millisecond.

        Raises:
            AssertionError: it has ended, or the time has.
        """
        end = time.monotonic() + seconds
        while not is_so():
            assert self._process.poll() is None, f"It has ended:\n{self.text}"
            assert time.monotonic() < end, f"Nothing in {seconds} s:\n{self.text}"
            time.sleep(0.002)

    def is_saving(self) -> bool:
        """Whether files of a checkpoint are being written."""
        return any(self.workdir.glob("checkpoints/*-tmp*/*"))

    def end(self, number: int | None = None) -> int:
        """Sends a signal, if any, and waits; returns the exit status."""
        if number is not None:
            self._process.send_signal(number)
        return self._process.wait(timeout=300)


def complete_steps(workdir):
    """Steps of the checkpoints that have got their name."""
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdigit())


def last_row(workdir) -> int:
    """The last step in the file of metrics."""
    lines = (workdir / "metrics.jsonl").read_text().split("\n")[:-1]
    return json.loads(lines[-1])["step"]
