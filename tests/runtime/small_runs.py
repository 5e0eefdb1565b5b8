"""Runs of seconds on made records, and what they leave in their folders."""

import io
import json
import pathlib

import numpy as np

from realjax.core.metrics import read_metrics
from realjax.data.datasets import DataConfig
from realjax.functions.optimizer import OptimizerConfig
from realjax.functions.role import RoleConfig
from realjax.runtime import trainer
from realjax.runtime.checkpoint import CheckpointConfig, Checkpointer
from realjax.runtime.console import Console
from realjax.runtime.run_config import EvaluationConfig, RunConfig
from realjax.testing import TINY, tiny_tokenizer

MODEL = TINY | {"num_layers": 1, "width": 16}


def write_data(folder, *, num=9, num_valid=3):
    """Prompts, answers and pairs of unlike lengths, and their tokenizer."""
    animals, verbs = ("cat", "dog", "mat"), ("sat", "ran")
    tokenizer = tiny_tokenizer(folder / "tokenizer")
    records = [
        {
            "prompt": f"the {animals[i % 3]} number {i}",
            "answer": f" {verbs[i % 2]} on a day" * (1 + i % 4),
        }
        for i in range(num + num_valid)
    ]
    pairs = [
        {
            "prompt": record["prompt"],
            "chosen": f" a good day{'!' * (i % 3)}",
            "rejected": f" a bad day for the {animals[i % 3]}",
        }
        for i, record in enumerate(records)
    ]
    for name, rows in {"answers": records, "pairs": pairs}.items():
        for split, part in {"train": rows[:num], "valid": rows[num:]}.items():
            text = "".join(json.dumps(row) + "\n" for row in part)
            (folder / f"{name}_{split}.jsonl").write_text(text)
    return tokenizer


def sft_config(folder, **changes):
    """Supervised fine-tuning: linear decay, the first two of five updates warm up."""
    optimizer = OptimizerConfig(
        learning_rate=1e-2, schedule="linear", warmup_fraction=0.4
    )
    values = {
        "algorithm": "sft",
        "roles": {"policy": new_role(folder, optimizer)},
        "data": data_config(folder, "answers", batch_size=4),
        "allocation": "d2@0-1",
        "tensorboard": False,
        "evaluation": EvaluationConfig(at_start=False, at_end=False),
        "checkpoint": CheckpointConfig(keep=20, export=False),
    }
    return RunConfig(**values | changes)


def new_role(folder, optimizer):
    tokenizer = str(folder / "tokenizer")
    return RoleConfig(tokenizer=tokenizer, model=MODEL, optimizer=optimizer)


def data_config(folder, name, **changes):
    return DataConfig(
        path=str(folder / f"{name}_train.jsonl"),
        valid_path=str(folder / f"{name}_valid.jsonl"),
        kind={"answers": "prompt_answer"}.get(name, name),
        max_length=64,
        **changes,
    )


def train(config, workdir, **options):
    """Runs a config; also returns what it printed."""
    text = io.StringIO()
    options = {"console": Console(file=text, width=200)} | options
    return trainer.train(config, workdir, **options), text.getvalue()


def saved_arrays(workdir, step):
    """Every array of a checkpoint, by its path."""
    with Checkpointer(pathlib.Path(workdir) / "checkpoints", read_only=True) as found:
        trees: dict = {}
        for path, leaf in found.read_shapes(step).items():
            *parents, name = path.split("/")
            node = trees
            for parent in parents:
                node = node.setdefault(parent, {})
            node[name] = leaf
        return flat(found.restore(step, trees))


def flat(tree, path=""):
    """Leaves of nested dicts by their path."""
    if not isinstance(tree, dict):
        return {path: np.asarray(tree)}
    found = {}
    for name, node in tree.items():
        found |= flat(node, f"{path}/{name}" if path else name)
    return found


def check_same_arrays(found, wanted):
    """Bit for bit."""
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


def check_same_metrics(found, wanted):
    """Everything but durations, bit for bit."""
    tables = [
        {
            name: values
            for name, values in read_metrics(workdir / "metrics.jsonl").items()
            if not name.startswith(("timing_s/", "perf/"))
        }
        for workdir in (found, wanted)
    ]
    assert tables[0].keys() == tables[1].keys()
    for name, values in tables[1].items():
        np.testing.assert_array_equal(tables[0][name], values, err_msg=name)


def exported_files(workdir):
    """Bytes of every exported file, by its path."""
    folder = pathlib.Path(workdir) / "export"
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
