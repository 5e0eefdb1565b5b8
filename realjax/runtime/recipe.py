"""What a config file says: a run or several in a row, and what has to be made first.

    config.paths.folder = ""            set by --config.paths.folder=…
    config.data.path = "{folder}/train.jsonl"
    config.stages = ("sft", "ppo")
    config.ppo.roles.policy.path = "{workdir}/sft/export/policy"

"{workdir}" stands for the folder of the whole, so that a stage finds another's export.
"""

import dataclasses
import importlib.util
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from realjax.core.config import suggest, to_dataclass
from realjax.data import reviews
from realjax.data.datasets import load_records
from realjax.data.tokenizer import Tokenizer
from realjax.dataflow.plan import ExecutionPlan
from realjax.planner.cluster import Cluster
from realjax.runtime import cluster, trainer
from realjax.runtime import run as run_lib
from realjax.runtime.console import Console
from realjax.runtime.given_plans import given_plan
from realjax.runtime.planning import described_plan
from realjax.runtime.run_config import RunConfig
from realjax.runtime.trainer import TrainResult
from realjax.runtime.workdir import make_workdir

CORPORA = {"reviews": reviews.write_reviews}
"""Data that the package makes itself, by the name in `config.corpus`."""

_PACKAGE = pathlib.Path(__file__).parents[1]
CONFIG_FOLDERS = (_PACKAGE / "_configs", _PACKAGE.parent / "configs")
"""Where configs are shipped: in an installed package, or beside it in a checkout."""


def find_config(path: str) -> pathlib.Path:
    """A config file beside the caller, or the shipped one of the same name.

    Raises:
        FileNotFoundError: naming the shipped configs.
    """
    name = pathlib.Path(path).name
    for candidate in (pathlib.Path(path), *(f / name for f in CONFIG_FOLDERS)):
        if candidate.is_file():
            return candidate
    known = sorted({p.name for f in CONFIG_FOLDERS for p in f.glob("*.py")})
    raise FileNotFoundError(
        f"There is no config {path!r}. {suggest(name, known)} Shipped: "
        f"{', '.join(known)}."
    )


def load_config(path: str) -> ConfigDict:
    """The config of a file, as the command line reads it.

    Args:
        path: as in "configs/ppo.py", or "configs/ppo.py:debug" for a variant.
    """
    path, _, variant = path.partition(":")
    file = find_config(path)
    spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"{file} has no function get_config(variant) -> ConfigDict.")
    return module.get_config(variant)


def train(
    config: Any,
    workdir: str | pathlib.Path,
    *,
    algorithm: Any = None,
    console: Console | None = None,
) -> TrainResult:
    """Runs a config, or goes on with it where the folder already holds the run.

    Args:
        config: of a run, or of the several that `stages` names. `paths` names folders,
            `corpus` data to make in `workdir/data`, `new_tokenizer` the vocabulary of
            one to train on the data into `workdir/tokenizer`; `cpu_devices` is for the
            command line.
        workdir: folder of checkpoints, exports, metrics and reports.
        algorithm: module or object with `graph` and `HYPERPARAMETERS`; by default the
            one that `config.algorithm` names.
        console: where progress is shown.

    Returns:
        What the run left; of several, the last one that ran.

    Raises:
        ValueError, TypeError, FileNotFoundError: the config or the data is wrong; found
            before anything compiles.
        NonFiniteError: training diverged; the last checkpoint is untouched.
    """
    workdir = pathlib.Path(workdir)
    console = console or Console(is_quiet=jax.process_index() > 0)
    with cluster.telling_failures():
        if isinstance(config, RunConfig):
            return trainer.train(config, workdir, algorithm=algorithm, console=console)
        return _train_stages(config, workdir, algorithm, console)


def _train_stages(
    config: Any, workdir: pathlib.Path, algorithm: Any, console: Console
) -> TrainResult:
    values = _filled(_values(config), workdir)
    corpus, vocab_size = values.pop("corpus", ""), values.pop("new_tokenizer", 0)
    configs = _run_configs(values)
    make_corpus = _corpus(corpus) if corpus else None
    for name, one in configs.items():
        _check_stage(name, one, workdir, algorithm)
    if jax.process_index() == 0:
        if make_corpus is not None:
            make_corpus(make_workdir(workdir) / "data")
        if vocab_size:
            data = next(iter(configs.values())).data.path
            _make_tokenizer(workdir / "tokenizer", data, vocab_size)
    cluster.barrier(f"{workdir.name}/prepared")
    result = None
    for name, one in configs.items():
        if name:
            console.rule(name)
        result = trainer.train(
            one, workdir / name, algorithm=algorithm, console=console
        )
        if not result.is_finished or one.benchmark_steps:
            break
    assert result is not None
    return result


def _check_stage(
    name: str, config: RunConfig, workdir: pathlib.Path, algorithm: Any
) -> None:
    """What can be known of a stage before those before it have run."""
    path = f"config.{name}" if name else "config"
    inputs = {"data.path": config.data.path, "data.valid_path": config.data.valid_path}
    if config.plan.endswith(".json"):
        inputs["plan"] = config.plan
    for role, one in config.roles.items():
        inputs |= {f"roles.{role}.path": one.path}
        inputs |= {f"roles.{role}.lora.path": one.lora.path}
        inputs |= {f"roles.{role}.tokenizer": one.tokenizer}
    for field, value in inputs.items():
        place = pathlib.Path(value)
        is_made_later = place.absolute().is_relative_to(workdir.absolute())
        if value and not is_made_later and not place.exists():
            raise FileNotFoundError(f"{path}.{field} is {value!r}, which is not there.")
    graph = run_lib.make_graph(config, algorithm)
    config = config.without_calls(run_lib.stored_calls(config, algorithm))
    if not config.plan.endswith(".json") or pathlib.Path(config.plan).exists():
        given_plan(config, graph, Cluster.detect())


def _make_tokenizer(folder: pathlib.Path, data: str, vocab_size: int) -> None:
    """Trains a tokenizer on the texts of a file, unless the folder holds it already."""
    if folder.exists():
        found = Tokenizer.load(folder).vocab_size
        if found != vocab_size:
            raise ValueError(
                f"config.new_tokenizer is {vocab_size}, and {folder} has a vocabulary "
                f"of {found}. Use another work folder, or the earlier number."
            )
        return
    records = load_records(data)
    texts = [text for record in records for text in _texts(record)]
    tokenizer = Tokenizer.train(texts, vocab_size=vocab_size)
    partial = make_workdir(folder.parent) / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer.save(partial)
    partial.rename(folder)  # Whole or not there, if killed.


def plan(
    config: Any, cluster: int | str | None = None, *, algorithm: Any = None
) -> ExecutionPlan:
    """The execution plan that a config would run with; of stages, the last one's.

    Where the config leaves it to the planner, roles need a path or a vocabulary.

    Args:
        config: of a run, or of several in `stages`.
        cluster: a machine as in "8xh100" or "4x8xh200" or a file (`planner.cluster`),
            or a number of devices like those here; by default those of this machine.
        algorithm: module or object; by default the one that the config names.
    """
    if isinstance(cluster, str):
        machine = Cluster.load(cluster)
    else:
        machine = Cluster.detect()
        if cluster is not None:
            machine = dataclasses.replace(
                machine, num_nodes=1, devices_per_node=cluster
            )
    return described_plan(_last_run(config), machine, algorithm=algorithm)


def _last_run(config: Any) -> RunConfig:
    if isinstance(config, RunConfig):
        return config
    values = _values(config)
    for name in ("corpus", "new_tokenizer", "paths"):
        values.pop(name, None)
    return list(_run_configs(values).values())[-1]


def _run_configs(values: dict[str, Any]) -> dict[str, RunConfig]:
    """Of each stage by its name, in order; of a single run by the name ""."""
    stages = values.get("stages", ())
    if not stages:
        return {"": to_dataclass(RunConfig, values)}
    for name in values:
        if name != "stages" and name not in stages:
            raise ValueError(
                f"config.{name} is none of the stages {', '.join(stages)}. "
                + suggest(name, stages)
            )
    for name in stages:
        if name not in values:
            raise ValueError(
                f"config.stages names {name!r}; there is no config.{name}."
            )
    return {
        name: to_dataclass(RunConfig, values[name], path=f"config.{name}")
        for name in stages
    }


def _values(config: Any) -> dict[str, Any]:
    values = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    values.pop("cpu_devices", None)
    return values


def _corpus(name: str):
    if name not in CORPORA:
        raise ValueError(
            f"config.corpus={name!r}; the package makes {', '.join(CORPORA)}."
        )
    return CORPORA[name]


def _texts(value: Any) -> Iterator[str]:
    """Every string of a record."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)


def _filled(values: dict[str, Any], workdir: pathlib.Path) -> dict[str, Any]:
    """The values with "{name}" replaced by a path in every string."""
    # The work folder last: a path may be inside it.
    paths = {**values.pop("paths", {}), "workdir": str(workdir)}

    def fill(value: Any, where: str) -> Any:
        if isinstance(value, str):
            for name, path in paths.items():
                if "{" + name + "}" in value and not path:
                    raise ValueError(
                        f"{where} is {value!r}, and config.paths.{name} is not set: "
                        f"--config.paths.{name}=FOLDER."
                    )
                value = value.replace("{" + name + "}", path)
            return value
        if isinstance(value, dict):
            return {k: fill(v, f"{where}.{k}") for k, v in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(fill(item, where) for item in value)
        return value

    return fill(values, "config")
