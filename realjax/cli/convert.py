"""Converts, checks and describes Hugging Face folders, tensor by tensor on the host.

    python -m realjax.cli.convert --source=FOLDER
    python -m realjax.cli.convert --source=FOLDER --target=FOLDER --dtype=bfloat16
    python -m realjax.cli.convert --source=FOLDER --target=FOLDER --adapters=FOLDER

Without a target it only describes the source. What is written is safetensors, with an
index, the config and the tokenizer; .bin files are read without PyTorch, and nothing in
them is executed.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from realjax.cli import flags as cli_flags
from realjax.models import conversion, hf
from realjax.models.byte_ranges import FLOATS
from realjax.models.conversion import Summary
from realjax.runtime.console import Console

DTYPES = {dtype.name: dtype for dtype in FLOATS.values()}


def declare(values: flags.FlagValues, arguments: list[str]) -> list[str]:
    """Adds the flags."""
    for name, default, about in (
        ("source", "", "Folder of a checkpoint: safetensors or .bin."),
        ("target", "", "Folder to write; by default the source is only described."),
        ("dtype", "", "Of the tensors written; by default the widest of the source's."),
        ("head", "", "scalar: a language model becomes a reward model or critic."),
        ("adapters", "", "Folder of adapters in PEFT's layout, to merge into it."),
        ("family", "", "Module of a model family of your own, as it is imported."),
    ):
        flags.DEFINE_string(name, default, about, flag_values=values)
    for name, default, about in (
        ("seed", 0, "Of the numbers of a new head."),
        ("max_file_megabytes", hf.MAX_SHARD_BYTES // 10**6, "Of one file written."),
    ):
        flags.DEFINE_integer(name, default, about, flag_values=values)
    for name, about in (
        ("check", "Read every number, of the target if there is one: all are finite."),
        ("json", "End with one line of JSON."),
    ):
        flags.DEFINE_bool(name, False, about, flag_values=values)
    return arguments


def main(values: flags.FlagValues) -> int:
    """Describes the source; writes, checks and describes the target."""
    if not values.source:
        raise ValueError("--source is missing: the folder of a checkpoint.")
    if values.dtype and values.dtype not in DTYPES:
        raise ValueError(f"--dtype={values.dtype} is not one of {', '.join(DTYPES)}.")
    if values.seed < 0:
        raise ValueError(f"--seed={values.seed}; it must be at least 0.")
    if values.max_file_megabytes < 1:
        raise ValueError(
            f"--max_file_megabytes={values.max_file_megabytes}; it must be at least 1."
        )
    if not values.target and (values.dtype or values.head or values.adapters):
        raise ValueError("--target is missing: the folder to write what is converted.")
    console = Console()
    family = values.family or None
    summary = conversion.summarize(values.source, family=family)
    _show(console, summary)
    if values.target:
        with console.progress("converting", summary.num_tensors, unit="tensors") as on:
            conversion.convert(
                values.source,
                values.target,
                dtype=DTYPES[values.dtype] if values.dtype else None,
                head=values.head or None,
                family=family,
                seed=values.seed,
                adapters=values.adapters or None,
                max_shard_bytes=values.max_file_megabytes * 10**6,
                on_tensor=on,
            )
        summary = conversion.summarize(values.target, family=family)
        _show(console, summary)
    if values.check:
        with console.progress("checking", summary.num_tensors, unit="tensors") as on:
            conversion.check_finite(summary.folder, on, family=family)
        console.print("All tensors are there, of the right shapes, and finite.")
    if values.json:
        print(json.dumps(_record(summary) | {"is_checked": values.check}))
    return 0


def command(arguments: Sequence[str]) -> int:
    """Runs the command; returns its exit status."""
    return cli_flags.run(declare, main, arguments, about=__doc__ or "")


def _show(console: Console, summary: Summary) -> None:
    """Prints what a folder holds."""
    config, num_bytes = summary.config, sum(summary.files.values())
    console.rule(str(summary.folder))
    role = f", a {summary.role}" if summary.role else ""
    lines = {
        "family": f"{config.family}, {config.head} head{role}",
        "parameters": f"{summary.num_parameters:,} in {summary.num_tensors} tensors",
        "layers": f"{config.num_layers} of width {config.width}",
        "files": f"{len(summary.files)}, {num_bytes:,} bytes",
        "tokenizer": "yes" if summary.has_tokenizer else "none",
    }
    if summary.num_ignored:
        lines["unused"] = f"{summary.num_ignored} tensors that the model does not need"
    for name, text in lines.items():
        console.print(f"{name:<12}{text}")
    console.table(
        "stored as",
        ["kind", "tensors", "types"],
        [
            [kind, sum(counts.values()), ", ".join(map(_named, sorted(counts)))]
            for kind, counts in summary.groups.items()
        ],
    )
    if len(summary.dtypes) > 1:
        console.print(
            f"The types are mixed: {', '.join(map(_named, summary.dtypes))}. Each"
            " tensor is cast when it is read.",
            style="yellow",
        )


def _named(dtype: str) -> str:
    return FLOATS[dtype].name


def _record(summary: Summary) -> dict[str, Any]:
    return {
        "folder": str(summary.folder),
        "family": summary.config.family,
        "head": summary.config.head,
        "role": summary.role,
        "parameters": summary.num_parameters,
        "tensors": summary.num_tensors,
        "ignored_tensors": summary.num_ignored,
        "bytes": sum(summary.files.values()),
        "files": list(summary.files),
        "dtypes": list(map(_named, summary.dtypes)),
        "has_tokenizer": summary.has_tokenizer,
        "config": dataclasses.asdict(summary.config),
    }


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
