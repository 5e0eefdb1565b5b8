"""What is computed once for a whole data set, and kept beside it.

    completions ─▶ stored graph ─▶ train.stored-3f2a91c07b5e.npz ─▶ batches of the run

An algorithm's `stored_graph(hp)` says which calls: the reference's, as a rule, which
the graph of a step then does not have. The name of a file ends with what decides its
numbers, so that runs with other references keep others beside it.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import uuid
import zipfile
from typing import Any

import jax
import numpy as np

from realjax.data.datasets import Dataset
from realjax.functions.function import Infer
from realjax.runtime import cluster
from realjax.runtime.agreement import Agreement
from realjax.runtime.console import Console
from realjax.runtime.executor import Executor
from realjax.runtime.memory import fits_function, run_account
from realjax.runtime.run import Run, assemble, load_parameters, make_roles
from realjax.runtime.weights import lasting

type Values = dict[str, np.ndarray]
"""Of the tokens of all completions of a data set, by key."""


def fill(run: Run, workdir: pathlib.Path, console: Console) -> None:
    """Adds to a run's data sets what is stored of them; computes what is not there.

    Files lie beside the data, or in the work folder where that cannot be written. Every
    process calls this.

    Args:
        run: whose data sets these are.
        workdir: of the run.
        console: shows progress.

    Raises:
        ValueError: the graph has other calls than ones that infer, from tokens alone,
            a number for each.
    """
    if run.stored_graph is None:
        return
    once = _run_once(run)
    data = run.config.data
    paths = {"train": data.path, "valid": data.valid_path or data.path}
    with contextlib.ExitStack() as opened:
        executor = None
        for split, dataset in (("train", run.train_data), ("valid", run.valid_data)):
            if dataset is None:
                continue
            # Times of files may differ from host to host.
            find = functools.partial(_fingerprint, once, dataset)
            fingerprint = Agreement(f"stored {split}").decide(find)
            beside = pathlib.Path(paths[split])
            name = f"{beside.stem}.stored-{fingerprint[:12]}.npz"
            files = [folder / name for folder in (beside.parent, workdir)]
            values = _read(files, fingerprint, console)
            found = cluster.gather(f"stored/{split}", values is not None)
            if values is None or not all(found):
                if executor is None:
                    executor = _executor(once, opened)
                values = _compute(once, executor, dataset, console, split)
                if jax.process_index() == 0:
                    written = _write(files, values, fingerprint)
                    console.print(f"stored {', '.join(values)} in {written}")
            for key, value in values.items():
                dataset.store(key, value)


def _run_once(run: Run) -> Run:
    """The run of the stored graph, with the data of the other."""
    graph, config = run.stored_graph, run.stored_config
    assert graph is not None and config is not None
    for name, node in graph.calls.items():
        spec = node.function
        if (
            not isinstance(spec, Infer)
            or spec.reads != ("tokens",)
            or spec.output != "logprobs"
        ):
            raise ValueError(
                f"Call {name!r} is to be stored. What can be is the log-probabilities"
                " of tokens: an `Infer` that reads 'tokens' alone."
            )
    if config.plan.endswith(".json"):  # It is the plan of a step.
        config = dataclasses.replace(config, plan="")
    roles = make_roles(config, graph, run.tokenizer)
    data = (run.train_data, run.valid_data)
    once = assemble(config, run.hp, graph, roles, run.tokenizer, data)
    run_account(once).check()
    return once


def _executor(once: Run, opened: contextlib.ExitStack) -> Executor:
    executor = Executor(
        once.graph,
        once.plan,
        once.roles,
        load_parameters(once),
        tokenizer=once.tokenizer,
        optimizer_steps={},
        seed=once.config.seed,
        width=once.width,
        fits=fits_function(once),
    )
    opened.callback(executor.close)
    return executor


def _compute(
    once: Run, executor: Executor, dataset: Dataset, console: Console, split: str
) -> Values:
    """Runs the graph over every completion of a data set."""
    size = once.config.data.batch_size * dataset.rows_per_record
    keys = [key for node in once.graph.calls.values() for key in node.writes]
    parts: dict[str, list[np.ndarray]] = {key: [] for key in keys}
    total = -(-dataset.num_completions // size)
    with console.progress(f"{', '.join(keys)} of {split} data", total) as advance:
        for batch in dataset.completion_batches(size):
            _, buffer = executor.run(batch, step=0, training=False)
            mask = np.asarray(batch["completion_mask"])
            for key, value in executor.calls.fetch(buffer, *keys).items():
                parts[key].append(value[mask])
            advance()
    return {key: np.concatenate(values) for key, values in parts.items()}


def _fingerprint(once: Run, dataset: Dataset) -> str:
    """A hash of all that decides the numbers, up to their rounding."""
    calls = {
        name: [node.role, list(node.writes), dataclasses.asdict(node.function)]
        for name, node in once.graph.calls.items()
    }
    settings = {
        "completions": dataset.completions_fingerprint(),
        "calls": calls,
        "weights": {name: call.weights for name, call in once.plan.calls.items()},
        "roles": {
            name: {
                "model": lasting(role.model),
                "dtype": role.dtype,
                "checkpoint": _files(role.config.path) or once.config.seed,
                "adapters": _files(role.config.lora.path),
            }
            for name, role in once.roles.items()
        },
    }
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _files(folder: str) -> list[list[Any]]:
    """Name, size and time of every file of a checkpoint."""
    if not folder:
        return []
    files = sorted(path for path in pathlib.Path(folder).iterdir() if path.is_file())
    stats = [(path.name, path.stat()) for path in files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _read(
    files: list[pathlib.Path], fingerprint: str, console: Console
) -> Values | None:
    """What the first of the files that is there holds; None if it is not right."""
    for file in files:
        if not file.is_file():
            continue
        try:
            with file.open("rb") as opened, np.load(opened) as found:
                values = {key: found[key] for key in found.files}
            if str(values.pop("fingerprint")) == fingerprint:
                return values
            fault = "is damaged or of other data"
        except PermissionError as error:
            fault = f"cannot be read ({error.strerror})"
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
            fault = "is damaged or of other data"
        console.print(f"{file} {fault}: it is made anew")
    return None


def _write(files: list[pathlib.Path], values: Values, fingerprint: str) -> pathlib.Path:
    """Writes the first of the files that can be written; whole or not at all."""
    for place, file in enumerate(files):
        # Of a name that no other run has; its mode is that of any new file.
        partial = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
        try:
            with partial.open("xb") as opened:
                np.savez(opened, fingerprint=np.array(fingerprint), **values)  # pyright: ignore[reportArgumentType]: arrays by name
            os.replace(partial, file)
            return file
        except OSError:
            if place == len(files) - 1:
                raise
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()
    raise AssertionError("There is a file to write.")
