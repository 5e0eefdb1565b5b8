"""Samples completions of a checkpoint's model, as JSON Lines.

python -m realjax.cli.sample --model=FOLDER --prompts=prompts.jsonl --n=4
echo "The kettle arrived and" | python -m realjax.cli.sample --model=FOLDER
"""

import dataclasses
import json
import pathlib
import sys

from absl import flags

from realjax.cli import flags as cli_flags
from realjax.data.datasets import load_records
from realjax.rl.sampling import Sampling
from realjax.runtime import model as model_lib
from realjax.runtime.console import Console
from realjax.runtime.sample import sample

MODEL = flags.DEFINE_string("model", None, "Folder of a Hugging Face checkpoint.")
PROMPTS = flags.DEFINE_string(
    "prompts",
    "",
    "JSON Lines with `prompt`, or a text file of one prompt a line; "
    "by default the terminal's input.",
)
OUTPUT = flags.DEFINE_string("output", "", "JSON Lines file; by default the terminal.")
N = flags.DEFINE_integer("n", 1, "Completions per prompt.")
ROWS = flags.DEFINE_integer("rows", 0, "Completions at the same time; 0 means all.")
SEED = flags.DEFINE_integer("seed", 0, "Of the draws.")
ALLOCATION = flags.DEFINE_string("allocation", "", "As in d2t4.")
DTYPE = flags.DEFINE_string("dtype", "", "float32 or bfloat16.")
CPU_DEVICES = flags.DEFINE_integer("cpu_devices", 0, "Virtual devices without a GPU.")
OPTIONS = {
    field.name: {
        bool: flags.DEFINE_bool,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
    }[type(field.default)](field.name, field.default, f"Sampling.{field.name}.")
    for field in dataclasses.fields(Sampling)
}


def main() -> None:
    """Reads prompts, samples, writes one line a completion."""
    if not MODEL.value:
        raise ValueError("--model is missing: the folder of a checkpoint.")
    cli_flags.use_compilation_cache()
    cli_flags.use_cpu_devices(CPU_DEVICES.value)
    prompts = _read_prompts()
    model = model_lib.load(MODEL.value, ALLOCATION.value or None, DTYPE.value or None)
    console = Console(file=sys.stderr)
    with console.waves() as on_wave:
        found = sample(
            model,
            prompts,
            completions_per_prompt=N.value,
            rows=ROWS.value,
            seed=SEED.value,
            on_wave=on_wave,
            **{name: flag.value for name, flag in OPTIONS.items()},
        )
    lines = [
        json.dumps(
            {
                "prompt": prompts[one.prompt],
                "completion": one.text,
                "ids": one.ids,
                "logprobs": one.logprobs,
                "finish_reason": one.finish_reason,
            },
            ensure_ascii=False,
        )
        for one in found
    ]
    if OUTPUT.value:
        pathlib.Path(OUTPUT.value).write_text("\n".join(lines) + "\n")
        console.print(f"{len(lines)} completions in {OUTPUT.value}")
    else:
        print("\n".join(lines))


def _read_prompts() -> list[str]:
    """From a file, or the terminal's input, one a line."""
    if PROMPTS.value.endswith((".jsonl", ".json")):
        records = load_records(PROMPTS.value)
        for number, record in enumerate(records, start=1):
            if not isinstance(record.get("prompt"), str):
                raise ValueError(
                    f"{PROMPTS.value}: record {number} has no text `prompt`."
                )
        return [record["prompt"] for record in records]
    if PROMPTS.value:
        lines = pathlib.Path(PROMPTS.value).read_text().splitlines()
    else:
        lines = sys.stdin.read().splitlines()
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ValueError("There are no prompts: the input is empty.")
    return prompts


if __name__ == "__main__":
    cli_flags.run(main)
