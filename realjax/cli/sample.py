"""Samples completions of a checkpoint's model, as JSON Lines.

    python -m realjax.cli.sample --model=FOLDER --prompts=prompts.jsonl --n=4
    echo "The kettle arrived and" | python -m realjax.cli.sample --model=FOLDER

A line holds `prompt`, `completion`, `ids`, `logprobs` and `entropy` (nats) and
`finish_reason`: "stop" at an end-of-sequence token or a stop string, "length" at
--max_new_tokens. Where a prompt cannot be continued it is "error", and `error` says
why; the others are, and the exit status is 1.

Lines are written in order while others are sampled. --output appears whole; what an
interrupted command has sampled stays in a file beside it.
"""

import contextlib
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags

from realjax.cli import flags as cli_flags
from realjax.data.records import load_records, read_examples
from realjax.rl.sampling import Sampling
from realjax.runtime import model as model_lib
from realjax.runtime.console import Console
from realjax.runtime.model import Model
from realjax.runtime.sample import Completion, sample


def declare(values: flags.FlagValues, arguments: list[str]) -> list[str]:
    """Adds the flags; those of `Sampling` with its names and defaults."""
    for name, default, about in (
        ("model", "", "Folder of a Hugging Face checkpoint."),
        (
            "prompts",
            "",
            "A .jsonl or .json file of records with `prompt`, or a text file of one "
            "prompt a line; by default the terminal's input.",
        ),
        ("output", "", "JSON Lines file; by default the terminal."),
        ("allocation", "", "As in d2t4; by default data parallel over all devices."),
        ("dtype", "", "float32, bfloat16 or float16; by default bfloat16 on a GPU."),
        ("kv_dtype", "", "Of keys and values: int8 say; by default the model's."),
        ("family", "", "Module of a family of your own, by its dotted name."),
    ):
        flags.DEFINE_string(name, default, about, flag_values=values)
    for name, default, about in (
        ("n", 1, "Completions per prompt."),
        ("slots", 0, "Completions decoded at the same time; 0 means all, up to 64."),
        ("pages", 0, "Of 16 tokens, for keys and values; 0 means as many as needed."),
        ("seed", 0, "Of the draws."),
        ("cpu_devices", 0, "Virtual devices, where there is no GPU."),
    ):
        flags.DEFINE_integer(name, default, about, flag_values=values)
    for name, about in (
        ("stop", "Ends a completion, whose text stands before it; may be repeated."),
        ("bad_words", "A word that is never completed; may be repeated."),
    ):
        flags.DEFINE_multi_string(name, [], about, flag_values=values)
    define = {
        bool: flags.DEFINE_bool,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
    }
    for name, about in _SAMPLING.items():
        default = getattr(Sampling, name)
        define[type(default)](name, default, about, flag_values=values)
    return arguments


_SAMPLING = {
    "temperature": "Divides the logits; 0 is greedy.",
    "top_k": "Most likely tokens to draw from; 0 means all.",
    "top_p": "Draw from the fewest tokens whose probabilities add up to it.",
    "min_p": "Draw from tokens of at least this share of the highest probability.",
    "union": "Take top_p of all tokens, and not of those that top_k left.",
    "greedy": "Always the most likely token.",
    "repetition_penalty": "Above 1, tokens of prompt and completion come less often.",
    "presence_penalty": "Above 0, tokens of the completion come less often.",
    "min_new_tokens": "End-of-sequence tokens are forbidden before as many.",
    "max_new_tokens": "Most tokens of a completion.",
}


def main(values: flags.FlagValues) -> int:
    """Reads prompts, samples, writes one line a completion."""
    if not values.model:
        raise ValueError("--model is missing: the folder of a checkpoint.")
    options: dict[str, Any] = {name: values[name].value for name in _SAMPLING}
    Sampling(**options)  # Refused before anything is read.
    output = _writable(values.output) if values.output else None
    found = _read_input(values.prompts)
    cli_flags.use_compilation_cache()
    cli_flags.use_cpu_devices(values.cpu_devices)
    model = model_lib.load(
        values.model,
        values.allocation or None,
        values.dtype or None,
        values.family or None,
    )
    prompts = _prompt_texts(found, model)
    console = Console(file=sys.stderr)
    target = (
        _lines_to_stream(sys.stdout)
        if output is None
        else _lines_to_file(output, console)
    )
    with target as write:
        lines = Lines(prompts, write)
        try:
            with console.rollout_progress() as on_progress:
                completions = sample(
                    model,
                    prompts,
                    completions_per_prompt=values.n,
                    seed=values.seed,
                    stop=values.stop,
                    bad_words=values.bad_words,
                    slots=values.slots,
                    pages=values.pages,
                    kv_dtype=values.kv_dtype,
                    on_progress=on_progress,
                    on_completion=lines.add,
                    **options,
                )
        finally:
            lines.close()
    failed = {one.prompt: one.error for one in completions if one.error}
    if failed:
        first = next(iter(failed.values()))
        console.print(f"{len(failed)} of {len(prompts)} prompts failed. {first}")
    return 1 if failed else 0


def command(arguments: Sequence[str]) -> int:
    """Runs the command; returns its exit status."""
    return cli_flags.run(declare, main, arguments, about=__doc__ or "")


def _writable(path: str) -> pathlib.Path:
    """The path of a file that can be written; said before the work is done."""
    output = pathlib.Path(path)
    if output.is_dir():
        raise IsADirectoryError(f"--output={path} is a folder. Give a file's name.")
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"--output={path}: there is no folder {output.absolute().parent}. Make it."
        )
    return output


def _read_input(path: str) -> list[str] | list[dict]:
    """Lines of text, or records of a .jsonl or .json file."""
    if path.endswith((".jsonl", ".json")):
        return load_records(path)
    if path and not pathlib.Path(path).is_file():
        raise FileNotFoundError(
            f"--prompts={path}: there is no such file. Give a .jsonl or text file."
        )
    if not path and sys.stdin.isatty():
        print("Prompts, one a line; Ctrl-D ends them.", file=sys.stderr)
    text = pathlib.Path(path).read_text(encoding="utf-8") if path else sys.stdin.read()
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        where = path or "the terminal's input"
        raise ValueError(f"There are no prompts in {where}. Write one a line.")
    return lines


def _prompt_texts(found: list, model: Model) -> list[str]:
    """Texts of the prompts; conversations by the model's chat template."""
    if isinstance(found[0], str):
        return found
    if model.tokenizer is None:
        raise ValueError("The model's folder has no tokenizer.json, and text needs it.")
    return [
        example.prompt for example in read_examples(found, "prompts", model.tokenizer)
    ]


class Lines:
    """Writes completions in the order of their places, as they come.

    Args:
        prompts: texts.
        write: takes a line.
    """

    def __init__(self, prompts: Sequence[str], write: Callable[[str], None]):
        self._prompts, self._write = prompts, write
        self._next = 0
        self._waiting: dict[int, Completion] = {}

    def add(self, place: int, completion: Completion) -> None:
        """Takes a completion, in any order."""
        self._waiting[place] = completion
        while self._next in self._waiting:
            self._write(_line(self._prompts, self._waiting.pop(self._next)))
            self._next += 1

    def close(self) -> None:
        """Writes those that waited for others, which will not come."""
        for _, completion in sorted(self._waiting.items()):
            self._write(_line(self._prompts, completion))
        self._waiting = {}


def _line(prompts: Sequence[str], completion: Completion) -> str:
    fields = {
        "prompt": prompts[completion.prompt],
        "completion": completion.text,
        "ids": completion.ids,
        "logprobs": completion.logprobs,
        "entropy": completion.entropy,
        "finish_reason": completion.finish_reason,
    }
    if completion.error:
        fields["error"] = completion.error
    return json.dumps(fields, ensure_ascii=False)


@contextlib.contextmanager
def _lines_to_file(
    output: pathlib.Path, console: Console
) -> Iterator[Callable[[str], None]]:
    """Yields what writes a line to a file, which appears when all are written.

    If that does not come to pass, they stay in a file beside it, which is named.
    """
    partial = output.with_name(f".{output.name}.partial")
    num_lines = 0
    with contextlib.ExitStack() as stack:
        file = None

        def write(line: str) -> None:
            nonlocal file, num_lines
            if file is None:
                file = stack.enter_context(partial.open("w", encoding="utf-8"))
            print(line, file=file, flush=True)
            num_lines += 1

        try:
            yield write
        except BaseException:
            if num_lines:
                console.print(f"{num_lines} completions are in {partial}")
            raise
    partial.replace(output)
    console.print(f"{num_lines} completions in {output}")


@contextlib.contextmanager
def _lines_to_stream(stream: Any) -> Iterator[Callable[[str], None]]:
    """Yields what prints a line, after the progress bar where the stream is a terminal.

    A bar takes the name sys.stdout for its own while it is drawn.
    """
    lines: list[str] = []
    try:
        if stream.isatty():
            yield lines.append
        else:
            yield lambda line: print(line, file=stream, flush=True)
    finally:
        for line in lines:
            print(line, file=stream)


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
