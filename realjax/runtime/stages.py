"""What a config file may hold around a run: paths, made data, several runs in a row.

    config.paths.folder = ""            set by --config.paths.folder=…
    config.data.path = "{folder}/train.jsonl"
    config.stages.ppo.roles.policy.path = "{workdir}/sft/export/policy"

"{workdir}" stands for the folder of the whole, so that a stage finds another's export.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from realjax.core.config import to_dataclass
from realjax.data import reviews
from realjax.data.datasets import load_records
from realjax.data.tokenizer import Tokenizer
from realjax.runtime.console import Console
from realjax.runtime.run import RunConfig
from realjax.runtime.trainer import train

CORPORA = {"reviews": reviews.write_reviews}
"""Data that the package makes itself, by the name in `config.corpus`."""


def run_config(config: ConfigDict, workdir: pathlib.Path) -> bool:
    """Runs a config of one run or of several; returns whether it came to its end.

    Args:
        config: a run's config, or one with `stages`. Besides, `paths` names folders,
            `corpus` data to make in `workdir/data`, `new_tokenizer` the vocabulary of
            one to train on the data into `workdir/tokenizer`; `cpu_devices` is for the
            command line.
        workdir: folder of the whole.

    Raises:
        ValueError: a path that is not set, or a corpus that the package does not make.
    """
    console = Console()
    values = config.to_dict()
    paths = {"workdir": str(workdir), **values.pop("paths", {})}
    corpus, vocab_size = values.pop("corpus", ""), values.pop("new_tokenizer", 0)
    values.pop("cpu_devices", None)
    values = _filled(values, paths)
    if corpus:
        if corpus not in CORPORA:
            raise ValueError(
                f"config.corpus={corpus!r}; the package makes {', '.join(CORPORA)}."
            )
        CORPORA[corpus](workdir / "data")
    if vocab_size and not (workdir / "tokenizer").exists():
        records = load_records(values["data"]["path"])
        texts = [text for record in records for text in _texts(record)]
        Tokenizer.train(texts, vocab_size=vocab_size).save(workdir / "tokenizer")
    for name, stage in values.pop("stages", {"": values}).items():
        if name:
            console.rule(name)
        config = to_dataclass(RunConfig, stage)
        if not train(config, workdir / name, console=console).is_finished:
            return False
    return True


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


def _filled(value: Any, paths: dict[str, str], where: str = "config") -> Any:
    """The value with "{name}" replaced by a path in every string."""
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
        return {k: _filled(v, paths, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_filled(item, paths, where) for item in value)
    return value
